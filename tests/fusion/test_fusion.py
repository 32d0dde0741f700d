"""Cross-Stitch and NDDR: their formulas in loops, their start, and between layers."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import multitask, single_task, task_summary
from dmtrl_keras.layers import NDDR, CrossStitch, TaskConv2D
from dmtrl_keras.testing import check_layer

T, C = 3, 4


def grouped(rng, shape=(2, 5, 5)):
    """Random grouped features, and the same by task."""
    x = rng.normal(size=(*shape, T * C)).astype("float32")
    return x, np.split(x, T, axis=-1)


@pytest.mark.parametrize("per_channel", [False, True])
def test_cross_stitch_is_the_formula(per_channel, rng):
    """MTAL Eq. 1 for every task and channel, one by one."""
    x, parts = grouped(rng)
    layer = CrossStitch(T, per_channel=per_channel)
    layer.build(x.shape)
    alpha = rng.normal(size=layer.alpha.shape)
    assert alpha.shape == ((T, T, C) if per_channel else (T, T))
    layer.alpha.assign(alpha)
    outputs = np.split(ops.convert_to_numpy(layer(x)), T, axis=-1)
    for t in range(T):
        for c in range(C):
            own = alpha[t, :, c] if per_channel else alpha[t]
            expected = sum(own[s] * parts[s][..., c] for s in range(T))
            np.testing.assert_allclose(outputs[t][..., c], expected, atol=1e-5)


def test_nddr_is_the_formula(rng):
    """A 1x1 convolution of all features for each task, then batch normalization."""
    x, parts = grouped(rng)
    layer = NDDR(T)
    layer.build(x.shape)
    kernel = rng.normal(size=(T * C, T * C))
    layer.kernel.assign(kernel)
    outputs = np.split(ops.convert_to_numpy(layer(x, training=True)), T, axis=-1)
    for t in range(T):
        convolution = keras.layers.Conv2D(C, 1, use_bias=False)
        convolution.build(x.shape)
        convolution.kernel.assign(kernel[:, t * C : (t + 1) * C].reshape(1, 1, T * C, C))
        normalization = keras.layers.BatchNormalization()
        expected = normalization(convolution(np.concatenate(parts, -1)), training=True)
        np.testing.assert_allclose(outputs[t], expected, atol=1e-4)


@pytest.mark.parametrize("cls", [CrossStitch, NDDR])
def test_start(cls, rng):
    """`own` of a task's features, the rest from the others; the identity exactly for 1."""
    arguments = {"batch_normalization": False} if cls is NDDR else {}
    x, parts = grouped(rng)
    outputs = np.split(ops.convert_to_numpy(cls(T, own=0.8, **arguments)(x)), T, axis=-1)
    for t in range(T):
        others = sum(parts[s] for s in range(T) if s != t)
        np.testing.assert_allclose(outputs[t], 0.8 * parts[t] + 0.1 * others, atol=1e-6)
    same = cls(T, own=1.0, **arguments)(x)
    np.testing.assert_array_equal(ops.convert_to_numpy(same), x)
    alone = cls(1, own=0.3, **arguments)(x)
    np.testing.assert_array_equal(ops.convert_to_numpy(alone), x)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (CrossStitch, {}),
        (CrossStitch, {"per_channel": True, "own": 0.5}),
        (CrossStitch, {"tasks": ["a", "b", "c"]}),
        (NDDR, {"kernel_regularizer": "l2", "momentum": 0.8}),
        (NDDR, {"batch_normalization": False, "tasks": 1}),
    ],
)
@pytest.mark.parametrize("shape", [pytest.param((4,), marks=pytest.mark.long), (2, 5, 5)])
def test_promises(cls, arguments, shape, rng):
    """Saving, export, mixed precision, unknown batch size: `check_layer`."""
    x, _ = grouped(rng, shape)
    check_layer(lambda **k: cls(**({"tasks": T} | arguments), **k), x)


@pytest.mark.parametrize("cls", [CrossStitch, NDDR])
def test_promises_of_vectors(cls, rng):
    """The same for features without an image's axes."""
    x, _ = grouped(rng, (4,))
    check_layer(lambda **k: cls(tasks=T, **k), x)


@pytest.mark.parametrize("cls", [CrossStitch, NDDR])
def test_channels_first(cls, rng):
    """The same as channels-last, transposed."""
    x, _ = grouped(rng)
    expected = np.moveaxis(ops.convert_to_numpy(cls(T)(x)), -1, 1)
    moved = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    outputs = cls(T, data_format="channels_first")(moved)
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, atol=1e-6)


