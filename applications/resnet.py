"""ResNet-18, stage by stage, which `keras.applications` does not have.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), Table 1.
"""

import keras
from keras import layers

# conv1 with its pooling, and conv2_x to conv5_x.
STAGES = 5


def resnet18(x, width=64, first=1, last=STAGES, pool=True, name="resnet18"):
    """Some stages of a ResNet-18 on a tensor.

    Args:
        x: tensor `(batch, height, width, channels)`; images in [-1, 1] for stage 1.
        width: positive int, filters of conv1; the paper's is 64. Stage s >= 2 has
            `width * 2^(s - 2)`.
        first: int, the first stage, from 1.
        last: int, the last stage, up to 5.
        pool: bool, whether stage 1 ends with max pooling. For small images it may not.
        name: str, what the names of the layers begin with.

    Returns:
        The tensor after the last stage, before pooling.

    Example:

    >>> import keras
    >>> x = resnet18(keras.Input((64, 64, 3)), width=16)
    >>> tuple(x.shape)
    (None, 2, 2, 128)
    """
    for stage in range(first, last + 1):
        if stage == 1:
            x = _convolution(x, width, 7, 2, f"{name}_conv1")
            x = layers.ReLU(name=f"{name}_conv1_relu")(x)
            if pool:
                x = layers.MaxPooling2D(3, 2, "same", name=f"{name}_conv1_pool")(x)
            continue
        for block in (1, 2):
            stride = 2 if stage > 2 and block == 1 else 1
            filters = width * 2 ** (stage - 2)
            x = _block(x, filters, stride, f"{name}_conv{stage}_block{block}")
    return x


def _block(x, filters, stride, name):
    """A basic block; where the shape changes the shortcut is a 1x1 convolution."""
    shortcut = x
    if stride > 1 or x.shape[-1] != filters:
        shortcut = _convolution(x, filters, 1, stride, f"{name}_0")
    x = _convolution(x, filters, 3, stride, f"{name}_1")
    x = layers.ReLU(name=f"{name}_1_relu")(x)
    x = _convolution(x, filters, 3, 1, f"{name}_2")
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.ReLU(name=f"{name}_out")(x)


def _convolution(x, filters, size, stride, name):
    x = layers.Conv2D(
        filters,
        size,
        stride,
        padding="same",
        use_bias=False,
        kernel_initializer=keras.initializers.HeNormal(),
        name=f"{name}_conv",
    )(x)
    return layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
