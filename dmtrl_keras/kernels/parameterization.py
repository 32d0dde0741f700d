"""How the stacked kernel of T tasks comes to be: the interface and its registry."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeAlias, TypeVar

import keras
import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Factors, FactorShapes, Tensor
from dmtrl_keras.ground.validation import from_keras, shown
from dmtrl_keras.kernels.plan import Stage

_Kind = TypeVar("_Kind", bound="Parameterization")

_REGISTRY: dict[str, type["Parameterization"]] = {}


def register(cls: type[_Kind]) -> type[_Kind]:
    """Class decorator: make a parameterization known to `get` by its `name`.

    It also registers the class for Keras serialization under the package
    `dmtrl_keras`.

    Example:

    >>> from dmtrl_keras import parameterizations
    >>> parameterizations.get("tucker").name
    'tucker'
    """
    if not isinstance(cls, type) or not issubclass(cls, Parameterization):
        raise ValueError(
            "register: expected a subclass of Parameterization with a `name`. "
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
    """The names of the registered parameterizations, a sorted tuple of strings."""
    return tuple(sorted(_REGISTRY))


def get(identifier: "Sharing", owner: str = "parameterizations.get") -> "Parameterization":
    """A parameterization from a name, a serialized config, or itself.

    Args:
        identifier: None (independent kernels), a registered name such as `"laf"`,
            a dict made by `keras.saving.serialize_keras_object`, or a
            `Parameterization`.
        owner: str, the layer or function to name in the error.

    Returns:
        A `Parameterization`.

    Raises:
        ValueError: if it is none of these.
    """
    if identifier is None:
        return _REGISTRY["independent"]()
    if isinstance(identifier, Parameterization):
        return identifier
    if isinstance(identifier, dict):
        made = from_keras(owner, keras.saving.deserialize_keras_object, config=identifier)
        if isinstance(made, Parameterization):
            return made
    if isinstance(identifier, str) and identifier.lower() in _REGISTRY:
        return _REGISTRY[identifier.lower()]()
    raise ValueError(
        f"{owner}: `sharing` must be one of {names()}, or a Parameterization. "
        f"Received: {shown(identifier)}."
    )


class Parameterization:
    """What a stacked kernel is made of.

    It holds settings, never variables: the layer that uses it makes one variable
    of each factor. A stacked kernel has shape `(*window, in, out, T)`, the task
    axis last.

    To be implemented: `name`, `decompose`, `compose`, `task_matrix`; and, where
    the factors can be applied without composing, `contractions`.
    """

    name: str = None  # type: ignore[assignment]  # Subclasses have one.
    # Whether the only factor, "kernel", is the stacked kernel itself.
    is_stacked_kernel = False
    # Whether it has a say, by `projected`, in what an update makes of this factor.
    projects_updates = False
    # Whether `multitask` gives it to convolutions only, unless a layer is named.
    convolutions_only = False
    # Whether all tasks have one kernel, which a task that comes later has too.
    is_of_all = False
    # Whether each task starts from a draw of its own if nothing is said.
    starts_apart = False
    # Whether the variable `kernel` is compared in training, which takes finite numbers.
    compares_kernels = False
    # Which arguments of `multitask` are this one's, where it is given by name.
    short_forms: tuple[str, ...] = ()

    @classmethod
    def of_trained(cls, **options: Any) -> "Parameterization":
        """The one that is meant by its name alone, for kernels that are trained already.

        Args:
            **options: arguments, of those in `short_forms`.
        """
        return cls(**options)

    def decompose(self, kernel: np.ndarray) -> dict[str, np.ndarray]:
        """Factors whose composition is, or approximates, a stacked kernel.

        Args:
            kernel: NumPy array of shape `(*window, in, out, T)`.

        Returns:
            A dict of NumPy arrays by factor name, in a fixed order.
        """
        raise NotImplementedError

    def replicate(self, kernel: np.ndarray, tasks: int) -> dict[str, np.ndarray]:
        """Factors of T equal kernels, such as pretrained ones, to train on from.

        Args:
            kernel: NumPy array of shape `(*window, in, out)`.
            tasks: int, T.

        Returns:
            A dict of NumPy arrays by factor name, as from `decompose`.
        """
        return self.decompose(np.repeat(kernel[..., None], tasks, axis=-1))

    @property
    def factor_regularizers(self) -> Mapping[str, Callable[..., Any]]:
        """Penalties on single factors, a dict by name; most have none."""
        return {}

    def is_frozen(self, name: str) -> bool:
        """Whether a factor, by its name, is not trained."""
        return False

    def with_names(self, names: Sequence[str]) -> Self:
        """The same parameterization for tasks of given names, where it speaks of tasks."""
        return self

    def new_state(
        self,
        factors: Callable[[], Factors],
        start: Mapping[str, np.ndarray],
        tasks: int,
        dtype: str,
    ) -> keras.layers.Layer | None:
        """What a layer keeps beside the factors, or None (of most parameterizations).

        Args:
            factors: function without arguments that returns the dict of the variables.
            start: dict of arrays, their start values.
            tasks: int, T.
            dtype: str, dtype of float state.

        Returns:
            A Keras layer without inputs: `call(training)` updates it in training, and
            `tensors(training)` is a dict that `compose` finds among the factors.
        """
        return None

    def compose(self, factors: Factors, tasks: int) -> Tensor:
        """The kernels as one tensor `(T, *window, in, out)`.

        The task axis comes first here, so that one task's kernel is contiguous.

        Args:
            factors: dict of tensors by factor name, and those of the state.
            tasks: int, T.
        """
        raise NotImplementedError

    def projected(self, kernel: Tensor, state: keras.layers.Layer | None) -> Tensor:
        """What an update by the optimizer leaves of the stacked kernel.

        It is asked if `projects_updates`, where the kernel is the only factor.

        Args:
            kernel: tensor `(*window, in, out, T)`, after the update.
            state: what `new_state` returned.
        """
        return kernel

    def compose_flops(self, shapes: FactorShapes) -> int:
        """Operations of `compose`, from the dict of the factors' shapes."""
        return 0

    def task_matrix(self, factors: Factors, tasks: int) -> Tensor:
        """S of the paper, `(K, T)`: column t has the coefficients of task t."""
        raise NotImplementedError

    def task_factor(self, names: Sequence[str]) -> tuple[str, int] | None:
        """The factor that alone tells the tasks apart: that of the task matrix.

        A task that comes later needs a column of S and nothing else (the extension that
        DMTRL's conclusion names), see `dmtrl_keras.add_task`.

        Args:
            names: the names of the factors.

        Returns:
            `(name, axis)`, the matrix and its axis of the tasks; None where there is none,
            so that a new task takes a kernel of its own.
        """
        return None

    def of_column(self, factors: Factors, column: Tensor) -> Factors:
        """The factors of one task, which is none of the T, from its column of S.

        Args:
            factors: dict of tensors, those of T tasks.
            column: tensor `(K,)`; without a `task_factor` it says nothing.
        """
        found = self.task_factor(list(factors))
        if found is None:
            return factors
        name, axis = found
        return {**factors, name: ops.expand_dims(column, axis)}

    def own_entries(
        self, shapes: FactorShapes, tasks: int, task: int
    ) -> dict[str, np.ndarray]:
        """Which entries of the factors are one task's alone.

        Those that no other task's kernel depends on: all of its stacked kernel, or its
        column of the task matrix.

        Args:
            shapes: dict of the factors' shapes.
            tasks: int, T.
            task: int, which.

        Returns:
            A dict of boolean arrays that broadcast to the factors, by name; factors of
            which none are a task's own are left out.
        """
        if self.is_stacked_kernel:
            return {"kernel": one_of(tasks, task)}
        found = self.task_factor(list(shapes))
        if found is None:
            return {}
        name, axis = found
        return {name: one_of(tasks, task, len(shapes[name]) - 1 - axis)}

    def contractions(self, shapes: FactorShapes) -> Sequence[Sequence[Stage]]:
        """Plans that apply the factors without composing the stacked kernel.

        Args:
            shapes: dict of the factors' shapes.

        Returns:
            A list of lists of `Stage`, empty if composing is the only way.
        """
        return []

    def rank(self, shapes: FactorShapes) -> tuple[int, ...] | None:
        """The ranks, a tuple of ints, or None where there is no such thing."""
        return None

    def with_rank(self, rank: tuple[int, ...]) -> Self:
        """The same parameterization with its ranks fixed."""
        return self

    def concerns(self, shapes: FactorShapes, kernel: tuple[int, ...]) -> list[str]:
        """What a new layer warns of.

        Args:
            shapes: dict of the factors' shapes.
            kernel: tuple, the shape of the stacked kernel.

        Returns:
            A list of texts, mostly empty.
        """
        return []

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def warn_of_concerns(
    sharing: Parameterization,
    factors: Mapping[str, Any],
    kernel: tuple[int, ...],
    owner: str,
) -> None:
    """Warn of what is strange about the factors that a layer starts from.

    Args:
        sharing: the parameterization that made them.
        factors: dict of arrays.
        kernel: tuple, the shape of the stacked kernel.
        owner: str, the layer to name.
    """
    shapes = {name: tuple(value.shape) for name, value in factors.items()}
    for concern in sharing.concerns(shapes, kernel):
        warnings.warn(f"{owner}, stacked kernel {kernel}: {concern}", stacklevel=2)


# What `get` makes a parameterization of.
Sharing: TypeAlias = str | Parameterization | dict[str, Any] | None


def one_of(tasks: int, task: int, after: int = 0) -> np.ndarray:
    """A boolean array that is true at one task.

    Args:
        tasks: int, T.
        task: int, which.
        after: int, the number of axes after that of the tasks, each of size 1.
    """
    return (np.arange(tasks) == task).reshape(-1, *[1] * after)


def matrix(tensor: Tensor, columns: int) -> Tensor:
    """A tensor as a matrix whose columns are its last `columns` axes."""
    split = len(tensor.shape) - columns
    rows = math.prod(tensor.shape[:split])
    return ops.reshape(tensor, (rows, math.prod(tensor.shape[split:])))
