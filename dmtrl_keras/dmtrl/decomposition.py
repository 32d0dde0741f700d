"""Truncated decompositions of a stacked kernel, as functions on NumPy arrays.

Three decompositions serve as sharing structures in Yang & Hospedales, "Deep
Multi-task Representation Learning: A Tensor Factorisation Approach" (ICLR
2017): last axis flattening (Eq. 2), Tucker (Eq. 3-5) and tensor train
(Eq. 6-8). All of them are plain SVDs in float64. The last axis of the tensor
indexes the tasks.

How many singular vectors are kept is said by exactly one of

- `tolerance`, a number in (0, 1): with `threshold="frobenius"` the recomposed
  tensor `W'` satisfies `||W - W'||_F <= tolerance * ||W||_F`. A decomposition
  that truncates several SVDs spends an equal share of the squared error on
  each. With `threshold="singular_value"` every SVD keeps the singular values
  above `tolerance` times its largest one: the per-SVD precision of the authors'
  code, which promises nothing about the recomposed tensor.
- `rank`: an int is a cap for every axis but that of the tasks. A float in (0, 1) is
  the share of the tensor's size that the factors may have: of the ranks of inputs
  and outputs, alike but where one is full, the largest are taken that keep to it,
  the window being left whole; 1.0 cuts nothing (the factors are then larger than
  the tensor). A tuple has one int or fraction for each rank, with that of the tasks,
  the last one, or without. Rank `n` can't be greater than the rank of the unfolding
  that it truncates.

The rank of the tasks is full, or `task_rank`. In LAF it is the only one: `rank` and
`task_rank` are the same there, but for fractions, which are of weights and of tasks.
"""

import bisect
import dataclasses
import itertools
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.ground.linalg import mode_product, scaled, unfold, unscaled
from dmtrl_keras.ground.validation import (
    check_number,
    check_one_of,
    check_sizes,
    finite_array,
    refusal,
    shown,
)

# A cap or a fraction for all ranks but the tasks', or one for each; see the module.
Rank: TypeAlias = float | Sequence[float]
# A number of latent kernels, or a fraction of the tasks; None: full.
TaskRank: TypeAlias = float | str | None
Threshold: TypeAlias = Literal["frobenius", "singular_value"]
Ranks: TypeAlias = tuple[int, ...]

# A tolerance of one SVD that leaves a single singular value.
_ALL = 1 - 1e-9
THRESHOLDS = ("frobenius", "singular_value")
# What configurations have for the task rank of a built layer, whose ranks are all settled;
# and those of version 0.1, where an int or a fraction was for the tasks too, and a fraction
# one of every bound.
AS_SAVED = "as_saved"


def is_given(task_rank: Any) -> bool:
    """Whether a task rank is one, and not what stands for none or for a saved one."""
    # An array is not to be compared.
    return task_rank is not None and not (
        isinstance(task_rank, str) and task_rank == AS_SAVED
    )


def check_choice(
    rank: Rank | None,
    tolerance: float | None,
    threshold: Threshold = "frobenius",
    task_rank: TaskRank = None,
    owner: str = "check_choice",
) -> None:
    """Raise a `ValueError` unless rank, tolerance and threshold are well formed.

    Args:
        rank: None, int, float, or a tuple or list of ints and floats.
        tolerance: None or a number in (0, 1).
        threshold: `"frobenius"` or `"singular_value"`.
        task_rank: None, int, float, or `"as_saved"`.
        owner: str, the class or function to name in the error.

    Raises:
        ValueError: if both are given, if a rank is not a positive int or a
            fraction in (0, 1], if the tolerance is outside (0, 1), or if the
            threshold has another name.
    """
    if rank is not None and tolerance is not None:
        raise ValueError(
            f"{owner}: give either `rank` or `tolerance`, not both. "
            f"Received: rank={rank}, tolerance={tolerance}."
        )
    if tolerance is not None and not (
        isinstance(tolerance, numbers.Real)
        and not isinstance(tolerance, bool)
        and 0 < tolerance < 1
    ):
        raise ValueError(
            f"{owner}: `tolerance` must be the relative error that is allowed, "
            f"a number in (0, 1). Received: tolerance={shown(tolerance)}."
        )
    check_one_of("threshold", threshold, THRESHOLDS, owner)
    if is_given(task_rank) and not _is_rank(task_rank):
        raise ValueError(
            f"{owner}: `task_rank` must be a positive int, a fraction in (0, 1] given as a "
            f"float, or None for the full one. Received: task_rank={shown(task_rank)}."
        )
    entries = rank if isinstance(rank, (tuple, list)) else (rank,)
    if rank is not None and not (entries and all(map(_is_rank, entries))):
        raise ValueError(
            f"{owner}: `rank` must be a positive int, a fraction in (0, 1] given as a "
            "float, or a tuple of these with one entry for each rank. "
            f"Received: rank={shown(rank)}."
        )


