"""From a network of T tasks to the ordinary Keras model of one task."""

from typing import Any

import keras
from keras import tree

from dmtrl_keras.conversion import rules
from dmtrl_keras.ground.copying import copy_of, load_weights
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.validation import check_name, clean_name, is_int, refusal
from dmtrl_keras.tasks.column import TaskColumn
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.graph import (
    Call,
    Names,
    Trace,
    Value,
    by_value,
    checked_functional,
    names_of_tasks,
    number_of_tasks,
    replaced,
    trace,
    values_in,
)
from dmtrl_keras.tasks.layout import TaskBatch, TaskGroup, TaskRepeat, TaskSplit, TaskStack
from dmtrl_keras.tasks.task_layer import TaskLayer


def single_task(
    model: keras.Model, task: int | str, name: str | None = None
) -> keras.Model:
    """The network of one task, as an ordinary Keras model of ordinary Keras layers.

    Kernels are composed once. The outputs are those of the network of all tasks, and the
    saved model needs nothing of this library. What other tasks alone need is left out.
    Nested models are taken apart. Which of the T kernels of a layer are the task's is
    known by the `TaskSplit` that its output comes from, so that tasks may have been
    removed or added.

    Args:
        model: a functional or Sequential model of T tasks: one that `multitask` made, or
            one made by hand of this library's layers.
        task: name of the task, or its number, an int in [0, T), in the order of the
            channels.
        name: name of the new model. None: that of the model and the task.

    Returns:
        A functional Keras model, not compiled, with copies of the weights. Its input is
        the task's own where each task has one.

    Raises:
        ValueError: if there is no such task, or layers mix the tasks so that none of
            them can be had alone (all of them are listed).

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import layers, single_task
    >>> inputs = keras.Input((8,))
    >>> x = layers.TuckerDense(16, tasks=2, rank=0.5, shared_input=True)(inputs)
    >>> model = keras.Model(inputs, layers.TaskSplit(["age", "gender"])(x))
    >>> alone = single_task(model, "gender")
    >>> [type(layer).__name__ for layer in alone.layers]
    ['InputLayer', 'Dense']
    >>> x = np.ones((1, 8))
    >>> np.allclose(alone(x), model(x)["gender"], atol=1e-5)
    True
    """
    check_name("name", name, "single_task")
    graph = checked_functional(model, "single_task")
    traced = trace(graph)
    by_task = traced.by_task
    names = names_of_tasks(graph) if by_task is None else tuple(by_task)
    index = _index(task, names, len(names) or number_of_tasks(graph), graph)
    label = names[index] if names else f"task_{index}"
    outputs = traced.outputs if by_task is None else by_task[label]
    demand = Demand(traced)
    for value in tree.flatten(outputs):
        demand.want(value, position_of(value, index, by_task is None, label))
    demand.back_to_inputs()
    inputs = _inputs(graph.input, traced.inputs, demand)
    taker = Taker(demand, inputs, traced.inputs)
    outputs = taker.take(outputs)
    demand.check("single_task", model, f"task {task!r} can't have alone")
    if isinstance(inputs, dict) and demand.apart and len(inputs) == 1:
        (inputs,) = inputs.values()
    return keras.Model(inputs, outputs, name=name or clean_name(f"{model.name}_{label}"))


def _index(task: Any, names: tuple[str, ...], tasks: int, model: keras.Model) -> int:
    if isinstance(task, str) and task in names:
        return names.index(task)
    if is_int(task, 0, tasks - 1):
        return int(task)
    what = f"one of the tasks of model {model.name!r}, {list(names) or tasks}"
    raise refusal("task", task, "single_task", what)


def position_of(
    value: Value, index: int, by_number: bool, label: str, owner: str = "single_task"
) -> int:
    """Which part of an output's channels is the task's, where they are side by side."""
    if by_number or value.tasks <= 1:
        return index if by_number else 0
    raise ValueError(
        f"{owner}: the output {label!r} has the features of {value.tasks} tasks side "
        "by side; a TaskSplit takes them apart."
    )


def _inputs(inputs: Any, values: Any, demand: "Demand") -> Any:
    """New inputs in the same structure; where tasks have their own, those of this one."""

    def like(x: keras.KerasTensor, name: str | None = None) -> keras.KerasTensor:
        return keras.Input(x.shape[1:], dtype=x.dtype, name=name or x.name)

    if not (demand.apart and isinstance(inputs, dict)):
        return tree.map_structure(like, inputs)
    own = {
        key: value
        for key, value in inputs.items()
        if any(demand.wants(x) for x in tree.flatten(values[key]))
    }
    # In a dict of one task's inputs each has the name that it has there.
    alone = len(own) == 1
    return {
        task: {key: like(x, key) for key, x in value.items()}
        if alone and isinstance(value, dict)
        else tree.map_structure(like, value)
        for task, value in own.items()
    }


