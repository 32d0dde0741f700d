import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from dmtrl_keras import MultiTaskModel
from dmtrl_keras.distribution import divisible, make_strategy, train

tensorflow_only = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="tf.distribute is TensorFlow's"
)

# Networks of two tasks with layers of every family, in the scope of whatever strategy.
NETWORKS = """
import keras
import numpy as np
from dmtrl_keras import Relation, TaskRelationModel, TensorNormalRegularizer, multitask
from dmtrl_keras.layers import CrossStitch
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.metrics import MaskedMetric
from dmtrl_keras.parameterizations import LAF, TT, SimilarKernels, Tucker

rng = np.random.default_rng(0)
TASKS = ["a", "b"]
X = rng.normal(size=(24, 8, 8, 1)).astype("float32")
# One feature of the image and its square, so that there is something to learn.
Y = {"a": X.mean((1, 2, 3), keepdims=True)[:, 0, 0], "b": X[:, 0, 0] ** 2}
# Of every batch of 8 the replicas have another number of labels, of the first the second
# one has none, and the last batch has none at all.
Y["a"][[1, 4, 5, 6, 7, 8, 10, 11, *range(16, 24)]] = np.nan


def backbone(sizes, *layers):
    dense = {name: keras.layers.Dense(n, "tanh", name=name) for name, n in sizes.items()}
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        *layers,
        keras.layers.Flatten(),
        *dense.values(),
    ])


def make(name):
    keras.utils.set_random_seed(0)
    heads = {t: keras.layers.Dense(1, name=f"{t}_head") for t in TASKS}
    arguments = dict(heads=heads, verbose=False)
    convolution = keras.layers.Conv2D(4, 3, activation="tanh", name="conv")
    if name == "families":
        # One layer of each; as many networks would take as many times as long to trace.
        sizes = dict(independent=6, hard=6, laf=6, tucker=6, tt=6, prior=6)
        sharing = {
            "conv": SimilarKernels(0.3, weights="learned", update_every=2),
            "hard": "hard",
            "laf": LAF(2),
            "tucker": Tucker(2),
            "tt": TT(2),
        }
        modes = {"feature": 1.0, "class": 1.0, "task": 1e-2}
        prior = TensorNormalRegularizer(0.01, list(modes), 2, epsilon=modes)
        model = multitask(
            backbone(sizes, convolution, keras.layers.MaxPooling2D(name="pool")),
            TASKS,
            sharing,
            prior={"prior": prior},
            between={"pool": CrossStitch},
            **arguments,
        )
        layers = {layer.name: layer for layer in model.layers}
        found = {n: layers[n].sharing.name for n in ("conv", *sizes)}
        own = {n: n for n in ("hard", "laf", "tucker", "tt")}
        assert found == dict.fromkeys(found, "independent") | {"conv": "similar"} | own
        assert layers["prior"].prior.covariances and "pool_fusion" in layers
    elif name == "pooling":
        layers = (convolution, keras.layers.MaxPooling2D())
        model = multitask(backbone(dict(fc=6), *layers), TASKS, **arguments)
    elif name == "relation":
        model = multitask(backbone(dict(fc=6), convolution), TASKS, **arguments)
        relations = [Relation("output", 0.5), Relation("fc", 0.5)]
        model = TaskRelationModel(model, relations, momentum=0.5)
    losses = {"a": MaskedLoss("mse"), "b": "mse"}
    metrics = {"a": [MaskedMetric("mae", name="mae")], "b": ["mae"]}
    model.compile(keras.optimizers.Adam(0.01), losses, metrics=metrics)
    return model


def values(model):
    return [keras.ops.convert_to_numpy(v) for v in model.weights]


NAMES = ["families", "relation"]
"""

TWO = """
if "two" not in shared:
    shared["two"] = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
two = shared["two"]
"""

SAME_AS_ONE = """
def learn(name):
    model = make(name)
    fitted = model.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    return model, fitted.history

for name in NAMES:
    one_model, one = learn(name)
    with two.scope():
        model, history = learn(name)
    assert set(one) == set(history), name
    for key in one:
        np.testing.assert_allclose(history[key], one[key], rtol=2e-3, atol=1e-5,
                                   err_msg=f"{name}, {key}")
    for variable, ours, expected in zip(model.weights, values(model), values(one_model)):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4,
                                   err_msg=f"{name}, {variable.path}")
        copies = [copy.numpy() for copy in variable.value.values]
        assert len(copies) == 2
        np.testing.assert_array_equal(*copies, err_msg=f"{name}, {variable.path}")
    # Neither testing nor prediction changes anything.
    before = values(model)
    model.evaluate(X, Y, batch_size=8, verbose=0)
    model.predict(X, batch_size=8, verbose=0)
    for old, new in zip(before, values(model)):
        np.testing.assert_array_equal(old, new)
"""

