"""Networks of layers that have no rule: equal to the backbone, and back, and out."""

import dataclasses
import importlib.util
import warnings

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

from dmtrl_keras import (
    TensorNormalRegularizer,
    add_task,
    export_tasks,
    factorization_report,
    factorize,
    multitask,
    remove_task,
    sharing_strength,
    single_task,
    task_relations,
    task_summary,
)
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.layers import TaskCopies, TaskLayer

TASKS = ["topic", "tone", "length"]
TENSORFLOW = keras.backend.backend() == "tensorflow"
WORDS = ["the cat sat", "a dog", "the dog ran far away", "cat", "a cat a dog"]


def block(x, causal=False):
    """A transformer block, normalized before."""
    y = kl.LayerNormalization()(x)
    y = kl.MultiHeadAttention(2, 4)(y, y, use_causal_mask=causal)
    x = kl.Add()([x, y])
    y = kl.LayerNormalization()(x)
    return x + kl.Dense(8)(kl.Dropout(0.1)(kl.Dense(16, "gelu")(y)))


def vit():
    """Patches, a constant for each place, four blocks, the first place."""
    inputs = keras.Input((16, 16, 3))
    x = kl.Reshape((16, 8))(kl.Conv2D(8, 4, 4, name="patches")(inputs))
    x = x + np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
    for _ in range(4):
        x = block(x)
    return keras.Model(inputs, kl.LayerNormalization()(x)[:, 0], name="vit")


def causal():
    """Word by word, with as many outputs as words."""
    inputs = keras.Input((10,), dtype="int32")
    x = kl.Embedding(20, 8)(inputs)
    return keras.Model(inputs, block(block(x, True), True), name="causal")


def text():
    """Texts of any length: a vocabulary, a mask, a recurrent layer both ways."""
    vectors = kl.TextVectorization(20, output_sequence_length=6, name="vectors")
    vectors.adapt(np.array(WORDS))
    inputs = keras.Input((1,), dtype="string")
    x = kl.Embedding(20, 8, mask_zero=True, name="words")(vectors(inputs))
    x = kl.Bidirectional(kl.LSTM(4), name="recurrent")(x)
    return keras.Model(inputs, kl.Dense(6, "relu", name="last")(x), name="text")


def unet():
    """Down and up again, with as many outputs as pixels."""
    inputs = keras.Input((8, 8, 3))
    wide = kl.Conv2D(4, 3, padding="same", activation="relu", name="wide")(inputs)
    x = kl.Conv2D(8, 3, padding="same", name="deep")(kl.MaxPooling2D()(wide))
    x = kl.ReLU()(kl.BatchNormalization()(x))
    x = kl.Concatenate()([wide, kl.Conv2DTranspose(4, 2, strides=2, name="up")(x)])
    x = kl.Conv2D(4, 3, padding="same", name="pixels")(x)
    return keras.Model(inputs, x, name="unet")


def table():
    """Numbers and words in columns, each prepared as is usual."""
    numbers = keras.Input((3,), name="numbers")
    city = keras.Input((1,), dtype="string", name="city")
    scaled = kl.Normalization()
    scaled.adapt(np.random.default_rng(0).normal(3, 2, size=(20, 3)))
    chosen = kl.StringLookup(output_mode="one_hot")
    chosen.adapt(np.array([["a"], ["b"], ["c"]]))
    index = kl.StringLookup(vocabulary=["a", "b", "c"])(city)
    place = kl.Flatten()(kl.Embedding(4, 3, name="place")(index))
    x = kl.Concatenate()([scaled(numbers), chosen(city), place])
    inputs = {"numbers": numbers, "city": city}
    return keras.Model(inputs, kl.Dense(8, "relu", name="fc")(x), name="table")


def strings(values):
    return tensorflow().constant(values)


@dataclasses.dataclass
class Net:
    """A backbone, and how its examples are drawn."""

    make: object
    draw: object
    needs_tensorflow: bool = False


