"""How sure it is that one method is better than another, over tasks and draws."""

import typing
import warnings

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

CONFIDENCE = 0.95


# The least error of a task that others are relative to, as a share of the tasks' mean.
LEAST_SCALE = 0.1


def scale_of(baseline):
    """What the errors of each task are relative to: the baseline's mean over the draws.

    At least a tenth of its mean over the tasks: where it has hardly an error, any other
    would be many times as large.

    Args:
        baseline: array `(draws, tasks)`.

    Returns:
        An array `(tasks,)`; ones if there is no error at all.
    """
    means = _nanmean(np.asarray(baseline, float), axis=0)
    whole = _nanmean(means, axis=None)
    if not whole > 0:
        return np.ones(len(means))
    return np.fmax(means, LEAST_SCALE * whole)


def _nanmean(values, axis):
    """Without a warning where there is nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=axis)


def improvements(errors, baseline):
    """By how much each error is below the baseline's, in per cent of the latter's mean.

    The mean over draws and tasks is Delta_m (Vandenhende et al., "Multi-Task Learning for
    Dense Prediction Tasks: A Survey", 2021, section 4.1), for errors: positive is better.
    What a task's errors are relative to is `scale_of`.

    Args:
        errors: array `(draws, tasks)`.
        baseline: array of the same shape, of the same draws.

    Returns:
        An array `(draws, tasks)`.
    """
    errors, baseline = np.asarray(errors, float), np.asarray(baseline, float)
    return 100 * (baseline - errors) / scale_of(baseline)


def resampled_means(values, seed=0, resamples=2000):
    """Means of bootstrap samples: for each task its draws, with replacement.

    The tasks are those that a user has, and no sample of others: only the draws vary.

    Args:
        values: array `(draws, tasks)`.
        seed: int.
        resamples: int.

    Returns:
        An array `(resamples,)`.
    """
    values = np.asarray(values, float)
    draws, tasks = values.shape
    rng = np.random.default_rng(seed)
    chosen = rng.integers(draws, size=(resamples, draws, tasks))
    return np.nanmean(values[chosen, np.arange(tasks)], axis=(1, 2))


def interval(values, seed=0, confidence=CONFIDENCE):
    """The interval of a mean over draws and tasks, by `resampled_means`.

    Args:
        values: array `(draws, tasks)` of paired differences.
        seed: int.
        confidence: float.

    Returns:
        `(low, high)`; both are NaN where there is no value.
    """
    values = np.asarray(values, float)
    if not np.isfinite(values).any():
        return np.nan, np.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_means(values, seed), [tail, 1 - tail])
    return float(low), float(high)


def paired_p(errors, others):
    """How likely differences like these are if there is none (Wilcoxon, two-sided).

    Args:
        errors: array `(draws, tasks)`.
        others: array of the same shape; the pairs are the same draw and task.

    Returns:
        A float; 1 where all are equal.
    """
    difference = np.ravel(np.asarray(errors, float) - np.asarray(others, float))
    difference = difference[np.isfinite(difference)]
    if not np.any(difference):
        return 1.0
    return float(stats.wilcoxon(difference).pvalue)


def holm(p_values):
    """P-values corrected for their number (Holm 1979, by statsmodels)."""
    if not len(p_values):
        return np.zeros(0)
    return multipletests(p_values, method="holm")[1]


def against(errors, baseline):
    """Every method beside the baseline.

    Args:
        errors: dict from method to array `(draws, tasks)`.
        baseline: a key of it.

    Returns:
        A data frame with a row for each method, in the order of `errors`: `error` (mean),
        `spread` (sample standard deviation over the draws of the mean over the tasks),
        `delta` (Delta_m in per cent), `low` and `high` (its 95% interval), `p` (Wilcoxon,
        corrected by Holm for the number of methods; NaN for the baseline).
    """
    rows = {}
    for method, own in errors.items():
        by_draw = _nanmean(own, axis=1)
        better = improvements(own, errors[baseline])
        rows[method] = {
            "error": _nanmean(by_draw, axis=None),
            "spread": by_draw.std(ddof=1) if len(by_draw) > 1 else np.nan,
            "delta": np.nanmean(better) if np.isfinite(better).any() else np.nan,
            # Of one draw nothing is known.
            **dict(zip(("low", "high"), interval(better if len(own) > 1 else [[np.nan]]))),
            "p": np.nan,
        }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    others = [method for method in errors if method != baseline]
    found = holm([paired_p(errors[m], errors[baseline]) for m in others])
    frame.loc[others, "p"] = found
    return frame


class Recommendation(typing.NamedTuple):
    """What to use.

    Attributes:
        method: str.
        best: str, the method of the smallest mean error, which may be another.
        as_good: list of the methods that are not significantly worse than the best.
        sure: float, the share of bootstrap draws in which the recommended method is at
            least as good as the baseline; 1 where it is the baseline.
    """

    method: str
    best: str
    as_good: list
    sure: float


def recommend(errors, baseline, order=None, least=0.02, level=0.05, seed=0):
    """The simplest method that is not worse than the best.

    The best one has the smallest mean error. Another is worse if its mean error is higher
    by more than a share `least` of the best's, and by more than chance: the interval of the
    paired differences, at a level divided by the number of methods, does not have zero. So
    a method that shares is recommended only where it is better than what shares nothing.

    Args:
        errors: dict from method to array `(draws, tasks)`.
        baseline: a key of it.
        order: the methods from the simplest on; by default as in `errors`.
        least: float, the smallest difference that matters.
        level: float, of significance.
        seed: int, of the bootstrap.

    Returns:
        A `Recommendation`.
    """
    order = list(errors) if order is None else list(order)
    # Errors of different scales count alike: in units of the baseline's.
    scale = scale_of(errors[baseline])
    # Where a test part has no label that is known, it has none for all methods.
    told = ~np.all([np.isnan(errors[m]) for m in order], axis=0)
    scaled = {m: np.asarray(errors[m], float) / scale for m in order}
    finite = [m for m in order if np.isfinite(scaled[m][told]).all()] or [baseline]
    best = min(finite, key=lambda m: _nanmean(scaled[m], axis=None))
    confidence = 1 - level / max(1, len(finite) - 1)

    def worse(method):
        excess = scaled[method] - scaled[best]
        if np.nanmean(excess) <= least * np.nanmean(scaled[best]):
            return False
        return interval(excess, seed, confidence)[0] > 0

    as_good = [m for m in finite if m == best or not worse(m)]
    method = as_good[0]
    if method == baseline:
        return Recommendation(method, best, as_good, 1.0)
    gains = resampled_means(scaled[baseline] - scaled[method], seed)
    return Recommendation(method, best, as_good, float(np.mean(gains >= 0)))
