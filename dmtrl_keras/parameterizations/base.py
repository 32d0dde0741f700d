"""How the stacked kernel of T tasks comes to be: the interface and its registry."""

import math
import numbers

import keras
import numpy as np
from keras import ops

from dmtrl_keras import decomposition

_REGISTRY = {}
IMPLEMENTATIONS = ("auto", "compose", "contract")


def register(cls):
    """Class decorator: make a parameterization known to `get` by its `name`.

    It also registers the class for Keras serialization under the package
    `dmtrl_keras`.

    Example:

    >>> from dmtrl_keras import parameterizations
    >>> parameterizations.get("tucker").name
    'tucker'
    """
    if cls.name in _REGISTRY:
        raise ValueError(f"A parameterization named {cls.name!r} is registered already.")
    _REGISTRY[cls.name] = cls
    return keras.saving.register_keras_serializable("dmtrl_keras")(cls)


def names():
    """The names of the registered parameterizations, a sorted tuple of strings."""
    return tuple(sorted(_REGISTRY))


def get(identifier):
    """A parameterization from a name, a serialized config, or itself.

    Args:
        identifier: None (independent kernels), a registered name such as `"laf"`,
            a dict made by `keras.saving.serialize_keras_object`, or a
            `Parameterization`.

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
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str) and identifier.lower() in _REGISTRY:
        return _REGISTRY[identifier.lower()]()
    raise ValueError(
        f"`sharing` must be one of {names()}, or a Parameterization. "
        f"Received: {identifier!r}."
    )


class Parameterization:
    """What a stacked kernel is made of.

    It holds settings, never variables: the layer that uses it makes one variable
    of each factor. A stacked kernel has shape `(*window, in, out, T)`, the task
    axis last.

    To be implemented: `name`, `decompose`, `compose`, `task_matrix`; and, where
    the factors can be applied without composing, `contractions`.
    """

    name = None
    # Whether the only factor, "kernel", is the stacked kernel itself.
    is_stacked_kernel = False
    # Whether `multitask` gives it to convolutions only, unless a layer is named.
    convolutions_only = False

    def decompose(self, kernel):
        """Factors whose composition is, or approximates, a stacked kernel.

        Args:
            kernel: NumPy array of shape `(*window, in, out, T)`.

        Returns:
            A dict of NumPy arrays by factor name, in a fixed order.
        """
        raise NotImplementedError

    def replicate(self, kernel, tasks):
        """Factors of T equal kernels, such as pretrained ones, to train on from.

        Args:
            kernel: NumPy array of shape `(*window, in, out)`.
            tasks: int, T.

        Returns:
            A dict of NumPy arrays by factor name, as from `decompose`.
        """
        return self.decompose(np.repeat(kernel[..., None], tasks, axis=-1))

    def with_names(self, names):
        """The same parameterization for tasks of given names, where it speaks of tasks."""
        return self

    def new_state(self, factors, start, tasks, dtype):
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

    def compose(self, factors, tasks):
        """The kernels as one tensor `(T, *window, in, out)`.

        The task axis comes first here, so that one task's kernel is contiguous.

        Args:
            factors: dict of tensors by factor name, and those of the state.
            tasks: int, T.
        """
        raise NotImplementedError

    def compose_flops(self, shapes):
        """Operations of `compose`, from the dict of the factors' shapes."""
        return 0

    def task_matrix(self, factors, tasks):
        """S of the paper, `(K, T)`: column t has the coefficients of task t."""
        raise NotImplementedError

    def contractions(self, shapes):
        """Plans that apply the factors without composing the stacked kernel.

        Args:
            shapes: dict of the factors' shapes.

        Returns:
            A list of lists of `Stage`, empty if composing is the only way.
        """
        return []

    def rank(self, shapes):
        """The ranks, a tuple of ints, or None where there is no such thing."""
        return None

    def with_rank(self, rank):
        """The same parameterization with its ranks fixed."""
        return self

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class FactorizedParameterization(Parameterization):
    """A stacked kernel generated from shared factors (DMTRL).

    Args:
        rank: int (a cap for every rank), float in (0, 1] (a fraction of the
            largest possible ranks) or a tuple with one of them for each rank.
            Without `rank` and `tolerance`: 0.5.
        tolerance: number in (0, 1); the ranks are the smallest whose composition
            is within `tolerance * ||W||_F` of the start kernel `W`.
        implementation: `"compose"` the kernel and apply it, `"contract"`: pull the
            activations through the factors, or `"auto"`: whatever needs fewer
            operations for the shapes at hand.
        threshold: what `tolerance` bounds: `"frobenius"`, the error of the
            composed kernel; `"singular_value"`, the ratio to the largest singular
            value in each SVD, as in the code of the paper's authors.

    Raises:
        ValueError: on a malformed argument.
    """

    def __init__(
        self, rank=None, tolerance=None, implementation="auto", threshold="frobenius"
    ):
        decomposition.check_choice(rank, tolerance, threshold)
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"`implementation` must be one of {IMPLEMENTATIONS}. "
                f"Received: implementation={implementation!r}."
            )
        if rank is None and tolerance is None:
            rank = 0.5
        self._rank = rank if isinstance(rank, (numbers.Real, type(None))) else tuple(rank)
        self.tolerance = tolerance
        self.implementation = implementation
        self.threshold = threshold

    # Largest possible ranks of a stacked kernel, a function of its shape.
    _bounds = None

    def _task_axis(self, names):
        """Where the latent kernels are counted.

        Returns:
            `(latent, matrix, axis)`: the names of the factor whose last axis counts them
            and of the task matrix, and the axis of the latter that counts them.
        """
        raise NotImplementedError

    def replicate(self, kernel, tasks):
        """Factors of T equal kernels, whose tasks can still become different.

        Equal kernels have task rank 1, whatever the tolerance; so that a tolerance, or
        a rank, is applied to the one kernel that they are (where an int is a cap at
        any size). The task rank is that of `rank`, and T if a tolerance is given:
        latent kernels beyond the first start at zero, while their rows of the task
        matrix, cosines of increasing frequency, are orthogonal with norm `sqrt(T)`
        as always. Thus every task starts from `kernel`, and gradients reach them all.
        """
        one = self._rank
        if isinstance(one, tuple):
            one = (*one[:-1], 1)
        elif isinstance(one, numbers.Integral):
            one = min(one, max(self._bounds((*kernel.shape, 1))))
        single = type(self)(one, self.tolerance, self.implementation, self.threshold)
        factors = single.decompose(kernel[..., None])
        latent, matrix, axis = self._task_axis(list(factors))
        start = factors[latent]
        latents = self._latents(kernel, tasks)
        if latents > math.prod(start.shape[:-1]):
            # One kernel alone, say with a single output, needs ranks too small for so
            # many latent kernels to differ. What the wider ranks add is zero at first.
            wide = self
            if not isinstance(self._rank, tuple):
                ranks = single.rank({name: f.shape for name, f in factors.items()})
                wide = self.with_rank(self._widened((*ranks[:-1], latents), kernel.shape))
            return wide.decompose(np.repeat(kernel[..., None], tasks, axis=-1))
        unused = [(0, 0)] * (start.ndim - 1) + [(0, latents - 1)]
        factors[latent] = np.pad(start, unused)
        angles = np.outer(np.arange(latents), np.arange(tasks) + 0.5) * np.pi / tasks
        rows = math.sqrt(2) * np.cos(angles)
        rows[0] = factors[matrix].item()
        factors[matrix] = rows if axis == 0 else rows.T
        return factors

    def _widened(self, ranks, shape):
        """Ranks for the last of them, the task rank, to be possible.

        Args:
            ranks: tuple of ints.
            shape: tuple, the shape of one task's kernel.
        """
        return ranks

    def _latents(self, kernel, tasks):
        """The task rank that T equal kernels are to have."""
        bounds = self._bounds((*kernel.shape, tasks))
        if self._rank is None:
            return bounds[-1]
        rank = self._rank
        if isinstance(rank, numbers.Integral):
            rank = min(rank, max(bounds))
        return decomposition.resolve_rank(rank, bounds)[-1]

    def with_rank(self, rank):
        return type(self)(rank, None, self.implementation, self.threshold)

    def get_config(self):
        return {
            "rank": self._rank,
            "tolerance": self.tolerance,
            "implementation": self.implementation,
            "threshold": self.threshold,
        }

    def _choice(self):
        return {
            "rank": self._rank,
            "tolerance": self.tolerance,
            "threshold": self.threshold,
        }


def matrix(tensor, columns):
    """A tensor as a matrix whose columns are its last `columns` axes."""
    split = len(tensor.shape) - columns
    rows = math.prod(tensor.shape[:split])
    return ops.reshape(tensor, (rows, math.prod(tensor.shape[split:])))
