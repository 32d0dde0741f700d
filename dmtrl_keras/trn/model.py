"""A multi-task network and its task relations in one call: the constructor of a TRN."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras

from dmtrl_keras.ground.keras_private import (
    cloned_model,
    functional_constructor,
    saving_as_h5,
)
from dmtrl_keras.tasks.graph import checked_functional
from dmtrl_keras.training.model import MultiTaskModel
from dmtrl_keras.trn.layer import Estimate, Gradient, Method
from dmtrl_keras.trn.relation import Pair, Relation
from dmtrl_keras.trn.term import TaskRelations


@keras.saving.register_keras_serializable("dmtrl_keras")
class TaskRelationModel(MultiTaskModel):
    """A multi-task network whose features are held to the similarity of the labels (TRN).

    `MultiTaskModel(inputs, outputs, terms=[TaskRelations(relations, ...)])` of a network at
    hand; the term has the formulas. Everything that concerns the relations happens in
    training alone: predictions are those of the network.

    Args:
        network: functional Keras model with a dict of outputs by task, such as a
            `MultiTaskModel`. Its layers are shared, not copied.
        relations: a `Relation` or a list of them.
        label_similarity: as in `TaskRelations`, as are all settings of the estimates.
        momentum: float in [0, 1), of all moving covariances.
        ridge: float.
        method: `"cholesky"` or `"svd"`.
        name: name of the model; None: that of the network.
        estimate: `"mean"` or `"sum"`.
        gradient: `"full"` or `"moving"`.
        **kwargs: `trainable`.

    Attributes:
        network: the network without what only training needs: a `MultiTaskModel` with the
            same layers, to be saved for inference. `export` writes no more than it either.

    Raises:
        ValueError: on a network of another kind, and as `TaskRelations`.

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

    @functional_constructor
    def __init__(
        self,
        network: keras.Model,
        relations: Relation | Sequence[Relation],
        label_similarity: Mapping[Pair, float] | None = None,
        momentum: float = 0.99,
        ridge: float = 1e-3,
        method: Method = "cholesky",
        name: str | None = None,
        estimate: Estimate = "mean",
        gradient: Gradient = "full",
        **kwargs: Any,
    ) -> None:
        original = cloned_model(relations)
        if original is not None:
            # `clone_model` gives inputs and outputs, as to any functional model.
            network, (term,) = keras.Model(network, relations), original.new_terms()
        else:
            term = TaskRelations(
                relations,
                label_similarity,
                momentum,
                ridge,
                method,
                estimate=estimate,
                gradient=gradient,
            )
        network = checked_functional(network, type(self).__name__)
        super().__init__(
            network.input,
            network.output,
            terms=[term],
            name=name or network.name,
            **kwargs,
        )
        for key, trl in term.trls.items():
            # Where files have the state. Not tracked once more: the term has it.
            object.__setattr__(self, f"_{key}_trl", trl)

    @property
    def _relation_term(self) -> TaskRelations:
        return self.terms[0]

    @property
    def network(self) -> MultiTaskModel:
        """The network without what only training needs; it has the same layers."""
        return self.inference_network()

    @property
    def relations(self) -> list[Relation]:
        """The relations, a list."""
        return self._relation_term.relations

    def similarities(self) -> dict[str, dict[Pair, float]]:
        """The last estimates, see `TaskRelations.similarities`."""
        return self._relation_term.similarities()

    def like(self, network: keras.Model) -> "TaskRelationModel":
        """Another network of the same tasks, with copies of the relations as they are."""
        term = self._relation_term
        new = type(self)(
            network, term.relations, term.label_similarity, **term.settings, name=self.name
        )
        new._relation_term.set_weights(term.get_weights())
        return new

    def get_config(self) -> dict[str, Any]:
        if saving_as_h5():
            self._refuse_h5()
        term = self._relation_term.get_config()
        del term["name"]
        return {
            "network": keras.saving.serialize_keras_object(self.network),
            **term,
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """From the dict of `get_config`."""
        config = dict(config)
        network, name, trainable = (config.pop(k) for k in ("network", "name", "trainable"))
        network = keras.saving.deserialize_keras_object(network, custom_objects)
        term = TaskRelations.from_config({**config, "name": ""}, custom_objects)
        return cls(
            network,
            term.relations,
            term.label_similarity,
            **term.settings,
            name=name,
            trainable=trainable,
        )
