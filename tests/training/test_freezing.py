"""Tasks at rest: what is theirs stays to the bit, whatever optimizer trains the others."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dmtrl_keras import MultiTaskModel, add_task, layers, multitask, zip_tasks
from dmtrl_keras.callbacks import EarlyStoppingByTask
from dmtrl_keras.distribution import train
from dmtrl_keras.layers import CrossStitch, TaskCopies
from dmtrl_keras.optimizers import LearningRateMultiplier
from dmtrl_keras.parameterizations import LAF, TT, LoRA, Parts, SimilarKernels, Tucker

TASKS = ["a", "b", "c"]
# Each has moments, or decays weights, or both.
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.05),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.9),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1, weight_decay=0.1),
    "averaged": lambda: keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.9),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "nested": lambda: keras.optimizers.LossScaleOptimizer(
        LearningRateMultiplier(keras.optimizers.Adam(0.05), {"a_head": 2.0})
    ),
}
SHARINGS = {
    "independent": "independent",
    "hard": "hard",
    "laf": LAF(2),
    "tucker": Tucker(0.7),
    "tt": TT(0.7),
    "similar": SimilarKernels(0.3),
    "parts": Parts(),
}


def some(names, *quick):
    """All of them, those that are not named in long tests."""
    return [
        pytest.param(name, marks=() if name in quick else pytest.mark.long)
        for name in names
    ]


@pytest.fixture
def data(rng):
    """Features, and labels of each task."""
    x = rng.normal(size=(48, 6)).astype("float32")
    return x, {task: rng.normal(size=48).astype("float32") for task in TASKS}


def network(sharing="independent", **options):
    """Two layers, a normalization of all tasks, heads that normalize too."""
    backbone = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(8, "relu"),
            keras.layers.Dropout(0.3),
        ]
    )

    def head(features):
        normalized = keras.layers.BatchNormalization()(features)
        return keras.layers.Dense(1)(keras.layers.Dropout(0.3)(normalized))

    return multitask(backbone, TASKS, sharing, heads=head, verbose=False, **options)


def own(model, task):
    """What is a task's alone, zeros elsewhere."""
    return [
        np.where(
            True if entries is None else entries, keras.ops.convert_to_numpy(variable), 0
        )
        for variable, entries in model.own_of(task).weights
    ]


def same(one, other):
    """Whether arrays are equal to the bit."""
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def moved(model, before, task):
    """Whether the parts of a task are others: a single bias may be where it was."""
    return sum(map(np.array_equal, before, own(model, task))) <= 1


@pytest.mark.parametrize("optimizer", some(OPTIMIZERS, "adamw", "nested"))
def test_optimizers(optimizer, data):
    """A frozen task's weights stay, those of the others move; afterwards all move."""
    model = network(Tucker(0.7))
    # Graphs of TensorFlow are tested below.
    model.compile(OPTIMIZERS[optimizer](), "mse", run_eagerly=optimizer != "nested")
    model.fit(*data, epochs=2, verbose=0)
    model.freeze("b")
    assert model.frozen_tasks == ("b",)
    before = {task: own(model, task) for task in TASKS}
    heads = [x for x in model.layers if id(x) in model.own_of("b").layers and x.weights]
    assert len(heads) == 2
    states = [head.get_weights() for head in heads]
    model.fit(*data, epochs=2, verbose=0)
    assert same(before["b"], own(model, "b"))
    # The running statistics of its head, too.
    assert all(map(same, states, [head.get_weights() for head in heads]))
    assert moved(model, before["a"], "a")
    assert moved(model, before["c"], "c")
    model.unfreeze("b")
    model.fit(*data, verbose=0)
    assert moved(model, before["b"], "b")


@pytest.mark.parametrize("sharing", some(SHARINGS, "independent", "tucker"))
def test_kernels(sharing, data):
    """Independent tasks' outputs stay; shared factors go on, a task's column does not."""
    model = network(SHARINGS[sharing])
    eager = sharing != "similar"
    model.compile(keras.optimizers.AdamW(0.05), "mse", run_eagerly=eager)
    model.fit(*data, epochs=2, verbose=0)
    before = own(model, "b")
    whole = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.freeze("b")
    model.fit(*data, epochs=2, verbose=0)
    assert same(before, own(model, "b"))
    after = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    # No variable is frozen as a whole but those of its head.
    still = sum(map(np.array_equal, whole, after))
    assert still == 4
    # Its part of two kernels, of their biases, of scale and offset; and its head.
    assert len(before) - 4 == {"hard": 0, "parts": 8}.get(sharing, 6)


