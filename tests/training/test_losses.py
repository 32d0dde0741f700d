"""Losses: the hinge of T outputs, and any loss with missing labels."""

import math
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import MultiTaskModel
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.losses import MaskedLoss, TaskHinge, one_vs_rest
from dmtrl_keras.metrics import MaskedMetric, MeanBinaryError, MulticlassError

NAN = math.nan
ELEMENTWISE = [
    "mean_squared_error",
    "mean_absolute_error",
    "huber",
    "log_cosh",
    "hinge",
    "binary_crossentropy",
    "poisson",
]


def value(loss, *args):
    """A loss as a float."""
    return float(ops.convert_to_numpy(loss(*args)))


def test_hinge_is_the_formula(rng):
    """max(0, 1 - y f), written out, mean over samples and tasks."""
    labels = one_vs_rest(rng.integers(4, size=6), 4)
    outputs = rng.normal(size=(6, 4)).astype("float32")
    total = 0.0
    for i in range(6):
        for t in range(4):
            total += max(0.0, 1 - labels[i, t] * outputs[i, t])
    assert value(TaskHinge(), labels, outputs) == pytest.approx(total / 24, rel=1e-5)
    assert value(TaskHinge("sum"), labels, outputs) == pytest.approx(total, rel=1e-5)
    for weights in (np.arange(6.0), np.arange(6.0)[:, None], rng.random((6, 4))):
        full = np.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, (6, 4))
        expected = np.sum(full * np.maximum(0, 1 - labels * outputs)) / 24
        actual = value(TaskHinge(), labels, outputs, weights)
        assert actual == pytest.approx(expected, rel=1e-5)


def test_hinge_rejects_wrong_labels():
    """Broadcasting labels would train on nonsense."""
    for labels in (np.ones(3), np.ones((3, 1)), np.ones((3, 5))):
        with pytest.raises(ValueError, match=r"task_hinge.*\(batch, T\).*\(3, 4\)"):
            TaskHinge()(labels, np.ones((3, 4)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "from 0 to 3"),
        ([-1], "from -1 to -1"),
        ([0.0], "float64"),
        ([[0]], r"\(1, 1\)"),
    ],
)
def test_one_vs_rest_errors(labels, message):
    """Only class numbers in range."""
    with pytest.raises(ValueError, match=message):
        one_vs_rest(labels, 3)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("missing", [NAN, -7.0])
def test_single_labels_left_out(name, missing, rng):
    """The mean over what is present, label by label."""
    labels = rng.integers(2, size=(8, 3)).astype("float32")
    outputs = rng.uniform(0.1, 0.9, size=(8, 3)).astype("float32")
    present = rng.random((8, 3)) < 0.6
    given = np.where(present, labels, missing)
    plain = keras.losses.get(name)
    expected = [
        float(
            np.squeeze(plain(labels[i : i + 1, t : t + 1], outputs[i : i + 1, t : t + 1]))
        )
        for i, t in zip(*np.nonzero(present))
    ]
    actual = value(MaskedLoss(name, missing=missing), given, outputs)
    assert actual == pytest.approx(np.mean(expected), rel=1e-4)
    total = value(MaskedLoss(name, missing=missing, reduction="sum"), given, outputs)
    assert total == pytest.approx(np.sum(expected), rel=1e-4)


@pytest.mark.parametrize("name", [*ELEMENTWISE, "categorical_crossentropy"])
def test_nothing_missing_is_the_loss_itself(name, rng):
    """Complete labels: the wrapped loss."""
    outputs = rng.dirichlet(np.ones(3), size=8).astype("float32")
    labels = np.eye(3, dtype="float32")[rng.integers(3, size=8)]
    expected = float(np.mean(keras.losses.get(name)(labels, outputs)))
    assert value(MaskedLoss(name), labels, outputs) == pytest.approx(expected, rel=1e-4)


def test_whole_labels_left_out(rng):
    """Classes, one-hot (a row) and sparse (a number, with and without an axis)."""
    outputs = rng.dirichlet(np.ones(4), size=5).astype("float32")
    classes = np.array([0, 3, 1, 2, 2])
    present = np.array([True, False, True, False, True])
    expected = -np.log(outputs[present, classes[present]]).mean()
    onehot = np.where(present[:, None], np.eye(4)[classes], NAN)
    loss = MaskedLoss("categorical_crossentropy")
    assert value(loss, onehot, outputs) == pytest.approx(expected, rel=1e-4)
    sparse = np.where(present, classes, -1)
    loss = MaskedLoss("sparse_categorical_crossentropy", missing=-1)
    assert value(loss, sparse, outputs) == pytest.approx(expected, rel=1e-4)
    assert value(loss, sparse[:, None], outputs) == pytest.approx(expected, rel=1e-4)