class Demand:
    """What one task needs of the calls of a network, found from its outputs backwards.

    Attributes:
        problems: dict of what it can't have alone, texts by operation.
        apart: bool, whether each task has an input of its own.
    """

    def __init__(self, traced: Trace) -> None:
        self.calls = traced.calls
        self._wanted: dict[Value, set[int | None]] = {}
        self._indices: dict[Call, int | None] = {}
        self.problems: dict[int, str] = {}
        # Also of a task that came later, whose input goes into no stack.
        self.apart = any(map(_has_inputs_apart, traced.calls))
        self._columns = {
            value: call.operation
            for call in traced.calls
            if isinstance(call.operation, TaskColumn)
            for value in call.outputs.values()
        }

    def column_of(self, call: Call) -> TaskColumn | None:
        """What the task of a call has for itself in a layer with T kernels, or None."""
        found = (self._columns.get(value) for value in (call.own or {}).values())
        return next((column for column in found if column is not None), None)

    def want(self, value: Value, index: int | None) -> None:
        """The task needs a value; of several tasks' features the part of one index."""
        self._wanted.setdefault(value, set()).add(index if value.tasks else None)

    def wants(self, value: Value) -> bool:
        """Whether the task needs a value."""
        return value in self._wanted

    def needs(self, call: Call) -> bool:
        """Whether the task needs a call, whose problems may be in `problems`."""
        return call in self._indices

    def index(self, call: Call) -> int | None:
        """Which of the tasks in a call this one is."""
        return self._indices[call]

    def back_to_inputs(self) -> None:
        """Find what the wanted values need."""
        for call in reversed(self.calls):
            indices = self._indices_of(call)
            if not indices:
                continue
            self._indices[call] = next(iter(indices))
            if len(indices) > 1 or _mixes(call):
                self.add_problem(call, "it needs the features of other tasks")
            else:
                self._want_inputs(call)

    def _indices_of(self, call: Call) -> set[int | None]:
        values = tree.flatten(call.outputs)
        if isinstance(call.operation, TaskSplit):
            parts = enumerate(call.outputs.values())
            return {position for position, value in parts if self.wants(value)}
        return {index for value in values for index in self._wanted.get(value, ())}

    def _want_inputs(self, call: Call) -> None:
        index = self._indices[call]
        own = own_input(call, index)
        if own is not None:
            self.want(own, None)
            return
        for value in features_in(call):
            self.want(value, index)

    def check(self, owner: str, model: keras.Model, what: str) -> None:
        """Raise if there are problems, with a line for each of them."""
        if self.problems:
            lines = "\n".join(f"- {line}" for line in self.problems.values())
            raise ValueError(
                f"{owner}: model {model.name!r} has {len(self.problems)} layers that "
                f"{what}:\n{lines}"
            )

    def add_problem(self, call: Call, error: object) -> None:
        """Note why the task can't have what a call gives."""
        place = "/".join((*call.path, call.operation.name))
        kind = type(rules.alone(call.operation)).__name__
        self.problems[id(call.operation)] = f"{kind} {place!r}: {error}"


def own_input(call: Call, index: int | None) -> Value | None:
    """Of a call with a tensor for each task the one of a task; None: it has no such."""
    kinds = (TaskStack, TaskBatch)
    if not isinstance(call.operation, kinds) or isinstance(call.args[0], Value):
        return None
    assert index is not None
    return call.operation._in_order(call.args[0], lambda x: False)[index]


def _has_inputs_apart(call: Call) -> bool:
    """Whether a call takes a tensor for each task that is not the same for all."""
    if own_input(call, 0) is None:
        return False
    return isinstance(call.args[0], dict) or len(set(call.args[0])) > 1


def features_in(call: Call) -> list[Value]:
    """What a call takes but the column and the bias of a task, whose values are taken."""
    return call.inputs if call.own is None else values_in(Value, call.args, {})


def _mixes(call: Call) -> bool:
    """Whether an ordinary operation takes several parts of one `TaskSplit`."""
    if isinstance(call.operation, (TaskStack, TaskBatch)):
        return False
    parts = {part for value in call.inputs for part in value.parts}
    return len(parts) > len({split for split, _ in parts})


