"""`enable_lora` and `quantize` of layers with T kernels, as on their Keras twins."""

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

from dmtrl_keras import MultiTaskModel, add_task, factorize, multitask, single_task
from dmtrl_keras import parameterizations as P
from dmtrl_keras.layers import (
    LAFConv1D,
    SimilarKernelConv2D,
    TaskConv2D,
    TaskConv2DTranspose,
    TaskCopies,
    TaskDense,
    TaskDepthwiseConv2D,
    TTDense,
    TuckerDense,
    task_layers,
)
from dmtrl_keras.regularizers import TensorNormalRegularizer

T = 3
LAYERS = {
    "dense": (lambda **k: TaskDense(6, T, **k), (8,)),
    "conv": (lambda **k: TaskConv2D(5, 3, T, **k), (4, 4, 6)),
    "upwards": (lambda **k: TaskConv2DTranspose(5, 2, T, **k), (3, 3, 6)),
    "depthwise": (lambda **k: TaskDepthwiseConv2D(3, T, **k), (4, 4, 6)),
    "tucker": (lambda **k: TuckerDense(6, T, rank=0.5, **k), (8,)),
    "tt": (lambda **k: TTDense(6, T, rank=0.5, **k), (8,)),
    "laf": (lambda **k: LAFConv1D(4, 2, T, rank=2, **k), (5, 6)),
    "hard": (lambda **k: TaskDense(6, T, sharing="hard", **k), (8,)),
    "copies": (lambda **k: TaskCopies(kl.Dense(6), T, "tt", **k), (8,)),
    "recurrent": (lambda **k: TaskCopies(kl.LSTM(4), T, **k), (5, 8)),
}


def made(name, rng, **kwargs):
    """A built layer whose kernels differ, an input, and its outputs."""
    make, shape = LAYERS[name]
    layer = make(common_draw=False, **kwargs)
    copies = isinstance(layer, TaskCopies)
    batch, channels = (2 * T, shape[-1]) if copies else (2, T * shape[-1])
    x = rng.normal(size=(batch, *shape[:-1], channels)).astype("float32")
    return layer, x, ops.convert_to_numpy(layer(x))


def model_of(layer, x):
    """A Keras model of one layer."""
    inputs = keras.Input(x.shape[1:])
    return keras.Model(inputs, layer(inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_lora_starts_as_the_layer(name, rng, tmp_path):
    """The outputs stay; only differences and biases are trained; files come back."""
    layer, x, expected = made(name, rng)
    biases = len(layer.trainable_weights)
    layer.enable_lora(2, lora_alpha=4)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    trained = {w.name for w in layer.trainable_weights}
    assert {"lora_a", "lora_b"} <= trained and not any("base" in n for n in trained)
    assert len(layer.trainable_weights) <= biases + 2
    frozen = [np.array(w) for w in layer.non_trainable_weights]
    model = model_of(layer, x)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, expected + 1, epochs=2, verbose=0)
    for weight, before in zip(layer.non_trainable_weights, frozen):
        np.testing.assert_array_equal(weight, before)
    found = model.predict(x, verbose=0)
    assert np.abs(found - expected).max() > 1e-3
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), found)
    assert [w.trainable for w in again.weights] == [w.trainable for w in model.weights]