def test_labels_without_an_axis(rng):
    """(batch,) labels for (batch, 1) outputs."""
    labels = np.array([1.0, NAN, 3.0])
    outputs = np.array([[0.0], [5.0], [1.0]])
    assert value(MaskedLoss("mean_squared_error"), labels, outputs) == pytest.approx(2.5)


@pytest.mark.parametrize("name", [*ELEMENTWISE, "categorical_crossentropy"])
@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"]
)
def test_batch_without_labels(name, reduction):
    """0, with zero gradients; also where outputs are extreme."""
    labels = np.full((4, 3), NAN, "float32")
    loss = MaskedLoss(name, reduction=reduction)
    assert value(loss, labels, np.full((4, 3), 0.3, "float32")) == 0
    if keras.config.backend() == "tensorflow":
        tf = tensorflow()
        outputs = tf.constant(np.full((4, 3), 0.3, "float32"))
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            result = loss(labels, outputs)
        np.testing.assert_array_equal(tape.gradient(result, outputs), 0)


def test_gradients_of_present_labels_only():
    """A missing label pulls at nothing, however far the output is."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are compared on TensorFlow")
    tf = tensorflow()
    outputs = tf.constant([[1.0, 1e30], [2.0, 3.0]])
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        loss = MaskedLoss("mean_squared_error")(np.array([[0.0, NAN], [NAN, 1.0]]), outputs)
    np.testing.assert_allclose(tape.gradient(loss, outputs), [[1, 0], [0, 2]])


def test_outputs_beside_nothing():
    """NaN and infinite outputs without a label have no value and no gradient."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are compared on TensorFlow")
    tf = tensorflow()

    def likelihood(y, f):
        return -ops.sum(y * ops.log(f), axis=-1)

    onehot = np.array([[1.0, 0.0], [NAN, NAN], [NAN, NAN]])
    given = {
        MaskedLoss("mse"): onehot,
        MaskedLoss("categorical_crossentropy"): onehot,
        MaskedLoss("sparse_categorical_crossentropy", -1): np.array([0, -1, -1]),
        MaskedLoss(likelihood): onehot,
        MaskedLoss("dice"): onehot,
    }
    outputs = tf.constant([[0.75, 0.25], [NAN, 0.5], [math.inf, -math.inf]])
    for loss, labels in given.items():
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            found = loss(labels, outputs)
        assert float(found) == pytest.approx(
            float(loss(labels[:1], outputs[:1])), rel=1e-6
        ), loss.name
        gradient = tape.gradient(found, outputs).numpy()
        assert np.all(np.isfinite(gradient)) and np.any(gradient[0] != 0), loss.name
        np.testing.assert_array_equal(gradient[1:], 0, err_msg=loss.name)


@pytest.mark.parametrize(
    ("before", "x"),
    [
        (lambda: keras.layers.Masking(0.0), np.array([[1.0], [0.0]])),
        (lambda: keras.layers.Embedding(3, 1, mask_zero=True), np.array([[1, 0], [0, 2]])),
    ],
    ids=["masking", "embedding"],
)
def test_masks_of_keras(before, x):
    """Padding is left out, of the masked loss and metric as of the plain ones."""
    zero = keras.layers.Dense(1, kernel_initializer="zeros")
    outputs = keras.Sequential([before(), zero])(x)
    labels = np.where(x[..., None] if x.dtype == int else x, 2.0, 9.0)
    assert value(keras.losses.MeanSquaredError(), labels, outputs) == pytest.approx(4)
    assert value(MaskedLoss("mse"), labels, outputs) == pytest.approx(4)
    assert value(MaskedLoss("mse", reduction="sum"), labels, outputs) == pytest.approx(
        4 * np.sum(labels == 2)
    )
    metric = MaskedMetric("mse")
    metric.update_state(labels, outputs)
    assert float(metric.result()) == pytest.approx(4)
    # Both what is padding and what has no label.
    labels[0] = NAN
    if x.dtype == int:
        assert value(MaskedLoss("mse"), labels, outputs) == pytest.approx(4)
    else:
        assert value(MaskedLoss("mse"), labels, outputs) == 0


