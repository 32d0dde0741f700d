"""Many small regressions: the classic multi-task methods, and the library's, on tables.

School (139 schools, the exam marks of 15,362 pupils) is what the classic methods were
measured on: Evgeniou & Pontil (2004), Argyriou et al. (2008), Kumar & Daume (2012). Any CSV
file with a row for each example will do:

    python -m applications.school --data school.mat
    python -m applications.school --data patients.csv --task clinic --target days

Every method is linear. Strengths and ranks are chosen by cross-validation on the training
part of each split; nothing is chosen on test data.
"""

import functools
import itertools
import pathlib
import typing

import numpy as np
import pandas as pd

from dmtrl_keras import (
    TensorNormalRegularizer,
    combined_regression,
    norm_regression,
    relationship_regression,
)
from dmtrl_keras.regularizers import ClusteredTasks, GroupLasso, MeanDeviation, TraceNorm

from .arguments import real, whole
from .experiment import Experiment, Table, digest_of, timed
from .results import half_interval, mean_and_spread
from .tabular import fold_numbers, make_encoder, read_tabular, split_rows

BASELINE = "stl"


class Method(typing.NamedTuple):
    """A way to solve all regressions.

    Attributes:
        title: str.
        fit: function of features and targets, dicts by task, of whether a rough solution
            will do, and of settings by name, that returns a function from features to
            predictions.
        grid: dict from setting to the values that are tried.
    """

    title: str
    fit: typing.Callable
    grid: dict

    def settings(self):
        """All settings that are tried, a list of dicts."""
        return [
            dict(zip(self.grid, values))
            for values in itertools.product(*self.grid.values())
        ]


def _alone(x, y, rough, strength):
    """Each task its ridge regression."""
    return _centred(x, y, lambda a, b: _ridge(a, b, strength))


def _ridge(x, y, strength):
    """Slopes of centred data; many times faster than scikit-learn, for so few rows."""
    return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)


def _centred(x, y, solve):
    """Regressions of each task's own centred data, as a function of new features."""
    own = {}
    for task, values in x.items():
        centre, level = values.mean(axis=0), y[task].mean()
        own[task] = centre, level, solve(values - centre, y[task] - level)
    return lambda new: {
        task: own[task][1] + (values - own[task][0]) @ own[task][2]
        for task, values in new.items()
    }


def _pooled(x, y, rough, strength):
    """One ridge regression for all."""
    one = _centred(
        {"": np.concatenate(list(x.values()))},
        {"": np.concatenate(list(y.values()))},
        lambda a, b: _ridge(a, b, strength),
    )
    return lambda new: {task: one({"": values})[""] for task, values in new.items()}


def _slope(x, y, rough, strength):
    """One slope for all, and an intercept for each."""
    centred = [(x[task] - x[task].mean(axis=0), y[task] - y[task].mean()) for task in x]
    features, targets = (np.concatenate(each) for each in zip(*centred))
    slope = _ridge(features, targets, strength)
    return _centred(x, y, lambda *_: slope)


def _related(x, y, rough, strength, mean, epsilon=None, features=None):
    """A tensor-normal prior; without an epsilon its covariances stay identities."""
    learns = {"update_every": None} if epsilon is None else {"epsilon": epsilon}
    if features is not None:
        learns = {"modes": ("feature", "task")}
        learns["epsilon"] = {"feature": features, "task": epsilon}
    prior = TensorNormalRegularizer(strength, mean=mean, **learns)
    ends = (4, 2e-2) if rough else (20, 3e-3)
    return relationship_regression(
        x, y, prior, max_sweeps=ends[0], tolerance=ends[1]
    ).predict


def _normed(x, y, rough, penalty, **settings):
    """The penalty that a function makes of the settings."""
    tolerance = 1e-4 if rough else 1e-6
    return norm_regression(x, y, penalty(**settings), tolerance=tolerance).predict


def _combined(x, y, rough, **settings):
    tolerance = 1e-3 if rough else 1e-5
    return combined_regression(x, y, **settings, tolerance=tolerance).predict


def _laf(x, y, rough, latents, ridge):
    return _combined(
        x, y, rough, latents=latents, sparsity=0.0, ridge=ridge, task_ridge=ridge
    )


def _robust(low_rank, group):
    return [TraceNorm(low_rank), GroupLasso(group, "task")]


def _normed_by(penalty):
    return functools.partial(_normed, penalty=penalty)