def test_lora_equals_that_of_keras(rng):
    """The kernels of T `Dense` layers with LoRA, and one step of SGD on each."""
    layer, x, _ = made("dense", rng)
    layer.enable_lora(2, lora_alpha=6)
    stacked = {w.name: w for w in layer.weights}
    for weight in ("lora_a", "lora_b"):
        stacked[weight].assign(rng.normal(size=stacked[weight].shape))
    twins = []
    for task in range(T):
        twin = kl.Dense(6)
        twin.build((None, 8))
        twin.kernel.assign(stacked["base_kernel"][..., task])
        twin.bias.assign(stacked["bias"][..., task])
        twin.enable_lora(2, lora_alpha=6)
        twin.lora_kernel_a.assign(stacked["lora_a"][..., task])
        twin.lora_kernel_b.assign(stacked["lora_b"][..., task])
        twins.append(twin)
    parts = np.split(x, T, axis=-1)
    expected = np.concatenate([t(part) for t, part in zip(twins, parts)], axis=-1)
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)
    y = rng.normal(size=expected.shape)
    for one, inputs, labels in [
        (layer, x, y),
        *zip(twins, parts, np.split(y, T, axis=-1)),
    ]:
        model = model_of(one, inputs)
        # A mean over the outputs of all tasks.
        rate = 0.1 * T if one is layer else 0.1
        model.compile(keras.optimizers.SGD(rate), "mse")
        model.train_on_batch(inputs, labels)
    for task, twin in enumerate(twins):
        for ours, theirs in (
            ("lora_a", twin.lora_kernel_a),
            ("lora_b", twin.lora_kernel_b),
            ("bias", twin.bias),
        ):
            np.testing.assert_allclose(stacked[ours][..., task], theirs, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_int8(name, rng, tmp_path):
    """Close to the floats, a quarter of the size, not trained, and back from files."""
    layer, x, expected = made(name, rng)
    layer.quantize("int8")
    assert layer.quantization == "int8"
    found = ops.convert_to_numpy(layer(x))
    scale = np.abs(expected).max()
    assert 0 < np.abs(found - expected).max() < 0.03 * scale
    kinds = {w.name: w.dtype for w in layer.weights}
    assert "int8" in kinds.values()
    assert {w.dtype for w in layer.trainable_weights} <= {"float32"}
    assert all("bias" in w.name for w in layer.trainable_weights)
    layer.quantize("int8")
    model = model_of(layer, x)
    model.compile("adam", "mse")
    model.fit(x, expected, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(x, verbose=0)
    np.testing.assert_array_equal(again.predict(x, verbose=0), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    again.set_weights([np.zeros(w.shape) for w in again.weights])
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again.predict(x, verbose=0), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_int8_kernels_equal_those_of_keras(shared, rng):
    """The integers and scales of T quantized `Dense` layers."""
    layer = TaskDense(6, T, shared_input=shared, common_draw=False)
    layer.build((None, 8 if shared else 24))
    kernels = np.array(layer.kernel)
    layer.quantize("int8")
    stacked = {w.name: np.array(w) for w in layer.weights}
    for task in range(T):
        twin = kl.Dense(6)
        twin.build((None, 8))
        twin.kernel.assign(kernels[..., task])
        twin.quantize("int8")
        np.testing.assert_array_equal(stacked["kernel"][..., task], twin._kernel)
        np.testing.assert_allclose(
            stacked["kernel_scale"][0, :, task], twin.kernel_scale, rtol=1e-6
        )
        expected = np.array(twin._kernel) / np.array(twin.kernel_scale)
        np.testing.assert_allclose(layer.task_kernel(task), expected, rtol=1e-5)


@pytest.mark.parametrize("first", ["lora", "int8"])
def test_lora_of_int8(first, rng, tmp_path):
    """In either order the frozen kernels are integers, and differences are trained."""
    layer, x, expected = made("tucker", rng)
    for step in (first, "int8" if first == "lora" else "lora"):
        if step == "lora":
            layer.enable_lora(2)
        else:
            layer.quantize("int8")
    kinds = {w.name: w.dtype for w in layer.weights}
    assert kinds["base_core"] == "int8" and kinds["lora_a"] == "float32"
    np.testing.assert_allclose(layer(x), expected, atol=0.03 * np.abs(expected).max())
    before = np.array(layer.factors["base_core"])
    model = model_of(layer, x)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    losses = model.fit(x, expected + 1, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_array_equal(layer.factors["base_core"], before)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


def network(sharing="tucker", **given):
    """A network of two tasks with layers of several kinds, trained a little."""
    inputs = keras.Input((6, 6, 4))
    x = kl.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = kl.Flatten()(kl.DepthwiseConv2D(2, name="deep")(x))
    x = kl.Dense(12, activation="relu", name="fc")(x)
    backbone = keras.Model(inputs, x)
    model = multitask(backbone, ["a", "b"], sharing, heads=1, verbose=False, **given)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6, 6, 4)).astype("float32")
    y = {"a": x[:, 0, 0, :1], "b": x[:, 1, 1, :1]}
    model.compile("adam", "mse")
    model.fit(x, y, epochs=2, verbose=0)
    return model, x, y


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method:UserWarning")
@pytest.mark.filterwarnings("ignore:.*smallest ranks with which:UserWarning")
def test_networks(tmp_path):
    """`model.quantize` reaches all; exported, of one task, with filters, trained on."""
    tf = pytest.importorskip("tensorflow")
    model, x, y = network(rank=0.5)
    expected = model.predict(x, verbose=0)
    model.quantize("int8", filters="fc")
    assert [one.quantization for one in task_layers(model)] == [None, None, "int8"]
    model.quantize("int8")
    assert {one.quantization for one in task_layers(model)} == {"int8"}
    found = model.predict(x, verbose=0)
    for task in "ab":
        np.testing.assert_allclose(found[task], expected[task], atol=0.05)
        alone = single_task(model, task)
        assert {w.dtype for w in alone.get_layer("fc").weights} == {"float32"}
        np.testing.assert_allclose(alone.predict(x, verbose=0), found[task], atol=0.03)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(x)["a"], found["a"], atol=1e-4)
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again, MultiTaskModel)
    found = model.predict(x, verbose=0)
    np.testing.assert_array_equal(again.predict(x, verbose=0)["a"], found["a"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method:UserWarning")
@pytest.mark.filterwarnings("ignore:.*smallest ranks with which:UserWarning")
def test_lora_of_networks():
    """Trained kernels stay; what else is done with networks is done with these, too."""
    model, x, y = network(rank=0.5)
    expected = model.predict(x, verbose=0)
    model.enable_lora(2)
    assert all(layer.sharing.name == "lora" for layer in task_layers(model))
    model.compile("adam", "mse")
    for task in "ab":
        np.testing.assert_allclose(
            model.predict(x, verbose=0)[task], expected[task], atol=1e-4
        )
    model.fit(x, y, epochs=2, verbose=0)
    found = model.predict(x, verbose=0)
    for task in "ab":
        np.testing.assert_allclose(
            single_task(model, task).predict(x, verbose=0), found[task], atol=1e-4
        )
    three = add_task(model, "c", like="a")
    np.testing.assert_array_equal(three.predict(x, verbose=0)["a"], found["a"])
    with pytest.raises(ValueError, match="no layer to factorise"):
        factorize(model, "tt", verbose=False)
    model, x, _ = network("independent")
    model.quantize("int8")
    small = factorize(model, "tucker", rank=(12, 12, 2), layers=["fc"], verbose=False)
    assert [one.quantization for one in task_layers(small)] == ["int8", "int8", None]
    np.testing.assert_allclose(
        small.get_layer("fc").kernel[..., 0],
        model.get_layer("fc").kernel[..., 0],
        atol=0.2,
    )
    assert np.isfinite(small.predict(x, verbose=0)["a"]).all()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*smallest ranks with which:UserWarning")
@pytest.mark.parametrize("sharing", ["tucker", "laf", "tt", "independent"])
def test_lora_after_a_new_task(sharing):
    """A task that came later has the frozen kernels, and its column, and no difference."""
    ranks = {} if sharing == "independent" else {"rank": 1.0}
    model, x, _ = network(sharing, **ranks)
    three = add_task(model, "c", like="a")
    expected = three.predict(x, verbose=0)
    three.enable_lora(2)
    found = three.predict(x, verbose=0)
    for task in "abc":
        np.testing.assert_allclose(found[task], expected[task], atol=1e-4)
    three.compile("adam", "mse")
    y = {task: x[:, 0, 0, :1] for task in "abc"}
    three.fit(x, y, verbose=0)
    alone = single_task(three, "c")
    np.testing.assert_allclose(
        alone.predict(x, verbose=0), three.predict(x, verbose=0)["c"], atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method:UserWarning")
@pytest.mark.filterwarnings("ignore:.*InputLayer does not have a `quantize`:UserWarning")
def test_copies_in_networks():
    """Attention and recurrent layers, again and again; nothing is mixed up in files."""
    inputs = keras.Input((6, 8))
    x = kl.Bidirectional(kl.LSTM(3, return_sequences=True), name="bi")(inputs)
    x = kl.MultiHeadAttention(2, 4, name="attention")(x, x)
    backbone = keras.Model(inputs, kl.Dense(4, name="fc")(kl.Flatten()(x)))
    model = multitask(backbone, ["a", "b"], heads=1, verbose=False)
    x = np.random.default_rng(0).normal(size=(4, 6, 8)).astype("float32")
    expected = model.predict(x, verbose=0)
    model.enable_lora(1)
    model.quantize("int8", filters="bi|attention|fc")
    found = model.predict(x, verbose=0)
    assert 0 < np.abs(found["a"] - expected["a"]).max() < 0.05
    for _ in range(4):
        more = add_task(model, "c", like="b")
        np.testing.assert_array_equal(more.predict(x, verbose=0)["a"], found["a"])
    with pytest.raises(ValueError, match="filters='nothing'"):
        model.enable_lora(1, filters="nothing")


def test_what_was_trained_is_kept(rng):
    """Differences are no other variables once the frozen kernels are quantized."""
    model, x, y = network(sharing=P.LoRA(2))
    a = model.get_layer("fc").factors["lora_a"]
    for layer in task_layers(model):
        layer.quantize("int8")
    assert model.get_layer("fc").factors["lora_a"] is a
    model._forget_steps()
    model.fit(x, y, verbose=0)


def test_scales(rng):
    """One for every output, however different the channels are; for words one for each."""
    layer = TaskDepthwiseConv2D(3, T)
    layer.build((None, 8, 8, 32 * T))
    kernel = rng.normal(size=(3, 3, 32, 1, T)) * np.exp(1.5 * rng.normal(size=(32, 1, 1)))
    layer.factors["kernel"].assign(kernel)
    layer.quantize("int8")
    assert layer.stacked.scales["kernel"].shape == (1, 1, 32, 1, T)
    error = np.abs(np.array(layer.kernel) - kernel).max(axis=(0, 1))
    assert (error < 0.005 * np.abs(kernel).max(axis=(0, 1))).all()
    for copied, inputs, shape in (
        (kl.Embedding(9, 4), np.ones((T, 5), "int32"), (9, 1, T)),
        (kl.EinsumDense("abc,cde->abde", (None, 2, 3)), np.ones((T, 5, 4)), (1, 2, 3, T)),
    ):
        copies = TaskCopies(copied, T)
        copies(inputs)
        copies.quantize("int8")
        assert copies.kernels[0].scales["kernel"].shape == shape


def test_quantized_layers_have_no_copies():
    """Before the tasks part they are as they are; after it is said what to do instead."""
    for bias in (True, False):
        backbone = keras.Sequential(
            [keras.Input((8,)), kl.Dense(6, name="fc", use_bias=bias), kl.ReLU()]
        )
        backbone.get_layer("fc").quantize("int8")
        with pytest.raises(ValueError, match=r"quantized layer.*'fc'.*int8"):
            multitask(backbone, ["a", "b"], heads=1, verbose=False)
        model = multitask(backbone, ["a", "b"], "hard", heads=1, verbose=False)
        x = np.ones((2, 8), "float32")
        assert model.predict(x, verbose=0)["a"].shape == (2, 1)


def test_a_prior_learns_on(rng):
    """The penalty is of the whole kernels, and its state stays what it was."""
    layer = TaskDense(6, T, kernel_regularizer=TensorNormalRegularizer(), common_draw=False)
    x = rng.normal(size=(4, 24)).astype("float32")
    layer(x, training=True)
    before = layer.prior.get_weights()
    loss = layer.losses[0]
    layer.enable_lora(2)
    for value, old in zip(layer.prior.get_weights(), before):
        np.testing.assert_array_equal(value, old)
    np.testing.assert_allclose(layer.losses[0], loss, rtol=1e-4)
    layer(x, training=True)
    layer.quantize("int8")
    for value, old in zip(layer.prior.get_weights(), before):
        assert value.shape == old.shape


def test_mixed_precision(rng):
    """Half precision computes with the integers, too."""
    layer = TaskDense(6, T, dtype="mixed_bfloat16")
    x = rng.normal(size=(4, 24)).astype("float32")
    expected = ops.cast(layer(x), "float32")
    layer.quantize("int8")
    layer.enable_lora(2)
    found = layer(x)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    np.testing.assert_allclose(ops.cast(found, "float32"), expected, atol=0.1)


def test_refused(rng):
    """What is not possible, and what was received."""
    layer = TaskDense(6, T, name="fc")
    with pytest.raises(AttributeError, match=r"'fc'.*build the layer"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match=r"isn't yet built.*'fc'"):
        layer.quantize("int8")
    layer.build((None, 24))
    for rank in (0, 2.5, "x"):
        with pytest.raises(ValueError, match=rf"'fc'.*rank={rank!r}"):
            layer.enable_lora(rank)
    with pytest.raises(ValueError, match=r"'fc'.*alpha='x'"):
        layer.enable_lora(2, lora_alpha="x")
    with pytest.raises(ValueError, match=r"'fc'.*nothing"):
        layer.enable_lora(2, a_initializer="nothing")
    with pytest.raises(ValueError, match=r"'fc'.*'int8'.*mode='int4'.*single_task"):
        layer.quantize("int4")
    own = keras.quantizers.AbsMaxQuantizer(axis=0)
    config = keras.quantizers.Int8QuantizationConfig(weight_quantizer=own)
    with pytest.raises(ValueError, match=r"'fc'.*config="):
        layer.quantize(config=config)
    layer.quantize(config=keras.quantizers.Int8QuantizationConfig())
    layer.enable_lora(2)
    with pytest.raises(ValueError, match=r"'fc'.*enabled already"):
        layer.enable_lora(2)
    held = TaskDense(6, T, kernel_constraint="non_neg", name="held")
    held.build((None, 24))
    with pytest.raises(ValueError, match=r"'held'.*constraint"):
        held.enable_lora(2)
    similar = SimilarKernelConv2D(4, 3, T, name="similar")
    similar.build((None, 5, 5, 24))
    with pytest.raises(ValueError, match=r"'similar'.*similar"):
        similar.enable_lora(2)
    for of in ("lora", P.SimilarKernels(0.4), "nothing"):
        with pytest.raises(ValueError, match="LoRA"):
            P.LoRA(2, of=of)
    with pytest.raises(ValueError, match=r"together.*of="):
        P.LoRA(together="laf", of="independent")
