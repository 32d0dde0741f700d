"""A frozen kernel and small differences: against NumPy, and frozen indeed."""

import doctest

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import add_task, multitask, single_task
from dmtrl_keras.kernels import lora
from dmtrl_keras.layers import TaskCopies, TaskDense
from dmtrl_keras.parameterizations import LAF, TT, Hard, LoRA, Tucker

TASKS = ["age", "mood"]
WAYS = [LoRA(2), LoRA(0.5, alpha=8), LoRA(together=Tucker(rank=0.5)), LoRA(together="laf")]


def test_examples():
    assert doctest.testmod(lora).failed == 0


def array(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("window", [(), (3, 2)])
def test_the_formula(alpha, window, rng):
    """W_t = W_0 + alpha / r A_t B_t, and of kernels that differ the nearest such."""
    kernel = rng.normal(size=(*window, 4, 5, 3))
    sharing = LoRA(2, alpha=alpha)
    factors = sharing.decompose(kernel)
    composed = array(sharing.compose({n: np.float32(v) for n, v in factors.items()}, 3))
    scale = 1 if alpha is None else alpha / 2
    for t in range(3):
        a, b = (factors[name][..., t] for name in ("lora_a", "lora_b"))
        expected = factors["base"] + scale * a @ b
        np.testing.assert_allclose(composed[t], expected, atol=1e-5)
        difference = (kernel[..., t] - kernel.mean(axis=-1)).reshape(-1, 5)
        u, s, v = np.linalg.svd(difference, full_matrices=False)
        nearest = (u[:, :2] * s[:2]) @ v[:2]
        np.testing.assert_allclose((scale * a @ b).reshape(-1, 5), nearest, atol=1e-8)


def backbone(rng):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = keras.layers.Reshape((36, 8))(x)
    x = keras.layers.LSTM(6, name="lstm")(x)
    model = keras.Model(inputs, keras.layers.Dense(5, "relu", name="fc")(x))
    for weight in model.weights:
        weight.assign(rng.normal(0, 0.3, size=weight.shape))
    return model


@pytest.mark.parametrize("sharing", WAYS, ids=str)
def test_trained_from_a_backbone(sharing, rng, tmp_path):
    """Equal at the start; then the tasks part, and the kernels of all stay."""
    trained = backbone(rng)
    model = multitask(trained, TASKS, sharing, verbose=False)
    x = rng.normal(size=(6, 8, 8, 3)).astype("float32")
    for output in model(x).values():
        np.testing.assert_allclose(array(output), array(trained(x)), atol=1e-5)
    layers = [model.get_layer(name) for name in ("conv", "lstm", "fc")]
    assert isinstance(layers[1], TaskCopies)
    kernels = [*layers[1].kernels, layers[0].stacked, layers[2].stacked]
    bases = [array(kernel.factors["base"]) for kernel in kernels]
    assert not any("base" in variable.path for variable in model.trainable_variables)
    model.compile(keras.optimizers.Adam(0.05), "mse", run_eagerly=True)
    y = {task: np.full((6, 5), value) for value, task in enumerate(TASKS)}
    losses = model.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for kernel, base in zip(kernels, bases):
        np.testing.assert_array_equal(array(kernel.factors["base"]), base)
        moved = array(kernel.value()) - base[..., None]
        assert np.abs(moved[..., 0] - moved[..., 1]).max() > 1e-4
    found = model(x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(array(loaded(x)["mood"]), array(found["mood"]), atol=1e-5)
    alone = single_task(model, "mood")
    np.testing.assert_allclose(array(alone(x)), array(found["mood"]), atol=1e-5)
    grown = add_task(model, "pose", like="mood")
    np.testing.assert_allclose(array(grown(x)["pose"]), array(found["mood"]), atol=1e-5)


def test_few_weights():
    """Of T tasks, for a few per cent of a network each."""
    trained = keras.Sequential(
        [keras.Input((256,)), *(keras.layers.Dense(256, "relu") for _ in range(3))]
    )
    model = multitask(trained, 10, LoRA(1), verbose=False)
    own = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert own / 10 < 0.02 * trained.count_params()
    assert model.count_params() == trained.count_params() - 3 * 256 + own


def test_small_kernels():
    """A rank is at most what a kernel has."""
    layer = TaskDense(1, 2, sharing=LoRA(8))
    layer.build((None, 6))
    assert layer.rank == (1,) and layer.factors["lora_a"].shape == (3, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "LoRA: `rank` must be a positive int"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"alpha": -1}, "alpha"),
        ({"together": Hard()}, "LoRA: `together` must be a factorisation"),
        ({"together": "laf", "rank": 2}, "ranks of its own.*rank=2"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**arguments)


def test_configurations():
    for sharing in (*WAYS, LoRA(together=TT(rank=2)), LoRA(together=LAF(rank=1))):
        again = LoRA.from_config(sharing.get_config())
        assert repr(again) == repr(sharing)
