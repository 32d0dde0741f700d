"""What a search asks of each experiment: parts of the data, settings, configuration."""

import argparse
import json

import keras_tuner as kt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from applications import celeba, digits, domains, image_tasks, mnist, mtal, mtfl
from applications import office_caltech as office
from tuning import studies
from tuning.hypermodels import TUNABLE

NUMBERS = np.arange(120)


# Each case replaces an experiment's data, and its `run` by one that writes down which
# examples it is given. Returns the arguments, that list, and the size of the training part.


def replace(monkeypatch, module, data, run):
    monkeypatch.setattr(module.EXPERIMENT, "load", lambda options, console: data)
    monkeypatch.setattr(module.EXPERIMENT, "run", run)


def mnist_case(monkeypatch):
    labels = np.arange(120) % 10
    images = np.broadcast_to(NUMBERS[:, None, None, None], (120, 28, 28, 1)).astype("uint8")
    tests = images[:20] + 200, labels[:20]
    small = digits.Digits("own", images, labels, *tests)

    def run(options, method, part, seed, tick, callbacks):
        numbers = (x[:, 0, 0, 0] for x in (part.train_images, part.test_images))
        seen.append((*numbers, options))
        return {
            "multiclass_error": 0.3,
            "binary_error": 0.1,
            "parameters": 10,
            "seconds": 1.0,
        }

    seen = []
    replace(monkeypatch, mnist, small, run)
    return ["--fraction", "0.001", "--epochs", "4"], seen, 60


def mtal_case(monkeypatch):
    tasks = {
        name: image_tasks.ImageTask(
            np.broadcast_to(NUMBERS[:, None, None, None], (120, 8, 8, 1)).astype("uint8"),
            NUMBERS % classes,
            [str(number) for number in range(classes)],
        )
        for name, classes in (("mnist", 10), ("coil20", 4), ("amazon", 3))
    }

    def run(options, method, part, seed, tick, callbacks):
        tasks, parts = part
        train, test = parts["coil20"]
        numbers = tasks["coil20"].images[:, 0, 0, 0]
        # The test part is what the experiment itself would test on.
        held = np.isin(test, mtal.split(tasks, options, seed)["coil20"][1])
        seen.append((numbers[train], numbers[test] + 200 * held.all(), options))
        accuracy = {name: 0.75 for name in tasks}
        return {"accuracy": accuracy, "parameters": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, mtal, tasks, run)
    return ["--group", "unrelated", "--network", "vgg11"], seen, 84


def faces(count, offset):
    numbers = np.arange(count) + offset
    landmarks = np.tile([0.3, 0.7, 0.5, 0.35, 0.65, 0.3, 0.3, 0.5, 0.7, 0.7], (count, 1))
    images = np.zeros((count, 8, 8, 3), "uint8")
    return mtfl.Faces(images, landmarks.astype("float32"), numbers % 5 + 10 * numbers)


