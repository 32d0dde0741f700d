"""Tasks that come and go: one more for a trained network, or one less."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from dmtrl_keras.conversion.heads import (
    checked_heads,
    last_with_weights,
    name_head,
    output_of,
)
from dmtrl_keras.conversion.single_task import Demand, Taker, own_input, position_of
from dmtrl_keras.ground.copying import copy_of, load_weights
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.keras_private import is_keras_operation, sharing_scope
from dmtrl_keras.ground.validation import (
    check_model,
    check_one_of,
    check_task_names,
    finite_array,
    real_array,
    refusal,
    shown,
)
from dmtrl_keras.tasks.column import TaskColumn
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.graph import (
    Call,
    Names,
    Trace,
    Value,
    by_value,
    checked_functional,
    replaced,
    trace,
    users_of,
)
from dmtrl_keras.tasks.layout import TaskBatch, TaskSplit, TaskStack
from dmtrl_keras.tasks.stacked import kernels_in
from dmtrl_keras.tasks.task_layer import TaskLayer
from dmtrl_keras.training.model import MultiTaskModel

_KERNELS_OR_PARTS = (TaskLayer, TaskCopies, TaskColumn, TaskSplit)


def add_task(
    model: keras.Model,
    name: str,
    head: Any = None,
    like: str | None = None,
    data: tuple[Any, Any] | None = None,
) -> MultiTaskModel:
    """A trained network with one more task, everything old in it frozen.

    What the new task has for itself, and is trained, depends on how a layer's kernels are
    related:

    - generated from shared factors (LAF, Tucker, TT): its column of the task matrix S and
      its bias, `W_new = sum_k L_k s_k` (DMTRL Eq. 2; the extension that the paper's
      conclusion names);
    - the same for all tasks (hard sharing): nothing but its bias, if biases are by task;
    - of its own in every task (independent, similar kernels, under a prior): a copy of the
      kernel of the task that it starts from;
    - normalization on grouped channels: scale, offset and statistics, a copy likewise;
    - the head.

    It starts as the task that it is `like`. The outputs of the old tasks are computed by
    the same operations from the same weights, so that they stay equal to the bit, before
    and after training. To train all of it further: `model.trainable = True`.

    Args:
        model: a functional model with a dict of outputs by task, such as one from
            `multitask` or `factorize`. It stays as it is.
        name: str, the new task.
        head: int, layer or function of the features as in `multitask`. None: one like that
            of the task that it starts from, with its weights.
        like: name of the task to start from. None: with `data` the nearest one, else
            the one whose kernels are most alike those of all others.
        data: `(x, y)`, a few examples of the new task: an array (or what the network takes,
            if there are several inputs), and labels, whole numbers for classes or floats.
            The nearest task is the one from whose features, the ones before its head,
            ridge regression tells the labels best (leave-one-out squared error).

    Returns:
        A `MultiTaskModel` with the new task last, not compiled. Nested models are taken
        apart; terms of the loss don't come along. Where each task has an input of
        its own, so has the new one, by its name. Give it a loss for the new task only.

    Raises:
        ValueError: if there is such a task already or no task `like`, if tasks are not
            known by name, or layers mix the tasks so that none can be had alone.

    References:
        Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
        Approach" (ICLR 2017), section 5.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import add_task, multitask
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> model = multitask(
    ...     backbone, ["age", "gender"], "tucker", rank=0.5, heads=2, verbose=False
    ... )
    >>> larger = add_task(model, "smile", head=2)
    >>> sum(weight.shape.num_elements() for weight in larger.trainable_weights)
    52
    >>> x = np.ones((1, 8))
    >>> np.array_equal(larger(x)["age"], model(x)["age"])
    True
    """
    owner = "add_task"
    traced, graph = _traced(model, owner)
    tasks = traced.by_task
    assert tasks is not None
    if not isinstance(name, str) or not name or name in tasks:
        raise refusal("name", name, owner, f"the name of a new task, none of {list(tasks)}")
    check_task_names([name], owner)
    checked_head = checked_heads(head, [name], owner)[name]
    if like is not None:
        check_one_of("like", like, tuple(tasks), owner)
    rebuilt = _Rebuilt(graph, traced)
    rebuilt.add(traced.calls)
    heads = _Heads(traced)
    if like is None:
        like = _nearest(data, traced, rebuilt, heads, owner)
    elif data is not None:
        raise ValueError(
            f"{owner}: `data` is for finding the task to start from, which `like` names. "
            f"Give one of them. Received: like={like!r} and data."
        )
    wanted: Any = tasks[like] if checked_head is None else heads.features(like, owner)
    demand = Demand(traced)
    for value in tree.flatten(wanted):
        demand.want(value, position_of(value, 0, False, like, owner))
    demand.back_to_inputs()
    inputs, own_inputs = _with_input(
        graph.input, traced, demand, heads.users, rebuilt, (like, name)
    )
    adder = _Adder(demand, traced, rebuilt, heads.private(like), own_inputs, (like, name))
    found = adder.take(wanted)
    demand.check(owner, model, "a new task can't have")
    if checked_head is not None:
        features = found[0] if len(found) == 1 else found
        output = output_of(features, checked_head, name, adder.new_name, owner)
        if callable(checked_head):
            name_head(last_with_weights(output, found), name, adder.new_name)
    else:
        output = found
    for operation in rebuilt.operations:
        if isinstance(operation, keras.layers.Layer):
            operation.trainable = False
    outputs = {task: rebuilt.tensors[value] for task, value in traced.outputs.items()}
    return MultiTaskModel(inputs, {**outputs, name: output}, name=model.name)


def remove_task(model: keras.Model, name: str) -> MultiTaskModel:
    """A network without one of its tasks.

    Its output goes, and what it alone needs: head, input, and all that `add_task` gave it.
    Layers with the kernels of T tasks keep them all, so that the outputs of the other tasks
    stay equal to the bit; where each task has an input of its own, such layers get zeros in
    its place.

    Args:
        model: a functional model with a dict of outputs by task. It stays as it is.
        name: str, the task.

    Returns:
        A `MultiTaskModel`, not compiled, with the weights and with what was frozen. Nested
        models are taken apart; terms of the loss don't come along.

    Raises:
        ValueError: if there is no such task, it is the only one, or tasks are not known by
            name.

    Example:

    >>> import keras
    >>> from dmtrl_keras import multitask, remove_task
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> model = multitask(backbone, ["age", "gender", "smile"], heads=2)
    >>> remove_task(model, "gender").task_names
    ('age', 'smile')
    """
    owner = "remove_task"
    traced, graph = _traced(model, owner)
    tasks = traced.by_task
    assert tasks is not None
    if not isinstance(name, str) or name not in tasks or len(tasks) == 1:
        what = f"one of several tasks of model {model.name!r}, {list(tasks)}"
        raise refusal("name", name, owner, what)
    left = {task: value for task, value in traced.outputs.items() if task != name}
    position = traced.positions.get(name)
    needed, used = _needed(traced, left.values(), position)
    inputs = graph.input
    if isinstance(inputs, dict):
        inputs = {
            key: value
            for key, value in inputs.items()
            if used.intersection(tree.flatten(traced.inputs[key]))
        }
    rebuilt = _Rebuilt(graph, traced, inputs)
    rebuilt.add(call for call in traced.calls if call in needed)
    outputs = {task: rebuilt.tensors[value] for task, value in left.items()}
    return MultiTaskModel(rebuilt.inputs, outputs, name=model.name)


def _traced(model: Any, owner: str) -> tuple[Trace, keras.Model]:
    """The calls of a network with outputs by task, without what only training needs."""
    check_model(model, owner)
    network = model.inference_network() if isinstance(model, MultiTaskModel) else model
    graph = checked_functional(network, owner)
    traced = trace(graph)
    if traced.by_task is None:
        raise ValueError(
            f"{owner}: expected a model with a dict of outputs by task, such as one from "
            f"`multitask`. Received: {type(model).__name__} {model.name!r} with the "
            f"outputs {tree.map_structure(lambda x: x.shape, graph.output)}."
        )
    return traced, graph


class _Rebuilt:
    """The calls of a network once more, by copies of its layers, nested models taken apart.

    Attributes:
        inputs: new input tensors, in the structure of those that were asked for.
        tensors: dict, the new tensor of each `Value`.
    """

    def __init__(self, model: keras.Model, traced: Trace, inputs: Any = None) -> None:
        inputs = model.input if inputs is None else inputs
        self.inputs = tree.map_structure(
            lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name), inputs
        )
        self.tensors = by_value(traced.inputs, self.inputs)
        self.names = Names(x.name for x in tree.flatten(self.inputs))
        self._copies: dict[int, tuple[Any, Any]] = {}

    @property
    def operations(self) -> list[Any]:
        """The copies."""
        return [copy for _, copy in self._copies.values()]

    def copy(self, operation: Any) -> Any:
        """The copy of an operation that was called."""
        return self._copies[id(operation)][1]

    def add(self, calls: Iterable[Call]) -> None:
        """Make calls in their order, with copies that have the weights."""
        # One scope, so that what layers share is shared by their copies.
        with sharing_scope():
            for call in calls:
                self._call(call)
        for layer, copy in self._copies.values():
            if isinstance(layer, keras.layers.Layer) and layer.weights:
                load_weights(copy, layer.get_weights())

    def _call(self, call: Call) -> None:
        operation = call.operation
        if id(operation) not in self._copies:
            copy = copy_of(operation)
            copy.name = self.names.new(operation.name, call.path)
            self._copies[id(operation)] = (operation, copy)
        args: Any = call.args
        if isinstance(operation, (TaskStack, TaskBatch)):
            args = self._without_gaps(args)
        args, kwargs = replaced(Value, args, call.kwargs, self.tensors.__getitem__)
        outputs = self.copy(operation)(*args, **kwargs)
        self.tensors.update(zip(tree.flatten(call.outputs), tree.flatten(outputs)))

    def _without_gaps(self, args: Sequence[Any]) -> Any:
        """Zeros in the place of the input of a task that was removed."""
        present = [self.tensors[v] for v in tree.flatten(args) if v in self.tensors]

        def filled(value: Any) -> Any:
            known = not isinstance(value, Value) or value in self.tensors
            return value if known else ops.zeros_like(present[0])

        return tree.map_structure(filled, args)


# --- which part of a network is a task's --------------------------------------------------


class _Heads:
    """Where the features of each task end, and its head begins.

    Attributes:
        users: dict from `Call` to the set of the tasks whose outputs need it.
    """

    def __init__(self, traced: Trace) -> None:
        assert traced.by_task is not None
        self._outputs = traced.by_task
        self._producers = {
            value: call for call in traced.calls for value in tree.flatten(call.outputs)
        }
        self.users = users_of(traced, len(self._outputs))
        self._by_operation: dict[int, set[str]] = {}
        for call, tasks in self.users.items():
            self._by_operation.setdefault(id(call.operation), set()).update(tasks)
        self._calls = traced.calls

    def private(self, task: str) -> set[Call]:
        """The calls of ordinary operations that no other task uses."""
        found = set()
        for call in self._calls:
            if isinstance(call.operation, _KERNELS_OR_PARTS):
                continue
            alone = self._by_operation[id(call.operation)] == {task}
            if len(self._outputs) == 1:
                # All is of the only task; its head is what comes after the split.
                alone = any(value.parts for value in call.inputs)
            if alone and not any(value.tasks for value in tree.flatten(call.outputs)):
                found.add(call)
        return found

    def features(self, task: str, owner: str) -> list[Value]:
        """The values that the head of a task takes.

        Raises:
            ValueError: if there is no telling them from the head.
        """
        private, found = self.private(task), []
        stack: list[Value] = [self._outputs[task]]
        while stack:
            value = stack.pop()
            call = self._producers.get(value)
            if call in private:
                stack += reversed(call.inputs)
            elif value not in found:
                found.append(value)
        if len(self._outputs) == 1 and not any(value.parts for value in found):
            raise ValueError(
                f"{owner}: of a network of one task without a TaskSplit there is no "
                f"telling the features from the head of task {task!r}."
            )
        return found


def _nearest(data: Any, traced: Trace, rebuilt: _Rebuilt, heads: _Heads, owner: str) -> str:
    """The task to start from."""
    assert traced.by_task is not None
    tasks = list(traced.by_task)
    if data is None:
        return _most_typical(traced, tasks)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise refusal("data", data, owner, "a pair (x, y) of a few examples, or None")
    finite_array("data[1]", data[1], owner)
    labels = np.asarray(real_array("data[1]", data[1], owner))
    features = {
        task: [rebuilt.tensors[value] for value in heads.features(task, owner)]
        for task in tasks
    }
    given = _examples(data[0], rebuilt.inputs, len(labels) if labels.ndim else 0, owner)
    found = keras.Model(rebuilt.inputs, features).predict(given, verbose=0)
    errors = {task: _leave_one_out_error(found[task], labels) for task in tasks}
    return min(errors, key=lambda task: errors[task])


def _examples(x: Any, inputs: Any, count: int, owner: str) -> Any:
    """The examples of a new task as the old network takes them.

    Where each task has an input of its own they go through all that take such a shape.
    """
    if isinstance(inputs, dict) and not isinstance(x, dict):
        values = real_array("data[0]", x, owner)
        fitting = [tuple(i.shape[1:]) for i in tree.flatten(inputs)]
        if values.ndim == 0 or not any(_fits(values.shape, shape) for shape in fitting):
            what = f"examples of one of the shapes {sorted(set(fitting))}"
            raise refusal("data[0]", x, owner, what)
        values = np.asarray(values)
        x = tree.map_structure(
            lambda i: (
                values
                if _fits(values.shape, tuple(i.shape[1:]))
                else np.zeros((len(values), *(d or 1 for d in i.shape[1:])), values.dtype)
            ),
            inputs,
        )
    expected = [tuple(i.shape) for i in tree.flatten(inputs)]
    try:
        tree.assert_same_structure(inputs, x)
        shapes = [np.shape(value) for value in tree.flatten(x)]
    except (TypeError, ValueError):
        shapes = []
    fine = count > 1 and len(shapes) == len(expected)
    if not fine or not all(
        found[:1] == (count,) and _fits(found, shape[1:])
        for found, shape in zip(shapes, expected)
    ):
        what = (
            "a pair (x, y) of two examples or more, as many in each: arrays for inputs of "
            f"the shapes {expected}"
        )
        raise ValueError(
            f"{owner}: `data` must be {what}. Received: labels for {count} examples, and "
            f"x={shown(x)}."
        )
    return x


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether examples have a shape, whose open sizes are None."""
    return len(shape) == len(expected) + 1 and all(
        b in (None, a) for a, b in zip(shape[1:], expected)
    )


