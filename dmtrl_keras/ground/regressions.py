"""Linear regressions of T tasks: what is given to their solvers, and what they find."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmtrl_keras.ground.types import Tensor
from dmtrl_keras.ground.validation import check_task_names, finite_array, refusal


@dataclasses.dataclass(frozen=True)
class Regressions:
    """Linear regressions of T tasks.

    Attributes:
        tasks: tuple of T names.
        kernel: array `(d, T)`, the slopes.
        bias: array `(T,)`, the intercepts.
    """

    tasks: tuple[str, ...]
    kernel: np.ndarray
    bias: np.ndarray

    def predict(self, x: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """What each task predicts.

        Args:
            x: dict from task to features `(n, d)`; tasks may be left out.

        Returns:
            A dict from task to array `(n,)`.

        Raises:
            ValueError: on unknown tasks and other shapes.
        """
        owner = f"{type(self).__name__}.predict"
        if not isinstance(x, Mapping) or not set(x) <= set(self.tasks):
            raise refusal("x", x, owner, f"a dict by task, of {list(self.tasks)}")
        found = {}
        for task, features in x.items():
            values = _features(task, features, owner, len(self.kernel))
            number = self.tasks.index(task)
            found[task] = values @ self.kernel[:, number] + self.bias[number]
        return found


class Moments:
    """All that the examples say of the loss `T / n sum_t |y_t - X_t w_t - b_t|^2`.

    With the best intercepts it is `constant + sum_t (w_t^T G_t w_t / 2 - c_t^T w_t)`.

    Args:
        x: dict from task to features `(n_t, d)`.
        y: dict from task to targets `(n_t,)` or `(n_t, 1)`.
        owner: str, the function to name in errors.

    Attributes:
        tasks: tuple of names.
        gram: array `(T, d, d)`, the G_t.
        moment: array `(d, T)`, the c_t.
        constant: float.

    Raises:
        ValueError: on tasks without examples, of other features, or with other targets.
    """

    def __init__(self, x: Any, y: Any, owner: str) -> None:
        self.tasks = tuple(_tasks(x, y, owner))
        features = {task: _features(task, x[task], owner) for task in self.tasks}
        d = len(features[self.tasks[0]].T)
        n = sum(map(len, features.values()))
        scale = 2 * len(self.tasks) / n
        grams, moments, self.constant = [], [], 0.0
        self._centres, self._levels = [], []
        for task in self.tasks:
            own = _features(task, features[task], owner, d)
            target = _target(task, y[task], len(own), owner)
            centre, level = own.mean(axis=0), target.mean()
            own, target = own - centre, target - level
            grams.append(scale * own.T @ own)
            moments.append(scale * own.T @ target)
            self.constant += scale / 2 * float(target @ target)
            self._centres.append(centre)
            self._levels.append(level)
        self.gram, self.moment = np.stack(grams), np.stack(moments, axis=-1)

    def applied(self, kernel: np.ndarray) -> np.ndarray:
        """The products `G_t w_t`, an array `(d, T)`."""
        # Several times faster than einsum.
        return (self.gram @ kernel.T[..., None])[..., 0].T

    def gradient(self, kernel: np.ndarray) -> np.ndarray:
        """The gradient of the loss at slopes `(d, T)`."""
        return self.applied(kernel) - self.moment

    def loss(self, kernel: np.ndarray) -> float:
        """The loss of slopes `(d, T)` with their best intercepts."""
        slope = self.gradient(kernel) - self.moment
        return self.constant + float(np.sum(slope * kernel)) / 2

    def bias(self, kernel: np.ndarray) -> np.ndarray:
        """The best intercepts, an array `(T,)`."""
        own = zip(self._centres, self._levels, kernel.T)
        return np.array([level - centre @ w for centre, level, w in own])


def _tasks(x: Any, y: Any, owner: str) -> list[str]:
    """The names of the tasks, of which both dicts have the same."""
    if not isinstance(x, Mapping) or not x:
        raise refusal("x", x, owner, "a dict from task to features, of one task at least")
    tasks = list(x)
    check_task_names(tasks, owner)
    if not isinstance(y, Mapping) or set(y) != set(tasks):
        raise refusal("y", y, owner, f"a dict from task to targets, of {tasks}")
    return tasks


def _features(task: str, x: Any, owner: str, d: int | None = None) -> np.ndarray:
    values = finite_array(f"x[{task!r}]", x, owner)
    if values.ndim != 2 or not values.size or d not in (None, values.shape[1]):
        raise ValueError(
            f"{owner}: expected features of task {task!r} of shape "
            f"(n, {'d' if d is None else d}), not empty. Received: {values.shape}."
        )
    return values


def _target(task: str, y: Any, n: int, owner: str) -> np.ndarray:
    values = finite_array(f"y[{task!r}]", y, owner)
    if values.shape not in ((n,), (n, 1)):
        raise ValueError(
            f"{owner}: expected {n} targets of task {task!r}, as many as it has examples. "
            f"Received: {values.shape}."
        )
    return values.reshape(n)
