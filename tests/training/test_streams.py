"""Streams that mix tasks: shares, tasks alone, one input, missing labels, both kinds."""

import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from dmtrl_keras import MultiTaskModel, layers, multitask, zip_tasks
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.metrics import MaskedMetric

# Of arrays, both kinds; and of data sets of TensorFlow's.
KINDS = ("tf.data", "PyDataset", pytest.param("examples", marks=pytest.mark.long))
SIZES = {"a": 20, "b": 60, "c": 120}


def arrays(count, offset=0.0, dtype="float32"):
    """Examples of two numbers, the first of which is their own, and their label."""
    x = np.arange(count, dtype="float32") + offset
    return np.stack([x, -x], axis=1), x.astype(dtype)


def data(dtype="float32"):
    """Three tasks whose examples begin at 0, 1000 and 2000."""
    return {
        name: arrays(count, 1000.0 * number, dtype)
        for number, (name, count) in enumerate(SIZES.items())
    }


def zipped(datasets, batch_size, epoch="longest", kind="auto", **arguments):
    """`zip_tasks`, where asked with data sets of TensorFlow's in the place of arrays."""
    if kind == "examples":
        kind = "tf.data"
        datasets = {
            name: tf.data.Dataset.from_tensor_slices(own) for name, own in datasets.items()
        }
    return zip_tasks(datasets, batch_size, epoch, kind=kind, **arguments)


def batches(stream):
    """The batches of an epoch, as arrays."""
    return [keras.tree.map_structure(keras.ops.convert_to_numpy, batch) for batch in stream]


def counts(stream):
    """The present labels of each task in each batch, an array `(batches, tasks)`."""
    return np.array(
        [[np.isfinite(y[n]).sum() for n in SIZES] for _, y, *_ in batches(stream)]
    )


