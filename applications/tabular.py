"""Tables of many tasks: from MATLAB and CSV files to numbers.

A row is an example, and one of its columns says of which task. Columns of numbers and of
categories may be mixed, and values may be missing; what fills them in, and how columns are
scaled, comes from the rows that are trained on.
"""

import csv
import io
import pathlib

import numpy as np
import pandas as pd
import scipy.io
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from dmtrl_keras.ground.validation import possible_task_names

from .reading import DataError, check_size, read_text, reading, shortened

# What stands for a missing value, in lower case.
MISSING = ("", "?", "n/a", "na", "nan", "none", "null")
# Categories of a column beyond the most frequent ones are one category.
MOST_CATEGORIES = 20
MOST_BYTES = 2**28


class Tabular:
    """Examples of many tasks.

    Attributes:
        features: data frame; categories are columns of objects, numbers of floats.
        target: float array; of objects, if it names classes.
        tasks: array of strings, the task of each row.
        renamed: dict from the names of tasks in the file to those here, where they differ.
    """

    def __init__(self, features, target, tasks, renamed=None):
        self.features = features
        self.target = target
        self.tasks = tasks
        self.renamed = renamed or {}

    @property
    def names(self):
        """The names of the tasks, in the order of their first rows."""
        return list(dict.fromkeys(self.tasks))

    def rows(self):
        """The rows of each task, a dict of int arrays."""
        numbers = pd.Series(np.arange(len(self.tasks)))
        groups = numbers.groupby(self.tasks, sort=False)
        return {name: own.to_numpy() for name, own in groups}


