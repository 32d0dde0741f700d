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

from dmtrl_keras.ground.linalg import unscaled
from dmtrl_keras.ground.validation import (
    check_number,
    check_positive,
    is_list,
    real_array,
    refusal,
)

_OWNER = "canonical_correlation"
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
        ValueError: on different numbers of examples; on values that are not finite, masked
            or complex; on columns so small that no float holds their directions.

    Example:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(1000, 2))
    >>> found = canonical_correlation(x, np.stack([x[:, 0], rng.normal(size=1000)], 1))
    >>> np.abs(found.correlations - [1, 0]).max() < 0.1
    np.True_
    """
    values, directions, exponents = _unit_correlation(x, y, ridge, chunk)
    first, second = (
        unscaled(unit, -own[:, None], _OWNER) for unit, own in zip(directions, exponents)
    )
    return CanonicalCorrelation(values, first, second)


def _unit_correlation(
    x: ArrayLike, y: ArrayLike, ridge: float, chunk: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The correlations, and the directions of columns divided by `2**exponents`."""
    ridge = check_number("ridge", ridge, _OWNER)
    covariance, sizes, exponents = _joint_covariance({"x": x, "y": y}, chunk)
    d = sizes[0]
    first = _whitener(covariance[:d, :d], ridge)
    second = _whitener(covariance[d:, d:], ridge)
    u, values, v = np.linalg.svd(first.T @ covariance[:d, d:] @ second, full_matrices=False)
    directions = (first @ u, second @ v.T)
    return np.clip(values, 0, 1), directions, (exponents[:d], exponents[d:])


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
        ValueError: as `canonical_correlation`, but on columns of any scale.

    Example:

    >>> import numpy as np
    >>> task_similarity(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))
    0.5773502691896258
    """
    values, *_ = _unit_correlation(x, y, ridge, chunk)
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
    ridge = check_number("ridge", ridge, _OWNER)
    if isinstance(tasks, np.ndarray) and tasks.ndim == 2:
        # A masked array has its mask in `T`.
        tasks = list(tasks.T)
    if not isinstance(tasks, dict):
        if not is_list(tasks) and not (isinstance(tasks, np.ndarray) and tasks.ndim == 3):
            what = "a dict or a list of arrays, or one array (n, T)"
            raise refusal("tasks", tasks, "task_similarity_matrix", what)
        tasks = {str(t): values for t, values in enumerate(tasks)}
    if not tasks:
        raise refusal("tasks", tasks, "task_similarity_matrix", "one task or more")
    covariance, sizes, _ = _joint_covariance(tasks, chunk)
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
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """The covariance of all sets side by side, read chunk by chunk.

    Returns:
        `(covariance, sizes, exponents)`: the covariance of columns that are divided by
        `2**exponents`, so that their squares neither overflow nor vanish.
    """
    check_positive("chunk", chunk, _OWNER)
    arrays = {}
    for name, values in sets.items():
        values = real_array(str(name), values, _OWNER)
        arrays[name] = values[:, None] if values.ndim == 1 else values
    lengths = {name: values.shape for name, values in arrays.items()}
    if any(v.ndim != 2 or not v.shape[1] for v in arrays.values()) or (
        len({shape[0] for shape in lengths.values()}) != 1
    ):
        raise ValueError(
            f"{_OWNER}: expected arrays (n, d) of the same n examples, one for each "
            f"task. Received: {lengths}."
        )
    (length,) = {shape[0] for shape in lengths.values()}
    if length == 0:
        raise ValueError(f"{_OWNER}: there are no examples. Received: {lengths}.")
    exponents = _exponents(arrays, length, chunk)
    shift: Any = 0.0
    total: Any = 0.0
    products: Any = 0.0
    for start in range(0, length, chunk):
        parts = [
            np.asarray(values[start : start + chunk], "float64")
            for values in arrays.values()
        ]
        part = np.ldexp(np.concatenate(parts, axis=1), -exponents)
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
    return covariance, [shape[1] for shape in lengths.values()], exponents


def _exponents(arrays: Mapping[str, np.ndarray], length: int, chunk: int) -> np.ndarray:
    """For each column the power of two that is next above its largest absolute value."""
    largest = []
    for name, values in arrays.items():
        found = np.zeros(values.shape[1])
        for start in range(0, length, chunk):
            part = np.abs(np.asarray(values[start : start + chunk], "float64"))
            if not np.all(np.isfinite(part)):
                raise ValueError(
                    f"{_OWNER}: expected finite values. Received: {name!r} has "
                    f"{np.count_nonzero(~np.isfinite(part))} values that are not finite, "
                    f"in the examples {start} to {start + len(part) - 1}."
                )
            found = np.maximum(found, part.max(axis=0))
        largest.append(found)
    return np.frexp(np.concatenate(largest))[1]


def _whitener(covariance: np.ndarray, ridge: float) -> np.ndarray:
    """A matrix `(d, r)` with `W^T (S + ridge) W = I`, r the rank of S."""
    deviation = np.sqrt(np.diag(covariance))
    varies = deviation > 0
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=varies)
    correlation = covariance * scale[:, None] * scale
    correlation = correlation + ridge * np.diag(varies.astype("float64"))
    values, vectors = np.linalg.eigh(correlation)
    kept = values > _NEGLIGIBLE * max(values.max(initial=0), 1e-300)
    return scale[:, None] * vectors[:, kept] / np.sqrt(values[kept])