def test_masks_and_tasks():
    """A mask of examples, and losses and metrics with a value for each task."""
    x = np.array([[1.0], [0.0]])
    zero = keras.layers.Dense(3, kernel_initializer="zeros")
    outputs = keras.Sequential([keras.layers.Masking(0.0), zero])(x)
    labels = np.array([[1.0, -1, NAN], [1, 1, 1]])
    whole = np.array([[1.0, -1, 1], [5, 5, 5]])
    weights = np.array([2.0, 3.0])
    for weight, expected in ((None, 1), (weights, 2), (weights[:, None], 2)):
        assert value(TaskHinge(), whole, outputs, weight) == pytest.approx(expected)
        loss = MaskedLoss(TaskHinge())
        assert value(loss, labels, outputs, weight) == pytest.approx(expected)
    binary, multiclass = MeanBinaryError(), MulticlassError()
    binary.update_state(whole, outputs)
    multiclass.update_state(np.array([0, 1]), outputs)
    assert (float(binary.result()), float(multiclass.result())) == pytest.approx((2 / 3, 0))


def test_ignored_classes():
    """What the loss itself ignores counts as missing."""
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=2)
    outputs = np.full((4, 3), 1 / 3)
    outputs[0] = [0.5, 0.25, 0.25]
    found = value(MaskedLoss(loss, missing=-1), np.array([0, 1, 2, -1]), outputs)
    assert found == pytest.approx((math.log(2) + math.log(3)) / 2)
    # As does what a masked loss within leaves out.
    inner = MaskedLoss("sparse_categorical_crossentropy", missing=-1)
    found = value(MaskedLoss(inner, missing=2), np.array([0, 1, 2, -1]), outputs)
    assert found == pytest.approx((math.log(2) + math.log(3)) / 2)


def test_maps_of_classes(rng):
    """Integer maps beside probabilities, against what is present alone."""
    outputs = rng.dirichlet(np.ones(3), size=(2, 4, 5)).astype("float32")
    labels = rng.integers(-1, 3, size=(2, 4, 5))
    present = labels >= 0
    chosen = np.take_along_axis(outputs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    loss = MaskedLoss("sparse_categorical_crossentropy", missing=-1)
    expected = -np.log(chosen[present]).mean()
    assert value(loss, labels, outputs) == pytest.approx(expected, rel=1e-5)
    assert value(loss, labels[..., None], outputs) == pytest.approx(expected, rel=1e-5)
    onehot = np.eye(3, dtype="float32")[labels]
    both = np.sum(onehot[present] * outputs[present])
    expected = 1 - 2 * both / (2 * present.sum())
    marked = np.where(present[..., None], onehot, NAN)
    for name in ("dice", "tversky"):
        for missing, given in ((-1, labels), (NAN, marked)):
            found = value(MaskedLoss(name, missing), given, outputs)
            assert found == pytest.approx(expected, rel=1e-5)
    # One value for each image, of which the second has no label.
    single = MaskedLoss(keras.losses.Dice(axis=(1, 2, 3)), -1)
    expected = value(MaskedLoss("dice", -1), labels[:1], outputs[:1])
    labels[1] = -1
    assert value(single, labels, outputs) == pytest.approx(expected, rel=1e-5)
    assert value(single, labels, outputs, np.array([2.0, 5.0])) == pytest.approx(
        2 * expected, rel=1e-5
    )


@pytest.mark.parametrize("name", ["crossentropy", "ce"])
def test_names_by_shape(name):
    """Binary, one-hot and sparse labels, as `compile` tells them apart."""
    outputs = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    sparse = MaskedLoss(name, missing=-1)
    assert value(sparse, np.array([0, -1]), outputs) == pytest.approx(math.log(2))
    assert value(sparse, np.array([[2], [-1]]), outputs) == pytest.approx(math.log(4))
    onehot = np.array([[0.0, 1, 0], [NAN, NAN, NAN]])
    assert value(MaskedLoss(name), onehot, outputs) == pytest.approx(math.log(4))
    binary = np.array([1.0, NAN])
    for labels in (binary, binary[:, None]):
        found = value(MaskedLoss(name), labels, np.array([[0.25], [0.5]]))
        assert found == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 255], "uint8"), "a type that has -1.*dtype=uint8"),
        (np.array([0, 1, 2], "uint16"), "a type that has -1.*dtype=uint16"),
        (np.array(["0", "1", "2"]), "real numbers.*dtype=<U1"),
        ([None, 1, 2], "real numbers.*dtype=object"),
        (np.array([0, 1, 2], complex), "real numbers.*dtype=complex128"),
        (np.array([0.5, 1, -1]), "whole numbers.*fractional"),
    ],
)
def test_labels_of_wrong_types(labels, message):
    """Labels that would be read as others, or not at all."""
    errors = [ValueError]
    if keras.config.backend() == "tensorflow":
        errors.append(tensorflow().errors.InvalidArgumentError)
    outputs = np.full((3, 3), 1 / 3, "float32")
    loss = MaskedLoss("sparse_categorical_crossentropy", missing=-1)
    with pytest.raises(tuple(errors), match=f"MaskedLoss.*{message}"):
        loss(labels, outputs)
    metric = MaskedMetric("accuracy", missing=-1)
    with pytest.raises(tuple(errors), match=f"MaskedMetric.*{message}"):
        metric.update_state(labels, outputs)
    with pytest.raises(ValueError, match=r"a type that has 255.*dtype=int8"):
        MaskedLoss("mse", missing=255)(np.array([0, -1], "int8"), np.zeros(2))


