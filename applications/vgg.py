"""VGG as the experiments need it: any width, any depth, small images."""

import keras
from keras import layers

# Convolutions in each of the five blocks (Simonyan & Zisserman, Table 1).
BLOCKS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2,) * 5, "vgg16": (2, 2, 3, 3, 3)}


def vgg(x, width=64, blocks=BLOCKS["vgg16"], normalize=True, weight_decay=0.0):
    """The convolutions of VGG, ending with the mean over positions.

    Filters are `width` times 1, 2, 4, 8, 8. Each block ends with a 2x2 max pooling, while
    there is something to pool. Names are those of `keras.applications.VGG16`.

    Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition" (ICLR 2015).

    Args:
        x: tensor of images `(batch, height, width, channels)`.
        width: int, filters of the first block.
        blocks: tuple of ints, convolutions in each block.
        normalize: bool, batch normalization after each convolution. Without it, a
            network of 16 layers hardly starts to learn from few images.
        weight_decay: float, of the kernels.

    Returns:
        A tensor `(batch, 8 * width)`.

    Example:

    >>> import keras
    >>> x = keras.Input((32, 32, 3))
    >>> model = keras.Model(x, vgg(x, normalize=False))
    >>> model.count_params() == keras.applications.VGG16(
    ...     include_top=False, weights=None
    ... ).count_params()
    True
    """
    for block, count in enumerate(blocks, start=1):
        for number in range(1, count + 1):
            x = layers.Conv2D(
                width * min(2 ** (block - 1), 8),
                3,
                padding="same",
                use_bias=not normalize,
                kernel_initializer="he_normal",
                kernel_regularizer=keras.regularizers.L2(weight_decay),
                name=f"block{block}_conv{number}",
            )(x)
            if normalize:
                name = f"block{block}_bn{number}"
                x = layers.BatchNormalization(momentum=0.9, name=name)(x)
            x = layers.ReLU(name=f"block{block}_relu{number}")(x)
        if min(x.shape[1:3]) > 1:
            x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
    return layers.GlobalAveragePooling2D(name="mean")(x)
