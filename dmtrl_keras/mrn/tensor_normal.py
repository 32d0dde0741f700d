"""The tensor normal distribution: density, sampling, maximum likelihood.

A tensor `X` of shape `(d_1, ..., d_K)` is tensor normal if
`vec(X) ~ N(vec(M), S_1 (x) ... (x) S_K)` (DRN Eq. 1, 3), with one covariance `S_k`,
`(d_k, d_k)`, for each mode. The Kronecker product of the covariances is never formed: with
their Cholesky factors `S_k = L_k L_k^T`, the mode products `X x_k L_k^-1` turn `X` into
independent standard normal numbers. `L_k^-1` is called the whitener of mode k.

Wherever covariances are given, None stands for an identity. Arrays and tensors of the
backend are taken alike; what is computed has the dtype of the samples.

Source: Long, Wang & Yu, "Learning Multiple Tasks with Deep Relationship Networks" (2015),
section 3; Ohlson, Ahmad & von Rosen, "The multilinear normal distribution" (2013).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from dmtrl_keras.ground.linalg import mode_product, scaled, whitener
from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import (
    check_bool,
    check_number,
    check_positive,
    check_seed,
    check_sizes,
    finite_array,
    is_int,
    is_list,
    real_array,
    real_tensor,
    refusal,
)

# One for each mode, None for identities.
Matrices: TypeAlias = Sequence[Tensor | None]

# The squares of larger numbers, or of the inverses, are no floats.
_LARGEST_EXPONENT = 500


def mode_products(x: Tensor, matrices: Matrices, skip: int | None = None) -> Tensor:
    """The product of each mode with a matrix, `X x_1 A_1 ... x_K A_K`.

    With whiteners for matrices the modes become independent; with precisions this is
    `(S_1 (x) ... (x) S_K)^-1 vec(X)`, folded.

    Args:
        x: tensor `(n, d_1, ..., d_K)`, n samples.
        matrices: list of K matrices `(d_k, d_k)`, or `(n, d_k, d_k)` where each sample has
            its own, or None for identities.
        skip: int, a mode to leave out; None: none.

    Returns:
        A tensor of the same shape.

    Raises:
        ValueError: on shapes that don't fit.
    """
    x, matrices = _operands(x, "matrices", matrices, "mode_products")
    if skip is not None and not is_int(skip, 0, len(matrices) - 1):
        what = f"None or a mode from 0 to {len(matrices) - 1}"
        raise refusal("skip", skip, "mode_products", what)
    for mode, matrix in enumerate(matrices):
        if matrix is None or mode == skip:
            continue
        x = _mode_product(x, matrix, mode + 1)
    return x


def quadratic_form(x: Tensor, whiteners: Matrices) -> Tensor:
    """`vec(X)^T (S_1 (x) ... (x) S_K)^-1 vec(X)`, the exponent of DRN Eq. 2.

    Args:
        x: tensor `(n, d_1, ..., d_K)`.
        whiteners: as for `mode_products`.

    Returns:
        A tensor `(n,)`.

    Raises:
        ValueError: on shapes that don't fit.
    """
    x, whiteners = _operands(x, "whiteners", whiteners, "quadratic_form")
    z = mode_products(x, whiteners)
    return ops.sum(ops.reshape(z * z, (-1, math.prod(z.shape[1:]))), axis=-1)


def log_determinant(shape: Sequence[int], whiteners: Matrices) -> Tensor:
    """`ln|S_1 (x) ... (x) S_K| = sum_k (d / d_k) ln|S_k|`.

    Args:
        shape: tuple `(d_1, ..., d_K)`; d is its product.
        whiteners: as for `mode_products`.

    Returns:
        A scalar, or `(n,)` where every sample has its own covariances; the float 0 if all
        are identities.

    Raises:
        ValueError: on shapes that don't fit.
    """
    owner = "log_determinant"
    shape = check_sizes("shape", shape, owner)
    whiteners = _matrices("whiteners", whiteners, shape, owner)
    size, total = math.prod(shape), 0.0
    for d, matrix in zip(shape, whiteners):
        if matrix is not None:
            diagonal = ops.diagonal(matrix, axis1=-2, axis2=-1)
            total = total - (size // d) * 2 * ops.sum(ops.log(diagonal), axis=-1)
    return total


def mode_covariance(
    x: Tensor, whiteners: Matrices, mode: int, pooled: bool = True
) -> Tensor:
    """The covariance of one mode given those of the others (DRN Eq. 5).

    `S_k = 1 / (n prod_{j != k} d_j) sum_i Z_i(k) Z_i(k)^T`, where `Z_i` is sample i,
    whitened in all modes but k, and `Z_i(k)` its mode-k unfolding.

    Args:
        x: tensor `(n, d_1, ..., d_K)`, samples of mean zero.
        whiteners: as for `mode_products`; that of the mode itself is not used.
        mode: int in [0, K).
        pooled: bool; one covariance from all samples, or one for each of them.

    Returns:
        A tensor `(d_k, d_k)`; `(n, d_k, d_k)` if not pooled.

    Raises:
        ValueError: on shapes that don't fit.
    """
    owner = "mode_covariance"
    x, whiteners = _operands(x, "whiteners", whiteners, owner)
    if not is_int(mode, 0, len(whiteners) - 1):
        raise refusal("mode", mode, owner, f"a mode from 0 to {len(whiteners) - 1}")
    pooled = check_bool("pooled", pooled, owner)
    columns = _columns(mode_products(x, whiteners, skip=mode), mode + 1, pooled)
    scatter = ops.matmul(ops.swapaxes(columns, -1, -2), columns)
    return scatter / columns.shape[-2]


def common_mean(x: Tensor, whitener: Tensor | None, mode: int) -> Tensor:
    """The most likely mean that all slices along one mode share, given its covariance.

    `X = M x_k 1 + V` with `V` of mean zero: by generalized least squares over the mode,

    `M = (X x_k (S_k^-1 1)^T) / (1^T S_k^-1 1)`,

    which maximizes DRN Eq. 2 over M. The covariances of the other modes cancel out. With
    `S_k` an identity it is the mean over the mode.

    Args:
        x: tensor `(n, d_1, ..., d_K)`; every sample has its own mean.
        whitener: `(d_k, d_k)`, `(n, d_k, d_k)`, or None for an identity.
        mode: int in [0, K), the mode k.

    Returns:
        A tensor like `x`, with size 1 along the mode.

    Raises:
        ValueError: on shapes that don't fit.

    Example:

    >>> import numpy as np
    >>> kernels = np.array([[[1.0, 3.0], [2.0, 6.0]]])  # two entries of two tasks
    >>> np.asarray(common_mean(kernels, None, 1)).tolist()
    [[[2.0], [4.0]]]
    """
    owner = "common_mean"
    x = real_tensor("x", x, owner)
    order = len(x.shape) - 1
    if order < 1 or 0 in x.shape:
        raise refusal("x", x, owner, "samples (n, d_1, ..., d_K), none of them empty")
    if not is_int(mode, 0, order - 1):
        raise refusal("mode", mode, owner, f"a mode from 0 to {order - 1}")
    if whitener is None:
        return ops.mean(x, axis=mode + 1, keepdims=True)
    matrices: list[Any] = [None] * order
    matrices[mode] = whitener
    whitener = _matrices("whitener", matrices, x.shape[1:], owner)[mode]
    # S^-1 1, from the right to the left.
    ones = ops.sum(whitener, axis=-1)
    weights = ops.sum(whitener * ones[..., :, None], axis=-2)
    weights = weights / ops.sum(weights, axis=-1, keepdims=True)
    shape = [1] * len(x.shape)
    shape[0], shape[mode + 1] = math.prod(weights.shape[:-1]), weights.shape[-1]
    return ops.sum(x * ops.reshape(weights, shape), axis=mode + 1, keepdims=True)


def log_density(x: Tensor, covariances: Matrices, mean: Tensor | None = None) -> Tensor:
    """The log of the tensor normal density (DRN Eq. 2).

    `ln p(X) = -1/2 (d ln(2 pi) + sum_k (d / d_k) ln|S_k| + q)` with the quadratic form
    `q = vec(X - M)^T (S_1 (x) ... (x) S_K)^-1 vec(X - M)` and `d = d_1 ... d_K`.

    Args:
        x: `(d_1, ..., d_K)`, or n samples `(n, d_1, ..., d_K)`.
        covariances: list of K symmetric positive definite `(d_k, d_k)`, or None each.
        mean: `(d_1, ..., d_K)`; None: zero.

    Returns:
        A scalar, or a tensor `(n,)`, in natural units (nats).

    Raises:
        ValueError: on shapes that don't fit, on a matrix that is no covariance.

    Example:

    >>> import numpy as np
    >>> round(float(log_density(np.zeros((2, 3)), [np.eye(2), None])), 4)
    -5.5136
    """
    owner = "log_density"
    x = real_tensor("x", x, owner)
    covariances = _sequence("covariances", covariances, owner)
    one = len(x.shape) == len(covariances)
    x = x[None] if one else x
    shape = tuple(x.shape[1:])
    if not shape or 0 in shape:
        raise refusal("x", x, owner, "samples (n, d_1, ..., d_K), none of them empty")
    whiteners = _whiteners(_checked(shape, covariances, owner), x.dtype)
    if mean is not None:
        x = x - ops.convert_to_tensor(_mean(mean, shape, owner), x.dtype)
    size = math.prod(shape)
    constant = size * math.log(2 * math.pi) + log_determinant(shape, whiteners)
    density = -0.5 * (constant + quadratic_form(x, whiteners))
    return density[0] if one else density


def sample(
    covariances: Matrices,
    mean: Tensor | None = None,
    shape: Sequence[int] | None = None,
    samples: int = 1,
    seed: int | None = None,
) -> np.ndarray:
    """Draw from a tensor normal distribution: `M + Z x_1 L_1 ... x_K L_K`.

    Args:
        covariances: list of K covariances, or None each.
        mean: `(d_1, ..., d_K)`; None: zero.
        shape: tuple `(d_1, ..., d_K)`; None: as the mean and the covariances say.
        samples: positive int n.
        seed: int or None.

    Returns:
        A float64 NumPy array `(n, d_1, ..., d_K)`.

    Raises:
        ValueError: on shapes that don't fit or are not known, on a matrix that is no
            covariance.

    Example:

    >>> import numpy as np
    >>> sample([np.eye(2), 4 * np.eye(3)], samples=5, seed=0).shape
    (5, 2, 3)
    """
    owner = "sample"
    samples = check_positive("samples", samples, owner)
    seed = check_seed("seed", seed, owner)
    covariances = _sequence("covariances", covariances, owner)
    if mean is not None:
        mean = finite_array("mean", mean, owner)
        shape = mean.shape if shape is None else shape
    if shape is None:
        unknown = [k for k, matrix in enumerate(covariances) if matrix is None]
        if unknown:
            raise ValueError(
                "sample: without `shape` and `mean` every covariance must be given. "
                f"Received: None for the modes {unknown}."
            )
        shape = tuple(
            len(check_covariance(matrix, f"{owner}, mode {k}"))
            for k, matrix in enumerate(covariances)
            if matrix is not None
        )
    shape = check_sizes("shape", shape, owner)
    if mean is not None:
        mean = _mean(mean, shape, owner)
    checked = _checked(shape, covariances, owner)
    x = np.random.default_rng(seed).normal(size=(samples, *shape))
    for mode, matrix in enumerate(checked):
        if matrix is not None:
            x = mode_product(x, np.linalg.cholesky(matrix), mode + 1)
    return x if mean is None else x + mean


@dataclasses.dataclass(frozen=True)
class TensorNormal:
    """A tensor normal distribution that was fitted to samples.

    Attributes:
        mean: array `(d_1, ..., d_K)`.
        covariances: tuple of K arrays `(d_k, d_k)`, None for the modes that were not
            learned.
        log_likelihood: float, the mean log density of the samples.
        sweeps: int, how often all modes were updated.
        converged: bool, whether the last sweep changed less than the tolerance.
    """

    mean: np.ndarray
    covariances: tuple[np.ndarray | None, ...]
    log_likelihood: float
    sweeps: int
    converged: bool


def flip_flop(
    samples: ArrayLike,
    mean: Tensor | None = None,
    modes: Sequence[int] | None = None,
    ridge: float = 0.0,
    tolerance: float = 1e-6,
    max_sweeps: int = 500,
    start: Matrices | None = None,
) -> TensorNormal:
    """Maximum likelihood by the flip-flop algorithm (DRN Eq. 4, 5), for any order.

    Each covariance in turn is set to what is most likely given the others, until a sweep
    over all modes changes little. Only the Kronecker product of the covariances is
    identifiable: all learned ones but the last have trace `d_k`, so that the last has
    the scale.

    Args:
        samples: array `(n, d_1, ..., d_K)`.
        mean: `(d_1, ..., d_K)`, the known mean. None: the mean of the samples (Eq. 4).
        modes: the modes to learn, ints in [0, K); the others stay identities. None: all.
        ridge: float, added to the diagonal of each covariance, relative to its mean
            variance. It is needed where `n prod_{j != k} d_j < d_k`.
        tolerance: float, the relative change in Frobenius norm of every covariance below
            which the algorithm ends.
        max_sweeps: positive int.
        start: list of K start covariances, or None each for identities.

    Returns:
        A `TensorNormal`.

    Raises:
        ValueError: on malformed arguments or values that are not finite; where a
            covariance becomes singular, because there are too few samples.

    Example:

    >>> import numpy as np
    >>> truth = [np.array([[1.0, 0.8], [0.8, 1.0]]), np.eye(3)]
    >>> fitted = flip_flop(sample(truth, samples=2000, seed=0))
    >>> np.round(fitted.covariances[0], 1).tolist(), fitted.converged
    ([[1.0, 0.8], [0.8, 1.0]], True)
    """
    owner = "flip_flop"
    samples = finite_array("samples", samples, owner)
    check_positive("max_sweeps", max_sweeps, owner)
    if samples.ndim < 2 or samples.size == 0:
        raise ValueError(
            f"{owner}: expected samples of shape (n, d_1, ..., d_K). "
            f"Received: shape={samples.shape}."
        )
    ridge = check_number("ridge", ridge, owner)
    tolerance = check_number("tolerance", tolerance, owner)
    if not tolerance:
        raise refusal("tolerance", tolerance, owner, "positive")
    shape = samples.shape[1:]
    modes = _modes(modes, len(shape))
    if mean is None:
        # The sum of large numbers may be larger than any.
        unit, exponent = scaled(samples)
        mean = np.ldexp(unit.mean(axis=0), exponent)
    mean = _mean(mean, shape, owner)
    # All that is learned but the last covariance is the same in any scale.
    centred, exponent = scaled(samples - mean)
    if abs(exponent) > _LARGEST_EXPONENT:
        raise ValueError(
            f"{owner}: expected samples whose squares are floats. Received: deviations "
            f"from the mean of up to 2^{exponent}."
        )
    x = ops.convert_to_tensor(centred)
    start = [None] * len(shape) if start is None else start
    covariances = _checked(shape, start, owner)
    for mode in modes:
        matrix = covariances[mode]
        if matrix is not None:
            covariances[mode] = matrix * (shape[mode] / np.trace(matrix))
    whiteners = _whiteners(covariances, x.dtype)
    converged, sweeps = False, 0
    while not converged and sweeps < max_sweeps:
        sweeps, change = sweeps + 1, 0.0
        for mode in modes:
            new = ops.convert_to_numpy(mode_covariance(x, whiteners, mode))
            new = new + ridge * np.trace(new) / shape[mode] * np.eye(shape[mode])
            check_covariance(new, f"{owner}, mode {mode}")
            if mode != modes[-1]:
                new = new * shape[mode] / np.trace(new)
            old = covariances[mode]
            old = np.eye(shape[mode]) if old is None else old
            step = float(np.linalg.norm(new - old) / np.linalg.norm(old))
            change = max(change, step)
            covariances[mode] = new
            whiteners[mode] = whitener(ops.convert_to_tensor(new, x.dtype))
        converged = change < tolerance
    likelihood = float(np.mean(ops.convert_to_numpy(log_density(x, covariances))))
    last = covariances[modes[-1]]
    assert last is not None
    covariances[modes[-1]] = np.ldexp(last, 2 * exponent)
    return TensorNormal(
        mean=mean,
        covariances=tuple(covariances),
        # Of the samples as they were: the density has the inverse of their volume.
        log_likelihood=likelihood - math.prod(shape) * exponent * math.log(2),
        sweeps=sweeps,
        converged=bool(converged),
    )


def _columns(x: Tensor, axis: int, pooled: bool) -> Tensor:
    """An axis as columns and the others as rows, `(rows, d)`.

    Pooled, the samples are among the rows; else there is one matrix for each.
    """
    # Nothing is copied for the last axis, which is that of the tasks.
    moved = ops.moveaxis(x, axis, -1) if axis < len(x.shape) - 1 else x
    return ops.reshape(moved, (*moved.shape[: 0 if pooled else 1], -1, moved.shape[-1]))


def _mode_product(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """The product of an axis with a matrix, or with one for each sample."""
    pooled = len(matrix.shape) == 2
    if pooled and axis == 1 == x.shape[0]:
        # One sample, first axis: the unfolding is the tensor as it lies in memory.
        rows = ops.reshape(x, (x.shape[axis], -1))
        return ops.reshape(ops.matmul(matrix, rows), x.shape)
    columns = _columns(x, axis, pooled)
    columns = ops.matmul(columns, ops.swapaxes(matrix, -1, -2))
    if axis == len(x.shape) - 1:
        return ops.reshape(columns, x.shape)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :], x.shape[axis])
    return ops.moveaxis(ops.reshape(columns, shape), -1, axis)


def _modes(modes: Sequence[int] | None, order: int) -> tuple[int, ...]:
    modes = range(order) if modes is None else modes
    valid = is_list(modes) and all(is_int(mode, 0, order - 1) for mode in modes)
    if not valid or not len(modes) or len(set(modes)) < len(modes):
        what = f"distinct ints from 0 to {order - 1}"
        raise refusal("modes", modes, "flip_flop", what)
    return tuple(map(int, modes))


def _mean(mean: Tensor, shape: Sequence[int], owner: str) -> np.ndarray:
    mean = finite_array("mean", mean, owner)
    if mean.shape != tuple(shape):
        raise ValueError(
            f"{owner}: `mean` must have the shape of a sample, {tuple(shape)}. "
            f"Received: {mean.shape}."
        )
    return mean


def _sequence(name: str, matrices: Any, owner: str) -> list[Any]:
    """Matrices as a list: they may be one array, stacked."""
    if not is_list(matrices) and len(getattr(matrices, "shape", ())) < 3:
        raise refusal(name, matrices, owner, "a list of matrices, or None each")
    return list(matrices)


def _matrices(name: str, matrices: Any, shape: Sequence[int], owner: str) -> list[Any]:
    """Matrices `(..., d_k, d_k)`, or None, for each mode of a shape."""
    matrices = [
        None if matrix is None else real_tensor(name, matrix, owner)
        for matrix in _sequence(name, matrices, owner)
    ]
    shapes = [None if matrix is None else tuple(matrix.shape) for matrix in matrices]
    fits = all(
        own is None or (len(own) in (2, 3) and own[-2:] == (d, d))
        for own, d in zip(shapes, shape)
    )
    if len(shapes) != len(shape) or not fits:
        raise ValueError(
            f"{owner}: expected `{name}` of shapes (d, d) or (n, d, d), or None, one for "
            f"each of the sizes {tuple(shape)}. Received: {shapes}."
        )
    return matrices


def _operands(
    x: Tensor, name: str, matrices: Matrices, owner: str
) -> tuple[Tensor, list[Any]]:
    """Samples `(n, d_1, ..., d_K)` and a matrix, or None, for each mode."""
    x = real_tensor("x", x, owner)
    shape = tuple(x.shape)
    if len(shape) < 2 or 0 in shape:
        raise refusal("x", x, owner, "samples (n, d_1, ..., d_K), none of them empty")
    return x, _matrices(name, matrices, shape[1:], owner)


def _checked(
    shape: Sequence[int], covariances: Matrices, owner: str
) -> list[np.ndarray | None]:
    """The covariances as float64 arrays, None for identities."""
    covariances = _sequence(
        "start" if owner == "flip_flop" else "covariances", covariances, owner
    )
    if len(covariances) != len(shape):
        raise ValueError(
            f"{owner}: expected {len(shape)} covariances, one for each mode of "
            f"{tuple(shape)}. Received: {len(covariances)}."
        )
    return [
        None if matrix is None else check_covariance(matrix, f"{owner}, mode {mode}", d)
        for mode, (d, matrix) in enumerate(zip(shape, covariances))
    ]


def _whiteners(covariances: Matrices, dtype: DType) -> list[Tensor]:
    # In float64 first: the whitener of what float32 can't hold may be within it.
    return [
        None
        if matrix is None
        else ops.convert_to_tensor(np.linalg.inv(np.linalg.cholesky(matrix)), dtype)
        for matrix in covariances
    ]


def check_covariance(matrix: Tensor, owner: str, size: int | None = None) -> np.ndarray:
    """A covariance as a float64 array.

    Args:
        matrix: array `(d, d)`.
        owner: str, whose covariance it is, to name in the error.
        size: int, the d that is expected; None: any.

    Returns:
        A NumPy array.

    Raises:
        ValueError: if it is not finite, symmetric and positive definite, or of
            another shape.
    """
    if size is not None:
        size = check_positive("size", size, owner, " or None")
    values = np.asarray(real_array("covariance", matrix, owner), "float64")
    size = (len(values) if values.ndim else 0) if size is None else size
    if values.shape != (size, size) or not values.size:
        raise ValueError(
            f"{owner}: a covariance must have shape {(size, size) if size else '(d, d)'}. "
            f"Received: {values.shape}."
        )
    valid, smallest = bool(np.all(np.isfinite(values))), math.nan
    if valid:
        # What is nearly zero is so beside the largest entry.
        unit, exponent = scaled(values)
        if np.allclose(unit, unit.T):
            smallest = float(np.linalg.eigvalsh(unit)[0])
        valid = smallest > float(np.finfo("float64").eps)
        smallest = float(np.ldexp(smallest, exponent))
    if not valid:
        raise ValueError(
            f"{owner}: a covariance must be symmetric and positive definite. "
            f"Received: smallest eigenvalue {smallest}. With few samples, add a ridge."
        )
    return values
