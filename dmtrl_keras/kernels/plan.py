"""Applying the kernels of T tasks as a sequence of linear stages.

A stacked kernel that is a product of factors can be applied in several orders:
compose it and convolve once per task, or pull the activations through the
factors. Both are a sequence of stages, and one engine runs them all.

Between stages the activations are shared, grouped or batched (see `ground.forms.Form`).
Every array here is channels-last.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.types import Factors, Tensor

# A function of activations and one kernel.
Convolve: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One linear stage.

    Attributes:
        kind: `"common"`, one kernel `(*window, inputs, outputs)` for all tasks;
            `"stacked"`, one kernel for each task, `(T, *window, inputs, outputs)`;
            `"mix"`, `K` latent outputs of `outputs` channels each, combined to
            one output for each task by the task matrix `(K, T)`.
        inputs: channels in (of one task, where tasks are apart).
        outputs: channels out (likewise).
        kernel: function from the dict of factors to the stage's array.
        spatial: whether this stage is the convolution that carries window,
            strides, dilation and padding; the others are pointwise.
        flops: to make `kernel` from the factors, once in a step.
    """

    kind: str
    inputs: int
    outputs: int
    kernel: Callable[[Factors], Tensor]
    spatial: bool = False
    flops: int = 0


class Geometry(typing.NamedTuple):
    """The sizes of a forward pass, for a count of its operations.

    Attributes:
        batch: int.
        positions_in: int, product of the spatial dimensions before the convolution.
        positions_out: int, the same after it.
        positions_of_window: int, on how many the window is laid; None: `positions_out`.
    """

    batch: int
    positions_in: int
    positions_out: int
    positions_of_window: int | None = None


def plan_flops(
    plan: Sequence[Stage],
    *,
    tasks: int,
    shared_input: bool,
    geometry: Geometry,
    window: int,
) -> int:
    """Multiply-add operations (counted as 2) of one forward pass of a plan.

    Args:
        plan: sequence of `Stage`.
        tasks: int, T.
        shared_input: bool, whether the input is in the shared form.
        geometry: `Geometry`.
        window: int, product of the kernel size.

    Returns:
        An int.
    """
    groups = 1 if shared_input else tasks
    batch, positions, after, of_window = geometry
    total = 0
    for stage in plan:
        taps, here = 1, positions
        if stage.spatial:
            here, taps = after if of_window is None else of_window, window
            positions = after
        if stage.kind == "stacked":
            groups = tasks
        if stage.kind == "mix":
            groups, taps = tasks, 1
        work = groups * taps * stage.inputs * stage.outputs
        total += stage.flops + 2 * batch * here * work
    return total


def _tail(x: Tensor) -> tuple[Any, ...]:
    """The shape after the batch axis, dynamic where it is not known."""
    return tuple(ops.shape(x))[1:]