def _is_rank(entry: Any) -> bool:
    if isinstance(entry, numbers.Integral):
        return not isinstance(entry, bool) and int(entry) >= 1
    return isinstance(entry, numbers.Real) and 0 < float(entry) <= 1


def resolve_rank(
    rank: Rank, bounds: tuple[int, ...], owner: str = "resolve_rank"
) -> tuple[int, ...]:
    """Integer ranks from one entry for each, or for all, and the bound of every rank.

    Args:
        rank: an int (a cap for all), a float in (0, 1] (a fraction of every
            bound, rounded up), or a tuple of ints and floats. The functions below take
            `rank` otherwise, as the module says.
        bounds: tuple of ints, the largest possible ranks.
        owner: str, the function to name in errors.

    Returns:
        A tuple of ints.

    Raises:
        ValueError: if a rank is above its bound, an int above all of them, or
            a tuple of the wrong length.

    Example:

    >>> resolve_rank(0.5, (3, 8)), resolve_rank(4, (3, 8)), resolve_rank((2, 8), (3, 8))
    ((2, 4), (3, 4), (2, 8))
    """
    if rank is None:
        raise refusal("rank", rank, owner, "an int, a float, or a tuple of them")
    check_choice(rank, None, owner=owner)
    bounds = check_sizes("bounds", bounds, owner)
    if isinstance(rank, (tuple, list)):
        if len(rank) != len(bounds):
            raise ValueError(
                f"{owner}: `rank` must have {len(bounds)} entries, one for each of the "
                f"bounds {bounds}. Received: rank={tuple(rank)}."
            )
        entries = tuple(rank)
    else:
        if isinstance(rank, numbers.Integral) and int(rank) > max(bounds):
            raise ValueError(
                f"{owner}: `rank` can be at most {max(bounds)}, the largest of the bounds "
                f"{bounds}. Received: rank={rank}."
            )
        entries = tuple(
            min(rank, bound) if isinstance(rank, numbers.Integral) else rank
            for bound in bounds
        )
    resolved = tuple(
        int(entry)
        if isinstance(entry, numbers.Integral)
        else max(1, math.ceil(entry * bound - 1e-9))
        for entry, bound in zip(entries, bounds)
    )
    if any(entry > bound for entry, bound in zip(resolved, bounds)):
        raise ValueError(
            f"{owner}: each `rank` can be at most its bound {bounds}. "
            f"Received: rank={tuple(entries)}."
        )
    return resolved


def truncation_rank(
    singular_values: np.ndarray,
    tolerance: float,
    norm: float | np.floating,
    threshold: Threshold = "frobenius",
) -> int:
    """The smallest number of singular values that meets the threshold.

    Args:
        singular_values: array in descending order.
        tolerance: the relative error allowed to this SVD.
        norm: Frobenius norm that the error is relative to.
        threshold: `"frobenius"`: the discarded singular values have a root sum
            of squares of at most `tolerance * norm`; `"singular_value"`: those
            kept are greater than `tolerance` times the largest.

    Returns:
        An int, at least 1.

    Raises:
        ValueError: on malformed arguments.
    """
    owner = "truncation_rank"
    singular_values = finite_array("singular_values", singular_values, owner, (1,))
    tolerance = check_number("tolerance", tolerance, owner, 1)
    norm = check_number("norm", norm, owner)
    check_one_of("threshold", threshold, THRESHOLDS, owner)
    if not singular_values.size:
        raise refusal("singular_values", singular_values, owner, "one number or more")
    if threshold == "singular_value":
        return max(1, int(np.sum(singular_values > tolerance * singular_values[0])))
    # The squares of numbers as they are may overflow, or vanish.
    both, _ = scaled(np.append(singular_values, norm))
    singular_values, norm = both[:-1], both[-1]
    tail = np.cumsum(singular_values[::-1] ** 2)[::-1]
    return max(1, int(np.sum(tail > (tolerance * norm) ** 2)))


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(matrix, full_matrices=False)


