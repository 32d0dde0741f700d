"""Cross-Stitch: each task's features become a combination of those of all tasks."""

from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.fusion.base import FusionLayer
from dmtrl_keras.ground.types import DataFormat, Shape, Tasks, Tensor
from dmtrl_keras.ground.validation import check_bool, name_of


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

    def __init__(
        self,
        tasks: Tasks,
        own: float = 0.9,
        per_channel: bool = False,
        data_format: DataFormat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tasks, own, data_format, **kwargs)
        self.per_channel = check_bool("per_channel", per_channel, name_of(self))

    def build(self, input_shape: Shape) -> None:
        start, channels = self._start(), self._channels(input_shape)
        if self.per_channel:
            start = np.repeat(start[..., None], channels, axis=-1)
        self.alpha = self.add_weight(
            name="alpha",
            shape=start.shape,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(start, dtype),
        )
        self.built = True

    def own_weights(self, task: int) -> list[tuple[keras.Variable, np.ndarray]]:
        """Of what a task's features are mixed: its row of alpha."""
        entries = np.arange(self.tasks) == task
        return [(self.alpha, entries.reshape(-1, *[1] * (len(self.alpha.shape) - 1)))]

    def _mixed(self, x: Tensor, training: bool | None) -> Tensor:
        shape = tuple(ops.shape(x))
        x = ops.reshape(x, (*shape[:-1], self.tasks, x.shape[-1] // self.tasks))
        alpha = ops.convert_to_tensor(self.alpha)
        if self.per_channel:
            x = ops.einsum("...sc,tsc->...tc", x, alpha)
        else:
            x = ops.matmul(alpha, x)
        return ops.reshape(x, shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "per_channel": self.per_channel}
