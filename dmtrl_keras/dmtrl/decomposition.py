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
- `rank`: an int is a cap for every axis, a float in (0, 1] a fraction of every
  bound (rounded up), a tuple has one int or float for each rank. Rank `n`
  can't be greater than the rank of the unfolding that it truncates.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.ground.linalg import mode_product, scaled, unfold
from dmtrl_keras.ground.validation import (
    check_number,
    check_one_of,
    check_sizes,
    finite_array,
    refusal,
    shown,
)

# An int is a number of latent kernels, a float a fraction of the largest possible rank; one
# for all axes, or one for each.
Rank: TypeAlias = float | Sequence[float]
Threshold: TypeAlias = Literal["frobenius", "singular_value"]

THRESHOLDS = ("frobenius", "singular_value")


def check_choice(
    rank: Rank | None,
    tolerance: float | None,
    threshold: Threshold = "frobenius",
    owner: str = "check_choice",
) -> None:
    """Raise a `ValueError` unless rank, tolerance and threshold are well formed.

    Args:
        rank: None, int, float, or a tuple or list of ints and floats.
        tolerance: None or a number in (0, 1).
        threshold: `"frobenius"` or `"singular_value"`.
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
    if rank is None:
        return
    for entry in rank if isinstance(rank, (tuple, list)) else (rank,):
        whole = isinstance(entry, numbers.Integral) and not isinstance(entry, bool)
        fraction = isinstance(entry, numbers.Real) and not isinstance(
            entry, numbers.Integral
        )
        if not ((whole and entry >= 1) or (fraction and 0 < entry <= 1)):
            raise ValueError(
                f"{owner}: `rank` must be a positive int, a fraction in (0, 1] given as a "
                "float, or a tuple of these with one entry for each rank. "
                f"Received: rank={shown(rank)}."
            )


def resolve_rank(rank: Rank, bounds: tuple[int, ...]) -> tuple[int, ...]:
    """Integer ranks from a rank argument and the bound of every rank.

    Args:
        rank: an int (a cap for all), a float in (0, 1] (a fraction of every
            bound, rounded up), or a tuple of ints and floats.
        bounds: tuple of ints, the largest possible ranks.

    Returns:
        A tuple of ints.

    Raises:
        ValueError: if a rank is above its bound, an int above all of them, or
            a tuple of the wrong length.

    Example:

    >>> resolve_rank(0.5, (3, 8)), resolve_rank(4, (3, 8)), resolve_rank((2, 8), (3, 8))
    ((2, 4), (3, 4), (2, 8))
    """
    owner = "resolve_rank"
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
    rank: Rank | None, tolerance: float | None, threshold: Threshold, owner: str
) -> None:
    check_choice(rank, tolerance, threshold, owner)
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


def laf(
    tensor: ArrayLike,
    rank: Rank | None = None,
    tolerance: float | None = None,
    threshold: Threshold = "frobenius",
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

    Returns:
        `(L, S)`, float64 arrays of shapes `(d_1, ..., d_n, K)` and `(K, T)`.

    Raises:
        ValueError: on a malformed or impossible rank or tolerance.

    Example:

    >>> import numpy as np
    >>> kernels = np.random.default_rng(0).normal(size=(5, 4, 3))
    >>> latent, task_matrix = laf(kernels, rank=2)
    >>> latent.shape, task_matrix.shape
    ((5, 4, 2), (2, 3))
    """
    _need_choice(rank, tolerance, threshold, "laf")
    tensor, exponent = _as_tensor(tensor, "laf")
    u, s, vt = _svd(tensor.reshape(-1, tensor.shape[-1]))
    if rank is None:
        k = truncation_rank(s, tolerance or 0.0, np.linalg.norm(s), threshold)
    else:
        (k,) = resolve_rank(rank, laf_bounds(tensor.shape))
    scale = math.sqrt(tensor.shape[-1])
    latent = (u[:, :k] * (s[:k] / scale)).reshape(*tensor.shape[:-1], k)
    return np.ldexp(latent, exponent), vt[:k] * scale


def tucker(
    tensor: ArrayLike,
    rank: Rank | None = None,
    tolerance: float | None = None,
    threshold: Threshold = "frobenius",
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

    Returns:
        `(core, factors)`: a float64 array of shape `(K_1, ..., K_N)` and a list
        of `N` arrays of shapes `(d_n, K_n)`.

    Raises:
        ValueError: on a malformed or impossible rank or tolerance.

    Example:

    >>> import numpy as np
    >>> core, factors = tucker(np.ones((5, 4, 3)), tolerance=0.1)
    >>> core.shape, [factor.shape for factor in factors]
    ((1, 1, 1), [(5, 1), (4, 1), (3, 1)])
    """
    _need_choice(rank, tolerance, threshold, "tucker")
    tensor, exponent = _as_tensor(tensor, "tucker")
    modes = tensor.ndim
    if rank is not None:
        ranks = resolve_rank(rank, tucker_bounds(tensor.shape))
    norm = np.linalg.norm(tensor)
    share = 0.0 if tolerance is None else tolerance
    if threshold == "frobenius":
        share = share / math.sqrt(modes)
    core, factors = tensor, []
    for mode in range(modes):
        u, s = _left_svd(unfold(tensor, mode))
        if rank is None:
            k = truncation_rank(s, share, norm, threshold)
        else:
            k = ranks[mode]
        factors.append(u[:, :k])
        core = mode_product(core, u[:, :k].T, mode)
    scale = math.sqrt(tensor.shape[-1])
    factors[-1] = factors[-1] * scale
    return np.ldexp(core / scale, exponent), factors


def tt(
    tensor: ArrayLike,
    rank: Rank | None = None,
    tolerance: float | None = None,
    threshold: Threshold = "frobenius",
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

    Returns:
        A list of `N` float64 arrays of shapes `(d_1, K_1)`,
        `(K_{n-1}, d_n, K_n)` and `(K_{N-1}, d_N)`.

    Raises:
        ValueError: on a malformed or impossible rank or tolerance.

    Example:

    >>> import numpy as np
    >>> [core.shape for core in tt(np.ones((5, 4, 3)), tolerance=0.1)]
    [(5, 1), (1, 4, 1), (1, 3)]
    """
    _need_choice(rank, tolerance, threshold, "tt")
    tensor, exponent = _as_tensor(tensor, "tt")
    shape, modes = tensor.shape, tensor.ndim
    if rank is not None:
        ranks = resolve_rank(rank, tt_bounds(shape))
    norm = np.linalg.norm(tensor)
    share = 0.0 if tolerance is None else tolerance
    if threshold == "frobenius":
        share = share / math.sqrt(modes - 1)
    cores, rest, left = [], tensor, 1
    for mode in range(modes - 1):
        u, s, vt = _svd(rest.reshape(left * shape[mode], -1))
        if rank is None:
            k = truncation_rank(s, share, norm, threshold)
        else:
            k = ranks[mode]
            if k > len(s):
                raise ValueError(
                    f"tt: TT rank {mode + 1} can be at most {len(s)}, the rank before "
                    f"it ({left}) times the size of axis {mode} ({shape[mode]}). "
                    f"Received: rank={ranks}."
                )
        cores.append(u[:, :k].reshape(left, shape[mode], k))
        rest, left = s[:k, None] * vt[:k], k
    scale = math.sqrt(shape[-1])
    cores[-1] = np.ldexp(cores[-1] * (s[:k] / scale), exponent)
    cores.append(vt[:k] * scale)
    cores[0] = cores[0][0]
    return cores
