"""Terms of the loss of a network of T tasks, on its features and labels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras

from dmtrl_keras.ground.types import Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """What a term of the loss sees of a step.

    Attributes:
        features: what the term asked for in `LossTerm.connect`, in that structure; None at
            inference.
        y: dict of the labels by task.
        y_pred: dict of the outputs by task.
        sample_weight: None, a tensor, or a dict of them by task.
        losses: dict by task of the losses that the model was compiled with.
    """

    features: Any
    y: Mapping[str, Tensor]
    y_pred: Mapping[str, Tensor]
    sample_weight: Any
    losses: Mapping[str, Any]


def checked_terms(terms: Any, owner: str) -> list["LossTerm"]:
    """Terms for a model, none of which belongs to another.

    Raises:
        ValueError: if they are no list of `LossTerm` objects, have one name, or are in use.
    """
    fine = isinstance(terms, (list, tuple)) and all(isinstance(t, LossTerm) for t in terms)
    if not fine:
        raise ValueError(
            f"{owner}: `terms` must be a list of LossTerm objects, such as "
            f"[TaskRelations([Relation(...)])]. Received: terms={terms!r}."
        )
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"{owner}: terms need different names. Received: {names}.")
    for term in terms:
        if term.connected:
            raise ValueError(
                f"{owner}: the term {term.name!r} belongs to another model. Make one anew, "
                "such as type(term).from_config(term.get_config())."
            )
        term.connected = True
    return list(terms)


class LossTerm(keras.layers.Layer):
    """A term of the total loss, with state and metrics of its own (not for direct use).

    `MultiTaskModel(inputs, outputs, terms=[...])` tracks it, saves its state and its
    configuration, and adds its value to the losses of the tasks. Several go together, and
    with priors and fusion units, which know nothing of them.

    To be implemented: `connect`, `call` and `get_config`.

    Args:
        **kwargs: `name`, `dtype`.

    Attributes:
        connected: bool, whether a model has it.
    """

    connected = False

    def __init__(self, **kwargs: Any) -> None:
        # Labels, say, are not to be rounded to half precision on the way in.
        super().__init__(autocast=False, **kwargs)

    def get_build_config(self) -> None:
        """None: what a term is made of follows from the network, see `connect`."""
        return None

    def connect(self, network: keras.Model) -> Any:
        """Make the state for a network, once.

        Args:
            network: the functional model, with outputs by task.

        Returns:
            The symbolic tensors of the network whose values the term needs in training, in
            any structure.
        """
        raise NotImplementedError

    def call(self, step: Step, training: bool = False) -> Tensor:
        """The term, a scalar, that of the global batch where there are several replicas.

        Args:
            step: a `Step`.
            training: bool; False: no state may change, and there are no features.
        """
        raise NotImplementedError
