"""How sure it is that one method is better, against SciPy and planted errors."""

import numpy as np
import pytest
from scipy import stats

from tuning.comparison import statistics


def test_improvements():
    """Delta_m for errors, by hand, relative to the task's mean over the draws."""
    found = statistics.improvements([[1.0, 3.0], [2.0, 1.0]], [[2.0, 2.0], [2.0, 0.0]])
    np.testing.assert_array_equal(found, [[50, -100], [0, -100]])
    # A task that the baseline has hardly an error on is relative to a tenth of the mean.
    scale = statistics.scale_of([[1.0, 0.0], [3.0, 1e-9]])
    np.testing.assert_allclose(scale, [2, 0.1])
    np.testing.assert_array_equal(statistics.scale_of([[0.0, 0.0]]), [1, 1])


def test_one_draw_says_nothing_of_chance():
    """No interval."""
    table = statistics.against({"stl": np.ones((1, 3)), "a": np.full((1, 3), 0.5)}, "stl")
    assert table.delta["a"] == 50 and np.isnan(table.low["a"])


def test_test_parts_without_labels(rng):
    """They are left out for all methods alike; what diverged is never recommended."""
    base = rng.uniform(0.2, 0.4, size=(5, 4))
    base[0, 2] = np.nan
    errors = {"stl": base, "a": 0.7 * base, "b": np.full((5, 4), np.nan)}
    assert statistics.recommend(errors, "stl").method == "a"
    assert statistics.against(errors, "stl").delta["a"] == pytest.approx(30)


def test_interval(rng):
    """As wide as normal theory has it for many draws; tasks that differ don't widen it."""
    level = np.array([0.0, 50.0])
    values = level + rng.normal(size=(200, 2))
    low, high = statistics.interval(values)
    width = 2 * 1.96 * np.sqrt(values.var(axis=0, ddof=1).sum() / 200) / 2
    assert low < values.mean() < high
    assert high - low == pytest.approx(width, rel=0.1)
    assert all(np.isnan(statistics.interval(np.full((2, 2), np.nan))))


def test_against(rng):
    """P-values of SciPy, corrected by Holm's rule written out."""
    base = rng.uniform(0.2, 0.4, size=(4, 6))
    errors = {"stl": base, "a": base - 0.05, "b": base + rng.normal(size=(4, 6)) / 100}
    table = statistics.against(errors, "stl")
    raw = [stats.wilcoxon(np.ravel(errors[m] - base)).pvalue for m in ("a", "b")]
    first, second = np.argsort(raw)
    expected = np.empty(2)
    expected[first] = min(1, 2 * raw[first])
    expected[second] = max(expected[first], raw[second])
    np.testing.assert_allclose(table.p[["a", "b"]], expected)
    assert np.isnan(table.p["stl"]) and table.delta["stl"] == 0
    assert table.delta["a"] == pytest.approx(np.mean(100 * 0.05 / base.mean(axis=0)))
    # The same gain in all draws: no width.
    assert table.low["a"] == pytest.approx(table.high["a"])
    assert table.low["b"] < table.delta["b"] < table.high["b"]
    assert table.spread["a"] == pytest.approx(base.mean(axis=1).std(ddof=1))


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        # By which share each method's errors are below the first one's.
        ({"stl": 0, "hard": 0.3, "drn": 0.3}, "hard"),
        ({"stl": 0, "hard": -0.4, "drn": 0.0}, "stl"),
        ({"stl": 0, "hard": -0.4, "drn": 0.3}, "drn"),
        # Too little to matter.
        ({"stl": 0, "hard": 0.01, "drn": 0.005}, "stl"),
    ],
)
def test_recommendation(gains, expected, rng):
    """The simplest one that is as good as the best."""
    base = rng.uniform(0.2, 0.4, size=(5, 8))
    errors = {
        name: base * (1 - gain) + rng.normal(size=(5, 8)) * 1e-3
        for name, gain in gains.items()
    }
    found = statistics.recommend(errors, "stl")
    assert found.method == expected
    assert found.sure > 0.95
    # One task that loses all is seen, however many others gain a little.
    errors["hard"][:, 0] *= 10
    assert statistics.recommend(errors, "stl").method != "hard"


def test_what_diverged_is_not_recommended(rng):
    """A method with an error that is no number is out."""
    base = rng.uniform(0.2, 0.4, size=(5, 3))
    errors = {"stl": base, "drn": np.full((5, 3), np.nan)}
    assert statistics.recommend(errors, "stl").method == "stl"
