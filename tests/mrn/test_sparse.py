"""Sparse inverse task covariances, by the graphical lasso."""

import importlib.util

import keras
import numpy as np
import pytest

from dmtrl_keras import (
    ModeCovariance,
    MultiTaskModel,
    TensorNormalRegularizer,
    relationship_network,
    tensor_normal,
)
from dmtrl_keras.layers import TaskDense, TaskSplit
from dmtrl_keras.regularizers import SparseTaskPrecision


def test_graphical_lasso_is_a_minimum(rng):
    """Of the convex objective: no symmetric step is better; zeros for a large alpha."""
    root = rng.normal(size=(4, 9))
    covariance = root @ root.T / 9

    def objective(precision, alpha):
        off = np.abs(precision).sum() - np.abs(np.diag(precision)).sum()
        determinant = np.linalg.slogdet(precision)[1]
        return np.trace(covariance @ precision) - determinant + alpha * off

    found = np.linalg.inv(tensor_normal.graphical_lasso(covariance, 0.1))
    best = objective(found, 0.1)
    for _ in range(50):
        step = 0.05 * rng.normal(size=(4, 4))
        assert best < objective(found + step + step.T, 0.1) + 1e-3
    plain = tensor_normal.graphical_lasso(covariance, 0.0)
    np.testing.assert_allclose(plain, covariance, rtol=1e-6)
    alone = np.linalg.inv(tensor_normal.graphical_lasso(covariance, 10.0))
    np.testing.assert_allclose(alone, np.diag(1 / np.diag(covariance)), atol=1e-6)
    small = tensor_normal.graphical_lasso(covariance * 1e-8, 0.1e-8)
    np.testing.assert_allclose(small * 1e8, np.linalg.inv(found), rtol=1e-4)
    assert tensor_normal.graphical_lasso([[2.0]], 0.1).tolist() == [[2.0]]


@pytest.mark.parametrize("shared", [False, True])
def test_callback(shared, rng):
    """At the end of each epoch: the update, sparse; one covariance of two layers is one."""
    covariance = ModeCovariance(epsilon=0.01) if shared else None
    inputs = x = keras.Input((5,))
    for first, name in ((True, "fc7"), (False, "fc8")):
        prior = TensorNormalRegularizer(
            0.1, epsilon=0.01, update_every=None, task_covariance=covariance
        )
        x = TaskDense(
            4, 3, common_draw=False, shared_input=first, kernel_regularizer=prior, name=name
        )(x)
    model = MultiTaskModel(inputs, TaskSplit(["a", "b", "c"])(x))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    y = {task: np.ones((4, 4)) for task in "abc"}
    model.fit(
        np.ones((4, 5)), y, epochs=2, verbose=0, callbacks=[SparseTaskPrecision(0.3, 2)]
    )
    kernels = [
        keras.ops.convert_to_numpy(model.get_layer(name).kernel).reshape(-1, 3)
        for name in ("fc7", "fc8")
    ]
    if shared:
        kernels = [np.concatenate(kernels)] * 2
    for name, kernel in zip(("fc7", "fc8"), kernels):
        estimate = kernel.T.astype("float64") @ kernel
        estimate = estimate / np.trace(estimate) * 3 + 0.01 * np.eye(3)
        estimate = estimate / np.trace(estimate) * 3
        expected = tensor_normal.graphical_lasso(estimate, 0.3)
        expected = expected / np.trace(expected) * 3
        state = model.get_layer(name).prior.modes["task"]
        np.testing.assert_allclose(state.covariance, expected, atol=1e-3)
        inverse = np.linalg.inv(expected)
        np.testing.assert_allclose(state.precision, inverse, rtol=1e-2, atol=1e-3)
        whitener = keras.ops.convert_to_numpy(state.whitener)
        np.testing.assert_allclose(whitener.T @ whitener, inverse, rtol=1e-2, atol=1e-3)


def test_what_the_callback_needs(monkeypatch):
    """Priors that don't update by themselves, and scikit-learn."""
    model = relationship_network((4,), ["a", "b"], 2, None)
    callback = SparseTaskPrecision(0.1)
    callback.set_model(model)
    with pytest.raises(ValueError, match=r"update_every=None.*'classifier' with upd.*=1"):
        callback.on_train_begin()
    callback.set_model(relationship_network((4,), ["a", "b"], 2, None, prior=None))
    with pytest.raises(ValueError, match=r"SparseTaskPrecision: .*no layer that learns"):
        callback.on_train_begin()
    for arguments in ({"alpha": -1}, {"alpha": 0.1, "every": 0}):
        with pytest.raises(ValueError, match="Received: "):
            SparseTaskPrecision(**arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        tensor_normal.graphical_lasso(np.eye(2), 0.1)