class Taker:
    """Makes the layers of one task, call by call of those that it needs."""

    def __init__(self, demand: Demand, inputs: Any, values: Any) -> None:
        self._demand = demand
        self._made: dict[tuple[int, int | None], Any] = {}
        self._names = Names(x.name for x in tree.flatten(inputs))
        # What the task has in the place of a value; None: it can't have it.
        self._tensors: dict[Value, keras.KerasTensor | None] = {**by_value(values, inputs)}

    def take(self, outputs: Any) -> Any:
        """The tensors of the task in the place of some values."""
        for call in self._demand.calls:
            if self._demand.needs(call):
                self._call(call)
        return tree.map_structure(self._tensors.get, outputs)

    def _call(self, call: Call) -> None:
        own = own_input(call, self._demand.index(call))
        values = features_in(call) if own is None else [own]
        tensors = [self._tensors.get(value) for value in values]
        if any(tensor is None for tensor in tensors):
            self._lost(call)
        elif isinstance(call.operation, (TaskStack, TaskBatch, TaskGroup, TaskRepeat)):
            self._tensors[call.outputs] = tensors[0]
        elif isinstance(call.operation, TaskSplit):
            for part in call.outputs.values():
                if self._demand.wants(part):
                    self._tensors[part] = tensors[0]
        else:
            self._through_layer(call)

    def _name_of(self, layer: Any, path: tuple[str, ...]) -> str:
        """A name for a new layer."""
        return self._names.new(layer.name, path)

    def _lost(self, call: Call) -> None:
        """What comes from a layer that can't be had may be one that can't be had either."""
        operation = rules.alone(call.operation)
        rule = rules.rule_of(operation)
        index = self._demand.index(call)
        known = (
            isinstance(operation, TaskLayer) or id(call.operation) in self._demand.problems
        )
        if rule is None or known or index is None or _form(call) != Form.GROUPED:
            return
        try:
            rule.single(operation, _tasks_of(call), index)
        except ValueError as error:
            self._demand.add_problem(call, error)

    def _key(self, operation: Any, call: Call) -> tuple[int, int | None]:
        """What is made once: an operation, and for which task."""
        column = self._demand.column_of(call)
        index = self._demand.index(call) if column is None else id(column)
        return id(operation), index

    def _through_layer(self, call: Call) -> None:
        operation = rules.alone(call.operation)
        key = self._key(operation, call)
        try:
            layer = self._made.get(key) or self._layer(operation, call)
        except ValueError as error:
            self._demand.add_problem(call, error)
            return
        fresh = key not in self._made
        if fresh:
            layer.name = self._name_of(layer, call.path)
            self._made[key] = layer
        kwargs = {} if call.own is not None else call.kwargs
        args, kwargs = replaced(Value, call.args, kwargs, self._tensors.__getitem__)
        if isinstance(operation, TaskCopies):
            args, kwargs = operation.given(tree.flatten(args))
        outputs = layer(*args, **kwargs)
        if fresh and getattr(layer, "weights", None):
            load_weights(layer, self._weights(operation, call))
        values, tensors = tree.flatten(call.outputs), tree.flatten(outputs)
        self._tensors.update(zip(values, tensors))

    def _layer(self, operation: Any, call: Call) -> Any:
        """The layer of one task; a ValueError says why there is none."""
        if call.own is not None:
            return operation.task_twin()
        grouped = {value.form == Form.GROUPED for value in call.inputs}
        tasks, index = _tasks_of(call), self._demand.index(call)
        own = getattr(operation, "tasks", tasks)
        if isinstance(operation, TaskLayer) and grouped == {operation.shared_input}:
            raise ValueError(
                "with `shared_input=True` it mixes the tasks"
                if operation.shared_input
                else "its input is grouped, but not by a layer such as TaskStack"
            )
        if True in grouped and own != tasks:
            raise ValueError(f"it is for {own} tasks, its input has those of {tasks}")
        if isinstance(operation, TaskCopies):
            return operation.task_twin()
        if grouped == {False} and not isinstance(operation, TaskLayer):
            return copy_of(operation)
        rule = rules.rule_of(operation)
        if rule is None:
            raise ValueError("how it treats grouped channels is not known")
        if len(grouped) > 1:
            raise ValueError("it takes grouped features and others together")
        if index is None:
            raise ValueError("it needs the features of all tasks")
        return rule.single(operation, tasks or own, index)

    def _weights(self, operation: Any, call: Call) -> list[Any]:
        if call.own is not None:
            return operation.weights_alone(self._demand.column_of(call))
        if isinstance(operation, TaskCopies):
            index = self._demand.index(call)
            assert index is not None
            return operation.task_weights(index)
        if _form(call) == Form.GROUPED:
            rule, index = rules.rule_of(operation), self._demand.index(call)
            assert rule is not None and index is not None
            tasks = tree.flatten(call.outputs)[0].tasks
            return rule.single_weights(operation, tasks, index)
        return operation.get_weights()


def _form(call: Call) -> Form:
    return tree.flatten(call.outputs)[0].form


def _tasks_of(call: Call) -> int:
    """Of how many tasks the features are that a call takes side by side; 0: of none."""
    return max((value.tasks for value in call.inputs), default=0)
