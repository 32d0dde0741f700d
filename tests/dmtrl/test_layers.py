"""The named factorised layers: thin names over one mechanism."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import layers, parameterizations
from dmtrl_keras.tasks.rewrite import named_classes, with_sharing
from dmtrl_keras.testing import check_layer

KINDS = sorted(
    {
        kind.__name__
        for _, kind in named_classes()
        if issubclass(kind, parameterizations.FactorizedParameterization)
    }
)
DIMENSIONS = {"Dense": (4,), "Conv1D": (6, 4), "Conv2D": (5, 5, 4), "Conv3D": (4, 4, 4, 4)}


def make(kind, base, **kwargs):
    """One of the twelve layers."""
    cls = getattr(layers, f"{kind}{base}")
    window = () if base == "Dense" else (2,)
    return cls(3, *window, tasks=2, **kwargs)


# Each name with ranks, and each way to choose ranks.
PROMISES = [(base, {"rank": 2}) for base in DIMENSIONS]
PROMISES += [("Dense", {}), ("Dense", {"tolerance": 0.4})]


@pytest.mark.filterwarnings("ignore:.*the task rank is 1")  # As a draw may give.
@pytest.mark.parametrize(("base", "choice"), PROMISES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_promises(kind, base, choice, rng):
    """`check_layer` for each name."""
    shape = DIMENSIONS[base]
    x = rng.normal(size=(2, *shape)).astype("float32")
    export = "rank" in choice and base in ("Dense", "Conv2D")
    check_layer(lambda **kwargs: make(kind, base, **choice, **kwargs), x, export=export)


@pytest.mark.parametrize("base", DIMENSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_sharing(kind, base, rng):
    """The name and the `sharing` argument are one layer."""
    shape = DIMENSIONS[base]
    named = make(kind, base, rank=2, implementation="compose")
    plain_class = getattr(layers, f"Task{base}")
    sharing = getattr(parameterizations, kind)(rank=2)
    window = () if base == "Dense" else (2,)
    plain = plain_class(3, *window, tasks=2, sharing=sharing)
    x = rng.normal(size=(2, *shape)).astype("float32")
    named(x), plain(x)
    assert named.rank == plain.rank
    plain.set_weights(named.get_weights())
    np.testing.assert_allclose(named(x), plain(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_holds_the_ranks(kind):
    """Before build what was asked for; after it the ranks as they are."""
    layer = make(kind, "Dense", tolerance=0.4, name="fc")
    config = layer.get_config()
    assert config["tolerance"] == 0.4
    assert config["rank"] is None
    layer.build((None, 8))
    config = layer.get_config()
    assert tuple(config["rank"]) == layer.rank
    assert config["tolerance"] is None
    assert "sharing" not in config
    again = type(layer).from_config(config)
    again.build((None, 8))
    assert [w.shape for w in again.weights] == [w.shape for w in layer.weights]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0.5, 2])
def test_configurations_of_earlier_versions(kind, rank):
    """They lack `task_rank`; rank was for the tasks too, a fraction one of each bound."""
    layer = layers.TaskDense(6, tasks=4, sharing=getattr(parameterizations, kind)(0.3))
    config = getattr(layers, f"{kind}Dense")(6, 4, rank=rank, name="fc").get_config()
    assert config.pop("task_rank") is None
    named = getattr(layers, f"{kind}Dense").from_config(config)
    # Before it is built, its own configuration means the same.
    named = type(named).from_config(named.get_config())
    config = layer.get_config()
    del config["sharing"]["config"]["task_rank"]
    config["sharing"]["config"]["rank"] = rank
    old = {"LAF": (2,), "Tucker": (5, 3, 2), "TT": (5, 2)}[kind]
    expected = old if rank == 0.5 else (2,) * len(old)
    for found in (named, layers.TaskDense.from_config(config)):
        found.build((None, 40))
        assert found.rank == expected
        again = type(found).from_config(found.get_config())
        again.build((None, 40))
        assert again.rank == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [2, 3, 10])
def test_half_of_the_weights(kind, tasks):
    """Two tasks or ten, all latent kernels are there, so that the tasks can differ."""
    layer = getattr(layers, f"{kind}Conv2D")(32, 3, tasks, rank=0.5, shared_input=True)
    if kind == "LAF" and tasks < 4:
        # Half of two or three kernels would be one.
        with pytest.warns(UserWarning, match=r"can differ, \(2,\), have .* rank=0.5"):
            layer.build((None, 8, 8, 16))
        assert layer.rank == (2,)
        return
    layer.build((None, 8, 8, 16))
    size = sum(int(np.prod(factor.shape)) for factor in layer.factors.values())
    assert size <= 0.5 * 9 * 16 * 32 * tasks
    assert layer.rank[-1] == (tasks if kind != "LAF" else 4)
    assert kind != "Tucker" or layer.rank[:2] == (3, 3)
    start = ops.convert_to_numpy(layer.kernel)
    assert np.ptp(start, axis=-1).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_proportional_tasks_are_warned_of(kind, tmp_path):
    """Where the layer is made, once; with the layer's name and what made it so."""

    def one(**choice):
        layer = make(kind, "Dense", name="fc", **choice)
        with pytest.warns(UserWarning) as found:
            layer.build((None, 16))
        (warning,) = [str(one.message) for one in found]
        assert f"{kind}Dense 'fc', stacked kernel (8, 3, 2)" in warning
        assert "multiples of each other" in warning
        for name, value in choice.items():
            assert name == "common_draw" or f"{name}={value!r}" in warning
        matrix = ops.convert_to_numpy(layer.kernel).reshape(-1, 2)
        assert np.linalg.matrix_rank(matrix, tol=1e-5) == 1
        return layer

    one(task_rank=1)
    one(tolerance=0.5, common_draw=True)
    if kind != "TT":
        # A core of 1 x 1 has no two latent kernels.
        one(rank=1)
    layer = one(rank=(1, 1, 1)[: len(layers_ranks(kind))])
    # What is saved is as it was, and known.
    type(layer).from_config(layer.get_config()).build((None, 16))
    layers.TaskDense(3, 1, sharing=getattr(parameterizations, kind)(1)).build((None, 4))


