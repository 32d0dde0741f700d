"""Multi-task discriminant analysis beside scikit-learn's, and its optimum."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_iris, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from applications.mtda import MultiTaskDiscriminantAnalysis


@pytest.fixture
def tasks():
    """Flowers and wines: 4 and 13 features of three classes each."""
    data = {"iris": load_iris(return_X_y=True), "wine": load_wine(return_X_y=True)}
    x = {task: (own - own.mean(0)) / own.std(0) for task, (own, _) in data.items()}
    return x, {task: own for task, (_, own) in data.items()}


def test_axes_are_those_of_scikit_learn(tasks):
    """One task alone has the discriminants of `LinearDiscriminantAnalysis`."""
    x, y = tasks
    found = MultiTaskDiscriminantAnalysis(shrinkage=0).fit(x, y)
    assert found.common_.tolist() == [[1, 0], [0, 1]]
    for task in x:
        alone = LinearDiscriminantAnalysis(solver="eigen").fit(x[task], y[task])
        for ours, theirs in zip(found.projections_[task].T, alone.scalings_.T):
            cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
            assert abs(cosine) == pytest.approx(1, abs=1e-6)
        accuracy = np.mean(found.predict(x)[task] == y[task])
        assert accuracy == pytest.approx(alone.score(x[task], y[task]), abs=0.02)


def test_no_other_projection_has_a_larger_sum(tasks, rng):
    """The constraints hold, and random projections within them are no better."""
    x, y = tasks
    found = MultiTaskDiscriminantAnalysis(shrinkage=0).fit(x, y)

    def scatters(task):
        own = x[task] - x[task].mean(0)
        groups = [own[y[task] == k] for k in np.unique(y[task])]
        between = sum(len(g) * np.outer(g.mean(0), g.mean(0)) for g in groups)
        return (own.T @ own - between) / len(own), between / len(own)

    best = {}
    for task, projection in found.projections_.items():
        within, between = scatters(task)
        np.testing.assert_allclose(projection.T @ within @ projection, np.eye(2), atol=1e-8)
        best[task] = np.trace(projection.T @ between @ projection)
    for task in x:
        within, between = scatters(task)
        root = np.linalg.inv(np.real(scipy.linalg.sqrtm(within)))
        for _ in range(50):
            other, _ = np.linalg.qr(rng.normal(size=(len(within), 2)))
            other = root @ other
            assert np.trace(other.T @ between @ other) <= best[task] + 1e-9


def test_few_examples_and_different_classes(rng):
    """More features than examples, other numbers of classes; labels of any kind."""
    x = {"a": rng.normal(size=(12, 40)), "b": rng.normal(size=(20, 7))}
    y = {"a": np.repeat([3, 5], 6), "b": np.repeat(list("pqrst"), 4)}
    for task, label in (("a", 5), ("b", "q")):
        x[task][y[task] == label] += 3
    found = MultiTaskDiscriminantAnalysis(shrinkage=0.5).fit(x, y)
    assert found.projections_["a"].shape == (40, 4)
    assert np.mean(found.predict(x)["a"] == y["a"]) == 1
    assert set(found.predict(x)["b"]) <= set("pqrst")
    fewer = MultiTaskDiscriminantAnalysis(n_components=1, shrinkage=0.5).fit(x, y)
    assert fewer.transform(x)["b"].shape == (20, 1)


def test_errors(rng):
    """What was received, and of which task."""
    x, y = {"a": rng.normal(size=(4, 2))}, {"a": [0, 0, 1, 1]}
    with pytest.raises(ValueError, match=r"shrinkage=1\.5"):
        MultiTaskDiscriminantAnalysis(shrinkage=1.5).fit(x, y)
    with pytest.raises(ValueError, match="same tasks"):
        MultiTaskDiscriminantAnalysis().fit(x, {"b": y["a"]})
    with pytest.raises(ValueError, match="Task 'a' has examples of one class"):
        MultiTaskDiscriminantAnalysis().fit(x, {"a": [1, 1, 1, 1]})
    with pytest.raises(ValueError, match=r"Task 'a'.*inconsistent"):
        MultiTaskDiscriminantAnalysis().fit(x, {"a": [1, 0]})