def _leave_one_out_error(features: Sequence[np.ndarray], labels: np.ndarray) -> float:
    """The squared error of ridge regression on features, each example left out once.

    With the hat matrix `H = K (K + n I)^-1`, `K = X X' / d` of standardised features, the
    residual of an example that was left out is `(y - H y) / (1 - diag H)`.
    """
    flat = [values.reshape(len(values), -1, values.shape[-1]) for values in features]
    x = np.concatenate([v.mean(axis=1) for v in flat], axis=1).astype("float64")
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-8)
    if np.issubdtype(labels.dtype, np.floating):
        y = labels.reshape(len(labels), -1).astype("float64")
    else:
        y = (labels.reshape(-1, 1) == np.unique(labels)).astype("float64")
    y = (y - y.mean(axis=0)) / (y.std(axis=0) + 1e-8)
    count = len(x)
    kernel = x @ x.T / x.shape[1]
    hat = np.linalg.solve(kernel + count * np.eye(count) / 10, kernel).T
    residuals = (y - hat @ y) / (1 - np.diag(hat))[:, None]
    return float(np.mean(residuals**2))


def _most_typical(traced: Trace, tasks: Sequence[str]) -> str:
    """The task whose kernels have the largest mean cosine with those of all others."""
    cosines, positions = np.zeros(len(tasks)), traced.positions
    layers = {id(call.operation): call.operation for call in traced.calls}
    kernels = [
        one
        for layer in layers.values()
        if isinstance(layer, (TaskLayer, TaskCopies)) and layer.tasks > 1
        for one in kernels_in(layer)
    ]
    for layer in kernels:
        kernel = ops.convert_to_numpy(layer.kernel).reshape(-1, layer.tasks)
        unit = kernel / (np.linalg.norm(kernel, axis=0) + 1e-30)
        mean = (unit.T @ unit).mean(axis=1)
        for number, task in enumerate(tasks):
            of, position = positions.get(task, (0, 0))
            if of == layer.tasks:
                cosines[number] += mean[position]
    return tasks[int(np.argmax(cosines))]


