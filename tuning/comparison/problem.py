"""What methods are compared on: tasks, their data, and how errors are measured."""

import itertools
import typing
from collections.abc import Mapping

import numpy as np
import pandas as pd
from sklearn import metrics as scores
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.ground.validation import check_task_names

from .. import application

DataError = application("reading").DataError
digest_of = application("experiment").digest_of
make_encoder = application("tabular").make_encoder
read_tabular = application("tabular").read_tabular

# Fewer examples of a task can't be split for training, validation and testing.
LEAST = 4
REGRESSION, BINARY, CLASSES = "regression", "binary", "classes"


class Metric(typing.NamedTuple):
    """An error of one task's predictions, to be minimized.

    Attributes:
        title: str, for tables.
        error: function of the labels and outputs of a task.
        kinds: the kinds of tasks that it is for.
        relative: bool; the error is divided by the variance of all of a task's targets. (A
            test part of a few rows may have any variance.)
    """

    title: str
    error: typing.Callable
    kinds: tuple
    relative: bool = False


def classes_of(outputs):
    """The predicted classes of logits `(n,)`, `(n, 1)` or `(n, classes)`."""
    outputs = np.asarray(outputs)
    if outputs.ndim == 1 or outputs.shape[-1] == 1:
        return (outputs.reshape(len(outputs)) > 0).astype(int)
    return outputs.argmax(axis=-1)


def _error_rate(y, outputs):
    return float(np.mean(classes_of(outputs) != np.ravel(y)))


def _rmse(y, outputs):
    return float(scores.root_mean_squared_error(np.ravel(y), np.ravel(outputs)))


def _squared(y, outputs):
    return float(np.mean((np.ravel(y) - np.ravel(outputs)) ** 2))


def _auc(y, outputs):
    y, outputs = np.ravel(y), np.asarray(outputs)
    if len(np.unique(y)) < 2:
        return np.nan
    return 1 - float(scores.roc_auc_score(y, outputs.reshape(len(outputs))))


METRICS = {
    "error": Metric("Error %", _error_rate, (BINARY, CLASSES)),
    "auc": Metric("1 - AUC %", _auc, (BINARY,)),
    "rmse": Metric("RMSE", _rmse, (REGRESSION,)),
    "unexplained": Metric("Squared error / variance", _squared, (REGRESSION,), True),
}


