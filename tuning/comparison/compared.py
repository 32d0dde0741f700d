"""The comparison itself, and its answers."""

import dataclasses
import functools
import tempfile

import numpy as np
import pandas as pd

from .. import application
from . import search, statistics, workers
from .candidates import CANDIDATES
from .problem import Problem

DataError = application("reading").DataError


@dataclasses.dataclass
class Comparison:
    """What came out.

    Attributes:
        table: data frame, a row for each method: `title`, `error` and `spread` over the
            draws, `delta` (Delta_m against the baseline, per cent), its interval `low` and
            `high`, `p` (Wilcoxon, Holm), `weights`, `flops` (operations for one example of
            every task), `seconds`, `step_ms` and `predict_ms` (of a step of training, of
            one prediction); NaN where there are no steps, or operations can't be counted.
        by_task: data frame, the mean error of each method (rows) on each task.
        errors: dict from method to array `(draws, tasks)`.
        chosen: dict from method to its hyperparameters.
        left_out: dict from method to the reason.
        recommendation: `statistics.Recommendation`.
        sentence: str, what to use and how sure that is.
        baseline: str.
        tasks: list of names.
        curve: data frame, the learning curve: `fraction`, `method`, `error`, `spread`,
            `delta`, `low`, `high`; empty without fractions.
        relations: dict from method to what it learned of the tasks, `(title, matrix)`, the
            mean over the draws; of methods that say something.
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
    curve: pd.DataFrame
    relations: dict

    def _repr_html_(self):
        from .report import methods_page  # which imports this class

        return methods_page(self)._repr_html_()


def compare(x, y=None, folder=None, told=lambda text: None, **arguments):
    """Train all methods that fit on the same examples, and say which one to use.

    Args:
        x: dict from task to its examples; or an array, the same examples for all tasks; or
            a `Problem`.
        y: dict from task to labels; None with a `Problem`.
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
    if isinstance(x, Problem):
        if y is not None or rest:
            raise DataError(
                "`compare`: expected nothing of a problem beside a `Problem`. "
                f"Received: {['y'] * (y is not None) + list(rest)}."
            )
        return compare_on(x, search.Options(**own), folder, told)
    return compare_on(Problem(x, y, **rest), search.Options(**own), folder, told)


def compare_on(problem, options, folder=None, told=lambda text: None, worker=None):
    """As `compare`, on a `Problem` with `Options`.

    Args:
        problem: `Problem`.
        options: `Options`.
        folder: as for `compare`.
        told: likewise.
        worker: str, the name of a process that does a part of the trainings for another
            one, which has the same folder; None: it is that one.

    Returns:
        A `Comparison`; of a worker None.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return compare_on(problem, options, temporary, told)
    if options.test is None:
        options = dataclasses.replace(options, test=problem.test_share)
    for note in problem.notes:
        told(note)
    methods, left_out = search.methods_of(problem, options)
    for name, reason in left_out.items():
        told(f"{CANDIDATES[name].title}: left out, {reason}.")
    results = workers.SharedResults(f"{folder}/runs.jsonl")
    claims = workers.Claims(f"{folder}/claims", worker or "chief")
    data = problem.digest()
    choosers = {
        method: search.Chooser(problem, options, method, results, data)
        for method in methods
    }
    plan = _planned(options, choosers, results, data, told, claims)
    left_out |= plan.too_slow
    options = dataclasses.replace(options, repeats=plan.repeats)
    jobs = {
        method: _job(problem, options, choosers[method], plan.trials, results, data, told)
        for method in plan.methods
    }
    workers.together(jobs, claims, told)
    if worker is not None:
        return None
    errors, chosen, valid = {}, {}, {}
    weights, relations, costs = {}, {}, {}
    for method in plan.methods:
        chosen[method], valid[method] = choosers[method].choose(plan.trials)
        runs = _runs(problem, options, method, chosen[method], results, data)
        errors[method] = _errors(problem, runs)
        weights[method] = runs[0]["weights"]
        learned = [run["relations"] for run in runs if "relations" in run]
        if learned:
            mean = np.mean([matrix for _, matrix in learned], axis=0)
            relations[method] = learned[0][0], mean
        costs[method] = _costs(runs)
    baseline = options.baseline or baseline_of(plan.methods, valid)
    options = dataclasses.replace(options, baseline=baseline)
    curve = _curve(problem, options, chosen, errors, results, data, told)
    table = statistics.against(errors, baseline)
    table.insert(0, "title", [CANDIDATES[m].title for m in table.index])
    table["weights"] = pd.Series(weights)
    table = table.join(pd.DataFrame(costs).T)
    found = statistics.recommend(
        errors, baseline, order_of(plan.methods, baseline, weights)
    )
    by_task = pd.DataFrame(
        {m: np.nanmean(values, axis=0) for m, values in errors.items()},
        index=problem.tasks,
    ).T
    return Comparison(
        table,
        by_task,
        errors,
        chosen,
        left_out,
        found,
        sentence_of(found, table, baseline, options.repeats),
        baseline,
        problem.tasks,
        curve,
        relations,
    )


def _costs(runs):
    """What a method costs, by the columns of a comparison's table."""
    # Runs of an earlier version have no steps and operations.
    found = {
        name: np.array([run.get(name) for run in runs], float)
        for name in ("flops", "seconds", "step_ms", "predict_ms")
    }
    return {
        name: float(values.mean() if name == "seconds" else np.median(values))
        for name, values in found.items()
    }


