"""Walking through a functional or Sequential model, call by call."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
from keras import tree

from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.keras_private import (
    as_functional,
    flatten_layers,
    run_through_graph,
)
from dmtrl_keras.ground.validation import clean_name
from dmtrl_keras.tasks.copies import TaskCopies
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
        operation: a layer or operation of a network of T tasks; None: one that leaves
            features in the form in which they are.
        forms: list of the `Form`s of its inputs; inputs of the network count as shared,
            also where each task has its own.

    Returns:
        A `Form`; of `TaskSplit`, that of each part.
    """
    if isinstance(operation, (TaskLayer, TaskStack, TaskGroup, TaskRepeat)):
        return Form.GROUPED
    if isinstance(operation, (TaskBatch, TaskCopies)):
        return Form.BATCHED
    if isinstance(operation, TaskSplit):
        return Form.APART
    order = (Form.GROUPED, Form.BATCHED, Form.APART)
    return next((form for form in order if form in forms), Form.SHARED)


def by_value(values: Any, tensors: Any) -> dict["Value", keras.KerasTensor]:
    """The tensors of a network's inputs by its `Value`s; a dict may lack some inputs."""
    found: dict[Value, keras.KerasTensor] = {}
    for key in tensors if isinstance(tensors, dict) else [None]:
        given, known = (x if key is None else x[key] for x in (tensors, values))
        found.update(zip(tree.flatten(known), tree.flatten(given)))
    return found