SAVED = """
import shutil
import tempfile

folder = tempfile.mkdtemp()


class Killed(keras.callbacks.Callback):
    # Keeps what a process that ended here would have left behind.
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            shutil.copytree(f"{folder}/whole", f"{folder}/killed")


class Epochs(keras.callbacks.Callback):
    seen = ()

    def on_epoch_end(self, epoch, logs=None):
        self.seen += (epoch,)


def learn(backup, *callbacks):
    with two.scope():
        model = make("relation")
    callbacks = [keras.callbacks.BackupAndRestore(f"{folder}/{backup}"), *callbacks]
    model.fit(X, Y, batch_size=8, epochs=4, shuffle=False, verbose=0,
              callbacks=callbacks)
    return model

whole = learn("whole", Killed())
resumed = Epochs()
model = learn("killed", resumed)
assert resumed.seen == (2, 3), resumed.seen
for ours, expected in zip(values(model), values(whole)):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
outputs = model.predict(X, batch_size=8, verbose=0)
model.save(f"{folder}/model.keras")
loaded = keras.saving.load_model(f"{folder}/model.keras")
model.export(f"{folder}/model", verbose=False)
saved = tf.saved_model.load(f"{folder}/model")
served = saved.serve(X)
for task in TASKS:
    np.testing.assert_allclose(loaded.predict(X, verbose=0)[task], outputs[task],
                               atol=1e-5)
    np.testing.assert_allclose(served[task], outputs[task], atol=1e-5)
"""

UNEVEN = """
# (Without examples the gradient of pooling would abort the process.)
with two.scope():
    model = make("pooling")
# The first batch, and the last one, differ between the replicas.
model.fit(X[:21], {t: y[:21] for t, y in Y.items()}, batch_size=7, verbose=0)
assert model.predict(X[:3], verbose=0)["a"].shape == (3, 1)
# A mean over all examples, with or without a replica that has none.
with tf.device("cpu:0"):
    one = make("pooling")
one.set_weights(model.get_weights())
labels = {t: y[:17] for t, y in Y.items()}
found = model.evaluate(X[:17], labels, batch_size=8, verbose=0, return_dict=True)
expected = one.evaluate(X[:17], labels, batch_size=8, verbose=0, return_dict=True)
# (Keras's losses by task are means over batches, not over examples.)
for name in ("loss", "a_mae", "b_mae"):
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
try:
    model.fit(X[:17], labels, batch_size=8, verbose=0)
except tf.errors.InvalidArgumentError as error:
    assert "a replica got no example" in str(error), error
else:
    raise AssertionError("a replica without examples is no error")
for wrong in ({"jit_compile": True}, {"steps_per_execution": 2}):
    try:
        with two.scope():
            model.compile("sgd", "mse", **wrong)
    except ValueError as error:
        assert "several replicas" in str(error), error
    else:
        raise AssertionError(wrong)
"""


MISSING = """
import keras
import numpy as np
from dmtrl_keras import MultiTaskModel
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.metrics import MaskedMetric

rng = np.random.default_rng(0)
x = rng.normal(size=(16, 3)).astype("float32")
full = (x[:, :1] + rng.normal(size=(16, 1))).astype("float32")
# Padding, which Keras's masks leave out: as much on each replica, since Keras itself
# takes means of means.
x[[2, 6, 10, 14]] = 0
few = full.copy()
few[[1, 4, 5, 6, 7, 12, 13]] = np.nan
weight = rng.uniform(size=16)
losses = {
    "plain": "mse",
    "full": MaskedLoss("mse"),
    "few": MaskedLoss("mse"),
    "weighted": MaskedLoss("mse", reduction="mean_with_sample_weight"),
}
y = {task: full if task in ("plain", "full") else few for task in losses}
given = dict(sample_weight={task: weight for task in losses}, batch_size=8, verbose=0)


def learn(strategy):
    with strategy.scope():
        inputs = keras.Input((3,))
        heads = {t: keras.layers.Dense(1, kernel_initializer="zeros") for t in losses}
        seen = keras.layers.Masking()(inputs)
        model = MultiTaskModel(inputs, {t: head(seen) for t, head in heads.items()})
        metrics = {t: [MaskedMetric("mse", name="mse")] for t in losses}
        model.compile(keras.optimizers.SGD(0.05), losses, weighted_metrics=metrics)
    history = model.fit(x, y, epochs=2, shuffle=False, **given).history
    logs = model.evaluate(x, y, return_dict=True, **given)
    return history, logs, {task: head.get_weights() for task, head in heads.items()}


one, logs, weights = learn(tf.distribute.get_strategy())
history, found, moved = learn(two)
np.testing.assert_allclose(found["full_loss"], found["plain_loss"], rtol=1e-6)
# Of an epoch, by labels: what the metric is, with and without the weights in the divisor.
np.testing.assert_allclose(found["weighted_loss"], found["weighted_mse"], rtol=1e-6)
for key in logs:
    np.testing.assert_allclose(found[key], logs[key], rtol=1e-6, err_msg=key)
    np.testing.assert_allclose(history[key], one[key], rtol=1e-6, err_msg=key)
for task in losses:
    for ours, expected in zip(moved[task], weights[task]):
        np.testing.assert_allclose(ours, expected, atol=1e-7, err_msg=task)
for masked, plain in zip(moved["full"], moved["plain"]):
    np.testing.assert_allclose(masked, plain, atol=1e-7)
"""


