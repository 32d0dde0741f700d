"""Walking through a functional or Sequential model, call by call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
from keras import tree

from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.keras_private import (
    as_functional,
    flatten_layers,
    producer_of,
    run_through_graph,
)
from dmtrl_keras.tasks.layout import TaskBatch, TaskGroup, TaskRepeat, TaskSplit, TaskStack
from dmtrl_keras.tasks.task_layer import TaskLayer

_Value = TypeVar("_Value")


def checked_functional(model: keras.Model, owner: str) -> keras.Model:
    """The functional model behind a model.

    Raises:
        ValueError: if there is none.
    """
    graph = as_functional(model) if isinstance(model, keras.Model) else None
    if graph is None:
        raise ValueError(
            f"{owner}: expected a functional or built Sequential Keras model. "
            f"Received: {type(model).__name__} {getattr(model, 'name', '')!r}."
        )
    return graph


def run(
    model: keras.Model,
    inputs: Any,
    visit: Callable[..., Any],
    leave: Callable[[Any, Any], None] | None = None,
) -> Any:
    """Visit every call of an operation in a model, in topological order.

    Nested models are entered. The values that go along the edges may be anything.
    Keras offers this for cloning only; its `clone_model` rests on the same method.

    Args:
        model: a functional or Sequential model.
        inputs: one value for each input tensor, in the structure of `model.input`.
        visit: function `(operation, args, kwargs, path)`, `args` and `kwargs` those of
            the call with values in place of tensors, `path` the tuple of the names of
            the nested models that the operation is in; returns the output values.
        leave: function `(model, outputs)`, told when a nested model has been run.

    Returns:
        The output values, in the structure of `model.output`.
    """
    return _run(model, inputs, visit, leave, ())


def _run(
    model: keras.Model,
    inputs: Any,
    visit: Callable[..., Any],
    leave: Callable[[Any, Any], None] | None,
    path: tuple[str, ...],
) -> Any:
    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        if as_functional(operation) is None:
            return visit(operation, args, kwargs, path)
        outputs = _run(operation, args[0], visit, leave, (*path, operation.name))
        if leave is not None:
            leave(operation, outputs)
        return outputs

    return run_through_graph(as_functional(model), inputs, call)


def values_in(
    kind: type[_Value], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[_Value]:
    """The values of a class among the arguments of a call, a list."""
    return [v for v in tree.flatten((args, kwargs)) if isinstance(v, kind)]


def replaced(
    kind: type[_Value],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    function: Callable[[_Value], Any],
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """`(args, kwargs)` with a function of each value of a class in its place."""
    return tree.map_structure(
        lambda v: function(v) if isinstance(v, kind) else v, (args, kwargs)
    )


def output_spec(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The symbolic outputs of a call with symbolic tensors, which is not made."""
    kwargs = {name: value for name, value in kwargs.items() if name != "training"}
    return operation.compute_output_spec(*args, **kwargs)


def form_of(operation: Any, forms: Sequence[Form]) -> Form:
    """The form of what an operation returns, from those of what it takes.

    Args:
        operation: a layer or operation of a network of T tasks.
        forms: list of the `Form`s of its inputs; inputs of the network count as shared,
            also where each task has its own.

    Returns:
        A `Form`; of `TaskSplit`, that of each part.
    """
    if isinstance(operation, (TaskLayer, TaskStack, TaskGroup, TaskRepeat)):
        return Form.GROUPED
    if isinstance(operation, TaskBatch):
        return Form.BATCHED
    if isinstance(operation, TaskSplit):
        return Form.APART
    order = (Form.GROUPED, Form.BATCHED, Form.APART)
    return next((form for form in order if form in forms), Form.SHARED)


def number_of_tasks(model: keras.Model) -> int:
    """T of a network, as its layers and outputs say it.

    Raises:
        ValueError: if they say nothing, or different numbers.
    """
    layers = flatten_layers(model)
    counts = {layer.tasks for layer in layers if hasattr(layer, "tasks")}
    if isinstance(model.output, dict):
        counts.add(len(model.output))
    if len(counts) != 1:
        raise ValueError(
            f"Model {model.name!r} is not one of a known number of tasks: its layers and "
            f"outputs have {sorted(counts)}."
        )
    return counts.pop()


def names_of_tasks(model: keras.Model) -> tuple[str, ...]:
    """The task names in the order of the channels; none where nothing says them."""
    layers = flatten_layers(model)
    named = [layer.task_names for layer in layers if hasattr(layer, "task_names")]
    if isinstance(model.output, dict):
        # A layer knows the order; the dict need not have it.
        named = [names for names in named if set(names) == set(model.output)]
        named.append(tuple(model.output))
    return named[0] if named else ()


def form_of_tensor(tensor: keras.KerasTensor) -> Form:
    """The form (see `form_of`) of a symbolic tensor of a functional model."""
    known = {}

    def form(x: keras.KerasTensor) -> Form:
        if id(x) not in known:
            operation, parents = producer_of(x)
            known[id(x)] = form_of(operation, [form(parent) for parent in parents])
        return known[id(x)]

    return form(tensor)


def is_trained(model: keras.Model) -> bool:
    """Whether the weights of a model are not those of a start.

    Kernels tell nothing, but biases, scales and running statistics start as constants.
    """
    adapted = {
        id(weight)
        for layer in flatten_layers(model)
        if isinstance(layer, keras.layers.Normalization)
        for weight in layer.weights
    }
    return any(
        len(weight.shape) == 1 and np.ptp(keras.ops.convert_to_numpy(weight)) > 0
        for weight in model.weights
        if id(weight) not in adapted
    )
