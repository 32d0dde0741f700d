"""The Task Relation Layer: values, gradients, moving state, errors."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import task_similarity
from dmtrl_keras.layers import TRL
from dmtrl_keras.trn.layer import (
    canonical_directions,
    correlation_along,
    largest_canonical_correlation,
)


def features(rng, n=64, sizes=(3, 5), noise=2.0):
    """Sets with something in common, float32."""
    common = rng.normal(size=(n, 2))
    return [
        (common @ rng.normal(size=(2, d)) + noise * rng.normal(size=(n, d))).astype(
            "float32"
        )
        for d in sizes
    ]


def blocks(x, y):
    """The covariances of two sets, as tensors."""
    whole = np.cov(np.concatenate([x, y], axis=1).T).astype("float32")
    d = x.shape[1]
    parts = whole[:d, :d], whole[:d, d:], whole[d:, d:]
    return [ops.convert_to_tensor(np.ascontiguousarray(part)) for part in parts]


def gradient_of(function, *tensors):
    """Gradients by TensorFlow; the test is skipped on other backends."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are taken with TensorFlow")
    from dmtrl_keras.ground.backend import tensorflow

    tf = tensorflow()
    tensors = [tf.convert_to_tensor(x) for x in tensors]
    with tf.GradientTape() as tape:
        for x in tensors:
            tape.watch(x)
        value = function(*tensors)
    return [g.numpy() for g in tape.gradient(value, tensors)]


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (1, 1), (1, 4), (40, 30), (100, 120)])
@pytest.mark.parametrize("method", ["cholesky", "svd"])
def test_value(method, sizes, rng):
    """Both routes give the offline similarity; Eq. 1 holds at the directions."""
    x, y = features(rng, 500, sizes)
    covariances = blocks(x, y)
    expected = task_similarity(x, y)
    found = largest_canonical_correlation(*covariances, method)
    assert float(found) == pytest.approx(expected, abs=1e-4)
    a, b = (ops.convert_to_numpy(v) for v in canonical_directions(*covariances))
    correlation = np.corrcoef(x @ a, y @ b)[0, 1]
    assert correlation == pytest.approx(expected, abs=1e-4)
    along = correlation_along(*covariances, a, b)
    assert float(along) == pytest.approx(expected, abs=1e-4)


def test_gradient_is_that_of_the_svd_route(rng):
    """By the covariances; those of one set are symmetric."""
    covariances = blocks(*features(rng, 400, (6, 4)))
    found, expected = (
        gradient_of(lambda *c, m=m: largest_canonical_correlation(*c, m), *covariances)
        for m in ("cholesky", "svd")
    )
    for a, b in zip(found, expected):
        if a.shape[0] == a.shape[1]:
            a, b = a + a.T, b + b.T
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())


def test_gradient_by_finite_differences(rng):
    """Through the whole layer, by the features of a batch."""
    x, y = features(rng, 30)
    keras.config.set_floatx("float64")
    try:
        layer = TRL(momentum=0.5, ridge=1e-2, dtype="float64")
        layer.build([x.shape, y.shape])
        start = rng.normal(size=(20, 8))
        start = start.T @ start / 20
        x, y = x.astype("float64"), y.astype("float64")

        def similarity(x, y):
            layer.covariance.assign(start)
            return layer([x, y], training=True)[0]

        gradients = gradient_of(similarity, x, y)
        for gradient, values, side in zip(gradients, (x, y), (0, 1)):
            for _ in range(6):
                index = tuple(rng.integers(size) for size in values.shape)
                sides = []
                for step in (1e-5, -1e-5):
                    moved = [x.copy(), y.copy()]
                    moved[side][index] += step
                    sides.append(float(similarity(*moved)))
                expected = (sides[0] - sides[1]) / 2e-5
                assert gradient[index] == pytest.approx(expected, abs=1e-7)
    finally:
        keras.config.set_floatx("float32")


def test_algorithm_1(rng):
    """The moving covariances written out, batch by batch, from the identity."""
    layer, m = TRL(momentum=0.8, ridge=0.0), 0.8
    expected = np.eye(8)
    for _ in range(4):
        x, y = features(rng, 20)
        found = layer([x, y], training=True)
        both = np.concatenate([x, y], axis=1).astype("float64")
        batch = np.zeros((8, 8))
        for row in both - both.mean(axis=0):
            batch += np.outer(row, row) / 19
        expected = m * expected + (1 - m) * batch
        np.testing.assert_allclose(layer.covariance, expected, rtol=1e-4, atol=1e-5)
    roots = []
    for block in (expected[:3, :3], expected[3:, 3:]):
        u, s, _ = np.linalg.svd(block)
        roots.append(u / np.sqrt(s) @ u.T)
    tau = np.linalg.svd(roots[0] @ expected[:3, 3:] @ roots[1])[1][0]
    assert float(found[0]) == pytest.approx(tau, abs=1e-5)


