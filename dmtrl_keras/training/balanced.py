"""Training steps in which the losses of the tasks are balanced."""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from dmtrl_keras.balancing import maths
from dmtrl_keras.balancing.weighting import Balanced, Balancing, Seen
from dmtrl_keras.ground.backend import all_reduce_sum, eager_scope, tensorflow
from dmtrl_keras.ground.keras_private import producer_of, update_loss_tracker
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import name_of
from dmtrl_keras.tasks.layout import TaskSplit


class BalancingState(keras.metrics.Metric):
    """The state of a balancing, and what is logged of it (not for direct use).

    As metrics it is handed through a step on every backend, and a network has no other
    weights because of how it is trained.

    Args:
        balancing: the `Balancing`.
        names: names of the tasks with a loss.
        size: int, the number of shared weights, for a method that needs all gradients.

    Attributes:
        cosines: float32 variable `(T, T)`, the mean over the steps since the epoch began of
            the cosines between the gradients, if the method looks at them.
    """

    def __init__(self, balancing: Balancing, names: Sequence[str], size: int = 0) -> None:
        super().__init__(name="balancing")
        self.balancing = balancing
        self.names = tuple(names)
        tasks = len(self.names)
        self._training = False
        with eager_scope():
            start = balancing.start(tasks, size)
            self.moving = [_variable(value, name) for name, value in start.items()]
            self._keys = tuple(start)
            self.total = _variable(np.zeros(tasks, "float32"), "total")
            self.cosines = _variable(np.zeros((tasks, tasks), "float32"), "cosines")
            self.count = _variable(np.zeros((), "float32"), "count")
            self._generator = keras.random.SeedGenerator(seed=len(self.names))
        # Known by this name, the state of random numbers goes with the others.
        self.seed_state = self._generator.state

    def weigh(
        self, losses: Tensor, present: Tensor, gram: Any = None, gradients: Any = None
    ) -> Balanced:
        """The weights of a step of training, and the state one step on.

        Args:
            losses: tensor `(T,)`, of all replicas.
            present: tensor `(T,)`, 1 where there are labels.
            gram: None or `(T, T)`.
            gradients: None or `(T, P)`.
        """
        state = dict(zip(self._keys, map(ops.convert_to_tensor, self.moving)))
        # A step that overflows, which loss scaling leaves out, is no step. Nothing may be
        # solved of it, which raises.
        values = [losses] if gram is None else [losses, gram]
        fine = ops.all(ops.stack([ops.all(ops.isfinite(value)) for value in values]))
        if gram is not None:
            gram = ops.where(fine, gram, ops.eye(len(self.names)))
        seen = Seen(
            ops.where(fine, losses, ops.ones_like(losses)),
            present,
            gram,
            gradients,
            lambda shape: keras.random.normal(shape, seed=self._generator),
        )
        found = self.balancing.weigh(seen, state)
        weights = ops.stop_gradient(ops.cast(found.weights, "float32"))
        for key, variable in zip(self._keys, self.moving):
            new = ops.cast(found.state[key], "float32")
            variable.assign(ops.where(fine, ops.stop_gradient(new), state[key]))
        logged = ops.where(fine, weights, ops.zeros_like(weights))
        self.total.assign_add(logged)
        self.count.assign_add(ops.cast(fine, "float32"))
        if gram is not None:
            both = present[:, None] * present[None, :]
            found_cosines = ops.where(fine, maths.cosines(gram) * both, 0.0)
            self.cosines.assign_add(found_cosines)
        return Balanced(weights, found.state, found.direction)

    def next_epoch(self) -> None:
        """Let the method know that an epoch of training begins."""
        state = dict(zip(self._keys, map(ops.convert_to_tensor, self.moving)))
        new = self.balancing.next_epoch(state)
        for key, variable in zip(self._keys, self.moving):
            # Most methods leave all as it is, which may be large.
            if new[key] is not state[key]:
                variable.assign(new[key])

    def is_training(self, training: bool) -> None:
        """Whether what is traced now is a step of training, whose logs have the weights."""
        self._training = training

    def mean_cosines(self) -> np.ndarray:
        """The mean cosines since the epoch began, `(T, T)`."""
        total, count = (ops.convert_to_numpy(v) for v in (self.cosines, self.count))
        return total / max(float(count), 1.0)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to add; see `weigh`."""

    def reset_state(self) -> None:
        """What is logged begins anew; the state goes on."""
        for variable in (self.total, self.cosines, self.count):
            variable.assign(ops.zeros(variable.shape))

    def result(self) -> dict[str, Tensor]:
        """In training the mean weights of the epoch so far, and the mean cosine."""
        if not self._training:
            return {}
        count = ops.maximum(ops.convert_to_tensor(self.count), 1)
        weights = ops.unstack(ops.convert_to_tensor(self.total) / count, len(self.names))
        logs = {f"{name}_weight": w for name, w in zip(self.names, weights)}
        tasks = len(self.names)
        if self.balancing.looks_at_gradients and tasks > 1:
            cosines = ops.convert_to_tensor(self.cosines)
            apart = ops.sum(cosines) - ops.trace(cosines)
            logs["cosine"] = apart / (count * tasks * (tasks - 1))
        return logs

    def _all(self) -> list[keras.Variable]:
        return [*self.moving, self.seed_state]

    def save_own_variables(self, store: dict[str, Any]) -> None:
        """For files: what the method has learned, and the random numbers."""
        for index, variable in enumerate(self._all()):
            store[str(index)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: dict[str, Any]) -> None:
        """Files of a model that was compiled otherwise are left aside."""
        own = self._all()
        found = [store[str(n)] for n in range(len(store.keys()))]
        if [tuple(v.shape) for v in found] == [tuple(v.shape) for v in own]:
            for variable, value in zip(own, found):
                variable.assign(value)


def _variable(value: np.ndarray, name: str) -> keras.Variable:
    return keras.Variable(
        np.asarray(value, "float32"),
        dtype="float32",
        trainable=False,
        autocast=False,
        # All replicas compute the same.
        aggregation="only_first_replica",
        name=name,
    )


def vector(names: Sequence[str], losses: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The losses of all tasks and replicas, and which are present, `(T,)` each.

    Args:
        names: of the tasks with a loss.
        losses: dict of scalars; tasks that are left out are absent, and so are those whose
            loss is exactly 0: all of their labels are missing, or there is nothing to do.
    """
    zero = ops.zeros((), "float32")
    found = [
        ops.cast(losses[name], "float32") if name in losses else zero for name in names
    ]
    values = all_reduce_sum(ops.stop_gradient(ops.stack(found)))
    return values, ops.cast(ops.not_equal(values, 0), "float32")


