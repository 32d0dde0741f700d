"""From a network of T tasks to the ordinary Keras model of one task."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import tree

from dmtrl_keras.conversion import rules
from dmtrl_keras.conversion.graph import (
    checked_functional,
    form_of,
    names_of_tasks,
    number_of_tasks,
    replaced,
    run,
    values_in,
)
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_name, clean_name, is_int, refusal
from dmtrl_keras.tasks.layout import TaskBatch, TaskGroup, TaskRepeat, TaskSplit, TaskStack
from dmtrl_keras.tasks.task_layer import TaskLayer


def single_task(
    model: keras.Model, task: int | str, name: str | None = None
) -> keras.Model:
    """The network of one task, as an ordinary Keras model of ordinary Keras layers.

    Kernels are composed once. The outputs are those of the network of all tasks, and the
    saved model needs nothing of this library. What other tasks alone need is left out.

    Args:
        model: a functional or Sequential model of T tasks: one that `multitask` made, or
            one made by hand of this library's layers.
        task: name of the task, or its number, an int in [0, T).
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
    model = checked_functional(model, "single_task")
    tasks = number_of_tasks(model)
    names = names_of_tasks(model)
    index = _index(task, names, tasks, model)
    outputs = model.output
    if isinstance(outputs, dict) and names and set(outputs) == set(names):
        outputs = outputs[names[index]]
    # Of the other tasks' layers only those remain that this task depends on.
    part = keras.Model(model.input, outputs)
    taker = _Taker(tasks, index)
    inputs = _inputs(model.input, names)
    values = tree.map_structure(lambda x: _One(x, Form.SHARED), inputs)
    outputs = run(part, values, taker.visit)
    if taker.problems:
        lines = "\n".join(f"- {line}" for line in taker.problems.values())
        raise ValueError(
            f"single_task: model {model.name!r} has {len(taker.problems)} layers that "
            f"task {task!r} can't have alone:\n{lines}"
        )
    outputs = tree.map_structure(lambda value: value.tensor, outputs)
    if taker.apart and _is_by_task(inputs, names):
        inputs = inputs[names[index]]
    label = names[index] if names else f"task_{index}"
    name = name or clean_name(f"{model.name}_{label}")
    return keras.Model(inputs, outputs, name=name)


def _is_by_task(inputs: Any, names: Sequence[str]) -> bool:
    return isinstance(inputs, dict) and set(inputs) == set(names)


def _inputs(inputs: Any, names: Sequence[str]) -> Any:
    """New inputs in the same structure."""

    def like(x: keras.KerasTensor, name: str | None = None) -> keras.KerasTensor:
        return keras.Input(x.shape[1:], dtype=x.dtype, name=name or x.name)

    if not _is_by_task(inputs, names):
        return tree.map_structure(like, inputs)
    # In a dict of one task's inputs each has the name that it has there.
    return {
        task: {key: like(x, key) for key, x in own.items()}
        if isinstance(own, dict)
        else tree.map_structure(like, own)
        for task, own in inputs.items()
    }


def _index(task: Any, names: tuple[str, ...], tasks: int, model: keras.Model) -> int:
    if isinstance(task, str) and task in names:
        return names.index(task)
    if is_int(task, 0, tasks - 1):
        return int(task)
    what = f"one of the tasks of model {model.name!r}, {list(names) or tasks}"
    raise refusal("task", task, "single_task", what)


class _One:
    """The features of one task, in the new model.

    Attributes:
        tensor: the symbolic tensor; None: features of other tasks.
        form: the form in which the network of all tasks has them, see `form_of`.
        lost: bool; they come from a layer that this task can't have alone.
    """

    def __init__(self, tensor: Tensor, form: Form, lost: bool = False) -> None:
        self.tensor = tensor
        self.form = form
        self.lost = lost


class _Taker:
    """Makes the layers of one task, call by call of the network of all tasks."""

    def __init__(self, tasks: int, index: int) -> None:
        self._tasks = tasks
        self._index = index
        self._made: dict[int, Any] = {}
        self.problems: dict[int, str] = {}
        # Whether every task has inputs of its own.
        self.apart = False

    def visit(
        self,
        operation: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        path: tuple[str, ...],
    ) -> Any:
        """What a call of the network becomes for this task; takes and returns `_One`."""
        rule = rules.rule_of(operation)
        if rule is not None:
            operation = rule.alone(operation)
        values = values_in(_One, args, kwargs)
        form = form_of(operation, [value.form for value in values])
        if any(value.lost for value in values):
            # What comes from a lost layer may be one that can't be had either.
            if rule is not None and not isinstance(operation, TaskLayer):
                try:
                    rule.single(operation, self._tasks, self._index)
                except ValueError as error:
                    self._add_problem(operation, path, error)
            lost = _One(None, form, lost=True)
            split = isinstance(operation, TaskSplit)
            return dict.fromkeys(operation.task_names, lost) if split else lost
        if isinstance(operation, (TaskStack, TaskBatch, TaskGroup, TaskRepeat)):
            own = values[0]
            if not isinstance(args[0], _One):
                own = operation._in_order(args[0], lambda x: False)[self._index]
                self.apart = True
            return _One(own.tensor, form)
        if isinstance(operation, TaskSplit):
            parts = {name: _One(None, form) for name in operation.task_names}
            parts[operation.task_names[self._index]] = _One(values[0].tensor, form)
            return parts
        try:
            layer = self._layer(operation, values)
        except ValueError as error:
            self._add_problem(operation, path, error)
            return _One(None, form, lost=True)
        args, kwargs = replaced(_One, args, kwargs, lambda one: one.tensor)
        fresh = not getattr(layer, "built", True)
        layer.name = clean_name(layer.name)
        outputs = layer(*args, **kwargs)
        if fresh and layer.weights:
            rules.load_weights(layer, self._weights(operation, form))
        return tree.map_structure(lambda x: _One(x, form), outputs)

    def _add_problem(self, operation: Any, path: tuple[str, ...], error: Exception) -> None:
        place = "/".join((*path, operation.name))
        self.problems[id(operation)] = f"{type(operation).__name__} {place!r}: {error}"

    def _layer(self, operation: Any, values: Sequence[_One]) -> Any:
        """The layer of one task; a ValueError says why there is none."""
        if any(value.tensor is None for value in values):
            raise ValueError("it needs the features of other tasks")
        if id(operation) in self._made:
            return self._made[id(operation)]
        grouped = {value.form == Form.GROUPED for value in values}
        rule = rules.rule_of(operation)
        if isinstance(operation, TaskLayer):
            if grouped == {operation.shared_input}:
                raise ValueError(
                    "with `shared_input=True` it mixes the tasks"
                    if operation.shared_input
                    else "its input is grouped, but not by a layer such as TaskStack"
                )
            assert rule is not None
            layer = rule.single(operation, self._tasks, self._index)
        elif grouped == {False}:
            layer = rules.copy_of(operation)
        elif rule is None:
            raise ValueError("how it treats grouped channels is not known")
        elif len(grouped) > 1:
            raise ValueError("it takes grouped features and others together")
        else:
            layer = rule.single(operation, self._tasks, self._index)
        self._made[id(operation)] = layer
        return layer

    def _weights(self, operation: Any, form: Form) -> list[Any]:
        if form == Form.GROUPED:
            rule = rules.rule_of(operation)
            assert rule is not None
            return rule.single_weights(operation, self._tasks, self._index)
        return operation.get_weights()