# Of squares, which are in no unit; of norms, with targets of variance one.
SQUARES = [0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
NORMS = [0.1, 0.3, 1.0, 2.0, 4.0, 8.0]
RIDGES = [0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]
METHODS = {
    "stl": Method("STL: ridge, each task by itself", _alone, {"strength": RIDGES}),
    "pooled": Method("all shared: one ridge", _pooled, {"strength": RIDGES}),
    "slope": Method("one slope, own intercepts", _slope, {"strength": RIDGES}),
    "mean": Method(
        "Evgeniou & Pontil 2004",
        functools.partial(_related, mean="shared"),
        {"strength": SQUARES},
    ),
    "mean_ridge": Method(
        "Evgeniou & Pontil 2004, with a penalty on the mean",
        _normed_by(MeanDeviation),
        {"strength": SQUARES[2:], "common": [0.001, 0.01]},
    ),
    "mtfl": Method(
        "MTFL, MTRL: squared trace norm",
        _normed_by(functools.partial(TraceNorm, squared=True)),
        {"strength": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]},
    ),
    "l21": Method("L2,1 norm", _normed_by(GroupLasso), {"strength": NORMS}),
    "trace": Method("trace norm", _normed_by(TraceNorm), {"strength": NORMS}),
    "rmtl": Method(
        "RMTL: low rank plus outliers",
        _normed_by(_robust),
        {"low_rank": NORMS[1:5], "group": [0.1, 0.3, 1.0]},
    ),
    "clustered": Method(
        "clustered, convex relaxation",
        _normed_by(functools.partial(ClusteredTasks, between=0.1)),
        {"strength": SQUARES[2:], "clusters": [2, 5]},
    ),
    "go_mtl": Method(
        "GO-MTL",
        _combined,
        {"latents": [1, 2, 4], "sparsity": [0.03, 0.3], "ridge": [0.1, 1.0]},
    ),
    "laf": Method(
        "DMTRL-LAF with weight decay", _laf, {"latents": [1, 2, 4], "ridge": NORMS[:4]}
    ),
    "drn_zero": Method(
        "DRN, mean zero",
        functools.partial(_related, mean="zero"),
        {"strength": SQUARES[1:5], "epsilon": [0.1, 1.0]},
    ),
    "drn": Method(
        "DRN, shared mean",
        functools.partial(_related, mean="shared"),
        {"strength": SQUARES[2:], "epsilon": [1.0, 10.0]},
    ),
    "mrn": Method(
        "MRN, shared mean",
        functools.partial(_related, mean="shared", features="auto"),
        {"strength": SQUARES[2:], "epsilon": [1.0, 10.0]},
    ),
}


class Part:
    """A split: features and targets by task, scaled by what is trained on.

    Args:
        data: `Tabular`.
        train: dict from task to rows.
        test: dict from task to rows.
    """

    def __init__(self, data, train, test):
        fitted = np.concatenate(list(train.values()))
        encoder = make_encoder(data.features)
        encoder.fit(data.features.iloc[fitted])
        values = encoder.transform(data.features)
        target = data.target[fitted]
        self.level, self.spread = target.mean(), target.std() or 1.0
        scaled = (data.target - self.level) / self.spread

        def take(rows, of):
            return {task: of[own] for task, own in rows.items()}

        self.x, self.y = take(train, values), take(train, scaled)
        tested = {task: rows for task, rows in test.items() if len(rows)}
        self.test_x, self.test_y = take(tested, values), take(tested, data.target)

    def predict(self, method, settings):
        """Predictions of the test rows, by task, in units of the target."""
        found = method.fit(self.x, self.y, False, **settings)(self.test_x)
        return {task: self.level + self.spread * values for task, values in found.items()}

    def choose(self, method, folds, seed):
        """The settings with the least squared error over the folds of the training rows."""
        offered = method.settings()
        if len(offered) == 1:
            return offered[0], False
        numbers = fold_numbers(
            {t: np.arange(len(v)) for t, v in self.y.items()}, folds, seed
        )
        errors = np.zeros(len(offered))
        for fold in range(folds):
            x, y, held_x, held_y = {}, {}, {}, {}
            for task, own in numbers.items():
                held = own == fold
                x[task], y[task] = self.x[task][~held], self.y[task][~held]
                if held.any():
                    held_x[task], held_y[task] = self.x[task][held], self.y[task][held]
            for number, settings in enumerate(offered):
                predicted = method.fit(x, y, True, **settings)(held_x)
                errors[number] += sum(
                    np.sum((held_y[task] - predicted[task]) ** 2) for task in held_y
                )
        best = offered[int(np.argmin(errors))]
        edge = any(
            len(values) > 2 and best[name] in (values[0], values[-1])
            for name, values in method.grid.items()
        )
        return best, edge


def scores(predicted, target):
    """Explained variance and errors of predictions by task, a dict."""
    wrong = {task: predicted[task] - target[task] for task in target}
    all_wrong = np.concatenate(list(wrong.values()))
    variance = np.concatenate(list(target.values())).var()
    error = np.mean(all_wrong**2)
    return {
        "explained_variance": float(1 - error / variance) if variance > 0 else None,
        "rmse": float(np.sqrt(error)),
        "rmse_of_tasks": float(np.mean([np.sqrt(np.mean(e**2)) for e in wrong.values()])),
    }