def shared_weights(model: Any) -> list[keras.Variable]:
    """The trainable variables that more than one task's loss depends on.

    Those of which every entry is one task's alone (heads, stacked kernels, channels of
    normalizations) are not among them.
    """
    owned: dict[int, np.ndarray] = {}
    for task in model.task_names:
        for variable, entries in model.own_of(task).weights:
            mine = np.broadcast_to(True if entries is None else entries, variable.shape)
            before = owned.get(id(variable))
            owned[id(variable)] = mine if before is None else before | mine
    own = {key for key, entries in owned.items() if entries.all()}
    return [v for v in model.trainable_variables if id(v) not in own]


def last_in_common(model: keras.Model) -> Any:
    """The operation whose output all tasks' own layers take, and nothing else before it.

    Raises:
        ValueError: if there is none.
    """
    users: dict[int, set[str]] = {}
    made: dict[int, tuple[Any, list[Any]]] = {}

    def back(tensor: Any, task: str) -> None:
        if task in users.setdefault(id(tensor), set()):
            return
        users[id(tensor)].add(task)
        operation, inputs = producer_of(tensor)
        made[id(tensor)] = operation, inputs
        for one in inputs:
            back(one, task)

    for task, output in model.output.items():
        back(output, task)
    common = {key for key, tasks in users.items() if len(tasks) == len(model.output)}
    border = {
        id(one)
        for key, (_, inputs) in made.items()
        if key not in common
        for one in inputs
        if id(one) in common
    }
    outputs = {id(x) for x in model.output.values()}
    # What takes tasks apart takes features of each by itself.
    parted = any(
        isinstance(operation, TaskSplit) and id(one) in border
        for operation, inputs in made.values()
        for one in inputs
    )
    if len(border) == 1 and not outputs & common and not parted:
        operation, inputs = made[next(iter(border))]
        if inputs:
            return operation
    raise ValueError(
        f'{name_of(model)}: at="features" is for networks in which one layer is the last '
        "that all tasks share, whose output every task's own layers take, as under "
        f'sharing="hard". Received: a network with {len(border)} such outputs'
        f"{' that hold features of each task by itself' if len(border) == 1 else ''}. "
        'Expected at="weights" here.'
    )


