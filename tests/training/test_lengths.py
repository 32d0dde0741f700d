"""One data set for each task: each is measured on its own examples, exactly once."""

import keras
import numpy as np
import pytest
from keras import layers as kl

from dmtrl_keras import MultiTaskModel, Relation, TaskRelations, layers, multitask
from dmtrl_keras.ground.backend import tensorflow

SIZES = {"a": 5, "b": 11, "c": 8}
WEIGHTS = {"a": 2.0}


def network(shared, between=None, terms=False):
    """With one input for each task, or one for all."""
    backbone = keras.Sequential(
        [keras.Input((4,), name="x"), kl.Dense(3, name="fc", kernel_regularizer="l2")]
    )
    model = multitask(
        backbone,
        list(SIZES),
        heads=2,
        shared_input=shared,
        between=between,
        verbose=False,
    )
    if terms:
        relations = TaskRelations(Relation("fc"))
        model = MultiTaskModel(model.input, model.output, terms=[relations])
    model.compile(
        "sgd",
        "sparse_categorical_crossentropy",
        loss_weights=WEIGHTS,
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.sparse_categorical_crossentropy],
        run_eagerly=True,
    )
    return model


@pytest.fixture
def data(rng):
    """Inputs, labels and weights of different length by task."""
    x = {t: rng.normal(size=(n, 4)).astype("float32") for t, n in SIZES.items()}
    y = {t: rng.integers(2, size=n) for t, n in SIZES.items()}
    weights = {t: rng.random(n).astype("float32") for t, n in SIZES.items()}
    return x, y, weights


