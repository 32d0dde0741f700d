"""What `compile` of a MultiTaskModel takes: losses, weights and metrics of some tasks."""

import itertools
import warnings

import keras
import numpy as np
import pytest
from keras import layers as kl

from dmtrl_keras import MultiTaskModel
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.metrics import MaskedMetric

SPARSE = "sparse_categorical_crossentropy"


def network(cls=MultiTaskModel, units=1, activation=None):
    """Two tasks, always with the same weights."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    outputs = {t: kl.Dense(units, activation, name=t)(inputs) for t in ("a", "b")}
    return cls(inputs, outputs)


@pytest.fixture
def data(rng):
    """Inputs, and labels of both tasks."""
    x = rng.normal(size=(6, 4)).astype("float32")
    return x, {t: rng.normal(size=(6, 1)).astype("float32") for t in ("a", "b")}


SOME = (None, {"a": "mae"}, {"a": ["mae"], "b": ["mae"]})


@pytest.mark.parametrize("loss", [{"a": "mse"}, {"a": "mse", "b": None}, "mse"])
@pytest.mark.parametrize("weighted", [False, True])
def test_some_tasks(loss, weighted, data):
    """Losses, metrics, labels and weights of some tasks: the numbers, or our error."""
    x, y = data
    model, plain = network(), network(keras.Model)
    found = {t: keras.ops.convert_to_numpy(v) for t, v in model(x).items()}
    with_loss = {"a", "b"} if loss == "mse" else {"a"}
    for metrics, tasks, weight in itertools.product(SOME, ("a", "ab"), (None, 2.0)):
        labels = {t: y[t] for t in tasks}
        weights = {t: np.arange(6.0) for t in tasks} if weighted else None
        kind = "weighted_metrics" if weighted else "metrics"
        arguments = {"loss": loss, kind: metrics, "run_eagerly": True}
        if weight:
            arguments["loss_weights"] = {"a": weight}
        model.compile("sgd", **arguments)

        def evaluate(model, labels=labels, weights=weights):
            return model.evaluate(
                x, labels, sample_weight=weights, verbose=0, return_dict=True
            )

        if not with_loss | set(metrics or ()) <= set(tasks):
            with pytest.raises(ValueError, match=r"MultiTaskModel.*also for \['b'\]"):
                evaluate(model)
            continue
        logs = evaluate(model)
        size = np.arange(6.0)[:, None] if weighted else 1.0
        factors = {"a": weight or 1.0, "b": 1.0}
        expected = sum(
            factors[t] * float(np.mean(size * (found[t] - y[t]) ** 2)) for t in with_loss
        )
        assert logs["loss"] == pytest.approx(expected, rel=1e-5)
        for task in metrics or ():
            error = np.abs(found[task] - y[task])
            mean = np.average(error[:, 0], weights=np.arange(6.0) if weighted else None)
            assert logs[f"{task}_mae"] == pytest.approx(float(mean), rel=1e-5)
        if tasks == "ab" and not weight:
            plain.compile("sgd", **arguments)
            assert logs == pytest.approx(evaluate(plain), rel=1e-5)


def test_fit_with_labels_of_one_task(data):
    """Metrics of a task without a loss for the other, in a graph."""
    x, y = data
    model = network()
    model.compile("sgd", {"a": "mse", "b": None}, metrics={"a": ["mae"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The head of b has no gradient.
        history = model.fit(x, {"a": y["a"]}, verbose=0).history
    assert set(history) == {"loss", "a_mae"}


def test_weights_of_some_tasks(data):
    """In a stream sample weights of a task may be left out: they are ones."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("a data set of TensorFlow")
    x, y = data
    weights = {"a": np.arange(6.0, dtype="float32")}
    stream = tensorflow().data.Dataset.from_tensors((x, y, weights))
    model = network()
    model.compile("sgd", "mse", weighted_metrics=["mae"], run_eagerly=True)
    found = model.evaluate(stream, verbose=0)
    weights["b"] = np.ones(6, "float32")
    assert found == pytest.approx(model.evaluate(x, y, sample_weight=weights, verbose=0))


def test_several_losses_of_a_task(data):
    """One weight for all of them, or one for each."""
    x, y = data
    model = network()
    found = model(x)
    loss = {"a": ["mse", "mae"], "b": "mse"}
    for weights in ({"a": 2.0}, {"a": [2.0, 2.0], "b": 1.0}):
        model.compile("sgd", loss, loss_weights=weights)
        losses, given = model.task_losses(y, found)
        error = keras.ops.convert_to_numpy(found["a"]) - y["a"]
        expected = 2 * float(np.mean(error**2) + np.mean(np.abs(error)))
        assert float(losses["a"]) == pytest.approx(expected, rel=1e-5)
        assert given == {"a": 1.0, "b": 1.0}
    assert model.loss_weights == {"a": [2.0, 2.0], "b": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": {"a": ["mse", None]}}, "`loss` has None in the list of task 'a'"),
        ({"loss": "mse", "loss_weights": {"a": "x"}}, "finite numbers.*'a': 'x'"),
        ({"loss": "mse", "loss_weights": {"a": np.nan}}, "finite numbers.*'a': nan"),
        ({"loss": "mse", "loss_weights": {"a": True}}, "finite numbers.*'a': True"),
        ({"loss": "mse", "loss_weights": {"a": None}}, "finite numbers.*'a': None"),
        ({"loss": "mse", "loss_weights": {"a": keras.Variable([1.0])}}, "scalar"),
        (
            {"loss": {"a": ["mse", "mae"]}, "loss_weights": {"a": [1.0]}},
            r"all losses of task 'a', or 2.*\[1.0\]",
        ),
    ],
)
def test_errors(arguments, message):
    """What was received, what was expected."""
    with pytest.raises(ValueError, match=f"MultiTaskModel.*{message}"):
        network().compile("sgd", **arguments)