def backbone():
    """Two convolutions, with one pooling layer after each."""
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.Conv2D(8, 3, activation="relu", name="conv1"),
            keras.layers.MaxPooling2D(name="pool1"),
            keras.layers.Conv2D(6, 3, activation="relu", name="conv2"),
            keras.layers.AveragePooling2D(2, name="pool2"),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda tasks: CrossStitch(tasks, own=1.0),
        lambda tasks: CrossStitch(tasks, own=1.0, per_channel=True),
        lambda tasks: NDDR(tasks, own=1.0, batch_normalization=False),
    ],
    ids=["stitch", "stitch per channel", "nddr"],
)
@pytest.mark.parametrize("places", [None, "conv*"])
def test_identity_reproduces_independent_networks(make, places, shared_input, rng):
    """Between any layers, at the identity, outputs are those of independent tasks."""
    source = backbone()
    between = make if places is None else {places: make}
    model = multitask(source, list("ab"), shared_input=shared_input, between=between)
    fusions = [layer.name for layer in model.layers if layer.name.endswith("_fusion")]
    expected = ["pool1_fusion", "pool2_fusion"]
    if places is not None:
        expected = ["conv1_fusion", "conv2_fusion"]
    assert fusions == expected
    x = rng.normal(size=(4, 12, 12, 3)).astype("float32")
    outputs = model(x if shared_input else {"a": x, "b": -x})
    np.testing.assert_allclose(outputs["a"], source(x), atol=1e-6)
    second = source(x if shared_input else -x)
    np.testing.assert_allclose(outputs["b"], second, atol=1e-6)


def test_trained_and_saved(rng, tmp_path):
    """With learned fusion, from fit to file; the summary counts what it adds."""
    arguments = {"sharing": "laf", "rank": 1.0, "between": CrossStitch, "verbose": False}
    model = multitask(backbone(), list("ab"), heads=3, **arguments)
    model.compile("adam", "sparse_categorical_crossentropy")
    x, y = rng.normal(size=(8, 12, 12, 3)), dict.fromkeys("ab", np.arange(8) % 3)
    start = ops.convert_to_numpy(model.get_layer("pool1_fusion").alpha)
    model.fit(x, y, epochs=2, verbose=0)
    assert np.abs(start - model.get_layer("pool1_fusion").alpha).max() > 1e-4
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    for task, output in model.predict(x, verbose=0).items():
        np.testing.assert_allclose(loaded.predict(x, verbose=0)[task], output, atol=1e-6)
    rows = {row.layer: row for row in task_summary(model, verbose=False)}
    assert rows["pool1_fusion"].parameters == 4
    assert rows["pool1_fusion"].sharing == "features"
    assert rows["pool1_fusion"].parameters_if_independent == 0
    with pytest.raises(ValueError, match="mixes the features of the tasks"):
        single_task(model, "a")


def test_errors():
    """Bad shares and places, shared features, layers in place of functions."""
    for own in (-0.1, 1.5, "most"):
        with pytest.raises(ValueError, match=r"CrossStitch.*`own`.*\[0, 1\]"):
            CrossStitch(2, own=own)
    with pytest.raises(ValueError, match="NDDR 'fusion'"):
        NDDR(3, name="fusion").build((None, 4))
    no_pooling = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    cases = [
        (no_pooling, CrossStitch, {}, "has none.*fc"),
        (backbone(), CrossStitch(2), {}, "functions? of the task names"),
        (backbone(), {"pool1": CrossStitch(2)}, {}, "functions? of the task names"),
        (backbone(), "stitch", {}, "functions? of the task names"),
        (backbone(), {"pool9": CrossStitch}, {}, "fits none"),
        (backbone(), {"pool1": CrossStitch}, {"share_until": "pool1"}, "features of their"),
    ]
    for source, between, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            multitask(source, ["a", "b"], between=between, **arguments)


def test_thresholds_of_multitask():
    """A threshold needs layers to hold for; of similar kernels it may differ by layer."""
    with pytest.raises(ValueError, match=r"\['threshold'\] are for"):
        multitask(backbone(), ["a", "b"], threshold=0.4)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        multitask(backbone(), ["a", "b"], sharing="similar", threshold=1.4)
    with pytest.raises(ValueError, match="fits none"):
        multitask(backbone(), ["a", "b"], sharing="similar", threshold={"conv9": 0.4})
    schedule = keras.optimizers.schedules.PolynomialDecay(0.9, 10, 0.1)
    model = multitask(backbone(), ["a", "b"], sharing="similar", threshold=schedule)
    threshold = model.get_layer("conv2").sharing.threshold
    assert threshold.get_config() == schedule.get_config()
    assert isinstance(model.get_layer("conv2"), TaskConv2D)
    mixed = {"conv1": "similar", "*": "laf"}
    model = multitask(
        backbone(),
        ["a", "b"],
        sharing=mixed,
        threshold={"conv1": "unrelated"},
        verbose=False,
    )
    assert model.get_layer("conv1").sharing.threshold == 0.55