def layers_ranks(kind):
    """The ranks of a dense layer."""
    return {"LAF": "K", "Tucker": "IOK", "TT": "IK"}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_registered(kind):
    """All under the package name of the library."""
    for base in DIMENSIONS:
        name = f"dmtrl_keras>{kind}{base}"
        cls = getattr(layers, f"{kind}{base}")
        assert keras.saving.get_registered_object(name) is cls


@pytest.mark.parametrize("shared", [False, True])
def test_common_draw_learns_apart(shared, rng):
    """From equal kernels tasks with different labels reach different kernels."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    # All kinds in one graph, which takes longer than its steps.
    kinds = {k: make(k, "Dense", rank=1.0, shared_input=shared) for k in KINDS}
    model = keras.Model(inputs, {k: layer(inputs) for k, layer in kinds.items()})
    model.compile(keras.optimizers.Adam(0.05), dict.fromkeys(KINDS, "mse"))
    for layer in kinds.values():
        kernel = ops.convert_to_numpy(layer.kernel)
        assert np.ptp(kernel, axis=-1).max() < 1e-5
    x = rng.normal(size=(64, 4)).astype("float32")
    features = 4 if shared else 2
    wanted = rng.normal(size=(2, features, 3))
    own = [x, x] if shared else [x[:, :2], x[:, 2:]]
    y = np.concatenate([a @ b for a, b in zip(own, wanted)], -1)
    # Few epochs: each takes longer than its steps.
    labels = dict.fromkeys(KINDS, np.tile(y, (15, 1)))
    model.fit(np.tile(x, (15, 1)), labels, epochs=10, verbose=0)
    for kind, outputs in model(x).items():
        assert np.mean(np.square(outputs - y)) < 0.02, kind


def test_with_sharing():
    """To a named class, between named classes, and back to a plain one."""
    plain = layers.TaskConv2D(4, 3, 2, strides=2, name="conv")
    tucker = with_sharing(plain, parameterizations.Tucker(rank=2))
    assert type(tucker) is layers.TuckerConv2D
    assert (tucker.name, tucker.strides) == ("conv", (2, 2))
    laf = with_sharing(tucker, parameterizations.LAF(rank=1))
    assert type(laf) is layers.LAFConv2D
    back = with_sharing(laf, parameterizations.Independent())
    assert type(back) is layers.TaskConv2D
    depthwise = layers.TaskDepthwiseConv2D(3, 2)
    factorized = with_sharing(depthwise, parameterizations.TT(rank=1))
    assert type(factorized) is layers.TaskDepthwiseConv2D
    assert factorized.sharing.name == "tt"
