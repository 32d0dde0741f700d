"""Layers through which tasks see each other's features: Cross-Stitch and NDDR.

Both are baselines of MTAL (Feng & Chen 2021, section 4.2), and work on the grouped layout
between any two layers.
"""

import numbers

import keras
import numpy as np
from keras import ops

from dmtrl_keras.layers.layout import LayoutLayer, on_channels_last


class FusionLayer(LayoutLayer):
    """Base of the layers that mix the features of T tasks (not for direct use).

    Args:
        tasks: positive int T, or the list of task names.
        own: float in [0, 1]: at the start a task's features are `own` times its own plus
            `(1 - own) / (T - 1)` times those of each other task; 1: its own alone.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `trainable`, `dtype`.
    """

    def __init__(self, tasks, own=0.9, data_format=None, **kwargs):
        super().__init__(tasks, data_format, **kwargs)
        number = isinstance(own, numbers.Real) and not isinstance(own, bool)
        if not (number and 0 <= own <= 1):
            raise ValueError(
                f"{self._owner()}: `own` must be a number in [0, 1]. Received: own={own!r}."
            )
        self.own = float(own)

    def _start(self):
        """The start weights of the tasks, an array `(T, T)`, rows summing to 1."""
        tasks = self.tasks
        if tasks == 1:
            return np.ones((1, 1))
        start = np.full((tasks, tasks), (1 - self.own) / (tasks - 1))
        np.fill_diagonal(start, self.own)
        return start

    def call(self, inputs, training=None):
        return on_channels_last(self, inputs, lambda x: self._mixed(x, training))

    def compute_output_shape(self, input_shape):
        self._channels(input_shape)
        return tuple(input_shape)

    def get_config(self):
        return {**super().get_config(), "own": self.own}


@keras.saving.register_keras_serializable("dmtrl_keras")
class CrossStitch(FusionLayer):
    """Cross-stitch unit: each task's features become a combination of those of all tasks.

    `x~_t = sum_s alpha_ts x_s` (MTAL Eq. 1, for any T), with one matrix alpha for the whole
    layer, or one for each channel. Its authors train it with a learning rate 100 to
    1000 times that of the network; see `dmtrl_keras.optimizers.LearningRateMultiplier`.

    Args:
        tasks: positive int T, or the list of task names.
        own: float in [0, 1], the start of `alpha_tt`; the others share `1 - own`.
        per_channel: bool, one matrix for each channel.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `trainable`, `dtype`.

    Attributes:
        alpha: variable `(T, T)`, or `(T, T, C)`; row t makes task t's features.

    Input shape:
        `(batch, ..., T * C)`.

    Output shape:
        That of the input.

    Raises:
        ValueError: if the channels don't divide by T, on `own` out of [0, 1].

    References:
        Misra et al., "Cross-stitch Networks for Multi-task Learning" (CVPR 2016).

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import CrossStitch
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0]])
    >>> print(np.round(np.asarray(CrossStitch(2, own=0.9)(x)), 2))
    [[1.2 2.2 2.8 3.8]]
    """

    def __init__(self, tasks, own=0.9, per_channel=False, data_format=None, **kwargs):
        super().__init__(tasks, own, data_format, **kwargs)
        self.per_channel = bool(per_channel)

    def build(self, input_shape):
        start = self._start()
        if self.per_channel:
            channels = self._channels(input_shape)
            start = np.repeat(start[..., None], channels, axis=-1)
        self.alpha = self.add_weight(
            name="alpha",
            shape=start.shape,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(start, dtype),
        )
        self.built = True

    def _mixed(self, x, training):
        shape = tuple(ops.shape(x))
        x = ops.reshape(x, (*shape[:-1], self.tasks, x.shape[-1] // self.tasks))
        alpha = ops.convert_to_tensor(self.alpha)
        if self.per_channel:
            x = ops.einsum("...sc,tsc->...tc", x, alpha)
        else:
            x = ops.matmul(alpha, x)
        return ops.reshape(x, shape)

    def get_config(self):
        return {**super().get_config(), "per_channel": self.per_channel}


@keras.saving.register_keras_serializable("dmtrl_keras")
class NDDR(FusionLayer):
    """Neural discriminative dimensionality reduction: each task's choice of all features.

    The features of all tasks, concatenated, go through a 1x1 convolution for each task, of
    `T * C` channels to `C`, and batch normalization: `x~_t = BN([x_1, ..., x_T] W_t)`. At
    the start `W_t` is diagonal: `own` times the identity for the task's own features,
    `(1 - own) / (T - 1)` times it for the others'. Its authors, too, use a larger
    learning rate for it, and weight decay.

    Args:
        tasks: positive int T, or the list of task names.
        own: float in [0, 1], see above.
        batch_normalization: bool. Without it, `own=1` is the identity exactly.
        momentum: float in [0, 1), of the moving averages of batch normalization.
        kernel_regularizer: penalty on the kernel.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `trainable`, `dtype`.

    Attributes:
        kernel: variable `(T * C, T * C)`; columns `t * C` to `(t + 1) * C` are `W_t`.

    Input shape:
        `(batch, ..., T * C)`.

    Output shape:
        That of the input.

    Raises:
        ValueError: if the channels don't divide by T, on `own` out of [0, 1].

    References:
        Gao et al., "NDDR-CNN: Layerwise Feature Fusing in Multi-Task CNNs by Neural
        Discriminative Dimensionality Reduction" (CVPR 2019).

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import NDDR
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0]])
    >>> layer = NDDR(2, own=0.9, batch_normalization=False)
    >>> print(np.round(np.asarray(layer(x)), 2))
    [[1.2 2.2 2.8 3.8]]
    """

    def __init__(
        self,
        tasks,
        own=0.9,
        batch_normalization=True,
        momentum=0.99,
        kernel_regularizer=None,
        data_format=None,
        **kwargs,
    ):
        super().__init__(tasks, own, data_format, **kwargs)
        self.momentum = momentum
        self.batch_normalization = bool(batch_normalization)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.normalization = None
        if self.batch_normalization:
            self.normalization = keras.layers.BatchNormalization(
                momentum=momentum, name="normalization", dtype=self.dtype_policy
            )

    def build(self, input_shape):
        channels = self._channels(input_shape)
        # Row block s, column block t: what W_t makes of the features of task s.
        start = np.kron(self._start().T, np.eye(channels))
        self.kernel = self.add_weight(
            name="kernel",
            shape=start.shape,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(start, dtype),
            regularizer=self.kernel_regularizer,
        )
        if self.normalization is not None:
            middle = [None] * (len(input_shape) - 2)
            self.normalization.build((None, *middle, self.tasks * channels))
        self.built = True

    def _mixed(self, x, training):
        x = ops.matmul(x, ops.convert_to_tensor(self.kernel))
        if self.normalization is None:
            return x
        return self.normalization(x, training=training)

    def get_config(self):
        regularizer = keras.regularizers.serialize(self.kernel_regularizer)
        return {
            **super().get_config(),
            "batch_normalization": self.batch_normalization,
            "momentum": self.momentum,
            "kernel_regularizer": regularizer,
        }
