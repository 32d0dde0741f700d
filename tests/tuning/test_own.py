"""A user's own data and backbone, as a search sees them."""

import json
import re

import keras
import keras_tuner as kt
import numpy as np
import pytest

from tuning import own as users
from tuning.hypermodels import TUNABLE
from tuning.spaces import set_defaults


def part(count, per_task=False):
    x = np.arange(count)[:, None] * np.ones(3)
    y = {"a": np.arange(count)[:, None] * 1.0, "b": np.arange(count)[:, None] * 1.0}
    if per_task:
        return {"a": x, "b": x[:8]}, {"a": y["a"], "b": y["b"][:8]}
    return x, y


def data(per_task=False, **others):
    found = {"train": part(20, per_task), "test": part(12, per_task)}
    return found | {"losses": {"a": "mse", "b": "mse"}, "heads": 1} | others


def backbone():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="fc")])


def own(monkeypatch, found, method="independent", *arguments):
    functions = {"m:backbone": backbone, "m:data": lambda: found}
    monkeypatch.setattr(users, "function_of", lambda name: functions[name])
    arguments = ["--data", "m:data", "--epochs", "1", "--batch-size", "4", *arguments]
    return users.Own(method, arguments, TUNABLE, False, 0.25, "m:backbone")


@pytest.mark.parametrize("per_task", [False, True])
def test_own_data(monkeypatch, per_task, few_steps):
    """Common inputs, or inputs of each task; with a validation part, or without."""
    study = own(monkeypatch, data(per_task))
    (x, y), (_, valid) = study._parts(True, 0)
    assert len(y["a"]) == 15 and len(valid["a"]) == 5
    assert not set(y["a"].ravel()) & set(valid["a"].ravel())
    if per_task:
        assert len(y["b"]) == 6 and len(valid["b"]) == 2
        np.testing.assert_array_equal(x["b"][:, :1], y["b"])
    else:
        np.testing.assert_array_equal(x[:, :1], y["b"])
    assert study._parts(False, 0)[1] is study._data["test"]
    given = own(monkeypatch, data(per_task, validation=part(4, per_task)))
    assert len(given._parts(True, 0)[1][1]["a"]) == 4
    hp = kt.HyperParameters()
    study.declare(hp)
    options = study.with_settings(study.settings(hp))
    found = study.learn(options, True, 0, lambda: None, study.stopping(1))
    expected = (found["val_a_loss"] + found["val_b_loss"]) / 2
    assert found["task_loss"] == pytest.approx(expected, rel=1e-5)
    x, y = study._parts(True, 0)[1]
    own_x = x["a"] if per_task else x
    outputs = study.model.predict({"a": own_x, "b": own_x} if per_task else x, verbose=0)
    error = np.mean((outputs["a"] - y["a"]) ** 2)
    assert found["val_a_loss"] == pytest.approx(error, rel=1e-4)
    assert set(study.objectives) <= set(found)


def test_several_families(monkeypatch):
    """`all` is what fits; a family's strength is its own where none is given."""
    study = own(monkeypatch, data(), ["all"], "--task-rank", "2")
    assert set(study.left_out) == {"cut", "similar", "laf", "lora"}
    assert study.family == "all" and study.describe()["method"] == study.methods
    assert study.firsts()[1] == {"method": "hard"}
    hp = kt.HyperParameters()
    study.declare(hp)
    set_defaults(hp, {"method": "trace"})
    settings = study.settings(hp)
    assert settings["trace/strength"] == 1e-3
    config = study.config(settings)
    weights = {"loss_weight/a", "loss_weight/b"}
    names = {"optimizer", "learning_rate/adam", "strength", *weights}
    assert config["method"] == "trace" and set(config["hyperparameters"]) == names
    per_task = own(monkeypatch, data(True), ["trn", "hard"])
    assert per_task.methods == ["hard"] and not per_task.several


def test_several_families_are_refused(monkeypatch, capsys):
    for methods, message in (
        (["own", "hard"], "as it is has no other family"),
        (["similar", "cut"], "none of the methods can be used.*no convolution"),
    ):
        with pytest.raises(SystemExit):
            own(monkeypatch, data(), methods)
        assert re.search(message, capsys.readouterr().err)


def test_model_that_is_none(monkeypatch, capsys):
    """A function that returns something else ends the program, in a line."""
    functions = {"m:backbone": dict, "m:data": data}
    monkeypatch.setattr(users, "function_of", lambda name: functions[name])
    for method in ("independent", "own"):
        if method == "own":
            functions["m:backbone"] = lambda hp: {}
        study = users.Own(method, ["--data", "m:data"], TUNABLE, False, 0.25, "m:backbone")
        with pytest.raises(SystemExit):
            study.declare(kt.HyperParameters())
        last = capsys.readouterr().err.splitlines()[-1]
        assert "--model m:backbone: expected a function that returns a Keras model" in last
        assert last.endswith("Received: dict.")


def test_functions_that_need_more(monkeypatch, capsys):
    """A line that names the function, whatever it is called with."""
    functions = {
        "m:backbone": lambda: None,
        "m:data": data,
        "json:dumps": json.dumps,
        "m:two": lambda hp, x: None,
        "m:number": 3,
    }
    monkeypatch.setattr(users, "function_of", lambda name: functions[name])
    for method, model, source, message in (
        ("laf", "json:dumps", "m:data", "--model json:dumps: expected .* no arguments"),
        ("own", "m:two", "m:data", "--model m:two: expected .*HyperParameters.*: 'x'"),
        ("own", "m:backbone", "m:data", "--model m:backbone: .*too many positional"),
        ("laf", "m:number", "m:data", "--model m:number: expected .* not a callable"),
        ("laf", "m:backbone", "m:two", "--data m:two: expected .*argument: 'hp'"),
    ):
        with pytest.raises(SystemExit):
            users.Own(method, ["--data", source], TUNABLE, False, 0.25, model)
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    study = users.Own("own", ["--data", "m:data"], TUNABLE, False, 0.25, "json:dumps")
    with pytest.raises(TypeError, match=r"^--model json:dumps: .* not JSON serializable"):
        study.declare(kt.HyperParameters())


@pytest.mark.parametrize(
    "found, message",
    [
        ({"train": part(4)}, r"expected a dict with \['losses', 'test', 'train'\]"),
        (data(extra=1), "expected a dict"),
        (data(losses={"a": "mse"}), r"must have labels .* for \['a'\]"),
        (data(train=(np.zeros((3, 3)), part(4)[1])), "as many labels as inputs"),
    ],
    ids=["absent", "unknown", "tasks", "lengths"],
)
def test_malformed_data(monkeypatch, found, message):
    with pytest.raises(ValueError, match=message):
        own(monkeypatch, found)
