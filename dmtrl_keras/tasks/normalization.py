"""Normalization over the channels of each task."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from dmtrl_keras.ground.called import CheckedLayer
from dmtrl_keras.ground.types import Shape, Tensor
from dmtrl_keras.ground.validation import (
    channels_per_task,
    check_bool,
    check_number,
    check_tasks,
    is_int,
    is_list,
    name_of,
    refusal,
)


def _check_axis(layer: keras.layers.Layer, axis: Any) -> None:
    (only,) = axis if is_list(axis) and len(axis) == 1 else (axis,)
    if not is_int(only, -1, -1):
        raise refusal("axis", axis, name_of(layer), "-1, the channels")


def _by_task(inputs: Tensor, tasks: int, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function makes of the features of each task, `(..., T, C)`, put together."""
    *middle, channels = tuple(ops.shape(inputs))[1:]
    x = ops.reshape(inputs, (-1, *middle, tasks, channels // tasks))
    # Half precision has too few digits for a mean of squares.
    if keras.backend.standardize_dtype(x.dtype) != "float64":
        x = ops.cast(x, "float32")
    return ops.reshape(normalize(x), (-1, *middle, channels))


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskLayerNormalization(CheckedLayer, keras.layers.LayerNormalization):
    """Layer normalization of each task's features by itself, on the grouped layout.

    For the features x of one task at one position,
    `y = gamma (x - mean(x)) / sqrt(var(x) + epsilon) + beta`, mean and variance over the
    C channels of that task (Ba et al. 2016, "Layer Normalization", Eq. 4). Batch and group
    normalization need no layer of their own: on grouped channels Keras's
    `BatchNormalization`, and its `GroupNormalization` with T times the groups, do it.

    Args:
        tasks: positive int, T.
        epsilon: float, added to the variance.
        center: bool, whether there is `beta`.
        scale: bool, whether there is `gamma`.
        **kwargs: the initializers, regularizers and constraints of `gamma` and `beta` as in
            `keras.layers.LayerNormalization`; `name`, `trainable`, `dtype`.

    Input shape:
        `(batch, ..., T * C)`.

    Output shape:
        The same; `gamma` and `beta` have shape `(T * C,)`, task-major.

    Raises:
        ValueError: on malformed arguments, if the channels don't divide by T, if `axis` is
            not the last one.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskLayerNormalization
    >>> y = TaskLayerNormalization(tasks=2)(np.array([[1.0, 3.0, 10.0, 30.0]], "float32"))
    >>> np.round(y, 2).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self,
        tasks: int,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        check_number("epsilon", epsilon, owner)
        check_bool("center", center, owner)
        check_bool("scale", scale, owner)
        super().__init__(axis=-1, epsilon=epsilon, center=center, scale=scale, **kwargs)
        self.tasks = check_tasks(tasks, owner)
        _check_axis(self, axis)

    def build(self, input_shape: Shape) -> None:
        channels_per_task(input_shape[-1], self.tasks, name_of(self), input_shape)
        super().build((None, input_shape[-1]))

    def call(self, inputs: Tensor) -> Tensor:
        x = _by_task(
            inputs,
            self.tasks,
            lambda x: ops.layer_normalization(x, axis=-1, epsilon=self.epsilon),
        )
        if self.scale:
            x = x * ops.cast(self.gamma, x.dtype)
        if self.center:
            x = x + ops.cast(self.beta, x.dtype)
        return ops.cast(x, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": -1, "tasks": self.tasks}


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskRMSNormalization(CheckedLayer, keras.layers.RMSNormalization):
    """Root-mean-square normalization of each task's features, on the grouped layout.

    For the features x of one task at one position,
    `y = scale x / sqrt(mean(x^2) + epsilon)`, the mean over the C channels of that task
    (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", Eq. 4).

    Args:
        tasks: positive int, T.
        axis: -1, the channels.
        epsilon: float, added to the mean square.
        **kwargs: `name`, `trainable`, `dtype`.

    Input shape:
        `(batch, ..., T * C)`.

    Output shape:
        The same; `scale` has shape `(T * C,)`, task-major.

    Raises:
        ValueError: on malformed arguments, if the channels don't divide by T, if `axis` is
            not the last one.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskRMSNormalization
    >>> y = TaskRMSNormalization(tasks=2)(np.array([[3.0, -3.0, 5.0, 5.0]], "float32"))
    >>> np.round(y, 2).tolist()
    [[1.0, -1.0, 1.0, 1.0]]
    """

    def __init__(
        self,
        tasks: int,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        check_number("epsilon", epsilon, owner)
        super().__init__(axis=-1, epsilon=epsilon, **kwargs)
        self.tasks = check_tasks(tasks, owner)
        _check_axis(self, axis)

    def build(self, input_shape: Shape) -> None:
        channels_per_task(input_shape[-1], self.tasks, name_of(self), input_shape)
        super().build((None, input_shape[-1]))

    def call(self, inputs: Tensor) -> Tensor:
        x = _by_task(
            inputs,
            self.tasks,
            lambda x: ops.rms_normalization(x, axis=-1, epsilon=self.epsilon),
        )
        return ops.cast(x * ops.cast(self.scale, x.dtype), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": -1, "tasks": self.tasks}
