"""What doesn't depend on scale does so at none; values that mean nothing are refused.

Numbers of any size that a float holds, constant features, kernels that diverged, masked and
complex arrays.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from dmtrl_keras import (
    MultiTaskModel,
    Relation,
    TaskRelations,
    TensorNormalRegularizer,
    aggregate_similar_kernels,
    decomposition,
    factorize,
    kernel_sharing_ratio,
    label_similarity,
    layers,
    parameterizations,
    sharing_strength,
    sharing_strength_of,
    task_correlation,
    task_similarity,
    task_similarity_matrix,
    tensor_normal,
)
from dmtrl_keras.canonical_correlation import canonical_correlation
from dmtrl_keras.ground.linalg import scaled

SCALES = pytest.mark.parametrize(
    ("scale", "dtype"),
    [(10.0**n, kind) for n in (-30, -9, 9, 30) for kind in ("float32", "float64")]
    + [(1e-300, "float64"), (1e300, "float64")],
)


def test_scaled():
    """Exact, zeros and the smallest and largest floats included."""
    for values in ([0.0, 0.0], [5e-324, 0], [1.7e308, -1.0], [-3.0, 0.1], []):
        values = np.array(values)
        unit, exponent = scaled(values)
        np.testing.assert_array_equal(np.ldexp(unit, exponent), values)
        if np.any(values):
            assert 0.5 <= np.abs(unit).max() < 1


@SCALES
def test_similarities(scale, dtype, rng):
    """Of features of any scale, also where the sets' differ."""
    x = rng.normal(size=(200, 3))
    y = x[:, :2] + rng.normal(size=(200, 2))
    large, small = (x * scale).astype(dtype), (y / scale).astype(dtype)
    expected = task_similarity(x, y)
    assert task_similarity(large, y) == pytest.approx(expected, rel=1e-5)
    assert task_similarity(large, small, ridge=1e-9) == pytest.approx(expected, rel=1e-5)
    assert task_similarity_matrix([large, small])[0, 1] == pytest.approx(expected, rel=1e-5)
    found = label_similarity({"a": large, "b": small})
    assert found["a", "b"] == pytest.approx(expected, rel=1e-5)
    along = large.astype("float64") @ canonical_correlation(large, y).x_directions
    np.testing.assert_allclose(along.std(axis=0), 1, rtol=1e-6)
    assert task_similarity(np.full(200, scale, dtype), y) == 0


@SCALES
@pytest.mark.parametrize("method", ["laf", "tucker", "tt"])
def test_decompositions(method, scale, dtype, rng):
    """A tolerance is a promise: the ranks and the relative error of the tensor as it is."""
    tensor = rng.normal(size=(4, 3, 5)) * np.geomspace(1, 1e-3, 5)

    def of(values):
        parts = getattr(decomposition, method)(values, tolerance=0.05)
        if method == "laf":
            return parts[0].shape[-1:], np.tensordot(*parts, axes=1)
        if method == "tt":
            ranks = tuple(core.shape[-1] for core in parts[:-1])
            return ranks, functools.reduce(lambda a, b: np.tensordot(a, b, 1), parts)
        core, factors = parts
        for mode, factor in enumerate(factors):
            core = decomposition.mode_product(core, factor, mode)
        return parts[0].shape, core

    ranks, _ = of(tensor)
    given = (tensor * scale).astype(dtype)
    found, composed = of(given)
    assert found == ranks
    error = composed / scale - given.astype("float64") / scale
    assert np.linalg.norm(error) <= 0.05 * np.linalg.norm(tensor)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_truncation_rank(scale):
    """The squares of the singular values need not be floats."""
    values = np.array([3.0, 2.0, 0.1]) * scale
    assert decomposition.truncation_rank(values, 0.1, 3.6 * scale) == 2


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_sharing_strength(scale):
    """Of the same kernels in another scale, which is none of the task matrix's."""
    inputs = keras.Input((6,))
    hidden = layers.TaskDense(4, 3, shared_input=True, common_draw=False, name="fc")(inputs)
    model = keras.Model(inputs, hidden)
    expected = sharing_strength(factorize(model, "laf", rank=2, verbose=False))
    kernel = model.get_layer("fc").kernel
    kernel.assign(kernel * scale)
    factorised = factorize(model, "laf", rank=2, verbose=False)
    assert sharing_strength(factorised) == pytest.approx(expected, rel=1e-4)
    assert 0 <= sharing_strength_of(1e300 * np.eye(3)) <= 1