def balanced_gradients(
    tape: Any,
    state: BalancingState,
    losses: Mapping[str, Tensor],
    rest: Sequence[Tensor],
    variables: Sequence[keras.Variable],
    shared: Sequence[keras.Variable],
    scale: Tensor,
    features: Any = None,
) -> list[Any]:
    """The gradients of a step, on TensorFlow.

    Of the shared weights `sum_t w_t g_t`, of the others those of the sum of the losses; the
    penalties' and the terms' come on top.

    Args:
        tape: a persistent tape that saw the losses, and `rest`.
        state: the `BalancingState`.
        losses: dict by task of the weighted losses.
        rest: penalties and terms, which are no tasks.
        variables: all trainable variables.
        shared: those that tasks share.
        scale: scalar by which an optimizer scales losses, on which no weight depends.
        features: None; or the features with respect to which the Gram matrix is.
    """
    tf = tensorflow()
    zero = tf.UnconnectedGradients.ZERO
    names = [name for name in state.names if name in losses]
    values = [v.value for v in shared]

    def scales(of: Sequence[Tensor]) -> list[Tensor]:
        # What is computed after the tape was closed has no gradient.
        return [ops.cast(scale, one.dtype) for one in of]

    targets = values if features is None else [features]
    by_task = {
        name: [
            tf.convert_to_tensor(g)
            for g in tape.gradient(losses[name], targets, scales([losses[name]])[0], zero)
        ]
        for name in names
    }
    # `(T, ...)` of each target, rows of zeros for tasks without a loss in this step.
    stacked = [
        ops.stack(
            [
                by_task[name][n] if name in by_task else ops.zeros_like(target)
                for name in state.names
            ]
        )
        for n, target in enumerate(targets)
    ]
    tasks = len(state.names)
    rows = [ops.reshape(ops.cast(g, "float32"), (tasks, -1)) for g in stacked]
    unscaled = ops.cast(scale, "float32")
    # A batch is spread over the replicas: features of different examples, but the same
    # weights, whose gradients are those of all.
    if features is None:
        # All at once: many collectives, each waiting for a thread, may wait for each other.
        rows = all_reduce_sum(rows)
    gram = sum((ops.matmul(one, ops.transpose(one)) for one in rows), 0.0)
    if features is not None:
        gram = all_reduce_sum(gram)
    gram = ops.stop_gradient(gram / ops.square(unscaled))
    gradients = None
    if state.balancing.needs_gradients:
        gradients = ops.concatenate(rows, axis=-1) / unscaled
    found = state.weigh(*vector(state.names, losses), gram, gradients)
    weights = found.weights

    def mixed(one: Tensor) -> Tensor:
        own = ops.cast(
            ops.reshape(weights, (tasks, *[1] * (len(one.shape) - 1))), one.dtype
        )
        return ops.sum(own * one, axis=0)

    result: dict[int, Any] = {}
    if found.direction is not None:
        # Every replica has the whole of it, and the optimizer adds them.
        own = found.direction * unscaled / tf.distribute.get_strategy().num_replicas_in_sync
        sizes = [math.prod(v.shape) for v in shared]
        for variable, part in zip(shared, ops.split(own, np.cumsum(sizes)[:-1].tolist())):
            result[id(variable)] = ops.reshape(part, variable.shape)
    elif features is None:
        for variable, one in zip(shared, stacked):
            result[id(variable)] = mixed(one)
    else:
        back = tape.gradient(features, values, mixed(stacked[0]), zero)
        for variable, one in zip(shared, back):
            result[id(variable)] = tf.convert_to_tensor(one)
    if rest:
        for variable, one in zip(shared, tape.gradient(rest, values, scales(rest))):
            if one is not None:
                result[id(variable)] = result[id(variable)] + one
    others = [v for v in variables if id(v) not in result]
    total = [*losses.values(), *rest]
    sources = [v.value for v in others]
    for variable, one in zip(others, tape.gradient(total, sources, scales(total))):
        result[id(variable)] = one
    return [result[id(v)] for v in variables]