def _left_svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors and singular values."""
    if matrix.shape[1] > matrix.shape[0]:
        # The same as those of the small triangle: the right ones, which are long, are
        # not wanted (measured: about twice as fast).
        triangle: Any = np.linalg.qr(matrix.T, mode="r")
        matrix = triangle.T
    return _svd(matrix)[:2]


def _singular_values(matrix: np.ndarray) -> np.ndarray:
    rows, columns = matrix.shape
    if columns > rows:
        matrix = matrix.T
    if max(rows, columns) > 2 * min(rows, columns):
        # Of the small triangle, which has the same.
        triangle: Any = np.linalg.qr(matrix, mode="r")
        matrix = triangle
    return np.linalg.svd(matrix, compute_uv=False)


def _as_tensor(tensor: ArrayLike, owner: str) -> tuple[np.ndarray, int]:
    """The tensor in a scale in which it can be computed with; see `scaled`."""
    tensor = finite_array("tensor", tensor, owner)
    if tensor.ndim < 2 or tensor.size == 0:
        raise ValueError(
            f"{owner}: expected a non-empty tensor of at least 2 axes, the "
            f"last of which indexes the tasks. Received: shape={tensor.shape}."
        )
    return scaled(tensor)


def _need_choice(
    rank: Rank | None,
    tolerance: float | None,
    threshold: Threshold,
    task_rank: TaskRank,
    owner: str,
) -> None:
    check_choice(rank, tolerance, threshold, task_rank, owner)
    if rank is None and tolerance is None:
        raise ValueError(f"{owner}: give one of `rank` and `tolerance`. Received neither.")


def laf_bounds(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The bound of the one rank of LAF, `min(prod(shape[:-1]), T)`, as a tuple."""
    shape = check_sizes("shape", shape, "laf_bounds", 2)
    return (min(math.prod(shape[:-1]), shape[-1]),)