@pytest.mark.parametrize("scale", [1e-120, 1e-30, 1e30, 1e120])
def test_flip_flop(scale, rng):
    """Covariances up to the scale, which the last one has, and the samples' density."""
    truth = [np.array([[1.0, 0.6], [0.6, 1.0]]), np.diag([1.0, 2.0, 3.0])]
    samples = 3 + tensor_normal.sample(truth, samples=100, seed=0)
    expected = tensor_normal.flip_flop(samples)
    start = [np.eye(2), np.eye(3) * scale]
    found = tensor_normal.flip_flop(samples * scale, start=start)
    assert found.converged and found.sweeps <= expected.sweeps + 1
    np.testing.assert_allclose(found.mean / scale, expected.mean)
    first, last = found.covariances
    np.testing.assert_allclose(first, expected.covariances[0], rtol=1e-5)
    np.testing.assert_allclose(last / scale / scale, expected.covariances[1], rtol=1e-5)
    # Six dimensions, each stretched by the scale.
    likelihood = expected.log_likelihood - 6 * np.log(scale)
    assert found.log_likelihood == pytest.approx(likelihood, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_covariances(scale):
    """What is symmetric is so beside its own entries."""
    matrix = np.array([[2.0, 1.0], [1.0, 2.0]])
    tensor_normal.check_covariance(matrix * scale, "x")
    with pytest.raises(ValueError, match="x: a covariance must be symmetric"):
        tensor_normal.check_covariance(scale * np.array([[2.0, 1.0], [0.5, 2.0]]), "x")
    x = np.float32(np.sqrt(scale)) * np.ones((1, 2), "float32")
    density = float(tensor_normal.log_density(x, [matrix * scale])[0])
    expected = float(tensor_normal.log_density(np.ones((1, 2)), [matrix])[0])
    assert density == pytest.approx(expected - np.log(scale), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_similar_kernels(scale, rng):
    """Cosines, aggregates and what of them is equal, in float32."""
    kernels = rng.normal(size=(3, 2, 2)).astype("float32")
    kernels[..., 1] += 2 * kernels[..., 0]
    expected = keras.ops.convert_to_numpy(aggregate_similar_kernels(kernels, 0.4))
    assert not np.allclose(expected, kernels)
    found = aggregate_similar_kernels(kernels * np.float32(scale), 0.4)
    np.testing.assert_allclose(found / np.float32(scale), expected, rtol=1e-5)
    inputs = keras.Input((4, 4, 1))
    layer = layers.SimilarKernelConv2D(2, 2, 2, shared_input=True, common_draw=False)
    model = keras.Model(inputs, layer(inputs))
    layer.factors["kernel"].assign(layer.factors["kernel"] * scale)
    # Kernels of their own, none of them equal to another.
    assert kernel_sharing_ratio(model, verbose=False)[-1].saved == 0


def with_prior(**arguments):
    """A network of two tasks with a prior on its only layer."""
    inputs = keras.Input((3,))
    prior = TensorNormalRegularizer(**arguments)
    layer = layers.TaskDense(
        2, 2, shared_input=True, common_draw=False, kernel_regularizer=prior, name="fc"
    )
    return MultiTaskModel(inputs, layers.TaskSplit(["a", "b"])(layer(inputs)))


@pytest.mark.parametrize("scale", [1e-30, 1e-17, 1e17, 1e30])
def test_task_correlation(scale, rng):
    """What a prior learns of a kernel of any scale."""
    kernel = rng.normal(size=(3, 2, 2)).astype("float32")

    def learned(kernel):
        model = with_prior(modes=("feature", "task"))
        layer = model.get_layer("fc")
        layer.kernel.assign(kernel)
        for _ in range(3):
            layer(np.ones((1, 3)), training=True)
        return task_correlation(model)["fc"]

    expected = learned(kernel)
    assert abs(expected[0, 1]) > 0.01
    np.testing.assert_allclose(learned(kernel * np.float32(scale)), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "arguments", "message"),
    [
        (np.nan, {}, "kernel has values that are not finite"),
        (np.inf, {"modes": ("feature", "class", "task")}, "values that are not finite"),
        (1e25, {"trace": None}, "kernel is too large for the squares"),
        (1e25, {"relative": False}, "kernel is too large for the squares"),
    ],
)
def test_kernels_in_fit(value, arguments, message):
    """The error is that of the prior in a compiled graph too, not of a decomposition."""
    model = with_prior(**arguments)
    layer = model.get_layer("fc")
    layer.kernel.assign(keras.ops.ones_like(layer.kernel) * value)
    with pytest.raises(ValueError, match=f"TaskDense 'fc'.*{message}"):
        layer(np.ones((2, 3)), training=True)
    if not arguments or "trace" in arguments:
        model.compile("sgd", "mse", jit_compile=False)
        labels = {task: np.ones((2, 2)) for task in "ab"}
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            model.fit(np.ones((2, 3)), labels, verbose=0)


@pytest.mark.parametrize("method", ["tucker", "tt"])
def test_norms_beyond_floats(method, rng):
    """A tensor of finite numbers, whose factors no float holds."""
    tensor = np.full((4, 5, 3), 1e308) * (1 + 0.1 * rng.random((4, 5, 3)))
    with pytest.raises(ValueError, match=rf"^{method}: expected .* times 2\^1024"):
        getattr(decomposition, method)(tensor, rank=2)
    # The entries of LAF are no larger than the tensor's.
    assert np.all(np.isfinite(decomposition.laf(tensor, rank=2)[0]))


def test_smallest_features():
    """A similarity has no scale, directions have one."""
    x = np.array([0.0, 1, 1, 0, 3])
    y = np.array([0.0, 1, 2, 0, 1])
    assert task_similarity(x * 5e-324, y) == pytest.approx(task_similarity(x, y))
    with pytest.raises(ValueError, match=r"expected numbers .* times 2\^107"):
        canonical_correlation(x * 5e-324, y)


@pytest.mark.parametrize("mode", ["forward", "overwrite"])
def test_similar_kernels_in_fit(mode):
    """The layer's own error, eagerly and in a graph, before tasks part without a word."""
    sharing = parameterizations.SimilarKernels(mode=mode)
    inputs = keras.Input((3, 3, 1))
    layer = layers.TaskConv2D(2, 3, tasks=2, shared_input=True, sharing=sharing, name="c")
    maps = layers.TaskSplit(["a", "b"])(layer(inputs))
    model = MultiTaskModel(inputs, maps)
    kernel = np.ones(layer.stacked.shape)
    kernel[0, 0, 0, 0, 1] = np.nan
    layer.stacked.factors["kernel"].assign(kernel)
    x, message = np.ones((2, 3, 3, 1)), "kernel has values that are not finite"
    layer(x)
    with pytest.raises(ValueError, match=f"TaskConv2D 'c': the {message}"):
        layer(x, training=True)
    model.compile("sgd", "mse", jit_compile=False)
    labels = {task: np.ones((2, 1, 1, 2)) for task in "ab"}
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        model.fit(x, labels, verbose=0)
    with pytest.raises(
        ValueError, match=r"^kernel_sharing_ratio: TaskConv2D 'c': .* 1 val"
    ):
        kernel_sharing_ratio(model, verbose=False)


def test_features_in_fit(rng):
    """Features that are too large for their squares, in a compiled graph."""
    inputs = keras.Input((3,))
    outputs = {task: keras.layers.Dense(2)(inputs) for task in "ab"}
    model = MultiTaskModel(inputs, outputs, terms=[TaskRelations(Relation())])
    model.compile("sgd", "mse", jit_compile=False)
    labels = {task: rng.normal(size=(8, 2)) for task in "ab"}
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"TRL.*too large for their var"
    ):
        model.fit(1e25 * rng.normal(size=(8, 3)), labels, verbose=0)
    trl = layers.TRL(name="relation")
    for value, message in ((np.nan, "not finite"), (1e25, "too large for their variances")):
        x = np.float32(value * rng.normal(size=(8, 3)))
        with pytest.raises(ValueError, match=f"TRL 'relation'.*{message}"):
            trl([x, x], training=True)


