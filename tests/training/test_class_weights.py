"""Weights of classes by task, in exact values."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dmtrl_keras import MultiTaskModel, multitask
from dmtrl_keras.losses import MaskedLoss

WEIGHTS = {"a": {0: 0.5, 2: 3.0}, "b": {1: 4.0}}


def model(missing=False):
    """Classes of two tasks; a third is a regression."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    outputs = {
        "a": keras.layers.Dense(3, "softmax", name="a_head")(inputs),
        "b": keras.layers.Dense(1, "sigmoid", name="b_head")(inputs),
        "c": keras.layers.Dense(1, name="c_head")(inputs),
    }
    found = MultiTaskModel(inputs, outputs)
    losses = {"a": "sparse_categorical_crossentropy", "b": "binary_crossentropy"}
    if missing:
        losses = {task: MaskedLoss(loss, -1) for task, loss in losses.items()}
    found.compile(keras.optimizers.SGD(0.0), losses | {"c": "mse"})
    return found


@pytest.fixture
def data(rng):
    x = rng.normal(size=(12, 4)).astype("float32")
    y = {"a": rng.integers(0, 3, 12), "b": rng.integers(0, 2, 12), "c": rng.normal(size=12)}
    return x, y


def expected(network, x, y, sample_weight=None, known=None):
    """The loss of the first epoch in loops: means over all examples of weighted losses."""
    outputs = {task: np.array(out) for task, out in network(x).items()}
    total = 0.0
    for task in "abc":
        losses = []
        for n, label in enumerate(y[task]):
            if known is not None and task != "c" and not known[task][n]:
                continue
            out = outputs[task][n]
            if task == "a":
                loss = -np.log(out[label])
            elif task == "b":
                loss = -np.log(out[0] if label else 1 - out[0])
            else:
                loss = (out[0] - label) ** 2
            weight = WEIGHTS.get(task, {}).get(int(label) if task != "c" else None, 1.0)
            losses.append(
                weight * loss * (1 if sample_weight is None else sample_weight[n])
            )
        total += np.mean(losses)
    return total


def fitted(network, *arguments, **more):
    """The loss that training logs; nothing is learned at a rate of zero."""
    more.setdefault("class_weight", WEIGHTS)
    return network.fit(*arguments, verbose=0, **more).history["loss"][0]


def test_arrays(data):
    """All examples in one batch; with the examples' own weights, of all or of one task."""
    network = model()
    x, y = data
    assert fitted(network, x, y) == pytest.approx(expected(network, x, y), rel=1e-5)
    weight = np.linspace(0.1, 2, 12)
    found = fitted(network, x, y, sample_weight=weight)
    assert found == pytest.approx(expected(network, x, y, weight), rel=1e-5)
    everywhere = fitted(network, x, y, sample_weight=dict.fromkeys("abc", weight))
    assert everywhere == pytest.approx(found, rel=1e-6)
    one = fitted(network, x, y, sample_weight={"c": np.zeros(12)})
    alone = expected(network, x, y) - np.mean(
        (np.array(network(x)["c"])[:, 0] - y["c"]) ** 2
    )
    assert one == pytest.approx(alone, rel=1e-5)


def test_one_hot_and_columns(data):
    """The same labels in other forms."""
    x, y = data
    network = model()
    losses = {"a": "categorical_crossentropy", "b": "binary_crossentropy", "c": "mse"}
    network.compile(keras.optimizers.SGD(0.0), losses)
    other = y | {"a": np.eye(3)[y["a"]], "b": y["b"][:, None].astype("float32")}
    found = fitted(network, x, other)
    assert found == pytest.approx(expected(network, x, y), rel=1e-5)


def test_missing_labels(data):
    """They stay missing, whatever is weighted."""
    x, y = data
    network = model(missing=True)
    y = {task: values.copy() for task, values in y.items()}
    y["a"][:3] = -1
    y["b"][5:] = -1
    known = {task: y[task] >= 0 for task in "ab"}
    found = fitted(network, x, y)
    assert found == pytest.approx(expected(network, x, y, known=known), rel=1e-5)