# --- the new task -------------------------------------------------------------------------


def _with_input(
    inputs: Any,
    traced: Trace,
    demand: Demand,
    users: Mapping[Call, set[str]],
    rebuilt: _Rebuilt,
    tasks: tuple[str, str],
) -> tuple[Any, dict[Value, keras.KerasTensor]]:
    """The inputs with one for the new task, where each task has its own.

    Returns:
        `(inputs, own)`, `own` being the new tensors by the `Value` of the old one of the
        two tasks.
    """
    if not demand.apart or not isinstance(inputs, dict):
        return rebuilt.inputs, {}
    like, name = tasks
    own: dict[Value, keras.KerasTensor] = {}
    result = dict(rebuilt.inputs)
    for key, given in inputs.items():
        values = tree.flatten(traced.inputs[key])
        using = {
            task
            for call in traced.calls
            if not isinstance(call.operation, (TaskStack, TaskBatch))
            and set(call.inputs).intersection(values)
            for task in users[call]
        }
        if not any(demand.wants(value) for value in values) or using - {like}:
            continue
        new = tree.map_structure(
            lambda x: keras.Input(
                batch_shape=x.shape,
                dtype=x.dtype,
                name=rebuilt.names.new(_renamed(x.name, like, name)),
            ),
            given,
        )
        result[name if key == like else _renamed(key, like, name)] = new
        own.update(zip(values, tree.flatten(new)))
    return result, own


