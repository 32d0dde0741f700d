"""Linear regressions of many tasks with a tensor-normal prior, solved in closed form."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from keras import ops

from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import (
    check_number,
    check_positive,
    check_task_names,
    finite_array,
    refusal,
)
from dmtrl_keras.kernels.state import mode_names
from dmtrl_keras.mrn.network import named_prior
from dmtrl_keras.mrn.regularizer import Mean, TensorNormalRegularizer
from dmtrl_keras.mrn.state import TensorNormalState

OWNER = "relationship_regression"


@dataclasses.dataclass(frozen=True)
class RelatedRegressions:
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

    tasks: tuple[str, ...]
    kernel: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    covariances: dict[str, np.ndarray]
    sweeps: int
    converged: bool

    def predict(self, x: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """What each task predicts.

        Args:
            x: dict from task to features `(n, d)`; tasks may be left out.

        Returns:
            A dict from task to array `(n,)`.

        Raises:
            ValueError: on unknown tasks and other shapes.
        """
        owner = "RelatedRegressions.predict"
        if not isinstance(x, Mapping) or not set(x) <= set(self.tasks):
            raise refusal("x", x, owner, f"a dict by task, of {list(self.tasks)}")
        found = {}
        for task, features in x.items():
            values = _features(task, features, owner, len(self.kernel))
            number = self.tasks.index(task)
            found[task] = values @ self.kernel[:, number] + self.bias[number]
        return found


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
    tasks = _tasks(x, y)
    features = {task: _features(task, x[task], OWNER) for task in tasks}
    d = len(features[tasks[0]].T)
    n = sum(map(len, features.values()))
    grams, moments, centres = [], [], []
    for task in tasks:
        own = _features(task, features[task], OWNER, d)
        target = _target(task, y[task], len(own))
        centre, level = own.mean(axis=0), target.mean()
        own = own - centre
        grams.append(2 * len(tasks) / n * own.T @ own)
        moments.append(2 * len(tasks) / n * own.T @ (target - level))
        centres.append((centre, level))
    gram, moment = np.stack(grams), np.stack(moments, axis=-1)

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
        new = _solve(gram, moment, state, kernel)
        step = np.linalg.norm(new - kernel)
        kernel, sweeps = new, sweeps + 1
        converged = step <= tolerance * np.linalg.norm(kernel) or not learns
        for _ in range(regularizer.update_every or 0):
            state(training=True)
    bias = [level - centre @ w for (centre, level), w in zip(centres, kernel.T)]
    return RelatedRegressions(
        tasks=tuple(tasks),
        kernel=kernel,
        bias=np.array(bias),
        mean=state.mean[:, 0].astype("float64"),
        covariances=state.covariances,
        sweeps=sweeps,
        converged=bool(converged),
    )


def _solve(
    gram: np.ndarray, moment: np.ndarray, state: TensorNormalState, start: np.ndarray
) -> np.ndarray:
    """The slopes given the covariances: where the gradient is zero.

    `A_t w_t + strength (S_feature^-1 (W - M) S_task^-1)_t = c_t` for every task, in which
    M is a constant or the generalized least squares mean of W.
    """
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
        return np.einsum("tij,jt->it", gram, w) + strength * left @ w @ right

    # Each task alone is near the whole: a preconditioner.
    blocks = gram + strength * np.diagonal(right)[:, None, None] * left
    scale = float(np.trace(blocks, axis1=1, axis2=2).mean()) / d
    inverse = np.linalg.inv(blocks + (1e-9 * scale + 1e-30) * np.eye(d))
    w = start
    residual = moment - applied(w)
    target = 1e-8 * float(np.linalg.norm(moment))
    direction, last = np.zeros_like(w), 1.0
    for _ in range(20 * d * tasks):
        if np.linalg.norm(residual) <= target:
            break
        z = np.einsum("tij,jt->it", inverse, residual)
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


def _tasks(x: Any, y: Any) -> list[str]:
    """The names of the tasks, of which both dicts have the same."""
    if not isinstance(x, Mapping) or not x:
        raise refusal("x", x, OWNER, "a dict from task to features, of one task at least")
    tasks = list(x)
    check_task_names(tasks, OWNER)
    if not isinstance(y, Mapping) or set(y) != set(tasks):
        raise refusal("y", y, OWNER, f"a dict from task to targets, of {tasks}")
    return tasks


def _features(task: str, x: Any, owner: str, d: int | None = None) -> np.ndarray:
    values = finite_array(f"x[{task!r}]", x, owner)
    if values.ndim != 2 or not values.size or d not in (None, values.shape[1]):
        raise ValueError(
            f"{owner}: expected features of task {task!r} of shape "
            f"(n, {'d' if d is None else d}), not empty. Received: {values.shape}."
        )
    return values


def _target(task: str, y: Any, n: int) -> np.ndarray:
    values = finite_array(f"y[{task!r}]", y, OWNER)
    if values.shape not in ((n,), (n, 1)):
        raise ValueError(
            f"{OWNER}: expected {n} targets of task {task!r}, as many as it has examples. "
            f"Received: {values.shape}."
        )
    return values.reshape(n)
