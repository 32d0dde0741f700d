"""Linear regressions of many tasks with a norm of their slopes as penalty."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmtrl_keras.ground.regressions import Moments, Regressions
from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import (
    check_number,
    check_positive,
    is_list,
    refusal,
)
from dmtrl_keras.norms.regularizers import MatrixNorm

OWNER = "norm_regression"


@dataclasses.dataclass(frozen=True)
class NormRegressions(Regressions):
    """Linear regressions of T tasks whose slopes have a small norm.

    Attributes:
        tasks: tuple of T names.
        kernel: array `(d, T)`, the slopes.
        bias: array `(T,)`, the intercepts.
        parts: tuple of arrays `(d, T)`, of which `kernel` is the sum.
        objective: float, loss and penalties.
        steps: int, how many were taken.
        converged: bool, whether the last one changed less than the tolerance.
    """

    parts: tuple[np.ndarray, ...]
    objective: float
    steps: int
    converged: bool


def norm_regression(
    x: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    penalty: MatrixNorm | Sequence[MatrixNorm],
    max_steps: int = 5000,
    tolerance: float = 1e-6,
) -> NormRegressions:
    """Linear regressions of T tasks with a norm of all slopes as penalty.

    It minimizes, over slopes `W = (w_1, ..., w_T)` and intercepts,

    `T / n sum_t |y_t - X_t w_t - b_t|^2 + penalty(W)`

    with n examples in all and the penalty of a regularizer on the stacked kernel
    `(d, 1, T)`, as `relationship_regression` does with its priors. With several penalties W
    is a sum of parts, each with its own: `[TraceNorm(a), GroupLasso(b, "task")]` is RMTL.
    The problem is convex. It is solved in float64 by accelerated proximal gradient steps
    (Beck & Teboulle 2009) that start anew where they go up (O'Donoghue & Candes 2015).
    Intercepts have no penalty. Features should be standardized.

    Args:
        x: dict from task to features `(n_t, d)`.
        y: dict from task to targets `(n_t,)` or `(n_t, 1)`.
        penalty: a norm of `dmtrl_keras.regularizers`, such as `TraceNorm(0.1)`; or a list
            of them, one for each part. Its `proximal` says nothing here.
        max_steps: positive int.
        tolerance: float, the relative change of the slopes in a step below which it ends.

    Returns:
        A `NormRegressions`.

    Raises:
        ValueError: on malformed arguments, on tasks without examples or of other features.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras import norm_regression
    >>> from dmtrl_keras.regularizers import GroupLasso
    >>> rng = np.random.default_rng(0)
    >>> x = {task: rng.normal(size=(20, 3)) for task in ["north", "south"]}
    >>> y = {"north": x["north"] @ [1.0, 0, 0] + 4, "south": x["south"] @ [2.0, 0, 0]}
    >>> found = norm_regression(x, y, GroupLasso(0.1))
    >>> np.count_nonzero(found.kernel, axis=1).tolist()  # of each feature, in both tasks
    [2, 0, 0]
    """
    given: Any = penalty
    penalties = list(given) if is_list(given) else [given]
    if not penalties or not all(isinstance(each, MatrixNorm) for each in penalties):
        what = "a norm of dmtrl_keras.regularizers such as TraceNorm, or a list of them"
        raise refusal("penalty", given, OWNER, what)
    check_positive("max_steps", max_steps, OWNER)
    tolerance = check_number("tolerance", tolerance, OWNER)
    moments = Moments(x, y, OWNER)
    parts, steps, converged = _solve(moments, penalties, max_steps, tolerance)
    kernel = parts.sum(axis=0)
    objective = moments.loss(kernel)
    for norm, part in zip(penalties, parts):
        objective += norm.strength * float(norm.terms(part[:, None], np)[0])
    return NormRegressions(
        tasks=moments.tasks,
        kernel=kernel,
        bias=moments.bias(kernel),
        parts=tuple(parts),
        objective=objective,
        steps=steps,
        converged=converged,
    )


def _solve(
    moments: Moments, penalties: Sequence[MatrixNorm], max_steps: int, tolerance: float
) -> tuple[np.ndarray, int, bool]:
    """Slopes by part, `(parts, d, T)`, the number of steps, and whether they converged."""
    smooth = [norm.curvature for norm in penalties]
    curvature = len(penalties) * float(np.linalg.eigvalsh(moments.gram)[:, -1].max())
    curvature += max((each for each in smooth if each is not None), default=0.0)
    # Of constant features, or without a penalty, any step is right.
    eta = 1 / curvature if curvature > 0 else 1.0
    parts = np.zeros((len(penalties), *moments.moment.shape))
    ahead, momentum, steps, converged = parts, 1.0, 0, False
    while steps < max_steps and not converged:
        slope = moments.gradient(ahead.sum(axis=0))
        new = np.empty_like(parts)
        for number, norm in enumerate(penalties):
            # Norms are of stacked kernels `(d, 1, T)`.
            here = ahead[number][:, None]
            if smooth[number] is None:
                value = norm.proximal_step(here - eta * slope[:, None], eta, np)
            else:
                own = norm.strength * norm.terms(here, np)[1]
                value = here - eta * (slope[:, None] + own)
            new[number] = value[:, 0]
        steps += 1
        change, size = np.linalg.norm(new - ahead), np.linalg.norm(new)
        converged = bool(change <= tolerance * size)
        if np.sum((ahead - new) * (new - parts)) > 0:
            momentum = 1.0
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / next_momentum * (new - parts)
        parts, momentum = new, next_momentum
    return parts, steps, converged
