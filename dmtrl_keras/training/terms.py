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


class LossTerm(keras.layers.Layer):
    """A term of the total loss, with state and metrics of its own (not for direct use).

    `MultiTaskModel(inputs, outputs, terms=[...])` tracks it, saves its state and its
    configuration, and adds its value to the losses of the tasks. Several go together, and
    with priors and fusion units, which know nothing of them.

    To be implemented: `connect`, `call` and `get_config`.

    Args:
        **kwargs: `name`, `dtype`.
    """

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
