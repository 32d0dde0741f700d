"""T transposed convolutions at once, in one, two and three dimensions."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import (
    Activation,
    Constraint,
    DataFormat,
    Initializer,
    Regularizer,
    Shape,
    Tensor,
)
from dmtrl_keras.ground.validation import (
    check_bool,
    check_one_of,
    check_positive,
    check_window,
    from_keras,
)
from dmtrl_keras.kernels.parameterization import Sharing
from dmtrl_keras.kernels.plan import Geometry
from dmtrl_keras.tasks.column import TaskColumn
from dmtrl_keras.tasks.task_layer import TaskLayer

_TWIN_NAME = "one_task"


class TaskConvTranspose(TaskLayer):
    """The transposed convolution of any rank (not for direct use)."""

    _twin_type: Any = None
    _window_axes: int

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        tasks: int,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        output_padding: int | Sequence[int] | None = None,
        data_format: DataFormat | None = None,
        dilation_rate: int | Sequence[int] = 1,
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
        check_window("kernel_size", kernel_size, self._window_axes, owner)
        check_window("strides", strides, self._window_axes, owner)
        check_window("dilation_rate", dilation_rate, self._window_axes, owner)
        check_bool("use_bias", use_bias, owner)
        check_one_of("padding", padding, ("valid", "same"), owner)
        twin = from_keras(
            owner,
            self._twin_type,
            filters=filters,
            kernel_size=kernel_size,
            strides=strides,
            padding=padding,
            output_padding=output_padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
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
        self.filters = twin.filters
        self.kernel_size = twin.kernel_size
        self.strides = twin.strides
        self.padding = twin.padding
        self.output_padding = twin.output_padding
        self.dilation_rate = twin.dilation_rate

    @property
    def _minimum_ndim(self) -> int:
        return self._window_axes + 2

    def _kernel_shape(self, channels: int) -> tuple[int, ...]:
        return (*self.kernel_size, channels, self.filters)

    def _bias_size(self, channels: int) -> int:
        return self.filters

    def _geometry(self, input_shape: Shape, output_shape: Shape) -> Geometry:
        geometry = super()._geometry(input_shape, output_shape)
        # The window is laid on every position of the input.
        return geometry._replace(positions_of_window=geometry.positions_in)

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        return ops.conv_transpose(
            x,
            ops.swapaxes(kernel, -1, -2),
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format="channels_last",
        )

    def task_kernel(self, task: int) -> Tensor:
        """The kernel of one task, as the Keras twin would hold it.

        Args:
            task: int in [0, T).

        Returns:
            A tensor `(*window, filters, in)`.

        Raises:
            ValueError: if there is no such task.
        """
        return ops.swapaxes(super().task_kernel(task), -1, -2)

    def task_twin(self) -> keras.layers.Layer:
        """The ordinary Keras layer that one task alone would use, without a constraint.

        One that counts axes would count the twin's otherwise.
        """
        twin = super().task_twin()
        twin.kernel_constraint = None
        return twin

    def weights_alone(self, column: TaskColumn | None) -> list[np.ndarray]:
        kernel, *bias = super().weights_alone(column)
        return [np.swapaxes(kernel, -1, -2), *bias]


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskConv2DTranspose(TaskConvTranspose):
    """T transposed 2D convolutions at once: those of a decoder that goes up in size.

    Each task's output is `activation(x_t *' W[..., t] + b[:, t])`, `*'` the transpose of
    the convolution of the same kernel size, strides and padding. The stacked kernel W has
    shape `(height, width, in, filters, T)`, features before outputs as in all layers of
    this library (Keras's `Conv2DTranspose` has them the other way round, and so has
    `task_kernel`). How the T kernels are related is said by `sharing`; factors are applied
    one after another where that is cheaper than to compose the kernel.

    Args:
        filters: positive int, output channels of each task.
        kernel_size: int or tuple of two ints, the window.
        tasks: positive int, T.
        strides: int or tuple of two ints, by which the map grows.
        padding: `"valid"` or `"same"`.
        output_padding: int or tuple of two ints smaller than the strides, what is added to
            the size of the output; None: it follows from the rest.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
            Tensors that are channels-first are transposed on entry and exit.
        dilation_rate: int or tuple of two ints; above 1 only with strides of 1.
        activation: applied to all `T * filters` channels; one that works across channels,
            such as softmax, belongs after `TaskSplit`.
        use_bias: bool. Biases are per task and never shared.
        kernel_initializer: initializer of one task's kernel, of the shape above.
        bias_initializer: initializer of the bias, `(filters, T)`.
        kernel_regularizer: penalty on the stacked kernel, also where that is composed of
            factors.
        bias_regularizer: penalty on the bias.
        activity_regularizer: penalty on the output.
        kernel_constraint: projection of the stacked kernel, whose axes are as above (the
            network of a single task has none).
        bias_constraint: projection of the bias.
        shared_input: bool. False: the input is grouped, with `T * in` channels. True: it
            has `in` channels, the same for all tasks.
        sharing: `"independent"`, `"hard"`, `"laf"`, `"tucker"`, `"tt"`, or a
            `dmtrl_keras.parameterizations.Parameterization`.
        common_draw: bool; whether all tasks start from the same draw. None: yes, except
            where a tolerance chooses the ranks, because equal kernels have task rank 1 at
            any tolerance.
        **kwargs: `name`, `trainable`, `dtype`.

    Input shape:
        `(batch, height, width, T * in)`, or `(batch, height, width, in)` with
        `shared_input=True`; the channels come second if channels-first.

    Output shape:
        `(batch, new_height, new_width, T * filters)`; channel `t * filters + c` belongs to
        task `t`.

    Raises:
        ValueError: on a malformed argument, on channels that don't divide by T, on an
            impossible rank.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskConv2DTranspose
    >>> layer = TaskConv2DTranspose(4, 3, tasks=5, strides=2, padding="same")
    >>> outputs = layer(np.zeros((2, 8, 8, 10), "float32"))
    >>> tuple(outputs.shape), tuple(layer.kernel.shape)
    ((2, 16, 16, 20), (3, 3, 2, 4, 5))
    """

    _twin_type = keras.layers.Conv2DTranspose
    _window_axes = 2


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskConv1DTranspose(TaskConvTranspose):
    """T transposed 1D convolutions: `TaskConv2DTranspose` on `(batch, steps, T * in)`.

    Arguments, errors and layout are those of `TaskConv2DTranspose`; the stacked kernel is
    `(length, in, filters, T)`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskConv1DTranspose
    >>> layer = TaskConv1DTranspose(4, 3, tasks=5, strides=2, padding="same")
    >>> tuple(layer(np.zeros((2, 8, 10), "float32")).shape)
    (2, 16, 20)
    """

    _twin_type = keras.layers.Conv1DTranspose
    _window_axes = 1


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskConv3DTranspose(TaskConvTranspose):
    """T transposed 3D convolutions: `TaskConv2DTranspose` on `(batch, d1, d2, d3, T * in)`.

    Arguments, errors and layout are those of `TaskConv2DTranspose`; the stacked kernel is
    `(k1, k2, k3, in, filters, T)`.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskConv3DTranspose
    >>> layer = TaskConv3DTranspose(4, 2, tasks=3, strides=2)
    >>> tuple(layer(np.zeros((2, 4, 4, 4, 6), "float32")).shape)
    (2, 8, 8, 8, 12)
    """

    _twin_type = keras.layers.Conv3DTranspose
    _window_axes = 3
