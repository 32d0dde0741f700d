"""Norms of matrices and groups, their subgradients, and their proximal steps.

Each function takes as `xp` what computes: `numpy`, for float64 on the host, or `keras.ops`,
for a training step. What is used here they call by the same names.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dmtrl_keras.ground.types import Tensor


def rounding(tensor: Tensor) -> float:
    """The relative error of a tensor's dtype."""
    return float(np.finfo(keras.backend.standardize_dtype(tensor.dtype)).eps)


def shrunk(sizes: Tensor, step: Any, squared: bool, xp: Any) -> Tensor:
    """The proximal step of a sum of sizes, or of half the square of it.

    `argmin_z |z - s|^2 / 2 + step sum_i z_i` over `z >= 0` is `max(s - step, 0)`. With
    `step / 2 (sum_i z_i)^2` instead the threshold is `step sum_i z_i` itself, which is the
    largest of `step (s_1 + ... + s_k) / (1 + step k)` for s in decreasing order.

    Args:
        sizes: tensor `(n,)`, not negative.
        step: number or scalar tensor.
        squared: bool.
        xp: `numpy` or `keras.ops`.
    """
    if squared:
        ordered = -xp.sort(-sizes)
        counts = xp.cumsum(xp.ones_like(sizes))
        step = xp.max(step * xp.cumsum(ordered) / (1 + step * counts))
    return xp.maximum(sizes - step, xp.zeros_like(sizes))


def svd(matrix: Tensor, xp: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`(u, s, v)` with `matrix = u diag(s) v`, as small as they can be."""
    if xp is np:
        return np.linalg.svd(matrix, full_matrices=False)
    return xp.svd(matrix, full_matrices=False)


def trace_norm(matrix: Tensor, xp: Any) -> tuple[Tensor, Tensor]:
    """The sum of the singular values, and a subgradient, `U V^T`.

    Directions whose singular value is lost in rounding are left out, so that the
    subgradient is zero at zero.
    """
    u, s, v = svd(matrix, xp)
    counts = s > 8 * rounding(matrix) * xp.max(s)
    return xp.sum(s), xp.matmul(xp.where(counts, u, xp.zeros_like(u)), v)


def trace_norm_step(matrix: Tensor, step: Any, squared: bool, xp: Any) -> Tensor:
    """The proximal step of the trace norm, or of half its square.

    The singular values shrink, the singular vectors stay.
    """
    u, s, v = svd(matrix, xp)
    return xp.matmul(u * shrunk(s, step, squared, xp), v)


def group_sizes(tensor: Tensor, axes: Sequence[int], xp: Any) -> Tensor:
    """The Euclidean norms of a tensor's groups, one for each index of some axes.

    Returns:
        A tensor with ones instead of all other axes.
    """
    others = tuple(axis for axis in range(len(tensor.shape)) if axis not in axes)
    if not others:
        return xp.abs(tensor)
    # The squares of small entries vanish in float32.
    unit = xp.max(xp.abs(tensor))
    unit = xp.where(unit > 0, unit, xp.ones_like(unit))
    return unit * xp.sqrt(xp.sum((tensor / unit) ** 2, axis=others, keepdims=True))


def group_norm(tensor: Tensor, axes: Sequence[int], xp: Any) -> tuple[Tensor, Tensor]:
    """The sum of the norms of the groups, and a subgradient: each group over its norm."""
    sizes = group_sizes(tensor, axes, xp)
    safe = xp.where(sizes > 0, sizes, xp.ones_like(sizes))
    return xp.sum(sizes), tensor / safe


def group_norm_step(
    tensor: Tensor, axes: Sequence[int], step: Any, squared: bool, xp: Any
) -> Tensor:
    """The proximal step of the sum of the groups' norms, or of half its square."""
    sizes = group_sizes(tensor, axes, xp)
    shape = tuple(sizes.shape)
    new = xp.reshape(shrunk(xp.reshape(sizes, (-1,)), step, squared, xp), shape)
    return tensor * (new / xp.where(sizes > 0, sizes, xp.ones_like(sizes)))


def unfoldings(shape: Sequence[int], form: str) -> list[tuple[int, bool]]:
    """How a tensor is made matrices of, for the tensor trace norms.

    Args:
        shape: of the tensor; axes of size one do not count.
        form: `"laf"`, the last axis against all others; `"tucker"`, each axis against all
            others; `"tt"`, the first axes against the rest, at each place.

    Returns:
        A list of `(axis, alone)` of the tensor without axes of size one: the axis alone
        makes the rows, or it and all axes before it.
    """
    order = sum(size > 1 for size in shape)
    if order < 2:
        # A vector is a matrix of one column, whose trace norm is its length.
        return [(0, True)]
    if form == "laf":
        return [(order - 1, True)]
    if form == "tucker":
        return [(axis, True) for axis in range(order)]
    return [(axis, False) for axis in range(order - 1)]


def squeezed(tensor: Tensor, xp: Any) -> Tensor:
    """A tensor without its axes of size one."""
    return xp.reshape(tensor, tuple(size for size in tensor.shape if size > 1))


def unfolded(tensor: Tensor, axis: int, alone: bool, xp: Any) -> Tensor:
    """A matrix of a tensor, see `unfoldings`."""
    if alone and len(tensor.shape) > 1:
        tensor = xp.moveaxis(tensor, axis, 0)
        return xp.reshape(tensor, (tensor.shape[0], -1))
    return xp.reshape(tensor, (math.prod(tensor.shape[: axis + 1]), -1))


def folded(matrix: Tensor, shape: Sequence[int], axis: int, alone: bool, xp: Any) -> Tensor:
    """The tensor of a matrix, the inverse of `unfolded`."""
    if not alone or len(shape) < 2:
        return xp.reshape(matrix, tuple(shape))
    rest = [size for other, size in enumerate(shape) if other != axis]
    return xp.moveaxis(xp.reshape(matrix, (shape[axis], *rest)), 0, axis)


def spread_variances(
    sizes: Tensor, least: float, most: float, total: float, xp: Any
) -> Tensor:
    """The variances that a clustered prior gives to the singular values.

    `argmin_l sum_i s_i^2 / l_i` over `least <= l_i <= most` and `sum_i l_i <= total`
    (Jacob et al. 2009): `l_i = clip(x s_i, least, most)`, whose sum grows with x and is
    linear between the places where an entry meets a bound.

    Args:
        sizes: tensor `(n,)`, the singular values.
        least: float, above 0.
        most: float, at least `least`.
        total: float; where it is below `n least` all are the least.
        xp: `numpy` or `keras.ops`.
    """
    largest = xp.max(sizes)
    tiny = largest * rounding(sizes) + 1e-30
    safe = xp.maximum(sizes, tiny)
    places = xp.concatenate([least / safe, most / safe])
    sums = xp.sum(xp.clip(places[:, None] * safe[None], least, most), axis=1)
    below = sums <= total
    none = xp.zeros_like(sums)
    x = xp.max(xp.where(below, places, none))
    reached = xp.max(xp.where(below, sums, none + least * sizes.shape[0]))
    far = xp.max(places) * 2
    next_x = xp.min(xp.where(below, none + far, places))
    next_sum = xp.min(xp.where(below, none + 3.0e38, sums))
    span = xp.maximum(next_sum - reached, rounding(sizes) * total)
    x = x + (next_x - x) * xp.clip((total - reached) / span, 0.0, 1.0)
    return xp.clip(x * safe, least, most)
