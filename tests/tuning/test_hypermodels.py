"""The hypermodels of the families, also with Keras Tuner's own tuners."""

import doctest
import functools

import keras
import keras_tuner as kt
import numpy as np
import pytest

from dmtrl_keras import TaskRelationModel, parameterizations, task_layers
from dmtrl_keras.layers import NDDR, CrossStitch
from dmtrl_keras.regularizers import MeanDeviation, TraceNorm
from tuning import hypermodels
from tuning.hypermodels import FAMILIES, TUNABLE, BalancedSharing, Several
from tuning.spaces import explore, of_method, set_defaults

TASKS = {"a": "mse", "b": "mse"}


def backbone():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(3, 3, activation="relu", name="conv"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(4, "relu", name="fc"),
        ]
    )


def test_examples():
    assert doctest.testmod(hypermodels).failed == 0


@pytest.mark.parametrize("method", sorted(FAMILIES))
def test_every_family(method):
    """All is declared in one call, defaults are the settings, and values are used."""
    hypermodel = FAMILIES[method](
        method, backbone, TASKS, heads=1, tune=TUNABLE, per_layer=True, learning_rate=0.003
    )
    hp = kt.HyperParameters()
    model = hypermodel.build(hp)
    assert model.task_names == ("a", "b")
    assert hp.values["optimizer"] == "adam"
    assert float(model.optimizer.learning_rate) == pytest.approx(0.003)
    assert hp.values["loss_weight/a"] == 1.0
    declared = {one.name for one in hp.space}
    own = {
        "laf": {"tolerance", "rank/conv", "rank/fc"},
        "tucker": {"tolerance", "rank/conv", "rank/fc"},
        "tt": {"tolerance", "rank/conv", "rank/fc"},
        "balanced": {"balancing"},
        "lora": {"rank"},
        "similar": {"threshold", "threshold/conv"},
        "drn": {"strength", "epsilon"},
        "mrn": {"strength", "epsilon"},
        "trn": {"lambda/output", "momentum"},
        "trace": {"strength"},
        "deviation": {"strength"},
    }.get(method, set())
    assert own <= declared
    # Nothing is declared later: what is there says all.
    again = hypermodel.build(hp.copy())
    assert again.count_params() == model.count_params()


def build(method, values, **arguments):
    hp = kt.HyperParameters()
    hp.values = values
    return FAMILIES[method](method, backbone, TASKS, heads=1, **arguments).build(hp)


def test_balancing():
    """The method that is chosen, by features where there is one input."""
    for name, at in (("famo", "weights"), ("cagrad", "features")):
        model = build("balanced", {"balancing": name})
        assert model.balancing.name == name and model.balancing.at == at
    assert build("balanced", {"balancing": "mgda"}, shared_input=False).balancing.at == (
        "weights"
    )
    assert build("hard", {}).balancing is None
    hypermodel = Several(["hard", "balanced"], backbone, TASKS, heads=1)
    for method, expected in (("balanced", "gls"), ("hard", None)):
        hp = kt.HyperParameters()
        hp.values = {"method": method, "balanced/balancing": "gls"}
        found = hypermodel.build(hp).balancing
        assert (found and found.name) == expected
    assert BalancedSharing("balanced", backbone, {"a": "mse"}, heads=1).lack()


def test_values_are_used():
    by_tolerance = [build("tucker", {"tolerance": value}) for value in (0.9, 0.02)]
    few, many = (model.count_params() for model in by_tolerance)
    assert few < many
    ranks = {"ranks": "layers", "rank/conv": 1.0, "rank/fc": 0.05}
    by_layer = build("tt", ranks, per_layer=True)
    by_name = {layer.name: layer for layer in task_layers(by_layer)}
    # The least with which two tasks can differ, and all.
    assert by_name["fc"].rank == (1, 2)
    assert by_name["conv"].rank == parameterizations.TT(1.0).rank(
        {n: f.shape for n, f in by_name["conv"].factors.items()}
    )
    (similar,) = (
        layer
        for layer in task_layers(build("similar", {"threshold": 0.7}))
        if layer.selection is not None
    )
    assert similar.sharing.threshold == 0.7
    prior = build("mrn", {"strength": 0.5, "epsilon": 0.02})
    layer = next(layer for layer in task_layers(prior) if layer.prior is not None)
    assert layer.kernel_regularizer.strength == 0.5
    assert layer.kernel_regularizer.epsilon["task"] == 0.02
    related = build("trn", {"lambda/output": 0.2, "momentum": 0.9})
    assert isinstance(related, TaskRelationModel)
    assert related.relations[0].weight == 0.2
    for method, kind in (("trace", TraceNorm), ("deviation", MeanDeviation)):
        model = build(method, {"strength": 0.7})
        for layer in task_layers(model):
            assert type(layer.kernel_regularizer) is kind
            assert layer.kernel_regularizer.strength == 0.7
    rate = {"optimizer": "sgd", "learning_rate/sgd": 0.05, "loss_weight/a": 3.0}
    model = build("independent", rate, tune=TUNABLE)
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)


