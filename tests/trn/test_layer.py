"""The Task Relation Layer: values, gradients, moving state, errors."""

import functools

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


@pytest.mark.parametrize(
    "sizes", [(3, 5), (5, 3), (1, 1), (1, 4), (40, 30), (30, 40), (100, 120), (130, 140)]
)
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


def scatter_of(sets, there):
    """Sums of products of two sets' deviations over the examples that have both.

    Returns:
        `(scatter, counts)`, both `(D, D)`, by loops over sets and examples.
    """
    sizes = [x.shape[1] for x in sets]
    ends = np.cumsum([0, *sizes])
    scatter, counts = np.zeros((2, ends[-1], ends[-1]))
    for i, x in enumerate(sets):
        for j, y in enumerate(sets):
            both = there[i] & there[j]
            block = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
            mean_x, mean_y = x[both].mean(axis=0), y[both].mean(axis=0)
            for n in np.flatnonzero(both):
                scatter[block] += np.outer(x[n] - mean_x, y[n] - mean_y)
            counts[block] = both.sum()
    return scatter, counts


def moments(batches, momentum, estimate):
    """Algorithm 1 written out: `(moving, joins)`, the latter the last batch's share.

    `"mean"`: means weighted by the falling powers of the momentum, over their sum. `"sum"`:
    from the identity.
    """
    batches = [(*scatter_of(*batch), len(batch[0][0])) for batch in batches]
    width = len(batches[0][0])
    total = np.eye(width) if estimate == "sum" else np.zeros((width, width))
    seen = np.zeros((width, width))
    for scatter, counts, size in batches:
        share = (1 - momentum) * counts / size
        batch = scatter / (counts - 1) if estimate == "mean" else scatter * size / counts
        total = (1 - share) * total + share * batch
        seen = (1 - share) * seen + share
    if estimate == "sum":
        return total, share
    return total / seen, share / seen


def tau(covariance, d, ridge):
    """Eq. 11, by eigenvalues."""
    roots = []
    for block in (covariance[:d, :d], covariance[d:, d:]):
        values, vectors = np.linalg.eigh(block + ridge * np.diag(np.diag(block)))
        roots.append(vectors / np.sqrt(values) @ vectors.T)
    return np.linalg.svd(roots[0] @ covariance[:d, d:] @ roots[1])[1][0]


def several_batches(rng, missing, steps=3):
    """Batches of two sets, with which examples have them."""
    batches = []
    for _ in range(steps):
        sets = [x.astype("float64") for x in features(rng, 30)]
        there = [rng.random(30) < (0.7 if missing else 1.1) for _ in sets]
        batches.append((sets, there))
    return batches


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("estimate", ["mean", "sum"])
@pytest.mark.parametrize("gradient", ["full", "moving"])
def test_gradient_by_finite_differences(gradient, estimate, missing, rng):
    """Through the whole layer, after some steps, by the features of a batch."""
    m, ridge = 0.8, 1e-2
    settings = {"estimate": estimate, "gradient": gradient}
    batches = several_batches(rng, missing)
    *_, (last, there) = batches
    moving, joins = moments(batches, m, estimate)
    scatter, counts = scatter_of(last, there)
    scale = 1 / (counts - 1) if estimate == "mean" else 30 / counts
    # Of the batch's covariance: what it really weighs, or all of it.
    weight = joins if gradient == "moving" else counts / 30

    def expected(*sets):
        change = scale * (scatter_of(sets, there)[0] - scatter)
        return tau(moving + weight * change, 3, ridge)

    keras.config.set_floatx("float64")
    try:
        layer = TRL(momentum=m, ridge=ridge, dtype="float64", **settings)
        for sets, present in batches[:-1]:
            layer(sets, training=True, present=present)
        gradients = gradient_of(
            lambda *sets: layer(list(sets), training=True, present=there)[0], *last
        )
    finally:
        keras.config.set_floatx("float32")
    np.testing.assert_allclose(layer.covariance, moving, rtol=1e-8, atol=1e-10)
    assert float(layer.similarity[0]) == pytest.approx(expected(*last), abs=1e-8)
    for side, values in enumerate(last):
        for _ in range(6):
            index = tuple(rng.integers(size) for size in values.shape)
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in last]
                moved[side][index] += step
                sides.append(expected(*moved))
            slope = (sides[0] - sides[1]) / 2e-5
            assert gradients[side][index] == pytest.approx(slope, abs=1e-7)


def test_full_gradient_is_that_of_any_momentum(rng):
    """A constant stream has the same gradient whatever the momentum, and however long."""
    x, y = features(rng)
    expected = gradient_of(lambda *c: TRL(momentum=0.0)(list(c), training=True)[0], x, y)
    for momentum, steps in ((0.9, 1), (0.99, 4)):
        layer = TRL(momentum=momentum)
        for _ in range(steps):
            found = gradient_of(lambda *c, f=layer: f(list(c), training=True)[0], x, y)
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_algorithm_1(rng):
    """The paper's listing, line by line, from the identity, with sums."""
    layer, m = TRL(momentum=0.8, ridge=0.0, estimate="sum"), 0.8
    expected = np.eye(8)
    for _ in range(4):
        x, y = features(rng, 20)
        found = layer([x, y], training=True)
        both = np.concatenate([x, y], axis=1).astype("float64")
        batch = np.zeros((8, 8))
        for row in both - both.mean(axis=0):
            batch += np.outer(row, row)
        expected = m * expected + (1 - m) * batch
        np.testing.assert_allclose(layer.covariance, expected, rtol=1e-4, atol=1e-4)
    assert float(found[0]) == pytest.approx(tau(expected, 3, 0.0), abs=1e-5)


