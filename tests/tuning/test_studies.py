"""What a search asks of each experiment: parts of the data, settings, configuration."""

import argparse
import importlib
import json

import keras_tuner as kt
import numpy as np
import pytest
from PIL import Image

from tuning import studies
from tuning.hypermodels import TUNABLE
from tuning.spaces import set_defaults


def make(name, monkeypatch, method=None, per_layer=True):
    """A study of an experiment, and its case (see `tests/applications/searching.py`)."""
    case = importlib.import_module(f"test_{name}").search_case(monkeypatch)
    method = method or case.method
    arguments = [name, method, case.arguments, TUNABLE, per_layer, 0.25]
    return studies.ExperimentStudy(*arguments), case


@pytest.mark.parametrize("name", studies.EXPERIMENTS)
def test_parts(name, monkeypatch):
    """Trials see nothing of the test part; at the end all training examples are used."""
    study, case = make(name, monkeypatch)
    seen, size = case.seen, case.size
    found = study.learn(study.options, True, 0, None, None)
    assert set(study.objectives) <= set(found)
    assert found["error"] == pytest.approx(case.error)
    ((train, valid, _),) = seen
    assert not set(np.asarray(train)) & set(np.asarray(valid))
    assert np.max(train) < 200 and np.max(valid) < 200
    if not case.own_validation:
        assert len(train) + len(valid) == size
        assert len(valid) == pytest.approx(0.25 * size, abs=1)
    study.learn(study.options, True, 1, None, None)
    if not case.own_validation:
        assert sorted(seen[1][1]) != sorted(valid)
    study.learn(study.options, False, 0, None, None)
    train, test, _ = seen[2]
    assert len(train) == size and np.min(test) >= 200
    assert sorted(train) == sorted([*seen[0][0], *([] if case.own_validation else valid)])


@pytest.mark.parametrize("name", studies.EXPERIMENTS)
def test_settings(name, monkeypatch, tmp_path):
    """The defaults are the experiment's; the file of the best settings gives them back."""
    study, _ = make(name, monkeypatch)
    hp = kt.HyperParameters()
    settings = study.settings(hp)
    options = study.with_settings(settings)
    for key, value in settings.items():
        default = getattr(study.options, key)
        if key == "loss_weights":
            assert value == dict.fromkeys(study.tasks(), 1.0)
        elif key in ("strengths", "learning_rates"):
            assert value[0] in default
        else:
            assert value == default, key
    # Others than the defaults, all at once.
    hp = kt.HyperParameters()
    hp.values = {"ranks": "layers", "thresholds": "blocks", "optimizer": "rmsprop"}
    settings = study.settings(hp)
    path = tmp_path / "best.json"
    path.write_text(json.dumps(study.config(settings)))
    options = study.experiment.parse(["--config", str(path)])
    assert options.methods == [*study.methods]
    for key, value in settings.items():
        assert getattr(options, key) == value, key
    assert options.optimizer == "rmsprop"
    for key, value in vars(study.options).items():
        if key not in {*settings, "methods", "strategy"}:
            assert getattr(options, key) == value, key
    assert study.command(path) == f"python -m applications.{name} --config {path}"


@pytest.mark.parametrize("name", studies.EXPERIMENTS)
def test_every_method_has_a_space(name, monkeypatch):
    for method in studies.families_of(name):
        study, _ = make(name, monkeypatch, method, per_layer=False)
        hp = kt.HyperParameters()
        study.settings(hp)
        assert {"optimizer", f"loss_weight/{study.tasks()[0]}"} <= set(hp.values)


@pytest.mark.parametrize("name", studies.EXPERIMENTS)
def test_all_methods(name, monkeypatch, tmp_path):
    """One space of all; the file of the settings has a method, and what is its own."""
    study, case = make(name, monkeypatch, ["all"])
    hp = kt.HyperParameters()
    study.declare(hp)
    assert hp.space[0].name == "method" and hp.space[0].values == study.methods
    assert len(study.methods) > 1
    for method in study.methods:
        set_defaults(hp, {"method": method})
        settings = study.settings(hp)
        alone, other = make(name, monkeypatch, method)[0], kt.HyperParameters()
        assert settings == {**alone.settings(other), "methods": [method]}
        # Nothing of others.
        assert study.own(hp.values) == {**other.values, "method": method}
    path = tmp_path / "best.json"
    path.write_text(json.dumps(study.config(settings)))
    assert study.experiment.parse(["--config", str(path)]).methods == [method]
    found = study.learn(study.with_settings(settings), True, 0, None, None)
    assert found["error"] == pytest.approx(case.error)


def test_methods_that_do_not_fit():
    """What the experiment itself leaves out."""
    tasks = ["--tasks", "one=sample", "two=sample", "--group", "own"]
    study = studies.ExperimentStudy("mtal", ["all"], tasks, TUNABLE, False, 0.25)
    assert set(study.left_out) == {"mtal_r"}
    assert "mtal_r" not in study.methods and "mtal" in study.methods


class Saved:
    """A model that is saved as its number; 0 can't be."""

    def __init__(self, number):
        self.number = number

    def save(self, path):
        if not self.number:
            raise ValueError("no config")
        path.write_text(str(self.number))


def test_models_are_kept(tmp_path):
    """The last one only; none that is not that of the settings."""
    study, path = studies.Study("laf", (), 0.25), tmp_path / "best.keras"
    for number in (1, 2):
        study.model = Saved(number)
        assert study.keep(tmp_path) == path and path.read_text() == str(number)
    study.model = Saved(0)
    with pytest.warns(UserWarning, match="could not be saved: no config"):
        assert study.keep(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    study.model = None
    assert study.keep(tmp_path) is None


def test_budget():
    """Hyperband's rounds, but never less than an experiment can train."""
    study = studies.ExperimentStudy("mnist", "tucker", [], TUNABLE, False, 0.25)
    assert study.with_settings({}, 5).epochs == 5
    assert study.with_settings({}, 1).epochs == 2
    assert study.options.epochs == 20


@pytest.mark.long
def test_early_stopping_sees_the_validation_part(tmp_path, rng):
    """One experiment in earnest: a network that gets worse and worse is stopped."""
    for label in range(2):
        for index in range(8):
            folder = tmp_path / f"{label}"
            folder.mkdir(exist_ok=True)
            image = rng.integers(0, 255, size=(8, 8)).astype("uint8")
            Image.fromarray(image).save(folder / f"{index}.png")
    tasks = [f"one=folder:{tmp_path}", f"two=folder:{tmp_path}"]
    arguments = ["--group", "own", "--tasks", *tasks, "--network", "vgg11", "--width", "1"]
    arguments += ["--size", "8", "--epochs", "6", "--batch-size", "4"]
    arguments += ["--learning-rate", "1"]
    study = studies.ExperimentStudy("mtal", "similar", arguments, TUNABLE, False, 0.25)
    epochs = []
    found = study.learn(study.options, True, 0, lambda: epochs.append(0), study.stopping(1))
    assert len(epochs) < 6 and 0 <= found["one_error"] <= 1


def test_plain():
    options = argparse.Namespace(a=(1, 2.5), b={"c": True})
    assert studies.plain(vars(options)) == {"a": [1, 2.5], "b": {"c": True}}