def _renamed(text: str, like: str, name: str) -> str:
    """The name of what is a task's for another task."""
    whole = rf"(?<![A-Za-z0-9]){re.escape(like)}(?![A-Za-z0-9])"
    found, count = re.subn(whole, lambda _: name, text)
    return found if count else f"{text}_{name}"


class _Adder(Taker):
    """Makes what a new task needs, from what one of the old tasks has.

    Args:
        demand: what the old task needs.
        traced: the network.
        rebuilt: the network made anew.
        private: the calls that only the old task uses.
        own_inputs: dict of new tensors by the `Value` of the old task's own inputs.
        tasks: names of the old task and of the new one.
    """

    def __init__(
        self,
        demand: Demand,
        traced: Trace,
        rebuilt: _Rebuilt,
        private: set[Call],
        own_inputs: Mapping[Value, keras.KerasTensor],
        tasks: tuple[str, str],
    ) -> None:
        super().__init__(demand, rebuilt.inputs, traced.inputs)
        self._names = rebuilt.names
        self._tensors.update(own_inputs)
        self._rebuilt = rebuilt
        self._private = private
        self._tasks = tasks

    @property
    def new_name(self) -> Callable[[str], str]:
        """A function from a name to one that no other layer has."""
        return self._names.new

    def _name_of(self, layer: Any, path: tuple[str, ...]) -> str:
        return self._names.new(_renamed(layer.name, *self._tasks), path)

    def _through_layer(self, call: Call) -> None:
        operation = call.operation
        grouped = any(value.tasks for value in tree.flatten(call.outputs))
        batched = tree.flatten(call.outputs)[0].form == Form.BATCHED
        if isinstance(operation, TaskLayer):
            if operation.stacked.latents is not None:
                self._through_factors(call)
                return
        elif isinstance(operation, TaskCopies):
            # One more copy, a layer of the new task's own.
            pass
        elif batched or (call not in self._private and not grouped):
            self._through_common(call)
            return
        known = set(self._made)
        super()._through_layer(call)
        for key in set(self._made) - known:
            self._made[key].trainable = True

    def _through_common(self, call: Call) -> None:
        """Layers that serve all tasks: their outputs, or one more call of them."""
        old, new = self._rebuilt.tensors, self._tensors
        values = tree.flatten(call.outputs)
        if all(new[value] is old[value] for value in call.inputs):
            self._tensors.update({value: old[value] for value in values})
            return
        args, kwargs = replaced(Value, call.args, call.kwargs, new.__getitem__)
        outputs = self._rebuilt.copy(call.operation)(*args, **kwargs)
        self._tensors.update(zip(values, tree.flatten(outputs)))

    def _through_factors(self, call: Call) -> None:
        """A layer whose kernels are made of what all tasks have, and a column."""
        layer, features = call.operation, self._tensors[call.args[0]]
        key = self._key(layer, call)
        if key not in self._made:
            self._made[key] = self._column(call, features)
        column = self._made[key]
        own = {} if column is None else column(features)
        output = self._rebuilt.copy(layer)(features, own=own)
        self._tensors[call.outputs] = output

    def _column(self, call: Call, features: keras.KerasTensor) -> TaskColumn | None:
        """What the new task has for itself in a layer, with the values of the old one."""
        layer, old = call.operation, self._demand.column_of(call)
        latents = layer.stacked.latents
        outputs = layer.bias.shape[0] if layer.use_bias else 0
        if not latents and not outputs:
            return None
        column = TaskColumn(
            latents,
            outputs,
            bias_initializer=layer.bias_initializer,
            bias_regularizer=layer.bias_regularizer,
            bias_constraint=layer.bias_constraint,
            dtype=layer.dtype_policy,
            name=self._name_of(layer, call.path),
        )
        column(features)
        values = {"column": None, "bias": None}
        if old is not None:
            values = {"column": old.column, "bias": old.bias}
        else:
            index = self._demand.index(call)
            assert index is not None
            if latents:
                values["column"] = ops.convert_to_tensor(layer.task_matrix)[:, index]
            if outputs:
                values["bias"] = ops.convert_to_tensor(layer.bias)[:, index]
        for name, value in values.items():
            if value is not None:
                getattr(column, name).assign(value)
        return column


