"""What all methods have in common, and what some claim."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import balancing

T = 4
RANDOM = {"rlw", "pcgrad", "gradvac"}
METHODS = [name for name in balancing.names() if name != "ones"]
BY_GRADIENTS = [n for n in METHODS if balancing.get(n).looks_at_gradients]


def method_of(name):
    method = balancing.get(name)
    method.check(tuple("abcd"), "test")
    return method


def seen(losses, jacobian, order=None, present=None, draw=0):
    """What a method sees, tasks in some order."""
    order = np.arange(len(losses)) if order is None else order
    present = np.ones(len(losses)) if present is None else present
    tensors = [np.asarray(v[order], "float32") for v in (losses, present, jacobian)]
    losses, present, jacobian = map(ops.convert_to_tensor, tensors)

    def normal(shape):
        values = np.random.default_rng(draw).normal(size=shape)
        for axis in range(len(shape)):
            values = np.take(values, order, axis=axis)
        return ops.convert_to_tensor(values.astype("float32"))

    gram = ops.matmul(jacobian, ops.transpose(jacobian))
    return balancing.Seen(losses, present, gram, jacobian, normal)


def trained(name, steps, order=None, scale=1.0, present=None):
    """The weights after some steps on given losses and gradients, in the first order."""
    method = method_of(name)
    rng = np.random.default_rng(1)
    state = {key: ops.convert_to_tensor(value) for key, value in method.start(T, 6).items()}
    scale = np.asarray(scale) * np.ones(T)
    for step in range(steps):
        losses = rng.uniform(0.5, 2, size=T) * scale
        jacobian = rng.normal(size=(T, 6)) * scale[:, None]
        if present is not None:
            losses, jacobian = losses * present, jacobian * present[:, None]
        balanced = method.weigh(seen(losses, jacobian, order, present, step), state)
        state = balanced.state
        if step % 2:
            state = method.next_epoch(state)
    weights = np.array(ops.convert_to_numpy(balanced.weights))
    direction = balanced.direction
    if direction is None:
        direction = weights @ (jacobian if order is None else jacobian[order])
    back = np.argsort(np.arange(T) if order is None else order)
    return weights[back], np.array(direction), losses, jacobian


# PCGrad and GradVac draw the order of the others by place.
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("pcgrad", "gradvac")])
def test_order_of_tasks(name):
    """Permuting the tasks permutes their weights, and leaves the update."""
    weights, direction, *_ = trained(name, 5)
    other, same, *_ = trained(name, 5, np.array([2, 0, 3, 1]))
    np.testing.assert_allclose(other, weights, rtol=2e-2, atol=2e-3)
    np.testing.assert_allclose(same, direction, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in RANDOM])
def test_equal_tasks(name):
    """Tasks with equal losses and gradients have equal weights."""
    method = method_of(name)
    rng = np.random.default_rng(0)
    state = {k: ops.convert_to_tensor(v) for k, v in method.start(T, 6).items()}
    for _ in range(4):
        losses, jacobian = rng.uniform(0.5, 2, size=T), rng.normal(size=(T, 6))
        losses[1], jacobian[1] = losses[0], jacobian[0]
        balanced = method.weigh(seen(losses, jacobian), state)
        state = method.next_epoch(balanced.state)
    weights = np.array(ops.convert_to_numpy(balanced.weights))
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["nash", "imtl_g", "gls", "log", "famo"])
def test_scale_of_a_loss(name):
    """A loss a thousand times as large changes the update's direction in nothing."""
    _, before, *_ = trained(name, 1)
    _, after, *_ = trained(name, 1, scale=[1, 1000, 1, 1])
    cosine = before @ after / (np.linalg.norm(before) * np.linalg.norm(after))
    assert cosine > 0.999


def test_scale_matters_without():
    """The control: the mean follows the large loss."""
    _, before, *_ = trained("equal", 1)
    _, after, *_ = trained("equal", 1, scale=[1, 1000, 1, 1])
    cosine = before @ after / (np.linalg.norm(before) * np.linalg.norm(after))
    assert cosine < 0.9


@pytest.mark.parametrize("name", ["mgda", "upgrad", "nash"])
def test_no_task_is_harmed(name):
    """The update has no negative product with any gradient; that of the mean has."""
    harmed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        jacobian = rng.normal(size=(T, 5)) * np.exp(rng.normal(size=(T, 1)))
        method = method_of(name)
        weights = method.weigh(seen(np.ones(T), jacobian), {}).weights
        products = jacobian @ (np.array(ops.convert_to_numpy(weights)) @ jacobian)
        lengths = np.linalg.norm(jacobian, axis=1)
        assert (products / lengths).min() > -1e-2 * np.abs(products / lengths).max()
        harmed += (jacobian @ jacobian.mean(axis=0)).min() < 0
    assert harmed > 5