@pytest.mark.parametrize("value", [0.0, 3.7, 1e6])
@pytest.mark.parametrize("method", ["cholesky", "svd"])
def test_constant_features(method, value, rng):
    """They are similar to nothing, and no gradient reaches them, after any time."""
    layer = layers.TRL(momentum=0.9, method=method)
    x = tf.constant(rng.normal(size=(64, 3)), "float32")
    y = tf.fill((64, 2), np.float32(value))
    layer.build([(None, 3), (None, 2)])
    # As 400 steps leave it.
    moving = np.zeros((5, 5), "float32")
    moving[:3, :3] = np.cov(x.numpy().T)
    layer.covariance.assign(moving + 0.9**400 * np.eye(5))
    layer.seen.assign(np.ones((2, 2)))
    with tf.GradientTape() as tape:
        tape.watch([x, y])
        similarity = layer([x, y], training=True)[0]
    assert float(similarity) == 0
    for gradient in tape.gradient(similarity, [x, y]):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e5, 1e12])
def test_scale_of_features(scale, rng):
    """Online, from the first step on."""
    x = rng.normal(size=(64, 3))
    y = x[:, :2] + rng.normal(size=(64, 2))
    layer = layers.TRL(momentum=0.99)
    found = layer([np.float32(x * scale), np.float32(y / scale)], training=True)
    assert float(found[0]) == pytest.approx(task_similarity(x, y, ridge=1e-3), abs=1e-4)


