"""From trained independent kernels to factors: the same network, smaller."""

import math
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from dmtrl_keras import (
    Factorization,
    factorization_report,
    factorize,
    layers,
    parameterizations,
    task_layers,
)

METHODS = ("laf", "tucker", "tt")


def network(tasks=3):
    """Every kind of layer, a layer used twice, a nested model, and a Keras head."""
    inputs = keras.Input((8, 8, 2))
    x = layers.TaskConv2D(6, 3, tasks, shared_input=True, common_draw=False, name="conv")(
        inputs
    )
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = layers.TaskDepthwiseConv2D(3, tasks, common_draw=False, name="depthwise")(x)
    x = layers.TaskFlatten(tasks)(x)
    inner = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.TaskDense(6, tasks, "relu", common_draw=False, name="nested"),
        ],
        name="inner",
    )
    x = inner(x)
    twice = layers.TaskDense(6, tasks, common_draw=False, name="twice")
    x = twice(twice(x))
    split = layers.TaskSplit(["a", "b", "c"][:tasks])(x)
    outputs = {
        name: keras.layers.Dense(2 + i, name=f"head_{name}")(part)
        for i, (name, part) in enumerate(split.items())
    }
    return keras.Model(inputs, outputs, name="network")


def randomize(model, rng):
    """Other weights than those of the start, as after training."""
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.2)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_keeps_the_outputs(method, rng):
    """Nothing truncated: the same function, names and structure; the source untouched."""
    model = randomize(network(), rng)
    x = rng.normal(size=(4, 8, 8, 2)).astype("float32")
    expected = model.predict(x, verbose=0)
    weights = model.get_weights()
    new = factorize(model, method, rank=1.0, verbose=False, keep_larger=True)
    outputs = new.predict(x, verbose=0)
    assert list(outputs) == list(expected)
    for name in expected:
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-3, atol=1e-3)
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)
    names = [layer.name for layer in task_layers(model)]
    assert [layer.name for layer in task_layers(new)] == names
    assert {layer.sharing.name for layer in task_layers(new)} == {method}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tolerance", [0.05, 0.4])
def test_report_is_true(method, tolerance, rng):
    """Ranks, counts and errors are those of the new layers, within the tolerance."""
    model = randomize(network(), rng)
    choice = {"tolerance": tolerance, "keep_larger": True}
    new = factorize(model, method, verbose=False, **choice)
    report = factorization_report(new)
    assert [entry.layer for entry in report] == [layer.name for layer in task_layers(new)]
    old = {layer.name: layer for layer in task_layers(model)}
    for entry, layer in zip(report, task_layers(new)):
        kernel = ops.convert_to_numpy(old[layer.name].kernel)
        error = np.linalg.norm(ops.convert_to_numpy(layer.kernel) - kernel)
        error = error / np.linalg.norm(kernel)
        np.testing.assert_allclose(entry.error, error, rtol=1e-3, atol=1e-6)
        assert entry.error <= tolerance + 1e-6
        assert entry.rank == layer.rank
        assert entry.parameters_before == kernel.size
        factors = layer.factors.values()
        assert entry.parameters_after == sum(int(np.prod(f.shape)) for f in factors)
        np.testing.assert_array_equal(layer.bias, old[layer.name].bias)


def test_carries_over_everything_else(rng):
    """Heads and the statistics of batch normalization come along."""
    model = randomize(network(), rng)
    model.get_layer("norm").moving_mean.assign(rng.normal(size=18))
    new = factorize(model, "tt", tolerance=0.5, verbose=False)
    for name in ("norm", "head_a", "head_b", "head_c"):
        for a, b in zip(model.get_layer(name).weights, new.get_layer(name).weights):
            np.testing.assert_array_equal(a, b)


