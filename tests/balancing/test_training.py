"""Training with balanced losses: what is done to which weights, on what data."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl

from dmtrl_keras import MultiTaskModel, Relation, TaskRelationModel, balancing, multitask
from dmtrl_keras.balancing import (
    DWA,
    MGDA,
    STCH,
    GradientBalancing,
    MoCo,
    Scheduled,
)
from dmtrl_keras.layers import task_layers
from dmtrl_keras.losses import MaskedLoss

TASKS = ["a", "b", "c"]


@balancing.register
class Ones(GradientBalancing):
    """The sum of the gradients as it is, by way of each one."""

    name = "ones"

    def weights(self, gram):
        return keras.ops.ones_like(gram[0])


@pytest.fixture
def data(rng):
    x = rng.normal(size=(32, 6)).astype("float32")
    y = {"a": x[:, :1], "b": 3 * x[:, 1:2] - x[:, :1], "c": np.abs(x[:, 2:3])}
    return x, y


def network(sharing="hard", dtype=None, **options):
    """Two layers and heads, with a penalty, always the same weights."""
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential(
        [
            keras.Input((6,)),
            kl.Dense(8, "tanh", kernel_regularizer="l2", name="one", dtype=dtype),
            kl.Dense(5, "tanh", name="two", dtype=dtype),
        ]
    )
    heads = {task: kl.Dense(1, dtype=dtype, name=f"{task}_head") for task in TASKS}
    return multitask(backbone, TASKS, sharing, heads=heads, verbose=False, **options)


def compiled(balancing=None, optimizer=None, **given):
    model = network(**given)
    loss = {task: MaskedLoss("mse") for task in TASKS}
    optimizer = keras.optimizers.SGD(0.05) if optimizer is None else optimizer()
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    model.compile(optimizer, loss, loss_weights=weights, balancing=balancing)
    return model


def alike(one, other, **tolerance):
    for mine, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, **tolerance)


KINDS = {
    "as it is": {},
    "tucker": {"sharing": "tucker", "rank": 0.9},
    "accumulated": {
        "optimizer": lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    },
    "scaled": {
        "optimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05))
    },
}


@pytest.mark.parametrize("at", ["weights", "features"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one(kind, at, data):
    """With weights of 1 the step is Keras's own: penalties, missing labels, all of it."""
    x, y = data
    y["b"][::3] = np.nan
    given = KINDS[kind]
    if kind == "tucker" and at == "features":
        with pytest.raises(ValueError, match='at="features" is for networks'):
            compiled(Ones(at), **given)
        return
    plain, balanced = compiled(**given), compiled(Ones(at), **given)
    for model in (plain, balanced):
        logs = model.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0).history
    alike(plain, balanced, rtol=1e-4, atol=1e-5)
    weights = [logs[f"{task}_weight"] for task in TASKS]
    np.testing.assert_allclose(weights, 1)
    assert {*logs} == {
        "loss",
        "cosine",
        *(f"{t}_{w}" for t, w in itertools.product(TASKS, ("loss", "weight"))),
    }
    expected = plain.evaluate(x, y, verbose=0, return_dict=True)
    before = [np.array(v) for v in balanced.metrics[-1].moving]
    found = balanced.evaluate(x, y, verbose=0, return_dict=True)
    assert {*found} == {*expected} and abs(found["loss"] - expected["loss"]) < 1e-3
    for value, old in zip(balanced.metrics[-1].moving, before):
        np.testing.assert_array_equal(value, old)


@pytest.mark.parametrize("at", ["weights", "features"])
def test_one_step(at, data):
    """Of shared weights `sum_t w_t g_t` and the penalty's gradient, of heads their own."""
    x, y = data
    model = compiled(MGDA(at=at))
    features = model.get_layer("two").output
    trunk = keras.Model(model.input, features)
    shared = [v for name in ("one", "two") for v in model.get_layer(name).weights]
    factor = {"a": 1.0, "b": 0.5, "c": 2.0}
    with tf.GradientTape(persistent=True) as tape:
        z = trunk(x, training=True)
        losses = [
            factor[t] * tf.reduce_mean((model.get_layer(f"{t}_head")(z) - y[t]) ** 2)
            for t in TASKS
        ]
        penalty = 0.01 * tf.reduce_sum(model.get_layer("one").kernel ** 2)
    rows = [
        np.concatenate([np.ravel(g) for g in tape.gradient(own, [v.value for v in shared])])
        for own in losses
    ]
    of = rows if at == "weights" else [np.ravel(tape.gradient(own, z)) for own in losses]
    gram = np.array([[one @ other for other in of] for one in of], "float32")
    weights = np.array(balancing.maths.minimum_norm(gram))
    assert np.ptp(weights) > 1e-3
    expected = weights @ np.stack(rows)
    own = tape.gradient(penalty, model.get_layer("one").kernel.value)
    expected[: np.size(own)] += np.ravel(own)
    heads = {
        t: tape.gradient(losses[n], model.get_layer(f"{t}_head").kernel.value)
        for n, t in enumerate(TASKS)
    }
    old = np.concatenate([np.ravel(v) for v in shared])
    before = {t: np.array(model.get_layer(f"{t}_head").kernel) for t in TASKS}
    model.train_on_batch(x, y)
    new = np.concatenate([np.ravel(v) for v in shared])
    np.testing.assert_allclose(new, old - 0.05 * expected, atol=1e-5)
    for task in TASKS:
        after = np.array(model.get_layer(f"{task}_head").kernel)
        np.testing.assert_allclose(after, before[task] - 0.05 * heads[task], atol=1e-5)