class School(Experiment):
    """Regressions of many tasks on a table."""

    name = "school"
    page_block = "school"
    description = "Many small linear regressions: classic multi-task methods on tables."
    methods = {name: method.title for name, method in METHODS.items()}
    defaults = {"repeats": 10}
    helps = {"repeats": "splits"}
    settings = ("folds",)
    data_argument = {
        "type": pathlib.Path,
        "required": True,
        "help": "school.mat, with cells X and Y, or a CSV file",
    }

    def add_arguments(self, p):
        p.add_argument("--task", help="of a CSV file: the column that names a row's task")
        p.add_argument("--target", help="of a CSV file: the column to predict, numbers")
        p.add_argument(
            "--categorical",
            nargs="+",
            default=[],
            help="columns that are categories although they look like numbers",
        )
        p.add_argument("--separator", default=",", help="of a CSV file's columns")
        p.add_argument(
            "--fractions",
            nargs="+",
            type=real(above=0, below=1),
            default=[0.75],
            help="shares of each task's rows to train on",
        )
        p.add_argument(
            "--folds", type=whole(2, 100), default=3, help="of the cross-validation"
        )

    def check(self, p, options):
        if len(options.separator) != 1 or options.separator in '"\r\n':
            p.error("argument --separator: expected one character, no quote, no newline")
        if options.data.suffix.lower() != ".mat" and not (options.task and options.target):
            p.error("argument --data: a CSV file needs --task COLUMN and --target COLUMN")
        options.fractions = sorted(set(options.fractions), reverse=True)

    def load(self, options, console):
        data = read_tabular(
            options.data,
            options.task,
            options.target,
            options.categorical,
            options.separator,
        )
        features = data.features.to_csv(index=False).encode()
        tasks = "\n".join(map(str, data.tasks)).encode()
        data.digest = digest_of([features, tasks, data.target])
        sizes = [len(rows) for rows in data.rows().values()]
        console.print(
            f"{len(sizes)} tasks with {min(sizes)} to {max(sizes)} rows, "
            f"{data.features.shape[1]} columns."
        )
        return data

    def plan(self, options, data):
        by_seed = self.by_seed(options, options.fractions, options.methods)
        for _, seed, fraction, method in by_seed:
            own = {"data": data.digest, "fraction": fraction, "seed": seed}
            # Other values to choose from are another experiment.
            own["grid"] = METHODS[method].grid
            yield self.planned(
                f"{fraction:.0%}, split {seed}",
                options,
                method,
                lambda seed=seed, fraction=fraction: self.draw(
                    options, data, seed, fraction
                ),
                seed,
                own,
            )

    def draw(self, options, data, seed, fraction=None):
        fraction = options.fractions[0] if fraction is None else fraction
        return Part(data, *split_rows(data.rows(), fraction, seed))

    def run(self, options, method, part, seed, tick, callbacks=None):
        with timed() as took:
            settings, edge = part.choose(METHODS[method], options.folds, seed)
            predicted = part.predict(METHODS[method], settings)
            tick()
        found = scores(predicted, part.test_y)
        return {**found, "chosen": settings, "edge": edge, "seconds": took.seconds}

    def ticks(self, options):
        return 1

    def tasks(self, options, data=None):
        return None if data is None else data().names

    def describe(self, found):
        return f"RMSE {found['rmse']:.4g}"

    def tables(self, options, data, runs):
        title = f"{options.data.name}, {len(data.names)} tasks"
        return {options.page_block: Table(title, summarize(runs), "table", keys=2)}


def _in_words(chosen):
    """The settings that were chosen, the most frequent value of each."""
    values = pd.DataFrame(list(chosen))
    return ", ".join(f"{name} {values[name].mode().iloc[0]:g}" for name in values)


def summarize(runs):
    """Scores by fraction and method, and paired differences to STL."""
    rows = []
    for fraction, of_fraction in runs.groupby("fraction", sort=False):
        own = of_fraction[of_fraction.method == BASELINE].set_index("seed")
        for method, group in of_fraction.groupby("method", sort=False):
            group = group.set_index("seed")
            explained = 100 * group.explained_variance.astype(float)
            row = {
                "Trained on": f"{fraction:.0%}",
                "Method": METHODS[method].title,
                "Explained variance %": mean_and_spread(explained, 1),
                "RMSE": mean_and_spread(group.rmse, 3),
                "To STL": "-",
                "95% interval": "-",
                "Better in": "-",
                "Splits": str(len(group)),
                "Chosen, mostly": _in_words(group.chosen),
                "At an end": f"{int(group.edge.sum())}",
            }
            common = group.index.intersection(own.index)
            if method != BASELINE and len(common):
                difference = explained[common]
                difference -= 100 * own.explained_variance[common].astype(float)
                half = half_interval(difference)
                mean = difference.mean()
                row["To STL"] = f"{mean:+.1f}"
                row["95% interval"] = (
                    "-" if np.isnan(half) else f"{mean - half:+.1f} to {mean + half:+.1f}"
                )
                row["Better in"] = f"{int((difference > 0).sum())} of {len(common)}"
            rows.append(row)
    return pd.DataFrame(rows)


parse, main = School().parse, School().main

if __name__ == "__main__":
    main()
