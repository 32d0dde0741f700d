"""Multi-task discriminant analysis: the shallow method in MTAL's Tables 2 to 5.

Zhang & Yeung, "Multi-Task Learning in Heterogeneous Feature Spaces" (AAAI 2011): linear
discriminant analysis of tasks with different features and classes, where the projection of
each task has a part of its own and a part that is common to all.
"""

from collections.abc import Mapping
from typing import Self

import numpy as np
import scipy.linalg
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import unique_labels
from sklearn.utils.validation import check_is_fitted, check_X_y


class MultiTaskDiscriminantAnalysis(ClassifierMixin, BaseEstimator):
    """Discriminant analysis of several tasks with different features and classes.

    Task i is projected by `P_i W`: its own `P_i` `(d_i, p)` into a space of p dimensions,
    and the common `W` `(p, q)`. Of all projections with `P_i' S_w P_i = I` and `W' W = I`
    the one with the largest sum of `tr(W' P_i' S_b P_i W)` over the tasks is found in
    closed form, with the scatter `S_b` between the classes of task i and `S_w` within
    them, each divided by the number of examples. Examples are classified by the nearest
    class mean.

    The columns of `P_i` are generalised eigenvectors, `S_b v = l S_w v`, in the order of
    their eigenvalues, for whatever `W`; and `W` has the axes along which the eigenvalues of
    all tasks sum to most. So tasks agree on nothing but how many axes there are. That is
    what is left of sharing if tasks have neither features nor classes in common, and it is
    why this is hardly other than an analysis of each task by itself.

    Args:
        n_components: positive int, q. None: as many as any task has classes, less one.
        shrinkage: float in [0, 1): this share of `S_w` is replaced by the mean variance
            times the identity, without which there is no inverse if features are many.

    Attributes:
        classes_: dict from task to the array of its classes.
        projections_: dict from task to `P_i W`, `(d_i, q)`.
        means_: dict from task to the projected class means, `(classes, q)`.
        common_: array `(p, q)`, W.

    Raises:
        ValueError: on tasks whose examples and labels don't fit together, or of one class.

    Example:

    >>> import numpy as np
    >>> from applications.mtda import MultiTaskDiscriminantAnalysis
    >>> x = {"a": np.array([[0.0, 1], [1, 0], [4, 5], [5, 4]]), "b": np.eye(4)[:, :3]}
    >>> y = {"a": [0, 0, 1, 1], "b": ["x", "x", "y", "y"]}
    >>> found = MultiTaskDiscriminantAnalysis(shrinkage=0.1).fit(x, y)
    >>> found.predict(x)["b"].tolist()
    ['x', 'x', 'y', 'y']
    """

    def __init__(self, n_components: int | None = None, shrinkage: float = 0.1) -> None:
        self.n_components = n_components
        self.shrinkage = shrinkage

    def fit(self, X: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]) -> Self:
        """Find the projections.

        Args:
            X: dict from task to an array `(examples, features)`.
            y: dict from task to an array of class labels.
        """
        if not 0 <= self.shrinkage < 1:
            raise ValueError(
                f"`shrinkage` must be in [0, 1). Received: shrinkage={self.shrinkage!r}."
            )
        if set(X) != set(y) or not X:
            raise ValueError(
                "X and y must be dicts of the same tasks. "
                f"Received: {sorted(X)} and {sorted(y)}."
            )
        self.classes_, own, between = {}, {}, {}
        for task in X:
            try:
                x, labels = check_X_y(X[task], y[task])
            except ValueError as error:
                raise ValueError(f"Task {task!r}: {error}") from error
            self.classes_[task] = unique_labels(labels)
            if len(self.classes_[task]) < 2:
                raise ValueError(f"Task {task!r} has examples of one class only.")
            own[task], between[task] = self._discriminants(x, labels)
        axes = max(len(values) for values in between.values())
        # Tasks with fewer classes, or features, tell nothing along the last axes.
        total = sum(np.pad(v, (0, axes - len(v))) for v in between.values())
        count = self.n_components or axes
        self.common_ = np.eye(axes)[:, np.argsort(-total, kind="stable")[:count]]
        self.projections_ = {
            task: np.pad(p, ((0, 0), (0, axes - p.shape[1]))) @ self.common_
            for task, p in own.items()
        }
        self.means_ = {
            task: np.stack(
                [x[np.asarray(y[task]) == k].mean(0) for k in self.classes_[task]]
            )
            for task, x in self.transform(X).items()
        }
        return self

    def _discriminants(
        self, x: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One task's P and the eigenvalues, the largest first."""
        classes, numbers = np.unique(labels, return_inverse=True)
        size, centred = x.shape[1], x - x.mean(axis=0)
        # Beyond the span of the examples there is nothing to tell classes apart.
        _, found, axes = np.linalg.svd(centred, full_matrices=False)
        axes = axes[found > 1e-12 * found[0]]
        centred = centred @ axes.T
        means = np.stack([centred[numbers == k].mean(axis=0) for k in range(len(classes))])
        weights = np.bincount(numbers) / len(x)
        within = centred - means[numbers]
        within = within.T @ within / len(x)
        level = self.shrinkage * np.trace(within) / size
        within = (1 - self.shrinkage) * within + level * np.eye(len(within))
        # The class means span few dimensions, so that the problem is as small as they.
        roots = means.T * np.sqrt(weights)
        solved = scipy.linalg.solve(within, roots, assume_a="pos")
        values, vectors = np.linalg.eigh(roots.T @ solved)
        order = np.argsort(-values)[: len(classes) - 1]
        values, vectors = values[order], vectors[:, order]
        kept = values > 1e-12 * max(values[0], 1e-300)
        values, vectors = values[kept], vectors[:, kept]
        return axes.T @ solved @ vectors / np.sqrt(values), values

    def transform(self, X: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The examples of each task in the common space, `(examples, q)`."""
        check_is_fitted(self)
        return {task: np.asarray(x) @ self.projections_[task] for task, x in X.items()}

    def predict(self, X: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The class of each example, a dict by task."""
        return {
            task: self.classes_[task][cdist(x, self.means_[task]).argmin(axis=1)]
            for task, x in self.transform(X).items()
        }