def test_cuts():
    """The tasks' own layers begin after the one that is chosen."""

    def network():
        dense = [keras.layers.Dense(3, name=f"fc{number}") for number in range(4)]
        return keras.Sequential([keras.Input((2,)), *dense])

    def own_of(values):
        hp = kt.HyperParameters()
        hp.values = values
        model = FAMILIES["cut"]("cut", network, TASKS, heads=1).build(hp)
        return hp, [layer.name for layer in task_layers(model) if "fc" in layer.name]

    hp, own = own_of({})
    # The last one shared too would be hard sharing.
    assert next(one for one in hp.space if one.name == "share_until").values == [
        "fc0",
        "fc1",
        "fc2",
    ]
    assert own == ["fc2", "fc3"]
    assert own_of({"share_until": "fc0"})[1] == ["fc1", "fc2", "fc3"]


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_width(tasks):
    """As many weights as networks of their own, which are what tells them apart."""

    def network(width=8):
        return keras.Sequential(
            [
                keras.Input((6, 6, 1)),
                keras.layers.Conv2D(width, 3, activation="relu", name="conv"),
                keras.layers.BatchNormalization(name="norm"),
                keras.layers.Flatten(name="flatten"),
                keras.layers.Dense(2 * width, "relu", name="fc"),
            ]
        )

    losses = {f"task_{n}": "mse" for n in range(tasks)}
    wide, own = (
        FAMILIES[method](method, network, losses, heads=1).build(kt.HyperParameters())
        for method in ("wide", "independent")
    )
    assert wide.count_params() == pytest.approx(own.count_params(), rel=0.03)
    assert not task_layers(wide)
    assert wide.get_layer("conv").filters == pytest.approx(8 * tasks**0.5, rel=0.1)
    assert network().get_layer("conv").filters == 8


def test_what_can_not_be_wider():
    def residual():
        inputs = keras.Input((4,))
        return keras.Model(inputs, inputs + keras.layers.Dense(4)(inputs))

    trained = backbone()
    trained.get_layer("fc").bias.assign([1.0, 2.0, 3.0, 4.0])
    lacks = [
        FAMILIES["wide"]("wide", network, TASKS).lack()
        for network in (backbone, residual, trained)
    ]
    assert lacks[0] is None
    assert "can't be made wider (" in lacks[1] and "is trained" in lacks[2]


def test_fusion_without_pooling():
    """After every layer with a kernel."""
    for method, kind in (("stitch", CrossStitch), ("nddr", NDDR)):
        model = build(method, {})
        found = [layer for layer in model.layers if isinstance(layer, kind)]
        assert len(found) == 2, method


def test_task_rank():
    """A default for all layers, a hyperparameter with ranks by layer; not of LAF."""
    losses = dict.fromkeys(("a", "b", "c"), "mse")

    def rank_of(values, method="tucker", **arguments):
        hp = kt.HyperParameters()
        hp.values = values
        family = FAMILIES[method](method, backbone, losses, heads=1, **arguments)
        return family.build(hp).get_layer("fc").rank[-1]

    assert rank_of({"tolerance": 0.2}) == 3
    assert rank_of({"tolerance": 0.2}, defaults={"task_rank": 2}) == 2
    assert rank_of({"ranks": "layers", "task_rank": 2}, per_layer=True) == 2
    with pytest.raises(ValueError, match=r"LAF has no other rank.*task_rank=2"):
        rank_of({}, "laf", defaults={"task_rank": 2})


