"""Train, save and load networks of T tasks on JAX, where there is no TensorFlow.

KERAS_BACKEND=jax python tests/without_tensorflow.py

CI runs it in an environment that has no TensorFlow.
"""

import sys
import tempfile

import keras
import numpy as np

import dmtrl_keras
from dmtrl_keras import (
    TensorNormalRegularizer,
    multitask,
    single_task,
    task_summary,
    zip_tasks,
)
from dmtrl_keras.callbacks import EarlyStoppingByTask
from dmtrl_keras.layers import TaskCopies
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.parameterizations import SimilarKernels, Tucker

# Kernels alone, with state beside them, and from factors.
CASES = {
    "independent": {"prior": TensorNormalRegularizer(1e-3, modes="task")},
    "similar": {"sharing": SimilarKernels(0.4)},
    "tucker": {"sharing": Tucker(0.5)},
}


def backbone():
    """A convolution and a dense layer."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="relu", name="fc"),
        ]
    )


def check_balancing(images, labels, folder):
    """Methods that look at losses alone train, and go on from files; others say why not."""
    loss = "sparse_categorical_crossentropy"
    for method in ("dwa", "rlw", "famo", "uncertainty"):
        model = multitask(backbone(), list(labels), "hard", heads=3, verbose=False)
        model.compile("adam", loss, balancing=method)
        history = model.fit(images, labels, epochs=3, verbose=0).history
        assert np.isfinite(history["loss"]).all(), method
        assert set(history) >= {"a_weight", "b_weight"}, method
        model.evaluate(images, labels, verbose=0)
        model.save(f"{folder}/balanced.keras")
        again = keras.saving.load_model(f"{folder}/balanced.keras")
        assert repr(again.balancing) == repr(model.balancing)
        again.fit(images, labels, verbose=0)
    try:
        model.compile("adam", loss, balancing="upgrad")
    except ValueError as error:
        assert "need the TensorFlow backend" in str(error)
    else:
        raise AssertionError("gradients were to be balanced")


def check(sharing, images, labels, folder):
    """Train a network of one family, and compare it with itself after loading."""
    model = multitask(backbone(), list(labels), heads=3, verbose=False, **CASES[sharing])
    assert {row.sharing for row in task_summary(model, verbose=False)} >= {sharing}
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(images, labels, epochs=3, verbose=0).history
    losses = np.add(history["a_loss"], history["b_loss"])
    assert np.isfinite(history["loss"]).all() and losses[-1] < losses[0], (sharing, losses)
    expected = model.predict(images, verbose=0)
    path = f"{folder}/{sharing}.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert type(loaded) is dmtrl_keras.MultiTaskModel
    for task, values in loaded.predict(images, verbose=0).items():
        np.testing.assert_allclose(values, expected[task], atol=1e-5, err_msg=sharing)
    alone = single_task(loaded, "b").predict(images, verbose=0)
    np.testing.assert_allclose(alone, expected["b"], atol=1e-5, err_msg=sharing)


def check_stream(images, labels):
    """Mix the tasks of a stream, freeze one of them, stop the other by itself."""
    data = {task: (images, own) for task, own in labels.items()}
    stream = zip_tasks(data, 16, mixing="equal", common_input=True, missing=-1, seed=0)
    assert isinstance(stream, keras.utils.PyDataset)
    model = multitask(backbone(), list(labels), "tucker", rank=0.5, heads=3, verbose=False)
    loss = MaskedLoss("sparse_categorical_crossentropy", missing=-1)
    model.compile(keras.optimizers.AdamW(0.01), {task: loss for task in labels})
    model.fit(stream, verbose=0)
    model.freeze("a")
    before, other = (model.get_layer(f"{task}_head").get_weights() for task in "ab")
    stop = EarlyStoppingByTask("{task}_loss", min_delta=100.0)
    history = model.fit(stream, epochs=5, verbose=0, callbacks=[stop])
    assert all(map(np.array_equal, before, model.get_layer("a_head").get_weights()))
    assert not any(map(np.array_equal, other, model.get_layer("b_head").get_weights()))
    assert len(history.epoch) == 2 and stop.stopped_epochs == {"b": 1}
    # Frozen between two epochs.
    model.unfreeze()
    stop = EarlyStoppingByTask("{task}_loss", min_delta=100.0, start_from_epoch=1)
    model.fit(stream, epochs=2, verbose=0, callbacks=[stop])
    assert model.frozen_tasks == ()


def check_recurrent():
    """Copies of a recurrent layer in one loop, beside each by itself."""
    copies = TaskCopies(keras.layers.Bidirectional(keras.layers.GRU(3)), 2)
    x = np.random.default_rng(1).normal(size=(6, 5, 4)).astype("float32")
    found = np.asarray(copies(x))
    for task in range(2):
        twin = copies.task_twin()
        twin.build((None, 5, 4))
        twin.set_weights(copies.task_weights(task))
        own = slice(3 * task, 3 * task + 3)
        np.testing.assert_allclose(found[own], twin(x[own]), atol=1e-5)


def main():
    """Check all cases."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(48, 8, 8, 1)).astype("float32")
    labels = {task: rng.integers(3, size=48) for task in ("a", "b")}
    with tempfile.TemporaryDirectory() as folder:
        for sharing in CASES:
            check(sharing, images, labels, folder)
        check_balancing(images, labels, folder)
    check_stream(images, labels)
    check_recurrent()
    assert keras.backend.backend() == "jax" and "tensorflow" not in sys.modules
    print("On JAX, without TensorFlow:", *CASES, "balancing", "streams", "recurrent")


if __name__ == "__main__":
    main()
