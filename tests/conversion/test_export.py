"""Exported files, loaded by the runtimes that serve them."""

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

from dmtrl_keras import MultiTaskModel, export_tasks, multitask, task_layers
from dmtrl_keras.ground.backend import tensorflow

NAMES = ["zeta", "alpha"]
# How the kernels come to be, and whether the tasks have one input: a layer of each kind,
# and one kind for all layers.
EACH = {"separable": "laf", "conv": "tucker", "fc": "tt", "hidden": "hard"}
CASES = [
    ("each", True),
    ("each", False),
    *(
        pytest.param((sharing, shared_input), marks=pytest.mark.long)
        for sharing, shared_input in [
            ("independent", True),
            ("hard", True),
            ("laf", True),
            ("tucker", True),
            ("tt", True),
            ("independent", False),
            ("tucker", False),
        ]
    ),
]


def network(sharing, shared_input):
    """Convolutions of all kinds, a shared trunk, two heads."""
    inputs = keras.Input((16, 16, 3), name="image")
    x = kl.Conv2D(6, 3, strides=2, padding="same", name="trunk")(inputs)
    x = kl.BatchNormalization(name="trunk_bn")(x)
    x = kl.SeparableConv2D(8, 3, padding="same", name="separable")(x)
    x = kl.LayerNormalization()(x)
    y = kl.Reshape((1, 1, 8))(kl.GlobalAveragePooling2D()(x))
    x = kl.Multiply()([x, kl.Conv2D(8, 1, activation="sigmoid", name="gate")(y)])
    x = kl.Concatenate()([x, kl.Conv2D(4, 3, padding="same", name="conv")(x)])
    x = kl.Dense(6, activation="relu", name="fc")(kl.Flatten()(kl.MaxPooling2D(4)(x)))
    backbone = keras.Model(inputs, kl.Dense(5, activation="tanh", name="hidden")(x))
    return multitask(
        backbone,
        NAMES,
        sharing=EACH if sharing == "each" else sharing,
        share_until="trunk_bn",
        shared_input=shared_input,
        heads={"zeta": 3, "alpha": 1},
        verbose=False,
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    """`(model, inputs, expected outputs)`, the tasks' weights different."""
    sharing, shared_input = request.param
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    model = network(sharing, shared_input)
    if sharing == "each":
        kinds = {layer.sharing.name for layer in task_layers(model)}
        assert kinds == {"independent", "hard", "laf", "tucker", "tt"}
    for weight in model.trainable_weights:
        weight.assign(weight + 0.1 * rng.normal(size=weight.shape))
    x = {name: rng.normal(size=(5, 16, 16, 3)).astype("float32") for name in NAMES}
    x = x["zeta"] if shared_input else x
    return model, x, {k: ops.convert_to_numpy(v) for k, v in model(x).items()}


def assert_close(outputs, expected):
    """The same tasks, within 1e-4."""
    assert set(outputs) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, atol=1e-4)


def test_saved_model(case, tmp_path):
    """`tf.saved_model`: outputs named as the tasks, any batch size."""
    model, x, expected = case
    model.export(tmp_path / "saved", verbose=False)
    loaded = tensorflow().saved_model.load(str(tmp_path / "saved"))
    assert_close(loaded.serve(x), expected)
    signature = loaded.signatures["serving_default"]
    assert set(signature.structured_outputs) == set(NAMES)
    few = {name: value[:2] for name, value in expected.items()}
    half = x[:2] if not isinstance(x, dict) else {k: v[:2] for k, v in x.items()}
    assert_close(loaded.serve(half), few)


def test_endpoints(case, tmp_path):
    """One for all tasks, and one for each, which takes its own input alone."""
    model, x, expected = case
    export_tasks(model, tmp_path / "saved", verbose=False)
    loaded = tensorflow().saved_model.load(str(tmp_path / "saved"))
    assert_close(loaded.serve(x), expected)
    for name in NAMES:
        own = x[name] if isinstance(x, dict) else x
        output = getattr(loaded, name)(own)
        np.testing.assert_allclose(output, expected[name], atol=1e-4)
        assert name in loaded.signatures
        few = getattr(loaded, name)(own[:1])
        np.testing.assert_allclose(few, expected[name][:1], atol=1e-4)


