import keras_tuner as kt
import pytest

from tuning.spaces import Space, explore, of_method


def test_defaults_are_the_given_settings():
    """The first trial of a search is what would have been trained without one."""
    hp = kt.HyperParameters()
    tune = ("learning_rate", "loss_weights", "optimizer")
    space = Space(hp, tune, per_layer=True)
    assert space.optimizer_and_rate("sgd", 0.02) == ("sgd", 0.02)
    assert space.loss_weights(lambda: ["a", "b"], {"a": 2.0}) == {"a": 2.0, "b": 1.0}
    assert space.factorization(["conv", "fc"], 0.1) == (0.1, None)
    assert space.threshold(0.55, ["one", "two"]) == [0.55]
    assert space.prior(1e-2, 1e-3) == (1e-2, 1e-3)
    assert space.integer("shared", 1, 3, 2) == 2
    weights, momentum = space.relation({"output": 0.01, "hidden": 0.0}, 0.95)
    assert weights == {"output": 0.01, "hidden": 1e-3} and momentum == 0.95


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_rate_goes_with_the_optimizer(optimizer):
    """Each optimizer has a range of its own, SGD's ten times Adam's."""
    hp = kt.HyperParameters()
    hp.values = {"optimizer": optimizer}
    found = Space(hp, ("optimizer", "learning_rate")).optimizer_and_rate("adam", 1e-3)
    assert found == (optimizer, {"adam": 1e-3, "sgd": 1e-2}[optimizer])
    active = {one.name for one in hp.space if hp.is_active(one)}
    assert active == {"optimizer", f"learning_rate/{optimizer}"}
    fixed = kt.HyperParameters()
    fixed.values = {"optimizer": optimizer}
    assert Space(fixed, ("optimizer",)).optimizer_and_rate("adam", 1e-3) == found
    assert Space(fixed).optimizer_and_rate("adam", 1e-3) == ("adam", 1e-3)


def test_per_layer():
    hp = kt.HyperParameters()
    hp.values = {"ranks": "layers", "rank/fc": 0.2}
    found = Space(hp, per_layer=True).factorization(["conv", "fc"], 0.1)
    assert found == (None, {"conv": 0.5, "fc": 0.2})
    hp = kt.HyperParameters()
    hp.values = {"thresholds": "blocks", "threshold/two": 0.8}
    assert Space(hp, per_layer=True).threshold(0.4, ["one", "two"]) == [0.4, 0.8]
    hp = kt.HyperParameters()
    assert Space(hp).factorization(["conv"], 0.1) == (0.1, None)
    assert Space(hp).threshold(0.4, ["one"]) == [0.4]
    assert {one.name for one in hp.space} == {"tolerance", "threshold"}


def test_task_rank():
    """Searched with ranks by layer; of two tasks there is nothing to choose."""
    hp = kt.HyperParameters()
    hp.values = {"ranks": "layers"}
    space = Space(hp, per_layer=True)
    space.factorization(["fc"], 0.1)
    assert space.task_rank(2) is None and space.task_rank(5, 0.5) == 0.5
    assert Space(hp).task_rank(5, 3) == 3
    assert "task_rank" not in {one.name for one in hp.space}
    assert space.task_rank(5) == 5
    (own,) = (one for one in hp.space if one.name == "task_rank")
    assert (own.min_value, own.max_value) == (2, 5)


def test_one_of_several_methods():
    """What a method declares is active only with it, and has its name before its own."""
    declared = {
        "prior": lambda space: space.prior(0.1, 0.01),
        "none": lambda space: (),
        "layers": lambda space: space.factorization(["fc"], 0.2),
    }

    def declare(hp):
        space = Space(hp, per_layer=True)
        return space.chosen(list(declared), lambda name: declared[name](space))

    hp = kt.HyperParameters()
    explore(hp, declare, list(declared))
    assert hp.space[0].name == "method"
    assert hp.values == {"method": "prior", "prior/strength": 0.1, "prior/epsilon": 0.01}
    assert [one.name for one in hp.space[3:]] == [
        f"layers/{name}" for name in ("ranks", "tolerance", "rank/fc")
    ]
    values = {"method": "layers", "layers/ranks": "layers", "layers/rank/fc": 0.3}
    hp.values = dict(values)
    assert declare(hp) == ("layers", (None, {"fc": 0.3}))
    assert {one.name for one in hp.space if hp.is_active(one)} == set(values)
    assert of_method(values) == {"method": "layers", "ranks": "layers", "rank/fc": 0.3}


def test_one_method_has_nothing_to_choose():
    hp = kt.HyperParameters()
    space = Space(hp)
    found = space.chosen(["one"], lambda name: space.around(name, 1.0, 2))
    assert found == ("one", 1.0) and hp.values == {"one": 1.0}


def test_tasks_are_asked_for_where_they_are_needed():
    """Their names may need data that is not loaded yet."""
    assert Space(kt.HyperParameters()).loss_weights(None, {"a": 2.0}) == {"a": 2.0}


@pytest.mark.parametrize("default", [0.005, 0.9])
def test_unusual_defaults_are_in_the_range(default):
    hp = kt.HyperParameters()
    assert Space(hp).factorization([], default)[0] == default
    assert Space(hp).threshold(default, []) == [default]
