import keras_tuner as kt
import pytest

from tuning import spaces


def test_defaults_are_the_given_settings():
    """The first trial of a search is what would have been trained without one."""
    hp = kt.HyperParameters()
    tune = ("learning_rate", "loss_weights", "optimizer")
    assert spaces.optimizer_and_rate(hp, "sgd", 0.02, tune) == ("sgd", 0.02)
    assert spaces.loss_weights(hp, ["a", "b"], {"a": 2.0}, tune) == {"a": 2.0, "b": 1.0}
    assert spaces.factorization(hp, ["conv", "fc"], 0.1, True) == (0.1, None)
    assert spaces.threshold(hp, 0.55, ["one", "two"], True) == [0.55]
    assert spaces.prior(hp, 1e-2, 1e-3) == (1e-2, 1e-3)
    weights, momentum = spaces.relation(hp, {"output": 0.01, "hidden": 0.0}, 0.95)
    assert weights == {"output": 0.01, "hidden": 1e-3} and momentum == 0.95


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_rate_goes_with_the_optimizer(optimizer):
    """Each optimizer has a range of its own, SGD's ten times Adam's."""
    hp = kt.HyperParameters()
    hp.values = {"optimizer": optimizer}
    found = spaces.optimizer_and_rate(hp, "adam", 1e-3, ("optimizer", "learning_rate"))
    assert found == (optimizer, {"adam": 1e-3, "sgd": 1e-2}[optimizer])
    active = {one.name for one in hp.space if hp.is_active(one)}
    assert active == {"optimizer", f"learning_rate/{optimizer}"}
    fixed = kt.HyperParameters()
    fixed.values = {"optimizer": optimizer}
    assert spaces.optimizer_and_rate(fixed, "adam", 1e-3, ("optimizer",)) == found
    assert spaces.optimizer_and_rate(fixed, "adam", 1e-3, ()) == ("adam", 1e-3)


def test_per_layer():
    hp = kt.HyperParameters()
    hp.values = {"ranks": "layers", "rank/fc": 0.2}
    assert spaces.factorization(hp, ["conv", "fc"], 0.1, True) == (
        None,
        {"conv": 0.5, "fc": 0.2},
    )
    hp = kt.HyperParameters()
    hp.values = {"thresholds": "blocks", "threshold/two": 0.8}
    assert spaces.threshold(hp, 0.4, ["one", "two"], True) == [0.4, 0.8]
    hp = kt.HyperParameters()
    assert spaces.factorization(hp, ["conv"], 0.1, False) == (0.1, None)
    assert spaces.threshold(hp, 0.4, ["one"], False) == [0.4]
    assert {one.name for one in hp.space} == {"tolerance", "threshold"}


@pytest.mark.parametrize("default", [0.005, 0.9])
def test_unusual_defaults_are_in_the_range(default):
    hp = kt.HyperParameters()
    assert spaces.factorization(hp, [], default, False)[0] == default
    assert spaces.threshold(hp, default, [], False) == [default]
