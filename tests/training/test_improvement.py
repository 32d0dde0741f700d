"""Improvement over single tasks, in the logs of `fit`."""

import doctest

import keras
import numpy as np
import pytest

from dmtrl_keras import metrics, multitask
from dmtrl_keras.callbacks import TaskImprovement
from dmtrl_keras.training import improvement


@pytest.mark.parametrize("name", ["sensor2_loss", "accent_loss", "leaf1_mae", "previous"])
def test_names_of_tasks_are_no_metrics(name):
    """Only the end of a name says that more is better."""
    assert metrics.improvement({name: 0.2}, {name: 0.4}) == (50.0, 50.0)
    better = {f"{name}_accuracy": 0.6, f"{name}_auc_1": 0.6}
    mean, _ = metrics.improvement(better, dict.fromkeys(better, 0.5))
    assert mean == pytest.approx(20)


def test_example():
    assert doctest.testmod(improvement).failed == 0


def test_formula():
    """Signed relative distances, their mean and their least."""
    callback = TaskImprovement(
        {"val_age_mae": 4.0, "val_gender_accuracy": 0.8, "val_gain": -2.0}, ["val_gain"]
    )
    logs = {"val_age_mae": 3.0, "val_gender_accuracy": 0.6, "val_gain": -1.0, "loss": 1.0}
    callback.on_epoch_end(0, logs)
    # With names given, those alone are the ones of which more is better.
    gains = np.array([0.25, 0.25, 0.5])
    assert logs["val_improvement"] == pytest.approx(100 * gains.mean())
    assert logs["val_worst_improvement"] == pytest.approx(25)
    by_name = TaskImprovement({"age_mae": 4.0, "gender_accuracy": 0.8})
    assert by_name.higher == {"gender_accuracy"}
    logs = {"age_mae": 3.0, "gender_accuracy": 0.6}
    by_name.on_epoch_end(0, logs)
    assert logs["improvement"] == pytest.approx(0)
    assert logs["worst_improvement"] == pytest.approx(-25)


def network(rng):
    """A model of two tasks, compiled, and data."""
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    model = multitask(backbone, ["a", "b"], "hard", heads=1, verbose=False)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model, rng.normal(size=(8, 4)), {task: np.ones(8) for task in "ab"}


def test_in_training(rng, tmp_path):
    """Keras's callbacks act on it; epochs without validation are passed over."""
    model, x, y = network(rng)
    better = TaskImprovement({"val_a_loss": 0.1, "val_b_loss": 0.1})
    path = tmp_path / "best.weights.h5"
    others = [
        keras.callbacks.EarlyStopping("val_improvement", mode="max", patience=2),
        keras.callbacks.ModelCheckpoint(
            path,
            "val_worst_improvement",
            mode="max",
            save_best_only=True,
            save_weights_only=True,
        ),
    ]
    arguments = {"validation_data": (x, y), "verbose": 0, "epochs": 9}
    history = model.fit(x, y, callbacks=[better, *others], **arguments).history
    # Nothing is learned: the first epoch is the best.
    assert len(history["val_improvement"]) == 3 and path.exists()
    losses = np.array([history["val_a_loss"][0], history["val_b_loss"][0]])
    expected = 100 * (0.1 - losses) / 0.1
    assert history["val_improvement"][0] == pytest.approx(expected.mean(), rel=1e-5)
    assert history["val_worst_improvement"][0] == pytest.approx(expected.min(), rel=1e-5)
    history = model.fit(x, y, callbacks=[better], validation_freq=2, **arguments).history
    assert len(history["val_improvement"]) == 4


def test_refused(rng):
    """Names that are not in the logs, and values to which nothing is relative."""
    model, x, y = network(rng)
    wrong = TaskImprovement({"val_a_loss": 1.0, "val_c_loss": 1.0})
    with pytest.raises(ValueError, match=r"\['val_c_loss'\].*'val_b_loss'"):
        model.fit(x, y, validation_data=(x, y), callbacks=[wrong], verbose=0)
    for baseline, message in (
        ({}, "a dict from names"),
        ({"loss": 0.0}, "other than zero"),
        ({"loss": np.nan}, r"baseline\['loss'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskImprovement(baseline)
    with pytest.raises(ValueError, match=r"names of \['loss'\].*'acc'"):
        TaskImprovement({"loss": 1.0}, ["acc"])