def mtfl_case(monkeypatch):
    parts = (faces(100, 0), faces(20, 200), "digest")
    # Mirroring would change the poses, which are numbers here.
    monkeypatch.setattr(mtfl, "cut_out", lambda faces, extent, rng: faces)

    def run(options, method, part, seed, tick, callbacks):
        training, testing = part
        seen.append((training.pose // 10, testing.pose // 10, options))
        return {"error": 0.2, "accuracy": 0.6, "weights": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, mtfl, parts, run)
    return ["--data", "x"], seen, 100


def office_case(monkeypatch):
    own = {
        name: domains.Domain(NUMBERS[:, None] * 1.0, NUMBERS % 10) for name in ("a", "b")
    }
    classes = [str(number) for number in range(10)]
    loaded = (own, classes, lambda: (1,), {"data": "own"})

    def run(options, method, part, seed, tick, callbacks):
        _, parts = part
        train, test = parts["a"]
        whole = domains.draw(own, options.fractions[0], seed, options.stratified)
        held = np.isin(test, whole["a"][1])
        seen.append((train, test + 200 * held.all(), options))
        return {"accuracy": {"a": 0.5, "b": 0.7}, "parameters": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, office, loaded, run)
    return ["--features", "x", "--fractions", "0.5"], seen, 60


def celeba_case(monkeypatch):
    names = ["Bald", "Hat"]

    def part(numbers):
        labels = pd.DataFrame({name: np.array(numbers) for name in names})
        return celeba.Images(None, labels, np.zeros((len(labels), 8, 8, 3), "uint8"))

    parts = {
        "train": part(range(100)),
        "validation": part(range(100, 120)),
        "test": part(range(200, 220)),
    }

    def run(options, method, part, seed, tick, callbacks):
        parts, names = part
        seen.append((parts["train"].labels.Bald, parts["test"].labels.Bald, options))
        each = {name: 0.25 for name in names}
        return {"error": each, "precision": each, "parameters": 10, "seconds": 1.0}

    seen = []
    replace(monkeypatch, celeba, parts, run)
    return ["--data", "x"], seen, 100


CASES = {
    "mnist": (mnist_case, "tucker"),
    "mtal": (mtal_case, "similar"),
    "mtfl": (mtfl_case, "trn"),
    "office_caltech": (office_case, "mrn"),
    "celeba": (celeba_case, "trn"),
}


def make(name, monkeypatch, method=None, per_layer=True):
    case, own = CASES[name]
    arguments, seen, size = case(monkeypatch)
    study = studies.ExperimentStudy(
        name, method or own, arguments, TUNABLE, per_layer, 0.25
    )
    return study, seen, size


def test_every_experiment_is_here():
    assert set(CASES) == set(studies.EXPERIMENTS)


@pytest.mark.parametrize("name", sorted(CASES))
def test_parts(name, monkeypatch):
    """Trials see nothing of the test part; at the end all training examples are used."""
    study, seen, size = make(name, monkeypatch)
    found = study.learn(study.options, True, 0, None, None)
    assert set(study.objectives) <= set(found)
    tasks = {"mnist": 0.1, "mtal": 0.25, "mtfl": 0.3, "office_caltech": 0.4, "celeba": 0.25}
    assert found["error"] == pytest.approx(tasks[name])
    ((train, valid, _),) = seen
    assert not set(np.asarray(train)) & set(np.asarray(valid))
    assert np.max(train) < 200 and np.max(valid) < 200
    if name != "celeba":
        assert len(train) + len(valid) == size
        assert len(valid) == pytest.approx(0.25 * size, abs=1)
    study.learn(study.options, True, 1, None, None)
    if name != "celeba":
        assert sorted(seen[1][1]) != sorted(valid)
    study.learn(study.options, False, 0, None, None)
    train, test, _ = seen[2]
    assert len(train) == size and np.min(test) >= 200
    assert sorted(train) == sorted([*seen[0][0], *(valid if name != "celeba" else [])])


@pytest.mark.parametrize("name", sorted(CASES))
def test_settings(name, monkeypatch, tmp_path):
    """The defaults are the experiment's; the file of the best settings gives them back."""
    study, *_ = make(name, monkeypatch)
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
    assert options.methods == [study.method]
    for key, value in settings.items():
        assert getattr(options, key) == value, key
    assert options.optimizer == "rmsprop"
    for key, value in vars(study.options).items():
        if key not in {*settings, "methods", "strategy"}:
            assert getattr(options, key) == value, key
    assert study.command(path) == f"python -m applications.{name} --config {path}"


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_method_has_a_space(name, monkeypatch):
    for method in studies.families_of(name):
        study, *_ = make(name, monkeypatch, method, per_layer=False)
        hp = kt.HyperParameters()
        study.settings(hp)
        assert {"optimizer", f"loss_weight/{study.tasks()[0]}"} <= set(hp.values)


def test_budget():
    """Hyperband's rounds, but never less than an experiment can train."""
    study = studies.ExperimentStudy("mnist", "tucker", [], TUNABLE, False, 0.25)
    assert study.with_settings({}, 5).epochs == 5
    assert study.with_settings({}, 1).epochs == 2
    assert study.options.epochs == 20


def test_early_stopping_sees_the_validation_part(tmp_path, rng):
    """One experiment in earnest: a network that can't improve is stopped."""
    for label in range(2):
        for index in range(8):
            folder = tmp_path / f"{label}"
            folder.mkdir(exist_ok=True)
            image = rng.integers(0, 255, size=(8, 8)).astype("uint8")
            Image.fromarray(image).save(folder / f"{index}.png")
    tasks = [f"one=folder:{tmp_path}", f"two=folder:{tmp_path}"]
    arguments = ["--group", "own", "--tasks", *tasks, "--network", "vgg11", "--width", "1"]
    arguments += ["--size", "8", "--epochs", "6", "--batch-size", "4"]
    arguments += ["--learning-rate", "1e-12"]
    study = studies.ExperimentStudy("mtal", "similar", arguments, TUNABLE, False, 0.25)
    epochs = []
    found = study.learn(study.options, True, 0, lambda: epochs.append(0), study.stopping(1))
    assert len(epochs) < 6 and 0 <= found["one_error"] <= 1


def test_plain():
    options = argparse.Namespace(a=(1, 2.5), b={"c": True})
    assert studies.plain(vars(options)) == {"a": [1, 2.5], "b": {"c": True}}
