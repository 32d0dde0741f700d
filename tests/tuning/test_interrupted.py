"""A search that ends at any write goes on as if nothing had happened."""

import argparse
import gc
import itertools
import math
import pathlib
import random
import shutil

import keras
import keras_tuner as kt
import pytest

from dmtrl_keras.distribution import make_strategy
from dmtrl_keras.ground.tables import make_console
from tuning import oracles, search, studies

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="searches run on TensorFlow"
)


class KilledError(BaseException):
    """Stands for the end of the process."""


class Study(studies.Study):
    """Trains nothing."""

    def __init__(self):
        super().__init__("own", ["sharing"], 0.25)
        self.options = argparse.Namespace(epochs=9, strategy=make_strategy("cpu"))

    def settings(self, hp):
        return dict(hp.values)

    def learn(self, options, validation, repeat, tick, callbacks):
        units = options.units if options.kind == "wide" else 1
        if units == 4:
            raise ValueError("too many")
        error = (options.x - 0.3) ** 2 / units + 1 / options.epochs
        return {"error": error, "cost": options.x}


def searched(folder, tuner):
    """The trials of a search: their values, how they ended, and what they found."""
    space = kt.HyperParameters()
    if tuner != "grid":
        space.Float("x", 0, 1)
    else:
        space.Choice("x", [0.0, 0.5])
    if space.Choice("kind", ["narrow", "wide"]):
        with space.conditional_scope("kind", ["wide"]):
            space.Int("units", 2, 4)
    objectives = [kt.Objective("error", "min")]
    if tuner == "two":
        tuner, objectives = "bayesian", [*objectives, kt.Objective("cost", "min")]
    trials = 5 if tuner == "bayesian" else 7
    oracle = oracles.make_oracle(tuner, space, objectives, trials, 0, 9)
    options = argparse.Namespace(
        directory=pathlib.Path(folder),
        repeats=1,
        patience=None,
        objectives=["error"],
        worker_timeout=1,
    )
    search.Search(Study(), oracle, options, make_console()).search()
    return {
        name: (one.hyperparameters.values, one.status, one.metrics.get_config())
        for name, one in oracle.trials.items()
    }


@pytest.mark.parametrize(
    ("tuner", "share"),
    [
        *((tuner, 0.1) for tuner in oracles.TUNERS),
        *(pytest.param(tuner, 1, marks=pytest.mark.long) for tuner in oracles.TUNERS),
        # All of its writes would take minutes.
        pytest.param("two", 0.1, marks=pytest.mark.long),
    ],
)
def test_at_any_write(tuner, share, tmp_path, monkeypatch, capsys):
    """Before or after each file takes its place: the trials are those of one go."""
    monkeypatch.setattr(gc, "collect", lambda: None)
    monkeypatch.setattr(keras.utils, "clear_session", lambda: None)
    monkeypatch.setattr(search, "_write_hparams", lambda *_: None)
    replace, writes, end = pathlib.Path.replace, [], None

    def counted(self, target):
        writes.append(pathlib.Path(target).name)
        if end == (len(writes), "before"):
            raise KilledError
        replace(self, target)
        if end == (len(writes), "after"):
            raise KilledError

    monkeypatch.setattr(pathlib.Path, "replace", counted)
    expected = searched(tmp_path / "whole", tuner)
    assert len(expected) >= 5 and list(expected) == sorted(expected)
    assert "COMPLETED" in {status for _, status, _ in expected.values()}
    ends = list(itertools.product(range(1, len(writes) + 1), ("before", "after")))
    random.Random(tuner).shuffle(ends)
    for chosen in ends[: math.ceil(share * len(ends))]:
        end = chosen
        writes.clear()
        with pytest.raises(KilledError):
            searched(tmp_path / "killed", tuner)
        end = None
        assert searched(tmp_path / "killed", tuner) == expected, (chosen, writes)
        shutil.rmtree(tmp_path / "killed")