def test_litert(case, tmp_path):
    """`ai_edge_litert`: inputs and outputs by name, any batch size."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    model, x, expected = case
    path = tmp_path / "model.tflite"
    model.export(path, format="litert", verbose=False)
    runner = interpreter.Interpreter(str(path)).get_signature_runner()
    assert set(runner.get_output_details()) == set(NAMES)
    for count in (5, 2):
        given = x if isinstance(x, dict) else {"image": x}
        outputs = runner(**{name: value[:count] for name, value in given.items()})
        assert_close(outputs, {name: value[:count] for name, value in expected.items()})


def test_onnx(case, tmp_path):
    """`onnxruntime`: outputs named as the tasks, any batch size."""
    runtime = pytest.importorskip("onnxruntime")
    model, x, expected = case
    path = tmp_path / "model.onnx"
    model.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    assert set(names) == set(NAMES)
    given = {"image": x}
    if isinstance(x, dict):
        given = {f"{name}_input": value for name, value in x.items()}
    for count in (5, 2):
        outputs = session.run(names, {name: value[:count] for name, value in given.items()})
        few = {name: value[:count] for name, value in expected.items()}
        assert_close(dict(zip(names, outputs)), few)


@pytest.mark.long
def test_backbone(rng, tmp_path):
    """A backbone of keras.applications in all three formats."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    runtime = pytest.importorskip("onnxruntime")
    backbone = keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), include_top=False, weights=None, pooling="avg"
    )
    model = multitask(backbone, NAMES, heads=3)
    x = rng.uniform(0, 1, size=(2, 32, 32, 3)).astype("float32")
    expected = {k: ops.convert_to_numpy(v) for k, v in model(x).items()}
    input_name = model.input.name
    model.export(tmp_path / "saved", verbose=False)
    loaded = tensorflow().saved_model.load(str(tmp_path / "saved"))
    assert_close(loaded.serve(x), expected)
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False)
    runner = interpreter.Interpreter(path).get_signature_runner()
    assert_close(runner(**{input_name: x}), expected)
    assert_close(through_onnx(runtime, model, tmp_path, {input_name: x}), expected)


def words(x):
    """Words, attention among them, their mean."""
    x = kl.Embedding(9, 4)(x)
    return kl.GlobalAveragePooling1D()(x + kl.MultiHeadAttention(2, 3)(x, x))


