"""How the losses of T tasks are balanced: the interface and its registry."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeAlias, TypeVar

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import from_keras, shown

_Kind = TypeVar("_Kind", bound="Balancing")

# The smallest number that a setting can have which is above 0.
ABOVE_0 = float(np.finfo("float32").tiny)

_REGISTRY: dict[str, type["Balancing"]] = {}

# State by name.
State: TypeAlias = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a method sees of a step.

    Attributes:
        losses: float32 tensor `(T,)`, weighted as `compile` says; 0 where a task has no
            labels in the batch.
        present: float32 tensor `(T,)`, 1 where it has, else 0.
        gram: `(T, T)`, `<g_i, g_j>` of the gradients, if the method looks at gradients;
            rows of zeros where there are no labels.
        gradients: `(T, P)`, the gradients themselves, if it needs them.
        normal: function of a shape that returns a draw from the standard normal
            distribution.
    """

    losses: Tensor
    present: Tensor
    gram: Any = None
    gradients: Any = None
    normal: Callable[[tuple[int, ...]], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Balanced:
    """What a method makes of it.

    Attributes:
        weights: tensor `(T,)`, of the losses.
        state: dict of tensors, the new state.
        direction: None; or `(P,)`, what takes the place of `sum_t w_t g_t`.
    """

    weights: Tensor
    state: State
    direction: Any = None


def register(cls: type[_Kind]) -> type[_Kind]:
    """Class decorator: make a method known to `get` by its `name`, and to Keras's files.

    Example:

    >>> from dmtrl_keras import balancing
    >>> balancing.get("upgrad").name
    'upgrad'
    """
    if not isinstance(cls, type) or not issubclass(cls, Balancing):
        raise ValueError(
            f"register: expected a subclass of Balancing with a `name`. "
            f"Received: {shown(cls)}."
        )
    if cls.name in _REGISTRY or not isinstance(cls.name, str):
        raise ValueError(
            f"register: expected a `name` that none of {names()} has, which are "
            f"registered already. Received: {cls.__name__} with name={cls.name!r}."
        )
    _REGISTRY[cls.name] = cls
    return keras.saving.register_keras_serializable("dmtrl_keras")(cls)


def names() -> tuple[str, ...]:
    """The names of the registered methods, a sorted tuple of strings."""
    return tuple(sorted(_REGISTRY))


def get(identifier: Any, owner: str = "balancing.get") -> "Balancing | None":
    """A method from a name, a serialized config, or itself; None from None.

    Args:
        identifier: None, a registered name such as `"upgrad"`, a dict made by
            `keras.saving.serialize_keras_object`, or a `Balancing`.
        owner: str, the model or function to name in the error.

    Raises:
        ValueError: if it is none of these.
    """
    if identifier is None or isinstance(identifier, Balancing):
        return identifier
    if isinstance(identifier, dict):
        made = from_keras(owner, keras.saving.deserialize_keras_object, config=identifier)
        if isinstance(made, Balancing):
            return made
    if isinstance(identifier, str) and identifier.lower() in _REGISTRY:
        return _REGISTRY[identifier.lower()]()
    raise ValueError(
        f"{owner}: `balancing` must be one of {names()}, or a Balancing, or None. "
        f"Received: {shown(identifier)}."
    )


class Balancing:
    """How the losses of T tasks are weighted against each other in training.

    It holds settings; the state is the model's, in variables that are saved with it. To be
    implemented: `name`, `weigh`, `get_config` where there are settings, and `start` where
    there is a state.
    """

    name: str = None  # type: ignore[assignment]  # Subclasses have one.
    # Whether it looks at the tasks' gradients with respect to the weights that they share.
    looks_at_gradients = False
    # Whether it needs the gradients themselves, not only their Gram matrix.
    needs_gradients = False
    # With respect to what: "weights", or "features".
    at = "weights"

    def start(self, tasks: int, size: int = 0) -> dict[str, np.ndarray]:
        """The state that it starts from, a dict of arrays by name.

        Args:
            tasks: int, T.
            size: int, P, the number of shared weights, if it `needs_gradients`.
        """
        return {}

    def weigh(self, seen: Seen, state: State) -> Balanced:
        """The weights of a step, and the new state.

        Args:
            seen: a `Seen`; its tensors have no gradient.
            state: dict of tensors, as `start` names them.
        """
        raise NotImplementedError

    def next_epoch(self, state: State) -> State:
        """The state with which a new epoch begins."""
        return state

    def check(self, names: tuple[str, ...], owner: str) -> None:
        """Raise what does not fit the tasks; most settings always do."""

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def of_sum_tasks(weights: Tensor) -> Tensor:
    """Weights of sum T."""
    total = ops.maximum(ops.sum(weights), 1e-20)
    return weights * (weights.shape[0] / total)


def masked(new: Tensor, old: Tensor, present: Tensor) -> Tensor:
    """What is new of the tasks that are present, else what was."""
    return ops.where(present > 0, new, old)


def arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state as float32 arrays."""
    return {name: np.asarray(value, "float32") for name, value in state.items()}