def test_labels_of_many_types():
    """Those that can have the mark, or that have none."""
    outputs = np.array([[0.5, 0.25, 0.25]] * 2)
    for dtype in ("uint8", "int8", "int64", "float16", "float64"):
        loss = MaskedLoss("sparse_categorical_crossentropy", missing=100)
        found = value(loss, np.array([0, 100], dtype), outputs)
        assert found == pytest.approx(math.log(2))
    whole = MaskedLoss("sparse_categorical_crossentropy")
    assert value(whole, np.array([0, 0], "uint8"), outputs) == pytest.approx(math.log(2))
    assert value(MaskedLoss("mse"), np.ones(2, bool), np.zeros(2)) == 1


def test_sample_weights():
    """Weights of samples, and the two means."""
    labels = np.array([[1.0, NAN], [3.0, 5.0]])
    outputs = np.zeros((2, 2))
    weights = np.array([2.0, 0.5])
    total = 2 * 1 + 0.5 * (9 + 25)
    mean = MaskedLoss("mean_squared_error")
    assert value(mean, labels, outputs, weights) == pytest.approx(total / 3)
    weighted = MaskedLoss("mean_squared_error", reduction="mean_with_sample_weight")
    assert value(weighted, labels, outputs, weights) == pytest.approx(total / 3.0)
    assert value(weighted, labels, outputs, weights[:, None]) == pytest.approx(total / 3.0)
    none = MaskedLoss("mean_squared_error", reduction=None)
    np.testing.assert_allclose(none(labels, outputs), [[1, 0], [9, 25]])


def test_hinge_with_missing_labels():
    """TaskHinge inside MaskedLoss leaves out single tasks."""
    labels = np.array([[1.0, NAN], [-1.0, 1.0]])
    outputs = np.array([[0.5, 9.0], [0.5, 2.0]])
    assert value(MaskedLoss(TaskHinge()), labels, outputs) == pytest.approx((0.5 + 1.5) / 3)


def test_own_functions():
    """An unknown function gets whole labels unless told otherwise."""

    def squared(y, f):
        return ops.mean(ops.square(y - f), axis=-1)

    labels = np.array([[1.0, NAN], [3.0, 5.0]])
    assert value(MaskedLoss(squared), labels, np.zeros((2, 2))) == pytest.approx(17)
    single = MaskedLoss(squared, elementwise=True)
    assert value(single, labels, np.zeros((2, 2))) == pytest.approx(35 / 3)


@pytest.mark.parametrize(
    "loss",
    [
        MaskedLoss("mean_squared_error", missing=-1, name="mine"),
        MaskedLoss(keras.losses.BinaryCrossentropy(label_smoothing=0.3), -1, True, "sum"),
        MaskedLoss(TaskHinge()),
        MaskedLoss(keras.losses.mean_absolute_error),
        MaskedLoss("crossentropy"),
        TaskHinge("sum"),
    ],
    ids=lambda loss: loss.name,
)
def test_serialization(loss):
    """Config and back: the same loss."""
    config = keras.saving.serialize_keras_object(loss)
    assert config["registered_name"].startswith("dmtrl_keras>")
    again = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(again) == config
    labels, outputs = np.array([[1.0, -1.0]]), np.array([[0.25, 0.5]])
    assert value(again, labels, outputs) == value(loss, labels, outputs)