def read_tabular(
    path, task=None, target=None, categorical=(), separator=",", classes=False
):
    """Read a file of examples.

    Args:
        path: path of a `.mat` or a text file.
        task: str, the column that names a row's task.
        target: str, the column to predict.
        categorical: names of columns that are categories although they look like numbers.
        separator: str, of the columns.
        classes: bool, whether a target without numbers names classes; else it is an error.

    Returns:
        A `Tabular`. Its tasks are called as in the file, but that what TensorFlow takes in
        no name of a task is `_`.

    Raises:
        DataError: with file and row or task, on what can't be read.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() == ".mat":
        return _read_mat(path)
    if task is None or target is None:
        raise DataError(f"{path}: a CSV file needs --task COLUMN and --target COLUMN.")
    return _read_csv(path, task, target, categorical, separator, classes)


def _read_mat(path):
    """Cells `X` and `Y`, of which each pair is a task: features `(n, d)` and targets."""
    with reading(path):
        check_size(path, path.stat().st_size, MOST_BYTES)
        content = scipy.io.loadmat(path, variable_names=["X", "Y"])
        cells = [np.ravel(content[name]) for name in ("X", "Y")]
    if not all(cell.dtype == object for cell in cells) or not len(cells[0]):
        raise DataError(f"{path}: expected cells X and Y with an array for each task.")
    if len(cells[0]) != len(cells[1]):
        counts = " and ".join(str(len(cell)) for cell in cells)
        raise DataError(f"{path}: expected as many tasks in X as in Y. Received: {counts}.")
    width, features, targets, tasks = None, [], [], []
    for number, (x, y) in enumerate(zip(*cells), start=1):
        where = f"{path}, task {number}"
        if x.dtype.kind not in "biuf" or y.dtype.kind not in "biuf" or x.ndim != 2:
            raise DataError(f"{where}: expected arrays of numbers in X and Y.")
        width = x.shape[1] if width is None else width
        if not len(x) or x.shape[1] != width or y.size != len(x):
            raise DataError(
                f"{where}: expected X of shape (n, {width}) and Y with n values. "
                f"Received: {x.shape} and {y.shape}."
            )
        y = y.astype(float).ravel()
        if not np.all(np.isfinite(y)) or np.any(np.isinf(x.astype(float))):
            raise DataError(f"{where}: expected finite values.")
        features.append(x.astype(float))
        targets.append(y)
        tasks += [f"task_{number}"] * len(x)
    frame = pd.DataFrame(np.concatenate(features))
    frame.columns = [f"feature_{column}" for column in range(1, width + 1)]
    return Tabular(frame, np.concatenate(targets), np.array(tasks, dtype=object))


def _read_csv(path, task, target, categorical, separator, classes):
    frame = _frame(path, separator)
    wanted = [task, target, *categorical]
    unknown = sorted(set(wanted) - set(frame))
    if unknown:
        raise DataError(
            f"{path}: there is no column {', '.join(map(repr, unknown))}. The columns, "
            f"separated by {separator!r}, are {shortened(str(list(frame)), 200)}."
        )
    if task == target:
        raise DataError(
            f"{path}: expected different columns for --task and --target, of "
            f"{shortened(str(list(frame)), 200)}. Received: {wanted}."
        )
    names = frame.pop(task)
    _refuse(path, task, names, names.isna(), "a task in every row")
    found = frame.pop(target)
    named = classes and not _is_numeric(found)
    if not named:
        found = _numbers(path, target, found)
    what = "a class" if named else "a number"
    _refuse(path, target, found, found.isna(), f"{what} in every row")
    columns = {}
    for name, column in frame.items():
        if name in categorical or not _is_numeric(column):
            columns[name] = column.astype(object)
        else:
            columns[name] = _numbers(path, name, column)
    if not columns:
        raise DataError(f"{path}: expected a column besides {task!r} and {target!r}.")
    values = found.to_numpy(object if named else float, copy=True)
    features = pd.DataFrame(columns).reset_index(drop=True)
    renamed = possible_task_names(list(dict.fromkeys(names)))
    names = names.replace(renamed)
    return Tabular(features, values, names.to_numpy(object), renamed)


def _frame(path, separator):
    """A data frame of strings, with NaN where a value is missing; rows count from 1."""
    text = read_text(path)
    with reading(path):
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header, values, places = None, [], []
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [cell.strip() for cell in row]
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}, row {rows.line_num}: expected {len(header)} values, as many "
                    f"as the first row has names. Received: {len(row)}."
                )
            values.append([cell.strip() for cell in row])
            places.append(rows.line_num)
    if not values:
        raise DataError(f"{path}: expected a row of names and at least one of values.")
    if "" in header or len(set(header)) < len(header):
        raise DataError(
            f"{path}, row 1: expected a name of its own for each column. Received: "
            f"{shortened(str(header), 200)}."
        )
    frame = pd.DataFrame(values, columns=header, index=places, dtype=object)
    return frame.where(~frame.apply(lambda column: column.str.lower().isin(MISSING)))


def _is_numeric(column):
    """Whether most of what a column has are numbers."""
    given = column.dropna()
    return pd.to_numeric(given, errors="coerce").notna().mean() > 0.5 or not len(given)


def _numbers(path, name, column):
    """A column of strings as floats; a cell that is no number is an error."""
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    wrong = (numbers.isna() & column.notna()) | np.isinf(numbers)
    what = "finite numbers (--categorical is for columns of categories)"
    _refuse(path, name, column, wrong, what)
    return numbers


def _refuse(path, name, column, wrong, expected):
    if wrong.any():
        row = wrong.idxmax()
        raise DataError(
            f"{path}, row {row}, column {shortened(name)!r}: expected {expected}. "
            f"Received: {shortened(str(column[row]))!r}."
        )


def make_encoder(features):
    """What makes arrays of features, to be fitted on rows that are trained on.

    Numbers: missing ones become the median, and a column says where that was so; then
    all have mean zero and variance one. Categories: a column for each, rare and new ones
    have none.

    Args:
        features: data frame, whose dtypes say what is what.
    """
    numbers = list(features.select_dtypes("number"))
    categories = [name for name in features if name not in numbers]
    median = SimpleImputer(add_indicator=True, strategy="median", keep_empty_features=True)
    known = SimpleImputer(strategy="constant", fill_value="missing", missing_values=np.nan)
    one_hot = OneHotEncoder(
        handle_unknown="infrequent_if_exist",
        max_categories=MOST_CATEGORIES,
        sparse_output=False,
    )
    columns = ColumnTransformer(
        [
            ("numbers", median, numbers),
            ("categories", make_pipeline(known, one_hot), categories),
        ]
    )
    return make_pipeline(columns, StandardScaler())


def split_rows(rows, fraction, seed):
    """Training and test rows, each task by itself.

    Args:
        rows: dict from task to an int array.
        fraction: float, the share of each task to train on, at least one row.
        seed: int.

    Returns:
        `(train, test)`, dicts from task to int arrays; a task with one row is not tested.
    """
    rng = np.random.default_rng(seed)
    train, test = {}, {}
    for name, own in rows.items():
        order = own[rng.permutation(len(own))]
        count = min(max(round(fraction * len(own)), 1), max(len(own) - 1, 1))
        train[name], test[name] = order[:count], order[count:]
    return train, test


def fold_numbers(train, folds, seed):
    """The fold of each training row, a dict of int arrays.

    A task's only row is in none (-1), so that each task is always trained on something.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, own in train.items():
        numbers = rng.permutation(len(own)) % folds
        found[name] = numbers if len(own) > 1 else np.full(1, -1)
    return found