def test_choosing_layers(rng):
    """By name, by function, and with ranks of their own."""
    model = randomize(network(), rng)
    larger = {"keep_larger": True, "verbose": False}
    new = factorize(model, "laf", layers=["conv", "nested"], **larger)
    kinds = {layer.name: layer.sharing.name for layer in task_layers(new)}
    assert kinds == {
        "conv": "laf",
        "depthwise": "independent",
        "nested": "laf",
        "twice": "independent",
    }
    assert type(new.get_layer("conv")) is layers.LAFConv2D
    new = factorize(
        model,
        "tucker",
        rank=1.0,
        layers=lambda layer: isinstance(layer, layers.TaskDense),
        **larger,
    )
    assert type(new.get_layer("twice")) is layers.TuckerDense
    assert type(new.get_layer("conv")) is layers.TaskConv2D
    new = factorize(model, "tt", rank={"conv": 2, "twice": (3, 2)}, **larger)
    assert new.get_layer("twice").rank == (3, 2)
    assert new.get_layer("conv").rank == (2, 2, 2, 3)
    assert len(factorization_report(new)) == 2
    # By pattern and by class; the first that fits holds.
    ranks = {"t*": (3, 2), "Dense": (2, 2), "Conv2D": 2}
    new = factorize(model, "tt", rank=ranks, **larger)
    found = {layer.name: layer.rank for layer in task_layers(new)}
    assert found["twice"] == (3, 2) and found["nested"] == (2, 2)
    assert found["conv"] == (2, 2, 2, 3) and found["depthwise"] is None
    with pytest.raises(ValueError, match=r"nothing for layer 'conv'.*'twice'"):
        factorize(model, "tt", layers=["conv"], rank={"twice": 2}, verbose=False)
    with pytest.raises(ValueError, match=r"names \['missing'\], expected"):
        factorize(model, "tt", rank={"missing": 2}, verbose=False)


@pytest.mark.parametrize("method", METHODS)
def test_task_rank(method, rng):
    """By itself, with a tolerance or a rank; of LAF it is the only one."""
    model = randomize(network(), rng)

    def ranks(**choice):
        choice |= {"keep_larger": True, "verbose": False}
        new = factorize(model, method, layers=["nested"], **choice)
        return {layer.name: layer.rank for layer in task_layers(new)}["nested"]

    assert ranks(task_rank=2)[-1] == 2
    assert ranks(task_rank=0.5)[-1] == 2
    if method == "laf":
        for other in ({"rank": 2}, {"tolerance": 0.1}):
            with pytest.raises(ValueError, match="LAF has no other rank"):
                ranks(task_rank=2, **other)
        return
    assert ranks(task_rank=2, rank=0.5)[-1] == 2
    assert ranks(task_rank=2, tolerance=0.9)[-1] == 2
    # Full, although the tasks' kernels are equal; then the tolerance is spent elsewhere.
    for variable in model.trainable_variables:
        if variable.ndim == 3:
            variable.assign(np.repeat(variable.numpy()[..., :1], 3, axis=-1))
    assert ranks(task_rank=1.0, tolerance=0.2)[-1] == 3
    with pytest.warns(UserWarning, match=r"'nested'.*multiples of each other"):
        assert ranks(tolerance=0.2)[-1] == 1


def spectra(kernel, method):
    """Singular values of the unfoldings, by their definitions."""
    shape = kernel.shape
    if method == "laf":
        matrices = [kernel.reshape(-1, shape[-1])]
    elif method == "tucker":
        matrices = [np.moveaxis(kernel, n, 0).reshape(d, -1) for n, d in enumerate(shape)]
    else:
        rows = [int(np.prod(shape[:n])) for n in range(1, len(shape))]
        matrices = [kernel.reshape(count, -1) for count in rows]
    return [np.linalg.svd(m)[1] for m in matrices]


def size_at(tolerance, shape, values, method):
    """The entries of the factors of one kernel, by loops."""
    ranks = []
    for own in values:
        share = tolerance * np.sqrt(np.sum(own**2) / len(values))
        rank = len(own)
        while rank > 1 and np.sqrt(np.sum(own[rank - 1 :] ** 2)) <= share:
            rank -= 1
        ranks.append(rank)
    if method == "laf":
        return ranks[0] * (np.prod(shape[:-1]) + shape[-1])
    if method == "tucker":
        return np.prod(ranks) + sum(r * d for r, d in zip(ranks, shape))
    edges = [1, *ranks, 1]
    return sum(edges[n] * d * edges[n + 1] for n, d in enumerate(shape))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", [0.5, 0.8])
@pytest.mark.filterwarnings("ignore:.*multiples of each other")
def test_budget_of_all_layers(method, weights, rng):
    """The smallest tolerance that meets it: one after the other, nothing smaller does."""
    model = randomize(network(), rng)
    names = ["conv", "nested", "twice"]
    new = factorize(model, method, layers=names, weights=weights, verbose=False)
    report = factorization_report(new)
    kernels = [
        ops.convert_to_numpy(layer.kernel).astype("float64")
        for layer in task_layers(model)
        if layer.name in names
    ]
    values = [spectra(kernel, method) for kernel in kernels]
    whole = sum(kernel.size for kernel in kernels)
    candidates = {
        float(np.sqrt(np.sum(one[n:] ** 2) / np.sum(one**2) * len(own)))
        for own in values
        for one in own
        for n in range(1, len(one))
    }
    for tolerance in sorted(c + 1e-9 for c in candidates):
        # Larger factors than kernels there are none.
        size = sum(
            min(k.size, size_at(tolerance, k.shape, own, method))
            for k, own in zip(kernels, values)
        )
        if size <= weights * whole:
            break
    assert sum(entry.parameters_after for entry in report) == size
    assert all(entry.error <= tolerance + 1e-5 for entry in report)


