"""T dense layers at once."""

from typing import Any

import keras

from dmtrl_keras.ground.types import Activation, Constraint, Initializer, Regularizer
from dmtrl_keras.ground.validation import check_bool, check_positive, from_keras
from dmtrl_keras.kernels.parameterization import Sharing
from dmtrl_keras.tasks.task_layer import TaskLayer

_TWIN_NAME = "one_task"


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskDense(TaskLayer):
    """T dense layers at once, `y_t = activation(x_t W[:, :, t] + b[:, t])`.

    The stacked kernel W has shape `(in, units, T)`. How the T kernels are related is
    said by `sharing`; by default they are independent (single-task learning).

    Args:
        units: positive int, output channels of each task.
        tasks: positive int, T.
        activation: as in `keras.layers.Dense`, applied to all `T * units` channels;
            one that works across channels, such as softmax, belongs after `TaskSplit`.
        use_bias: bool. Biases are per task and never shared.
        kernel_initializer: initializer of one task's kernel, `(in, units)`.
        bias_initializer: initializer of the bias, `(units, T)`.
        kernel_regularizer: penalty on the stacked kernel, also where that is composed
            of factors.
        bias_regularizer: penalty on the bias.
        activity_regularizer: penalty on the output.
        kernel_constraint: projection of the stacked kernel; its axes are those of
            `keras.layers.Dense`, since the task axis is last. An independent kernel is
            projected after each update; a composed one where it is used, since its
            factors can't be.
        bias_constraint: projection of the bias.
        shared_input: bool. False: the input is grouped, `(batch, ..., T * in)`. True: it
            is `(batch, ..., in)`, the same for all tasks.
        sharing: `"independent"`, `"hard"`, `"laf"`, `"tucker"`, `"tt"`, or a
            `dmtrl_keras.parameterizations.Parameterization`.
        common_draw: bool; whether all tasks start from the same draw. None: yes, except
            where a tolerance chooses the ranks, because equal kernels have task
            rank 1 at any tolerance.
        **kwargs: `name`, `trainable`, `dtype`.

    Input shape:
        `(batch, ..., T * in)`, or `(batch, ..., in)` with `shared_input=True`.

    Output shape:
        `(batch, ..., T * units)`, channel `t * units + c` belonging to task `t`.

    Raises:
        ValueError: on a malformed argument, on channels that don't divide by T, on an
            impossible rank.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskDense
    >>> layer = TaskDense(5, tasks=3, shared_input=True)
    >>> outputs = layer(np.zeros((2, 4), "float32"))
    >>> tuple(outputs.shape), tuple(layer.kernel.shape)
    ((2, 15), (4, 5, 3))
    """

    def __init__(
        self,
        units: int,
        tasks: int,
        activation: Activation = None,
        use_bias: bool = True,
        kernel_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        kernel_regularizer: Regularizer = None,
        bias_regularizer: Regularizer = None,
        activity_regularizer: Regularizer = None,
        kernel_constraint: Constraint = None,
        bias_constraint: Constraint = None,
        shared_input: bool = False,
        sharing: Sharing = "independent",
        common_draw: bool | None = None,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        check_positive("units", units, owner)
        check_bool("use_bias", use_bias, owner)
        twin = from_keras(
            owner,
            keras.layers.Dense,
            units=units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            name=_TWIN_NAME,
        )
        super().__init__(
            twin,
            tasks,
            shared_input=shared_input,
            sharing=sharing,
            common_draw=common_draw,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.units = twin.units
        self.supports_masking = True

    def _kernel_shape(self, channels: int) -> tuple[int, ...]:
        return (channels, self.units)

    def _bias_size(self, channels: int) -> int:
        return self.units