class GradientSteps:
    """Steps of training in which gradients are balanced, on TensorFlow.

    Args:
        model: the `MultiTaskModel`.
        method: a `Balancing` that looks at gradients.

    Raises:
        ValueError: on another backend; where the tasks share no weights, or not in the way
            in which the method needs it.
    """

    def __init__(self, model: Any, method: Balancing) -> None:
        if keras.config.backend() != "tensorflow":
            raise ValueError(
                f"{name_of(model)}: methods that look at gradients need the TensorFlow "
                f"backend. Received: balancing={method!r} with "
                f"{keras.config.backend()!r}. Those of losses alone, such as 'famo', run "
                "with every backend."
            )
        self.features_of = last_in_common(model) if method.at == "features" else None
        self._lock = threading.Lock()
        self._found: dict[int, list[Tensor]] = {}
        self._before: Any = {}
        self.size = sum(math.prod(v.shape) for v in shared_weights(model))
        if not self.size:
            raise ValueError(
                f"{name_of(model)}: there are no weights that several tasks share, whose "
                f"gradients could be balanced. Received: balancing={method!r}."
            )

    def __call__(self, model: Any, data: Any) -> dict[str, Tensor]:
        """A step, as `keras.Model.train_step`.

        Args:
            model: the `MultiTaskModel`.
            data: `(x, y, sample_weight)`, as Keras hands it over.
        """
        tf = tensorflow()
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        (state,) = model._balancing
        optimizer = model.optimizer
        with tf.GradientTape(persistent=True) as tape:
            with model.parts_of_loss() as parts, self._seen(model) as features:
                y_pred = model(x, training=True)
                loss = model.compute_loss(
                    x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
            losses, rest = parts.value
            scale = optimizer.scale_loss(tf.ones(()))
        size = tf.shape(next(i for i in keras.tree.flatten(x) if i is not None))[0]
        update_loss_tracker(model, loss, size)
        variables, shared = model.trainable_variables, shared_weights(model)
        gradients = balanced_gradients(
            tape, state, losses, rest, variables, shared, scale, *features
        )
        del tape
        optimizer.apply_gradients(zip(gradients, variables))
        return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    @contextlib.contextmanager
    def _seen(self, model: Any) -> Iterator[list[Tensor]]:
        """Within this context a call of the network shows the features, in a list."""
        found: list[Tensor] = []
        if self.features_of is None:
            yield found
            return
        # Replicas are threads, which wait for each other within a step.
        thread, key = threading.get_ident(), id(self.features_of)
        with self._lock:
            if not self._found:
                self._before = model.called_otherwise
                earlier = self._before.get(key, lambda _, call: call)
                model.called_otherwise = {**self._before, key: self._showing(earlier)}
            self._found[thread] = found
        try:
            yield found
        finally:
            with self._lock:
                del self._found[thread]
                if not self._found:
                    model.called_otherwise = self._before

    def _showing(self, earlier: Any) -> Any:
        def otherwise(operation: Any, call: Any) -> Any:
            own = earlier(operation, call)

            def called(*args: Any, **kwargs: Any) -> Tensor:
                features = own(*args, **kwargs)
                found = self._found.get(threading.get_ident())
                if found is not None:
                    found[:] = [features]
                return features

            return called

        return otherwise
