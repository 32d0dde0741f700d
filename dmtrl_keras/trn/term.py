"""The Task Relation Network: tasks' features held to the similarity of their labels.

Li et al., "Task Relation Networks" (WACV 2019), section 3.2. The layer that estimates a
similarity online is `layers.TRL`; similarities of whole arrays are in
`canonical_correlation`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
from keras import ops, tree

from dmtrl_keras.ground.backend import share_of_replica
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import is_list, is_real, name_of, refusal
from dmtrl_keras.tasks.graph import trace
from dmtrl_keras.tasks.layout import TaskSplit
from dmtrl_keras.training.missing import align, same_shape, split_missing
from dmtrl_keras.training.terms import LossTerm, Step
from dmtrl_keras.trn.layer import (
    BEFORE,
    TRL,
    Estimate,
    Gradient,
    Method,
    checked_settings,
)
from dmtrl_keras.trn.relation import Pair, Relation

# Of 780 pairs TensorFlow took more than five minutes to optimize the graph of a step.
_MOST_LOGGED = 50


@keras.saving.register_keras_serializable("dmtrl_keras")
class SimilarityTracker(keras.metrics.Metric):
    """Means of the similarities of pairs over the steps, a value in the logs for each.

    Args:
        names: list of P strings, the names in the logs.
        name: str.
        dtype: as in `keras.metrics.Metric`.

    Example:

    >>> from dmtrl_keras.trn.term import SimilarityTracker
    >>> tracker = SimilarityTracker(["a", "b"])
    >>> tracker.update_state([0.5, 1.0])
    >>> {name: float(value) for name, value in tracker.result().items()}
    {'a': 0.5, 'b': 1.0}
    """

    def __init__(
        self, names: Sequence[str], name: str = "similarity", dtype: DType = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.names = list(names)
        self.total = self.add_variable((len(self.names),), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, values: Tensor, sample_weight: Tensor | None = None) -> None:
        """Add the similarities of a step.

        Args:
            values: tensor `(P,)`.
            sample_weight: must be None.
        """
        if sample_weight is not None:
            raise ValueError(f"{self.name!r}: a similarity has no sample weights.")
        self.total.assign_add(ops.cast(values, self.total.dtype))
        self.count.assign_add(ops.ones((), self.count.dtype))

    def result(self) -> dict[str, Tensor]:
        """The mean of each similarity, a dict of scalars by name."""
        means = ops.divide_no_nan(self.total, self.count)
        return dict(zip(self.names, ops.unstack(means, len(self.names))))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "names": self.names}


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskRelations(LossTerm):
    """Hold features to the similarity of the labels: the term of TRN (Eq. 13, 14).

    `sum_l lambda_l sum_ij |tau(F_i^(l), F_j^(l)) - tau(Y_i, Y_j)|`, with the similarity tau
    of `layers.TRL`, estimated online for the features of each relation and for the labels
    of the pairs of relations without a `target`. Class labels are compared as one-hot
    vectors, all other labels as they are. In training alone do the estimates move;
    `evaluate` takes the last ones.

    Labels count as missing where they are NaN, where the task's loss says so
    (`MaskedLoss(missing=...)`, `ignore_class`), and where their sample weight is zero.
    Labels are then compared by the examples that have both, features by all examples.

    `fit` logs `<relation>_similarity_<i>_<j>` and `label_similarity_<i>_<j>`; of more than
    50 pairs the mean over the pairs, `<relation>_similarity` and `label_similarity`, since
    TensorFlow takes minutes to trace a step with many logs. `similarities()` has each.

    Args:
        relations: a `Relation` or a list of them.
        label_similarity: dict from pair to float in [0, 1], for every pair of the
            relations without a `target`: the label similarities over the whole training
            set, such as `dmtrl_keras.label_similarity` finds. None: they are estimated
            online.
        momentum: float in [0, 1), of all moving covariances.
        ridge: float, as in `layers.TRL`.
        method: `"cholesky"` or `"svd"`, as in `layers.TRL`.
        name: str.
        estimate: `"mean"` or `"sum"`, as in `layers.TRL`.
        gradient: `"full"` or `"moving"`, as in `layers.TRL`.

    Raises:
        ValueError: on relations of one name; when it is given to a network, on unknown
            tasks or layers, on missing or bad targets and label similarities; in training,
            on a task without labels that label similarities are to be learned of, and as
            `layers.TRL`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import MultiTaskModel, Relation, TaskRelations
    >>> inputs = keras.Input((8,))
    >>> outputs = {"pose": keras.layers.Dense(5, "softmax")(inputs)}
    >>> outputs["landmarks"] = keras.layers.Dense(10)(inputs)
    >>> relations = TaskRelations(Relation("output", weight=0.1), momentum=0.9)
    >>> model = MultiTaskModel(inputs, outputs, terms=[relations])
    >>> losses = {"pose": "sparse_categorical_crossentropy", "landmarks": "mse"}
    >>> model.compile("adam", losses)
    >>> labels = {"pose": np.arange(64) % 5, "landmarks": np.ones((64, 10))}
    >>> history = model.fit(np.ones((64, 8)), labels, verbose=0).history
    >>> sorted(history)[:2]
    ['label_similarity_pose_landmarks', 'landmarks_loss']
    """

    def __init__(
        self,
        relations: Relation | Sequence[Relation],
        label_similarity: Mapping[Pair, float] | None = None,
        momentum: float = 0.99,
        ridge: float = 1e-3,
        method: Method = "cholesky",
        name: str = "task_relations",
        estimate: Estimate = "mean",
        gradient: Gradient = "full",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self._relations = self._checked_relations(relations)
        self.settings = checked_settings(
            momentum, ridge, method, estimate, gradient, name_of(self)
        )
        if label_similarity is not None and not (
            isinstance(label_similarity, Mapping) and all(map(is_list, label_similarity))
        ):
            what = "None, or a dict with a number in [0, 1] for every pair of tasks"
            raise refusal("label_similarity", label_similarity, name_of(self), what)
        self.label_similarity = label_similarity
        self.trls: dict[str, TRL] = {}
        self._trackers: dict[str, SimilarityTracker] = {}

    def _checked_relations(self, relations: Any) -> list[Relation]:
        given = relations
        relations = list(given) if is_list(given) else [given]
        names = [getattr(relation, "name", None) for relation in relations]
        if not relations or not all(isinstance(r, Relation) for r in relations):
            what = "a Relation or a list of them"
            raise refusal("relations", given, name_of(self), what)
        if len(set(names)) < len(names) or "label" in names:
            raise ValueError(
                f"{name_of(self)}: relations need different names, and none may be "
                f"'label'; give them a `name`. Received: {names}."
            )
        return relations

    # --- the network ------------------------------------------------------------

    def connect(self, network: keras.Model) -> dict[str, dict[str, Any]]:
        """Make the state for a network; see `training.terms.LossTerm`."""
        tasks = tuple(network.output)
        self._pairs, self._sets = {}, {}
        self._targets: dict[str, list[float] | None] = {}
        features = {}
        for relation in self._relations:
            pairs, sets = relation.sets(tasks)
            self._pairs[relation.name], self._sets[relation.name] = pairs, sets
            self._targets[relation.name] = relation.targets(pairs)
            used = dict.fromkeys(task for members in sets.values() for task in members)
            features[relation.name] = self._features(network, relation, tuple(used))
        sets = self._label_sets()
        held = [ps for name, ps in self._pairs.items() if self._targets[name] is None]
        # One label TRL for all relations, with each pair once.
        pairs = list({frozenset(p): p for ps in held for p in ps}.values())
        self._label_similarity = self._checked_similarity(self.label_similarity, pairs)
        for relation in self._relations:
            self._add_trl(relation.name, features[relation.name])
        if pairs:
            self._pairs["label"] = pairs
            used = dict.fromkeys(name for pair in pairs for name in pair)
            self._sets["label"] = {name: sets[name] for name in used}
            if self._label_similarity is None:
                # The labels' sizes follow from the outputs': one-hot, or as they are.
                self._add_trl("label", network.output)
        for key, pairs in self._pairs.items():
            self._trackers[key] = SimilarityTracker(self._logged(key, pairs), key)
        return features

    def _label_sets(self) -> dict[str, tuple[str, ...]]:
        """The sets of all relations."""
        everywhere: dict[str, tuple[str, ...]] = {}
        for sets in self._sets.values():
            for key, tasks in sets.items():
                if everywhere.setdefault(key, tasks) != tasks:
                    raise ValueError(
                        f"{name_of(self)}: group {key!r} has different tasks in different "
                        f"relations: {list(everywhere[key])} and {list(tasks)}."
                    )
        return everywhere

    def _add_trl(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        trl = TRL(self._pairs[name], **self.settings, name=f"{name}_relation")
        shapes = {}
        for key, tasks in self._sets[name].items():
            sizes = [tensors[task].shape[1:] for task in tasks]
            if any(d is None for size in sizes for d in size):
                raise ValueError(
                    f"{name_of(self)}: relation {name!r} needs features of known sizes. "
                    f"Received: {dict(zip(tasks, sizes))}."
                )
            shapes[key] = (None, sum(math.prod(size) for size in sizes))
        trl.build(shapes)
        self.trls[name] = trl

    def _features(
        self, network: keras.Model, relation: Relation, tasks: tuple[str, ...]
    ) -> dict[str, Any]:
        """The features of some tasks where a relation takes them, by task."""
        if relation.at == "output":
            return {task: network.output[task] for task in tasks}
        if isinstance(relation.at, dict):
            return {
                task: self._output_of(network, relation, relation.at[task])
                for task in tasks
            }
        output = self._output_of(network, relation, relation.at)
        layer, traced = network.get_layer(relation.at), trace(network)
        values = [call.outputs for call in traced.calls if call.operation is layer]
        (count,) = {value.tasks for value in values} or {0}
        # Which channels are a task's: those of its output.
        positions = traced.positions
        known = all(positions.get(task, (0, 0))[0] == count > 0 for task in tasks)
        if not known or values[0].form != Form.GROUPED:
            raise ValueError(
                f"{name_of(self)}: layer {relation.at!r} of {name_of(relation)} does not "
                f"have the channels of all tasks side by side, among them {list(tasks)}. "
                "Give a dict from task to the name of its layer."
            )
        parts = list(TaskSplit(count)(output).values())
        return {task: parts[positions[task][1]] for task in tasks}

    def _output_of(self, network: keras.Model, relation: Relation, name: str) -> Any:
        names = [layer.name for layer in network.layers]
        if name not in names:
            raise ValueError(
                f"{name_of(self)}: unknown layer {name!r} in {name_of(relation)}. The "
                f"layers are {names}."
            )
        output = network.get_layer(name).output
        if tree.is_nested(output):
            raise ValueError(
                f"{name_of(self)}: layer {name!r} of {name_of(relation)} has several "
                "outputs. Name a layer with one."
            )
        return output

    def _checked_similarity(self, given: Any, pairs: list[Pair]) -> list[float] | None:
        """The label similarity of each pair in order, or None."""
        if given is None:
            return None
        if not pairs:
            what = "None, since every relation has a `target`"
            raise refusal("label_similarity", given, name_of(self), what)
        values = {}
        if isinstance(given, Mapping):
            values = {frozenset(pair): value for pair, value in given.items()}
        found: list[Any] = [values.get(frozenset(pair)) for pair in pairs]
        if not all(is_real(value) and 0 <= value <= 1 for value in found):
            what = f"a dict with a number in [0, 1] for every pair of {pairs}"
            raise refusal("label_similarity", given, name_of(self), what)
        return [float(value) for value in found]

    # --- what was learned ---------------------------------------------------------

    @property
    def relations(self) -> list[Relation]:
        """The relations."""
        return list(self._relations)

    def similarities(self) -> dict[str, dict[Pair, float]]:
        """The last estimates.

        Returns:
            A dict from the name of each relation, and `"label"` unless all have a `target`,
            to a dict from pair to float.
        """
        return {
            name: dict(zip(pairs, ops.convert_to_numpy(self._estimate(name)).tolist()))
            for name, pairs in self._pairs.items()
        }

    def _estimate(self, name: str) -> Tensor:
        if name == "label" and self._label_similarity is not None:
            return ops.convert_to_tensor(self._label_similarity, "float32")
        return ops.convert_to_tensor(self.trls[name].similarity)

    def _logged(self, name: str, pairs: Sequence[Pair]) -> list[str]:
        if len(pairs) > _MOST_LOGGED:
            return [f"{name}_similarity"]
        return [f"{name}_similarity_{i}_{j}" for i, j in pairs]

    def _track(self, name: str, values: Tensor) -> None:
        values = ops.stop_gradient(values)
        if len(self._pairs[name]) > _MOST_LOGGED:
            values = ops.mean(values, keepdims=True)
        self._trackers[name].update_state(values)

    # --- the loss -----------------------------------------------------------------

    def call(self, step: Step, training: bool = False) -> Tensor:
        """The term of TRN Eq. 13, see `training.terms.LossTerm`."""
        by_labels: Any = None
        place: dict[frozenset[str], int] = {}
        if "label" in self._pairs:
            by_labels = self._estimate("label")
            if training and self._label_similarity is None:
                by_labels = self._learned_target(step)
            self._track("label", by_labels)
            place = {frozenset(pair): n for n, pair in enumerate(self._pairs["label"])}
        total = 0.0
        for relation in self._relations:
            name = relation.name
            found = self._estimate(name)
            if training:
                sets = self._joined(name, step.features[name])
                found = self.trls[name](sets, training=True)
            self._track(name, found)
            target: Any = self._targets[name]
            if target is None:
                order = [place[frozenset(pair)] for pair in self._pairs[name]]
                target = ops.take(by_labels, order)
            term = ops.sum(ops.abs(found - ops.convert_to_tensor(target, "float32")))
            total = total + relation.weight * term
        # Every replica has the whole term, that of the global batch.
        return share_of_replica(total)

    def _joined(self, name: str, by_task: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sets of features: those of each group's tasks side by side."""
        flat = {
            task: ops.reshape(x, (ops.shape(x)[0], math.prod(x.shape[1:])))
            for task, x in by_task.items()
        }
        return {
            key: ops.concatenate([flat[task] for task in tasks], axis=-1)
            for key, tasks in self._sets[name].items()
        }

    def _learned_target(self, step: Step) -> Tensor:
        """The similarities of the labels, with those of a batch."""
        vectors, present = {}, {}
        for task in dict.fromkeys(itertools.chain(*self._sets["label"].values())):
            labels = step.y.get(task)
            if labels is None:
                raise ValueError(
                    f"{name_of(self)}: expected labels of task {task!r}, which a relation "
                    "has, or `label_similarity` for its pairs."
                )
            vectors[task], present[task] = self._labels(task, labels, step)
        present = {
            key: ops.all(ops.stack([present[task] for task in tasks]), axis=0)
            for key, tasks in self._sets["label"].items()
        }
        sets = self._joined("label", vectors)
        found = self.trls["label"](sets, training=True, present=present)
        return ops.stop_gradient(found)

    def _labels(self, task: str, labels: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Labels of a task as `(vectors, present)`."""
        owner, prediction = f"{name_of(self)}, task {task!r}", step.y_pred[task]
        weights = step.sample_weight
        if isinstance(weights, Mapping):
            weights = weights.get(task)
        labels = ops.cast(ops.convert_to_tensor(labels), "float32")
        classes = prediction.shape[-1]
        marker = _marker(step.losses.get(task))
        shape, wanted = tuple(labels.shape), tuple(prediction.shape)
        if len(shape) == len(wanted) and shape[-1] == 1 != classes:
            labels = ops.squeeze(labels, axis=-1)
        sparse = classes != 1 and same_shape(labels.shape, wanted[:-1])
        if not sparse:
            labels = align(labels, prediction, True, owner)
        labels, present = split_missing(labels, marker, True)
        if sparse:
            labels = ops.one_hot(ops.cast(labels, "int32"), classes)
        batch = ops.shape(labels)[0]
        present = ops.all(ops.reshape(present, (batch, -1)), axis=-1)
        if weights is not None:
            weights = ops.convert_to_tensor(weights)
            if len(weights.shape):
                counts = ops.reshape(weights, (ops.shape(weights)[0], -1)) != 0
                present = ops.logical_and(present, ops.any(counts, axis=-1))
        return labels, present

    # --- serialization ------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        similarity: Any = self.label_similarity
        if similarity is not None:
            # JSON has no pairs as keys.
            similarity = [[*pair, value] for pair, value in similarity.items()]
        return {
            "relations": [
                keras.saving.serialize_keras_object(relation)
                for relation in self._relations
            ],
            "label_similarity": similarity,
            **self.settings,
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """From the dict of `get_config`, or from that of version 0.1."""
        config = BEFORE | config
        config["relations"] = [
            keras.saving.deserialize_keras_object(relation, custom_objects)
            for relation in config["relations"]
        ]
        if config["label_similarity"] is not None:
            config["label_similarity"] = {
                (i, j): value for i, j, value in config["label_similarity"]
            }
        return cls(**config)


def _marker(loss: Any) -> float:
    """What marks a missing label for a loss."""
    for attribute in ("missing", "ignore_class"):
        value = getattr(loss, attribute, None)
        if value is not None:
            return float(value)
    return math.nan