class Problem:
    """Tasks with their examples.

    Args:
        x: dict from task to array of examples, or to a data frame with columns of numbers
            and of categories; or one array, the same examples for all.
        y: dict from task to labels: `(n,)` or `(n, outputs)`; NaN (or -1 of classes) where
            they are missing.
        test_data: `(x, y)` of the same form, on which finished methods are tested; None:
            every draw splits a share of the examples off.
        kinds: dict from task to `"regression"`, `"binary"` or `"classes"`; by default
            floats are regressions, ints and bools classes.
        backbone: function without arguments that returns a Keras model, what each task's
            network is without its head; None: linear models only, and a small network
            on tables.
        metric: a key of `METRICS`, or None: the error rate of classes, and of regressions
            the squared error, in units of a task's variance.
        classes: int, of all tasks of classes; None: by task, as many as its labels have.

    Attributes:
        notes: list of str, what was done to the data.
        test_share: float, the share of the examples that a draw tests on, where there is no
            test part and nothing else is asked for.

    Raises:
        DataError: on data in another form.
    """

    def __init__(
        self, x, y, test_data=None, kinds=None, backbone=None, metric=None, classes=None
    ):
        _check_arguments(x, y, backbone, metric)
        self.notes = []
        self.test_share = 0.3
        self.tasks = list(y)
        self.shared = not isinstance(x, Mapping)
        self.x = {t: _examples(x if self.shared else x[t]) for t in y}
        self.y = {t: np.asarray(values) for t, values in y.items()}
        self.test = None
        if test_data is not None:
            own, labels = test_data
            self.test = (
                {t: _examples(own if self.shared else own[t]) for t in y},
                {t: np.asarray(labels[t]) for t in y},
            )
        self.backbone = backbone
        self.metric = metric
        self._check()
        self.kinds = dict(kinds or {t: _kind(values) for t, values in self.y.items()})
        self._check_labels()
        self.classes = {
            t: classes or 1 + int(self.y[t].max()) for t in y if self.kinds[t] == CLASSES
        }
        self.metrics = {t: METRICS[metric or _default(self.kinds[t])] for t in y}
        for task in self.tasks:
            if self.kinds[task] not in self.metrics[task].kinds:
                raise DataError(
                    f"--metric {metric}: it is of {self.metrics[task].kinds}. Task "
                    f"{task!r} is of kind {self.kinds[task]!r}, for which there are "
                    f"{[n for n, m in METRICS.items() if self.kinds[task] in m.kinds]}."
                )

    def _check(self):
        try:
            check_task_names(self.tasks, "compare")
        except (TypeError, ValueError) as error:
            raise DataError(str(error)) from error
        if len(self.tasks) < 2:
            raise DataError(f"Expected two tasks at least. Received: {self.tasks}.")
        lengths = {t: (len(self.x[t]), len(self.y[t])) for t in self.tasks}
        if any(one != other or one < LEAST for one, other in lengths.values()):
            raise DataError(
                f"Expected as many labels as examples, and {LEAST} at least of each task. "
                f"Received (examples, labels): {lengths}."
            )

    def _check_labels(self):
        for task, values in self.y.items():
            known = values[present(values)]
            if not len(known):
                raise DataError(f"Task {task!r} has no label that is known.")
            if self.kinds[task] == REGRESSION:
                if known.ndim == 1 and np.ptp(known) == 0:
                    raise DataError(
                        f"Task {task!r}: expected targets that differ. Received: all are "
                        f"{known[0]:g}. Leave the task out."
                    )
            elif known.max() < 1 and (values == -1).any():
                raise DataError(
                    f"Task {task!r}: expected classes 0, 1, ..., and -1 where a label is "
                    "missing. Received: -1 and 0 only."
                )
            elif set(np.unique(values)) == {-1, 1}:
                raise DataError(
                    f"Task {task!r}: expected classes 0, 1, ..., and -1 where a label is "
                    "missing. Received: -1 and 1 only."
                )

    @property
    def tabular(self):
        """Whether the examples are rows of numbers."""
        return all(x.ndim == 2 for x in self.x.values())

    def encoder(self, x):
        """What scales rows to mean zero and deviation one, fitted on a training part.

        Args:
            x: dict from task to rows.

        Returns:
            An object with `transform`, as scikit-learn's.
        """
        if self.frames:
            every = pd.concat(list(x.values()), ignore_index=True)
            return make_encoder(every).fit(every)
        return StandardScaler().fit(np.concatenate(list(x.values())))

    @property
    def frames(self):
        """Whether the examples are data frames."""
        return all(isinstance(x, pd.DataFrame) for x in self.x.values())

    @property
    def regression(self):
        """Whether all tasks are regressions of one number."""
        return all(kind == REGRESSION for kind in self.kinds.values()) and all(
            values.ndim == 1 or values.shape[-1] == 1 for values in self.y.values()
        )

    def by_task(self, x):
        """Examples by task; an array is that of all tasks, where they share examples."""
        if not isinstance(x, Mapping):
            if not self.shared:
                raise DataError(f"Expected a dict by task. Received: {type(x).__name__}.")
            return {t: _examples(x) for t in self.tasks}
        if not set(x) <= set(self.tasks):
            raise DataError(f"Expected tasks of {self.tasks}. Received: {list(x)}.")
        return x

    @property
    def heads(self):
        """The number of outputs of each task."""
        return {t: self.outputs(t) for t in self.tasks}

    def outputs(self, task):
        """How many outputs a task has."""
        if self.kinds[task] == CLASSES:
            return self.classes[task]
        return 1 if self.y[task].ndim == 1 else self.y[task].shape[-1]

    def split(self, part, share, seed):
        """Two parts of some examples, by task, where possible with the same classes.

        Args:
            part: dict from task to indices.
            share: float, of the second.
            seed: int.

        Returns:
            `(first, second)`, dicts of indices.
        """
        first, second, common = {}, {}, None
        for number, task in enumerate(self.tasks):
            own = part[task]
            if self.shared and common is not None:
                first[task], second[task] = common
                continue
            labels = self.y[task][own] if self.kinds[task] != REGRESSION else None
            if labels is not None and labels.ndim > 1:
                labels = None
            held = max(1, round(share * len(own)))
            enough = (
                labels is not None and min(np.unique(labels, return_counts=True)[1]) > 1
            )
            enough = enough and min(held, len(own) - held) >= len(np.unique(labels))
            common = train_test_split(
                own,
                test_size=held,
                # Tasks that share their examples are split alike, others each by itself.
                random_state=(seed + 1000003 * number) % 2**32,
                stratify=labels if enough else None,
            )
            first[task], second[task] = common
        return first, second

    def everything(self):
        """All examples, a dict of indices."""
        return {t: np.arange(len(self.y[t])) for t in self.tasks}

    def rows(self, part):
        """`(x, y)` of a part, dicts by task."""
        take = (lambda x, i: x.iloc[i]) if self.frames else (lambda x, i: x[i])
        x = {t: take(self.x[t], part[t]) for t in self.tasks}
        return x, {t: self.y[t][part[t]] for t in self.tasks}

    def score(self, part, y, outputs):
        """What settings are chosen by, on few examples: the mean over the tasks.

        The error rate of classes; the squared error of regressions, in units of the
        variance of a task's own training part. (The explained variance of a handful of
        examples has their variance below the fraction bar, and may be anything.)

        Args:
            part: dict from task to indices, of the whole training part.
            y: dict of labels.
            outputs: dict of outputs.
        """
        found = []
        for task in self.tasks:
            own, predicted = _known(y[task], outputs[task])
            if not len(own):
                continue
            if self.kinds[task] == REGRESSION:
                variance = np.nanvar(self.y[task][part[task]]) or 1.0
                found.append(_squared(own, predicted) / variance)
            else:
                found.append(self.metrics[task].error(own, predicted))
        return float(np.nanmean(found)) if np.isfinite(found).any() else np.nan

    def digest(self):
        """A str that names the data, what is measured on them, and by what network."""
        metrics = [(self.kinds[t], type(self.metrics[t]).__name__) for t in self.tasks]
        pieces = [repr((self.tasks, metrics, self.metric, self._layers())).encode()]
        parts = [(self.x, self.y), *([] if self.test is None else [self.test])]
        for (x, y), task in itertools.product(parts, self.tasks):
            own = x[task]
            pieces.append(own.to_csv().encode() if self.frames else own)
            pieces.append(y[task])
        return digest_of(pieces)

    def _layers(self):
        """What tells one backbone from another: names and weights are new in each call."""
        if self.backbone is None:
            return None
        return [
            (
                type(layer).__name__,
                str(layer.get_config().get("activation")),
                [tuple(weight.shape) for weight in layer.weights],
            )
            for layer in flatten_layers(self.backbone())
        ]

    def errors(self, y, outputs):
        """The error of each task, a dict; NaN where no label is known."""
        found = {}
        for task in self.tasks:
            metric, (own, predicted) = self.metrics[task], _known(y[task], outputs[task])
            found[task] = metric.error(own, predicted) if len(own) else np.nan
            if metric.relative:
                found[task] /= np.nanvar(self.y[task])
        return found