# Those of arrays are of one kind inside.
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("equal", (1 / 3, 1 / 3, 1 / 3)),
        ("size", (0.1, 0.3, 0.6)),
        (2.0, np.sqrt([20, 60, 120]) / np.sqrt([20, 60, 120]).sum()),
        ({"a": 1, "b": 0, "c": 3}, (0.25, 0.0, 0.75)),
    ],
    ids=["equal", "size", "temperature", "shares"],
)
def test_shares(mixing, expected, kind):
    """Within 1% over 10,000 draws, of examples and of batches at random; in turn to one."""
    common = {"mixing": mixing, "seed": 3, "kind": kind, "common_input": True}
    rows = counts(zipped(data(), 100, epoch=100, **common))
    assert (rows.sum(axis=1) == 100).all()
    np.testing.assert_allclose(rows.sum(axis=0) / 10_000, expected, atol=0.01)
    drawn = zipped(data(), 1, epoch=10_000, alone="random", **common)
    if kind != "PyDataset":
        drawn = drawn.batch(1000).map(lambda x, y: (x[:, 0], {n: y[n][:, 0] for n in y}))
        found = [
            np.stack([np.isfinite(y[name]) for name in SIZES], axis=1)
            for _, y in batches(drawn)
        ]
        found = np.concatenate(found)
    else:
        found = counts(drawn)
    assert len(found) == 10_000
    np.testing.assert_allclose(found.mean(axis=0), expected, atol=0.01)
    found = counts(zipped(data(), 4, epoch=60, alone="in_turn", **common))
    assert (np.sort(found, axis=1) == [0, 0, 4]).all()
    turns = np.cumsum(found > 0, axis=0)
    ideal = np.arange(1, 61)[:, None] * np.asarray(expected)
    assert np.abs(turns - ideal).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_round_robin(kind):
    """Without shares tasks take turns one after another."""
    stream = zipped(data(), 5, epoch=7, alone="in_turn", common_input=True, kind=kind)
    assert counts(stream).argmax(axis=1).tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_one_input(kind, shuffle):
    """Rows have the labels of their own task; each example appears, in each epoch anew."""
    sizes = {"a": 2, "b": 6, "c": 12}
    stream = zipped(data(), sizes, shuffle=shuffle, seed=0, common_input=True, kind=kind)
    assert len(stream) == stream.cardinality() == 10
    epochs = [batches(stream), batches(stream)]
    for found in epochs:
        for x, y in found:
            assert x.shape == (20, 2)
            present = np.stack([np.isfinite(y[name]) for name in SIZES])
            assert present.sum(axis=1).tolist() == [2, 6, 12]
            assert (present.sum(axis=0) == 1).all()
            for number, name in enumerate(SIZES):
                own = x[present[number]]
                np.testing.assert_array_equal(y[name][present[number]], own[:, 0])
                assert (own[:, 0] // 1000 == number).all()
        seen = np.concatenate([x[:, 0] for x, _ in found])
        assert len(set(seen)) == 200
    same = np.array_equal(epochs[0][0][0], epochs[1][0][0])
    assert same != shuffle


@pytest.mark.parametrize("kind", KINDS)
def test_batch_sizes_of_tasks(kind):
    """With an input for each task the rows go on with examples without labels."""
    sizes = {"a": 2, "b": 6, "c": 12}
    stream = zipped(data(), sizes, seed=0, kind=kind)
    assert len(stream) == 10
    found = batches(stream)
    seen = {name: [] for name in SIZES}
    for x, y in found:
        for name, size in sizes.items():
            assert x[name].shape == (12, 2)
            assert np.isfinite(y[name]).tolist() == [True] * size + [False] * (12 - size)
            np.testing.assert_array_equal(
                x[name][:size], np.stack([y[name], -y[name]], 1)[:size]
            )
            # Statistics of the batch are those of examples of the task.
            assert set(x[name][:, 0]) == set(y[name][:size])
            seen[name] += list(y[name][:size])
    assert {name: len(set(own)) for name, own in seen.items()} == SIZES
    plain = batches(zipped(data(), dict.fromkeys(SIZES, 4), kind=kind))
    assert all(np.isfinite(y[name]).all() for _, y in plain for name in SIZES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [4, {"a": 2, "b": 3, "c": 4}], ids=["one", "each"])
def test_alone_with_inputs_of_each_task(kind, sizes):
    """The other tasks' inputs are examples of theirs, without labels."""
    stream = zipped(data(), sizes, epoch=9, alone="in_turn", seed=1, kind=kind)
    for number, (x, y) in enumerate(batches(stream)):
        turn = list(SIZES)[number % 3]
        rows = sizes if isinstance(sizes, int) else sizes[turn]
        for task, name in enumerate(SIZES):
            assert x[name].shape == (rows, 2)
            assert (x[name][:, 0] // 1000 == task).all()
            assert np.isfinite(y[name]).all() == (name == turn)
        np.testing.assert_array_equal(x[turn][:, 0], y[turn])


@pytest.mark.parametrize("kind", KINDS)
def test_in_turn_until_all_were_seen(kind):
    """Every example of the longest appears, whenever its turns are."""
    given = {"a": arrays(30), "b": arrays(100, 1000.0)}
    for sizes, expected in (({"a": 8, "b": 16}, 14), ({"a": 30, "b": 30}, 8)):
        stream = zipped(
            given, sizes, alone="in_turn", common_input=True, shuffle=False, kind=kind
        )
        assert len(stream) == expected
        seen = np.concatenate([x[:, 0] for x, _ in batches(stream)])
        assert set(range(1000, 1100)) <= set(seen)
    short = zipped(given, 10, "shortest", alone="in_turn", common_input=True, kind=kind)
    assert len(short) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_epochs(kind):
    """Long enough for all, or for the smallest; for shares, in the mean."""
    for arguments, longest, shortest in (
        ({"batch_size": 10}, 12, 2),
        ({"batch_size": {"a": 10, "b": 10, "c": 40}}, 6, 2),
        ({"batch_size": 10, "alone": "in_turn"}, 36, 4),
        ({"batch_size": 10, "mixing": "size", "common_input": True}, 20, 20),
        ({"batch_size": 10, "mixing": "equal", "common_input": True}, 36, 6),
        (
            {
                "batch_size": 10,
                "mixing": {"a": 1, "b": 1, "c": 0},
                "common_input": True,
            },
            12,
            4,
        ),
    ):
        for epoch, expected in (("longest", longest), ("shortest", shortest), (3, 3)):
            stream = zipped(data(), epoch=epoch, kind=kind, **arguments)
            assert len(stream) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_marks_and_weights(kind):
    """Whole numbers with a mark stay whole; tasks without weights have ones."""
    given = data("int32")
    x, y = given["b"]
    given["b"] = (x, y, np.full(len(y), 0.25))
    arguments = {"common_input": True, "seed": 0, "kind": kind}
    _, labels, weights = batches(zipped(given, 4, missing=-1, **arguments))[0]
    assert {str(own.dtype) for own in labels.values()} == {"int32"}
    assert [(labels[name] >= 0).sum() for name in SIZES] == [4, 4, 4]
    np.testing.assert_array_equal(weights["b"], np.where(labels["b"] >= 0, 0.25, 1))
    np.testing.assert_array_equal(weights["a"], np.ones(12))
    _, labels, _ = batches(zipped(given, 4, **arguments))[0]
    assert {str(own.dtype) for own in labels.values()} == {"float32"}
    for alone in (None, "random"):
        stream = zipped(given, {"a": 1, "b": 2, "c": 3}, alone=alone, kind=kind)
        _, labels, weights = batches(stream)[0]
        here = np.isfinite(labels["b"])
        assert set(weights["b"][here]) <= {0.25}
        assert weights["a"].shape == labels["a"].shape


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_several_entries(kind):
    """One-hot labels are missing as a whole."""
    given = {
        name: (x, np.eye(2, dtype="float32")[(y % 2).astype(int)])
        for name, (x, y) in data().items()
    }
    stream = zipped(given, 6, mixing="equal", common_input=True, kind=kind, seed=0)
    for _, labels in batches(stream)[:3]:
        present = np.stack([np.isfinite(labels[name]).all(axis=1) for name in SIZES])
        absent = np.stack([np.isnan(labels[name]).all(axis=1) for name in SIZES])
        assert (present.sum(axis=0) == 1).all() and (present ^ absent).all()


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(kind):
    """The same stream for the same seed, in each epoch; another one for another."""
    for arguments in (
        {"mixing": "size", "common_input": True},
        {"alone": "random"},
        {"common_input": True},
    ):
        one, two, other = (
            zipped(data(), 4, seed=seed, kind=kind, **arguments) for seed in (5, 5, 6)
        )
        for _ in range(2):
            first, second = ([y["c"] for _, y in batches(own)] for own in (one, two))
            np.testing.assert_array_equal(np.concatenate(first), np.concatenate(second))
        third = np.concatenate([y["c"] for _, y in batches(other)])
        assert not np.array_equal(np.concatenate(first), third)


def network(common):
    """A layer of three tasks, on one input or one for each."""
    if common:
        inputs = keras.Input((2,))
        features = layers.TaskDense(3, 3, shared_input=True)(inputs)
    else:
        inputs = {name: keras.Input((2,), name=name) for name in SIZES}
        features = layers.TaskDense(3, 3)(layers.TaskStack(list(SIZES))(inputs))
    split = layers.TaskSplit(list(SIZES))(features)
    outputs = {
        name: keras.layers.Dense(1, name=f"{name}_out")(split[name]) for name in SIZES
    }
    return MultiTaskModel(inputs, outputs)


def compiled(common, **options):
    """The same, with losses and metrics that leave out missing labels."""
    model = network(common)
    model.compile(
        keras.optimizers.SGD(0.0),
        {name: MaskedLoss("mse") for name in SIZES},
        metrics={name: [MaskedMetric("mae")] for name in SIZES},
        **options,
    )
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("common", "arguments"),
    [
        (True, {"mixing": "size"}),
        (True, {"alone": "in_turn"}),
        (False, {"alone": "in_turn"}),
        (False, {"batch_size": {"a": 2, "b": 3, "c": 4}}),
    ],
    ids=["mixed", "alone", "own_alone", "own_sizes"],
)
def test_fit(kind, common, arguments):
    """It trains without a warning; the losses are means over the labels that there are."""
    model = compiled(common)
    arguments = {"batch_size": 5, "seed": 0, **arguments}
    stream = zipped(data(), common_input=common, epoch=12, kind=kind, **arguments)
    same = zipped(data(), common_input=common, epoch=12, kind=kind, **arguments)
    if kind == "PyDataset":
        # Keras looks at the first batches of an epoch before it begins.
        batches(same)
    expected = {name: [] for name in SIZES}
    for x, y in batches(same):
        outputs = model.predict_on_batch(x)
        for name in SIZES:
            here = np.isfinite(y[name])
            expected[name] += list(np.abs(outputs[name][here, 0] - y[name][here]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        history = model.fit(stream, epochs=1, verbose=0).history
    for name in SIZES:
        (metric,) = (
            key for key in history if key.startswith(f"{name}_") and "loss" not in key
        )
        assert history[metric][0] == pytest.approx(np.mean(expected[name]), rel=1e-4)


class Batches(keras.utils.PyDataset):
    """Batches of arrays, the last one shorter."""

    def __init__(self, x, y, size, **options):
        super().__init__(**options)
        self.x, self.y, self.size = x, y, size
        self.read, self.epochs = [], 0

    @property
    def num_batches(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, index):
        self.read.append(index)
        part = slice(index * self.size, (index + 1) * self.size)
        return self.x[part], self.y[part]

    def on_epoch_end(self):
        self.epochs += 1


@pytest.mark.parametrize("size", [7, 20, 64])
def test_data_sets_of_batches(size):
    """A PyDataset of each task, whatever its batches; each example once in an epoch."""
    sources = {name: Batches(*own, size) for name, own in data().items()}
    stream = zip_tasks(sources, {"a": 2, "b": 6, "c": 12}, common_input=True, seed=0)
    assert isinstance(stream, keras.utils.PyDataset) and len(stream) == 10
    for _ in range(2):
        found = batches(stream)
        seen = np.concatenate([x[:, 0] for x, _ in found])
        assert len(set(seen)) == len(seen) == 200
        for x, y in found:
            rows = np.stack([y[name] for name in SIZES])
            np.testing.assert_array_equal(np.nanmax(rows, axis=0), x[:, 0])
    # Mostly each batch is read once.
    assert all(len(own.read) <= 2 * own.num_batches + 4 for own in sources.values())
    assert all(own.epochs == 1 for own in sources.values())
    mixed = zip_tasks({**data(), "a": sources["a"]}, 4)
    x, y = mixed[0]
    np.testing.assert_array_equal(x["a"][:, 0], y["a"])


def test_workers():
    """Several threads read one stream; the order of its batches stays."""
    sources = {name: Batches(*own, 8) for name, own in data().items()}
    stream = zip_tasks(sources, 4, alone="in_turn", common_input=True, seed=0)
    stream.workers, stream.max_queue_size = 3, 4

    class Losses(keras.callbacks.Callback):
        present = []

        def on_train_batch_end(self, batch, logs=None):
            self.present.append(batch)

    model = compiled(True)
    losses = Losses()
    model.fit(stream, epochs=2, verbose=0, callbacks=[losses])
    assert losses.present == [*range(len(stream))] * 2


def test_pandas(rng):
    """Labels in a data frame, of `fit`, `evaluate`, batches and streams; NaN stays NaN."""
    x, y = arrays(12)
    labels = {name: y + rng.normal(size=12).astype("float32") for name in SIZES}
    frame = pd.DataFrame(labels)
    frame.loc[3, "b"] = np.nan
    frame["c"] = frame["c"].astype("Float32")
    frame.loc[5, "c"] = pd.NA
    known = {name: frame[name].to_numpy("float32", na_value=np.nan) for name in SIZES}
    weights = pd.DataFrame({"a": np.linspace(0, 1, 12)})
    model = compiled(True)
    expected = model.evaluate(
        x, known, sample_weight={"a": weights["a"].to_numpy()}, verbose=0, return_dict=True
    )
    found = model.evaluate(x, frame, sample_weight=weights, verbose=0, return_dict=True)
    assert found == pytest.approx(expected, nan_ok=False)
    found = model.test_on_batch(x, frame, weights, return_dict=True)
    assert found == pytest.approx(expected, rel=1e-5)
    model.train_on_batch(pd.DataFrame(x), frame, sample_weight=weights)
    history = model.fit(
        x, frame, sample_weight=weights, validation_data=(x, frame), verbose=0
    ).history
    assert np.isfinite(history["val_loss"][0])
    with pytest.raises(ValueError, match=r"y.columns.*'a', 'b', 'c'.*'d'"):
        model.fit(x, frame.rename(columns={"a": "d"}), verbose=0)
    for kind in KINDS[:2]:
        stream = zip_tasks(
            {"a": (x, frame["a"]), "c": (pd.DataFrame(x), frame["c"])},
            12,
            shuffle=False,
            kind=kind,
        )
        _, found = batches(stream)[0]
        np.testing.assert_array_equal(found["a"], known["a"])
        np.testing.assert_array_equal(found["c"], known["c"])


def test_absent_tasks(rng):
    """A task without labels in a batch has the loss 0, and learns nothing from it."""
    x, y = arrays(6)
    model = compiled(True)
    logs = model.train_on_batch(x, {"a": y}, return_dict=True)
    nothing = np.full(6, np.nan, "float32")
    before = model.get_weights()
    one = model.test_on_batch(x, {"a": y}, return_dict=True)
    other = model.test_on_batch(x, {"a": y, "b": nothing, "c": nothing}, return_dict=True)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["loss"] == pytest.approx(one["a_loss"], rel=1e-6)
    assert logs["loss"] > 0
    model.optimizer.learning_rate = 1e-6
    model.train_on_batch(x, {"a": y, "b": y}, return_dict=True)
    assert not all(map(np.array_equal, before, model.get_weights()))
    # Of a whole data set it is a mistake.
    for run in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=r"also for \['b', 'c'\]"):
            run(x, {"a": y}, verbose=0)
    with pytest.raises(ValueError, match=r"also for \['b', 'c'\]"):
        model.evaluate({"a": (x, y)}, verbose=0)
    plain = network(True)
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"also for \['b', 'c'\].*`MaskedLoss`"):
        plain.train_on_batch(x, {"a": y})
    with pytest.raises(ValueError, match="labels"):
        model.train_on_batch(x, {})


def test_only_what_a_task_needs():
    """A network of one output has the same layers; one optimizer trains them by turns."""
    stream = zip_tasks(data(), 5, alone="in_turn", common_input=True, epoch=6, seed=0)
    found = []
    for apart in (True, False):
        keras.utils.set_random_seed(2)
        model = network(True)
        optimizer = keras.optimizers.SGD(1e-8)
        losses = {name: MaskedLoss("mse") for name in SIZES}
        model.compile(optimizer, losses)
        optimizer.build(model.trainable_variables)
        parts = {
            name: MultiTaskModel(model.input, {name: model.output[name]}) for name in SIZES
        }
        for name, part in parts.items():
            part.compile(optimizer, {name: losses[name]})
            # The layers of the others' heads are no part of it.
            assert len(part.layers) == len(model.layers) - 2
        for x, y in batches(stream):
            (turn,) = (name for name in SIZES if np.isfinite(y[name]).all())
            if apart:
                parts[turn].train_on_batch(x, {turn: y[turn]})
            else:
                model.train_on_batch(x, y)
        found.append(model.get_weights())
        stream = zip_tasks(data(), 5, alone="in_turn", common_input=True, epoch=6, seed=0)
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": {"a": 1}}, "`batch_size` must be a positive int, or a dict"),
        ({"batch_size": {"a": 1, "b": 1, "c": 0}}, "`batch_size` must be a positive int"),
        ({"mixing": "size"}, "an input for each task.*alone.*common_input=True"),
        ({"mixing": "even", "common_input": True}, "`mixing` must be.*temperature"),
        ({"mixing": 0.0, "common_input": True}, "`mixing` must be.*0.0"),
        ({"mixing": {"a": 1}, "common_input": True}, "`mixing` must be.*'a': 1"),
        (
            {"mixing": {"a": 0, "b": 0, "c": 0}, "common_input": True},
            "`mixing` must be.*not all 0",
        ),
        (
            {"mixing": {"a": -1, "b": 1, "c": 1}, "common_input": True},
            "`mixing` must be.*not negative",
        ),
        (
            {
                "mixing": "size",
                "common_input": True,
                "batch_size": {"a": 1, "b": 2, "c": 3},
            },
            "one `batch_size`",
        ),
        ({"alone": "always"}, '`alone` must be "in_turn" or "random", or None'),
        ({"common_input": 1}, "`common_input` must be"),
        ({"missing": "x", "common_input": True}, "`missing` must be NaN"),
        ({"missing": None, "common_input": True}, "`missing` must be NaN"),
        ({"kind": "list"}, '`kind` must be "auto", "tf.data" or "PyDataset"'),
    ],
)
def test_bad_arguments(arguments, message):
    """What was received and what was expected."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        zip_tasks(data(), **{"batch_size": 2, **arguments})


@pytest.mark.parametrize("kind", KINDS)
def test_bad_data(kind):
    """Inputs of several forms, labels that can't be marked, data of another kind."""
    given = data()
    wide = {**given, "b": (np.zeros((4, 3), "float32"), np.zeros(4, "float32"))}
    with pytest.raises(ValueError, match=r"one form.*'a'.*'b'"):
        zipped(wide, 2, common_input=True, kind=kind)
    words = {**given, "b": (given["b"][0], np.array(["x"] * 60))}
    with pytest.raises(ValueError, match=r"'b'.*labels of which one can be marked"):
        zipped(words, 2, common_input=True, kind=kind)
    nested = {**given, "b": (given["b"][0], {"y": given["b"][1]})}
    with pytest.raises(ValueError, match=r"'b'.*labels of which one can be marked"):
        zipped(nested, 2, common_input=True, kind=kind)
    with pytest.raises(ValueError, match=r"missing=0.5.*int32"):
        zipped(data("int32"), 2, common_input=True, missing=0.5, kind=kind)
    # Without a mark nothing of this matters.
    assert len(zipped(words, 20, kind=kind)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_know_no_marks(kind):
    """`fit` says so before they are taken for labels."""
    model = network(True)
    stream = zipped(data(), 4, mixing="size", common_input=True, missing=-1, kind=kind)
    for loss, received in (
        ("mse", "mse"),
        (MaskedLoss("mse"), "missing=nan"),
        (MaskedLoss("mse", missing=-2), "missing=-2"),
    ):
        model.compile("sgd", {**dict.fromkeys(SIZES, MaskedLoss("mse", -1)), "b": loss})
        with pytest.raises(ValueError, match=rf"missing=-1\) for task 'b'.*{received}"):
            model.fit(stream, verbose=0)


def test_data_of_each_task_in_evaluation():
    """Weights of some tasks, batches of a PyDataset, and names that there are not."""
    model = compiled(True)
    given = data()
    weight = np.linspace(0, 1, 20)
    found = model.evaluate({**given, "a": (*given["a"], weight)}, verbose=0)
    ones = {name: (*own, np.ones(len(own[1]))) for name, own in given.items()}
    ones["a"] = (*given["a"], weight)
    np.testing.assert_allclose(found, model.evaluate(ones, verbose=0), rtol=1e-6)
    sources = {**given, "b": Batches(*given["b"], 7)}
    np.testing.assert_allclose(
        model.evaluate(sources, verbose=0), model.evaluate(given, verbose=0), rtol=1e-6
    )
    for run in (model.evaluate, lambda x: model.fit(*given["a"], validation_data=x)):
        with pytest.raises(ValueError, match=r"unknown tasks.*\['d'\]. The tasks are"):
            run({"a": given["a"], "d": given["b"]})
    x, y = given["a"]
    with pytest.raises(ValueError, match=r"unknown tasks in `sample_weight`: \['d'\]"):
        model.fit(x, dict.fromkeys(SIZES, y), sample_weight={"d": weight}, verbose=0)


def test_bad_sources():
    """Which kinds of data go together, and of what size they are."""
    examples = tf.data.Dataset.from_tensor_slices(arrays(6))
    source = Batches(*arrays(6), 2)
    with pytest.raises(ValueError, match=r"'a'.*arrays, or a keras\.utils\.PyDataset"):
        zip_tasks({"a": examples, "b": source}, 2)
    with pytest.raises(ValueError, match=r"kind=.tf\.data.*'b'"):
        zip_tasks({"a": examples, "b": source}, 2, kind="tf.data")
    with pytest.raises(ValueError, match=r"'a'.*known size.*cardinality=-1"):
        zip_tasks({"a": examples.repeat()}, 2, 3, mixing="size", common_input=True)

    class Endless(Batches):
        num_batches = None

    class Open(keras.utils.PyDataset):
        def __getitem__(self, index):
            return arrays(2)

    for source in (Endless(*arrays(6), 2), Open()):
        with pytest.raises(ValueError, match=r"'a'.*known number of batches.*None"):
            zip_tasks({"a": source}, 2)
    open_labels = examples.map(lambda x, y: (x, tf.boolean_mask(y[None], [y >= 0])))
    with pytest.raises(ValueError, match=r"'a'.*open shape"):
        zip_tasks({"a": open_labels}, 2, epoch=2, common_input=True)
    # An endless one that is drawn by given shares.
    stream = zip_tasks(
        {"a": examples.repeat(), "b": arrays(6)},
        4,
        epoch=5,
        mixing={"a": 1, "b": 2},
        common_input=True,
    )
    assert len(list(stream)) == 5


def test_augmented_images(rng):
    """MixUp and CutMix of Keras on labels side by side: NaN stays with what has it."""
    images = rng.random((12, 8, 8, 3)).astype("float32")
    labels = {
        "kind": np.eye(3, dtype="float32")[rng.integers(3, size=12)],
        "age": rng.random((12, 1)).astype("float32"),
    }
    labels["age"][:4] = np.nan
    model = multitask(
        keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()]),
        list(labels),
        heads={"kind": 3, "age": 1},
        verbose=False,
    )
    assert set(model.task_names) == set(labels)
    for layer in (keras.layers.MixUp(0.4, seed=1), keras.layers.CutMix(seed=1)):
        sizes = [own.shape[-1] for own in labels.values()]

        def augmented(x, y, layer=layer, sizes=sizes):
            side_by_side = tf.concat([y[task] for task in labels], axis=-1)
            mixed = layer({"images": x, "labels": side_by_side})
            parts = tf.split(mixed["labels"], sizes, axis=-1)
            return mixed["images"], dict(zip(labels, parts))

        stream = tf.data.Dataset.from_tensor_slices((images, labels)).batch(12)
        ((x, y),) = batches(stream.map(augmented))
        assert x.shape == images.shape
        np.testing.assert_allclose(y["kind"].sum(axis=-1), 1, rtol=1e-5)
        known = np.isfinite(labels["age"][:, 0])
        # A pair is known where both of it are; no label was lost otherwise.
        assert np.isfinite(y["age"][:, 0]).sum() <= known.sum()
        assert not np.isfinite(y["age"][~known]).any()