MASKED = np.ma.masked_array(np.arange(6.0), [0, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("bad", [MASKED, np.arange(6) * 1j], ids=["masked", "complex"])
@pytest.mark.parametrize(
    "call",
    [
        lambda bad: task_similarity(bad, np.arange(6)),
        lambda bad: task_similarity_matrix({"a": np.arange(6), "b": bad}),
        lambda bad: task_similarity_matrix(bad.reshape(3, 2)),
        lambda bad: label_similarity({"a": bad, "b": np.arange(6)}),
        lambda bad: decomposition.laf(bad.reshape(3, 2), rank=1),
        lambda bad: decomposition.tucker([bad, bad], rank=1),
        lambda bad: tensor_normal.flip_flop(bad.reshape(3, 2)),
        lambda bad: tensor_normal.log_density(bad.reshape(3, 2), [None]),
        lambda bad: aggregate_similar_kernels(bad.reshape(3, 1, 2), 0.5),
        lambda bad: sharing_strength_of(bad.reshape(3, 2)),
    ],
)
def test_masked_and_complex(call, bad):
    """What is masked would be seen, and imaginary parts be dropped: neither is taken."""
    masked = isinstance(bad, np.ma.MaskedArray)
    message = "(?s)no masked values.*masked ones" if masked else "real numbers.*complex"
    with pytest.raises(ValueError, match=message):
        call(bad)


def test_unmasked_array():
    """A mask that hides nothing is no harm."""
    x = np.ma.masked_array(np.arange(6.0), np.zeros(6, bool))
    assert task_similarity(x, np.arange(6)) == pytest.approx(1)