def test_first_step_is_the_estimate_of_the_batch(rng):
    """Whatever the momentum and the scale of the features."""
    x, y = features(rng)
    expected = task_similarity(x, y, ridge=1e-3)
    for momentum, scale in ((0.0, 1.0), (0.99, 1e-3), (0.9999, 1e4)):
        found = TRL(momentum=momentum)([x * scale, y / scale], training=True)
        assert float(found[0]) == pytest.approx(expected, abs=1e-4)


def test_estimate_after_thirty_steps(rng):
    """Near the offline one, of labels in shares of an image and standardised alike."""
    pose = rng.integers(5, size=3840)
    noise = rng.normal(size=(3840, 10))
    landmarks = 0.3 * (pose[:, None] - 2) * rng.normal(size=10) + noise
    sets = {"pose": np.eye(5, dtype="float32")[pose]}
    sets |= {"shares": 0.5 + 0.1 * landmarks, "standard": landmarks / landmarks.std(axis=0)}
    sets = {name: np.float32(x) for name, x in sets.items()}
    layer = TRL([("pose", "shares"), ("pose", "standard")], momentum=0.99)
    layer.build({name: (128, x.shape[1]) for name, x in sets.items()})
    step = functools.partial(layer, training=True)
    if keras.config.backend() == "tensorflow":
        from dmtrl_keras.ground.backend import tensorflow

        step = tensorflow().function(step)
    for start in range(0, 3840, 128):
        found = step({name: x[start : start + 128] for name, x in sets.items()})
    expected = task_similarity(sets["pose"], sets["shares"], ridge=1e-3)
    np.testing.assert_allclose(found, [expected] * 2, atol=0.02)


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
    """The estimate is the offline one, for small and large batches, early and late."""
    x, y = features(rng, 400, noise=1.0)
    expected = task_similarity(x, y)
    for size in (40, 100):
        layer = TRL(momentum=0.9)
        for start in range(0, 400, size):
            batch = [x[start : start + size], y[start : start + size]]
            found = layer(batch, training=True)
            if start >= 100:
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
    seen = ops.convert_to_numpy(layer.seen)
    np.testing.assert_allclose(seen, np.full((2, 2), 1 - 0.9**80), rtol=1e-4)
    model.save_weights(tmp_path / "model.weights.h5")
    layer.covariance.assign(np.eye(5))
    layer.seen.assign(np.zeros((2, 2)))
    model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(layer.covariance, before)
    np.testing.assert_array_equal(layer.seen, seen)
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
        ({"estimate": "sums"}, '"mean" or "sum".*\'sums\''),
        ({"gradient": None}, '"full" or "moving".*None'),
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
    batches = several_batches(rng, missing=True)
    layer = TRL(momentum=0.4)
    for sets, there in batches:
        given = {}
        for name, x, has in zip("xy", sets, there):
            assert 2 < has.sum() < 30
            given[name] = np.float32(np.where(has[:, None], x, np.nan))
        layer(given, training=True, present=dict(zip("xy", there)))
    expected, _ = moments(batches, 0.4, "mean")
    np.testing.assert_allclose(layer.covariance, expected, atol=1e-4)


def test_pairs_that_come_late(rng):
    """Without an example that has both the similarity is 0; its first batch then counts."""
    x, y = features(rng)
    layer = TRL(momentum=0.99)
    none, every = np.zeros(64, bool), np.ones(64, bool)
    found = layer([x, y], training=True, present=[every, none])
    assert float(found[0]) == 0
    np.testing.assert_array_equal(np.asarray(layer.seen) > 0, [[True, False], [False] * 2])
    found = layer([x, y], training=True, present=[every, every])
    assert float(found[0]) == pytest.approx(task_similarity(x, y, 1e-3), abs=1e-4)


def test_state_of_version_0_1(rng):
    """It goes on as it did: no correction, and the batch's share of the gradient."""
    config = TRL([(0, 1)], momentum=0.8).get_config()
    del config["estimate"], config["gradient"]
    layer = TRL.from_config(config)
    assert (layer.estimate, layer.gradient) == ("mean", "moving")
    x, y = features(rng)
    layer.build([x.shape, y.shape])
    start = np.eye(8, dtype="float32") + 0.1
    layer.load_own_variables({"0": start, "1": np.float32([0.5])})
    layer([x, y], training=True)
    batch = np.cov(np.concatenate([x, y], axis=1).T)
    np.testing.assert_allclose(layer.covariance, 0.8 * start + 0.2 * batch, atol=1e-5)
    # Untrained, it starts as new ones do.
    layer.load_own_variables({"0": np.eye(8), "1": np.zeros(1)})
    layer([x, y], training=True)
    np.testing.assert_allclose(layer.covariance, batch, atol=1e-5)