def fold(x: Tensor, tasks: int) -> Tensor:
    """Grouped `(N, ..., T * C)` to batched `(T * N, ..., C)`."""
    *middle, channels = _tail(x)
    x = ops.reshape(x, (-1, *middle, tasks, channels // tasks))
    axes = len(x.shape)
    x = ops.transpose(x, (axes - 2, *range(axes - 2), axes - 1))
    return ops.reshape(x, (-1, *middle, channels // tasks))


def unfold_tasks(x: Tensor, tasks: int) -> Tensor:
    """Batched `(T * N, ..., C)` to grouped `(N, ..., T * C)`."""
    *middle, channels = _tail(x)
    x = _by_task(x, tasks)
    axes = len(x.shape)
    x = ops.transpose(x, (*range(1, axes - 1), 0, axes - 1))
    return ops.reshape(x, (-1, *middle, tasks * channels))


def _by_task(x: Tensor, tasks: int) -> Tensor:
    # The batch size may be unknown, and only one -1 is allowed.
    return ops.reshape(x, (tasks, -1, *_tail(x)))


def _pointwise(x: Tensor, kernel: Tensor) -> Tensor:
    return ops.matmul(x, ops.reshape(kernel, kernel.shape[-2:]))


def _shared(
    x: Tensor, form: Form, kernel: Tensor, tasks: int, convolve: Convolve | None
) -> tuple[Tensor, Form]:
    if convolve is None:
        if form != Form.GROUPED:
            return _pointwise(x, kernel), form
        *middle, channels = _tail(x)
        x = ops.reshape(x, (-1, *middle, tasks, channels // tasks))
        x = _pointwise(x, kernel)
        return ops.reshape(x, (-1, *middle, tasks * x.shape[-1])), form
    if form == Form.GROUPED:
        x, form = fold(x, tasks), Form.BATCHED
    return convolve(x, kernel), form


def _prefers_loop(x: Tensor, kernel: Tensor) -> bool:
    # TensorFlow's batched product on a CPU takes 1.3 times as long as T products of
    # matrices this large (measured at T = 10, 64 rows, 3136 x 128 and 1024 x 512), and
    # up to twice as long on maps, whose tasks would have to be moved in front.
    return (
        (len(x.shape) > 2 or math.prod(kernel.shape[1:]) >= 2**14)
        and keras.config.backend() == "tensorflow"
        and not keras.distribution.list_devices("gpu")
    )


# Taking so few channels at a time out of the last axis, which is also the gradient of
# putting them there, takes TensorFlow on a CPU four times as long as to transpose those of
# all tasks at once (measured: 50 tasks with 8 channels of 52 x 52). From 64 on the
# transposition takes longer.
_FEW_CHANNELS = 32


def _stacked(
    x: Tensor, form: Form, kernel: Tensor, tasks: int, convolve: Convolve | None
) -> tuple[Tensor, Form]:
    if form == Form.SHARED:
        # One ordinary kernel with T times the outputs.
        axes = len(kernel.shape)
        merged = ops.transpose(kernel, (*range(1, axes - 1), 0, axes - 1))
        shape = (*kernel.shape[1:-1], tasks * kernel.shape[-1])
        merged = ops.reshape(merged, shape)
        if convolve is None:
            return _pointwise(x, merged), Form.GROUPED
        return convolve(x, merged), Form.GROUPED
    if convolve is None:
        kernel = ops.reshape(kernel, (tasks, *kernel.shape[-2:]))
        if form == Form.GROUPED and _prefers_loop(x, kernel):
            pairs = zip(ops.split(x, tasks, axis=-1), ops.unstack(kernel, axis=0))
            parts = [ops.matmul(part, own) for part, own in pairs]
            return ops.concatenate(parts, axis=-1), Form.GROUPED
        if form == Form.GROUPED:
            x = fold(x, tasks)
        *middle, channels = _tail(x)
        x = ops.matmul(ops.reshape(x, (tasks, -1, channels)), kernel)
        return ops.reshape(x, (-1, *middle, kernel.shape[-1])), Form.BATCHED
    # A loop of ordinary convolutions: the grouped one is compiled on its own by
    # Keras on TensorFlow, and is many times slower in training on a CPU.
    kernels = ops.unstack(kernel, axis=0)
    if form == Form.GROUPED and max(kernel.shape[-2:]) > _FEW_CHANNELS:
        inputs = ops.split(x, tasks, axis=-1)
        parts = [convolve(part, own) for part, own in zip(inputs, kernels)]
        return ops.concatenate(parts, axis=-1), form
    if form == Form.GROUPED:
        x = fold(x, tasks)
    inputs = ops.unstack(_by_task(x, tasks), axis=0)
    parts = [convolve(part, own) for part, own in zip(inputs, kernels)]
    return ops.concatenate(parts, axis=0), Form.BATCHED


def _mix(x: Tensor, form: Form, task_matrix: Tensor, tasks: int) -> tuple[Tensor, Form]:
    latent = task_matrix.shape[0]
    if form == Form.GROUPED:
        x, form = fold(x, tasks), Form.BATCHED
    *middle, channels = _tail(x)
    channels = channels // latent
    if form == Form.SHARED:
        x = ops.reshape(x, (-1, *middle, latent, channels))
        x = ops.matmul(ops.transpose(task_matrix), x)
        return ops.reshape(x, (-1, *middle, tasks * channels)), Form.GROUPED
    x = ops.reshape(x, (tasks, -1, latent, channels))
    weights = ops.reshape(ops.transpose(task_matrix), (tasks, 1, latent, 1))
    x = ops.sum(x * weights, axis=2)
    return ops.reshape(x, (-1, *middle, channels)), Form.BATCHED


def apply_plan(
    plan: Sequence[Stage],
    x: Tensor,
    factors: Factors,
    *,
    tasks: int,
    shared_input: bool,
    convolve: Convolve | None = None,
) -> Tensor:
    """Run the stages of a plan on channels-last activations.

    Args:
        plan: sequence of `Stage`.
        x: tensor `(batch, ..., C)` if `shared_input`, else `(batch, ..., T * C)`.
        factors: dict of tensors, handed to each stage's `kernel`.
        tasks: int, T.
        shared_input: bool.
        convolve: function of activations and one kernel `(*window, in, out)`, the
            convolution of the spatial stage; None if the layer is dense.

    Returns:
        A grouped tensor `(batch, ..., T * outputs)`.
    """
    form = Form.SHARED if shared_input else Form.GROUPED
    for stage in plan:
        kernel = stage.kernel(factors)
        spatial = convolve if stage.spatial else None
        if stage.kind == "mix":
            x, form = _mix(x, form, kernel, tasks)
        elif stage.kind == "stacked":
            x, form = _stacked(x, form, kernel, tasks, spatial)
        else:
            x, form = _shared(x, form, kernel, tasks, spatial)
    if form == Form.BATCHED:
        return unfold_tasks(x, tasks)
    if form == Form.SHARED:
        return ops.concatenate([x] * tasks, axis=-1)
    return x


def matmul_flops(*sizes: int) -> int:
    """Operations of a matrix product of the given sizes (rows, inner, columns)."""
    return 2 * math.prod(sizes)