class Names:
    """The names of the layers of a new network, each of them once.

    Args:
        taken: names that it has already, such as those of its inputs.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def new(self, name: str, path: tuple[str, ...] = ()) -> str:
        """A name that no other layer has, from one and the nested models it was in."""
        candidates = [
            clean_name("_".join((*path[start:], name)))
            for start in range(len(path), -1, -1)
        ]
        numbered = (f"{candidates[-1]}_{n}" for n in itertools.count(1))
        for candidate in itertools.chain(candidates, numbered):
            if candidate not in self._taken:
                self._taken.add(candidate)
                return candidate
        raise AssertionError("there are more names than layers")


@dataclasses.dataclass(eq=False)
class Value:
    """A symbolic tensor of a network of T tasks, and what is known of it.

    Attributes:
        spec: the symbolic tensor, by itself.
        form: the `Form`, see `form_of`.
        tasks: int, the tasks whose features are side by side in it, in the channels or in
            the batch; 0 where there are no such.
        parts: which parts of which calls of `TaskSplit` it was computed from, a set of
            `(call, position)`.
    """

    spec: keras.KerasTensor
    form: Form = Form.SHARED
    tasks: int = 0
    parts: frozenset[tuple["Call", int]] = frozenset()


@dataclasses.dataclass(eq=False)
class Call:
    """A call of an operation of a network, nested models entered.

    Attributes:
        operation: the layer or operation.
        args: its arguments, with `Value`s in place of tensors.
        kwargs: likewise.
        path: names of the nested models that it is in.
        outputs: the `Value`s that it returns, in any structure.
    """

    operation: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    path: tuple[str, ...]
    outputs: Any = None

    @property
    def inputs(self) -> list[Value]:
        """All values among the arguments."""
        return values_in(Value, self.args, self.kwargs)

    @property
    def own(self) -> Mapping[str, Value] | None:
        """Of a layer with T kernels, run for a task that is none of the T: its own part."""
        if not isinstance(self.operation, TaskLayer):
            return None
        return self.kwargs.get("own")


@dataclasses.dataclass(frozen=True)
class Trace:
    """The calls of a network in order, and what goes in and comes out.

    Attributes:
        inputs: `Value`s in the structure of the model's input.
        outputs: `Value`s in the structure of its output.
        calls: list of `Call`.
    """

    inputs: Any
    outputs: Any
    calls: list[Call]

    @property
    def by_task(self) -> dict[str, Value] | None:
        """The outputs by task name in the order of the channels; None: no dict of them.

        Which part of the channels is a task's is known by the `TaskSplit` that its output
        comes from; tasks without one are last.
        """
        if not isinstance(self.outputs, dict):
            return None
        if not all(isinstance(value, Value) for value in self.outputs.values()):
            return None
        found = self.positions
        order = sorted(self.outputs, key=lambda task: found.get(task, (0, math.inf))[1])
        return {task: self.outputs[task] for task in order}

    @property
    def positions(self) -> dict[str, tuple[int, int]]:
        """`(tasks, position)` by task: of how many parts of the channels its is which.

        Tasks whose outputs come from no `TaskSplit`, or from several parts, have none.
        """
        found = {}
        for task, value in self.outputs.items():
            parts = {(call.operation.tasks, position) for call, position in value.parts}
            if len(parts) == 1:
                found[task] = parts.pop()
        return found


def trace(model: keras.Model) -> Trace:
    """Every call of a functional model, with the forms of all values."""
    calls: list[Call] = []

    def visit(
        operation: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        path: tuple[str, ...],
    ) -> Any:
        call = Call(operation, args, kwargs, path)
        calls.append(call)
        forms = [value.form for value in call.inputs]
        form = form_of(operation if call.own is None else None, forms)
        args, kwargs = replaced(Value, args, kwargs, lambda value: value.spec)
        specs = output_spec(operation, args, kwargs)
        if isinstance(operation, TaskSplit):
            call.outputs = {
                task: Value(spec, form, parts=frozenset([(call, position)]))
                for position, (task, spec) in enumerate(specs.items())
            }
            return call.outputs
        tasks, parts = 0, frozenset[tuple[Call, int]]()
        if form in (Form.GROUPED, Form.BATCHED):
            found = (value.tasks for value in call.inputs if value.tasks)
            tasks = getattr(operation, "tasks", None) or next(found, 0)
        else:
            parts = parts.union(*(value.parts for value in call.inputs))
        call.outputs = tree.map_structure(lambda x: Value(x, form, tasks, parts), specs)
        return call.outputs

    inputs = tree.map_structure(Value, model.input)
    return Trace(inputs, run(model, inputs, visit), calls)


def users_of(traced: Trace, tasks: int) -> dict[Call, set[str]]:
    """The tasks whose outputs need a call, by call.

    Args:
        traced: the network.
        tasks: int, T, of a network without outputs by task.
    """
    using: dict[Value, set[str]] = {}
    users: dict[Call, set[str]] = {}
    everybody = {f"task_{n}" for n in range(tasks)}
    for task, value in (traced.by_task or {}).items():
        using.setdefault(value, set()).add(task)
    for call in reversed(traced.calls):
        users[call] = set().union(
            *(using.get(value, ()) for value in tree.flatten(call.outputs))
        )
        for value in call.inputs:
            using.setdefault(value, set()).update(users[call])
        if traced.by_task is None:
            # Without outputs by task, by the parts of the channels.
            parts = {part for value in call.inputs for part in value.parts}
            names = {split.operation.task_names[n] for split, n in parts}
            users[call] = names or everybody
    return users


def number_of_tasks(model: keras.Model) -> int:
    """T of a network without outputs by task, as its layers say it.

    Raises:
        ValueError: if they say nothing, or different numbers.
    """
    layers = flatten_layers(model)
    counts = {layer.tasks for layer in layers if hasattr(layer, "tasks")}
    if len(counts) != 1:
        raise ValueError(
            f"Model {model.name!r} is not one of a known number of tasks: it has no dict "
            f"of outputs by task, and its layers have {sorted(counts)}."
        )
    return counts.pop()


def names_of_tasks(model: keras.Model) -> tuple[str, ...]:
    """The task names that the layers have, in the order of the channels, if any has."""
    layers = flatten_layers(model)
    named = (layer.task_names for layer in layers if hasattr(layer, "task_names"))
    return next(named, ())


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