class Batches(keras.utils.PyDataset):
    """A data set of three batches."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, n):
        part = slice(4 * n, 4 * n + 4)
        return self.x[part], {task: values[part] for task, values in self.y.items()}


@pytest.mark.parametrize("kind", ["dataset", "pydataset", "generator"])
def test_streams(data, kind):
    """Equal batches, whose mean is that over all examples."""
    x, y = data
    network, more = model(), {}
    if kind == "dataset":
        stream = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    else:
        stream = Batches(x, y)
    if kind == "generator":
        batches, more = stream, {"steps_per_epoch": 3}
        stream = (batches[n] for n in range(3))
    found = fitted(network, stream, **more)
    assert found == pytest.approx(expected(network, x, y), rel=1e-5)


def test_validation_has_none(data):
    """As in Keras, `val_loss` is without the weights of the classes."""
    network = model()
    x, y = data
    history = network.fit(
        x, y, class_weight=WEIGHTS, validation_data=data, verbose=0
    ).history
    plain = network.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert history["val_loss"][0] == pytest.approx(plain, rel=1e-5)


def test_validation_split(data):
    """The last share, unweighted; the first, weighted."""
    x, y = data
    network = model()
    history = network.fit(
        x, y, class_weight=WEIGHTS, validation_split=0.25, verbose=0
    ).history
    last = x[9:], {task: values[9:] for task, values in y.items()}
    plain = network.evaluate(*last, verbose=0, return_dict=True)["loss"]
    assert history["val_loss"][0] == pytest.approx(plain, rel=1e-5)
    first = x[:9], {task: values[:9] for task, values in y.items()}
    assert history["loss"][0] == pytest.approx(expected(network, *first), rel=1e-5)


@pytest.mark.parametrize("form", ["arrays", "dataset", "open"])
def test_labels_of_every_step(rng, form):
    """Classes (batch, steps), as many steps as examples, beside an image-like task."""
    inputs = keras.Input((4, 2))
    tag = keras.layers.Dense(3, "softmax", name="tag_head")(inputs)
    other = keras.layers.Dense(2, name="other_head")(inputs)
    network = MultiTaskModel(inputs, {"tag": tag, "other": other})
    losses = {"tag": "sparse_categorical_crossentropy", "other": "mse"}
    network.compile(keras.optimizers.SGD(0.0), losses)
    x = rng.normal(size=(4, 4, 2)).astype("float32")
    y = {"tag": rng.integers(0, 3, (4, 4)), "other": np.zeros((4, 4, 2), "float32")}
    outputs = {task: np.array(out) for task, out in network(x).items()}
    losses = -np.log(np.take_along_axis(outputs["tag"], y["tag"][..., None], -1))[..., 0]
    weights = np.where(y["tag"] == 2, 10.0, 1.0)
    total = np.mean(weights * losses) + np.mean(outputs["other"] ** 2)
    given = [x, y]
    if form != "arrays":
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
        if form == "open":
            data = data.map(
                lambda a, b: (
                    a,
                    {
                        n: tf.ensure_shape(
                            tf.numpy_function(lambda v: v, [own], own.dtype),
                            [None] * len(own.shape),
                        )
                        for n, own in b.items()
                    },
                )
            )
        given = [data]
    found = fitted(network, *given, class_weight={"tag": {2: 10.0}})
    assert found == pytest.approx(total, rel=1e-5)


def test_weights_of_unknown_tasks(data):
    with pytest.raises(ValueError, match="sample_weight"):
        model().fit(*data, class_weight=WEIGHTS, sample_weight={"nose": np.ones(12)})


def test_nothing_is_weighted(data):
    """An empty dict is none."""
    network = model()
    plain = network.evaluate(*data, verbose=0, return_dict=True)["loss"]
    assert fitted(network, *data, class_weight={}) == pytest.approx(plain, rel=1e-5)


def test_one_task(data):
    """Keras's own form does, too."""
    inputs = keras.Input((4,))
    head = keras.layers.Dense(3, "softmax", name="a_head")(inputs)
    network = MultiTaskModel(inputs, {"a": head})
    network.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    x, y = data
    y = {"a": y["a"]}
    found = fitted(network, x, y, class_weight=WEIGHTS["a"])
    again = fitted(network, x, y, class_weight={"a": WEIGHTS["a"]})
    assert found == pytest.approx(again, rel=1e-6)


@pytest.mark.parametrize(
    "weights", [{"nose": {0: 1.0}}, {"a": 2.0}, {"a": {"x": 1.0}}, {"a": {0: -1.0}}, 3]
)
def test_refused(data, weights):
    with pytest.raises(ValueError, match="class_weight"):
        model().fit(*data, class_weight=weights)


def test_weights_of_some_tasks(rng):
    """The others' examples count as they are; equal to weights of one for them."""
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu")])
    model = multitask(backbone, ["a", "b"], heads=1, verbose=False)
    model.compile("sgd", "mse", run_eagerly=True)
    x = rng.normal(size=(8, 4)).astype("float32")
    y = {task: rng.normal(size=(8, 1)).astype("float32") for task in "ab"}
    some = {"a": rng.uniform(size=8).astype("float32")}
    every = {**some, "b": np.ones(8, "float32")}
    found, expected = (
        model.evaluate(x, y, sample_weight=weight, return_dict=True, verbose=0)
        for weight in (some, every)
    )
    assert found == pytest.approx(expected)
    predicted = model.predict(x, verbose=0)
    own = (predicted["a"] - y["a"]).ravel() ** 2 @ some["a"] / 8
    other = np.mean((predicted["b"] - y["b"]) ** 2)
    assert found["loss"] == pytest.approx(own + other, rel=1e-4)
    start = model.get_weights()
    trained = []
    for weight in (some, every):
        model.set_weights(start)
        history = model.fit(
            x, y, sample_weight=weight, validation_data=(x, y, weight), verbose=0
        ).history
        trained.append((history["loss"], history["val_loss"], *model.get_weights()))
    for one, both in zip(*trained):
        np.testing.assert_allclose(one, both, rtol=1e-5)
