"""Similarity of tasks: the largest canonical correlation of their features or labels.

Li et al., "Task Relation Networks" (WACV 2019), section 3.1. Two tasks with the same
examples are as similar as the best correlated linear combinations of what they compute,
`f_1` and `f_2`, or of their labels:

`tau = max_ab a^T S_12 b / (sqrt(a^T S_11 a) sqrt(b^T S_22 b))` (Eq. 1),

which is the largest singular value of `S_11^-1/2 S_12 S_22^-1/2` (Eq. 11), for the
covariances `S`. It lies between 0 and 1, is the same in both orders (Proposition 1) and
does not change with invertible linear maps of either side. For two binary labels it is the
absolute phi coefficient.

Everything here is offline, on NumPy arrays of any length, in float64.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.ground.validation import check_positive

# Directions with less than this share of the largest variance have none of their own, nor
# have columns whose deviation is less than this share of their mean.
_NEGLIGIBLE = 1e-10


@dataclasses.dataclass(frozen=True)
class CanonicalCorrelation:
    """All canonical correlations of two sets of vectors.

    Attributes:
        correlations: array `(k,)`, falling, in [0, 1]; k is the smaller rank.
        x_directions: array `(d_1, k)`; column i is the `a` of correlation i, scaled so
            that `a^T x` has variance one (with a ridge: less).
        y_directions: array `(d_2, k)`, likewise `b`.
    """

    correlations: np.ndarray
    x_directions: np.ndarray
    y_directions: np.ndarray


def canonical_correlation(
    x: ArrayLike, y: ArrayLike, ridge: float = 0.0, chunk: int = 65536
) -> CanonicalCorrelation:
    """The whole spectrum and the directions (TRN Eq. 1-10).

    Columns that are constant or linear combinations of others are no obstacle: what has no
    variance of its own is left out. With as few examples as dimensions every set is
    perfectly correlated with every other, unless there is a ridge.

    Args:
        x: array `(n, d_1)`, or `(n,)` for one dimension.
        y: array `(n, d_2)`, or `(n,)`, of the same examples.
        ridge: float, added to the variances relative to those of the columns.
        chunk: positive int, how many examples are taken at a time.

    Returns:
        A `CanonicalCorrelation`; without any if a set is constant.

    Raises:
        ValueError: on different numbers of examples, on values that are not finite.

    Example:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(1000, 2))
    >>> found = canonical_correlation(x, np.stack([x[:, 0], rng.normal(size=1000)], 1))
    >>> np.abs(found.correlations - [1, 0]).max() < 0.1
    np.True_
    """
    covariance, sizes = _joint_covariance({"x": x, "y": y}, chunk)
    d = sizes[0]
    first = _whitener(covariance[:d, :d], ridge)
    second = _whitener(covariance[d:, d:], ridge)
    u, values, v = np.linalg.svd(first.T @ covariance[:d, d:] @ second, full_matrices=False)
    return CanonicalCorrelation(np.clip(values, 0, 1), first @ u, second @ v.T)


def task_similarity(
    x: ArrayLike, y: ArrayLike, ridge: float = 0.0, chunk: int = 65536
) -> float:
    """The similarity of two tasks (TRN Eq. 11): the largest canonical correlation.

    Args:
        x: array `(n, d_1)` or `(n,)`, features, predictions or labels of one task.
        y: array `(n, d_2)` or `(n,)`, of the other task for the same examples.
        ridge: float, added to the variances relative to those of the columns.
        chunk: positive int, how many examples are taken at a time.

    Returns:
        A float in [0, 1]; 0 if a set is constant.

    Raises:
        ValueError: as `canonical_correlation`.

    Example:

    >>> import numpy as np
    >>> task_similarity(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))
    0.5773502691896258
    """
    values = canonical_correlation(x, y, ridge, chunk).correlations
    return float(values[0]) if len(values) else 0.0


def task_similarity_matrix(
    tasks: dict[str, Any] | Sequence[ArrayLike] | np.ndarray,
    ridge: float = 0.0,
    chunk: int = 65536,
) -> np.ndarray:
    """The similarities of all pairs of T tasks, from one joint covariance.

    Args:
        tasks: dict by task name, or list, of arrays `(n, d_t)` or `(n,)` of the same
            examples; or one array `(n, T)`, a column for each task.
        ridge: float, added to the variances relative to those of the columns.
        chunk: positive int, how many examples are taken at a time.

    Returns:
        A symmetric array `(T, T)` of values in [0, 1], with ones on the diagonal (0 for a
        constant task).

    Raises:
        ValueError: as `canonical_correlation`.

    Example:

    >>> import numpy as np
    >>> labels = np.array([[0, 0, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1]])
    >>> np.round(task_similarity_matrix(labels), 3).tolist()
    [[1.0, 0.577, 0.0], [0.577, 1.0, 0.577], [0.0, 0.577, 1.0]]
    """
    if isinstance(tasks, np.ndarray) and tasks.ndim == 2:
        tasks = {str(t): tasks[:, t] for t in range(tasks.shape[1])}
    elif not isinstance(tasks, dict):
        tasks = {str(t): values for t, values in enumerate(tasks)}
    covariance, sizes = _joint_covariance(tasks, chunk)
    borders = np.cumsum([0, *sizes])
    blocks = [slice(a, b) for a, b in itertools.pairwise(borders)]
    whiteners = [_whitener(covariance[block, block], ridge) for block in blocks]
    width = max(matrix.shape[1] for matrix in whiteners)
    # One matrix with as many columns for each task: zeros change no largest singular value.
    wide = np.zeros((len(covariance), len(blocks), width))
    for t, (block, matrix) in enumerate(zip(blocks, whiteners)):
        wide[block, t, : matrix.shape[1]] = matrix
    wide = wide.reshape(len(covariance), -1)
    whole = wide.T @ covariance @ wide
    whole = whole.reshape(len(blocks), width, len(blocks), width).transpose(0, 2, 1, 3)
    if width == 0:
        return np.zeros((len(blocks), len(blocks)))
    largest = np.linalg.svd(whole, compute_uv=False)[..., 0]
    return np.clip((largest + largest.T) / 2, 0, 1)


def _joint_covariance(
    sets: Mapping[str, ArrayLike], chunk: int
) -> tuple[np.ndarray, list[int]]:
    """`(covariance, sizes)` of all sets side by side, read chunk by chunk."""
    check_positive("chunk", chunk, "task similarity")
    arrays = {}
    for name, values in sets.items():
        values = np.asanyarray(values)
        arrays[name] = values[:, None] if values.ndim == 1 else values
    lengths = {name: values.shape for name, values in arrays.items()}
    if any(values.ndim != 2 for values in arrays.values()) or (
        len({shape[0] for shape in lengths.values()}) != 1
    ):
        raise ValueError(
            "Task similarity: expected arrays (n, d) of the same n examples, one for each "
            f"task. Received: {lengths}."
        )
    (length,) = {shape[0] for shape in lengths.values()}
    if length == 0:
        raise ValueError(f"Task similarity: there are no examples. Received: {lengths}.")
    shift: Any = 0.0
    total: Any = 0.0
    products: Any = 0.0
    for start in range(0, length, chunk):
        parts = []
        for name, values in arrays.items():
            part = np.asarray(values[start : start + chunk], "float64")
            if not np.all(np.isfinite(part)):
                raise ValueError(
                    f"Task similarity: {name!r} has {np.count_nonzero(~np.isfinite(part))} "
                    f"values that are not finite in the examples {start} to "
                    f"{start + len(part) - 1}."
                )
            parts.append(part)
        part = np.concatenate(parts, axis=1)
        if start == 0:
            # Near the mean, so that nothing is lost in the difference of large numbers.
            shift = part.mean(axis=0)
        part = part - shift
        total = total + part.sum(axis=0)
        products = products + part.T @ part
    mean = total / length
    covariance = products / length - np.outer(mean, mean)
    # Rounding leaves a little variance to a constant column.
    constant = np.diag(covariance) <= (_NEGLIGIBLE * shift) ** 2
    covariance[constant] = covariance[:, constant] = 0
    return covariance, [shape[1] for shape in lengths.values()]


def _whitener(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """A matrix `(d, r)` with `W^T (S + ridge) W = I`, r the rank of S."""
    if not ridge >= 0:
        raise ValueError(
            f"Task similarity: `ridge` must not be negative. Received: ridge={ridge}."
        )
    deviation = np.sqrt(np.diag(covariance))
    varies = deviation > 0
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=varies)
    correlation = covariance * scale[:, None] * scale
    correlation = correlation + ridge * np.diag(varies.astype("float64"))
    values, vectors = np.linalg.eigh(correlation)
    kept = values > _NEGLIGIBLE * max(values.max(initial=0), 1e-300)
    return scale[:, None] * vectors[:, kept] / np.sqrt(values[kept])
