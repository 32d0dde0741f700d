"""NDDR: each task chooses from the features of all tasks."""

from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.fusion.base import FusionLayer
from dmtrl_keras.ground.types import DataFormat, Regularizer, Shape, Tasks, Tensor
from dmtrl_keras.ground.validation import check_bool, check_number, from_keras, name_of


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
        tasks: Tasks,
        own: float = 0.9,
        batch_normalization: bool = True,
        momentum: float = 0.99,
        kernel_regularizer: Regularizer = None,
        data_format: DataFormat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks, own, data_format, **kwargs)
        owner = name_of(self)
        self.momentum = check_number("momentum", momentum, owner, 1)
        self.batch_normalization = check_bool(
            "batch_normalization", batch_normalization, owner
        )
        self.kernel_regularizer = from_keras(
            owner, keras.regularizers.get, identifier=kernel_regularizer
        )
        self.normalization = None
        if self.batch_normalization:
            self.normalization = keras.layers.BatchNormalization(
                momentum=momentum, name="normalization", dtype=self.dtype_policy
            )

    def build(self, input_shape: Shape) -> None:
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

    def _mixed(self, x: Tensor, training: bool | None) -> Tensor:
        x = ops.matmul(x, ops.convert_to_tensor(self.kernel))
        if self.normalization is None:
            return x
        return self.normalization(x, training=training)

    def get_config(self) -> dict[str, Any]:
        regularizer = keras.regularizers.serialize(self.kernel_regularizer)
        return {
            **super().get_config(),
            "batch_normalization": self.batch_normalization,
            "momentum": self.momentum,
            "kernel_regularizer": regularizer,
        }