# --- without a task -----------------------------------------------------------------------


def _taken(call: Call, position: tuple[int, int] | None) -> list[Value]:
    """What a call takes, but the input of the task at a position."""
    operation = call.operation
    if not isinstance(operation, (TaskStack, TaskBatch)) or position is None:
        return call.inputs
    if own_input(call, 0) is None or operation.tasks != position[0]:
        return call.inputs
    return [
        entry
        for index in range(operation.tasks)
        if index != position[1]
        for entry in [own_input(call, index)]
        if entry is not None
    ]


def _needed(
    traced: Trace, outputs: Iterable[Value], position: tuple[int, int] | None
) -> tuple[set[Call], set[Value]]:
    """The calls and values that some outputs need, the input of one task aside.

    Args:
        traced: the network.
        outputs: the outputs.
        position: that of the task, as in `Trace.positions`; None: it has none.
    """
    zeros = {
        value
        for call in traced.calls
        if is_keras_operation(call.operation)
        and type(call.operation).__name__ == "ZerosLike"
        for value in tree.flatten(call.outputs)
    }
    wanted, needed = set(outputs), set()
    for call in reversed(traced.calls):
        if wanted.intersection(tree.flatten(call.outputs)):
            needed.add(call)
            wanted.update(value for value in _taken(call, position) if value not in zeros)
    return needed, wanted
