"""Learning rates by layer, with every optimizer of Keras."""

import keras
import numpy as np
import pytest

from dmtrl_keras.optimizers import LearningRateMultiplier

OPTIMIZERS = [
    "SGD",
    "Adam",
    "AdamW",
    "Adamax",
    "Adagrad",
    "Adadelta",
    "Ftrl",
    "Lamb",
    "Lion",
    "Nadam",
    "RMSprop",
]
TRACED = ("SGD", "Adam")


def network(seed=0):
    """A trunk of one layer, and a new layer."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((5,))
    x = keras.layers.Dense(4, "tanh", name="conv1")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="fc8")(x))


def values(model, layer):
    """A layer's weights, as one vector."""
    return np.concatenate([w.ravel() for w in model.get_layer(layer).get_weights()])


def trained(optimizer, steps=1, **compile_arguments):
    """The network after a few steps; without a graph if `run_eagerly`."""
    model = network()
    model.compile(optimizer, "mse", **compile_arguments)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8 * steps, 5)), rng.normal(size=(8 * steps, 2))
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_layer_steps_with_its_own_rate(name):
    """The first step of each layer is that of the optimizer with that rate."""
    make = getattr(keras.optimizers, name)
    arguments = {"weight_decay": 0} if name == "AdamW" else {}
    multiplied = trained(
        LearningRateMultiplier(make(0.01, **arguments), {"fc*": 10.0, "conv1": 0.5}),
        # What an optimizer does in a graph is the same; one of each kind is traced.
        run_eagerly=name not in TRACED,
    )
    for layer, rate in (("fc8", 0.1), ("conv1", 0.005)):
        expected = trained(make(rate, **arguments), run_eagerly=True)
        np.testing.assert_allclose(
            values(multiplied, layer), values(expected, layer), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factor_one_changes_nothing(name):
    """Over several steps, with all of the optimizer's state."""
    make = getattr(keras.optimizers, name)
    plain = trained(make(0.01), steps=4, run_eagerly=True)
    multiplied = trained(
        LearningRateMultiplier(make(0.01), {"fc8": 1}),
        steps=4,
        run_eagerly=name not in TRACED,
    )
    for layer in ("conv1", "fc8"):
        np.testing.assert_allclose(
            values(multiplied, layer), values(plain, layer), rtol=1e-6, atol=1e-7
        )


def test_zero_freezes():
    """A layer with factor 0 stays as it is; the others move."""
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model = trained(LearningRateMultiplier(optimizer, {"conv1": 0}), steps=3)
    np.testing.assert_array_equal(values(model, "conv1"), values(network(), "conv1"))
    assert np.abs(values(model, "fc8") - values(network(), "fc8")).max() > 1e-3


def test_momentum_clipping_accumulation_and_schedule():
    """What the wrapped optimizer does stays its own: SGD with momentum, written out."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    optimizer = keras.optimizers.SGD(
        schedule, momentum=0.9, clipvalue=0.01, gradient_accumulation_steps=2
    )
    model = trained(LearningRateMultiplier(optimizer, {"fc8": 3}), steps=4)
    reference = keras.optimizers.SGD(
        schedule, momentum=0.9, clipvalue=0.01, gradient_accumulation_steps=2
    )
    plain, start = trained(reference, steps=4), network()
    # Gradients that are clipped everywhere don't depend on the rate.
    step = values(plain, "fc8") - values(start, "fc8")
    clipped = np.isclose(np.abs(step), np.abs(step).max())
    assert clipped.any()
    found = values(model, "fc8") - values(start, "fc8")
    np.testing.assert_allclose(found[clipped], 3 * step[clipped], rtol=1e-4)


def test_rate_can_be_set():
    """As by `LearningRateScheduler`."""
    optimizer = LearningRateMultiplier(keras.optimizers.SGD(0.1), {"fc8": 2})
    model = trained(optimizer)
    optimizer.learning_rate = 0.0
    before = model.get_weights()
    model.fit(np.ones((4, 5)), np.ones((4, 2)), verbose=0)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)
    assert float(optimizer.learning_rate) == 0 and int(optimizer.iterations) == 2


def test_saved_with_the_model(tmp_path):
    """State and multipliers come back; training goes on as if nothing had been."""
    model = trained(
        LearningRateMultiplier(keras.optimizers.Adam(0.01), {"fc8": 5}), steps=3
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.multipliers == {"fc8": 5}
    for a, b in zip(loaded.optimizer.variables, model.optimizer.variables):
        np.testing.assert_allclose(a, b, err_msg=b.path)
    x, y = np.ones((4, 5)), np.ones((4, 2))
    for one in (model, loaded):
        one.fit(x, y, verbose=0)
    for layer in ("conv1", "fc8"):
        np.testing.assert_allclose(values(loaded, layer), values(model, layer), rtol=1e-6)


def test_mixed_precision():
    """Under the loss scaling that Keras puts around it."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        optimizer = LearningRateMultiplier(keras.optimizers.SGD(0.01), {"fc8": 10})
        model = trained(keras.optimizers.LossScaleOptimizer(optimizer))
        plain = trained(keras.optimizers.SGD(0.1))
        np.testing.assert_allclose(values(model, "fc8"), values(plain, "fc8"), atol=2e-3)
        assert np.abs(values(model, "fc8") - values(network(), "fc8")).max() > 1e-2
    finally:
        keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize(
    "optimizer, multipliers, message",
    [
        ("sgd", {"fc8": 2}, "must be a Keras optimizer"),
        (None, {"fc8": -1}, "not negative"),
        (None, {"fc8": float("nan")}, "not negative"),
        (None, [("fc8", 1)], "must be a dict"),
    ],
)
def test_bad_arguments(optimizer, multipliers, message):
    """The error says what was received."""
    with pytest.raises(ValueError, match=message):
        LearningRateMultiplier(optimizer or keras.optimizers.SGD(0.1), multipliers)


def test_pattern_that_fits_nothing():
    """Found before the first step."""
    optimizer = LearningRateMultiplier(keras.optimizers.SGD(0.1), {"fc9": 10})
    with pytest.raises(ValueError, match=r"'fc9', which fits none of \['conv1', 'fc8'\]"):
        optimizer.build(network().trainable_variables)
    used = keras.optimizers.SGD(0.1)
    used.build(network().trainable_variables)
    with pytest.raises(ValueError, match="not used yet"):
        LearningRateMultiplier(used, {"fc8": 2})