def test_output_of_an_independent_task(data):
    """With kernels of its own, a frozen task's outputs stay as they are."""
    backbone = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(4)]
    )
    model = multitask(backbone, TASKS, heads=1, verbose=False)
    model.compile(keras.optimizers.AdamW(0.05), "mse")
    model.fit(*data, epochs=2, verbose=0)
    model.freeze("a", "b")
    before = model.predict(data[0], verbose=0)
    model.fit(*data, epochs=2, verbose=0)
    after = model.predict(data[0], verbose=0)
    np.testing.assert_array_equal(before["a"], after["a"])
    np.testing.assert_array_equal(before["b"], after["b"])
    assert not np.allclose(before["c"], after["c"])


def test_the_others_train_as_without_it(data):
    """From the same start, the others' steps are those of a model without the task."""
    x, y = data
    found = []
    for frozen in (True, False):
        keras.utils.set_random_seed(3)
        backbone = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh")])
        model = multitask(backbone, TASKS, LAF(2), heads=1, verbose=False)
        loss = {task: "mse" for task in TASKS if frozen or task != "b"}
        model.compile(keras.optimizers.Adam(0.01), loss)
        if frozen:
            model.freeze("b")
        history = model.fit(x, y, epochs=3, shuffle=False, verbose=0).history
        found.append((history["loss"], model.predict(x, verbose=0)["a"]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["number", "variable"])
def test_weight_zero(kind, data):
    """A loss weight of 0 leaves what is a task's alone; one that is not 0 does not."""
    weight = 0.0 if kind == "number" else keras.Variable(1.0, trainable=False)
    model = network(LAF(2))
    model.compile(
        keras.optimizers.AdamW(0.05, weight_decay=0.1), "mse", loss_weights={"b": weight}
    )
    if kind == "variable":
        before = own(model, "b")
        model.fit(*data, verbose=0)
        assert moved(model, before, "b")
        weight.assign(0.0)
    before, other = own(model, "b"), own(model, "a")
    model.fit(*data, verbose=0)
    assert same(before, own(model, "b"))
    assert moved(model, other, "a")
    if kind == "variable":
        weight.assign(0.5)
        model.fit(*data, verbose=0)
        assert moved(model, before, "b")


def test_losses(data):
    """In training a frozen task counts no more and is logged; in evaluation it counts."""
    x, y = data
    model = network()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.freeze("c")
    logs = model.train_on_batch(x, y, return_dict=True)
    assert logs["loss"] == pytest.approx(logs["a_loss"] + logs["b_loss"], rel=1e-5)
    assert logs["c_loss"] > 0
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    total = sum(logs[f"{task}_loss"] for task in TASKS)
    assert logs["loss"] == pytest.approx(total, rel=1e-5)


def test_files(data, tmp_path):
    """A model is saved with its frozen tasks, and goes on with them."""
    model = network("tt", rank=0.7)
    model.compile("adam", "mse")
    model.freeze("a", "c")
    model.fit(*data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.frozen_tasks == ("a", "c")
    before = own(loaded, "a")
    loaded.fit(*data, verbose=0)
    assert same(before, own(loaded, "a"))
    loaded.unfreeze()
    assert loaded.frozen_tasks == ()
    assert "frozen_tasks" not in loaded.get_config()


def test_copies_and_lora(rng):
    """Copies of layers, and kernels of low rank beside a frozen one."""
    x = rng.normal(size=(16, 5, 3)).astype("float32")
    y = {task: rng.normal(size=16).astype("float32") for task in TASKS}
    inputs = keras.Input((5, 3))
    trunk = keras.layers.LSTM(4)(inputs)
    backbone = keras.Model(inputs, keras.layers.Dense(6, name="fc")(trunk))
    sharing = {"fc": LoRA(1), "*": "independent"}
    model = multitask(backbone, TASKS, sharing, heads=1, verbose=False)
    assert any(isinstance(x, TaskCopies) for x in model.layers)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, verbose=0)
    model.freeze("c")
    before, others = own(model, "c"), own(model, "a")
    # Two of an LSTM and its bias, a product of two and a bias, a head of two.
    assert len(before) == 8
    model.fit(x, y, epochs=2, verbose=0)
    assert same(before, own(model, "c"))
    assert moved(model, others, "a")


def test_fused_networks(data):
    """Of a cross-stitch unit a task has the row that makes its features."""
    inputs = keras.Input((6,))
    x = layers.TaskDense(4, 3, shared_input=True)(inputs)
    x = CrossStitch(TASKS)(x)
    split = layers.TaskSplit(TASKS)(x)
    outputs = {task: keras.layers.Dense(1, name=task)(split[task]) for task in TASKS}
    model = MultiTaskModel(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(*data, verbose=0)
    model.freeze("a")
    alpha = next(v for v in model.trainable_variables if v.name == "alpha")
    before, start = own(model, "a"), keras.ops.convert_to_numpy(alpha)
    model.fit(*data, verbose=0)
    assert same(before, own(model, "a"))
    after = keras.ops.convert_to_numpy(alpha)
    np.testing.assert_array_equal(after[0], start[0])
    assert not np.any(after[1:] == start[1:])


def test_tasks_that_came_later(data):
    """A new task's column and head can rest too."""
    model = add_task(network(LAF(2)), "d", like="a")
    model.trainable = True
    x, y = data
    y = {**y, "d": y["a"]}
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, verbose=0)
    model.freeze("d")
    before = own(model, "d")
    assert any(value.shape == (2,) for value in before)
    model.fit(x, y, verbose=0)
    assert same(before, own(model, "d"))


def test_inputs_of_each_task(rng):
    """Where tasks have inputs of their own, too."""
    inputs = {task: keras.Input((4,), name=task) for task in TASKS}
    stacked = layers.TaskStack(TASKS)(inputs)
    outputs = layers.TaskSplit(TASKS)(layers.TaskDense(1, 3)(stacked))
    model = MultiTaskModel(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.freeze("a")
    parts = {
        task: (rng.normal(size=(n, 4)), rng.normal(size=n))
        for task, n in (("a", 6), ("b", 9), ("c", 12))
    }
    before = own(model, "a")
    model.fit(zip_tasks(parts, 3), verbose=0)
    assert same(before, own(model, "a"))


@pytest.mark.parametrize("eager", [True, False])
def test_frozen_from_the_start(data, eager):
    """The optimizer has been made for what is trained later, too; clones are frozen."""
    model = network()
    model.compile(keras.optimizers.Adam(0.05), "mse", run_eagerly=eager)
    model.freeze("b")
    before = own(model, "b")
    model.train_on_batch(*data)
    assert same(before, own(model, "b"))
    assert keras.models.clone_model(model).frozen_tasks == ("b",)
    model.unfreeze()
    model.train_on_batch(*data)
    assert moved(model, before, "b")


def test_a_loop_of_ones_own(data):
    """The compiled optimizer leaves tasks alone in any step that is traced afterwards."""
    x, y = data
    model = network()
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.freeze("a")
    before = own(model, "a")
    for _ in range(2):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = model.compute_loss(x, y, outputs)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)
    assert same(before, own(model, "a"))


def test_errors():
    """Unknown tasks, and no task to be trained."""
    model = network()
    with pytest.raises(ValueError, match="one at least"):
        model.freeze()
    with pytest.raises(ValueError, match=r"names of \['a', 'b', 'c'\].*\['d'\]"):
        model.freeze("a", "d")
    with pytest.raises(ValueError, match="at least one task that is trained"):
        model.freeze(*TASKS)
    assert model.frozen_tasks == ()
    with pytest.raises(ValueError, match="names of"):
        model.unfreeze("d")


# --- early stopping -----------------------------------------------------------------------


class Logged(keras.callbacks.Callback):
    """Gives every task the validation losses that it is told."""

    def __init__(self, values):
        super().__init__()
        self.values, self.frozen = values, []

    def on_epoch_end(self, epoch, logs=None):
        for task, values in self.values.items():
            logs[f"val_{task}_loss"] = values[epoch]
        self.frozen.append(self.model.frozen_tasks)


def test_early_stopping_by_task(data):
    """Each task stops after its own best epoch, gets its weights back, and waits."""
    model = network()
    model.compile(keras.optimizers.Adam(0.05), "mse")
    told = Logged(
        {
            "a": [5, 4, 4, 4, 4, 4, 4, 4],
            "b": [5, 4, 3, 2, 1.9, 1.8, 3, 3],
            "c": [5, 6, 7, 6, 6, 6, 6, 6],
        }
    )
    kept = {}

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept[epoch] = {task: own(model, task) for task in TASKS}

    stop = EarlyStoppingByTask(min_delta=0.5, patience=2, restore_best_weights=True)
    history = model.fit(*data, epochs=8, verbose=0, callbacks=[told, Keep(), stop])
    assert stop.stopped_epochs == {"a": 3, "b": 5, "c": 2}
    assert stop.best == {"a": 4, "b": 2, "c": 5}
    assert told.frozen == [(), (), (), ("c",), ("a", "c"), ("a", "c")]
    assert len(history.epoch) == 6
    for task, best in (("a", 1), ("b", 3), ("c", 0)):
        assert same(kept[best][task], own(model, task))
    assert model.frozen_tasks == ()


def test_early_stopping_by_accuracy(data, capsys):
    """More is better of an accuracy; it waits for a first epoch, and says what it does."""
    model = network()
    model.compile(keras.optimizers.SGD(0.0), "mse")

    class Accuracies(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            for task, value in (("a", 0.1 * epoch), ("b", -epoch), ("c", 0.1 * epoch)):
                logs[f"{task}_accuracy"] = value

    stop = EarlyStoppingByTask("{task}_accuracy", patience=1, start_from_epoch=2, verbose=1)
    model.fit(*data, epochs=5, verbose=0, callbacks=[Accuracies(), stop])
    assert stop.stopped_epochs == {"b": 3}
    assert "Epoch 4: task 'b' stops, b_accuracy was best" in capsys.readouterr().out


def test_early_stopping_in_the_loop_of_machines(data):
    """`distribution.train` traces its step anew when a task is at rest."""
    model = network()
    model.compile(keras.optimizers.AdamW(0.05), "mse")
    told = Logged({"a": [5, 5, 5, 5], "b": [4, 3, 2, 1], "c": [4, 3, 2, 1]})
    kept = {}

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept[epoch] = {task: own(model, task) for task in TASKS}

    stop = EarlyStoppingByTask(patience=1)
    batches = tf.data.Dataset.from_tensor_slices(data).batch(16)
    train(model, batches, 4, batches, callbacks=[told, Keep(), stop])
    assert stop.stopped_epochs == {"a": 1}
    assert same(kept[1]["a"], kept[3]["a"])
    assert not same(kept[1]["b"], kept[3]["b"])


def test_early_stopping_errors(data):
    """Arguments, models and logs that it can't work with."""
    for arguments, message in (
        ({"monitor": "val_loss"}, "{task}"),
        ({"patience": -1}, "patience"),
        ({"mode": "up"}, "mode"),
        ({"min_delta": -1.0}, "min_delta"),
        ({"start_from_epoch": 0.5}, "start_from_epoch"),
        ({"verbose": 2}, "verbose"),
        ({"restore_best_weights": 1}, "restore_best_weights"),
    ):
        with pytest.raises(ValueError, match=message):
            EarlyStoppingByTask(**arguments)
    model = network()
    model.compile("sgd", "mse")
    stop = EarlyStoppingByTask("val_{task}_auc")
    with pytest.warns(UserWarning, match="there was no validation"):
        model.fit(*data, verbose=0, callbacks=[stop])
    with pytest.raises(ValueError, match=r"Received: 'val_a_auc'\. In the logs are"):
        model.fit(*data, validation_data=data, verbose=0, callbacks=[stop])
    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="a MultiTaskModel"):
        plain.fit(data[0], data[1]["a"], verbose=0, callbacks=[stop])
