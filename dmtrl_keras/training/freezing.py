"""Tasks that rest while the others are trained: what is theirs stays as it is."""

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.keras_private import averages_of
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.tasks.graph import Call, Trace, trace, users_of


class Held(NamedTuple):
    """A part of a variable that an optimizer is to leave as it is.

    Attributes:
        variable: the variable.
        entries: boolean array that broadcasts to it; None: all of it.
        condition: True, or a boolean scalar that decides it in each step.
    """

    variable: keras.Variable
    entries: np.ndarray | None
    condition: Any


class Own(NamedTuple):
    """What is one task's alone in a network of several.

    Attributes:
        weights: list of `(variable, entries)` of the trainable variables, each once.
        layers: ids of the network's layers, nested models being one, that no other task
            uses.
    """

    weights: list[tuple[keras.Variable, np.ndarray | None]]
    layers: frozenset[int]


def own_of_tasks(network: keras.Model) -> dict[str, Own]:
    """What is each task's alone, by its name.

    That is all of the layers that no other task needs, such as its head; and of the layers
    of several tasks what they say themselves (`own_weights`), or, of ordinary layers on
    grouped channels, the task's channels.

    Args:
        network: a functional model with a dict of outputs by task.
    """
    traced = trace(network)
    users = users_of(traced, len(network.output))
    return {task: _own(network, traced, users, task) for task in network.output}


def _own(
    network: keras.Model, traced: Trace, users: Mapping[Call, set[str]], task: str
) -> Own:
    by_layer: dict[int, list[Call]] = {}
    by_top: dict[int, set[str]] = {}
    for call in traced.calls:
        by_layer.setdefault(id(call.operation), []).append(call)
        top = network.get_layer(call.path[0]) if call.path else call.operation
        by_top.setdefault(id(top), set()).update(users[call])
    found: dict[int, tuple[keras.Variable, np.ndarray | None]] = {}
    for calls in by_layer.values():
        layer = calls[0].operation
        if not getattr(layer, "trainable_variables", None):
            continue
        if set().union(*(users[call] for call in calls)) == {task}:
            parts: Sequence[Any] = [(v, None) for v in layer.trainable_variables]
        else:
            parts = _shared(calls[0], traced.positions.get(task))
        trained = {id(v) for v in layer.trainable_variables}
        found |= {id(v): (v, entries) for v, entries in parts if id(v) in trained}
    layers = frozenset(top for top, using in by_top.items() if using == {task})
    return Own(list(found.values()), layers)


def _shared(
    call: Call, position: tuple[int, int] | None
) -> list[tuple[keras.Variable, np.ndarray]]:
    """What is a task's in a layer that others use too.

    Args:
        call: a call of the layer.
        position: `(tasks, position)` of the task among the channels, or None.
    """
    layer = call.operation
    if position is None:
        return []
    tasks, index = position
    if hasattr(layer, "own_weights"):
        return layer.own_weights(index) if layer.tasks == tasks else []
    (value, *_) = tree.flatten(call.outputs)
    if value.form != Form.GROUPED or value.tasks != tasks:
        return []
    first = getattr(layer, "data_format", None) == "channels_first"
    channels = value.spec.shape[1 if first else -1]
    entries = np.repeat(np.arange(tasks) == index, (channels or tasks) // tasks)
    parts: list[tuple[keras.Variable, np.ndarray]] = []
    for variable in layer.trainable_variables:
        after = list(reversed(variable.shape))
        if channels in after:
            shape = (-1, *[1] * after.index(channels))
            parts.append((variable, entries.reshape(shape)))
    return parts


def resting_call(operation: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of an operation in inference mode, if it has such a thing.

    Args:
        operation: a layer, a nested model, or another operation.
        call: how Keras would call it.
    """
    if "training" not in inspect.signature(operation.call).parameters:
        return call
    return lambda *args, **kwargs: operation(*args, **{**kwargs, "training": False})


def hold(optimizer: Any, held: Callable[[], Sequence[Held]]) -> None:
    """Let an optimizer leave parts of the variables as they are, to the bit.

    Whatever it does to them (its moments go on where a gradient is zero, and weights decay)
    is undone in the same step.

    Args:
        optimizer: a Keras optimizer; of one around others, the innermost is meant.
        held: method without arguments that returns what is to be left alone, asked where a
            step is traced. Its object is not kept alive.
    """
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    given: Any = held
    optimizer.__dict__["_dmtrl_keras_held"] = weakref.WeakMethod(given)
    if "apply" in optimizer.__dict__:
        return
    apply = optimizer.apply

    def holding(grads: Sequence[Tensor], trainable_variables: Any = None) -> None:
        parts: Sequence[Held] = (optimizer.__dict__["_dmtrl_keras_held"]() or list)()
        if not parts:
            apply(grads, trainable_variables)
            return
        before = [ops.copy(ops.convert_to_tensor(part.variable)) for part in parts]
        if trainable_variables is not None:
            if not optimizer.built:
                # With all of them, which may be trained again.
                optimizer.build(list(trainable_variables))
            # Keras warns of variables without a gradient, as all of a head has none.
            whole = {id(p.variable) for p in parts if p.entries is None}
            pairs = [
                (gradient, variable)
                for gradient, variable in zip(grads, trainable_variables)
                if gradient is not None or id(variable) not in whole
            ]
            grads, trainable_variables = zip(*pairs) if pairs else ((), ())
        apply(grads, trainable_variables)
        # Averages of the weights (`use_ema`) have seen the update, and are the weights of
        # the end.
        averages = averages_of(optimizer)
        for part, old in zip(parts, before):
            average = averages.get(id(part.variable))
            if average is not None:
                given = True if part.entries is None else part.entries
                keep_both = ops.logical_and(given, part.condition)
                average.assign(ops.where(keep_both, old, average))
            keep: Any = True if part.entries is None else part.entries
            if part.condition is not True:
                keep = ops.logical_and(keep, part.condition)
            elif part.entries is None:
                part.variable.assign(old)
                continue
            new = ops.convert_to_tensor(part.variable)
            part.variable.assign(ops.where(keep, old, new))

    optimizer.__dict__["apply"] = holding