def _job(problem, options, chooser, trials, results, data, told):
    """All trainings of a method, as `workers.together` takes them."""
    # That it is done, with what.
    mark = {
        "data": data,
        "done": chooser.method,
        "trials": trials,
        **{
            name: getattr(options, name)
            for name in ("repeats", "epochs", "batch_size", "validation", "test", "seed")
        },
        "fractions": list(options.fractions),
    }

    def do():
        values, _ = chooser.choose(trials)
        for fraction in sorted({*options.fractions, 1.0}):
            own = (problem, options, chooser.method, values, results, data, fraction)
            runs = _runs(*own)
        error = np.nanmean(_errors(problem, runs))
        told(f"{chooser.candidate.title}: error {error:.4g}")
        results.add(mark, {"error": float(error)})

    return lambda: results.get(mark) is not None, do


def _planned(options, choosers, results, data, told, claims):
    """The plan, after every method was trained with its defaults; kept for a later call."""
    if options.budget is None:
        return search.plan(options, dict.fromkeys(choosers, 0.0))
    settings = {
        "data": data,
        "plan": list(choosers),
        **{
            name: getattr(options, name)
            for name in (
                *("budget", "trials", "repeats", "epochs", "batch_size", "seed"),
                *("validation", "test"),
            )
        },
        "fractions": list(options.fractions),
    }
    found = results.get(settings)
    if found is None:
        seconds = {}

        def tried():
            """What is known of the methods' times, and whether that took too long."""
            for method, chooser in choosers.items():
                if method not in seconds and chooser.has_defaults():
                    took = seconds[method] = chooser.defaults().seconds
                    told(f"{CANDIDATES[method].title}: {took:.1f} s with its defaults")
            return search.spent(seconds) > 60 * search.TRYING * options.budget

        needed = {*search.ALONE, options.baseline}

        def is_done(method):
            late = tried() and method not in needed
            return late or method in seconds

        jobs = {
            f"{method}-defaults": (functools.partial(is_done, method), chooser.defaults)
            for method, chooser in choosers.items()
        }
        workers.together(jobs, claims, told)
        # Of several processes the first.
        made = search.plan(options, {m: seconds[m] for m in choosers if m in seconds})
        untried = f"the others' first trainings took most of the {options.budget:g} minutes"
        made.too_slow.update({m: untried for m in choosers if m not in seconds})
        made = made._asdict()
        once = (
            lambda: results.get(settings) is not None,
            lambda: results.add(settings, made),
        )
        workers.together({"plan": once}, claims)
        found = results.get(settings)
    plan = search.Plan(**found)
    told(
        f"Planned: {plan.trials} trials and {plan.repeats} draws of each of "
        f"{len(plan.methods)} methods, about {plan.minutes:.1f} minutes in all."
    )
    for method, reason in plan.too_slow.items():
        told(f"{CANDIDATES[method].title}: left out, {reason}.")
    return plan


def _runs(problem, options, method, values, results, data, fraction=1.0):
    return [
        search.run(problem, options, method, values, number, results, data, fraction)
        for number in range(options.repeats)
    ]


def _errors(problem, runs):
    return np.array([[run["errors"][task] for task in problem.tasks] for run in runs])


def _curve(problem, options, chosen, whole, results, data, told):
    """The learning curve, with the settings that were chosen on all training examples."""
    rows = []
    for fraction in sorted({*options.fractions, 1.0}) if options.fractions else ():
        errors = whole
        if fraction < 1:
            told(f"With {fraction:.0%} of the training examples ...")
            errors = {
                method: _errors(
                    problem,
                    _runs(problem, options, method, values, results, data, fraction),
                )
                for method, values in chosen.items()
            }
        frame = statistics.against(errors, options.baseline).drop(columns="p")
        frame.insert(0, "method", frame.index)
        frame.insert(0, "fraction", fraction)
        rows.append(frame)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def baseline_of(methods, valid):
    """What the others are compared with: the better one of those that share nothing.

    Args:
        methods: list of names.
        valid: dict from method to its trials, by whose errors on the first validation part,
            which is the same for all.
    """
    alone = [name for name in search.ALONE if name in methods]
    errors = {name: search.best_of(valid[name]).first for name in alone}
    return min(errors, key=errors.get) if errors else methods[0]


def order_of(methods, baseline, weights):
    """From the simplest on: what shares nothing, what shares all, then what relates."""
    plain = [m for m in ("ridge", "stl", "pooled", "hard") if m in methods]
    rest = sorted((m for m in methods if m not in plain), key=lambda m: weights[m])
    order = plain + rest
    if baseline in search.ALONE:
        # A linear model is the simplest of all, network or not.
        return order
    return [baseline, *[m for m in order if m != baseline]]


def sentence_of(found, table, baseline, draws):
    """What to use and how sure that is, in plain words."""
    if len(table) == 1:
        return f"Only {table.title.iloc[0]} was trained: there is nothing to compare."
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
            + (f"(95% interval {own.low:.1f} to {own.high:.1f}%)." if draws > 1 else ".")
        )
    if found.best != found.method:
        best = table.loc[found.best]
        text += (
            f" {best.title} has the smallest mean error, but not by more than chance over "
            "tasks and draws, and is less simple."
        )
    if draws < 3:
        text += f" That is of {draws} draw{'s'[: draws > 1]}: too few to be sure."
    return text
