"""What a search's tests need of each experiment, whose own test module has it."""

import typing

import numpy as np

# Every example has a number; those of the test part are 200 and more.
NUMBERS = np.arange(120)


class Case(typing.NamedTuple):
    """An experiment whose runs only write down which examples they are given.

    Attributes:
        method: str, a family that has many hyperparameters.
        arguments: list of str.
        seen: list of `(train, test, options)`, the numbers of the examples of each run.
        size: int, of the training part.
        error: float, the mean error of the tasks that is found.
        own_validation: bool, whether the data has a part for validation.
    """

    method: str
    arguments: list
    seen: list
    size: int
    error: float
    own_validation: bool = False


def replace(monkeypatch, experiment, data, run):
    """Give an experiment this data, and a `run` that trains nothing."""
    monkeypatch.setattr(experiment, "load", lambda options, console: data)
    monkeypatch.setattr(experiment, "run", run)