def test_trials_have_nothing_in_common():
    """Heads and metrics that were given as objects begin anew, the backbone stays."""
    whole = backbone()
    heads = {"a": keras.layers.Dense(1), "b": 1}
    metrics = {"a": [keras.metrics.MeanAbsoluteError()]}
    hypermodel = FAMILIES["hard"]("hard", whole, TASKS, heads=heads, metrics=metrics)
    one, other = (hypermodel.build(kt.HyperParameters()) for _ in range(2))
    assert not heads["a"].built
    assert not {id(v) for v in one.weights} & {id(v) for v in other.weights}
    before = whole.get_weights()
    one.set_weights([value + 1 for value in one.get_weights()])
    for old, new in zip(before, whole.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_several_families_are_each_alone():
    """Of each the hyperparameters that it has alone, and nothing of others."""
    own = {"heads": 1, "tune": TUNABLE, "per_layer": True}
    hypermodel = Several(None, backbone, TASKS, **own)
    # The backbone is not trained.
    assert list(hypermodel.left_out) == ["lora"]
    assert list(hypermodel.families) == [name for name in FAMILIES if name != "lora"]
    space = kt.HyperParameters()
    explore(space, hypermodel.build, list(hypermodel.families))
    assert space.space[0].name == "method" and space.values["method"] == "independent"
    for method in hypermodel.families:
        hp = space.copy()
        set_defaults(hp, {"method": method})
        alone = kt.HyperParameters()
        model = FAMILIES[method](method, backbone, TASKS, **own).build(alone)
        assert of_method(hp.values) == {"method": method, **alone.values}
        common = ("optimizer", "learning_rate", "loss_weight")
        names = {one.name for one in alone.space if not one.name.startswith(common)}
        found = {one.name for one in space.space if one.name.startswith(f"{method}/")}
        assert found == {f"{method}/{name}" for name in names}
        if method in ("mrn", "tucker", "trn"):
            joint = hypermodel.build(hp)
            assert type(joint) is type(model)
            assert joint.count_params() == model.count_params()


def test_several_values_are_used():
    hypermodel = Several(
        ["tucker", "mrn"], backbone, TASKS, heads=1, defaults={"mrn": {"strength": 0.3}}
    )
    hp = kt.HyperParameters()
    hp.values = {"method": "mrn", "mrn/epsilon": 0.02}
    layer = next(layer for layer in task_layers(hypermodel.build(hp)) if layer.prior)
    assert layer.kernel_regularizer.strength == 0.3
    assert layer.kernel_regularizer.epsilon["task"] == 0.02


def test_what_does_not_fit_is_left_out():
    dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="fc")])
    rank = {"task_rank": 2}
    hypermodel = Several(
        None, dense, TASKS, heads=1, shared_input=False, defaults={"laf": rank, "tt": rank}
    )
    left_out = hypermodel.left_out
    assert set(left_out) == {"cut", "similar", "stitch", "nddr", "trn", "laf", "lora"}
    assert "no convolution" in left_out["similar"] and "one layer" in left_out["cut"]
    assert "not the same" in left_out["trn"] and "no other rank" in left_out["laf"]
    with pytest.raises(ValueError, match=r"Several: none .*'similar': 'the network has"):
        Several(["similar"], dense, TASKS)
    with pytest.raises(ValueError, match=r"Several: expected .* Received: \['own'\]"):
        Several(["own", "laf"], dense, TASKS)


def test_fixed_where_it_is_not_searched():
    hp = kt.HyperParameters()
    hypermodel = FAMILIES["tucker"](
        "tucker",
        backbone,
        TASKS,
        heads=1,
        tune=("loss_weights",),
        defaults={"tolerance": 0.5},
    )
    hypermodel.build(hp)
    assert {one.name for one in hp.space} == {"loss_weight/a", "loss_weight/b"}


@pytest.mark.parametrize(
    "arguments",
    [{"tune": ("everything",)}, {"defaults": {"threshold": 1}}, {"method": "similar"}],
)
def test_malformed(arguments):
    make = functools.partial(FAMILIES["tucker"], backbone=backbone, losses=TASKS)
    with pytest.raises(ValueError, match="Factorized: expected a method from"):
        make(**{"method": "tucker", **arguments})


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="Keras Tuner's logs are TensorFlow's"
)
def test_keras_tuner_takes_them(tmp_path, rng):
    """In a script of one's own: any tuner, any of Keras Tuner's features."""
    x = rng.normal(size=(12, 6, 6, 1))
    y = {task: rng.normal(size=(12, 1)) for task in TASKS}
    tuner = kt.RandomSearch(
        FAMILIES["laf"]("laf", backbone, TASKS, heads=1),
        kt.Objective("val_a_loss", "min"),
        max_trials=1,
        directory=tmp_path,
    )
    tuner.search(x, y, validation_data=(x, y), epochs=1, verbose=0)
    (model,) = tuner.get_best_models()
    assert np.isfinite(model.predict(x, verbose=0)["a"]).all()


@pytest.mark.long
@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="Keras Tuner's logs are TensorFlow's"
)
def test_keras_tuner_takes_several(tmp_path, rng):
    """Keras Tuner's own search finds the hyperparameters of all of them."""
    x = rng.normal(size=(12, 6, 6, 1))
    y = {task: rng.normal(size=(12, 1)) for task in TASKS}
    # One for all trials, as in `examples/search.py`.
    whole = backbone()
    tuner = kt.RandomSearch(
        Several(["hard", "laf", "mrn"], whole, TASKS, heads=1),
        kt.Objective("val_a_loss", "min"),
        max_trials=2,
        directory=tmp_path,
    )
    names = {one.name for one in tuner.oracle.get_space().space}
    own = {"laf/tolerance", "mrn/strength", "mrn/epsilon"}
    assert names == {"method", "learning_rate", *own}
    tuner.search(x, y, validation_data=(x, y), epochs=1, verbose=0)
    assert len(tuner.get_best_models(2)) == 2
