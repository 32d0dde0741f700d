"""Regressions with norms against other solvers: scikit-learn, closed forms, plain loops."""

import numpy as np
import pytest
from sklearn.linear_model import Lasso, MultiTaskLasso

from dmtrl_keras import (
    TensorNormalRegularizer,
    combined_regression,
    norm_regression,
    relationship_regression,
)
from dmtrl_keras.parameterizations import LAF
from dmtrl_keras.regularizers import ClusteredTasks, GroupLasso, MeanDeviation, TraceNorm

T, D = 6, 5


@pytest.fixture(scope="module")
def school():
    """Six tasks of different lengths, with slopes of rank two and an outlier."""
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(D, 2)) @ rng.normal(size=(2, T))
    slopes[:, -1] = 3 * rng.normal(size=D)
    sizes = (7, 9, 12, 8, 5, 10)
    x = {f"t{t}": rng.normal(size=(n, D)) for t, n in enumerate(sizes)}
    y = {
        f"t{t}": x[f"t{t}"] @ slopes[:, t] + t + 0.5 * rng.normal(size=n)
        for t, n in enumerate(sizes)
    }
    return x, y


def centred(school):
    """Centred features and targets of each task, and the factor of the loss."""
    x, y = school
    pairs = [(x[t] - x[t].mean(axis=0), y[t] - y[t].mean()) for t in x]
    return pairs, len(x) / sum(len(a) for a, _ in pairs)


def loss(school, kernel):
    """Example by example, with the best intercepts."""
    pairs, scale = centred(school)
    return scale * sum(
        np.sum((b - a @ w) ** 2) for (a, b), w in zip(pairs, kernel.T, strict=True)
    )


def slope(school, kernel):
    """The gradient of the loss."""
    pairs, scale = centred(school)
    own = [-2 * scale * a.T @ (b - a @ w) for (a, b), w in zip(pairs, kernel.T)]
    return np.stack(own, axis=1)


def ridge(school, penalty):
    """The slopes with the penalty `vec(W)^T penalty vec(W) / 2`, task by task in vec."""
    pairs, scale = centred(school)
    system, right = penalty.copy(), np.zeros(D * T)
    for t, (a, b) in enumerate(pairs):
        own = slice(t * D, (t + 1) * D)
        system[own, own] += 2 * scale * a.T @ a
        right[own] = 2 * scale * a.T @ b
    return np.linalg.solve(system, right).reshape(T, D).T


def shrink(matrix, by):
    """The singular values less `by`."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ np.diag(np.maximum(s - by, 0)) @ v


def nuclear(matrix):
    return np.linalg.svd(matrix, compute_uv=False).sum()


def test_group_lasso_is_that_of_scikit_learn(rng):
    """The same design for all tasks: `MultiTaskLasso` has the same objective, halved."""
    x = rng.normal(size=(30, 8))
    y = x @ (rng.normal(size=(8, 4)) * (np.arange(8) < 3)[:, None])
    y = y + 0.3 * rng.normal(size=y.shape)
    alpha = 0.2
    theirs = MultiTaskLasso(alpha, tol=1e-10, max_iter=10**5).fit(x, y)
    tasks = [f"t{t}" for t in range(4)]
    found = norm_regression(
        dict.fromkeys(tasks, x), dict(zip(tasks, y.T)), GroupLasso(2 * alpha)
    )
    residual = y - theirs.predict(x)
    expected = (residual**2).sum() / 30
    expected += 2 * alpha * np.linalg.norm(theirs.coef_, axis=0).sum()
    assert found.converged
    assert found.objective == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(found.kernel, theirs.coef_.T, atol=1e-4)
    np.testing.assert_allclose(found.bias, theirs.intercept_, atol=1e-4)
    assert np.array_equal(found.kernel == 0, theirs.coef_.T == 0)


def test_trace_norm_is_proximal_gradient(school):
    """Plain proximal gradient steps, thousands of them."""
    tau, eta = 0.8, 0.02
    kernel = np.zeros((D, T))
    for _ in range(4000):
        kernel = shrink(kernel - eta * slope(school, kernel), eta * tau)
    found = norm_regression(*school, TraceNorm(tau))
    expected = loss(school, kernel) + tau * nuclear(kernel)
    assert found.objective == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(found.kernel, kernel, atol=1e-3)
    assert np.linalg.matrix_rank(found.kernel, 1e-8) == np.linalg.matrix_rank(kernel, 1e-8)
    # The intercepts are the best ones, so that residuals have a mean of zero.
    for task, predicted in found.predict(school[0]).items():
        assert np.mean(school[1][task] - predicted) == pytest.approx(0, abs=1e-9)


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T


@pytest.mark.parametrize("side", ["features", "tasks"])
def test_squared_trace_norm_is_mtfl_and_mtrl(school, side):
    """By turns, as in both papers: the slopes, and a covariance `(W W^T)^(1/2) / trace`."""
    strength = 0.3
    kernel = ridge(school, 0.1 * np.eye(D * T))
    for step in range(500):
        # What is rounded off first falls slowly, so that the subspace can still turn.
        epsilon = max(0.98**step, 1e-4)
        gram = kernel @ kernel.T if side == "features" else kernel.T @ kernel
        covariance = root(gram + epsilon**2 * np.eye(len(gram)))
        inverse = np.linalg.inv(covariance / np.trace(covariance))
        parts = (np.eye(T), inverse) if side == "features" else (inverse, np.eye(D))
        kernel = ridge(school, strength * np.kron(*parts))
    expected = loss(school, kernel) + strength / 2 * nuclear(kernel) ** 2
    found = norm_regression(*school, TraceNorm(strength, squared=True))
    assert found.objective == pytest.approx(expected, rel=1e-4)


def deviation(common):
    """The matrix of Evgeniou & Pontil's penalty over the tasks."""
    mean = np.full((T, T), 1 / T)
    return np.eye(T) - mean + common * mean


