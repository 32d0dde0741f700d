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
from typing import TypeAlias

import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from dmtrl_keras.ground.linalg import mode_product, whitener
from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import check_positive

# One for each mode, None for identities.
Matrices: TypeAlias = Sequence[Tensor | None]


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
    """
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
    """
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
    """
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
    """
    columns = _columns(mode_products(x, whiteners, skip=mode), mode + 1, pooled)
    scatter = ops.matmul(ops.swapaxes(columns, -1, -2), columns)
    return scatter / columns.shape[-2]


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
    x = ops.convert_to_tensor(x)
    one = len(x.shape) == len(covariances)
    x = x[None] if one else x
    shape = tuple(x.shape[1:])
    whiteners = _whiteners(_checked(shape, covariances), x.dtype)
    if mean is not None:
        x = x - _mean(mean, shape, x.dtype)
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
    samples = check_positive("samples", samples, "sample")
    if shape is None and mean is not None:
        shape = np.shape(mean)
    if shape is None:
        unknown = [k for k, matrix in enumerate(covariances) if matrix is None]
        if unknown:
            raise ValueError(
                "sample: without `shape` and `mean` every covariance must be given. "
                f"Received: None for the modes {unknown}."
            )
        shape = tuple(len(matrix) for matrix in covariances if matrix is not None)
    x = np.random.default_rng(seed).normal(size=(samples, *shape))
    for mode, matrix in enumerate(_checked(tuple(shape), covariances)):
        if matrix is not None:
            x = mode_product(x, np.linalg.cholesky(matrix), mode + 1)
    return x if mean is None else x + np.asarray(mean, "float64")


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
    samples = np.asarray(samples, "float64")
    check_positive("max_sweeps", max_sweeps, "flip_flop")
    if samples.ndim < 2 or samples.size == 0 or not np.all(np.isfinite(samples)):
        raise ValueError(
            "flip_flop: expected finite samples of shape (n, d_1, ..., d_K). "
            f"Received: shape={samples.shape}, "
            f"{np.count_nonzero(~np.isfinite(samples))} values that are not finite."
        )
    if not ridge >= 0 or not tolerance > 0:
        raise ValueError(
            "flip_flop: `ridge` must not be negative, and `tolerance` be positive. "
            f"Received: ridge={ridge}, tolerance={tolerance}."
        )
    shape = samples.shape[1:]
    modes = _modes(modes, len(shape))
    if mean is None:
        mean = samples.mean(axis=0)
    centred = samples - ops.convert_to_numpy(_mean(mean, shape, "float64"))
    x = ops.convert_to_tensor(centred)
    start = [None] * len(shape) if start is None else start
    covariances = _checked(shape, start)
    whiteners = _whiteners(covariances, x.dtype)
    converged, sweeps = False, 0
    while not converged and sweeps < max_sweeps:
        sweeps, change = sweeps + 1, 0.0
        for mode in modes:
            new = ops.convert_to_numpy(mode_covariance(x, whiteners, mode))
            new = new + ridge * np.trace(new) / shape[mode] * np.eye(shape[mode])
            check_covariance(new, f"mode {mode}")
            if mode != modes[-1]:
                new = new * shape[mode] / np.trace(new)
            old = covariances[mode]
            old = np.eye(shape[mode]) if old is None else old
            step = float(np.linalg.norm(new - old) / np.linalg.norm(old))
            change = max(change, step)
            covariances[mode] = new
            whiteners[mode] = whitener(ops.convert_to_tensor(new, x.dtype))
        converged = change < tolerance
    likelihood = np.mean(ops.convert_to_numpy(log_density(x, covariances)))
    return TensorNormal(
        mean=np.asarray(mean, "float64"),
        covariances=tuple(covariances),
        log_likelihood=float(likelihood),
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
    valid = all(isinstance(mode, int) and 0 <= mode < order for mode in modes)
    if not valid or not len(modes) or len(set(modes)) < len(modes):
        raise ValueError(
            f"flip_flop: `modes` must be distinct ints from 0 to {order - 1}. "
            f"Received: modes={list(modes)}."
        )
    return tuple(modes)


def _mean(mean: Tensor, shape: Sequence[int], dtype: DType) -> Tensor:
    mean = ops.cast(ops.convert_to_tensor(mean), dtype)
    if tuple(mean.shape) != tuple(shape):
        raise ValueError(
            f"The mean must have the shape of a sample, {tuple(shape)}. "
            f"Received: {tuple(mean.shape)}."
        )
    return mean


def _checked(shape: Sequence[int], covariances: Matrices) -> list[np.ndarray | None]:
    """The covariances as float64 arrays, None for identities."""
    if len(covariances) != len(shape):
        raise ValueError(
            f"Expected {len(shape)} covariances, one for each mode of {tuple(shape)}. "
            f"Received: {len(covariances)}."
        )
    return [
        None if matrix is None else check_covariance(matrix, f"mode {mode}", d)
        for mode, (d, matrix) in enumerate(zip(shape, covariances))
    ]


def _whiteners(covariances: Matrices, dtype: DType) -> list[Tensor]:
    return [
        None if matrix is None else whitener(ops.convert_to_tensor(matrix, dtype))
        for matrix in covariances
    ]


def check_covariance(matrix: Tensor, owner: str, size: int | None = None) -> np.ndarray:
    """A covariance as a float64 array.

    Args:
        matrix: array `(d, d)`.
        owner: str, what it is the covariance of, for the error.
        size: int, the d that is expected; None: any.

    Returns:
        A NumPy array.

    Raises:
        ValueError: if it is not finite, symmetric and positive definite, or of
            another shape.
    """
    values = np.asarray(ops.convert_to_numpy(matrix), "float64")
    size = (len(values) if values.ndim else 0) if size is None else size
    if values.shape != (size, size):
        raise ValueError(
            f"The covariance of {owner} must have shape {(size, size)}. "
            f"Received: {values.shape}."
        )
    valid = np.all(np.isfinite(values)) and np.allclose(values, values.T)
    smallest = np.linalg.eigvalsh(values)[0] if valid else math.nan
    if not smallest > np.finfo("float64").eps * np.abs(values).max():
        raise ValueError(
            f"The covariance of {owner} must be symmetric and positive definite. "
            f"Received: smallest eigenvalue {smallest}. With few samples, add a ridge."
        )
    return values