NETS = {
    "vit": Net(vit, lambda rng: rng.normal(size=(4, 16, 16, 3)).astype("float32")),
    "causal": Net(causal, lambda rng: rng.integers(0, 20, size=(4, 10)).astype("int32")),
    "text": Net(text, lambda rng: strings([[str(w)] for w in rng.choice(WORDS, 4)]), True),
    "unet": Net(unet, lambda rng: rng.normal(size=(4, 8, 8, 3)).astype("float32")),
    "table": Net(
        table,
        lambda rng: {
            "numbers": ops.convert_to_tensor(rng.normal(size=(4, 3)).astype("float32")),
            "city": strings([[str(w)] for w in rng.choice(list("abcd"), 4)]),
        },
        True,
    ),
}
LONG = {"vit"}


def nets(*names):
    found = []
    for name in names or NETS:
        marks = [pytest.mark.long] if name in LONG else []
        if NETS[name].needs_tensorflow and not TENSORFLOW:
            marks = [pytest.mark.skip(reason="strings are TensorFlow's alone")]
        found.append(pytest.param(name, marks=marks))
    return found


def array(x):
    return ops.convert_to_numpy(x)


def apart(weights, rng, by=0.05):
    """Weights of each task that differ a little."""
    for weight in weights:
        if weight.trainable:
            value = array(weight)
            weight.assign(value + rng.normal(0, by, size=value.shape))


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("name", nets())
def test_equal_to_the_backbone(name, shared_input, rng):
    """Each task, at the start; and one task alone, also when weights have parted."""
    net = NETS[name]
    backbone = net.make()
    model = multitask(backbone, TASKS, shared_input=shared_input, verbose=False)
    x = {task: net.draw(rng) for task in TASKS}
    if shared_input:
        x = dict.fromkeys(TASKS, x["tone"])
    inputs = x["tone"] if shared_input else x
    found = model(inputs)
    for task in TASKS:
        expected = array(backbone(x[task]))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(array(found[task]) / scale, expected / scale, atol=1e-4)
    apart(model.weights, rng)
    found = model(inputs)
    alone = single_task(model, "tone")
    assert not any(isinstance(layer, TaskCopies) for layer in alone.layers)
    expected = array(found["tone"])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(array(alone(x["tone"])) / scale, expected / scale, atol=1e-4)
    assert np.abs(array(found["topic"]) - expected).max() > 1e-3 * scale


@pytest.mark.parametrize("name", nets())
def test_with_factors(name, rng, tmp_path):
    """A step of training, files, an export; reports say all kernels."""
    net = NETS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = multitask(net.make(), TASKS, "tucker", tolerance=0.3, verbose=False)
    x = net.draw(rng)
    y = {t: np.ones(v.shape, "float32") for t, v in model(x).items()}
    before = [array(v) for v in model.trainable_variables]
    # Tracing copies takes seconds, their steps none.
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(x, y, verbose=0)
    moved = [np.any(array(v) != b) for v, b in zip(model.trainable_variables, before)]
    assert np.mean(moved) > 0.7
    state = [array(v) for v in model.variables]
    model.evaluate(x, y, verbose=0)
    found = model.predict(x, verbose=0)
    for variable, value in zip(model.variables, state):
        if "metric" not in variable.path:
            np.testing.assert_array_equal(array(variable), value)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")
    again = loaded(x)
    for task in TASKS:
        np.testing.assert_allclose(array(again[task]), found[task], atol=1e-5)
    reported = {entry.layer for entry in factorization_report(loaded)}
    copied = [layer for layer in model.layers if isinstance(layer, TaskCopies)]
    for layer in copied:
        assert {f"{layer.name}/{kernel}" for kernel in layer.kernel_names} <= reported
    rows = {row.layer: row for row in task_summary(model, verbose=False)}
    assert all(rows[layer.name].sharing in ("tucker", "independent") for layer in copied)
    strengths = sharing_strength(model)
    assert reported <= set(strengths)
    assert {f"cosine of S, {name}" for name in reported} <= set(task_relations(model))