def table_problem(
    path, task=None, target=None, kind=None, categorical=(), metric=None, separator=","
):
    """The problem of a file, a row for each example.

    Args:
        path: path of a CSV file.
        task: str, the column that says of which task a row is.
        target: str, the column to be predicted.
        kind: as for `from_table`, as is `metric`.
        categorical: columns that are categories although they look like numbers.
        metric: str, or None.
        separator: str, of the columns.
    """
    table = read_tabular(path, task, target, categorical, separator, classes=True)
    return from_table(table, kind, metric)


def from_table(table, kind=None, metric=None):
    """The problem of a table whose rows belong to tasks.

    Args:
        table: `applications.tabular.Tabular`.
        kind: `"regression"`, `"binary"` or `"classes"`; None: binary if the target has two
            values, classes if it has more that are no numbers, else a regression.
        metric: a key of `METRICS`, or None.

    Returns:
        A `Problem`, of the tasks with four rows at least.
    """
    values, target = np.unique(table.target, return_inverse=True)
    named = table.target.dtype == object
    if kind is None:
        kind = BINARY if len(values) == 2 else CLASSES if named else REGRESSION
    if named and kind == REGRESSION:
        raise DataError("--kind regression: the target has no numbers.")
    if kind == BINARY and len(values) != 2:
        raise DataError(f"--kind binary: the target has {len(values)} values.")
    y = table.target if kind == REGRESSION else target
    rows, notes = {}, []
    for name, own in table.rows().items():
        if len(own) < LEAST:
            notes.append(f"{name}: left out, {len(own)} rows of at least {LEAST}.")
        elif kind == REGRESSION and np.ptp(y[own]) == 0:
            notes.append(f"{name}: left out, its target is always {y[own][0]:g}.")
        elif metric == "auc" and len(np.unique(y[own])) < 2:
            notes.append(f"{name}: left out, it has one class only.")
        else:
            rows[name] = own
    if table.renamed:
        notes.append(
            "Tasks are called "
            + ", ".join(f"{new} ({old})" for old, new in table.renamed.items())
            + "."
        )
    found = Problem(
        {
            str(t): table.features.iloc[own].reset_index(drop=True)
            for t, own in rows.items()
        },
        {str(t): y[own] for t, own in rows.items()},
        kinds={str(t): kind for t in rows},
        metric=metric,
        classes=len(values),
    )
    found.notes = notes
    return found


