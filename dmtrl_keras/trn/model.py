"""The Task Relation Network: tasks' features held to the similarity of their labels.

Li et al., "Task Relation Networks" (WACV 2019), section 3.2. The layer that estimates a
similarity online is `layers.TRL`; similarities of whole arrays are in
`canonical_correlation`.
"""

import math
import threading

import keras
import numpy as np
from keras import ops, tree

from dmtrl_keras.conversion.graph import (
    checked_functional,
    form_of_tensor,
    names_of_tasks,
)
from dmtrl_keras.ground.backend import share_of_replica
from dmtrl_keras.tasks.layout import TaskSplit
from dmtrl_keras.training.missing import align, same_shape, split_missing
from dmtrl_keras.training.model import MultiTaskModel
from dmtrl_keras.trn.layer import TRL
from dmtrl_keras.trn.relation import Relation

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

    >>> from dmtrl_keras.trn.model import SimilarityTracker
    >>> tracker = SimilarityTracker(["a", "b"])
    >>> tracker.update_state([0.5, 1.0])
    >>> {name: float(value) for name, value in tracker.result().items()}
    {'a': 0.5, 'b': 1.0}
    """

    def __init__(self, names, name="similarity", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.names = list(names)
        self.total = self.add_variable((len(self.names),), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, values, sample_weight=None):
        """Add the similarities of a step.

        Args:
            values: tensor `(P,)`.
            sample_weight: must be None.
        """
        if sample_weight is not None:
            raise ValueError(f"{self.name!r}: a similarity has no sample weights.")
        self.total.assign_add(ops.cast(values, self.total.dtype))
        self.count.assign_add(ops.ones((), self.count.dtype))

    def result(self):
        """The mean of each similarity, a dict of scalars by name."""
        means = ops.divide_no_nan(self.total, self.count)
        return dict(zip(self.names, ops.unstack(means, len(self.names))))

    def get_config(self):
        return {**super().get_config(), "names": self.names}


class _Graph:
    """The functional models behind a `TaskRelationModel`.

    Not a Keras object, since Keras would take its models, which share all layers with
    the model itself, as further parts to save.
    """

    def __init__(self, network, features):
        self.network = network
        self.with_features = keras.Model(network.input, (network.output, features))
        # What one call gives to the `compute_loss` that follows; under
        # `tf.distribute.MirroredStrategy` each replica traces in a thread of its own.
        self._given = threading.local()

    def give(self, features):
        self._given.features = features

    def take(self, owner):
        features = getattr(self._given, "features", None)
        if features is None:
            raise ValueError(
                f"{owner}: the loss of the relations needs the features of the batch. Call "
                "the model with `training=True` before each `compute_loss`."
            )
        self._given.features = None
        return features


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskRelationModel(MultiTaskModel):
    """A multi-task network whose features are held to the similarity of the labels (TRN).

    The total loss is (Eq. 13, 14)

    `L = sum_t L_t + sum_l lambda_l sum_ij |tau(F_i^(l), F_j^(l)) - tau(Y_i, Y_j)|`

    with the similarity tau of `layers.TRL`, estimated online for the features of each
    relation and for the labels. Class labels are compared as one-hot vectors, all other
    labels as they are. Everything that concerns the relations happens in training alone:
    predictions are those of the network, and `evaluate` takes the last estimates.

    Labels count as missing where they are NaN, where the task's loss says so
    (`MaskedLoss(missing=...)`, `ignore_class`), and where their sample weight is zero.
    Labels are then compared by the examples that have both, features by all examples.

    `fit` logs `<relation>_similarity_<i>_<j>` and `label_similarity_<i>_<j>`; of more than
    50 pairs the mean over the pairs, `<relation>_similarity` and `label_similarity`, since
    TensorFlow takes minutes to trace a step with many logs. `similarities()` has each.

    Args:
        network: functional Keras model with a dict of outputs by task, such as a
            `MultiTaskModel`. Its layers are shared, not copied.
        relations: a `Relation` or a list of them.
        label_similarity: dict from pair to float in [0, 1], for every pair of the
            relations: the label similarities over the whole training set, such as
            `dmtrl_keras.label_similarity` finds. None: they are estimated online.
        momentum: float in [0, 1), of all moving covariances.
        ridge: float, as in `layers.TRL`.
        method: `"cholesky"` or `"svd"`, as in `layers.TRL`.
        name: name of the model; None: that of the network.
        **kwargs: `trainable`.

    Attributes:
        network: the network without what only training needs: a `MultiTaskModel` with the
            same layers, to be saved for inference. `export` writes no more than it either.

    Raises:
        ValueError: on a network of another kind, on unknown tasks or layers, on relations
            of one name, on missing or bad label similarities; in training, on a task
            without labels that label similarities are to be learned of, and as
            `layers.TRL`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from dmtrl_keras import MultiTaskModel, Relation, TaskRelationModel
    >>> inputs = keras.Input((8,))
    >>> outputs = {"pose": keras.layers.Dense(5, "softmax")(inputs)}
    >>> outputs["landmarks"] = keras.layers.Dense(10)(inputs)
    >>> network = MultiTaskModel(inputs, outputs)
    >>> model = TaskRelationModel(network, Relation("output", weight=0.1), momentum=0.9)
    >>> losses = {"pose": "sparse_categorical_crossentropy", "landmarks": "mse"}
    >>> model.compile("adam", losses)
    >>> labels = {"pose": np.arange(64) % 5, "landmarks": np.ones((64, 10))}
    >>> history = model.fit(np.ones((64, 8)), labels, verbose=0).history
    >>> sorted(history)[:2]
    ['label_similarity_pose_landmarks', 'landmarks_loss']
    """

    def __init__(
        self,
        network,
        relations,
        label_similarity=None,
        momentum=0.99,
        ridge=1e-3,
        method="cholesky",
        name=None,
        **kwargs,
    ):
        network = checked_functional(network, type(self).__name__)
        super().__init__(network.input, network.output, name=name or network.name, **kwargs)
        if isinstance(relations, Relation):
            relations = [relations]
        relations = list(relations)
        names = [getattr(relation, "name", None) for relation in relations]
        if not relations or not all(isinstance(r, Relation) for r in relations):
            raise ValueError(
                f"{self._owner()}: `relations` must be a Relation or a list of them. "
                f"Received: relations={relations!r}."
            )
        if len(set(names)) < len(names) or "label" in names:
            raise ValueError(
                f"{self._owner()}: relations need different names, and none may be "
                f"'label'; give them a `name`. Received: {names}."
            )
        self._relations = relations
        self._settings = {"momentum": momentum, "ridge": ridge, "method": method}
        features, self._pairs, self._sets, everywhere = {}, {}, {}, {}
        for relation in relations:
            pairs, sets = relation.sets(self.task_names)
            self._pairs[relation.name], self._sets[relation.name] = pairs, sets
            for key, tasks in sets.items():
                if everywhere.setdefault(key, tasks) != tasks:
                    raise ValueError(
                        f"{self._owner()}: group {key!r} has different tasks in different "
                        f"relations: {list(everywhere[key])} and {list(tasks)}."
                    )
            used = dict.fromkeys(task for tasks in sets.values() for task in tasks)
            features[relation.name] = self._features(network, relation, tuple(used))
        network = MultiTaskModel(network.input, network.output, name=self.name)
        self._graph = _Graph(network, features)
        self._sets["label"] = everywhere
        # One label TRL for all relations, with each pair once.
        self._pairs["label"] = list(
            {frozenset(p): p for ps in self._pairs.values() for p in ps}.values()
        )
        self._label_similarity = self._checked_similarity(label_similarity)
        for relation in relations:
            self._add_trl(relation.name)
        if self._label_similarity is None:
            self._add_trl("label")
        self._trackers = {
            key: SimilarityTracker(self._logged(key, pairs), key)
            for key, pairs in self._pairs.items()
        }

    def _logged(self, name, pairs):
        if len(pairs) > _MOST_LOGGED:
            return [f"{name}_similarity"]
        return [f"{name}_similarity_{i}_{j}" for i, j in pairs]

    def _track(self, name, values):
        values = ops.stop_gradient(values)
        if len(self._pairs[name]) > _MOST_LOGGED:
            values = ops.mean(values, keepdims=True)
        self._trackers[name].update_state(values)

    def _add_trl(self, name):
        trl = TRL(self._pairs[name], **self._settings, name=f"{name}_relation")
        shapes = {}
        for key, tasks in self._sets[name].items():
            if name == "label":
                # The labels' sizes follow from the outputs': one-hot, or as they are.
                parts = [self._outputs_struct[task] for task in tasks]
            else:
                parts = [self._graph.with_features.output[1][name][task] for task in tasks]
            sizes = [x.shape[1:] for x in parts]
            if any(d is None for size in sizes for d in size):
                raise ValueError(
                    f"{self._owner()}: relation {name!r} needs features of known sizes. "
                    f"Received: {dict(zip(tasks, sizes))}."
                )
            shapes[key] = (None, sum(math.prod(size) for size in sizes))
        trl.build(shapes)
        setattr(self, f"_{name}_trl", trl)

    def _features(self, network, relation, tasks):
        """The features of some tasks where a relation takes them, a dict by task."""
        if relation.at == "output":
            return {task: network.output[task] for task in tasks}
        if isinstance(relation.at, dict):
            return {
                task: self._output_of(network, relation, relation.at[task])
                for task in tasks
            }
        output = self._output_of(network, relation, relation.at)
        if form_of_tensor(output) != "grouped":
            raise ValueError(
                f"{self._owner()}: layer {relation.at!r} of {relation._owner()} does not "
                "have the channels of all tasks side by side. Give a dict from task to "
                "the name of its layer."
            )
        split = TaskSplit(names_of_tasks(network))(output)
        return {task: split[task] for task in tasks}

    def _output_of(self, network, relation, name):
        names = [layer.name for layer in network.layers]
        if name not in names:
            raise ValueError(
                f"{self._owner()}: unknown layer {name!r} in {relation._owner()}. The "
                f"layers are {names}."
            )
        output = network.get_layer(name).output
        if tree.is_nested(output):
            raise ValueError(
                f"{self._owner()}: layer {name!r} of {relation._owner()} has several "
                "outputs. Name a layer with one."
            )
        return output

    def _checked_similarity(self, given):
        """The label similarity of each pair in order, or None."""
        if given is None:
            return None
        pairs = self._pairs["label"]
        values = {}
        if isinstance(given, dict):
            values = {frozenset(pair): value for pair, value in given.items()}
        absent = [pair for pair in pairs if frozenset(pair) not in values]
        found = [values.get(frozenset(pair)) for pair in pairs]
        if absent or not all(np.isscalar(v) and 0 <= v <= 1 for v in found):
            raise ValueError(
                f"{self._owner()}: `label_similarity` must be a dict with a number in "
                f"[0, 1] for every pair of {pairs}. Received: {given!r}."
            )
        return [float(value) for value in found]

    @property
    def network(self):
        """The network without what only training needs; it has the same layers."""
        return self._graph.network

    @property
    def relations(self):
        """The relations, a list."""
        return list(self._relations)

    def similarities(self):
        """The last estimates.

        Returns:
            A dict from the name of each relation, and `"label"`, to a dict from pair to
            float.
        """
        return {
            name: dict(zip(pairs, ops.convert_to_numpy(self._estimate(name)).tolist()))
            for name, pairs in self._pairs.items()
        }

    def _estimate(self, name):
        if name == "label" and self._label_similarity is not None:
            return ops.convert_to_tensor(self._label_similarity, "float32")
        return ops.convert_to_tensor(getattr(self, f"_{name}_trl").similarity)

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        loss_weights=None,
        metrics=None,
        weighted_metrics=None,
        **kwargs,
    ):
        """Configure the model for training, as `MultiTaskModel.compile`."""
        super().compile(optimizer, loss, loss_weights, metrics, weighted_metrics, **kwargs)
        losses = loss if isinstance(loss, dict) else dict.fromkeys(self.task_names, loss)
        self._markers = {task: _marker(loss) for task, loss in losses.items()}

    def call(self, inputs, training=None, mask=None):
        """The outputs of the network, a dict by task."""
        if not training:
            return super().call(inputs, training=training, mask=mask)
        outputs, features = self._graph.with_features(inputs, training=True, mask=mask)
        self._graph.give(features)
        return outputs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The total loss of TRN Eq. 13.

        Raises:
            ValueError: as `MultiTaskModel.compute_loss`; on labels that can't be compared.
        """
        # Taken in any case, so that nothing is left for another step.
        features = self._graph.take(self._owner()) if training else None
        total = super().compute_loss(x, y, y_pred, sample_weight, training)
        target = self._estimate("label")
        if training and self._label_similarity is None:
            target = self._learned_target(y, y_pred, sample_weight)
        self._track("label", target)
        place = {frozenset(pair): n for n, pair in enumerate(self._pairs["label"])}
        for relation in self._relations:
            name = relation.name
            found = self._estimate(name)
            if training:
                sets = self._joined(name, features[name])
                found = getattr(self, f"_{name}_trl")(sets, training=True)
            self._track(name, found)
            order = [place[frozenset(pair)] for pair in self._pairs[name]]
            term = ops.sum(ops.abs(found - ops.take(target, order)))
            # Every replica has the whole term, that of the global batch.
            term = share_of_replica(relation.weight * term)
            total = total + ops.cast(term, total.dtype)
        return total

    def _joined(self, name, by_task):
        """Sets of features: those of each group's tasks side by side."""
        flat = {
            task: ops.reshape(x, (ops.shape(x)[0], math.prod(x.shape[1:])))
            for task, x in by_task.items()
        }
        return {
            key: ops.concatenate([flat[task] for task in tasks], axis=-1)
            for key, tasks in self._sets[name].items()
        }

    def _learned_target(self, y, y_pred, sample_weight):
        """The similarities of the labels, with those of a batch."""
        vectors, present = {}, {}
        for task in dict.fromkeys(t for s in self._sets["label"].values() for t in s):
            labels = y.get(task) if isinstance(y, dict) else None
            if labels is None:
                raise ValueError(
                    f"{self._owner()}: expected labels of task {task!r}, which a relation "
                    "has, or `label_similarity` for its pairs."
                )
            weights = sample_weight
            if isinstance(weights, dict):
                weights = weights.get(task)
            vectors[task], present[task] = self._labels(task, labels, y_pred[task], weights)
        present = {
            key: ops.all(ops.stack([present[task] for task in tasks]), axis=0)
            for key, tasks in self._sets["label"].items()
        }
        sets = self._joined("label", vectors)
        return ops.stop_gradient(self._label_trl(sets, training=True, present=present))

    def _labels(self, task, labels, prediction, weights):
        """Labels of a task as `(vectors, present)`."""
        owner = f"{self._owner()}, task {task!r}"
        labels = ops.cast(ops.convert_to_tensor(labels), "float32")
        classes = prediction.shape[-1]
        marker = self._markers.get(task, math.nan)
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

    def export(self, filepath, format="tf_saved_model", **kwargs):
        """Export the network for inference, as `MultiTaskModel.export`."""
        return self.network.export(filepath, format=format, **kwargs)

    def get_config(self):
        similarity = self._label_similarity
        if similarity is not None:
            # JSON has no pairs as keys.
            similarity = [[*p, v] for p, v in zip(self._pairs["label"], similarity)]
        return {
            "network": keras.saving.serialize_keras_object(self.network),
            "relations": [
                keras.saving.serialize_keras_object(relation)
                for relation in self._relations
            ],
            "label_similarity": similarity,
            **self._settings,
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """From the dict of `get_config`."""
        config = dict(config)
        for key in ("network", "relations"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects)
        if config["label_similarity"] is not None:
            config["label_similarity"] = {
                (i, j): value for i, j, value in config["label_similarity"]
            }
        return cls(**config)


def _marker(loss):
    """What marks a missing label for a loss."""
    for attribute in ("missing", "ignore_class"):
        value = getattr(loss, attribute, None)
        if value is not None:
            return float(value)
    return math.nan
