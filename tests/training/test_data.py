"""zip_tasks: one stream of dict batches from data sets of different sizes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dmtrl_keras import layers, zip_tasks


def arrays(n, offset=0):
    """N examples whose value is their number."""
    x = np.arange(offset, offset + n, dtype="float32")[:, None]
    return x, x[:, 0] * 2


def endless():
    """A data set without an end."""
    return tf.data.Dataset.from_tensor_slices(arrays(3)).repeat()


def collect(stream, name):
    """All inputs of one task in an epoch."""
    return np.concatenate([inputs[name].numpy()[:, 0] for inputs, _ in stream])


def test_longest_epoch():
    """Every example of every task, the shorter repeated, batches of one size."""
    stream = zip_tasks({"a": arrays(10), "b": arrays(23)}, batch_size=4, seed=1)
    assert len(stream) == int(stream.cardinality()) == 6
    assert set(collect(stream, "b")) == set(range(23))
    counts = np.bincount(collect(stream, "a").astype(int))
    assert counts.sum() == 24
    assert counts.min() >= 2
    for inputs, labels in stream:
        assert set(inputs) == set(labels) == {"a", "b"}
        assert inputs["a"].shape == (4, 1)
        np.testing.assert_array_equal(labels["b"], 2 * inputs["b"][:, 0])


def test_other_epochs():
    """The shortest, or a number of batches."""
    data = {"a": arrays(10), "b": arrays(23)}
    assert len(zip_tasks(data, 4, epoch="shortest")) == 3
    assert len(list(zip_tasks(data, 4, epoch=11))) == 11


def test_order_and_seeds():
    """Unshuffled in order; shuffled anew each epoch; the same for the same seed."""
    data = {"a": arrays(12)}
    plain = zip_tasks(data, 5, shuffle=False)
    np.testing.assert_array_equal(collect(plain, "a"), [*range(12), 0, 1, 2])
    one, two = (zip_tasks(data, 4, seed=7) for _ in range(2))
    first = collect(one, "a")
    np.testing.assert_array_equal(first, collect(two, "a"))
    assert not np.array_equal(first, collect(one, "a"))
    assert not np.array_equal(first, np.arange(12))


def test_datasets_and_weights():
    """tf.data sets and arrays together; a task without weights gets ones."""
    dataset = tf.data.Dataset.from_tensor_slices(arrays(6))
    weighted = (*arrays(9), np.full(9, 0.5, "float32"))
    stream = zip_tasks({"a": dataset, "b": weighted}, 3)
    _, _, weights = next(iter(stream))
    np.testing.assert_array_equal(weights["a"], np.ones(3))
    np.testing.assert_array_equal(weights["b"], np.full(3, 0.5))


def test_fit(rng):
    """model.fit on a network with one input per task knows the epoch's length."""
    inputs = {name: keras.Input((1,), name=name) for name in ("a", "b")}
    stacked = layers.TaskStack(["a", "b"])(inputs)
    outputs = layers.TaskSplit(["a", "b"])(layers.TaskDense(1, 2)(stacked))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": "mse", "b": "mse"})
    data = {
        n: (rng.normal(size=(k, 1)), rng.normal(size=(k, 1)))
        for n, k in (("a", 10), ("b", 25))
    }
    history = model.fit(zip_tasks(data, 5), epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
    assert int(model.optimizer.iterations) == 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zip_tasks({}, 2), "at least one task"),
        (lambda: zip_tasks([arrays(3)], 2), "list"),
        (lambda: zip_tasks({"a": arrays(3)}, 0), "batch_size.*0"),
        (lambda: zip_tasks({"a": arrays(3)}, 2, epoch="all"), "epoch.*'all'"),
        (lambda: zip_tasks({"a": (np.ones(3), np.ones(4))}, 2), r"'a'.*\[3, 4\]"),
        (lambda: zip_tasks({"a": (np.ones(0), np.ones(0))}, 2), r"'a'.*\[0, 0\]"),
        (lambda: zip_tasks({"a": np.ones(3)}, 2), "'a'.*ndarray"),
        (
            lambda: zip_tasks(
                {"a": tf.data.Dataset.from_tensor_slices(arrays(3)).repeat()}, 2
            ),
            "'a'.*cardinality=-1",
        ),
        (lambda: zip_tasks({"a": tf.data.Dataset.range(3)}, 2), "'a'.*element_spec"),
    ],
)
def test_errors(call, message):
    """Which task, what was received, what was expected."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_data_without_a_known_end():
    """With a number of batches no size is needed: `repeat`, `filter`, generators."""

    def generate():
        while True:
            yield np.zeros(1, "float32"), np.float32(7)

    spec = (tf.TensorSpec((1,)), tf.TensorSpec(()))
    data = {
        "repeated": endless(),
        "filtered": tf.data.Dataset.from_tensor_slices(arrays(6)).filter(
            lambda x, y: y > 4
        ),
        "generated": tf.data.Dataset.from_generator(generate, output_signature=spec),
        "whole": arrays(2),
    }
    stream = zip_tasks(data, 4, epoch=3, seed=np.int64(0))
    assert len(stream) == 3
    assert set(collect(stream, "filtered")) == {3, 4, 5}
    assert set(collect(stream, "whole")) == {0, 1}
    for name in ("repeated", "filtered", "generated"):
        with pytest.raises(ValueError, match=f"'{name}'.*number of batches as `epoch`"):
            zip_tasks({name: data[name]}, 4)


@pytest.mark.parametrize("shuffle", [True, False])
def test_nothing_let_through(shuffle):
    """Known only when the stream runs; the error says which task it is."""
    examples = tf.data.Dataset.from_tensor_slices(arrays(6))
    data = {"a": arrays(3), "b": examples.filter(lambda x, y: y > 99)}
    stream = zip_tasks(data, 2, epoch=3, shuffle=shuffle)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"zip_tasks, task .*b.*filter"
    ):
        next(iter(stream))


def test_shuffle_among_some():
    """An int: no example comes before it is among so many."""
    stream = zip_tasks({"a": arrays(40)}, 10, shuffle=2, seed=0)
    found = collect(stream, "a")
    assert set(found) == set(range(40)) and not np.array_equal(found, np.arange(40))
    assert (found - np.arange(40)).max() <= 1


@pytest.mark.parametrize("batch", [4, 3])
def test_batches_are_told_from_examples(batch):
    """By the pipeline, where the shapes could be those of examples."""
    maps = np.zeros((6, 3, 3, 1), "float32"), np.zeros((6, 3, 3), "float32")
    dataset = tf.data.Dataset.from_tensor_slices(maps)
    assert len(zip_tasks({"a": dataset}, 2)) == 3
    batched = dataset.batch(batch, drop_remainder=batch == 3)
    for data in (batched, batched.map(lambda x, y: (x + 1, y)).prefetch(1)):
        with pytest.raises(ValueError, match=r"'a'.*single examples.*`.unbatch\(\)`"):
            zip_tasks({"a": data}, 2)
    again = batched.unbatch().apply(tf.data.experimental.assert_cardinality(6))
    assert len(zip_tasks({"a": again}, 2)) == 3


ONE = np.ones((3, 1), "float32")


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ((ONE, None), {}, "'a'.*arrays of examples.*NoneType"),
        ((ONE, 3), {}, "'a'.*arrays of examples.*int 3"),
        (([1, 2], [1, 2]), {}, "'a'.*numpy.asarray.*'list'"),
        ((np.ones(()), np.ones(())), {}, "'a'.*arrays of examples"),
        ((np.array([print, len, max]), ONE), {}, "'a'.*that TensorFlow takes.*object"),
        ((x for x in "ab"), {}, "'a'.*generator.*from_generator"),
        ((ONE, ONE), {"seed": "x"}, "`seed` must be an int from 0 to.*'x'"),
        ((ONE, ONE), {"seed": 1.5}, "`seed` must be an int from 0 to.*1.5"),
        ((ONE, ONE), {"shuffle": "yes"}, "`shuffle` must be a positive int or a bool"),
        ((ONE, ONE), {"epoch": None}, "`epoch` must be a positive int or one of"),
    ],
)
def test_bad_data(data, arguments, message):
    """No raw errors of TensorFlow or Python."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        zip_tasks({"a": data}, 2, **arguments)


def test_names_and_labels():
    """Task names are strings; None for weights is none; None for labels is an error."""
    with pytest.raises(ValueError, match=r"task names must be strings.*1"):
        zip_tasks({1: arrays(3)}, 2)
    assert len(next(iter(zip_tasks({"a": (*arrays(3), None)}, 2)))) == 2
    unlabelled = tf.data.Dataset.from_tensor_slices(arrays(3)).map(lambda x, y: (x, None))
    with pytest.raises(ValueError, match=r"'a'.*examples.*NoneTensorSpec"):
        zip_tasks({"a": unlabelled}, 2)