@pytest.mark.parametrize("common", [0.0, 0.3])
def test_mean_deviation_has_a_closed_form(school, common):
    """A linear system of all slopes; with no penalty on the mean, the prior's, too."""
    strength = 0.7
    expected = ridge(school, strength * np.kron(deviation(common), np.eye(D)))
    found = norm_regression(*school, MeanDeviation(strength, common), tolerance=1e-8)
    np.testing.assert_allclose(found.kernel, expected, atol=1e-5)
    penalty = np.sum((expected @ deviation(common)) * expected)
    objective = loss(school, expected) + strength / 2 * penalty
    assert found.objective == pytest.approx(objective, rel=1e-8)
    if not common:
        prior = TensorNormalRegularizer(strength, mean="shared", update_every=None)
        other = relationship_regression(*school, prior)
        np.testing.assert_allclose(other.kernel, expected, atol=1e-6)


def test_matrix_normal_prior_has_a_closed_form(school, rng):
    """MTRL's step given the tasks' covariance; with that of a common part it is E & P's."""
    strength, factor = 0.7, rng.normal(size=(T, T))
    covariance = factor @ factor.T + np.eye(T)

    def prior(matrix):
        return TensorNormalRegularizer(
            strength, update_every=None, start={"task": matrix}, mean="zero"
        )

    found = relationship_regression(*school, prior(covariance))
    inverse = np.linalg.inv(covariance)
    expected = ridge(school, strength * np.kron(inverse, np.eye(D)))
    np.testing.assert_allclose(found.kernel, expected, atol=1e-4)
    objective, other = (
        loss(school, w) + strength / 2 * np.trace(w @ inverse @ w.T)
        for w in (found.kernel, expected)
    )
    assert objective == pytest.approx(other, rel=1e-6)
    common = relationship_regression(*school, prior(np.linalg.inv(deviation(0.3))))
    same = norm_regression(*school, MeanDeviation(strength, 0.3), tolerance=1e-8)
    np.testing.assert_allclose(common.kernel, same.kernel, atol=1e-4)


def test_matrix_methods_are_special_cases(school):
    """DMTRL, section 3: LAF with S as in Evgeniou & Pontil's method is that method.

    `W_t = L_0 + L_t`, that is S with a row of ones over an identity, and a ridge on L.
    """
    strength, weight = 0.7, 2.0
    matrix = np.vstack([np.ones(T), np.eye(T)])
    pairs, scale = centred(school)
    ridges = strength * np.diag([weight, *[1.0] * T])
    system, right = np.kron(ridges, np.eye(D)), np.zeros((T + 1) * D)
    for s, (a, b) in zip(matrix.T, pairs):
        system += 2 * scale * np.kron(np.outer(s, s), a.T @ a)
        right += 2 * scale * np.kron(s, a.T @ b)
    latent = np.linalg.solve(system, right).reshape(T + 1, D).T
    factors = {"latent": latent[:, None].astype("float32"), "task_matrix": matrix}
    factors["task_matrix"] = matrix.astype("float32")
    composed = np.moveaxis(np.asarray(LAF().compose(factors, T)), 0, -1)[:, 0]
    common = weight / (T + weight)
    found = norm_regression(*school, MeanDeviation(strength, common), tolerance=1e-8)
    np.testing.assert_allclose(composed, found.kernel, atol=1e-5)
    penalty = strength / 2 * np.sum(np.diag(ridges) / strength * (latent**2).sum(axis=0))
    assert loss(school, composed) + penalty == pytest.approx(found.objective, rel=1e-5)


