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


def compare(x: Any, y: Any, folder: Any = None, **arguments: Any) -> Any:
    """Train all methods that fit on the same examples, and say which one to use.

    Settings are chosen on a part of the training examples, with equally many trials for
    every method (Keras Tuner's Hyperband); then each method is trained on the same random
    draws, and tested. The recommendation is the simplest method that is not worse than the
    best by more than chance and 2%, so that sharing is recommended only where it pays.

    Args:
        x: dict from task to its examples, arrays or data frames; or an array, the same
            examples for all tasks.
        y: dict from task to labels: floats are regressions, ints classes.
        folder: where results are written as they come, and found again by a later call;
            None: nowhere.
        **arguments: `methods`, `baseline`, `trials`, `repeats`, `epochs`, `batch_size`,
            `validation` and `test` (shares), `seed`; `test_data` (`(x, y)`), `kinds` by
            task, `backbone` (a function that returns a Keras model), `metric`.

    Returns:
        An object with data frames (`table`, `by_task`), `recommendation`, `sentence`.

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


if __name__ == "__main__":
    _room("command").main()
