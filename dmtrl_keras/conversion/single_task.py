"""From a network of T tasks to the ordinary Keras model of one task."""

import numbers

import keras
from keras import tree

from dmtrl_keras.conversion import rules
from dmtrl_keras.conversion.graph import as_functional, run
from dmtrl_keras.layers import (
    TaskBatch,
    TaskGroup,
    TaskLayer,
    TaskRepeat,
    TaskSplit,
    TaskStack,
)


def single_task(model, task, name=None):
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
    if not isinstance(model, keras.Model) or as_functional(model) is None:
        raise ValueError(
            "single_task: expected a functional or built Sequential Keras model. "
            f"Received: {type(model).__name__} {getattr(model, 'name', '')!r}."
        )
    names, tasks = _tasks(model)
    index = _index(task, names, tasks, model)
    outputs = model.output
    if isinstance(outputs, dict) and names and set(outputs) == set(names):
        outputs = outputs[names[index]]
    # Of the other tasks' layers only those remain that this task depends on.
    part = keras.Model(model.input, outputs)
    taker = _Taker(tasks, index)
    inputs = tree.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=x.dtype, name=x.name), model.input
    )
    values = tree.map_structure(lambda x: _One(x, False), inputs)
    outputs = run(part, values, taker.visit)
    if taker.problems:
        lines = "\n".join(f"- {line}" for line in taker.problems.values())
        raise ValueError(
            f"single_task: model {model.name!r} has {len(taker.problems)} layers that "
            f"task {task!r} can't have alone:\n{lines}"
        )
    outputs = tree.map_structure(lambda value: value.tensor, outputs)
    label = names[index] if names else f"task_{index}"
    return keras.Model(
        _needed(inputs, outputs, names, index),
        outputs,
        name=name or f"{model.name}_{label}",
    )


def _tasks(model):
    """`(names, T)` of a network; no names where no layer says them."""
    found, counts = [], set()
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, (TaskLayer, rules.TaskLayerNormalization)):
            counts.add(layer.tasks)
        elif hasattr(layer, "task_names") and hasattr(layer, "tasks"):
            counts.add(layer.tasks)
            if isinstance(layer._tasks_argument, list):
                found.append(layer.task_names)
    outputs = model.output
    if isinstance(outputs, dict):
        # The order is that of the channels, where a layer says it.
        ordered = [names for names in found if set(names) == set(outputs)]
        names = ordered[0] if ordered else tuple(outputs)
        counts.add(len(names))
    else:
        names = found[0] if found else ()
    if len(counts) > 1 or (not counts):
        raise ValueError(
            f"single_task: model {model.name!r} is not one of a known number of tasks. "
            f"Its layers and outputs have: {sorted(counts)}."
        )
    return names, counts.pop()


def _index(task, names, tasks, model):
    if isinstance(task, str) and task in names:
        return names.index(task)
    whole = isinstance(task, numbers.Integral) and not isinstance(task, bool)
    if whole and 0 <= task < tasks:
        return int(task)
    raise ValueError(
        f"single_task: model {model.name!r} has the tasks {list(names) or tasks}. "
        f"Received: task={task!r}."
    )


def _needed(inputs, outputs, names, index):
    """The inputs that this task depends on, in the simplest structure."""
    if isinstance(inputs, dict) and names and set(inputs) == set(names):
        return inputs[names[index]]
    return inputs


class _One:
    """The features of one task, in the new model.

    Attributes:
        tensor: the symbolic tensor; None: features of other tasks.
        grouped: bool; whether the network of all tasks has them as grouped channels.
    """

    def __init__(self, tensor, grouped):
        self.tensor = tensor
        self.grouped = grouped


_ABSENT = _One(None, False)


class _Taker:
    """Makes the layers of one task, call by call of the network of all tasks."""

    def __init__(self, tasks, index):
        self._tasks = tasks
        self._index = index
        self._made = {}
        self.problems = {}

    def visit(self, operation, args, kwargs, path):
        """What a call of the network becomes for this task; takes and returns `_One`."""
        values = [v for v in tree.flatten((args, kwargs)) if isinstance(v, _One)]
        layout = self._layout(operation, args[0] if args else None, values)
        if layout is not None:
            return layout
        grouped = any(value.grouped for value in values)
        outputs = isinstance(operation, TaskLayer) or grouped
        try:
            layer = self._layer(operation, values, grouped)
        except ValueError as error:
            place = "/".join((*path, operation.name))
            self.problems[id(operation)] = f"{type(operation).__name__} {place!r}: {error}"
            layer = None
        if layer is None:
            return _One(values[0].tensor, grouped)
        args, kwargs = tree.map_structure(
            lambda v: v.tensor if isinstance(v, _One) else v, (args, kwargs)
        )
        fresh = not getattr(layer, "built", True)
        result = layer(*args, **kwargs)
        if fresh:
            rules.load_weights(layer, self._weights(operation, grouped))
        return tree.map_structure(lambda x: _One(x, outputs), result)

    def _layout(self, operation, first, values):
        """What a layer of the layout lets through, or None for other operations."""
        if isinstance(operation, (TaskStack, TaskBatch)) and not isinstance(first, _One):
            apart = operation._in_order(first, lambda x: False)
            return _One(apart[self._index].tensor, isinstance(operation, TaskStack))
        if isinstance(operation, (TaskStack, TaskGroup, TaskRepeat)):
            return _One(values[0].tensor, True)
        if isinstance(operation, TaskBatch):
            return _One(values[0].tensor, False)
        if isinstance(operation, TaskSplit):
            parts = dict.fromkeys(operation.task_names, _ABSENT)
            parts[operation.task_names[self._index]] = _One(values[0].tensor, False)
            return parts
        return None

    def _layer(self, operation, values, grouped):
        layer = self._made.get(id(operation))
        if layer is not None:
            return layer
        if any(value.tensor is None for value in values):
            raise ValueError("it needs the features of other tasks")
        rule = rules.rule_of(operation)
        if isinstance(operation, TaskLayer) or (grouped and rule is not None):
            if not isinstance(operation, TaskLayer) and not _all_grouped(values):
                raise ValueError("it mixes grouped features and others")
            layer = rule.single(operation, self._tasks, self._index)
        elif grouped:
            raise ValueError("how it treats grouped channels is not known")
        else:
            layer = rules.copy_of(operation)
        self._made[id(operation)] = layer
        return layer

    def _weights(self, operation, grouped):
        if not isinstance(operation, keras.layers.Layer):
            return []
        if isinstance(operation, TaskLayer) or grouped:
            rule = rules.rule_of(operation)
            return rule.single_weights(operation, self._tasks, self._index)
        return operation.get_weights()


def _all_grouped(values):
    return all(value.grouped for value in values)