def alone(model, task, x, y, weights):
    """Prediction, loss, accuracy and weighted cross entropy, without Keras."""
    n = len(x[task])
    inputs = x[task]
    if isinstance(model.input, dict):
        inputs = {other: np.resize(own, (n, 4)) for other, own in x.items()}
    found = keras.ops.convert_to_numpy(model(inputs)[task])
    values = -np.log(found[np.arange(n), y[task]])
    hits = np.argmax(found, -1) == y[task]
    return (
        found,
        (values * weights[task]).mean(),
        hits.mean(),
        (values * weights[task]).sum() / weights[task].sum(),
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch_size", [3, 32])
def test_each_example_once(shared, batch_size, data):
    """Whatever the batches, with sample weights; predictions have the tasks' lengths."""
    x, y, weights = data
    model = network(shared)
    logs = model.evaluate(
        x, y, batch_size, sample_weight=weights, return_dict=True, verbose=0
    )
    predicted = model.predict(x, batch_size=batch_size, verbose=0)
    total = float(sum(model.losses))
    for task in SIZES:
        outputs, loss, accuracy, weighted = alone(model, task, x, y, weights)
        np.testing.assert_allclose(predicted[task], outputs, atol=1e-6)
        assert logs[f"{task}_loss"] == pytest.approx(loss, rel=1e-5)
        assert logs[f"{task}_accuracy"] == pytest.approx(accuracy)
        name = f"{task}_sparse_categorical_crossentropy"
        assert logs[name] == pytest.approx(weighted, rel=1e-5)
        total += WEIGHTS.get(task, 1.0) * loss
    assert logs["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="others trace nothing")
def test_one_trace_for_all_lengths(rng):
    """However many lengths there are; what is evaluated changes nothing else."""
    tasks = [f"task_{number}" for number in range(6)]
    x = {t: rng.normal(size=(2 + n, 4)).astype("float32") for n, t in enumerate(tasks)}
    y = {t: rng.integers(2, size=len(own)) for t, own in x.items()}
    backbone = keras.Sequential([keras.Input((4,), name="x"), kl.Dense(3, name="fc")])
    model = multitask(backbone, tasks, heads=2, shared_input=False)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    traced = []
    for name in ("test_step", "predict_step"):
        step = getattr(model, name)
        setattr(model, name, lambda batch, s=step, n=name: (traced.append(n), s(batch))[1])
    weights = model.get_weights()
    logs = model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    assert traced == ["test_step"]
    found = model.predict(x, batch_size=8, verbose=0)
    assert traced == ["test_step", "predict_step"]
    for task, own in y.items():
        assert found[task].shape == (len(own), 2)
        right = np.mean(found[task].argmax(-1) == own)
        assert logs[f"{task}_accuracy"] == pytest.approx(right)
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)


class Count(keras.metrics.Metric):
    """Of batches, whatever their weights."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.number = self.add_weight(name="number", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.number.assign(self.number + 1)

    def result(self):
        return self.number


def test_metrics_that_know_no_weights(data):
    """Absent tasks leave them as they are."""
    x, y, _ = data
    model = network(False)
    model.compile(metrics={task: [Count(name="count")] for task in SIZES})
    logs = model.evaluate(x, y, batch_size=3, verbose=0, return_dict=True)
    # Pieces of 5, 3 and 3 examples.
    assert {task: logs[f"{task}_count"] for task in SIZES} == {"a": 2, "b": 4, "c": 3}


def test_forms_of_data(data):
    """As `zip_tasks` takes them, tuples and data sets; the list is Keras's."""
    x, y, _ = data
    model = network(False)
    expected = model.evaluate(x, y, verbose=0)
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    assert expected[0] == logs["loss"] and sorted(expected) == sorted(logs.values())
    sets = {task: (x[task], y[task]) for task in SIZES}
    assert model.evaluate(sets, verbose=0) == pytest.approx(expected)
    if keras.config.backend() == "tensorflow":
        of = tensorflow().data.Dataset.from_tensor_slices
        sets = {"a": of(sets["a"]), "b": of(sets["b"]).batch(4), "c": sets["c"]}
        assert model.evaluate(sets, verbose=0) == pytest.approx(expected)
        with pytest.raises(ValueError, match=r"'a'.*finite data set.*cardinality=-1"):
            model.evaluate({**sets, "a": sets["a"].repeat()}, verbose=0)
    # Data of one length is Keras's own business.
    x, y = ({t: own[:5] for t, own in part.items()} for part in (x, y))
    assert len(model.evaluate(x, y, verbose=0)) == len(expected)
    sets = {task: (x[task], y[task]) for task in SIZES}
    assert model.evaluate(sets, verbose=0) == pytest.approx(
        model.evaluate(x, y, verbose=0), rel=1e-5
    )


@pytest.mark.parametrize("shared", [False, True])
def test_one_task_with_a_loss(shared, data):
    """The loss is that of its own examples, however long the others are."""
    x, y, _ = data
    model = network(shared)
    for task in ("a", "b"):
        loss = {task: "sparse_categorical_crossentropy"}
        model.compile("sgd", loss, metrics=["accuracy"], run_eagerly=True)
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        ones = {t: np.ones(n) for t, n in SIZES.items()}
        expected = alone(model, task, x, y, ones)[1] + float(sum(model.losses))
        assert logs["loss"] == pytest.approx(expected, rel=1e-5)
        assert {f"{t}_accuracy" for t in SIZES} < set(logs)


def test_validation(data):
    """`fit` validates on them, before the callbacks that look at the results."""
    x, y, weights = data
    model = network(False, terms=True)
    train = {t: own[:5] for t, own in x.items()}, {t: own[:5] for t, own in y.items()}
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(logs.get("val_loss"))
    )
    history = model.fit(
        *train,
        epochs=2,
        validation_data=(x, y, weights),
        validation_freq=2,
        callbacks=watch,
        verbose=0,
    ).history
    expected = model.evaluate(x, y, sample_weight=weights, return_dict=True, verbose=0)
    assert seen == [None, pytest.approx(expected["loss"])]
    assert history["val_b_accuracy"] == [expected["b_accuracy"]]
    assert len(history["loss"]) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: m.fit(x, y), "`zip_tasks` makes one stream.*'b': 11"),
        (lambda m, x, y: m.evaluate(x, y, steps=1), "steps=None.*steps=1"),
        (lambda m, x, y: m.evaluate(x, [1]), "`y` by task.*list"),
        (lambda m, x, y: m.evaluate(x, {**y, "a": y["a"][:3]}), r"'a'.*lengths \[5, 3\]"),
        (lambda m, x, y: m.evaluate(x, {"a": y["a"]}), r"labels.*also for \['b', 'c'\]"),
        (lambda m, x, y: m.evaluate({"a": x["a"]}, {"a": y["a"]}), "inputs of every task"),
        (lambda m, x, y: m.evaluate({"a": x["a"]}, y), r"`y` for tasks without inputs"),
        (lambda m, x, y: m.predict(dict.fromkeys(x, 1)), "'a'.*'int'"),
        (
            lambda m, x, y: m.fit(
                {t: own[:5] for t, own in x.items()},
                {t: own[:5] for t, own in y.items()},
                validation_data=(x, y),
                validation_steps=3,
            ),
            "validation_steps=None.*3",
        ),
    ],
)
def test_errors(call, message, data):
    """What was received, what was expected."""
    x, y, _ = data
    with pytest.raises(ValueError, match=f"functional_?\\d*_multitask.*{message}"):
        call(network(False), x, y)


