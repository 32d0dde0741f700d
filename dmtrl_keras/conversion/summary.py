"""What the layers of a network of T tasks share and cost, as a table."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import tree

from dmtrl_keras.conversion.graph import (
    checked_functional,
    form_of,
    number_of_tasks,
    output_spec,
    replaced,
    run,
    values_in,
)
from dmtrl_keras.conversion.rules import Kernels, Rule, rule_of
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.tables import print_table
from dmtrl_keras.ground.types import Shape
from dmtrl_keras.tasks.layout import TaskSplit
from dmtrl_keras.tasks.task_layer import NOMINAL_BATCH, TaskLayer, positions_of


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One layer of a network of T tasks.

    Attributes:
        layer: str, its name.
        kind: str, its class.
        output_shape: tuple.
        sharing: str: name of the parameterization; `"hard"` for an ordinary layer that
            serves all tasks; `"independent"` for one with weights for each task, such as
            batch normalization on grouped channels; or the name of the one task
            whose layer it is, in parentheses.
        rank: tuple of ints, or None.
        parameters: int, numbers in its weights, trainable or not.
        parameters_if_independent: int, those that T separate networks would have.
        flops: int, additions and multiplications with kernels in one forward pass of one
            example (of each task); composing factors counts as a part of a batch of 32.
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

    Args:
        model: a functional or Sequential model of T tasks, such as one from `multitask`.
        verbose: bool, whether to print the table, with the totals.

    Returns:
        A list of `LayerSummary`, in the order of the calls.

    Raises:
        ValueError: if the model is not functional, or no layer says how many tasks
            it has.

    Example:

    >>> import keras
    >>> from dmtrl_keras import layers, task_summary
    >>> inputs = keras.Input((8,))
    >>> x = layers.TuckerDense(16, tasks=4, rank=2, shared_input=True, name="fc")(inputs)
    >>> (row,) = task_summary(keras.Model(inputs, x), verbose=False)
    >>> row.sharing, row.rank, row.parameters, row.parameters_if_independent
    ('tucker', (2, 2, 4), 144, 576)
    """
    model = checked_functional(model, "task_summary")
    tasks = number_of_tasks(model)
    by_layer: dict[int, LayerSummary] = {}

    def visit(
        operation: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        path: tuple[str, ...],
    ) -> Any:
        values = values_in(_Value, args, kwargs)
        form = form_of(operation, [value.form for value in values])
        owners = {value.task for value in values if value.task is not None}
        owner = owners.pop() if len(owners) == 1 else None
        args, kwargs = replaced(_Value, args, kwargs, lambda value: value.spec)
        outputs = output_spec(operation, args, kwargs)
        if isinstance(operation, keras.layers.Layer) and operation.weights:
            shape = tuple(values[0].spec.shape)
            row = _row(operation, form, owner, tasks, shape, outputs)
            seen = by_layer.get(id(operation))
            if seen is not None:
                row = dataclasses.replace(row, flops=seen.flops + row.flops)
            by_layer[id(operation)] = row
        if isinstance(operation, TaskSplit):
            return {name: _Value(spec, form, name) for name, spec in outputs.items()}
        return tree.map_structure(lambda spec: _Value(spec, form, owner), outputs)

    inputs = tree.map_structure(lambda x: _Value(x, Form.SHARED, None), model.input)
    run(model, inputs, visit)
    rows = list(by_layer.values())
    if verbose:
        _print(model, tasks, rows)
    return rows


@dataclasses.dataclass
class _Value:
    spec: keras.KerasTensor
    form: Form
    task: str | None


def _row(
    layer: keras.layers.Layer,
    form: Form,
    owner: str | None,
    tasks: int,
    input_shape: Shape,
    outputs: Any,
) -> LayerSummary:
    parameters = layer.count_params()
    independent, rank = parameters, None
    if isinstance(layer, TaskLayer):
        sharing, rank = layer.sharing.name, layer.rank
        # What only training needs is no part of the network.
        states = (layer.selection, layer.prior)
        parameters -= sum(state.count_params() for state in states if state is not None)
        bias = tasks * layer.bias.shape[0] if layer.use_bias else 0
        independent = math.prod(layer.stacked_kernel_shape) + bias
        flops = layer.flops(input_shape) // NOMINAL_BATCH
    elif form == Form.GROUPED:
        rule = rule_of(layer) or Rule()
        sharing, flops = rule.sharing, 0
        if not rule.of_independent_tasks:
            independent = 0
    else:
        sharing = "hard" if owner is None else f"({owner})"
        flops = _flops(layer, outputs) * (tasks if form == Form.BATCHED else 1)
        independent = parameters * (tasks if owner is None else 1)
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


def _flops(layer: keras.layers.Layer, output: Any) -> int:
    """Operations of an ordinary layer with kernels, for one example."""
    if not isinstance(rule_of(layer), Kernels):
        return 0
    data_format = getattr(layer, "data_format", "channels_last")
    positions = positions_of(output.shape, data_format)
    kernels = [w for w in layer.weights if len(w.shape) > 1]
    return 2 * positions * sum(math.prod(kernel.shape) for kernel in kernels)


def _print(model: keras.Model, tasks: int, rows: Sequence[LayerSummary]) -> None:
    columns = ["Layer", "Output shape", "Sharing", "Rank"]
    columns += ["Parameters", "If independent", "FLOPs"]
    names = ("parameters", "parameters_if_independent", "flops")
    cells = [
        [
            f"{row.layer} ({row.kind})",
            row.output_shape,
            row.sharing,
            "" if row.rank is None else row.rank,
            *(f"{getattr(row, name):,}" for name in names),
        ]
        for row in rows
    ]
    totals = [sum(getattr(row, name) for row in rows) for name in names]
    cells.append(["Total", "", "", "", *(f"{total:,}" for total in totals)])
    caption = None
    if totals[1]:
        ratio = totals[0] / totals[1]
        caption = f"{ratio:.3f} of the parameters of {tasks} independent networks"
    title = f"{model.name}, T = {tasks}"
    print_table(title, columns, cells, texts=4, totals=1, caption=caption)
