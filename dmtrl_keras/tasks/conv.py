"""T convolutions at once, in one, two and three dimensions."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from dmtrl_keras.ground.types import (
    Activation,
    Constraint,
    DataFormat,
    Initializer,
    Regularizer,
    Tensor,
)
from dmtrl_keras.ground.validation import (
    check_bool,
    check_positive,
    check_window,
    from_keras,
    name_of,
)
from dmtrl_keras.kernels.parameterization import Sharing
from dmtrl_keras.tasks.task_layer import TaskLayer

_TWIN_NAME = "one_task"


class TaskConv(TaskLayer):
    """The convolution of any rank (not for direct use)."""

    _twin_type: Any = None
    _window_axes: int

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        tasks: int,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: DataFormat | None = None,
        dilation_rate: int | Sequence[int] = 1,
        groups: int = 1,
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
        check_positive("filters", filters, owner)
        check_positive("groups", groups, owner)
        check_window("kernel_size", kernel_size, self._window_axes, owner)
        check_window("strides", strides, self._window_axes, owner)
        check_window("dilation_rate", dilation_rate, self._window_axes, owner)
        check_bool("use_bias", use_bias, owner)
        twin = from_keras(
            owner,
            self._twin_type,
            filters=filters,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            groups=groups,
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
            contractible=twin.groups == 1,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.filters = twin.filters
        self.kernel_size = twin.kernel_size
        self.strides = twin.strides
        self.padding = twin.padding
        self.dilation_rate = twin.dilation_rate
        self.groups = twin.groups
        if self.groups == 1 and {*self.kernel_size, *self.strides} == {1}:
            # A matrix product is several times faster than a pointwise convolution on
            # TensorFlow and a CPU where maps are small (measured: 4 x 4, 1.3 to 4 times).
            self._convolve = None  # type: ignore[method-assign, assignment]

    @property
    def _minimum_ndim(self) -> int:
        return self._window_axes + 2

    def _kernel_shape(self, channels: int) -> tuple[int, ...]:
        if channels % self.groups:
            raise ValueError(
                f"{name_of(self)}: the input channels of each task must divide by "
                f"`groups`. Received: groups={self.groups}, {channels} channels for "
                "each task."
            )
        return (*self.kernel_size, channels // self.groups, self.filters)

    def _bias_size(self, channels: int) -> int:
        return self.filters

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        padding = self.padding
        if padding == "causal":
            left = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            x, padding = ops.pad(x, [[0, 0], [left, 0], [0, 0]]), "valid"

        def convolve(x: Tensor, kernel: Tensor) -> Tensor:
            return ops.conv(
                x,
                kernel,
                strides=list(self.strides),
                padding=padding,
                dilation_rate=self.dilation_rate,
                data_format="channels_last",
            )

        if self.groups == 1:
            return convolve(x, kernel)
        # The outputs are the filters of one task, or with a shared input those of
        # all T: task-major either way, so a group's filters are a slice of each.
        outputs = kernel.shape[-1]
        size = self.filters // self.groups
        kernel = ops.reshape(kernel, (*kernel.shape[:-1], -1, self.groups, size))
        results = []
        for group, part in enumerate(ops.split(x, self.groups, axis=-1)):
            own = ops.reshape(
                kernel[..., group, :], (*kernel.shape[:-3], outputs // self.groups)
            )
            result = convolve(part, own)
            middle = tuple(ops.shape(result))[1:-1]
            results.append(
                ops.reshape(result, (-1, *middle, outputs // self.filters, 1, size))
            )
        result = ops.concatenate(results, axis=-2)
        return ops.reshape(result, (-1, *middle, outputs))


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskConv2D(TaskConv):
    """T 2D convolutions at once, `y_t = activation(x_t * W[..., t] + b[:, t])`.

    The stacked kernel W has shape `(height, width, in / groups, filters, T)`. How the T
    kernels are related is said by `sharing`; by default they are independent
    (single-task learning). A shared input is convolved once, with T times the
    filters; a grouped input takes one ordinary convolution for each task.

    Args:
        filters: positive int, output channels of each task.
        kernel_size: int or tuple of two ints, the window.
        tasks: positive int, T.
        strides: int or tuple of two ints.
        padding: `"valid"` or `"same"`; in one dimension also `"causal"`.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
            Tensors that are channels-first are transposed on entry and exit.
        dilation_rate: int or tuple of two ints.
        groups: int, in which the channels of each task are split.
        activation: as in `keras.layers.Conv2D`, applied to all `T * filters` channels;
            one that works across channels, such as softmax, belongs after `TaskSplit`.
        use_bias: bool. Biases are per task and never shared.
        kernel_initializer: initializer of one task's kernel.
        bias_initializer: initializer of the bias, `(filters, T)`.
        kernel_regularizer: penalty on the stacked kernel, also where that is composed
            of factors.
        bias_regularizer: penalty on the bias.
        activity_regularizer: penalty on the output.
        kernel_constraint: projection of the stacked kernel; its axes are those of
            `keras.layers.Conv2D`, since the task axis is last. An independent kernel is
            projected after each update; a composed one where it is used, since its
            factors can't be.
        bias_constraint: projection of the bias.
        shared_input: bool. False: the input is grouped, with `T * in` channels. True: it
            has `in` channels, the same for all tasks.
        sharing: `"independent"`, `"hard"`, `"laf"`, `"tucker"`, `"tt"`, or a
            `dmtrl_keras.parameterizations.Parameterization`.
        common_draw: bool; whether all tasks start from the same draw. None: yes, except
            where a tolerance chooses the ranks, because equal kernels have task
            rank 1 at any tolerance.
        **kwargs: `name`, `trainable`, `dtype`.

    Input shape:
        `(batch, height, width, T * in)`, or `(batch, height, width, in)` with
        `shared_input=True`; the channels come second if channels-first.

    Output shape:
        `(batch, new_height, new_width, T * filters)`; channel `t * filters + c`
        belongs to task `t`.

    Raises:
        ValueError: on a malformed argument, on channels that don't divide by T, on an
            impossible rank.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskConv2D
    >>> layer = TaskConv2D(4, 3, tasks=5, padding="same", shared_input=True)
    >>> outputs = layer(np.zeros((2, 8, 8, 1), "float32"))
    >>> tuple(outputs.shape), tuple(layer.kernel.shape)
    ((2, 8, 8, 20), (3, 3, 1, 4, 5))
    """

    _twin_type = keras.layers.Conv2D
    _window_axes = 2


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskConv1D(TaskConv):
    """T 1D convolutions at once: `TaskConv2D` on `(batch, steps, T * in)`.

    `padding="causal"` is there as in `keras.layers.Conv1D`. Arguments, errors and
    layout are those of `TaskConv2D`; the stacked kernel is
    `(length, in / groups, filters, T)`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskConv1D
    >>> layer = TaskConv1D(4, 3, tasks=5, padding="causal")
    >>> tuple(layer(np.zeros((2, 8, 10), "float32")).shape)
    (2, 8, 20)
    """

    _twin_type = keras.layers.Conv1D
    _window_axes = 1


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskConv3D(TaskConv):
    """T 3D convolutions at once: `TaskConv2D` on `(batch, d1, d2, d3, T * in)`.

    Arguments, errors and layout are those of `TaskConv2D`; the stacked kernel is
    `(k1, k2, k3, in / groups, filters, T)`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskConv3D
    >>> layer = TaskConv3D(4, 2, tasks=3)
    >>> tuple(layer(np.zeros((2, 4, 4, 4, 6), "float32")).shape)
    (2, 3, 3, 3, 12)
    """

    _twin_type = keras.layers.Conv3D
    _window_axes = 3
