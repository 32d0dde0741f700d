"""Train, save and load networks of T tasks on JAX, where there is no TensorFlow.

KERAS_BACKEND=jax python tests/without_tensorflow.py

CI runs it in an environment that has no TensorFlow.
"""

import sys
import tempfile

import keras
import numpy as np

import dmtrl_keras
from dmtrl_keras import TensorNormalRegularizer, multitask, single_task, task_summary
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


def main():
    """Check all cases."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(48, 8, 8, 1)).astype("float32")
    labels = {task: rng.integers(3, size=48) for task in ("a", "b")}
    with tempfile.TemporaryDirectory() as folder:
        for sharing in CASES:
            check(sharing, images, labels, folder)
    assert keras.backend.backend() == "jax" and "tensorflow" not in sys.modules
    print("On JAX, without TensorFlow:", *CASES)


if __name__ == "__main__":
    main()