def tucker_bounds(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The bounds of the multilinear ranks, `min(d_n, prod of the others)`."""
    shape = check_sizes("shape", shape, "tucker_bounds", 2)
    size = math.prod(shape)
    return tuple(min(d, size // d) for d in shape)


def tt_bounds(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The bounds of the TT ranks, `min(prod(shape[:n]), prod(shape[n:]))`."""
    shape = check_sizes("shape", shape, "tt_bounds", 2)
    return tuple(
        min(math.prod(shape[:n]), math.prod(shape[n:])) for n in range(1, len(shape))
    )


@dataclasses.dataclass(frozen=True)
class RankRule:
    """What ranks a decomposition can have, and what they cost.

    Attributes:
        bounds: function of a shape: the largest possible ranks, that of the tasks last.
        size: function of a shape and ranks: how many entries the factors have.
        step: function of a shape, bounds and an int from 1: the ranks but for that of the
            tasks, which grow with the int, window ranks full as far as they can matter.
        useful: function of a shape and the other ranks: the largest task rank that makes a
            difference with them.
        unfoldings: function of a tensor: the matrices whose ranks these are.
        chained: bool, whether each rank is at most the one before times the axis between.
    """

    bounds: Callable[[Ranks], Ranks]
    size: Callable[[Ranks, Ranks], int]
    step: Callable[[Ranks, Ranks, int], Ranks]
    useful: Callable[[Ranks, Ranks], int]
    unfoldings: Callable[[np.ndarray], list[np.ndarray]]
    chained: bool = False

    def ranks(
        self,
        shape: tuple[int, ...],
        rank: Rank | None,
        task_rank: TaskRank = None,
        strict: bool = True,
        owner: str = "rank",
    ) -> Ranks:
        """The ranks that `rank` and `task_rank` stand for.

        Args:
            shape: tuple of ints, the tensor's.
            rank: see the module.
            task_rank: see the module.
            strict: bool, whether an int above all bounds is an error.
            owner: str, who to name in errors.

        Returns:
            A tuple of ints.

        Raises:
            ValueError: on impossible ranks.
        """
        check_choice(rank, None, task_rank=task_rank, owner=owner)
        shape = check_sizes("shape", shape, owner, 2)
        full = self.bounds(shape)
        alone = len(full) == 1
        entries = tuple(rank) if isinstance(rank, (tuple, list)) else ()
        whole = len(entries) == len(full)
        given = is_given(task_rank)
        if given and (whole or (alone and rank is not None)):
            raise ValueError(
                f"{owner}: expected the rank of the tasks once: it is "
                f"{'the only one' if alone else 'the last entry of `rank`'} here. "
                f"Received: rank={rank!r}, task_rank={task_rank!r}."
            )
        if whole or task_rank == AS_SAVED:
            return resolve_rank(1.0 if rank is None else rank, full, owner)
        tasks = self.task_rank(shape, task_rank, owner)
        # Larger ones would be of no use with so small a task rank.
        others = self.bounds((*shape[:-1], tasks))[:-1]
        if entries and len(entries) != len(others):
            raise ValueError(
                f"{owner}: `rank` must have {len(full)} entries, one for each of the "
                f"bounds {full}, or one less, without that of the tasks. "
                f"Received: rank={entries}."
            )
        if isinstance(rank, numbers.Integral):
            cap = int(rank)
            if not strict:
                cap = min(cap, max(others or full))
            if alone:
                return resolve_rank(cap, full, owner)
            found = resolve_rank(cap, others, owner)
        elif entries:
            found = resolve_rank(entries, others, owner)
        elif rank is None or rank == 1:
            found = others
        else:
            assert isinstance(rank, (int, float))
            budget = rank * math.prod(shape)
            if alone:
                # Two at least, so that tasks can differ by more than their scale.
                most = int(budget // self.size(shape, (1,)))
                return (max(most, min(2, tasks)),)
            found = self._within(shape, budget, others, tasks)
        return (*found, min(tasks, self.useful(shape, found)))

    def task_rank(
        self, shape: tuple[int, ...], task_rank: TaskRank, owner: str = "task_rank"
    ) -> int:
        """The task rank that is asked for, as far as it is possible.

        Raises:
            ValueError: if it is an int above the number of tasks.
        """
        bound, tasks = self.bounds(shape)[-1], shape[-1]
        if isinstance(task_rank, numbers.Integral) and int(task_rank) > tasks:
            raise ValueError(
                f"{owner}: `task_rank` can be at most {tasks}, the number of tasks. "
                f"Received: task_rank={task_rank}."
            )
        if task_rank is None or isinstance(task_rank, str):
            return bound
        if isinstance(task_rank, numbers.Integral):
            return min(int(task_rank), bound)
        return resolve_rank(task_rank, (bound,), owner)[0]

    def _within(self, shape: Ranks, budget: float, others: Ranks, tasks: int) -> Ranks:
        """The largest ranks whose factors have at most `budget` entries.

        Where there are none, the smallest with which the tasks can differ so much.
        """

        def at(step: int) -> Ranks:
            return self.step(shape, others, step)

        steps = range(1, 2 * max(others) + 1)
        least = bisect.bisect_left(
            steps, tasks, key=lambda step: self.useful(shape, at(step))
        )
        most = bisect.bisect_right(
            steps, budget, key=lambda step: self.size(shape, (*at(step), tasks))
        )
        return at(steps[min(max(least, most - 1), len(steps) - 1)])

    def spectra(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The singular values of each unfolding, in descending order."""
        return [_singular_values(matrix) for matrix in self.unfoldings(tensor)]

    def within(
        self,
        shape: Ranks,
        spectra: Sequence[np.ndarray],
        tolerance: float,
        threshold: Threshold,
        task_rank: TaskRank = None,
    ) -> Ranks:
        """The ranks that a tolerance leaves, from the spectra alone.

        Of a tensor train they are those of the whole tensor's unfoldings. Its SVDs are of
        what the ones before have left, and find at most these ranks with
        `threshold="frobenius"`.
        """
        if is_given(task_rank):
            spectra = spectra[:-1]
        if threshold == "frobenius":
            tolerance = tolerance / math.sqrt(max(1, len(spectra)))
        # The smallest ranks may need a promise that is none: a tolerance above 1.
        tolerance = min(tolerance, _ALL)
        ranks: list[int] = []
        for values, bound in zip(spectra, self.bounds(shape)):
            norm = np.linalg.norm(values)
            rank = truncation_rank(values, tolerance, norm, threshold)
            ranks.append(min(rank, bound))
        if is_given(task_rank):
            ranks.append(self._room(shape, ranks, self.task_rank(shape, task_rank)))
        if self.chained:
            for n in range(1, len(ranks)):
                ranks[n] = min(ranks[n], ranks[n - 1] * shape[n])
        return tuple(ranks)

    def _room(self, shape: Ranks, others: list[int], tasks: int) -> int:
        """The task rank, for which the other ranks grow until it makes a difference."""
        bounds = self.bounds(shape)
        while self.useful(shape, tuple(others)) < tasks:
            room = [bound / rank for bound, rank in zip(bounds, others)]
            others[room.index(max(room))] += 1
        return tasks


def common_tolerance(
    rule: RankRule,
    kernels: Sequence[np.ndarray],
    weights: float,
    threshold: Threshold = "frobenius",
    task_rank: TaskRank = None,
    owner: str = "common_tolerance",
) -> tuple[float, list[Ranks]]:
    """The smallest tolerance, the same for all kernels, that meets a budget of weights.

    Args:
        rule: `RankRule`.
        kernels: list of stacked kernels.
        weights: number in (0, 1], the share of the entries of all kernels that the factors
            may have together. A kernel whose factors would have more entries counts as it
            is.
        threshold: see the module.
        task_rank: see the module; None: the tolerance's.
        owner: str, who to name in errors.

    Returns:
        `(tolerance, ranks)`, with the ranks of each kernel.

    Raises:
        ValueError: if the smallest ranks have more weights.
    """
    shapes = [kernel.shape for kernel in kernels]
    spectra = [rule.spectra(_as_tensor(kernel, owner)[0]) for kernel in kernels]
    whole = sum(map(math.prod, shapes))

    def at(tolerance: float) -> tuple[int, list[Ranks]]:
        found = [
            rule.within(shape, own, tolerance, threshold, task_rank)
            for shape, own in zip(shapes, spectra)
        ]
        sizes = (min(rule.size(s, r), math.prod(s)) for s, r in zip(shapes, found))
        return sum(sizes), found

    low, high = 0.0, math.sqrt(max(map(len, spectra)))
    size, ranks = at(high)
    if size > weights * whole:
        raise ValueError(
            f"{owner}: the smallest ranks have {size / whole:.3f} of the weights of "
            f"independent kernels. Expected: `weights` of at least that. Received: "
            f"weights={weights}."
        )
    # To seven digits.
    for _ in range(25):
        middle = (low + high) / 2
        size, found = at(middle)
        if size > weights * whole:
            low = middle
        else:
            high, ranks = middle, found
    return high, ranks


def _laf_size(shape: Ranks, ranks: Ranks) -> int:
    return (math.prod(shape[:-1]) + shape[-1]) * ranks[0]


def _tucker_size(shape: Ranks, ranks: Ranks) -> int:
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks))


def _tucker_step(shape: Ranks, bounds: Ranks, step: int) -> Ranks:
    # Alike, since of the ranks of equal cost these leave the most, whatever the sizes are.
    caps = ((step + 1) // 2, step // 2 + 1)[-len(bounds) :]
    whole = len(bounds) - len(caps)
    return (*bounds[:whole], *(min(b, cap) for b, cap in zip(bounds[whole:], caps)))


def _tt_size(shape: Ranks, ranks: Ranks) -> int:
    edges = (1, *ranks, 1)
    return sum(a * size * b for a, size, b in zip(edges, shape, edges[1:]))


def _tt_step(shape: Ranks, bounds: Ranks, step: int) -> Ranks:
    ranks = [*bounds[:-1], min(bounds[-1], step)]
    for n in range(len(ranks) - 1, 0, -1):
        ranks[n - 1] = min(ranks[n - 1], shape[n] * ranks[n])
    return tuple(ranks)


def _laf_unfoldings(tensor: np.ndarray) -> list[np.ndarray]:
    return [tensor.reshape(-1, tensor.shape[-1])]


def _tucker_unfoldings(tensor: np.ndarray) -> list[np.ndarray]:
    return [unfold(tensor, mode) for mode in range(tensor.ndim)]


def _tt_unfoldings(tensor: np.ndarray) -> list[np.ndarray]:
    rows = itertools.accumulate(tensor.shape[:-1], operator.mul)
    return [tensor.reshape(count, -1) for count in rows]


LAF_RANKS = RankRule(
    laf_bounds,
    _laf_size,
    lambda *_: (),
    lambda shape, _: math.prod(shape[:-1]),
    _laf_unfoldings,
)
TUCKER_RANKS = RankRule(
    tucker_bounds,
    _tucker_size,
    _tucker_step,
    lambda _, others: math.prod(others),
    _tucker_unfoldings,
)
TT_RANKS = RankRule(
    tt_bounds,
    _tt_size,
    _tt_step,
    lambda shape, others: [1, *others][-1] * shape[-2],
    _tt_unfoldings,
    chained=True,
)


def laf_ranks(
    shape: tuple[int, ...], rank: Rank | None, task_rank: TaskRank = None
) -> Ranks:
    """The one rank of LAF that `rank` or `task_rank` stand for, as a tuple.

    A fraction `rank` is one of the weights; at least two latent kernels are kept, so that
    the tasks' kernels aren't multiples of each other.

    Args:
        shape: tuple of ints, `(d_1, ..., d_n, T)`.
        rank: see the module.
        task_rank: see the module.

    Example:

    >>> laf_ranks((3, 3, 16, 32, 10), 0.5), laf_ranks((64, 32, 2), 0.5)
    ((4,), (2,))
    """
    return LAF_RANKS.ranks(shape, rank, task_rank, owner="laf_ranks")


def tucker_ranks(
    shape: tuple[int, ...], rank: Rank | None, task_rank: TaskRank = None
) -> Ranks:
    """The multilinear ranks that `rank` and `task_rank` stand for.

    Args:
        shape: tuple of ints, `(d_1, ..., d_N)`, `d_N = T`.
        rank: see the module.
        task_rank: see the module.

    Example:

    >>> tucker_ranks((3, 3, 16, 32, 2), 0.5), tucker_ranks((64, 32, 2), 0.5, task_rank=1)
    ((3, 3, 14, 15, 2), (17, 18, 1))
    >>> tucker_ranks((64, 32, 2), (0.5, 8)), tucker_ranks((64, 32, 2), 4)
    ((32, 8, 2), (4, 4, 2))
    """
    return TUCKER_RANKS.ranks(shape, rank, task_rank, owner="tucker_ranks")


def tt_ranks(
    shape: tuple[int, ...], rank: Rank | None, task_rank: TaskRank = None
) -> Ranks:
    """The TT ranks that `rank` and `task_rank` stand for.

    Args:
        shape: tuple of ints, `(d_1, ..., d_N)`, `d_N = T`.
        rank: see the module.
        task_rank: see the module.

    Example:

    >>> tt_ranks((3, 3, 16, 32, 2), 0.5), tt_ranks((64, 32, 2), 0.25)
    ((3, 9, 21, 2), (7, 2))
    """
    return TT_RANKS.ranks(shape, rank, task_rank, owner="tt_ranks")


def laf(
    tensor: ArrayLike,
    rank: Rank | None = None,
    tolerance: float | None = None,
    threshold: Threshold = "frobenius",
    task_rank: TaskRank = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Last axis flattening: `W = L S` by SVD (DMTRL Eq. 1, 2).

    The kernel of task `t` is a combination of `K` latent kernels,
    `W[..., t] = sum_k L[..., k] S[k, t]`. The rows of `S` are orthogonal with
    norm `sqrt(T)`, so that `L` has the scale of one task's kernel.

    Args:
        tensor: array of shape `(d_1, ..., d_n, T)`.
        rank: see the module. One rank, bounded by `min(d_1 ... d_n, T)`.
        tolerance: see the module.
        threshold: see the module.
        task_rank: the same as `rank`, but for fractions, which are of the tasks.

    Returns:
        `(L, S)`, float64 arrays of shapes `(d_1, ..., d_n, K)` and `(K, T)`.

    Raises:
        ValueError: on a malformed or impossible rank or tolerance; on a tensor whose norm
            no float holds.

    Example:

    >>> import numpy as np
    >>> kernels = np.random.default_rng(0).normal(size=(5, 4, 3))
    >>> latent, task_matrix = laf(kernels, rank=2)
    >>> latent.shape, task_matrix.shape
    ((5, 4, 2), (2, 3))
    """
    check_choice(rank, tolerance, threshold, task_rank, "laf")
    if task_rank is None or tolerance is not None:
        _need_choice(rank, tolerance, threshold, task_rank, "laf")
    tensor, exponent = _as_tensor(tensor, "laf")
    u, s, vt = _svd(tensor.reshape(-1, tensor.shape[-1]))
    if tolerance is not None and not is_given(task_rank):
        k = truncation_rank(s, tolerance, np.linalg.norm(s), threshold)
    elif tolerance is not None:
        raise ValueError(
            "LAF has no other rank than that of the tasks: give one of `tolerance` and "
            f"`task_rank`. Received: tolerance={tolerance}, task_rank={task_rank}."
        )
    else:
        (k,) = laf_ranks(tensor.shape, rank, task_rank)
    scale = math.sqrt(tensor.shape[-1])
    latent = (u[:, :k] * (s[:k] / scale)).reshape(*tensor.shape[:-1], k)
    return unscaled(latent, exponent, "laf"), vt[:k] * scale


def tucker(
    tensor: ArrayLike,
    rank: Rank | None = None,
    tolerance: float | None = None,
    threshold: Threshold = "frobenius",
    task_rank: TaskRank = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tucker decomposition by HOSVD (DMTRL Eq. 3-5).

    `W = C x_1 U1 x_2 U2 ... x_N UN`, where `U_n` holds the leading left singular
    vectors of the mode-n unfolding, and the core is `C = W x_n U_n^T`. The
    factor of the tasks, the last one, is scaled by `sqrt(T)` (and the core by
    its inverse), as in `laf`.

    Args:
        tensor: array of shape `(d_1, ..., d_N)`, `d_N = T`.
        rank: see the module. `N` ranks, bounded by `min(d_n, prod of others)`.
        tolerance: see the module; each of the `N` SVDs may discard
            `tolerance / sqrt(N)`.
        threshold: see the module.
        task_rank: see the module. With a tolerance, which is then spent on the others:
            None leaves the rank of the tasks to the tolerance, too.

    Returns:
        `(core, factors)`: a float64 array of shape `(K_1, ..., K_N)` and a list
        of `N` arrays of shapes `(d_n, K_n)`.

    Raises:
        ValueError: as `laf`.

    Example:

    >>> import numpy as np
    >>> core, factors = tucker(np.ones((5, 4, 3)), tolerance=0.1)
    >>> core.shape, [factor.shape for factor in factors]
    ((1, 1, 1), [(5, 1), (4, 1), (3, 1)])
    """
    _need_choice(rank, tolerance, threshold, task_rank, "tucker")
    tensor, exponent = _as_tensor(tensor, "tucker")
    modes = tensor.ndim
    # The ranks that are known; None: the tolerance's.
    ranks: list[int | None] = [None] * modes
    if rank is not None:
        ranks = list(tucker_ranks(tensor.shape, rank, task_rank))
    elif is_given(task_rank):
        ranks[-1] = TUCKER_RANKS.task_rank(tensor.shape, task_rank)
    norm = np.linalg.norm(tensor)
    share = 0.0 if tolerance is None else tolerance
    if threshold == "frobenius":
        share = share / math.sqrt(max(1, ranks.count(None)))
    core, factors = tensor, []
    for mode, k in enumerate(ranks):
        u, s = _left_svd(unfold(tensor, mode))
        if k is None:
            k = truncation_rank(s, share, norm, threshold)
        factors.append(u[:, :k])
        core = mode_product(core, u[:, :k].T, mode)
    scale = math.sqrt(tensor.shape[-1])
    factors[-1] = factors[-1] * scale
    return unscaled(core / scale, exponent, "tucker"), factors


def tt(
    tensor: ArrayLike,
    rank: Rank | None = None,
    tolerance: float | None = None,
    threshold: Threshold = "frobenius",
    task_rank: TaskRank = None,
) -> list[np.ndarray]:
    """Tensor train decomposition by TT-SVD (DMTRL Eq. 6-8; Oseledets 2011).

    `W[d1, ..., dN] = G1[d1, :] G2[:, d2, :] ... GN[:, dN]`. The last core, the
    task matrix, is scaled as in `laf`: its rows are orthogonal with norm
    `sqrt(T)`, and the singular values are in the core before it.

    Args:
        tensor: array of shape `(d_1, ..., d_N)`, `d_N = T`.
        rank: see the module. `N - 1` ranks, the n-th bounded by
            `min(d_1 ... d_n, d_{n+1} ... d_N)` and by `K_{n-1} d_n`.
        tolerance: see the module; each of the `N - 1` SVDs may discard
            `tolerance / sqrt(N - 1)`.
        threshold: see the module.
        task_rank: as in `tucker`.

    Returns:
        A list of `N` float64 arrays of shapes `(d_1, K_1)`,
        `(K_{n-1}, d_n, K_n)` and `(K_{N-1}, d_N)`.

    Raises:
        ValueError: as `laf`.

    Example:

    >>> import numpy as np
    >>> [core.shape for core in tt(np.ones((5, 4, 3)), tolerance=0.1)]
    [(5, 1), (1, 4, 1), (1, 3)]
    """
    _need_choice(rank, tolerance, threshold, task_rank, "tt")
    tensor, exponent = _as_tensor(tensor, "tt")
    shape, modes = tensor.shape, tensor.ndim
    # The ranks that are known; None: the tolerance's.
    ranks: list[int | None] = [None] * (modes - 1)
    if rank is not None:
        ranks = list(tt_ranks(shape, rank, task_rank))
    elif is_given(task_rank):
        ranks[-1] = TT_RANKS.task_rank(shape, task_rank)
    norm = np.linalg.norm(tensor)
    share = 0.0 if tolerance is None else tolerance
    if threshold == "frobenius":
        share = share / math.sqrt(max(1, ranks.count(None)))
    cores, rest, left = [], tensor, 1
    for mode, k in enumerate(ranks):
        u, s, vt = _svd(rest.reshape(left * shape[mode], -1))
        if k is None:
            k = truncation_rank(s, share, norm, threshold)
        elif k > len(s) and rank is None:
            k = len(s)
        elif k > len(s):
            raise ValueError(
                f"tt: TT rank {mode + 1} can be at most {len(s)}, the rank before "
                f"it ({left}) times the size of axis {mode} ({shape[mode]}). "
                f"Received: rank={tuple(ranks)}."
            )
        cores.append(u[:, :k].reshape(left, shape[mode], k))
        rest, left = s[:k, None] * vt[:k], k
    scale = math.sqrt(shape[-1])
    cores[-1] = unscaled(cores[-1] * (s[:k] / scale), exponent, "tt")
    cores.append(vt[:k] * scale)
    cores[0] = cores[0][0]
    return cores
