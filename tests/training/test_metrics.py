"""Metrics of several tasks, against NumPy and scikit-learn."""

import math

import keras
import numpy as np
import pytest
import sklearn.metrics
from keras import ops

from dmtrl_keras.losses import one_vs_rest
from dmtrl_keras.metrics import MaskedMetric, MeanBinaryError, MulticlassError

NAN = math.nan


def value(metric, *batches):
    """The result after some batches."""
    for batch in batches:
        metric.update_state(*batch)
    return float(ops.convert_to_numpy(metric.result()))


def test_binary_error(rng):
    """The mean of the T error rates, +-1 or 0/1, over batches."""
    outputs = rng.normal(size=(20, 5)).astype("float32")
    labels = np.sign(rng.normal(size=(20, 5)))
    rates = [
        1 - sklearn.metrics.accuracy_score(labels[:, t] > 0, outputs[:, t] > 0)
        for t in range(5)
    ]
    halves = [(labels[:8], outputs[:8]), (labels[8:], outputs[8:])]
    assert value(MeanBinaryError(), *halves) == pytest.approx(np.mean(rates))
    assert value(MeanBinaryError(), (labels > 0, outputs)) == pytest.approx(np.mean(rates))
    weights = rng.random(20)
    wrong = (labels > 0) != (outputs > 0)
    expected = np.sum(wrong * weights[:, None]) / (5 * weights.sum())
    actual = value(MeanBinaryError(), (labels, outputs, weights))
    assert actual == pytest.approx(expected, rel=1e-5)


def test_multiclass_error(rng):
    """Ranking the outputs names the class; labels in each of their forms."""
    outputs = rng.normal(size=(30, 4)).astype("float32")
    classes = rng.integers(4, size=30)
    expected = 1 - sklearn.metrics.accuracy_score(classes, outputs.argmax(1))
    for labels in (classes, classes[:, None], one_vs_rest(classes, 4), np.eye(4)[classes]):
        assert value(MulticlassError(), (labels, outputs)) == pytest.approx(expected)


@pytest.mark.parametrize("cls", [MeanBinaryError, MulticlassError])
def test_wrong_shapes(cls):
    """Labels of another shape are an error with both shapes."""
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
        cls().update_state(np.ones((4, 2)), np.ones((4, 3)))
    with pytest.raises(ValueError, match=cls.__name__):
        cls().update_state(np.ones((4, 2, 2)), np.ones((4, 2, 2)))


@pytest.mark.parametrize("cls", [MeanBinaryError, MulticlassError])
def test_state(cls):
    """Empty is 0, reset forgets, config round trips."""
    metric = cls(name="mine")
    assert value(metric) == 0
    assert value(metric, (np.array([[1, -1]]), np.array([[-1.0, 1]]))) == 1
    metric.reset_state()
    assert value(metric) == 0
    again = cls.from_config(metric.get_config())
    assert again.name == "mine"


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        ("mean_squared_error", lambda y, f: np.mean((y - f) ** 2)),
        ("mean_absolute_error", lambda y, f: np.mean(np.abs(y - f))),
        (keras.metrics.RootMeanSquaredError(), lambda y, f: np.sqrt(np.mean((y - f) ** 2))),
        ("binary_accuracy", lambda y, f: np.mean(y == (f > 0.5))),
        (
            keras.metrics.AUC(num_thresholds=2000),
            sklearn.metrics.roc_auc_score,
        ),
        (
            keras.metrics.Precision(),
            lambda y, f: sklearn.metrics.precision_score(y, f > 0.5),
        ),
    ],
)
@pytest.mark.parametrize("missing", [NAN, -5])
def test_single_labels_left_out(metric, reference, missing, rng):
    """The metric of the present labels alone."""
    labels = rng.integers(2, size=(60, 3)).astype("float32")
    outputs = rng.uniform(size=(60, 3)).astype("float32")
    present = rng.random((60, 3)) < 0.5
    expected = reference(labels[present], outputs[present])
    given = np.where(present, labels, missing)
    actual = value(MaskedMetric(metric, missing), (given, outputs))
    assert actual == pytest.approx(expected, abs=3e-3)


