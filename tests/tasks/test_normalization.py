"""Normalization: equal to Keras's layers on every task's features."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras.layers import TaskLayerNormalization, TaskRMSNormalization
from dmtrl_keras.testing import check_layer


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_equals_one_layer_per_task(tasks, shape, rng):
    """Statistics, gamma and beta of each task by itself."""
    x = rng.normal(1, 3, size=(2, *shape)).astype("float32")
    layer = TaskLayerNormalization(tasks, epsilon=0.01)
    layer.build(x.shape)
    gamma, beta = rng.normal(size=(2, 6))
    layer.set_weights([gamma, beta])
    outputs = np.split(ops.convert_to_numpy(layer(x)), tasks, axis=-1)
    parts = zip(np.split(x, tasks, -1), np.split(gamma, tasks), np.split(beta, tasks))
    for ours, (part, *weights) in zip(outputs, parts):
        alone = keras.layers.LayerNormalization(epsilon=0.01)
        alone.build(part.shape)
        alone.set_weights(weights)
        np.testing.assert_allclose(ours, alone(part), atol=1e-5)


@pytest.mark.parametrize("tasks", [1, 3])
def test_root_mean_squares(tasks, rng):
    """Those of each task's features, written out, and as Keras's layer has them."""
    x = rng.normal(1, 3, size=(2, 4, 6)).astype("float32")
    layer = TaskRMSNormalization(tasks, epsilon=0.01)
    layer.build(x.shape)
    scale = rng.normal(size=6)
    layer.set_weights([scale])
    outputs = np.split(ops.convert_to_numpy(layer(x)), tasks, axis=-1)
    for ours, part, own in zip(outputs, np.split(x, tasks, -1), np.split(scale, tasks)):
        expected = own * part / np.sqrt((part**2).mean(-1, keepdims=True) + 0.01)
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        alone = keras.layers.RMSNormalization(epsilon=0.01)
        alone.build(part.shape)
        alone.set_weights([own])
        np.testing.assert_allclose(ours, alone(part), atol=1e-5)


def test_formula(rng):
    """Mean and variance written out."""
    x = rng.normal(size=(5, 8)).astype("float32")
    layer = TaskLayerNormalization(2, epsilon=0.1, center=False, scale=False)
    outputs = ops.convert_to_numpy(layer(x))
    for b in range(5):
        for t in range(2):
            own = x[b, 4 * t : 4 * t + 4]
            expected = (own - own.mean()) / np.sqrt(own.var() + 0.1)
            np.testing.assert_allclose(outputs[b, 4 * t : 4 * t + 4], expected, atol=1e-5)
    assert layer.weights == []


@pytest.mark.parametrize("kind", [TaskLayerNormalization, TaskRMSNormalization])
@pytest.mark.parametrize("tasks", [1, 2])
def test_promises(tasks, kind, rng):
    """`check_layer`, on images and on vectors."""
    for shape in ((3, 8), (3, 4, 4, 8)):
        x = rng.normal(size=shape).astype("float32")
        check_layer(lambda **k: kind(tasks, **k), x)


def test_errors():
    """Channels that don't divide, other axes, a bad number of tasks."""
    with pytest.raises(ValueError, match=r"'norm'.*tasks=4.*6 channels"):
        TaskLayerNormalization(4, name="norm")(np.zeros((2, 6)))
    with pytest.raises(ValueError, match=r"'norm'.*axis=\[1, 2\]"):
        TaskLayerNormalization(4, axis=[1, 2], name="norm")
    with pytest.raises(ValueError, match="tasks=0"):
        TaskLayerNormalization(0)
    with pytest.raises(ValueError, match=r"'root'.*axis=1"):
        TaskRMSNormalization(4, axis=1, name="root")
    with pytest.raises(ValueError, match="epsilon='x'"):
        TaskRMSNormalization(4, epsilon="x")