class Move(keras.callbacks.Callback):
    """Sets a loss weight before every batch."""

    def on_train_batch_begin(self, batch, logs=None):
        self.model.loss_weights["a"].assign([1.0, 0.0, 3.0][batch])


def test_moving_weights(data, tmp_path):
    """A variable is followed in compiled steps, saved and loaded, and not trained."""
    x, y = data
    model, steps = network(), network()
    weight = keras.Variable(7.0)
    model.compile(keras.optimizers.SGD(0.1), "mse", loss_weights={"a": weight})
    model.fit(x, y, batch_size=2, shuffle=False, callbacks=[Move()], verbose=0)
    for batch, value in enumerate((1.0, 0.0, 3.0)):
        rows = slice(2 * batch, 2 * batch + 2)
        steps.compile(
            keras.optimizers.SGD(0.1), "mse", loss_weights={"a": value}, run_eagerly=True
        )
        steps.train_on_batch(x[rows], {t: own[rows] for t, own in y.items()})
    for own, other in zip(model.get_weights(), steps.get_weights(), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5)
    assert model.loss_weights["a"] is weight and float(weight.numpy()) == 3.0
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert set(expected) == {"loss", "a_loss", "b_loss"}
    total = 3 * expected["a_loss"] + expected["b_loss"]
    assert expected["loss"] == pytest.approx(total, rel=1e-5)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(expected)
    loaded.loss_weights["a"].assign(0.0)
    found = loaded.evaluate(x, y, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(expected["b_loss"])
    keras.saving.load_model(tmp_path / "model.keras", compile=False)
    # Files of weights have it, too: `BackupAndRestore` goes on with it.
    model.save_weights(tmp_path / "model.weights.h5")
    weight.assign(5.0)
    model.load_weights(tmp_path / "model.weights.h5")
    assert float(weight.numpy()) == 3.0
    network().load_weights(tmp_path / "model.weights.h5")


def test_one_variable_for_two_tasks(data):
    """It is state once."""
    x, y = data
    model, weight = network(), keras.Variable(2.0)
    model.compile("sgd", "mse", loss_weights={"a": weight, "b": weight})
    assert sum(v is weight for v in model.metrics_variables) == 1
    logs = model.fit(x, y, verbose=0).history
    total = 2 * (logs["a_loss"][0] + logs["b_loss"][0])
    assert logs["loss"][0] == pytest.approx(total, rel=1e-5)
    model.compile("sgd", "mse")
    assert not any(v is weight for v in model.metrics_variables)


def class_metrics():
    """Of Keras, that can't take class labels beside a softmax."""
    yield from ("auc", "precision", "recall", "categorical_accuracy", "f1_score")
    yield keras.metrics.AUC(curve="PR")
    yield keras.metrics.MeanIoU(2)
    yield keras.metrics.BinaryIoU()


@pytest.mark.parametrize("metric", list(class_metrics()), ids=str)
@pytest.mark.parametrize("axis", [False, True])
def test_metrics_that_take_no_classes(metric, axis, data):
    """They fail in a graph of Keras, or give a number without meaning."""
    x, _ = data
    y = np.arange(6) % 2
    labels = dict.fromkeys(("a", "b"), y[:, None] if axis else y)
    model = network(units=2, activation="softmax")
    model.compile("sgd", SPARSE, metrics={"a": [metric]}, run_eagerly=True)
    shape = r"\(6, 1\)" if axis else r"\(6,\)"
    message = f"metric .* of task 'a': expected a label for each of the 2.*{shape}"
    with pytest.raises(ValueError, match=f"MultiTaskModel.*{message}"):
        model.evaluate(x, labels, verbose=0)


def test_metrics_that_take_classes(data):
    """Those of Keras for class labels, of one's own, and one-hot labels."""
    x, _ = data
    y = np.arange(6) % 2
    model = network(units=2, activation="softmax")
    own = keras.metrics.MeanMetricWrapper(lambda y, p: p[:, 0], name="own")
    iou = keras.metrics.MeanIoU(2, sparse_y_pred=False)
    metrics = ["accuracy", "sparse_top_k_categorical_accuracy", SPARSE, own, iou]
    model.compile("sgd", SPARSE, metrics={"a": metrics}, run_eagerly=True)
    model.evaluate(x, {"a": y, "b": y}, verbose=0)
    labels = dict.fromkeys(("a", "b"), np.eye(2)[y])
    model.compile("sgd", "categorical_crossentropy", metrics=["auc"], run_eagerly=True)
    model.evaluate(x, labels, verbose=0)
    # In a graph, before it runs.
    model.compile("sgd", SPARSE, metrics=["auc"])
    with pytest.raises(ValueError, match=r"'auc' of task 'a'.*Dense"):
        model.fit(x, {"a": y, "b": y}, verbose=0)


def test_plain_metrics_beside_masked_losses(tmp_path):
    """Told of when the model is compiled, but not once more when it is loaded."""
    model = network()
    losses = {"a": MaskedLoss("mse"), "b": "mse"}
    with pytest.warns(UserWarning, match=r"\['a: mae'\].*MaskedMetric"):
        model.compile("sgd", losses, metrics=["mae"])
    with pytest.warns(UserWarning, match=r"\['a: accuracy'\]"):
        model.compile("sgd", losses, weighted_metrics={"a": ["accuracy"]})
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras.saving.load_model(tmp_path / "model.keras")
        own = keras.metrics.MeanMetricWrapper(lambda y, p: p, name="own")
        for metrics in ({"a": [MaskedMetric("mae"), own]}, {"b": ["mae"]}):
            model.compile("sgd", losses, metrics=metrics)
