"""Linear regressions that combine few latent ones: GO-MTL, and LAF without a network."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dmtrl_keras.ground.regressions import Moments, Regressions
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_number, check_positive

OWNER = "combined_regression"


@dataclasses.dataclass(frozen=True)
class CombinedRegressions(Regressions):
    """Linear regressions of T tasks as combinations of K latent ones.

    Attributes:
        tasks: tuple of T names.
        kernel: array `(d, T)`, the slopes, `latent @ task_matrix`.
        bias: array `(T,)`, the intercepts.
        latent: array `(d, K)`, L.
        task_matrix: array `(K, T)`, S.
        objective: float, loss and penalties.
        sweeps: int, how often both were solved.
        converged: bool, whether the objective fell by less than the tolerance.
    """

    latent: np.ndarray
    task_matrix: np.ndarray
    objective: float
    sweeps: int
    converged: bool


def combined_regression(
    x: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    latents: int,
    sparsity: float = 0.1,
    ridge: float = 0.1,
    task_ridge: float = 0.0,
    max_sweeps: int = 200,
    tolerance: float = 1e-5,
) -> CombinedRegressions:
    """Linear regressions of T tasks that are combinations of K latent ones (GO-MTL).

    Grouping and overlap (Kumar & Daume, ICML 2012): `W = L S`, with the objective

    `T / n sum_t |y_t - X_t L s_t - b_t|^2 + sparsity sum |S| + ridge / 2 |L|^2
    + task_ridge / 2 |S|^2`.

    A sparse column of S says of which latent regressions a task consists: tasks that have
    one in common overlap. With `sparsity=0` and a `task_ridge` it is LAF (DMTRL Eq. 2)
    with weight decay. By turns L is solved given S (a linear system) and S given L (a lasso
    for each task, by coordinates). It starts from the leading singular vectors of each
    task's own ridge regression, as in the paper. The problem is not convex: what it ends
    in is a stationary point.

    Args:
        x: dict from task to features `(n_t, d)`.
        y: dict from task to targets `(n_t,)` or `(n_t, 1)`.
        latents: positive int, K; at most d and T of them are used.
        sparsity: float, not negative.
        ridge: float, not negative.
        task_ridge: float, not negative.
        max_sweeps: positive int.
        tolerance: float, the relative decrease of the objective in a sweep below which it
            ends.

    Returns:
        A `CombinedRegressions`.

    Raises:
        ValueError: on malformed arguments, on tasks without examples or of other features.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras import combined_regression
    >>> rng = np.random.default_rng(0)
    >>> x = {task: rng.normal(size=(20, 3)) for task in ["north", "south", "west"]}
    >>> slopes = {"north": [1.0, 2, 3], "south": [1.0, 2, 3], "west": [3.0, 0, -1]}
    >>> y = {task: features @ slopes[task] for task, features in x.items()}
    >>> found = combined_regression(x, y, latents=2, sparsity=1e-3, ridge=1e-3)
    >>> found.latent.shape, np.abs(found.kernel[:, 2]).round(1).tolist()
    ((3, 2), [3.0, 0.0, 1.0])
    """
    check_positive("latents", latents, OWNER)
    sparsity = check_number("sparsity", sparsity, OWNER)
    ridge = check_number("ridge", ridge, OWNER)
    task_ridge = check_number("task_ridge", task_ridge, OWNER)
    check_positive("max_sweeps", max_sweeps, OWNER)
    tolerance = check_number("tolerance", tolerance, OWNER)
    moments = Moments(x, y, OWNER)
    latent, matrix = _start(moments, latents, ridge)

    def objective() -> float:
        penalty = sparsity * np.abs(matrix).sum() + ridge / 2 * np.sum(latent**2)
        penalty += task_ridge / 2 * np.sum(matrix**2)
        return moments.loss(latent @ matrix) + float(penalty)

    found, sweeps, converged = objective(), 0, False
    while sweeps < max_sweeps and not converged:
        latent = _latent(moments, matrix, ridge)
        matrix = _task_matrix(moments, latent, matrix, sparsity, task_ridge)
        last, found, sweeps = found, objective(), sweeps + 1
        converged = bool(last - found <= tolerance * abs(last))
    kernel = latent @ matrix
    return CombinedRegressions(
        tasks=moments.tasks,
        kernel=kernel,
        bias=moments.bias(kernel),
        latent=latent,
        task_matrix=matrix,
        objective=found,
        sweeps=sweeps,
        converged=converged,
    )


def _start(moments: Moments, latents: int, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    d = len(moments.moment)
    mean = float(np.trace(moments.gram, axis1=1, axis2=2).mean()) / d
    damped = moments.gram + (ridge + 1e-3 * mean + 1e-30) * np.eye(d)
    alone = np.linalg.solve(damped, moments.moment.T[..., None])[..., 0].T
    u, s, v = np.linalg.svd(alone, full_matrices=False)
    root = np.sqrt(s[:latents])
    return u[:, :latents] * root, root[:, None] * v[:latents]


def _latent(moments: Moments, matrix: np.ndarray, ridge: float) -> np.ndarray:
    """The best L given S: `sum_t G_t L s_t s_t^T + ridge L = sum_t c_t s_t^T`."""
    (d, _), count = moments.moment.shape, len(matrix)
    outer = (matrix[:, None] * matrix[None]).reshape(count * count, -1)
    system = outer @ moments.gram.reshape(len(moments.gram), -1)
    system = system.reshape(count, count, d, d).transpose(0, 2, 1, 3)
    system = system.reshape(count * d, count * d)
    right = (matrix @ moments.moment.T).reshape(-1)
    # A latent regression that no task has is what the ridge makes of it.
    damping = ridge + 1e-12 * float(np.trace(system)) / len(system) + 1e-30
    return (
        np.linalg.solve(system + damping * np.eye(len(system)), right).reshape(count, d).T
    )


def _task_matrix(
    moments: Moments,
    latent: np.ndarray,
    matrix: np.ndarray,
    sparsity: float,
    task_ridge: float,
) -> np.ndarray:
    """The best S given L; with L1 a few rounds by coordinates, for all tasks at once."""
    gram = latent.T @ (moments.gram @ latent)
    right = latent.T @ moments.moment
    if not sparsity:
        mean = float(np.trace(gram, axis1=1, axis2=2).mean()) / len(right)
        damped = gram + (task_ridge + 1e-12 * mean + 1e-30) * np.eye(len(right))
        return np.linalg.solve(damped, right.T[..., None])[..., 0].T
    matrix = matrix.copy()
    for _ in range(10):
        last = matrix.copy()
        for k in range(len(matrix)):
            own = gram[:, k, k]
            rest = right[k] - np.sum(gram[:, k] * matrix.T, axis=1) + own * matrix[k]
            shrunk = np.sign(rest) * np.maximum(np.abs(rest) - sparsity, 0)
            scale = own + task_ridge
            matrix[k] = shrunk / np.where(scale > 0, scale, 1.0)
        if np.linalg.norm(matrix - last) <= 1e-6 * np.linalg.norm(matrix):
            break
    return matrix