def test_whole_labels_left_out(rng):
    """Class labels, sparse and one-hot."""
    outputs = rng.dirichlet(np.ones(4), size=20).astype("float32")
    classes = rng.integers(4, size=20)
    present = rng.random(20) < 0.6
    expected = np.mean(classes[present] == outputs.argmax(1)[present])
    sparse = np.where(present, classes, -1)
    for labels in (sparse, sparse[:, None]):
        metric = MaskedMetric(keras.metrics.SparseCategoricalAccuracy(), -1)
        assert value(metric, (labels, outputs)) == pytest.approx(expected, rel=1e-5)
    onehot = np.where(present[:, None], np.eye(4)[classes], NAN)
    metric = MaskedMetric(keras.metrics.CategoricalAccuracy())
    assert value(metric, (onehot, outputs)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["accuracy", "acc", "Accuracy"])
def test_accuracy_by_shape(name, rng):
    """The one that Keras means for labels and outputs of such shapes."""
    halves = np.array([[0.9], [0.1]])
    for labels in (np.array([[1.0], [0.0]]), np.array([1.0, 0.0]), np.array([1.0, NAN])):
        assert value(MaskedMetric(name), (labels, halves)) == 1
    outputs = rng.dirichlet(np.ones(3), size=(8, 5)).astype("float32")
    classes = rng.integers(-1, 3, size=(8, 5))
    present = classes >= 0
    expected = np.mean((outputs.argmax(-1) == classes)[present])
    onehot = np.where(present[..., None], np.eye(3)[classes], NAN)
    for missing, labels in ((-1, classes), (-1, classes[..., None]), (NAN, onehot)):
        found = value(MaskedMetric(name, missing), (labels, outputs))
        assert found == pytest.approx(expected)
    # The object is what it says: equality.
    exact = MaskedMetric(keras.metrics.Accuracy())
    assert value(exact, (np.array([[1.0], [0.0]]), halves)) == 0
    metric = MaskedMetric(name)
    assert metric.name == name
    again = MaskedMetric.from_config(metric.get_config())
    assert value(again, (np.array([[1.0], [0.0]]), halves)) == 1


@pytest.mark.parametrize(
    "metric",
    [
        "accuracy",
        "sparse_categorical_accuracy",
        keras.metrics.SparseTopKCategoricalAccuracy(1),
        keras.metrics.MeanIoU(2, sparse_y_pred=False),
        keras.metrics.IoU(2, [0, 1], sparse_y_pred=False),
    ],
    ids=lambda metric: getattr(metric, "name", metric),
)
def test_maps_of_classes(metric):
    """Integer maps beside probabilities; the last label is missing, and wrong."""
    outputs = np.eye(2, dtype="float32")[[0, 1, 1]][None]
    for labels in (np.array([[0, 1]]), np.array([[0, 1, -1]])):
        found = value(MaskedMetric(metric, -1), (labels, outputs[:, : labels.size]))
        assert found == pytest.approx(1)