def variances_of(sizes, least, most, total):
    """The clustered prior's eigenvalues, by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        x = (low + high) / 2
        low, high = (x, high) if np.clip(x * sizes, least, most).sum() < total else (low, x)
    return np.clip(low * sizes, least, most)


def test_clusters_are_found_by_turns(school):
    """The slopes given the covariance, the covariance given the slopes (Jacob et al.)."""
    strength, r, between, within, mean = 0.5, 2, 0.05, 1.0, 0.1
    centre = np.eye(T) - 1 / T
    total = (T - r + 1) / within + (r - 1) / between
    inverse = np.eye(T)
    for _ in range(300):
        matrix = centre @ inverse @ centre + mean * np.full((T, T), 1 / T)
        kernel = ridge(school, strength * np.kron(matrix, np.eye(D)))
        _, s, v = np.linalg.svd(kernel @ centre)
        sizes = np.concatenate([s, np.zeros(T - len(s))])
        variances = variances_of(sizes, 1 / within, 1 / between, total)
        inverse = v.T @ np.diag(1 / variances) @ v
    penalty = np.trace(kernel @ matrix @ kernel.T)
    expected = loss(school, kernel) + strength / 2 * penalty
    norm = ClusteredTasks(strength, r, between, within, mean)
    found = norm_regression(*school, norm, tolerance=1e-8)
    assert found.objective == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(found.kernel, kernel, atol=1e-3)


def test_robust_tasks_are_proximal_gradient(school):
    """RMTL by plain steps; only the outlier has a part of its own."""
    alpha, beta, eta = 0.5, 0.6, 0.01
    low, sparse = np.zeros((D, T)), np.zeros((D, T))
    for _ in range(8000):
        own = slope(school, low + sparse)
        low = shrink(low - eta * own, eta * alpha)
        sparse = sparse - eta * own
        for t in range(T):
            size = np.linalg.norm(sparse[:, t])
            sparse[:, t] *= max(1 - eta * beta / size, 0) if size else 0
    expected = loss(school, low + sparse) + alpha * nuclear(low)
    expected += beta * np.linalg.norm(sparse, axis=0).sum()
    found = norm_regression(*school, [TraceNorm(alpha), GroupLasso(beta, "task")])
    assert found.objective == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(found.parts[0] + found.parts[1], found.kernel)
    assert np.count_nonzero(np.linalg.norm(found.parts[1], axis=0)) < T


def test_combinations_are_stationary(school):
    """S is scikit-learn's lasso given L, task by task; L has no gradient."""
    sparsity, weight = 0.2, 0.1
    found = combined_regression(
        *school, 3, sparsity=sparsity, ridge=weight, tolerance=1e-12, max_sweeps=3000
    )
    latent, matrix = found.latent, found.task_matrix
    np.testing.assert_allclose(latent @ matrix, found.kernel)
    pairs, scale = centred(school)
    for s, (a, b) in zip(matrix.T, pairs):
        n = len(b)
        lasso = Lasso(sparsity / (2 * scale * n), fit_intercept=False, tol=1e-10)
        np.testing.assert_allclose(s, lasso.fit(a @ latent, b).coef_, atol=1e-3)
    gradient = slope(school, found.kernel) @ matrix.T + weight * latent
    np.testing.assert_allclose(gradient, 0, atol=1e-3)
    expected = loss(school, found.kernel) + sparsity * np.abs(matrix).sum()
    assert found.objective == pytest.approx(expected + weight / 2 * np.sum(latent**2))
    assert np.count_nonzero(matrix) < matrix.size


def test_ridges_on_both_factors_are_the_trace_norm(school):
    """`|W|_* = min (|L|^2 + |S|^2) / 2` over all factors: two solvers, one minimum."""
    found = combined_regression(
        *school, D, 0.0, ridge=0.5, task_ridge=0.5, max_sweeps=5000, tolerance=1e-10
    )
    other = norm_regression(*school, TraceNorm(0.5))
    assert found.objective == pytest.approx(other.objective, rel=1e-4)


def test_edges(school):
    """Tasks of one example, constant features, and no penalty."""
    x = {"a": np.ones((1, 2)), "b": np.ones((1, 2))}
    y = {"a": [3.0], "b": [4.0]}
    for found in (norm_regression(x, y, TraceNorm(0.1)), combined_regression(x, y, 2)):
        np.testing.assert_array_equal(found.kernel, 0)
        assert found.predict(x)["b"] == 4
    with pytest.raises(ValueError, match="norm_regression: `penalty` must be a norm"):
        norm_regression(*school, "trace")
    with pytest.raises(ValueError, match="predict: `x` must be a dict by"):
        norm_regression(x, y, TraceNorm(0.1)).predict({"c": x["a"]})