@pytest.mark.filterwarnings("ignore:.*multiples of each other")
def test_budget_with_a_task_rank_and_by_singular_values(rng):
    """Both mean what they mean with a tolerance."""
    model = randomize(network(), rng)
    names = ["nested", "twice"]
    new = factorize(
        model, "tucker", layers=names, weights=0.5, task_rank=1.0, verbose=False
    )
    report = factorization_report(new)
    assert {entry.rank[-1] for entry in report} == {3}
    budget = 0.5 * sum(entry.parameters_before for entry in report)
    assert sum(entry.parameters_after for entry in report) <= budget
    new = factorize(
        model,
        "laf",
        layers=names,
        weights=0.7,
        threshold="singular_value",
        verbose=False,
    )
    assert {entry.rank for entry in factorization_report(new)} <= {(1,), (2,), (3,)}


def test_factorized_model_trains_saves_and_prints(rng, tmp_path, capsys):
    """It goes on like any model, and says what was done."""
    model = randomize(network(), rng)
    new = factorize(model, "tucker", tolerance=0.5, keep_larger=True)
    printed = capsys.readouterr().out
    assert "Total" in printed
    assert "conv" in printed
    x = rng.normal(size=(8, 8, 8, 2)).astype("float32")
    y = {name: np.zeros((8, 2 + i), "float32") for i, name in enumerate("abc")}
    new.compile("adam", dict.fromkeys("abc", "mse"), run_eagerly=True)
    first = new.evaluate(x, y, verbose=0)
    new.fit(x, y, epochs=5, verbose=0)
    assert (new.evaluate(x, y, verbose=0)[0]) < first[0]
    new.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name, output in loaded.predict(x, verbose=0).items():
        np.testing.assert_allclose(output, new.predict(x, verbose=0)[name], atol=1e-5)
    assert [layer.rank for layer in task_layers(loaded)] == [
        layer.rank for layer in task_layers(new)
    ]


def test_sequential(rng):
    """Sequential models too."""
    model = keras.Sequential(
        [keras.Input((5,)), layers.TaskDense(4, 3, shared_input=True, name="fc")]
    )
    with pytest.warns(UserWarning, match="LAFDense 'fc'.*task rank is 1"):
        new = factorize(model, "laf", rank=1, verbose=False)
    assert isinstance(new, keras.Sequential)
    x = rng.normal(size=(2, 5)).astype("float32")
    np.testing.assert_allclose(new(x), model(x), atol=1e-5)


def one_layer(window, inputs, outputs, tasks):
    """A network of one layer, dense or convolutional."""
    inputs = keras.Input((*(size + 1 for size in window), inputs))
    given = {"tasks": tasks, "shared_input": True, "common_draw": False, "name": "one"}
    if not window:
        return keras.Model(inputs, layers.TaskDense(outputs, **given)(inputs))
    layer = getattr(layers, f"TaskConv{len(window)}D")(outputs, window, **given)
    return keras.Model(inputs, layer(inputs))


HOW = st.sampled_from(["frobenius", "singular_value"])
CHOICES = st.one_of(
    st.builds(lambda t, h: {"tolerance": t, "threshold": h}, st.floats(0.01, 0.95), HOW),
    st.builds(lambda rank: {"rank": rank}, st.floats(0.05, 1)),
    st.builds(lambda rank: {"rank": rank}, st.integers(1, 3)),
    st.just({}),
)


