"""Layers that make, keep and take apart the grouped layout.

The channel axis of a grouped tensor holds `tasks x channels`, task-major: channel
`t * C + c` belongs to task `t`. It is the last axis, or axis 1 if the data format is
channels-first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from dmtrl_keras.ground.called import CheckedLayer
from dmtrl_keras.ground.types import DataFormat, Shape, Tasks, Tensor
from dmtrl_keras.ground.validation import (
    channel_axis,
    channels_per_task,
    name_of,
    standardize_data_format,
    task_names,
)
from dmtrl_keras.kernels.plan import fold, unfold_tasks


class LayoutLayer(CheckedLayer):
    """Base of the layers that know names and channels of the tasks (not for direct use)."""

    _passes_masks = False

    def __init__(
        self, tasks: Tasks, data_format: DataFormat | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        owner = type(self).__name__
        self._tasks_argument = list(tasks) if isinstance(tasks, tuple) else tasks
        self.task_names = task_names(tasks, owner)
        self.tasks = len(self.task_names)
        self.data_format = standardize_data_format(data_format, owner)
        self.supports_masking = self._passes_masks

    def build(self, input_shape: Any) -> None:
        self.compute_output_shape(input_shape)
        self.built = True

    def _axis(self, shape: Sequence[int | None]) -> int:
        if len(shape) < 2:
            raise ValueError(
                f"{name_of(self)}: expected inputs (batch, ..., channels). "
                f"Received: shape {tuple(shape)}."
            )
        # `(batch, channels)` has the same channel axis in both formats.
        return channel_axis(self.data_format) % len(shape)

    def _channels(self, shape: Shape) -> int:
        channels = shape[self._axis(shape)]
        return channels_per_task(channels, self.tasks, name_of(self), shape)

    def _mask(self, mask: Any) -> Any:
        """What such a layer makes of masks, which lie as features do.

        In a graph it is a layer, so that the network of one task can do without it.
        """
        if not any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten(mask)):
            return self.call(mask)
        return type(self)(list(self.task_names), name=f"{self.name}_mask")(mask)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["tasks"] = self._tasks_argument
        config["data_format"] = self.data_format
        return config


def _is_common(mask: Tensor, inputs: Tensor) -> bool:
    """Whether a mask of grouped features is one for all tasks.

    It has no axis of channels then, else T of them, one for each task.
    """
    return len(mask.shape) < len(inputs.shape)


def is_shape(value: Any) -> bool:
    """Whether a value is the shape of one tensor."""
    return isinstance(value, (tuple, list)) and all(
        d is None or isinstance(d, int) for d in value
    )


class _OfOneTensorPerTask(LayoutLayer):
    """What layers have in common that take one tensor per task."""

    _takes_several = (list, tuple, dict)
    _expected = "one tensor (batch, ..., channels) for each task, in a list or a dict"

    def _in_order(self, inputs: Any, is_one: Callable[[Any], bool]) -> list[Any]:
        if isinstance(inputs, dict):
            if set(inputs) != set(self.task_names):
                raise ValueError(
                    f"{name_of(self)}: expected one input for each of the tasks "
                    f"{list(self.task_names)}. Received: {sorted(inputs, key=str)}."
                )
            return [inputs[name] for name in self.task_names]
        inputs = [inputs] if is_one(inputs) else list(inputs)
        if len(inputs) != self.tasks:
            raise ValueError(
                f"{name_of(self)}: expected {self.tasks} inputs, one for each task. "
                f"Received: {len(inputs)}."
            )
        return inputs

    def _one_shape(self, input_shape: Any, channels: bool = True) -> Shape:
        """The shape that the tensors of all tasks have, with known channels if need be."""
        shapes = [tuple(s) for s in self._in_order(input_shape, is_shape)]
        first = shapes[0]
        compatible = all(
            len(shape) == len(first)
            and all(a == b or None in (a, b) for a, b in zip(shape, first))
            for shape in shapes
        )
        if not compatible or (channels and first[self._axis(first)] is None):
            known = " with known channels" if channels else ""
            raise ValueError(
                f"{name_of(self)}: expected inputs of one shape{known}. Received: {shapes}."
            )
        return first


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskStack(_OfOneTensorPerTask):
    """One tensor per task to one grouped tensor.

    Args:
        tasks: positive int T, or the list of task names.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `dtype`.

    Input shape:
        A list or tuple of T tensors of one shape `(batch, ..., C)`, or a dict of them by
        task name. A single tensor is taken as a list of one.

    Output shape:
        `(batch, ..., T * C)`.

    Raises:
        ValueError: on another number of tensors, on wrong or missing names, on
            different shapes.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskStack
    >>> images = {"digits": np.zeros((2, 3)), "letters": np.ones((2, 3))}
    >>> tuple(TaskStack(["digits", "letters"])(images).shape)
    (2, 6)
    """

    _passes_masks = True

    def call(self, inputs: Any) -> Tensor:
        inputs = self._in_order(inputs, lambda x: not isinstance(x, (list, tuple)))
        return ops.concatenate(inputs, axis=self._axis(inputs[0].shape))

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Tensor | None:
        masks = self._in_order(previous_mask, lambda x: not isinstance(x, (list, tuple)))
        if any(mask is None for mask in masks):
            return None
        return self._mask([ops.expand_dims(mask, axis=-1) for mask in masks])

    def compute_output_shape(self, input_shape: Any) -> Shape:
        output: list[Any] = list(self._one_shape(input_shape))
        output[self._axis(output)] *= self.tasks
        return tuple(output)


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskBatch(_OfOneTensorPerTask):
    """The examples of all tasks as one batch, those of one task after another.

    It lets an ordinary layer serve all tasks: one that they share, or one that looks
    across the channels of one task. `TaskGroup` is the inverse.

    Args:
        tasks: positive int T, or the list of task names.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `dtype`.

    Input shape:
        A grouped tensor `(batch, ..., T * C)`; or one tensor `(batch, ..., C)` per task, in
        a list or a dict by task name.

    Output shape:
        `(T * batch, ..., C)`; example `t * batch + b` is example `b` of task `t`.

    Raises:
        ValueError: if channels don't divide by T, on another number of tensors, on
            wrong or missing names, on different shapes.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskBatch
    >>> tuple(TaskBatch(3)(np.zeros((2, 4, 4, 6))).shape)
    (6, 4, 4, 2)
    """

    _expected = (
        "one tensor (batch, ..., tasks * channels), or one (batch, ..., channels) for each "
        "task, in a list or a dict"
    )

    # Whatever an example is, there may be several: words, or a number for each of them.
    _dtypes = (*CheckedLayer._dtypes, "string")
    _minimum_ndim = 1

    _passes_masks = True

    def call(self, inputs: Any) -> Tensor:
        if isinstance(inputs, (dict, list, tuple)):
            return ops.concatenate(self._in_order(inputs, lambda x: False), axis=0)
        return on_channels_last(self, inputs, lambda x: fold(x, self.tasks))

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Tensor | None:
        if isinstance(inputs, (dict, list, tuple)):
            masks = self._in_order(previous_mask, lambda x: False)
            return None if any(m is None for m in masks) else self._mask(masks)
        if previous_mask is None:
            return None
        if _is_common(previous_mask, inputs):
            return self._mask([previous_mask] * self.tasks)
        return ops.squeeze(self._mask(previous_mask), axis=-1)

    def compute_output_shape(self, input_shape: Any) -> Shape:
        if is_shape(input_shape):
            shape = list(input_shape)
            shape[self._axis(shape)] = self._channels(input_shape)
        else:
            shape = list(self._one_shape(input_shape, channels=False))
        if shape[0] is not None:
            shape[0] *= self.tasks
        return tuple(shape)


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskGroup(LayoutLayer):
    """A batch of the examples of all tasks to a grouped tensor: `TaskBatch` undone.

    Args:
        tasks: positive int T, or the list of task names.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `dtype`.

    Input shape:
        `(T * batch, ..., C)`, the examples of one task after another.

    Output shape:
        `(batch, ..., T * C)`.

    Raises:
        ValueError: if a known batch does not divide by T, or the channels are unknown.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskGroup
    >>> tuple(TaskGroup(3)(np.zeros((6, 4, 4, 2))).shape)
    (2, 4, 4, 6)
    """

    _passes_masks = True

    def call(self, inputs: Tensor) -> Tensor:
        return on_channels_last(self, inputs, lambda x: unfold_tasks(x, self.tasks))

    def compute_mask(self, inputs: Tensor, previous_mask: Any) -> Tensor | None:
        if previous_mask is None:
            return None
        return self._mask(ops.expand_dims(previous_mask, axis=-1))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        shape: list[Any] = list(input_shape)
        axis = self._axis(shape)
        channels_per_task(shape[axis], 1, name_of(self), input_shape)
        if shape[0] is not None:
            if shape[0] % self.tasks:
                raise ValueError(
                    f"{name_of(self)}: expected a batch that divides by "
                    f"tasks={self.tasks}. Received: input shape {tuple(input_shape)}."
                )
            shape[0] //= self.tasks
        shape[axis] *= self.tasks
        return tuple(shape)


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskRepeat(LayoutLayer):
    """Features that all tasks have in common to a grouped tensor, once for each task.

    A layer with T kernels needs no such copies (`shared_input=True`). They are for what
    has no kernel, such as adding common to task-specific features.

    Args:
        tasks: positive int T, or the list of task names.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `dtype`.

    Input shape:
        `(batch, ..., C)`.

    Output shape:
        `(batch, ..., T * C)`.

    Raises:
        ValueError: if the channels are unknown.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskRepeat
    >>> tuple(TaskRepeat(3)(np.zeros((2, 4))).shape)
    (2, 12)
    """

    _passes_masks = True

    def call(self, inputs: Tensor) -> Tensor:
        return ops.concatenate([inputs] * self.tasks, axis=self._axis(inputs.shape))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        shape: list[Any] = list(input_shape)
        axis = self._axis(shape)
        channels_per_task(shape[axis], 1, name_of(self), input_shape)
        shape[axis] *= self.tasks
        return tuple(shape)


def on_channels_last(
    layer: LayoutLayer, x: Tensor, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """A function of channels-last activations, on activations of any format."""
    axes = len(x.shape)
    if layer._axis(x.shape) == axes - 1:
        return function(x)
    x = function(ops.transpose(x, (0, *range(2, axes), 1)))
    return ops.transpose(x, (0, axes - 1, *range(1, axes - 1)))


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskSplit(LayoutLayer):
    """A grouped tensor to a dict of one tensor per task.

    Args:
        tasks: the list of task names, or positive int T for `task_0`, `task_1`, ...
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `dtype`.

    Input shape:
        `(batch, ..., T * C)`.

    Output shape:
        A dict by task name of `(batch, ..., C)`.

    Raises:
        ValueError: if the channels don't divide by T.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskSplit
    >>> outputs = TaskSplit(["age", "gender"])(np.zeros((2, 6)))
    >>> {name: tuple(output.shape) for name, output in outputs.items()}
    {'age': (2, 3), 'gender': (2, 3)}
    """

    _passes_masks = True

    def call(self, inputs: Tensor) -> dict[str, Tensor]:
        parts = ops.split(inputs, self.tasks, axis=self._axis(inputs.shape))
        return dict(zip(self.task_names, parts))

    def compute_mask(self, inputs: Tensor, previous_mask: Any) -> dict[str, Any]:
        if previous_mask is None or _is_common(previous_mask, inputs):
            return {name: previous_mask for name in self.task_names}
        masks = self._mask(previous_mask)
        return {name: ops.squeeze(mask, axis=-1) for name, mask in masks.items()}

    def compute_output_shape(self, input_shape: Shape) -> dict[str, Shape]:
        shape = list(input_shape)
        shape[self._axis(shape)] = self._channels(input_shape)
        return {name: tuple(shape) for name in self.task_names}


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskFlatten(LayoutLayer):
    """Flatten the features of each task, so that the result is grouped again.

    Each task's part is what `keras.layers.Flatten` would make of that task's features.

    Args:
        tasks: positive int T, or the list of task names.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `dtype`.

    Input shape:
        `(batch, ..., T * C)`, every axis but the batch known.

    Output shape:
        `(batch, T * size)`, `size` being the number of features of one task.

    Raises:
        ValueError: if the channels don't divide by T, or an axis is unknown.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskFlatten
    >>> tuple(TaskFlatten(3)(np.zeros((2, 4, 4, 6))).shape)
    (2, 96)
    """

    def call(self, inputs: Tensor) -> Tensor:
        shape = tuple(inputs.shape)
        axis, channels = self._axis(shape), self._channels(shape)
        parts = (self.tasks, channels)
        x = ops.reshape(inputs, (-1, *shape[1:axis], *parts, *shape[axis + 1 :]))
        rest = [n for n in range(1, len(x.shape)) if n not in (axis, axis + 1)]
        x = ops.transpose(x, (0, axis, *rest, axis + 1))
        return ops.reshape(x, (-1, *self.compute_output_shape(shape)[1:]))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        self._channels(input_shape)
        size = 1
        for d in input_shape[1:]:
            if d is None:
                raise ValueError(
                    f"{name_of(self)}: every axis but the batch must have a known "
                    f"size. Received: input shape {tuple(input_shape)}."
                )
            size *= d
        return (input_shape[0], size)


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskConcatenate(LayoutLayer):
    """Concatenate grouped tensors task by task, so that the result is grouped.

    Args:
        tasks: positive int T, or the list of task names.
        data_format: `"channels_last"` or `"channels_first"`, Keras's setting by default.
        **kwargs: `name`, `dtype`.

    Input shape:
        A list of tensors `(batch, ..., T * C_i)`.

    Output shape:
        `(batch, ..., T * sum of C_i)`.

    Raises:
        ValueError: if the input is no list, if channels don't divide by T, or if other
            axes differ.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskConcatenate
    >>> tuple(TaskConcatenate(2)([np.zeros((3, 4)), np.zeros((3, 6))]).shape)
    (3, 10)
    """

    _takes_one = False
    _takes_several = (list, tuple)
    _expected = "a list of grouped tensors (batch, ..., tasks * channels)"

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        axis = self._axis(inputs[0].shape)
        parts = []
        for x in inputs:
            shape = tuple(ops.shape(x))
            channels = self._channels(x.shape)
            groups = (self.tasks, channels)
            # The batch, not -1, may stay unknown: `ops.shape` has it at run time.
            parts.append(ops.reshape(x, (*shape[:axis], *groups, *shape[axis + 1 :])))
        x = ops.concatenate(parts, axis=axis + 1)
        shape = tuple(ops.shape(x))
        channels = self.tasks * x.shape[axis + 1]
        return ops.reshape(x, (*shape[:axis], channels, *shape[axis + 2 :]))

    def compute_output_shape(self, input_shape: Any) -> Shape:
        if is_shape(input_shape) or not isinstance(input_shape, (list, tuple)):
            raise ValueError(
                f"{name_of(self)}: expected a list of grouped tensors. "
                f"Received: input shape {input_shape}."
            )
        shapes = [tuple(shape) for shape in input_shape]
        first = shapes[0]
        axis = self._axis(first)
        channels = sum(self._channels(shape) for shape in shapes)
        others = [shape[:axis] + shape[axis + 1 :] for shape in shapes]
        for other in others:
            if len(other) != len(others[0]) or any(
                a != b and None not in (a, b) for a, b in zip(other, others[0])
            ):
                raise ValueError(
                    f"{name_of(self)}: all axes but the channels must agree. "
                    f"Received: {shapes}."
                )
        output = list(first)
        output[axis] = self.tasks * channels
        return tuple(output)
