"""What the layers of a network of T tasks share and cost, as a table."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import tree

from dmtrl_keras.conversion.rules import Kernels, Rule, rule_of
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.tables import make_console, print_table
from dmtrl_keras.ground.types import Shape
from dmtrl_keras.ground.validation import check_bool
from dmtrl_keras.tasks.column import TaskColumn
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.graph import (
    Call,
    checked_functional,
    number_of_tasks,
    trace,
    users_of,
)
from dmtrl_keras.tasks.task_layer import NOMINAL_BATCH, TaskLayer, positions_of

# A terminal of the usual width shows the table, and so does a page.
_WIDTH = 80
# From so many layers on, those that are alike for each task stand in one line.
_ALIKE = 3
_NUMBERS = ("parameters", "parameters_if_independent", "flops")


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer of a network of T tasks.

    Attributes:
        layer: str, its name.
        kind: str, its class.
        output_shape: tuple.
        sharing: str: name of the parameterization; `"hard"` for an ordinary layer that
            serves all tasks; `"independent"` for one with weights for each task, such as
            batch normalization on grouped channels; the name of the one task whose
            layer it is, in parentheses; or `"unused"`, if no output needs it.
        rank: tuple of ints, or None.
        parameters: int, numbers in its weights, trainable or not.
        parameters_if_independent: int, those that T separate networks would have.
        flops: int, additions and multiplications with kernels in one forward pass of one
            example (of each task); composing factors counts as a part of a batch of 32. Of
            copies of a layer: each of its kernels at every position of the first input.
    """

    layer: str
    kind: str
    output_shape: Shape
    sharing: str
    rank: tuple[int, ...] | None
    parameters: int
    parameters_if_independent: int
    flops: int


def task_summary(model: keras.Model, verbose: bool = True) -> list[LayerSummary]:
    """What every layer with weights shares and costs.

    In the printed table layers that are alike and belong to one task each, such as
    heads, share a line.

    Args:
        model: a functional or Sequential model of T tasks, such as one from `multitask`.
            With outputs by task, T is their number.
        verbose: bool, whether to print the table, with the totals.

    Returns:
        A list of `LayerSummary`, in the order of the calls; layers of one task each in the
        order of the tasks.

    Raises:
        ValueError: if the model is not functional, or neither outputs nor layers say how
            many tasks it has.

    Example:

    >>> import keras
    >>> from dmtrl_keras import layers, task_summary
    >>> inputs = keras.Input((8,))
    >>> x = layers.TuckerDense(16, tasks=4, rank=2, shared_input=True, name="fc")(inputs)
    >>> (row,) = task_summary(keras.Model(inputs, x), verbose=False)
    >>> row.sharing, row.rank, row.parameters, row.parameters_if_independent
    ('tucker', (2, 2, 4), 144, 576)
    """
    verbose = check_bool("verbose", verbose, "task_summary")
    model = checked_functional(model, "task_summary")
    traced = trace(model)
    by_task = traced.by_task
    tasks = number_of_tasks(model) if by_task is None else len(by_task)
    users = users_of(traced, tasks)
    # Of tasks that came later, which T separate networks would have kernels for too.
    added = collections.Counter(
        id(call.operation) for call in traced.calls if call.own is not None
    )
    rows: dict[int, LayerSummary] = {}
    owners: dict[int, str | None] = {}
    for call in traced.calls:
        layer = call.operation
        if not (isinstance(layer, keras.layers.Layer) and layer.weights):
            continue
        using = users[call]
        row = _row(call, using, tasks, added[id(layer)])
        seen = rows.get(id(layer))
        if seen is not None:
            row = dataclasses.replace(row, flops=seen.flops + row.flops)
            if call.own is not None:
                row = dataclasses.replace(row, output_shape=seen.output_shape)
        rows[id(layer)] = row
        owners[id(layer)] = next(iter(using)) if row.sharing == _of_one(using) else None
    ordered = _in_order_of_tasks(rows, owners, list(by_task or ()))
    if verbose:
        _print(model, tasks, ordered)
    return ordered


def _in_order_of_tasks(
    rows: dict[int, LayerSummary], owners: dict[int, str | None], names: list[str]
) -> list[LayerSummary]:
    """Rows in the order of the calls; single tasks' side by side in that of the tasks."""
    place = {name: number for number, name in enumerate(names)}
    ordered = []
    for owned, keys in itertools.groupby(rows, key=lambda key: owners[key] is not None):
        group = list(keys)
        if owned:
            group.sort(key=lambda key: place.get(str(owners[key]), len(place)))
        ordered += [rows[key] for key in group]
    return ordered


def _of_one(users: set[str]) -> str:
    """How a layer is called that one task has."""
    return f"({next(iter(users))})" if len(users) == 1 else ""