@pytest.mark.long
@tensorflow_only
def test_missing_labels_on_two_devices(on_two_devices):
    """The mean over the labels of the global batch, beside a task that has them all."""
    on_two_devices(TWO + MISSING)


@pytest.mark.long
@tensorflow_only
def test_families_on_two_devices(on_two_devices):
    """Losses, weights and state of one device, and equal replicas."""
    on_two_devices(NETWORKS + TWO + SAME_AS_ONE)


FROZEN = """
import keras
import numpy as np
from dmtrl_keras import multitask

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 6)).astype("float32")
y = {"a": x[:, 0], "b": x[:, 1]}
with two.scope():
    layers = [keras.layers.Dense(16, "relu"), keras.layers.BatchNormalization()]
    backbone = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(16)])
    model = multitask(backbone, ["a", "b"], "laf", rank=2, heads=1, verbose=False)
    weight = keras.Variable(1.0, trainable=False)
    model.compile(keras.optimizers.AdamW(0.05), "mse", loss_weights={"a": weight})


def own(task):
    parts = model.own_of(task).weights
    return [np.where(True if e is None else e, np.array(v), 0) for v, e in parts]


def same(task, before):
    return [np.array_equal(*pair) for pair in zip(before, own(task))]


model.fit(x, y, batch_size=16, verbose=0)
for rest, other in (("b", "a"), ("a", "b")):
    if rest == "b":
        model.freeze("b")
    else:
        model.unfreeze()
        weight.assign(0.0)
    before = {task: own(task) for task in "ab"}
    model.fit(x, y, batch_size=16, verbose=0)
    assert all(same(rest, before[rest])), rest
    assert not any(same(other, before[other])), other
"""


@pytest.mark.long
@tensorflow_only
def test_tasks_at_rest_on_two_devices(on_two_devices):
    """Frozen, or with a loss weight that became 0: to the bit."""
    on_two_devices(TWO + FROZEN)


REPLICAS = """
import keras
import numpy as np
from dmtrl_keras import relationship_network, task_covariance
from dmtrl_keras.losses import MaskedLoss

rng = np.random.default_rng(0)
x = {name: rng.normal(size=(32, 6)).astype("float32") for name in "abc"}
y = {name: rng.integers(4, size=32) for name in "abc"}
y["a"][8:20] = -1
losses = {t: MaskedLoss("sparse_categorical_crossentropy", missing=-1) for t in "abc"}
found = []
for strategy in (tf.distribute.get_strategy(), two):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = relationship_network((6,), list("abc"), 4, 5, prior="mrn", strength=0.1)
        model.compile("sgd", losses)
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    found.append(task_covariance(model))
for layer, matrix in found[0].items():
    assert np.abs(matrix - np.eye(3)).max() > 0.1
    np.testing.assert_allclose(matrix, found[1][layer], atol=1e-5)
    for covariance in model.get_layer(layer).prior.modes.values():
        first, second = (copy.numpy() for copy in covariance.covariance.value.values)
        np.testing.assert_array_equal(first, second)
"""


@pytest.mark.long
@tensorflow_only
def test_input_per_task_on_two_devices(on_two_devices):
    """MRN: two devices learn what one learns, and hold equal covariances."""
    on_two_devices(TWO + REPLICAS)


