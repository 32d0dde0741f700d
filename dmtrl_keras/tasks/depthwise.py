"""T depthwise convolutions at once."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from dmtrl_keras.ground.types import (
    Activation,
    Constraint,
    DataFormat,
    Factors,
    Initializer,
    Regularizer,
    Tensor,
)
from dmtrl_keras.ground.validation import (
    check_bool,
    check_positive,
    check_window,
    from_keras,
)
from dmtrl_keras.kernels.parameterization import Sharing
from dmtrl_keras.tasks.task_layer import TaskLayer

_TWIN_NAME = "one_task"


class TaskDepthwiseConv(TaskLayer):
    """The depthwise convolution of any rank (not for direct use)."""

    _twin_type: Any = None
    _window_axes: int

    _kernel_prefix = "depthwise"

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        tasks: int,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        depth_multiplier: int = 1,
        data_format: DataFormat | None = None,
        dilation_rate: int | Sequence[int] = 1,
        activation: Activation = None,
        use_bias: bool = True,
        depthwise_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        depthwise_regularizer: Regularizer = None,
        bias_regularizer: Regularizer = None,
        activity_regularizer: Regularizer = None,
        depthwise_constraint: Constraint = None,
        bias_constraint: Constraint = None,
        shared_input: bool = False,
        sharing: Sharing = "independent",
        common_draw: bool | None = None,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        check_positive("depth_multiplier", depth_multiplier, owner)
        check_window("kernel_size", kernel_size, self._window_axes, owner)
        check_window("strides", strides, self._window_axes, owner)
        check_window("dilation_rate", dilation_rate, self._window_axes, owner)
        check_bool("use_bias", use_bias, owner)
        twin = from_keras(
            owner,
            self._twin_type,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            depth_multiplier=depth_multiplier,
            data_format=data_format,
            dilation_rate=dilation_rate,
            activation=activation,
            use_bias=use_bias,
            depthwise_initializer=depthwise_initializer,
            bias_initializer=bias_initializer,
            depthwise_regularizer=depthwise_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            depthwise_constraint=depthwise_constraint,
            bias_constraint=bias_constraint,
            name=_TWIN_NAME,
        )
        super().__init__(
            twin,
            tasks,
            shared_input=shared_input,
            sharing=sharing,
            common_draw=common_draw,
            contractible=False,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        # Every channel is an output of its own.
        self.stacked.scale_axes = tuple(range(self._window_axes))
        self.kernel_size = twin.kernel_size
        self.strides = twin.strides
        self.padding = twin.padding
        self.dilation_rate = twin.dilation_rate
        self.depth_multiplier = twin.depth_multiplier

    @property
    def _minimum_ndim(self) -> int:
        return self._window_axes + 2

    def _kernel_shape(self, channels: int) -> tuple[int, ...]:
        return (*self.kernel_size, channels, self.depth_multiplier)

    def _bias_size(self, channels: int) -> int:
        return channels * self.depth_multiplier

    def _apply(self, x: Tensor, factors: Factors, alone: bool) -> Tensor:
        tasks = 1 if alone else self.tasks
        shared_input = alone or self.shared_input
        kernel = self.stacked.composed(factors, tasks)
        _, *window, channels, multiplier = kernel.shape
        if shared_input:
            # Every channel has the multipliers of all tasks, which are then moved
            # in front of the channels.
            axes = len(kernel.shape)
            kernel = ops.transpose(kernel, (*range(1, axes - 1), 0, axes - 1))
            shape = (*window, channels, tasks * multiplier)
        else:
            axes = len(kernel.shape)
            order = (*range(1, axes - 2), 0, axes - 2, axes - 1)
            kernel = ops.transpose(kernel, order)
            shape = (*window, tasks * channels, multiplier)
        x = ops.depthwise_conv(
            x,
            ops.reshape(kernel, shape),
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format="channels_last",
        )
        if not shared_input:
            return x
        middle = tuple(ops.shape(x))[1:-1]
        x = ops.reshape(x, (-1, *middle, channels, tasks, multiplier))
        x = ops.swapaxes(x, -2, -3)
        return ops.reshape(x, (-1, *middle, tasks * channels * multiplier))


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskDepthwiseConv2D(TaskDepthwiseConv):
    """T depthwise 2D convolutions at once, each with a kernel of its own.

    The stacked kernel has shape `(height, width, in, depth_multiplier, T)`. Where
    tasks need no relation and the input is grouped, `keras.layers.DepthwiseConv2D` does
    the same; this layer adds the shared input, `sharing`, and the stacked kernel.
    A factorised kernel is always composed: it is small beside the activations.

    Args:
        kernel_size: int or tuple of two ints, the window.
        tasks: positive int, T.
        strides, padding, depth_multiplier, data_format, dilation_rate, activation,
            use_bias, depthwise_initializer, bias_initializer, depthwise_regularizer,
            bias_regularizer, activity_regularizer, depthwise_constraint,
            bias_constraint: as in `keras.layers.DepthwiseConv2D`. Initializer,
            regularizer and constraint of the kernel are treated as in `TaskConv2D`.
        shared_input, sharing, common_draw, **kwargs: as in `TaskConv2D`.

    Input shape:
        `(batch, height, width, T * in)`, or `(batch, height, width, in)` with
        `shared_input=True`; the channels come second if channels-first.

    Output shape:
        `(batch, new_height, new_width, T * in * depth_multiplier)`, task-major.

    Raises:
        ValueError: on a malformed argument, on channels that don't divide by T, on an
            impossible rank.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskDepthwiseConv2D
    >>> layer = TaskDepthwiseConv2D(3, tasks=2, depth_multiplier=2)
    >>> tuple(layer(np.zeros((1, 5, 5, 6), "float32")).shape)
    (1, 3, 3, 12)
    """

    _twin_type = keras.layers.DepthwiseConv2D
    _window_axes = 2


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskDepthwiseConv1D(TaskDepthwiseConv):
    """T depthwise 1D convolutions at once, on `(batch, steps, T * in)`.

    Arguments, errors and layout are those of `TaskDepthwiseConv2D`; the stacked kernel is
    `(length, in, depth_multiplier, T)`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskDepthwiseConv1D
    >>> layer = TaskDepthwiseConv1D(3, tasks=2)
    >>> tuple(layer(np.zeros((1, 5, 6), "float32")).shape)
    (1, 3, 6)
    """

    _twin_type = keras.layers.DepthwiseConv1D
    _window_axes = 1