@pytest.mark.long
def test_training_with_missing_labels(tmp_path, rng):
    """A model with dict outputs learns two tasks of which each sample has one label."""
    x = rng.normal(size=(128, 3)).astype("float32")
    y = {"a": x @ rng.normal(size=(3, 1)), "b": x @ rng.normal(size=(3, 2))}
    known = rng.random(128) < 0.5
    given = {
        "a": np.where(known[:, None], y["a"], NAN),
        "b": np.where(known[:, None], NAN, y["b"]),
    }
    inputs = keras.Input((3,))
    outputs = {"a": keras.layers.Dense(1)(inputs), "b": keras.layers.Dense(2)(inputs)}
    model = keras.Model(inputs, outputs)
    loss = {name: MaskedLoss("mean_squared_error") for name in outputs}
    model.compile(keras.optimizers.Adam(0.1), loss, loss_weights={"a": 1.0, "b": 0.5})
    model.fit(x, given, epochs=60, batch_size=16, verbose=0)
    for name, prediction in model.predict(x, verbose=0).items():
        assert np.mean((prediction - y[name]) ** 2) < 1e-2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.evaluate(x, given, verbose=0)
    np.testing.assert_allclose(loaded.evaluate(x, given, verbose=0), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaskedLoss(3), "Received: 3"),
        (lambda: MaskedLoss("no_such_loss"), "no_such_loss"),
        (lambda: MaskedLoss("hinge", missing="none"), "missing='none'"),
        (lambda: MaskedLoss("hinge", reduction="median"), "median"),
        (
            lambda: MaskedLoss("hinge")(np.ones((2, 4)), np.ones((2, 3))),
            r"masked_hinge.*\(2, 3\).*\(2, 4\)",
        ),
        (
            lambda: MaskedLoss("hinge")(np.ones((2, 3, 4)), np.ones((2, 3))),
            r"masked_hinge.*\(2, 3\).*\(2, 3, 4\)",
        ),
        (
            lambda: MaskedLoss("dice", -1)(np.ones((2, 3, 3)), np.ones((2, 6, 6, 2))),
            r"masked_dice.*\(2, 6, 6, 2\).*\(2, 3, 3\)",
        ),
        (lambda: MaskedLoss(keras.losses.CTC()), "a value for each label.*CTC"),
        (lambda: MaskedLoss(keras.losses.Circle()), "a value for each label.*Circle"),
        (
            lambda: MaskedLoss(keras.losses.CategoricalCrossentropy(axis=1))(
                np.ones((2, 3, 3)), np.ones((2, 3, 3))
            ),
            "along the last axis.*CategoricalCrossentropy.*axis=1",
        ),
        (
            lambda: MaskedLoss(lambda y, f: ops.mean(y - f))(np.ones((2, 3)), np.eye(2, 3)),
            r"of shape \(2,\).*<lambda>.*of shape \(\)",
        ),
        (
            lambda: MaskedLoss("mse")(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4))),
            r"broadcast to \(2, 3\).*\(2, 4\)",
        ),
    ],
)
def test_errors(call, message):
    """What was received and expected."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("sparse", [True, False])
def test_logits_of_outputs_with_an_activation(sparse, rng):
    """As in Keras: what the activation was given is taken, with a warning."""
    inputs = keras.Input((3,))
    units, activation = (4, "softmax") if sparse else (1, "sigmoid")
    model = MultiTaskModel(
        inputs, {"a": keras.layers.Dense(units, activation, name="a_out")(inputs)}
    )
    kind = "SparseCategoricalCrossentropy" if sparse else "BinaryCrossentropy"
    labels = rng.integers(units if sparse else 2, size=(8, 1)).astype("float32")
    x = rng.normal(size=(8, 3)).astype("float32")
    found = []
    for from_logits in (True, False):
        model.compile("sgd", MaskedLoss(getattr(keras.losses, kind)(from_logits)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(model.evaluate(x, labels, verbose=0))
        said = any("expected outputs without" in str(one.message) for one in caught)
        assert said == (from_logits and keras.backend.backend() == "tensorflow")
    if keras.backend.backend() == "tensorflow":
        np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