def test_each_column_has_its_own_labels(rng):
    """Metrics with a value for each column: what the column's labels alone give."""
    labels = rng.integers(2, size=(60, 3)).astype("float32")
    outputs = rng.uniform(size=(60, 3)).astype("float32")
    weights = rng.uniform(0.5, 2, size=(60, 3)).astype("float32")
    present = rng.random((60, 3)) < 0.5
    given = np.where(present, labels, NAN)
    outputs[0, 0], given[0, 0] = NAN, NAN
    present[0, 0] = False

    def by_column(make, weight=None):
        found = []
        for t in range(3):
            metric, own = make(), present[:, t]
            one = [x[own, t][:, None] for x in (labels, outputs)]
            metric.update_state(*one, None if weight is None else weight[own, t])
            found.append(np.ravel(metric.result())[0])
        return np.array(found)

    def ours(metric, *more):
        metric = MaskedMetric(metric)
        for part in (slice(20), slice(20, None)):
            metric.update_state(given[part], outputs[part], *(x[part] for x in more))
        return np.array(metric.result())

    area, several = keras.metrics.AUC, keras.metrics.AUC(multi_label=True)
    assert ours(several) == pytest.approx(by_column(area).mean(), abs=1e-5)
    several = keras.metrics.AUC(multi_label=True, thresholds=[0.2, 0.5])
    uneven = by_column(lambda: area(thresholds=[0.2, 0.5]))
    assert ours(several) == pytest.approx(uneven.mean(), abs=1e-5)
    for more in ((), (weights,)):
        scores = by_column(lambda: keras.metrics.F1Score(threshold=0.5), *more)
        found = ours(keras.metrics.F1Score(threshold=0.5), *more)
        np.testing.assert_allclose(found, scores, rtol=1e-5)
        found = ours(keras.metrics.F1Score("macro", threshold=0.5), *more)
        assert found == pytest.approx(scores.mean(), rel=1e-5)
        scores = by_column(keras.metrics.R2Score, *more)
        found = ours(keras.metrics.R2Score(class_aggregation=None), *more)
        np.testing.assert_allclose(found, scores, rtol=1e-4)
    adjusted = keras.metrics.R2Score(num_regressors=2)
    adjusted.update_state(labels[present][:, None], outputs[present][:, None])
    pooled = keras.metrics.R2Score()
    pooled.update_state(labels[present][:, None], outputs[present][:, None])
    masked = MaskedMetric(keras.metrics.R2Score(num_regressors=2))
    masked.update_state(given.reshape(-1, 1), outputs.reshape(-1, 1))
    assert float(masked.result()) == pytest.approx(float(adjusted.result()), rel=1e-4)
    second = keras.metrics.Precision()
    second.update_state(labels[present[:, 1], 1], outputs[present[:, 1], 1])
    found = ours(keras.metrics.Precision(class_id=1))
    assert found == pytest.approx(float(second.result()), rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.metrics.AUC(multi_label=True),
        lambda: keras.metrics.AUC(label_weights=[1.0, 2.0, 3.0]),
        lambda: keras.metrics.F1Score(),
        lambda: keras.metrics.F1Score("weighted", threshold=0.5),
        lambda: keras.metrics.R2Score(),
        lambda: keras.metrics.Precision(top_k=1),
        lambda: keras.metrics.OneHotMeanIoU(3),
        lambda: keras.metrics.BinaryIoU(),
        lambda: keras.metrics.CosineSimilarity(),
        lambda: keras.metrics.PearsonCorrelation(),
    ],
)
def test_nothing_missing_is_the_metric_itself(make, rng):
    labels = np.eye(3)[rng.integers(3, size=20)].astype("float32")
    outputs = rng.dirichlet(np.ones(3), size=20).astype("float32")
    plain, masked = make(), MaskedMetric(make())
    for metric in (plain, masked):
        metric.update_state(labels, outputs)
    np.testing.assert_allclose(masked.result(), plain.result(), rtol=1e-5)


def test_nan_in_nan_out():
    """Outputs of a training that diverged have no error and no accuracy."""
    outputs = np.full((10, 10), NAN, "float32")
    classes = np.arange(10)
    labels = one_vs_rest(classes, 10)
    for metric, given in (
        (MeanBinaryError(), labels),
        (MulticlassError(), classes),
        (MaskedMetric("accuracy"), classes),
        (MaskedMetric(MeanBinaryError()), labels),
        (MaskedMetric(keras.metrics.AUC()), labels > 0),
    ):
        assert math.isnan(value(metric, (given, outputs))), metric.name
        metric.reset_state()
        assert value(metric, (given, np.eye(10))) in (0, 1), metric.name
    # A single one is enough; without a label it is none.
    outputs = np.eye(10)
    outputs[3, 7] = NAN
    assert math.isnan(value(MulticlassError(), (classes, outputs)))
    assert math.isnan(value(MeanBinaryError(), (labels, outputs)))
    labels[3, 7] = NAN
    assert value(MaskedMetric(MeanBinaryError()), (labels, outputs)) == 0
    scores = MaskedMetric(keras.metrics.F1Score())
    scores.update_state(np.eye(10), np.full((10, 10), NAN))
    assert np.all(np.isnan(scores.result()))