def test_inference_changes_nothing(rng):
    """It returns the stored estimate, whatever the batch."""
    layer = TRL(momentum=0.5)
    trained = layer(features(rng), training=True)
    before = ops.convert_to_numpy(layer.covariance)
    other = layer(features(rng))
    np.testing.assert_allclose(other, trained, rtol=1e-6)
    np.testing.assert_array_equal(layer.covariance, before)
    # Nothing was seen yet: the sets are taken as uncorrelated.
    np.testing.assert_array_equal(TRL()(features(rng)), [0.0])


def test_batch_size_makes_no_difference(rng):
    """After many batches the estimate is the offline one, for small and large batches."""
    x, y = features(rng, 800, noise=1.0)
    expected = task_similarity(x, y)
    for size in (16, 80):
        layer = TRL(momentum=0.9)
        for start in range(0, 800, size):
            batch = [x[start : start + size], y[start : start + size]]
            found = layer(batch, training=True)
        assert float(found[0]) == pytest.approx(expected, abs=0.1)


def test_more_features_than_examples(rng):
    """The batch covariance is singular; the moving one is not."""
    layer = TRL(momentum=0.9)
    for _ in range(3):
        found = layer(features(rng, 8, (64, 48)), training=True)
        assert 0 < float(found[0]) <= 1
    (gradient,) = gradient_of(
        lambda x: layer([x, features(rng, 8, (64, 48))[1]], training=True)[0],
        features(rng, 8, (64, 48))[0],
    )
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0


def test_pairs(rng):
    """All of them by default, in order; or those asked for, by name."""
    sets = dict(zip("abc", features(rng, 200, (3, 1, 6))))
    every = TRL(momentum=0.0, ridge=0.0)(sets, training=True)
    expected = [
        task_similarity(sets[i], sets[j]) for i, j in (("a", "b"), ("a", "c"), ("b", "c"))
    ]
    np.testing.assert_allclose(every, expected, atol=1e-4)
    some = TRL([("c", "a"), ("b", "a")], momentum=0.0, ridge=0.0)(sets, training=True)
    np.testing.assert_allclose(some, [expected[1], expected[0]], atol=1e-4)
    images = {n: x.reshape(200, 1, -1) for n, x in sets.items()}
    flat = TRL(momentum=0.0, ridge=0.0)(images, training=True)
    np.testing.assert_allclose(flat, every, atol=1e-6)


def test_constant_features(rng):
    """Similar to nothing, and the gradient is finite."""
    x, _ = features(rng)
    constant = np.ones((64, 2), "float32")
    layer = TRL(momentum=0.0)
    np.testing.assert_allclose(layer([x, constant], training=True), [0], atol=1e-3)
    gradients = gradient_of(lambda *c: layer(list(c), training=True)[0], x, constant)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_a_last_batch_of_one_is_passed_over(rng):
    """It says nothing about covariances."""
    layer = TRL(momentum=0.5)
    inputs = [keras.Input((3,)), keras.Input((5,))]
    model = keras.Model(inputs, layer(inputs))
    model(features(rng), training=True)
    before = ops.convert_to_numpy(layer.covariance)
    if keras.config.backend() != "tensorflow":
        pytest.skip("an open batch size is TensorFlow's")
    from dmtrl_keras.ground.backend import tensorflow

    tf = tensorflow()
    call = tf.function(
        lambda x, y: model([x, y], training=True),
        input_signature=[tf.TensorSpec((None, 3)), tf.TensorSpec((None, 5))],
    )
    call(*features(rng, 1))
    np.testing.assert_array_equal(layer.covariance, before)
    call(*features(rng, 2))
    assert not np.array_equal(layer.covariance, before)


