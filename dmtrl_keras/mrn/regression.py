"""Linear regressions of many tasks with a tensor-normal prior, solved in closed form."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from keras import ops

from dmtrl_keras.ground.regressions import Moments, Regressions
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_number, check_positive, refusal
from dmtrl_keras.kernels.state import mode_names
from dmtrl_keras.mrn.network import named_prior
from dmtrl_keras.mrn.regularizer import Mean, TensorNormalRegularizer
from dmtrl_keras.mrn.state import TensorNormalState

OWNER = "relationship_regression"


@dataclasses.dataclass(frozen=True)
class RelatedRegressions(Regressions):
    """Linear regressions of T tasks that were learned together.

    Attributes:
        tasks: tuple of T names.
        kernel: array `(d, T)`, the slopes.
        bias: array `(T,)`, the intercepts.
        mean: array `(d, T)`, the prior's mean.
        covariances: dict from mode to array, what the prior learned; `"task"`: `(T, T)`.
        sweeps: int, how often the regressions were solved.
        converged: bool, whether the last sweep changed less than the tolerance.
    """

    mean: np.ndarray
    covariances: dict[str, np.ndarray]
    sweeps: int
    converged: bool


def relationship_regression(
    x: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    prior: Literal["drn", "mrn"] | TensorNormalRegularizer = "drn",
    strength: float = 0.1,
    mean: Mean = "shared",
    max_sweeps: int = 50,
    tolerance: float = 1e-3,
) -> RelatedRegressions:
    """Linear regressions of T tasks, whose relations are learned (DRN without a network).

    It minimizes, over slopes `W = (w_1, ..., w_T)` and intercepts,

    `T / n sum_t |y_t - X_t w_t - b_t|^2 + strength / 2 penalty(W)`

    with n examples in all and the penalty of `TensorNormalRegularizer` on the stacked
    kernel `(d, 1, T)`: what `relationship_network((d,), tasks, 1, None,
    activation="linear")` is trained for where the tasks have equally many examples. By
    turns the regressions are solved given the covariances (a linear system, by conjugate
    gradients), and the covariances updated given the slopes (DRN Eq. 13). There is no
    learning rate. Intercepts have no penalty. Features should be standardized, since the
    prior takes them to have one scale.

    With `mean="shared"` and covariances that stay identities (`update_every=None`) this is
    regularized multi-task learning (Evgeniou & Pontil, 2004); with a mean of zero, the
    task mode and an epsilon of 0, MTRL (Zhang & Yeung, 2010) but for its square root.

    Args:
        x: dict from task to features `(n_t, d)`.
        y: dict from task to targets `(n_t,)` or `(n_t, 1)`.
        prior: `"drn"`: the task mode learns its covariance; `"mrn"`: that of features too;
            or a `TensorNormalRegularizer`, which has its own strength and mean.
        strength: float, of the prior, where that is given by name.
        mean: of the prior, likewise. `"start"` is zero here.
        max_sweeps: positive int.
        tolerance: float, the relative change of the slopes below which it ends.

    Returns:
        A `RelatedRegressions`.

    Raises:
        ValueError: on malformed arguments, on tasks without examples or of other features.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras import relationship_regression
    >>> rng = np.random.default_rng(0)
    >>> x = {task: rng.normal(size=(5, 3)) for task in ["north", "south"]}
    >>> y = {task: features @ [1.0, 2.0, 3.0] + 4 for task, features in x.items()}
    >>> found = relationship_regression(x, y, strength=1e-3)
    >>> found.kernel.round(1).tolist(), found.bias.round(1).tolist()
    ([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], [4.0, 4.0])
    """
    check_positive("max_sweeps", max_sweeps, OWNER)
    tolerance = check_number("tolerance", tolerance, OWNER)
    regularizer = named_prior(prior, check_number("strength", strength, OWNER), mean, OWNER)
    if regularizer is None:
        raise refusal("prior", prior, OWNER, "a prior")
    moments = Moments(x, y, OWNER)
    (d, _), tasks = moments.moment.shape, moments.tasks

    kernel = np.zeros((d, len(tasks)))
    state = TensorNormalState(
        regularizer,
        lambda: ops.convert_to_tensor(kernel[:, None], "float32"),
        (d, 1, len(tasks)),
        mode_names(3, task_axis=True),
        OWNER,
        "float32",
    )
    state.build()
    learns = regularizer.update_every is not None
    sweeps, converged = 0, False
    while sweeps < max_sweeps and not converged:
        new = _solve(moments, state, kernel)
        step = np.linalg.norm(new - kernel)
        kernel, sweeps = new, sweeps + 1
        converged = step <= tolerance * np.linalg.norm(kernel) or not learns
        for _ in range(regularizer.update_every or 0):
            state(training=True)
    return RelatedRegressions(
        tasks=tasks,
        kernel=kernel,
        bias=moments.bias(kernel),
        mean=state.mean[:, 0].astype("float64"),
        covariances=state.covariances,
        sweeps=sweeps,
        converged=bool(converged),
    )


def _solve(moments: Moments, state: TensorNormalState, start: np.ndarray) -> np.ndarray:
    """The slopes given the covariances: where the gradient is zero.

    `A_t w_t + strength (S_feature^-1 (W - M) S_task^-1)_t = c_t` for every task, in which
    M is a constant or the generalized least squares mean of W.
    """
    gram, moment = moments.gram, moments.moment
    d, tasks = moment.shape
    strength = state.regularizer.strength
    precision = {
        mode: np.asarray(ops.convert_to_numpy(covariance.precision), "float64")
        for mode, covariance in state.modes.items()
    }
    left = precision.get("feature", np.eye(d)) * precision.get("class", np.eye(1))
    right = precision.get("task", np.eye(tasks))
    shared = state.regularizer.mean == "shared"
    if shared:
        # (W - M) S^-1 = W (S^-1 - p p^T / 1^T p) with p = S^-1 1.
        weights = right.sum(axis=0)
        right = right - np.outer(weights, weights) / weights.sum()
    else:
        moment = moment + strength * left @ state.mean[:, 0].astype("float64") @ right

    def applied(w: np.ndarray) -> np.ndarray:
        return moments.applied(w) + strength * left @ w @ right

    # A preconditioner. Where the tasks are hardly related, each task alone is near the
    # whole; else so are tasks with the mean Gram matrix, in the axes of their covariance.
    weights, axes = np.diagonal(right), np.eye(tasks)
    largest, rotation = np.linalg.eigh(right)
    if largest[-1] > 2 * float(np.mean(weights)):
        gram, weights, axes = gram.mean(axis=0), np.maximum(largest, 0), rotation
    blocks = gram + strength * weights[:, None, None] * left
    scale = float(np.trace(blocks, axis1=1, axis2=2).mean()) / d
    inverse = np.linalg.inv(blocks + (1e-9 * scale + 1e-30) * np.eye(d))
    w = start
    residual = moment - applied(w)
    target = 1e-8 * float(np.linalg.norm(moment))
    direction, last = np.zeros_like(w), 1.0
    for _ in range(20 * d * tasks):
        if np.linalg.norm(residual) <= target:
            break
        z = (inverse @ (residual @ axes).T[..., None])[..., 0].T @ axes.T
        product = float(np.sum(residual * z))
        direction = z + product / last * direction
        image = applied(direction)
        curvature = float(np.sum(direction * image))
        if not 0 < curvature < np.inf:
            # Out of the range of floats: with an enormous strength all is at the mean.
            break
        step = product / curvature
        w, residual, last = w + step * direction, residual - step * image, product
    return w