def test_by_losses(data):
    """The weights are those of the losses, of all that a task has."""
    x, y = data
    fall = keras.optimizers.schedules.PiecewiseConstantDecay([2], [1.0, 0.0])
    model = compiled(Scheduled({"b": fall, "c": 0.0}))
    plain = network()
    plain.compile(
        keras.optimizers.SGD(0.05),
        "mse",
        loss_weights={"a": keras.Variable(1.0), "b": keras.Variable(0.5), "c": 1e-30},
    )
    for step in range(4):
        if step == 3:
            plain.loss_weights["b"].assign(1e-30)
        model.train_on_batch(x, y)
        plain.train_on_batch(x, y)
    alike(model, plain, atol=1e-5)


def test_epochs(data):
    """DWA sees epochs, and none in evaluation or validation."""
    x, y = data
    model = compiled(DWA())
    model.fit(x, y, epochs=3, verbose=0, validation_data=(x, y))
    model.evaluate(x, y, verbose=0)
    (state,) = model._balancing
    last, before = (np.array(state.moving[i]) for i in (2, 3))
    assert (last > 0).all() and (before > 0).all() and (last != before).all()
    assert float(state.moving[1][0]) > 0


@pytest.mark.parametrize("method", [DWA(), MoCo(), "gradnorm"], ids=str)
def test_files(method, data, tmp_path):
    """A loaded model goes on as the saved one would have."""
    x, y = data
    model = compiled(method, lambda: keras.optimizers.Adam(0.01))
    model.fit(x, y, epochs=2, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert repr(again.balancing) == repr(model.balancing)
    assert len(again.weights) == len(network().weights)
    for one in (model, again):
        one.fit(x, y, epochs=2, verbose=0, shuffle=False)
    alike(model, again, rtol=1e-5, atol=1e-6)
    keras.models.load_model(tmp_path / "model.keras", compile=False)
    model.save_weights(tmp_path / "model.weights.h5")
    network().load_weights(tmp_path / "model.weights.h5")
    model.export(tmp_path / "served", verbose=False)


@pytest.mark.parametrize("name", ["upgrad", "famo"])
def test_absent_and_frozen(name, data):
    """Tasks without labels in a batch, and tasks at rest."""
    x, y = data
    y["b"][:8] = np.nan
    model = compiled(name)
    model.freeze("c")
    before = model.get_layer("c_head").get_weights()
    logs = model.fit(x, y, batch_size=8, shuffle=False, verbose=0, epochs=2).history
    assert np.isfinite(list(logs.values())).all()
    for old, new in zip(before, model.get_layer("c_head").get_weights()):
        np.testing.assert_array_equal(old, new)
    del y["b"]
    assert np.isfinite(model.train_on_batch(x, y)).all()


def test_overflow(data):
    """A step that overflows changes no state, and is left out by loss scaling."""
    x, y = data
    make = lambda: keras.optimizers.LossScaleOptimizer(  # noqa: E731
        keras.optimizers.SGD(0.01), initial_scale=1e38
    )
    model = compiled("gradnorm", make)
    before = [
        np.array(v) for v in (*model.trainable_variables, *model._balancing[0].moving)
    ]
    model.train_on_batch(x * 1e3, y)
    after = [*model.trainable_variables, *model._balancing[0].moving]
    for old, new in zip(before, after):
        np.testing.assert_array_equal(old, new)
    for _ in range(60):
        model.train_on_batch(x, y)
    assert any(np.any(old != new) for old, new in zip(before, model.trainable_variables))
    assert np.isfinite(model.get_weights()[0]).all()


@pytest.mark.long
def test_mixed_precision(data):
    """Half precision, with loss scaling by `fit`."""
    x, y = data
    model = compiled("upgrad", lambda: keras.optimizers.Adam(0.02), dtype="mixed_float16")
    losses = model.fit(x, y, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


TWO_REPLICAS = """
import keras
import numpy as np
from keras import layers as kl
from dmtrl_keras import multitask
from dmtrl_keras.balancing import UPGrad
from dmtrl_keras.losses import MaskedLoss

x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
y = {"a": x[:, :1], "b": 3 * x[:, 1:2] - x[:, :1], "c": np.abs(x[:, 2:3])}
y["b"][::3] = np.nan

def make(method):
    keras.utils.set_random_seed(0)
    layers = [kl.Dense(8, "tanh", kernel_regularizer="l2"), kl.Dense(5, "tanh")]
    backbone = keras.Sequential([keras.Input((6,)), *layers])
    model = multitask(backbone, ["a", "b", "c"], "hard", heads=1, verbose=False)
    loss = {task: MaskedLoss("mse") for task in "abc"}
    model.compile(keras.optimizers.SGD(0.05), loss, balancing=method)
    return model

two = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
for method in ("upgrad", "moco", "famo", "gradnorm", UPGrad("features")):
    one = make(method)
    with two.scope():
        other = make(method)
    for model in (one, other):
        model.fit(x, y, batch_size=16, shuffle=False, epochs=2, verbose=0)
    for mine, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4, err_msg=f"{method}")
    states = [model._balancing[0].moving for model in (one, other)]
    for mine, theirs in zip(*states, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=1e-3, err_msg=f"{method}")
"""


@pytest.mark.long
def test_two_replicas(on_two_devices):
    """Two replicas train as one does: the gradients are those of the whole batch."""
    on_two_devices(TWO_REPLICAS)


@pytest.mark.long
def test_terms(data):
    """Relations of TRN are no task: with weights of 1 nothing changes."""
    x, y = data
    models = []
    for method in (None, Ones()):
        targets = dict.fromkeys(itertools.combinations(TASKS, 2), 0.5)
        relation = Relation("output", 0.3)
        model = TaskRelationModel(network(), [relation], label_similarity=targets)
        model.compile(keras.optimizers.SGD(0.05), "mse", balancing=method)
        model.fit(x, y, epochs=2, batch_size=8, shuffle=False, verbose=0)
        models.append(model)
    alike(*models, rtol=1e-4, atol=1e-5)


def test_what_is_shared(data):
    """Stacked kernels are not; factors are, but for what is a task's own."""
    from dmtrl_keras.training.balanced import shared_weights

    names = {v.path for v in shared_weights(network())}
    assert names == {v.path for n in ("one", "two") for v in network().get_layer(n).weights}
    with pytest.raises(ValueError, match="no weights that several tasks share"):
        network("independent").compile("sgd", "mse", balancing="upgrad")
    tucker = network("tucker", rank=0.9)
    shared = {id(v) for v in shared_weights(tucker)}
    for layer in task_layers(tucker):
        assert id(layer.factors["core"]) in shared and id(layer.bias) not in shared


def test_refused(data):
    """What is not possible, and what was received."""
    x, y = data
    model = network()
    for wrong in ("nothing", 3):
        with pytest.raises(ValueError, match=f"multitask'.*balancing.*{wrong!r}"):
            model.compile("sgd", "mse", balancing=wrong)
    with pytest.raises(ValueError, match="no loss to be balanced"):
        model.compile("sgd", balancing="upgrad")
    with pytest.raises(ValueError, match=r"unknown tasks in `preferences`.*\['d'\]"):
        model.compile("sgd", "mse", balancing=STCH(preferences={"d": 1.0}))
    model = compiled(MGDA())
    with pytest.raises(ValueError, match="balances gradients"):
        model.compute_loss(x, y, model(x, training=True), training=True)
    assert model.gradient_cosines.shape == (3, 3)
    assert compiled().balancing is None and compiled().gradient_cosines is None
    assert isinstance(model, MultiTaskModel)


@pytest.mark.long
@pytest.mark.parametrize(
    "start", [(-8.5, 7.5), (-8.5, -5), (9, 9), (0, 0), (10, -8)], ids=str
)
def test_toy_of_two_tasks(start):
    """The two losses of CAGrad's Figure 1: each start reaches the Pareto set."""

    def losses(theta):
        one, other = theta[0], theta[1]
        f1 = tf.math.log(tf.maximum(tf.abs(0.5 * (-one - 7) - tf.tanh(-other)), 5e-6)) + 6
        f2 = (
            tf.math.log(tf.maximum(tf.abs(0.5 * (-one + 3) - tf.tanh(-other) + 2), 5e-6))
            + 6
        )
        c1, c2 = (tf.maximum(tf.tanh(s * 0.5 * other), 0) for s in (1, -1))
        f1_sq = ((-one + 7) ** 2 + 0.1 * (-other - 8) ** 2) / 10 - 20
        f2_sq = ((-one - 7) ** 2 + 0.1 * (-other - 8) ** 2) / 10 - 20
        return f1 * c1 + f1_sq * c2, f2 * c1 + f2_sq * c2

    optimizer = keras.optimizers.Adam(0.05)
    theta = keras.Variable(np.array(start, "float32"))

    @tf.function
    def step():
        with tf.GradientTape(persistent=True) as tape:
            both = losses(theta.value)
        jacobian = tf.stack([tape.gradient(f, theta.value) for f in both])
        gram = jacobian @ tf.transpose(jacobian)
        weights = balancing.maths.conflict_averse(gram, 0.5)
        optimizer.apply([tf.linalg.matvec(jacobian, weights, transpose_a=True)], [theta])
        return balancing.maths.minimum_norm(gram), jacobian

    optimizer.build([theta])
    for _ in range(1500):
        weights, jacobian = step()
    # The Pareto set of the quadratic parts is the line at y = -8 between x = -7 and 7.
    x, y = np.array(theta)
    assert -7.1 < x < 7.1 and abs(y + 8) < 0.5
    mixed = np.array(weights) @ np.array(jacobian)
    assert np.linalg.norm(mixed) < 0.1