@pytest.mark.long
@tensorflow_only
def test_saved_on_two_devices(on_two_devices):
    """Resumed by `BackupAndRestore`, saved, exported."""
    on_two_devices(NETWORKS + TWO + SAVED)


@pytest.mark.long
@tensorflow_only
def test_batches_that_do_not_divide(on_two_devices):
    on_two_devices(NETWORKS + TWO + UNEVEN)


STRATEGIES = """
from dmtrl_keras.distribution import make_strategy

assert make_strategy().num_replicas_in_sync == 1
assert make_strategy("cpu").num_replicas_in_sync == 1
for name in ("auto", "mirrored", "cpu"):
    assert make_strategy(name, replicas=2).num_replicas_in_sync == 2
tf.constant(1)
try:
    make_strategy("cpu", replicas=3)
except RuntimeError as error:
    assert "TensorFlow runs already" in str(error), error
else:
    raise AssertionError("devices were divided too late")
"""


@tensorflow_only
def test_make_strategy(on_two_devices):
    on_two_devices(STRATEGIES)
    with pytest.raises(ValueError, match='"auto", "mirrored" or "cpu"'):
        make_strategy("tpu")
    with pytest.raises(ValueError, match="replicas"):
        make_strategy("cpu", replicas=0)


def test_divisible():
    assert [divisible(n, 8, 4) for n in (32, 33, 35, 36, 39)] == [32, 32, 32, 36, 36]
    assert divisible(7, 3, 1) == 7
    with pytest.raises(ValueError, match="a multiple of 4"):
        divisible(32, 6, 4)
    with pytest.raises(ValueError, match="too few"):
        divisible(3, 8, 4)


def model_and_data():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = MultiTaskModel(inputs, {"a": keras.layers.Dense(1)(inputs)})
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    rng = np.random.default_rng(0)
    return model, rng.normal(size=(12, 3)), {"a": rng.normal(size=(12, 1))}


@tensorflow_only
def test_train_is_fit():
    """Without a strategy the loop does what `fit` does, callbacks included."""
    import tensorflow as tf

    model, x, y = model_and_data()
    expected = model.fit(
        x, y, batch_size=4, epochs=3, shuffle=False, validation_data=(x, y), verbose=0
    ).history
    other, x, y = model_and_data()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    found = train(other, data, 3, validation_data=data).history
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
    np.testing.assert_allclose(other.get_weights()[0], model.get_weights()[0], rtol=1e-5)
    stopping = keras.callbacks.EarlyStopping("loss", patience=0, mode="max")
    assert len(train(other, data, 3, callbacks=[stopping]).history["loss"]) == 2
    with pytest.raises(ValueError, match="must be compiled"):
        train(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), data)


# TensorFlow must not start before the cluster is known.
CLUSTER = """
import json
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()
assert strategy.num_replicas_in_sync == 2
"""
MACHINE = """
from dmtrl_keras.distribution import train

data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8, drop_remainder=True)
results = {}
for name in NAMES:
    with strategy.scope():
        model = make(name)
    # The test step is the same for all of them.
    testing = data if name == NAMES[0] else None
    history = train(model, data, 3, validation_data=testing).history
    results[name] = {"history": history, "weights": [v.tolist() for v in values(model)]}
"""


@pytest.mark.long
@tensorflow_only
def test_two_machines():
    """Two processes learn what one does."""
    import tensorflow as tf

    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in (one, two)]
    script = f"{CLUSTER}\n{NETWORKS}\n{MACHINE}\nprint(json.dumps(results))"

    def start(index):
        task = {"type": "worker", "index": index}
        cluster = json.dumps({"cluster": {"worker": addresses}, "task": task})
        return subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TF_CONFIG": cluster},
        )

    machines = [start(0), start(1)]
    alone = {"tf": tf, "strategy": tf.distribute.get_strategy()}
    exec(compile(NETWORKS + MACHINE, "alone", "exec"), alone)
    found = [machine.communicate(timeout=300) for machine in machines]
    for process, (_, errors) in zip(machines, found):
        assert process.returncode == 0, errors[-2000:]
    for output, _ in found:
        results = json.loads(output.splitlines()[-1])
        assert set(results) == {"families", "relation"}
        for name, expected in alone["results"].items():
            ours = results[name]
            for key, values in expected["history"].items():
                np.testing.assert_allclose(
                    ours["history"][key], values, rtol=2e-3, atol=1e-5, err_msg=name
                )
            for own, value in zip(ours["weights"], expected["weights"]):
                np.testing.assert_allclose(own, value, rtol=1e-3, atol=1e-4, err_msg=name)