# Layers of which there are copies, and the shape and kind of their inputs.
COPIED = {
    "words": (words, (5,), "int32"),
    "upwards": (lambda x: kl.Flatten()(kl.Conv2DTranspose(3, 3, 2)(x)), (4, 4, 2), None),
    "lstm": (kl.LSTM(4, unroll=True), (5, 3), None),
    "both ways": (kl.Bidirectional(kl.GRU(4)), (5, 3), None),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", COPIED)
def test_copies(kind, rng, tmp_path):
    """Copies of layers without a rule; of a loop over time LiteRT has no kernel."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    runtime = pytest.importorskip("onnxruntime")
    layers, shape, dtype = COPIED[kind]
    inputs = keras.Input(shape, dtype=dtype, name="x")
    backbone = keras.Model(inputs, layers(inputs))
    model = multitask(backbone, NAMES, start="apart", heads=2, verbose=False)
    x = rng.integers(0, 9, size=(3, *shape)).astype(dtype or "float32")
    expected = {k: ops.convert_to_numpy(v) for k, v in model(x).items()}
    assert not np.allclose(*expected.values(), atol=1e-3)
    assert_close(through_onnx(runtime, model, tmp_path, {"x": x}), expected)
    if kind == "both ways":
        return
    model.export(tmp_path / "model.tflite", format="litert", verbose=False)
    path = str(tmp_path / "model.tflite")
    assert_close(interpreter.Interpreter(path).get_signature_runner()(x=x), expected)


def through_onnx(runtime, model, folder, inputs):
    """Outputs by name of an exported ONNX file."""
    path = str(folder / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))


@pytest.mark.parametrize(
    "activation", ["gelu", "silu", "hard_silu", "elu", "tanh", "relu6", "softplus", "mish"]
)
def test_activations_in_onnx(activation, rng, tmp_path):
    """The activations of backbones, the exact GELU of ConvNeXt among them."""
    runtime = pytest.importorskip("onnxruntime")
    inputs = keras.Input((4,), name="x")
    backbone = keras.Model(inputs, kl.Dense(3, activation)(kl.Dense(4)(inputs)))
    model = multitask(backbone, NAMES)
    x = rng.normal(size=(5, 4)).astype("float32")
    expected = {k: ops.convert_to_numpy(v) for k, v in model(x).items()}
    assert_close(through_onnx(runtime, model, tmp_path, {"x": x}), expected)


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_normalization_in_onnx(shared_input, after, rng, tmp_path):
    """Statistics of an input normalization are constants of the file, not its inputs."""
    runtime = pytest.importorskip("onnxruntime")
    data = rng.normal(3, 5, size=(50, 4)).astype("float32")
    adapted = kl.Normalization()
    adapted.adapt(data)
    inputs = keras.Input((4,), name="x")
    fixed = kl.Normalization(mean=[1.0, 2, 3, 4], variance=[4.0, 1, 4, 1])
    adapted_to_all = kl.Normalization(axis=None, mean=2.0, variance=9.0, invert=True)
    x = adapted_to_all(inputs)
    x = fixed(adapted(kl.Dense(4)(x) if after else x))
    model = multitask(keras.Model(inputs, kl.Dense(2)(x)), NAMES, shared_input=shared_input)
    given = data if shared_input else dict.fromkeys(NAMES, data)
    expected = {k: ops.convert_to_numpy(v) for k, v in model(given).items()}
    named = {"x": data} if shared_input else {f"{name}_input": data for name in NAMES}
    assert_close(through_onnx(runtime, model, tmp_path, named), expected)
    # The model is what it was.
    for name, value in model(given).items():
        np.testing.assert_array_equal(value, expected[name])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close({k: np.array(v) for k, v in loaded(given).items()}, expected)


@pytest.mark.parametrize("shared_input", [True, False])
def test_names_that_tensorflow_takes(shared_input, rng, tmp_path):
    """An attribute of CelebA starts with a digit, layers with an underscore."""
    inputs = keras.Input((4,), name="x")
    x = kl.BatchNormalization(name="_norm")(kl.Dense(3, name="_a dense")(inputs))
    names = ["5_o_Clock_Shadow", "a.b-c"]
    model = multitask(keras.Model(inputs, x), names, shared_input=shared_input, heads=2)
    made = {layer.name for layer in model.layers}
    assert {"norm", "a_dense", "5_o_Clock_Shadow_head"} <= made
    model.compile("sgd", "sparse_categorical_crossentropy")
    data = rng.normal(size=(3, 4)).astype("float32")
    given = data if shared_input else dict.fromkeys(names, data)
    model.train_on_batch(given, {name: np.array([0, 1, 1]) for name in names})
    expected = {k: ops.convert_to_numpy(v) for k, v in model(given).items()}
    export_tasks(model, tmp_path / "saved", verbose=False)
    loaded = tensorflow().saved_model.load(str(tmp_path / "saved"))
    assert_close(loaded.serve(given), expected)
    output = getattr(loaded, names[0])(data)
    np.testing.assert_allclose(output, expected[names[0]], atol=1e-5)


def test_endpoints_of_an_edited_network(rng, tmp_path):
    """A network called inside another, two of its tasks kept, one added."""
    inputs = keras.Input((4,), name="x")
    backbone = keras.Model(inputs, kl.Dense(3, name="fc")(inputs))
    inner = multitask(backbone, ["a", "b", "c"], heads=2)
    outputs = inner(kl.Rescaling(2.0)(inputs))
    outputs = {"c": outputs["c"], "b": outputs["b"], "d": kl.Dense(1)(inputs)}
    model = MultiTaskModel(inputs, outputs)
    for layer in inner.layers:
        layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    x = rng.normal(size=(3, 4)).astype("float32")
    expected = {k: ops.convert_to_numpy(v) for k, v in model(x).items()}
    export_tasks(model, tmp_path / "saved", verbose=False)
    loaded = tensorflow().saved_model.load(str(tmp_path / "saved"))
    assert_close(loaded.serve(x), expected)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(loaded, name)(x), value, atol=1e-5)


def test_errors(tmp_path):
    """No MultiTaskModel."""
    inputs = keras.Input((4,))
    backbone = keras.Model(inputs, kl.Dense(2)(inputs))
    with pytest.raises(ValueError, match=r"expected a MultiTaskModel.*Functional"):
        export_tasks(backbone, tmp_path)