def _row(call: Call, users: set[str], tasks: int, added: int) -> LayerSummary:
    layer = call.operation
    input_shape = tuple(call.inputs[0].spec.shape)
    outputs = tree.map_structure(lambda value: value.spec, call.outputs)
    form = tree.flatten(call.outputs)[0].form
    parameters = layer.count_params()
    independent, rank = parameters, None
    if isinstance(layer, TaskLayer):
        sharing, rank = layer.sharing.name, layer.rank
        # What only training needs is no part of the network.
        states = (layer.selection, layer.prior)
        parameters -= sum(state.count_params() for state in states if state is not None)
        independent = (layer.tasks + added) * _of_one_kernel(layer)
        flops = layer.flops(input_shape, alone=call.own is not None) // NOMINAL_BATCH
    elif isinstance(layer, TaskCopies):
        sharing, rank = _sharing_of_copies(layer), None
        every = [state for own in layer.kernels for state in (own.selection, own.prior)]
        parameters -= sum(state.count_params() for state in every if state is not None)
        twin = sum(math.prod(v.shape) for v in layer.layer.weights)
        independent = (layer.tasks + added) * twin
        flops = layer.tasks * _flops_of_copy(layer, input_shape)
    elif isinstance(layer, TaskColumn):
        # Without factors it would be a kernel, which stands with the layer's others.
        sharing, independent, flops = _of_one(users) or "unused", 0, 0
    elif form == Form.GROUPED:
        rule = rule_of(layer) or Rule()
        sharing, flops = rule.sharing, 0
        if not rule.of_independent_tasks:
            independent = 0
    else:
        batches = call.inputs[0].tasks if form == Form.BATCHED else 1
        flops = _flops(layer, input_shape, outputs) * batches
        alone = len(users) == 1 and (tasks > 1 or form == Form.APART)
        sharing = _of_one(users) if alone else "hard" if users else "unused"
        # Each of the tasks that use it would have its own.
        independent = parameters * len(users)
    shape = tree.map_structure(lambda spec: tuple(spec.shape), outputs)
    return LayerSummary(
        layer=layer.name,
        kind=type(layer).__name__,
        output_shape=shape,
        sharing=sharing,
        rank=rank,
        parameters=parameters,
        parameters_if_independent=independent,
        flops=int(flops),
    )


def _sharing_of_copies(layer: TaskCopies) -> str:
    """The names of the parameterizations of its kernels, each once."""
    names = dict.fromkeys(kernel.sharing.name for kernel in layer.kernels)
    return ", ".join(names) or "independent"


def _flops_of_copy(layer: TaskCopies, input_shape: Shape) -> int:
    """Operations of one copy, as if each kernel were applied at every position."""
    if isinstance(layer.layer, keras.layers.Embedding):
        return 0
    data_format = getattr(layer.layer, "data_format", "channels_last")
    kernels = sum(math.prod(kernel.shape[:-1]) for kernel in layer.kernels)
    return 2 * positions_of(input_shape, data_format) * kernels


def _of_one_kernel(layer: TaskLayer) -> int:
    """The weights of one task's kernel and bias."""
    kernel = math.prod(layer.stacked_kernel_shape[:-1])
    return kernel + (layer.bias.shape[0] if layer.use_bias else 0)


_UPWARDS = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def _flops(layer: keras.layers.Layer, input_shape: Shape, output: Any) -> int:
    """Operations of an ordinary layer with kernels, for one example."""
    if not isinstance(rule_of(layer), Kernels):
        return 0
    data_format = getattr(layer, "data_format", "channels_last")
    # A transposed convolution lays its window on the positions of its input.
    upwards = isinstance(layer, _UPWARDS)
    positions = positions_of(input_shape if upwards else output.shape, data_format)
    kernels = [w for w in layer.weights if len(w.shape) > 1]
    return 2 * positions * sum(math.prod(kernel.shape) for kernel in kernels)


def _print(model: keras.Model, tasks: int, rows: Sequence[LayerSummary]) -> None:
    columns = ["Layer", "Output", "Sharing", "Weights", "If separate", "FLOPs"]
    cells = []
    for alike in _alike(rows):
        row = alike[0]
        # In words, so that it may take several lines.
        rank = "" if row.rank is None else f", rank {' '.join(map(str, row.rank))}"
        layer, sharing = f"{row.layer} ({row.kind}{rank})", row.sharing
        if len(alike) > 1:
            layer = f"{row.layer} to {alike[-1].layer} ({len(alike)} {row.kind})"
            sharing = "(each one)"
        shape = short_shape(row.output_shape)
        cells.append([layer, shape, sharing, *_numbers(alike)])
    cells.append(["Total", "", "", *_numbers(rows)])
    totals = [sum(getattr(row, name) for row in rows) for name in _NUMBERS]
    caption = None
    if totals[1]:
        ratio = totals[0] / totals[1]
        caption = f"{ratio:.3f} of the parameters of {tasks} independent networks"
    title = f"{model.name}, T = {tasks}"
    console = make_console()
    console.width = min(console.width, _WIDTH)
    print_table(title, columns, cells, texts=3, totals=1, caption=caption, console=console)


def _alike(rows: Sequence[LayerSummary]) -> list[list[LayerSummary]]:
    """The rows by line: layers of one task each that differ in nothing but the task."""
    lines: dict[Any, list[LayerSummary]] = {}
    for number, row in enumerate(rows):
        one = row.sharing.startswith("(")
        kind = dataclasses.replace(row, layer="", sharing="") if one else number
        lines.setdefault(str(kind), []).append(row)
    found: list[list[LayerSummary]] = []
    for line in lines.values():
        found += [line] if len(line) >= _ALIKE else [[row] for row in line]
    return found


def _numbers(rows: Sequence[LayerSummary]) -> list[str]:
    """The sums of some rows; of the FLOPs three digits are enough."""
    *parameters, flops = (sum(getattr(row, name) for row in rows) for name in _NUMBERS)
    return [*(f"{count:,}" for count in parameters), short_number(flops)]


def short_number(number: float) -> str:
    """Three digits and a unit, such as `1.25M`."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if unit else f"{number}"


def short_shape(shape: Any) -> str:
    """A shape without the batch, such as `8x8x64`; of several tensors as it is."""
    if not isinstance(shape, tuple) or any(isinstance(d, tuple) for d in shape):
        return str(shape)
    return "x".join("?" if d is None else str(d) for d in shape[1:])