@pytest.mark.skipif(not TENSORFLOW, reason="SavedModels are TensorFlow's")
@pytest.mark.parametrize(
    "name",
    ["unet", *(pytest.param(n, marks=pytest.mark.long) for n in NETS if n != "unet")],
)
def test_an_endpoint_for_each_task(name, rng, tmp_path):
    net = NETS[name]
    model = multitask(net.make(), TASKS, verbose=False)
    apart(model.weights, rng)
    export_tasks(model, tmp_path / "saved", verbose=False)
    saved = tensorflow().saved_model.load(tmp_path / "saved")
    x = net.draw(rng)
    expected = {task: array(value) for task, value in model(x).items()}
    for task in TASKS:
        np.testing.assert_allclose(saved.serve(x)[task], expected[task], atol=1e-5)
        np.testing.assert_allclose(getattr(saved, task)(x), expected[task], atol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method:UserWarning")
@pytest.mark.parametrize("name", nets())
def test_lora_and_int8(name, rng, tmp_path):
    """Frozen kernels as integers, differences that are trained, and a file."""
    net = NETS[name]
    model = multitask(net.make(), TASKS, verbose=False)
    x = net.draw(rng)
    expected = {task: array(value) for task, value in model(x).items()}
    model.enable_lora(1)
    for layer in model.layers:
        if isinstance(layer, (TaskLayer, TaskCopies)):
            layer.quantize("int8")
    for task, value in model(x).items():
        scale = np.abs(expected[task]).max()
        np.testing.assert_allclose(array(value) / scale, expected[task] / scale, atol=0.06)
    frozen = {v.path: array(v) for v in model.variables if v.dtype == "int8"}
    assert len(frozen) > 1
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(x, {t: np.ones(v.shape, "float32") for t, v in expected.items()}, verbose=0)
    for variable in model.variables:
        if variable.path in frozen:
            np.testing.assert_array_equal(array(variable), frozen[variable.path])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for task, value in loaded(x).items():
        np.testing.assert_allclose(array(value), array(model(x)[task]), atol=1e-5)


def test_factorize(rng):
    """Trained copies from their factors on; what would grow stays."""
    model = multitask(text() if TENSORFLOW else causal(), TASKS, verbose=False)
    apart(model.weights, rng, 1.0)
    x = NETS["text" if TENSORFLOW else "causal"].draw(rng)
    whole = factorize(model, "tt", rank=1.0, keep_larger=True, verbose=False)
    found, expected = whole(x), model(x)
    for task in TASKS:
        np.testing.assert_allclose(array(found[task]), array(expected[task]), atol=1e-4)
    for smaller in (
        factorize(model, "tucker", rank=0.5, verbose=False),
        factorize(model, "tucker", weights=0.4, verbose=False),
    ):
        assert smaller.count_params() < model.count_params()
    names = [layer.name for layer in model.layers if isinstance(layer, TaskCopies)]
    one = factorize(
        model, "laf", tolerance=0.5, layers=names[:1], keep_larger=True, verbose=False
    )
    assert {entry.layer.split("/")[0] for entry in factorization_report(one)} == {names[0]}
    by_class = factorize(model, "tucker", rank={"Embedding": 0.3}, verbose=False)
    assert {e.layer.split("/")[0] for e in factorization_report(by_class)} == {names[0]}


def test_priors_and_equal_kernels(rng):
    """Under a prior each kernel of each layer has a covariance of the tasks."""
    backbone = causal()
    prior = TensorNormalRegularizer(0.1, epsilon=0.1)
    model = multitask(backbone, TASKS, prior=prior, verbose=False)
    x = NETS["causal"].draw(rng)
    y = {t: rng.normal(size=v.shape) for t, v in model(x).items()}
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(x, y, verbose=0)
    copied = [layer for layer in model.layers if isinstance(layer, TaskCopies)]
    priors = [kernel.prior for layer in copied for kernel in layer.kernels]
    assert len(priors) == 9 and all(p.covariances["task"].shape == (3, 3) for p in priors)
    hard = multitask(backbone, TASKS, {"embedding*": "independent", "*": "hard"})
    kinds = {row.layer: row.sharing for row in task_summary(hard, verbose=False)}
    assert sum(kind == "hard" for kind in kinds.values()) > 5


def test_tasks_come_and_go(rng):
    """A new task has copies of its own, which are ordinary layers."""
    model = multitask(causal(), TASKS, verbose=False)
    apart(model.weights, rng)
    x = NETS["causal"].draw(rng)
    expected = model(x)
    grown = add_task(model, "style", like="tone")
    found = grown(x)
    for task in TASKS:
        np.testing.assert_allclose(array(found[task]), array(expected[task]), atol=1e-5)
    np.testing.assert_allclose(array(found["style"]), array(expected["tone"]), atol=1e-5)
    assert all("style" in variable.path for variable in grown.trainable_variables)
    left = remove_task(grown, "tone")(x)
    assert set(left) == {"topic", "length", "style"}
    np.testing.assert_allclose(array(left["style"]), array(expected["tone"]), atol=1e-5)


def test_masks_reach_every_task(rng):
    """Also through a layer with T kernels, to pooling, and to the loss of each word."""
    words = keras.Input((6,), dtype="int32")
    x = kl.Embedding(20, 8, mask_zero=True, name="words")(words)
    x = kl.Dense(5, "relu", name="first")(x)
    x = kl.GRU(4, return_sequences=True, name="recurrent")(x)
    tagger = keras.Model(words, kl.Dense(3, name="tags")(x))
    pooled = keras.Model(words, kl.GlobalAveragePooling1D()(tagger.output))
    ids = rng.integers(1, 20, size=(4, 6)).astype("int32")
    ids[:, 3:] = 0
    other = ids.copy()
    other[:, 2:] = 0
    for backbone in (tagger, pooled):
        own = multitask(backbone, TASKS, shared_input=False, verbose=False)
        common = multitask(backbone, TASKS, {"words": "hard"}, verbose=False)
        x = {"topic": ids, "tone": other, "length": ids}
        for found, expected in ((own(x), x), (common(ids), dict.fromkeys(TASKS, ids))):
            for task, given in expected.items():
                np.testing.assert_allclose(
                    array(found[task]), array(backbone(given)), atol=1e-5
                )
    # The loss is of the words that are there, of each task its own.
    y = {t: rng.normal(size=(4, 6, 3)).astype("float32") for t in TASKS}
    own = multitask(tagger, TASKS, shared_input=False, verbose=False)
    own.compile("sgd", "mse", run_eagerly=True)
    found = own.evaluate(x, y, return_dict=True, verbose=0)
    expected = 0
    for task in TASKS:
        error = (array(tagger(x[task])) - y[task]) ** 2
        expected += error[x[task] > 0].mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-4)