@settings(max_examples=25, deadline=None)
@given(
    window=st.lists(st.integers(1, 3), max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 6)),
    common=st.sampled_from([0, 1, 30]),
    choice=CHOICES,
    seed=st.integers(0, 99),
)
def test_never_larger_in_silence(window, sizes, common, choice, seed):
    """Not more weights than before; with `keep_larger` what the decomposition gives."""
    model, rng = one_layer(tuple(window), *sizes), np.random.default_rng(seed)
    kernel = model.get_layer("one").kernel
    alike = common * rng.normal(size=(*kernel.shape[:-1], 1))
    kernel.assign(alike + rng.normal(size=kernel.shape))
    before, size = model.count_params(), math.prod(kernel.shape)
    if isinstance(choice.get("rank"), int):
        # Above all bounds an int is an error.
        choice = {"rank": min(choice["rank"], *sizes)}
    for method in METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            new = factorize(model, method, verbose=False, **choice)
            whole = factorize(model, method, verbose=False, keep_larger=True, **choice)
        sharing = type(parameterizations.get(method)).of_trained(**choice)
        factors = sharing.decompose(ops.convert_to_numpy(kernel).astype("float64"))
        expected = sum(factor.size for factor in factors.values())
        assert new.count_params() <= before
        assert whole.count_params() - before == expected - size
        layer = whole.get_layer("one")
        assert layer.rank == sharing.rank({n: f.shape for n, f in factors.items()})
        (entry,) = factorization_report(new)
        if expected > size:
            assert entry.declined == expected and entry.rank == ()
            assert (entry.parameters_before, entry.parameters_after) == (size, size)
            np.testing.assert_array_equal(new.get_layer("one").kernel, kernel)
        else:
            assert entry == factorization_report(whole)[0]
            assert entry.declined is None and entry.parameters_after == expected


def test_layers_that_keep_their_kernels(rng, tmp_path, capsys):
    """They say so in the report, when it is printed, and after saving and loading."""
    model = randomize(network(), rng)
    ranks = {"nested": (9, 2), "twice": (6, 3)}
    new = factorize(model, "tt", rank=ranks)
    nested, twice = factorization_report(new)
    assert nested.declined is None and nested.method == "tt"
    # Cores of 6 x 6, 6 x 6 x 3 and 3 x 3.
    assert twice.declined == 36 + 108 + 9
    assert twice.method == "independent" and twice.parameters_after == 108
    assert type(new.get_layer("twice")) is layers.TaskDense
    printed = " ".join(capsys.readouterr().out.split())
    assert "twice (153, 1.417 times as many)" in printed and "Kept their" in printed
    new.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert factorization_report(loaded) == [nested, twice]
    # Another call may still make factors of it, and forgets what was before.
    again = factorize(loaded, "tt", rank={"twice": 1}, verbose=False, task_rank=2)
    assert [entry.declined for entry in factorization_report(again)] == [None, None]
    assert again.get_layer("twice").rank == (1, 2)


def test_nothing_to_factorise(rng):
    """The same network and a warning that says why."""
    model = randomize(network(), rng)
    with pytest.warns(UserWarning, match=r"'network'.*twice 153 instead of 108.*rank=1\.0"):
        new = factorize(model, "tt", rank=1.0, layers=["twice", "conv"], verbose=False)
    x = rng.normal(size=(2, 8, 8, 2)).astype("float32")
    for name, output in new(x).items():
        np.testing.assert_array_equal(output, model(x)[name])
    assert {entry.method for entry in factorization_report(new)} == {"independent"}


def test_reports_of_earlier_versions():
    """They know nothing of layers that keep their kernels."""
    entry = Factorization("fc", "tt", (4, 3, 2), (2, 2), 24, 20, 0.1)
    config = entry.get_config()
    del config["declined"]
    assert Factorization.from_config(config) == entry


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "hard"}, "'hard'"),
        ({"method": "cp"}, "'cp'"),
        ({"method": "laf", "layers": ["conv", "missing"]}, r"\['missing'\].*'conv'"),
        ({"method": "laf", "layers": lambda layer: False}, "no layer to factorise"),
        ({"method": "laf", "tolerance": 1.5}, r"1\.5"),
        ({"method": "laf", "tolerance": 0.1, "rank": 2}, "not both"),
        ({"method": "tucker", "rank": 999}, r"'conv'.*999"),
        ({"method": "tt", "weights": 0.5, "rank": 2}, "one of .*weights=0.5, rank=2"),
        ({"method": "tt", "weights": 1.5}, r"`weights` must be .*1\.5"),
        ({"method": "laf", "weights": 0.1}, r"have 0\.3\d+ of .*weights=0\.1"),
        ({"method": "laf", "weights": 0.5, "task_rank": 2}, "no other rank"),
    ],
)
def test_errors(arguments, message):
    """What was received, and what the model has."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        factorize(network(), **arguments)


def test_subclassed_models_are_refused():
    """Their layers can't be replaced; the error says so."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.fc = layers.TaskDense(2, 2)

        def call(self, x):
            return self.fc(x)

    model = Model()
    model(np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"functional or Sequential.*'own'"):
        factorize(model, "laf")
