"""The tensor normal distribution, against SciPy and the explicit Kronecker product."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

from dmtrl_keras import tensor_normal

SHAPES = [(4,), (3, 4), (2, 3, 4), (2, 3, 2, 2)]


def covariance(d, rng):
    """A random symmetric positive definite matrix."""
    root = rng.normal(size=(d, d + 2))
    return root @ root.T / d


def problem(shape, rng):
    """`(mean, covariances, Kronecker product)`."""
    covariances = [covariance(d, rng) for d in shape]
    return rng.normal(size=shape), covariances, functools.reduce(np.kron, covariances)


def relative(a, b):
    """Distance in Frobenius norm relative to b."""
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_density_is_scipys(shape, rng):
    """Of the vectorised tensor, with the explicit covariance; one sample and several."""
    mean, covariances, whole = problem(shape, rng)
    x = rng.normal(size=(5, *shape))
    expected = stats.multivariate_normal(mean.ravel(), whole).logpdf(x.reshape(5, -1))
    found = tensor_normal.log_density(x, covariances, mean)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    one = tensor_normal.log_density(x[0], covariances, mean)
    assert one.shape == ()
    np.testing.assert_allclose(one, expected[0], rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_none_is_an_identity(shape, rng):
    """In density and in samples."""
    _, covariances, _ = problem(shape, rng)
    some = [matrix if k % 2 else None for k, matrix in enumerate(covariances)]
    full = [np.eye(d) if m is None else m for d, m in zip(shape, some)]
    x = rng.normal(size=(3, *shape))
    np.testing.assert_allclose(
        tensor_normal.log_density(x, some), tensor_normal.log_density(x, full), rtol=1e-5
    )
    np.testing.assert_allclose(
        tensor_normal.sample(some, shape=shape, samples=4, seed=1),
        tensor_normal.sample(full, samples=4, seed=1),
    )


def test_scale_moves_between_modes(rng):
    """Only the product is identifiable."""
    _, (a, b, c), _ = problem((2, 3, 4), rng)
    x = rng.normal(size=(3, 2, 3, 4))
    np.testing.assert_allclose(
        tensor_normal.log_density(x, [a, b, c]),
        tensor_normal.log_density(x, [a * 5, b / 10, c * 2]),
        rtol=1e-5,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_mode_covariance_is_the_formula(shape, rng):
    """Eq. 5 with inverses and Kronecker products written out, sample by sample."""
    _, covariances, _ = problem(shape, rng)
    x = rng.normal(size=(3, *shape))
    whiteners = [np.linalg.inv(np.linalg.cholesky(matrix)) for matrix in covariances]
    for mode, d in enumerate(shape):
        rest = [covariances[k] for k in range(len(shape)) if k != mode]
        inverse = np.linalg.inv(functools.reduce(np.kron, rest, np.eye(1)))
        expected = np.zeros((d, d))
        for sample in x:
            unfolded = np.moveaxis(sample, mode, 0).reshape(d, -1)
            expected += unfolded @ inverse @ unfolded.T
        expected /= 3 * np.prod(shape) // d
        found = tensor_normal.mode_covariance(ops.convert_to_tensor(x), whiteners, mode)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_samples_have_the_covariance(rng):
    """The empirical covariance of many samples is the Kronecker product."""
    mean, covariances, whole = problem((2, 3, 2), rng)
    x = tensor_normal.sample(covariances, mean, samples=200_000, seed=0)
    flat = x.reshape(len(x), -1)
    assert relative(np.cov(flat.T), whole) < 0.02
    np.testing.assert_allclose(flat.mean(axis=0), mean.ravel(), atol=0.05)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 2, 2)])
def test_flip_flop_recovers_covariances(shape, rng):
    """From many samples, the product and each factor up to its scale."""
    mean, covariances, whole = problem(shape, rng)
    x = tensor_normal.sample(covariances, mean, samples=20_000, seed=0)
    fitted = tensor_normal.flip_flop(x)
    assert fitted.converged
    np.testing.assert_allclose(fitted.mean, x.mean(axis=0))
    assert relative(functools.reduce(np.kron, fitted.covariances), whole) < 0.05
    for found, true in zip(fitted.covariances, covariances):
        scaled = found * np.trace(true) / np.trace(found)
        assert relative(scaled, true) < 0.03
    for found, d in zip(fitted.covariances[:-1], shape[:-1]):
        assert np.trace(found) == pytest.approx(d)


def test_flip_flop_with_a_known_mean(rng):
    """Of deviations from it; the mean is one estimate, the covariances another."""
    mean, covariances, whole = problem((3, 4), rng)
    x = tensor_normal.sample(covariances, 10 * mean, samples=20_000, seed=0)
    known = tensor_normal.flip_flop(x, mean=10 * mean)
    found = tensor_normal.flip_flop(x)
    np.testing.assert_allclose(known.mean, 10 * mean)
    assert relative(found.mean, known.mean) < 0.01
    for fitted in (known, found):
        assert relative(np.kron(*fitted.covariances), whole) < 0.05
    wrong = tensor_normal.flip_flop(x, mean=np.zeros((3, 4)))
    assert relative(np.kron(*wrong.covariances), whole) > 1


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_common_mean_is_generalized_least_squares(mode, rng):
    """The normal equations of all entries with the Kronecker product written out."""
    shape = (2, 3, 4)
    _, covariances, whole = problem(shape, rng)
    x = rng.normal(size=(2, *shape))
    parts = [np.eye(d) for d in shape]
    parts[mode] = np.ones((shape[mode], 1))
    design, inverse = functools.reduce(np.kron, parts), np.linalg.inv(whole)
    normal = design.T @ inverse
    expected = np.linalg.solve(normal @ design, normal @ x.reshape(2, -1).T).T
    root = np.linalg.inv(np.linalg.cholesky(covariances[mode]))
    found = ops.convert_to_numpy(tensor_normal.common_mean(x, root, mode))
    assert found.shape == tuple(1 if k == mode + 1 else d for k, d in enumerate(x.shape))
    np.testing.assert_allclose(found.reshape(2, -1), expected, rtol=1e-4, atol=1e-5)
    # One covariance for each sample, and none.
    both = np.stack([root, np.eye(shape[mode])])
    found = ops.convert_to_numpy(tensor_normal.common_mean(x, both, mode))
    np.testing.assert_allclose(found[0].ravel(), expected[0], rtol=1e-4, atol=1e-5)
    plain = ops.convert_to_numpy(tensor_normal.common_mean(x, None, mode))
    np.testing.assert_allclose(found[1], plain[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(plain, x.mean(axis=mode + 1, keepdims=True), rtol=1e-5)


def test_flip_flop_is_a_maximum(rng):
    """Every mode is a fixed point of Eq. 5, and no neighbour is more likely."""
    _, covariances, _ = problem((3, 2, 4), rng)
    x = tensor_normal.sample(covariances, samples=30, seed=0)
    fitted = tensor_normal.flip_flop(x, tolerance=1e-9)
    centred = x - x.mean(axis=0)
    whiteners = [np.linalg.inv(np.linalg.cholesky(m)) for m in fitted.covariances]
    for mode, found in enumerate(fitted.covariances):
        again = tensor_normal.mode_covariance(
            ops.convert_to_tensor(centred), whiteners, mode
        )
        np.testing.assert_allclose(again, found, rtol=1e-4, atol=1e-5)
    density = tensor_normal.log_density(centred, fitted.covariances)
    best = np.mean(ops.convert_to_numpy(density))
    assert fitted.log_likelihood == pytest.approx(float(best), rel=1e-5)
    for mode in range(3):
        for _ in range(5):
            near = list(fitted.covariances)
            step = rng.normal(size=near[mode].shape) * 0.05
            near[mode] = near[mode] + step @ step.T + 0.02 * np.diag(np.diag(step))
            likelihood = ops.convert_to_numpy(tensor_normal.log_density(centred, near))
            assert np.mean(likelihood) <= fitted.log_likelihood + 1e-6


def test_flip_flop_of_some_modes(rng):
    """DRN: of one sample with mean zero, the task covariance is `W_(3) W_(3)^T / D`."""
    kernel = rng.normal(size=(6, 5, 3))
    fitted = tensor_normal.flip_flop(kernel[None], mean=np.zeros((6, 5, 3)), modes=[2])
    unfolded = kernel.reshape(-1, 3).T
    np.testing.assert_allclose(fitted.covariances[2], unfolded @ unfolded.T / 30, rtol=1e-5)
    assert fitted.covariances[:2] == (None, None)
    assert fitted.converged and fitted.sweeps == 2


def test_ridge_where_samples_are_few(rng):
    """One wide sample has a singular covariance without it."""
    x = rng.normal(size=(1, 2, 30))
    with pytest.raises(ValueError, match=r"mode 1.*positive definite.*ridge"):
        tensor_normal.flip_flop(x, mean=np.zeros((2, 30)))
    fitted = tensor_normal.flip_flop(x, mean=np.zeros((2, 30)), ridge=0.1)
    assert np.linalg.eigvalsh(fitted.covariances[1])[0] > 0
    assert np.isfinite(fitted.log_likelihood)


def test_start_does_not_matter(rng):
    """Another start, the same maximum."""
    _, covariances, _ = problem((3, 2, 4), rng)
    x = tensor_normal.sample(covariances, samples=50, seed=0)
    one = tensor_normal.flip_flop(x, tolerance=1e-8)
    other = tensor_normal.flip_flop(x, tolerance=1e-8, start=covariances)
    for a, b in zip(one.covariances, other.covariances):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_permuting_the_modes(rng):
    """The modes have no order: the same covariances for a transposed tensor."""
    _, covariances, _ = problem((3, 2, 4), rng)
    x = tensor_normal.sample(covariances, samples=40, seed=0)
    one = tensor_normal.flip_flop(x, tolerance=1e-8)
    other = tensor_normal.flip_flop(np.transpose(x, (0, 3, 1, 2)), tolerance=1e-8)
    turned = [one.covariances[k] for k in (2, 0, 1)]
    for a, b in zip(turned, other.covariances):
        np.testing.assert_allclose(a / np.trace(a), b / np.trace(b), rtol=1e-3, atol=1e-4)
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)


def test_large_tensors_need_no_kronecker_product(rng):
    """A kernel whose explicit covariance would take petabytes."""
    kernel = rng.normal(size=(1, 256, 128, 4)).astype("float32")
    covariances = [covariance(d, rng).astype("float32") for d in kernel.shape[1:]]
    density = ops.convert_to_numpy(tensor_normal.log_density(kernel, covariances))
    assert density.shape == (1,) and np.isfinite(density).all()


def test_quadratic_form_has_a_gradient(rng):
    """`2 S^-1 W` for the task mode (Eq. 12, without the half)."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are taken with TensorFlow")
    from dmtrl_keras.ground.backend import tensorflow

    tf = tensorflow()
    kernel, matrix = rng.normal(size=(5, 4, 3)), covariance(3, rng)
    x = tf.constant(kernel[None])
    matrix_root = tensor_normal.whitener(tf.constant(matrix))
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tensor_normal.quadratic_form(x, [None, None, matrix_root])
    expected = 2 * kernel @ np.linalg.inv(matrix)
    np.testing.assert_allclose(tape.gradient(value, x)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, x: t.log_density(x, [np.eye(3)]), "expected 2 covariances"),
        (lambda t, x: t.log_density(x, [np.eye(3), None]), r"mode 0.*\(2, 2\).*\(3, 3\)"),
        (lambda t, x: t.log_density(x, [-np.eye(2), None]), "mode 0.*eigenvalue -1"),
        (lambda t, x: t.log_density(x, [np.triu(np.ones((2, 2))), None]), "symmetric"),
        (lambda t, x: t.log_density(x, [np.full((2, 2), np.nan), None]), "mode 0"),
        (lambda t, x: t.log_density(x, [None, None], np.zeros(3)), r"mean.*\(2, 3\)"),
        (lambda t, x: t.flip_flop(x, modes=[2]), r"modes=\[2\]"),
        (lambda t, x: t.flip_flop(x, modes=[0, 0]), "distinct"),
        (lambda t, x: t.flip_flop(x, modes=[]), r"modes=\[\]"),
        (lambda t, x: t.flip_flop(x, ridge=-1), "ridge=-1"),
        (lambda t, x: t.flip_flop(x, tolerance=0), "tolerance=0"),
        (lambda t, x: t.flip_flop(x, max_sweeps=0), "max_sweeps=0"),
        (lambda t, x: t.flip_flop(x * np.nan), "values that are not finite"),
        (lambda t, x: t.flip_flop(x[:1]), "positive definite"),
        (lambda t, x: t.sample([np.eye(2), None]), r"None for the modes \[1\]"),
        (lambda t, x: t.sample([np.eye(2)], samples=0), "samples=0"),
        (lambda t, x: t.common_mean(x, None, 2), "mode=2"),
        (lambda t, x: t.common_mean(x, np.eye(3), 0), r"`whitener`.*\(3, 3\)"),
    ],
)
def test_errors(call, message, rng):
    """What was received, and what was expected."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(tensor_normal, rng.normal(size=(4, 2, 3)))