def test_saved_with_its_state(tmp_path, rng):
    """In a model whose loss has the similarity; `fit`, files, config."""

    class Similar(keras.layers.Layer):
        def __init__(self, trl, **kwargs):
            super().__init__(**kwargs)
            self.trl = trl

        def call(self, inputs):
            self.add_loss(ops.sum(1 - self.trl(inputs)))
            return ops.concatenate(inputs, axis=-1)

    layer = TRL([(0, 1)], momentum=0.9, ridge=1e-2, method="cholesky")
    inputs = keras.Input((4,))
    outputs = [keras.layers.Dense(3)(inputs), keras.layers.Dense(2)(inputs)]
    model = keras.Model(inputs, Similar(layer)(outputs))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x = rng.normal(size=(256, 4)).astype("float32")
    model.fit(x, np.zeros((256, 5)), batch_size=32, epochs=10, verbose=0)
    before = ops.convert_to_numpy(layer.covariance)
    model.evaluate(x, np.zeros((256, 5)), verbose=0)
    model.predict(x, verbose=0)
    np.testing.assert_array_equal(layer.covariance, before)
    model.save_weights(tmp_path / "model.weights.h5")
    layer.covariance.assign(np.eye(5))
    model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(layer.covariance, before)
    config = layer.get_config()
    assert TRL.from_config(config).get_config() == config
    assert layer.compute_output_shape([(None, 3), (None, 2)]) == (1,)


def test_mixed_precision_and_xla(rng):
    """Linear algebra stays in float32; compiled, the same."""
    sets = features(rng)
    plain, mixed = TRL(momentum=0.5), TRL(momentum=0.5, dtype="mixed_bfloat16")
    expected = plain(sets, training=True)
    found = mixed(sets, training=True)
    assert keras.backend.standardize_dtype(mixed.covariance.dtype) == "float32"
    np.testing.assert_allclose(found, expected, atol=2e-2)
    if keras.config.backend() == "tensorflow":
        from dmtrl_keras.ground.backend import tensorflow

        layer = TRL(momentum=0.5)
        layer.build([x.shape for x in sets])
        call = tensorflow().function(lambda *x: layer(list(x), training=True))
        compiled = tensorflow().function(call, jit_compile=True)
        np.testing.assert_allclose(compiled(*sets), expected, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"momentum": 1.0}, "`momentum` must be a number from 0 to below 1"),
        ({"ridge": -1}, "`ridge` must be"),
        ({"method": "qr"}, '"cholesky" or "svd".*\'qr\''),
        ({"pairs": []}, "pairs of two different tasks"),
        ({"pairs": [("a", "a")]}, "pairs of two different tasks"),
    ],
)
def test_bad_arguments(arguments, message):
    """The error says what was received."""
    with pytest.raises(ValueError, match=message):
        TRL(**arguments)


def test_bad_input(rng):
    """Unknown tasks, one task, unmatched batches, a batch of one, NaN."""
    x, y = features(rng)
    with pytest.raises(ValueError, match=r"TRL 'hidden'.*unknown tasks.*\['a', 'b'\]"):
        TRL([("a", "c")], name="hidden")({"a": x, "b": y})
    with pytest.raises(ValueError, match="two tasks at least"):
        TRL()([x])
    with pytest.raises(ValueError, match="two tasks at least"):
        TRL().build((None, 3))
    with pytest.raises(ValueError, match=r"same examples.*\{0: 64, 1: 10\}"):
        TRL()([x, y[:10]])
    with pytest.raises(ValueError, match="same examples, two at least"):
        TRL()([x[:1], y[:1]])
    with pytest.raises(ValueError, match="of known sizes"):
        TRL().build([(None, None), (None, 3)])
    layer = TRL(name="hidden")
    layer([x, y], training=True)
    before = ops.convert_to_numpy(layer.covariance)
    y[3, 1] = np.nan
    with pytest.raises(Exception, match=r"TRL 'hidden': features .* not finite"):
        layer([x, y], training=True)
    np.testing.assert_array_equal(layer.covariance, before)


def test_missing_examples(rng):
    """Each pair's covariance is that of the examples that have both, with their share."""
    x, y = features(rng, 12, (2, 3))
    there = {"x": rng.random(12) < 0.6, "y": rng.random(12) < 0.7}
    both, momentum = there["x"] & there["y"], 0.4
    x[~there["x"]], y[~there["y"]] = np.nan, np.nan
    layer = TRL(momentum=momentum)
    layer({"x": x, "y": y}, training=True, present=there)
    found = ops.convert_to_numpy(layer.covariance)
    sides = {"x": slice(0, 2), "y": slice(2, 5)}
    together = np.concatenate([x, y], axis=1)
    for a, b in (("x", "x"), ("y", "y"), ("x", "y")):
        chosen = there[a] & there[b]
        assert 2 < chosen.sum() < 12
        part = np.cov(np.where(np.isfinite(together), together, 0)[chosen].T)
        share = (1 - momentum) * chosen.sum() / 12
        expected = (1 - share) * np.eye(5) + share * part
        block = found[sides[a], sides[b]]
        np.testing.assert_allclose(block, expected[sides[a], sides[b]], atol=1e-5)
        np.testing.assert_allclose(found[sides[b], sides[a]], block.T, atol=1e-6)
    assert both.any()