def present(values):
    """Which labels are known: not NaN, and not -1 of classes."""
    values = np.asarray(values)
    if np.issubdtype(values.dtype, np.floating):
        known = ~np.isnan(values)
    else:
        known = values != -1 if np.issubdtype(values.dtype, np.signedinteger) else None
    if known is None:
        return np.ones(len(values), bool)
    return known if known.ndim == 1 else known.all(axis=tuple(range(1, known.ndim)))


def _known(y, outputs):
    """The labels that are known, and their outputs."""
    known, outputs = present(y), np.asarray(outputs)
    return y[known], outputs[known]


def _check_arguments(x, y, backbone, metric):
    """Refuse what is no problem."""
    if not isinstance(y, Mapping) or not y:
        kind = type(y).__name__
        raise DataError(f"`y`: expected a dict from task to labels. Received: a {kind}.")
    if isinstance(x, Mapping) and set(x) != set(y):
        raise DataError(
            f"`x`: expected the examples of the tasks {list(y)}. Received: {list(x)}."
        )
    if metric is not None and metric not in METRICS:
        raise DataError(f"`metric`: expected one of {list(METRICS)}. Received: {metric!r}.")
    if backbone is not None and not callable(backbone):
        raise DataError(
            "`backbone`: expected a function that returns a Keras model. "
            f"Received: {backbone!r}."
        )
    for task, values in y.items():
        if np.asarray(values).dtype.kind not in "biuf":
            raise DataError(
                f"`y`, task {task!r}: expected numbers, classes as 0, 1, ... "
                f"Received: {np.asarray(values).dtype}."
            )


def _examples(x):
    return x if isinstance(x, pd.DataFrame) else np.asarray(x)


def _kind(values):
    """What a task is, by its labels; -1 is no class."""
    if np.issubdtype(values.dtype, np.floating):
        return REGRESSION
    return BINARY if values.ndim == 1 and values.max() <= 1 else CLASSES


def _default(kind):
    return "unexplained" if kind == REGRESSION else "error"
