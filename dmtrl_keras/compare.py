"""Which method for my tasks: `python -m dmtrl_keras.compare`, or `compare(x, y)`.

What it needs beside the library: `pip install "dmtrl_keras[compare]"`.
"""

import importlib
from typing import Any


def _room(name: str) -> Any:
    """A module of the comparison: of the installed package, or of a checkout."""
    try:
        return importlib.import_module(f"dmtrl_keras.tuning.comparison.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("dmtrl_keras.tuning"):
            raise
    return importlib.import_module(f"tuning.comparison.{name}")


def compare(x: Any, y: Any = None, folder: Any = None, **arguments: Any) -> Any:
    """Train all methods that fit on the same examples, and say which one to use.

    Settings are chosen on a part of the training examples, with equally many trials for
    every method (Keras Tuner's Hyperband); then each method is trained on the same random
    draws, and tested. The recommendation is the simplest method that is not worse than the
    best by more than chance and 2%, so that sharing is recommended only where it pays.

    Args:
        x: dict from task to its examples, arrays or data frames; or an array, the same
            examples for all tasks; or all that in one, a `Problem`.
        y: dict from task to labels: floats are regressions, ints classes; of a `Problem`
            nothing.
        folder: where results are written as they come, and found again by a later call;
            None: nowhere.
        **arguments: `methods`, `baseline`, `trials`, `repeats`, `epochs`, `batch_size`,
            `validation` and `test` (shares), `seed`, `budget` (minutes), `fractions` (for a
            learning curve); `test_data` (`(x, y)`), `kinds` by
            task, `backbone` (a function that returns a Keras model), `metric`.

    Returns:
        An object with data frames (`table`, `by_task`, `curve`), `recommendation`,
        `sentence`, and `chosen`, the hyperparameters of each method, for `train`.

    Raises:
        DataError: a `ValueError`, on data in another form.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.compare import compare
    >>> rng = np.random.default_rng(0)
    >>> x = {school: rng.normal(size=(30, 4)) for school in ("north", "south", "west")}
    >>> y = {school: rows @ [1.0, 2.0, 0.0, -1.0] for school, rows in x.items()}
    >>> found = compare(x, y, methods=["ridge", "pooled"], repeats=2, trials=2)
    >>> list(found.table.index)
    ['ridge', 'pooled']
    """
    return _room("compared").compare(x, y, folder, **arguments)


def Problem(x: Any, y: Any, **arguments: Any) -> Any:
    """Tasks with their examples, for `train`; `x`, `y` and the rest as for `compare`."""
    return _room("problem").Problem(x, y, **arguments)


def table_problem(
    path: Any,
    task: str,
    target: str,
    kind: str | None = None,
    categorical: Any = (),
    metric: str | None = None,
    separator: str = ",",
) -> Any:
    """The problem of a CSV file, a row for each example.

    Args:
        path: path of the file.
        task: the column that says of which task a row is.
        target: the column to be predicted.
        kind: `"regression"`, `"binary"` or `"classes"`; None: binary if the target has two
            values, classes if it has more that are no numbers, else a regression.
        categorical: columns that are categories although they look like numbers.
        metric: as for `compare`.
        separator: what is between the columns.

    Raises:
        DataError: a `ValueError`, on what can't be read, with the row.
    """
    return _room("problem").table_problem(
        path, task, target, kind, categorical, metric, separator
    )


def experiment_problem(name: str, folder: Any = None) -> Any:
    """A small part of one of the data sets that this project's experiments are on.

    Args:
        name: `"digits"`, `"omniglot"` (ten alphabets), `"school"`, `"faces"` (attributes of
            1,500 of MTFL's), `"office_caltech"`, `"outlier"` (the same, one domain
            contradicts the others), `"mtal"` (digits and letters), `"mtal_unrelated"`
            (digits and objects).
        folder: path of the data, as for the experiment; of the digits none is needed.

    Raises:
        DataError: a `ValueError`, on an unknown name, on what can't be read.
    """
    return _room("experiments").problem_of(name, folder)


def train(
    problem: Any,
    method: str,
    values: Any,
    epochs: int = 30,
    batch_size: int = 32,
    seed: int = 0,
) -> Any:
    """Train one method on all examples of a problem: the one that `compare` recommends.

    Args:
        problem: as from `Problem` or `table_problem`.
        method: its name.
        values: dict of its hyperparameters, as in a comparison's `chosen`.
        epochs: of networks; at least 600 steps in all, for which few examples are repeated.
        batch_size: likewise.
        seed: likewise.

    Returns:
        An object with `predict`, a function from a dict of examples by task to a dict of
        outputs (logits of classes), and `model`, the Keras model of a network, else None.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.compare import Problem, train
    >>> rng = np.random.default_rng(0)
    >>> x = {school: rng.normal(size=(30, 4)) for school in ("north", "south")}
    >>> y = {school: rows @ [1.0, 2.0, 0.0, -1.0] for school, rows in x.items()}
    >>> trained = train(Problem(x, y), "ridge", {"strength": 0.1})
    >>> trained.predict(x)["north"].shape
    (30, 1)
    """
    return _room("search").train(problem, method, values, epochs, batch_size, seed)


def report(what: Any, path: Any = None) -> Any:
    """A page of tables and figures, of a comparison or of any network of several tasks.

    Of a comparison: the methods, the learning curve, who gains and who loses, what was
    learned of the tasks. Of a network: what every layer shares and costs (`task_summary`),
    the sharing strength of its layers (DMTRL Eq. 9) beside what chance makes, similar
    kernels (MTAL Eq. 3-6), and as heat maps with the tasks' names the correlations that
    priors learned (DRN Eq. 8, 13), the weights of Cross-Stitch and NDDR, TRN's similarities
    (Eq. 13).

    Args:
        what: what `compare` returned, or a built Keras model: a `MultiTaskModel`, a
            `TaskRelationModel`, or any other; one without layers of several tasks has
            nothing to report, which the page says.
        path: path of the HTML file to write, one file that needs no network; None: none.

    Returns:
        An object that shows itself in a notebook; `html` is the page as a string, and
        `write(path)` writes it.

    Raises:
        ValueError: on what is neither, on a model that is not built, on kernels with values
            that are not finite where a prior learned from them.

    Example:

    >>> import keras
    >>> from dmtrl_keras import MultiTaskModel, layers
    >>> from dmtrl_keras.compare import report
    >>> inputs, tasks = keras.Input((8,)), ["age", "pose"]
    >>> x = layers.TuckerDense(16, tasks=2, rank=2, shared_input=True, name="fc")(inputs)
    >>> outputs = layers.TaskSplit(tasks)(layers.CrossStitch(tasks)(x))
    >>> page = report(MultiTaskModel(inputs, outputs, name="faces"))
    >>> page.title, "sharing strength" in page.html.lower()
    ('What the tasks of faces share', True)
    """
    return _room("report").report(what, path)


if __name__ == "__main__":
    _room("command").main()