def test_own_metrics_and_weights(rng):
    """MeanBinaryError with missing tasks; sample weights beside."""
    labels = np.array([[1.0, NAN], [-1.0, 1.0]])
    outputs = np.array([[-1.0, 1.0], [-1.0, -1.0]])
    assert value(MaskedMetric(MeanBinaryError()), (labels, outputs)) == pytest.approx(2 / 3)
    weighted = value(
        MaskedMetric(MeanBinaryError()), (labels, outputs, np.array([3.0, 1.0]))
    )
    assert weighted == pytest.approx(4 / 5)


def test_nothing_present():
    """A batch without labels changes nothing."""
    metric = MaskedMetric("mean_squared_error")
    assert value(metric, (np.full((3, 2), NAN), np.ones((3, 2)))) == 0
    assert value(metric, (np.ones((3, 2)), np.zeros((3, 2)))) == 1
    metric.reset_state()
    assert value(metric) == 0


@keras.saving.register_keras_serializable("tests")
class _Relative(keras.metrics.Mean):
    """A metric of its own kind, undefined at labels of 0."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(ops.mean(y_pred / y_true, -1), sample_weight)


def _relative(y_true, y_pred):
    return ops.mean(y_pred / y_true, -1)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (lambda: keras.metrics.PearsonCorrelation(), 0.128),
        (lambda: keras.metrics.MeanMetricWrapper(_relative), 85 / 72),
        (lambda: _relative, 85 / 72),
        (lambda: _Relative(), 85 / 72),
    ],
)
def test_undefined_at_zeros(metric, expected):
    """What a metric has at a missing label, NaN for instance, reaches no result."""
    labels = np.array([[1, 2, 4], [NAN, 1, 1], [3, 1, 2]], "float32")
    outputs = np.array([[1, 3, 3], [3, 1, 2], [1, 2, 3]], "float32")
    masked = MaskedMetric(metric())
    assert value(masked, (labels, outputs)) == pytest.approx(expected, abs=1e-3)
    masked.reset_state()
    assert value(masked, (labels[1:], outputs[1:]), (labels[:1], outputs[:1])) == (
        pytest.approx(expected, abs=1e-3)
    )
    outputs[0, 0] = NAN
    assert math.isnan(value(masked, (labels, outputs)))


def test_undefined_without_any_label():
    """A batch without a label adds nothing, whatever the function is at zeros."""
    masked = MaskedMetric(keras.metrics.PearsonCorrelation())
    assert value(masked, (np.full((2, 3), NAN), np.ones((2, 3)))) == 0


def test_in_a_model(rng, tmp_path):
    """compile, evaluate, save and load."""
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    model.compile(
        "adam",
        "mse",
        metrics=[
            MaskedMetric("mean_absolute_error", missing=-9, name="error"),
            MeanBinaryError(),
        ],
    )
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    y[::2, 0] = -9
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    prediction = model.predict(x, verbose=0)
    expected = np.abs(prediction - y)[y != -9].mean()
    assert found["error"] == pytest.approx(expected, rel=1e-4)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(
        found, rel=1e-4
    )


def test_errors():
    """What was received and expected."""
    with pytest.raises(ValueError, match="no_such"):
        MaskedMetric("no_such_metric")
    with pytest.raises(ValueError, match=r"missing=None|missing='x'"):
        MaskedMetric("mse", missing="x")
    with pytest.raises(ValueError, match="expected labels"):
        MaskedMetric("mse").update_state(np.ones((2, 3, 4)), np.ones((2, 3)))
    for metric in (keras.metrics.Mean(), keras.metrics.Sum()):
        with pytest.raises(ValueError, match=r"labels and predictions.*(Mean|Sum).*values"):
            MaskedMetric(metric)