@pytest.mark.parametrize("name", ["mgda", "upgrad", "nash", "pcgrad", "aligned"])
def test_stationary_points(name):
    """Where gradients of two tasks are opposite there is no step."""
    gradient = np.random.default_rng(0).normal(size=5)
    jacobian = np.stack([gradient, -gradient])
    weights = method_of(name).weigh(seen(np.ones(2), jacobian), {}).weights
    update = np.array(ops.convert_to_numpy(weights)) @ jacobian
    weight = np.abs(np.array(ops.convert_to_numpy(weights))).max()
    assert np.linalg.norm(update) < 1e-2 * max(weight, 1) * np.linalg.norm(gradient)


@pytest.mark.parametrize("name", METHODS)
def test_absent_tasks(name):
    """A task without labels leaves the others what they are, up to a factor."""
    present = np.array([1.0, 0.0, 1.0, 1.0])
    weights, direction, losses, jacobian = trained(name, 5, present=present)
    assert np.isfinite(weights).all() and np.isfinite(direction).all()
    if name not in ("mgda", "upgrad", "nash", "gls", "log"):
        return
    rest = present > 0
    small = method_of(name).weigh(seen(losses[rest], jacobian[rest]), {}).weights
    small = np.array(ops.convert_to_numpy(small))
    np.testing.assert_allclose(
        weights[rest] / weights[rest].sum(), small / small.sum(), rtol=2e-2, atol=2e-3
    )


@pytest.mark.parametrize("name", METHODS)
def test_settings(name):
    """They are saved, and shown."""
    method = balancing.get(name)
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(method)
    )
    assert repr(again) == repr(method) and type(again) is type(method)


def test_uncertainty_rests_at_the_losses():
    """`s^2 = L`: the weights become `1 / (2 L)`."""
    method, state = balancing.Uncertainty(0.5), {"log_variance": np.zeros(2, "float32")}
    losses = np.array([0.1, 5.0])
    for _ in range(200):
        found = method.weigh(seen(losses, np.eye(2)), state)
        state = found.state
    np.testing.assert_allclose(found.weights, 0.5 / losses, rtol=1e-2)
    method, state = balancing.IMTLL(0.1), {"log_scale": np.zeros(2, "float32")}
    for _ in range(300):
        found = method.weigh(seen(losses, np.eye(2)), state)
        state = found.state
    np.testing.assert_allclose(found.weights, 1 / losses, rtol=1e-2)


def test_dwa(rng):
    """Eq. 7 written out, of the mean losses of epochs."""
    method = balancing.DWA(2.0)
    state, means = method.start(2), []
    for _ in range(3):
        epoch = rng.uniform(0.5, 2, size=(4, 2))
        for losses in epoch:
            found = method.weigh(seen(losses, np.eye(2)), state)
            state = found.state
        means.append(epoch.mean(axis=0))
        state = method.next_epoch(state)
    found = method.weigh(seen(losses, np.eye(2)), state).weights
    raised = np.exp(means[-1] / means[-2] / 2)
    np.testing.assert_allclose(found, 2 * raised / raised.sum(), rtol=1e-5)
    # An evaluation is no epoch.
    again = method.weigh(seen(losses, np.eye(2)), method.next_epoch(state)).weights
    np.testing.assert_allclose(again, found)


def test_gradnorm():
    """Lengths become equal with alpha = 0, and lagging tasks get more with alpha above."""
    jacobian = np.diag([1.0, 10.0])
    for alpha, expected in ((0.0, 10.0), (1.0, 20.0)):
        method = balancing.GradNorm(alpha, learning_rate=0.01)
        state = {k: np.array(v) for k, v in method.start(2).items()}
        losses = np.array([1.0, 1.0])
        for step in range(800):
            found = method.weigh(seen(losses, jacobian), state)
            state = found.state
            if step == 0:
                # The first task has not got better, the second is at a half.
                losses = np.array([1.0, 0.5])
        weights = np.array(ops.convert_to_numpy(found.weights))
        np.testing.assert_allclose(weights[0] / weights[1], expected, rtol=0.25)


def test_registry():
    """By name, by class, by configuration; what is none is refused."""
    assert balancing.get(None) is None
    method = balancing.CAGrad(0.3)
    assert balancing.get(method) is method
    assert balancing.get("UPGrad").name == "upgrad"
    for wrong in ("nothing", 3, {"class_name": "Dense"}):
        with pytest.raises(ValueError, match="balancing"):
            balancing.get(wrong)
    with pytest.raises(ValueError, match="'mgda'"):

        @balancing.register
        class Other(balancing.Balancing):
            name = "mgda"

    for make, message in (
        (lambda: balancing.CAGrad(1.0), "c=1"),
        (lambda: balancing.GradNorm(-1), "alpha=-1"),
        (lambda: balancing.MGDA("l3"), "normalize='l3'"),
        (lambda: balancing.UPGrad(at="heads"), "at='heads'"),
        (lambda: balancing.DWA(0), "temperature=0"),
        (lambda: balancing.STCH(preferences=[1]), "preferences"),
        (lambda: balancing.Scheduled({"a": "x"}), "schedules"),
        (lambda: balancing.Uncertainty("x"), "learning_rate='x'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