def test_tasks_that_see_each_other(data):
    """Their inputs belong together: different lengths have no right answer."""
    x, y, _ = data
    model = network(False, between={"fc": layers.CrossStitch})
    for call in (lambda: model.evaluate(x, y, verbose=0), lambda: model.predict(x)):
        with pytest.raises(ValueError, match="depends on the inputs of other tasks"):
            call()
    x, y = ({t: own[:5] for t, own in part.items()} for part in (x, y))
    assert model.evaluate(x, y, verbose=0)[0] > 0


def test_in_a_graph(data):
    """Traced anew where a task ends; the same numbers."""
    x, y, _ = data
    model = network(False)
    expected = model.evaluate(x, y, 4, verbose=0)
    model.run_eagerly = False
    model.make_test_function(force=True)
    assert model.evaluate(x, y, 4, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_labels_for_common_inputs(data):
    """Of another length than the inputs: what to do instead, in each method."""
    x, y, weights = data
    model, common = network(True), x["c"]
    fine = {task: y["c"] for task in SIZES}
    message = "`{}` of every task of the length of the inputs, 8.*'a': 5.*Mark.*zip_tasks"
    for call, what in (
        (lambda: model.evaluate(common, y), "y"),
        (lambda: model.evaluate(common, fine, sample_weight=weights), "sample_weight"),
        (lambda: model.fit(common, y), "y"),
        (lambda: model.fit(common, fine, validation_data=(common, y)), "y"),
    ):
        with pytest.raises(ValueError, match=message.format(what)):
            call()


@pytest.mark.parametrize("shared", [False, True])
def test_data_sets_by_task(shared, data):
    """`predict` needs no labels, `fit` takes one stream; errors name the model."""
    x, y, _ = data
    model = network(shared)
    expected = model.predict(x, verbose=0)
    slices = tensorflow().data.Dataset.from_tensor_slices
    inputs = {task: slices(own) for task, own in x.items()}
    for given in (
        inputs,
        {task: own.batch(3) for task, own in inputs.items()},
        {task: slices((own,)) for task, own in x.items()},
        {task: slices((own, y[task])).batch(2) for task, own in x.items()},
        {task: (own, y[task]) for task, own in x.items()},
    ):
        found = model.predict(given, verbose=0)
        for task, own in expected.items():
            np.testing.assert_allclose(found[task], own, rtol=1e-5)
    name = "functional_?\\d*_multitask"
    for given in (inputs, {task: (own, y[task]) for task, own in x.items()}):
        with pytest.raises(ValueError, match=f"{name}.*`zip_tasks.*dict of data sets"):
            model.fit(given)
    with pytest.raises(ValueError, match=rf"{name}.*, task 'a': expected examples \(x, y"):
        model.evaluate(inputs)
    nothing = {task: own.filter(lambda x: False) for task, own in inputs.items()}
    endless = {task: own.repeat() for task, own in inputs.items()}
    for given, message in ((nothing, "at least one example"), (endless, "finite")):
        with pytest.raises(ValueError, match=f"{name}.*, task 'a': expected.*{message}"):
            model.predict(given)