# KerasHub is an extra, `hub`; what is skipped is a failure in CI.
if importlib.util.find_spec("keras_hub"):

    @pytest.mark.long
    @pytest.mark.parametrize("name", ["bert", "vit"])
    def test_keras_hub(name, rng, tmp_path):
        """Backbones of KerasHub, of layers of layers: equal, saved, exported."""
        import keras_hub as hub

        if name == "bert":
            sizes = {
                "num_layers": 2,
                "num_heads": 2,
                "hidden_dim": 16,
                "intermediate_dim": 32,
            }
            backbone = hub.models.BertBackbone(50, max_sequence_length=8, **sizes)
            ids = rng.integers(1, 50, size=(2, 8)).astype("int32")
            x = {
                "token_ids": ids,
                "segment_ids": np.zeros_like(ids),
                "padding_mask": np.ones_like(ids),
            }
            pooled = keras.Model(backbone.input, backbone.output["pooled_output"])
        else:
            backbone = hub.models.ViTBackbone(
                image_shape=(16, 16, 3),
                patch_size=4,
                num_layers=2,
                num_heads=2,
                hidden_dim=16,
                mlp_dim=32,
            )
            x = rng.normal(size=(2, 16, 16, 3)).astype("float32")
            pooled = keras.Model(backbone.input, backbone.output[:, 0])
        model = multitask(pooled, TASKS, verbose=False)
        found, expected = model(x), array(pooled(x))
        for task in TASKS:
            np.testing.assert_allclose(array(found[task]), expected, atol=1e-4)
        apart(model.weights, rng)
        found = model(x)
        np.testing.assert_allclose(
            array(single_task(model, "tone")(x)), array(found["tone"]), atol=1e-4
        )
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")(x)
        for task in TASKS:
            np.testing.assert_allclose(array(again[task]), array(found[task]), atol=1e-4)
        export_tasks(model, tmp_path / "saved", verbose=False)
        saved = tensorflow().saved_model.load(tmp_path / "saved")
        np.testing.assert_allclose(saved.tone(x), array(found["tone"]), atol=1e-4)
        equal = multitask(pooled, TASKS, "tucker", tolerance=0.1, verbose=False)
        y = {t: np.ones(v.shape, "float32") for t, v in equal(x).items()}
        equal.compile("adam", "mse")
        assert np.isfinite(equal.fit(x, y, verbose=0).history["loss"][0])
