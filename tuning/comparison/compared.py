"""The comparison itself, and its answers."""

import dataclasses
import tempfile

import numpy as np
import pandas as pd

from .. import application
from . import search, statistics
from .candidates import CANDIDATES
from .problem import Problem

experiment = application("experiment")
results_of = application("results")


@dataclasses.dataclass
class Comparison:
    """What came out.

    Attributes:
        table: data frame, a row for each method: `title`, `error` and `spread` over the
            draws, `delta` (Delta_m against the baseline, per cent), its interval `low` and
            `high`, `p` (Wilcoxon, Holm), `weights`, `seconds`.
        by_task: data frame, the mean error of each method (rows) on each task.
        errors: dict from method to array `(draws, tasks)`.
        chosen: dict from method to its hyperparameters.
        left_out: dict from method to the reason.
        recommendation: `statistics.Recommendation`.
        sentence: str, what to use and how sure that is.
        baseline: str.
        tasks: list of names.
    """

    table: pd.DataFrame
    by_task: pd.DataFrame
    errors: dict
    chosen: dict
    left_out: dict
    recommendation: statistics.Recommendation
    sentence: str
    baseline: str
    tasks: list

    def _repr_html_(self):
        return f"<p>{self.sentence}</p>{self.table.to_html()}"


def compare(x, y, folder=None, told=lambda text: None, **arguments):
    """Train all methods that fit on the same examples, and say which one to use.

    Args:
        x: dict from task to its examples; or an array, the same examples for all tasks.
        y: dict from task to labels.
        folder: where results are written as they come, and found again by a later call;
            None: nowhere.
        told: function of a str, for what is done.
        **arguments: of `Problem` (`test`, `kinds`, `backbone`, `metric`) and `Options`.

    Returns:
        A `Comparison`.
    """
    names = {field.name for field in dataclasses.fields(search.Options)}
    own = {k: v for k, v in arguments.items() if k in names}
    rest = {k: v for k, v in arguments.items() if k not in names}
    return compare_on(Problem(x, y, **rest), search.Options(**own), folder, told)


def compare_on(problem, options, folder=None, told=lambda text: None):
    """As `compare`, on a `Problem` with `Options`."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return compare_on(problem, options, temporary, told)
    methods, left_out = search.methods_of(problem, options)
    for name, reason in left_out.items():
        told(f"{CANDIDATES[name].title}: left out, {reason}.")
    baseline = options.baseline or baseline_of(methods)
    results = results_of.Results(f"{folder}/runs.jsonl")
    data = problem.digest()
    errors, chosen, weights, seconds = {}, {}, {}, {}
    for method in methods:
        chosen[method], _ = search.choose(problem, options, method, results, data)
        runs = [
            search.run(problem, options, method, chosen[method], number, results, data)
            for number in range(options.repeats)
        ]
        errors[method] = np.array([[r["errors"][t] for t in problem.tasks] for r in runs])
        weights[method] = runs[0]["weights"]
        seconds[method] = float(np.mean([r["seconds"] for r in runs]))
        told(f"{CANDIDATES[method].title}: error {errors[method].mean():.4g}")
    table = statistics.against(errors, baseline)
    table.insert(0, "title", [CANDIDATES[m].title for m in table.index])
    table["weights"] = pd.Series(weights)
    table["seconds"] = pd.Series(seconds)
    found = statistics.recommend(errors, baseline, order_of(methods, baseline, weights))
    by_task = pd.DataFrame(
        {m: values.mean(axis=0) for m, values in errors.items()}, index=problem.tasks
    ).T
    return Comparison(
        table,
        by_task,
        errors,
        chosen,
        left_out,
        found,
        sentence_of(found, table, baseline),
        baseline,
        problem.tasks,
    )


def baseline_of(methods):
    """What the others are compared with: single-task networks, or linear models."""
    for name in ("stl", "ridge"):
        if name in methods:
            return name
    return methods[0]


def order_of(methods, baseline, weights):
    """From the simplest on: what shares nothing, what shares all, then what relates."""
    plain = [m for m in ("ridge", "stl", "pooled", "hard") if m in methods]
    rest = sorted((m for m in methods if m not in plain), key=lambda m: weights[m])
    order = plain + rest
    if "ridge" in order and baseline == "stl":
        # A linear model is the simplest of all, network or not.
        return order
    return [baseline, *[m for m in order if m != baseline]]


def sentence_of(found, table, baseline):
    """What to use and how sure that is, in plain words."""
    own, base = table.loc[found.method], table.loc[baseline]
    if found.method == baseline:
        text = (
            f"Use {base.title}: no other method is better by more than chance."
            if found.best != baseline
            else f"Use {base.title}: it has the smallest mean error."
        )
    else:
        text = (
            f"Use {own.title}: its error is {own.delta:.1f}% below that of {base.title} "
            f"(95% interval {own.low:.1f} to {own.high:.1f}%)."
        )
    if found.best != found.method:
        best = table.loc[found.best]
        text += (
            f" {best.title} has the smallest mean error, but not by more than chance over "
            "tasks and draws, and is less simple."
        )
    return text
