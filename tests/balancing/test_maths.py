"""The weights against SciPy, and against the papers' algorithms on vectors."""

import itertools

import numpy as np
import pytest
import scipy.optimize
from keras import ops

from dmtrl_keras.balancing import maths

SIZES = [(2, 5), (3, 2), (5, 8), (10, 4)]


def gradients(tasks, size, rng):
    """Of lengths that differ by far, and in conflict."""
    return rng.normal(size=(tasks, size)) * np.exp(rng.normal(size=(tasks, 1)))


def gram_of(jacobian):
    return (jacobian @ jacobian.T).astype("float32")


def found(function, *args, **kwargs):
    return np.asarray(ops.convert_to_numpy(function(*args, **kwargs)), "float64")


@pytest.fixture(params=SIZES, ids=str)
def jacobians(request, rng):
    """Some matrices of gradients of one size."""
    return [gradients(*request.param, rng) for _ in range(6)]


def test_nonnegative_minimum(jacobians):
    """SciPy's `nnls`, of several right sides."""
    for jacobian in jacobians:
        gram = found(maths.normalized, gram_of(jacobian), 1e-3)
        root = np.linalg.cholesky(gram)
        linear = np.random.default_rng(0).normal(size=(4, len(gram)))
        ours = found(
            maths.nonnegative_minimum, gram.astype("float32"), linear.astype("float32")
        )
        for own, c in zip(ours, linear):
            expected, _ = scipy.optimize.nnls(root.T, -np.linalg.solve(root, c))
            np.testing.assert_allclose(own, expected, rtol=1e-2, atol=5e-3)


def test_minimum_norm(jacobians):
    """SciPy's SLSQP finds nothing shorter on the simplex."""
    for jacobian in jacobians:
        w = found(maths.minimum_norm, gram_of(jacobian))
        gram = found(maths.normalized, gram_of(jacobian))
        assert w.min() >= 0 and abs(w.sum() - 1) < 1e-5
        best = scipy.optimize.minimize(
            lambda w, gram=gram: w @ gram @ w,
            np.full(len(w), 1 / len(w)),
            jac=lambda w, gram=gram: 2 * gram @ w,
            bounds=[(0, 1)] * len(w),
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-14},
        )
        assert w @ gram @ w <= best.fun * (1 + 1e-3) + 1e-6


def test_minimum_norm_of_two(rng):
    """The closed form of two tasks (Sener & Koltun 2018, Eq. 5)."""
    for _ in range(10):
        one, other = gradients(2, 3, rng)
        share = (other - one) @ other / ((one - other) @ (one - other))
        share = np.clip(share, 0, 1)
        w = found(maths.minimum_norm, gram_of(np.stack([one, other])))
        np.testing.assert_allclose(w, [share, 1 - share], atol=1e-3)


def test_on_simplex(rng):
    """The nearest point, by SciPy."""
    for _ in range(5):
        values = rng.normal(size=6)
        best = scipy.optimize.minimize(
            lambda w, values=values: np.sum((w - values) ** 2),
            np.full(6, 1 / 6),
            bounds=[(0, 1)] * 6,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        )
        ours = found(maths.on_simplex, values.astype("float32"))
        np.testing.assert_allclose(ours, best.x, atol=1e-3)


def test_nash(jacobians):
    """`G w = 1 / w`, with the ridge that is added."""
    for jacobian in jacobians:
        gram = gram_of(jacobian).astype("float64")
        w = found(maths.nash, gram_of(jacobian))
        gram += 1e-4 * np.diag(np.diag(gram))
        assert w.min() > 0
        np.testing.assert_allclose(w * (gram @ w), 1, atol=5e-3)


def test_conflict_averse(jacobians):
    """SciPy's SLSQP on the paper's objective, and the update that follows from it."""
    for jacobian, c in itertools.product(jacobians[:3], (0.3, 0.8)):
        gram = found(maths.normalized, gram_of(jacobian))
        tasks = len(gram)

        def objective(w, gram=gram, c=c):
            length = np.sqrt(max(w @ gram @ w, 1e-20))
            return w @ gram.mean(axis=0) + c * np.sqrt(gram.mean()) * length

        best = scipy.optimize.minimize(
            objective,
            np.full(tasks, 1 / tasks),
            bounds=[(0, 1)] * tasks,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-13},
        )
        weights = found(maths.conflict_averse, gram_of(jacobian), c)
        w = weights * (1 + c**2) - 1 / tasks
        assert objective(w / w.sum()) <= best.fun + 2e-3 * abs(best.fun) + 1e-3
        np.testing.assert_allclose(
            found(maths.conflict_averse, gram_of(jacobian), 0.0), 1 / tasks, atol=1e-5
        )


def test_projected(jacobians, rng):
    """PCGrad's algorithm on the vectors themselves."""
    for jacobian in jacobians:
        tasks = len(jacobian)
        order = np.argsort(rng.normal(size=(tasks, tasks)), axis=1)
        total = np.zeros(jacobian.shape[1])
        for i in range(tasks):
            own = jacobian[i].copy()
            for j in order[i]:
                if j != i and own @ jacobian[j] < 0:
                    own -= own @ jacobian[j] / (jacobian[j] @ jacobian[j]) * jacobian[j]
            total += own
        weights = found(maths.projected, gram_of(jacobian), order.astype("int32"))
        np.testing.assert_allclose(weights @ jacobian, total, rtol=1e-2, atol=1e-2)


def test_vaccinated(jacobians, rng):
    """GradVac's algorithm on the vectors, and its running means."""
    for jacobian in jacobians[:3]:
        tasks = len(jacobian)
        order = np.argsort(rng.normal(size=(tasks, tasks)), axis=1)
        targets = rng.uniform(-0.5, 0.5, size=(tasks, tasks))
        aims, total = targets.copy(), np.zeros(jacobian.shape[1])
        for i in range(tasks):
            own = jacobian[i].copy()
            for j in order[i]:
                if j == i:
                    continue
                other = jacobian[j]
                mine, theirs = np.linalg.norm(own), np.linalg.norm(other)
                phi, aim = own @ other / (mine * theirs), targets[i, j]
                if phi < aim:
                    share = aim * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - aim**2)
                    own = own + mine * share / (theirs * np.sqrt(1 - aim**2)) * other
                aims[i, j] += 0.1 * (phi - aim)
            total += own
        weights, new = maths.vaccinated(
            gram_of(jacobian), order.astype("int32"), targets.astype("float32"), 0.1
        )
        np.testing.assert_allclose(new, aims, atol=5e-3)
        update = np.asarray(weights) @ jacobian
        np.testing.assert_allclose(update, total, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_impartial(tasks, rng):
    """Equal projections on the directions of all gradients; weights of sum 1."""
    jacobian = gradients(tasks, tasks + 3, rng)
    weights = found(maths.impartial, gram_of(jacobian))
    assert abs(weights.sum() - 1) < 1e-3
    directions = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    products = directions @ (weights @ jacobian)
    np.testing.assert_allclose(products, products.mean(), rtol=2e-2, atol=1e-3)


def test_aligned(rng):
    """The paper's form, by the singular values of the gradients; equal lengths after."""
    for tasks in (2, 3, 6):
        jacobian = gradients(tasks, tasks + 4, rng)
        u, s, v = np.linalg.svd(jacobian, full_matrices=False)
        expected = s.min() * (u @ v).sum(axis=0)
        weights = found(maths.aligned, gram_of(jacobian))
        np.testing.assert_allclose(weights @ jacobian, expected, rtol=5e-3, atol=5e-3)


def test_unconflicting(jacobians):
    """The mean of projections onto the dual cone, each by SciPy's `nnls`."""
    for jacobian in jacobians:
        gram = gram_of(jacobian).astype("float64")
        gram += 1e-4 * np.diag(np.diag(gram))
        root, tasks = np.linalg.cholesky(gram), len(gram)
        expected = np.full(tasks, 1 / tasks)
        for i in range(tasks):
            expected += scipy.optimize.nnls(root.T, -root.T[:, i])[0] / tasks
        ours = found(maths.unconflicting, gram_of(jacobian))
        np.testing.assert_allclose(ours, expected, rtol=2e-2, atol=2e-3)
        products = gram @ ours / np.sqrt(np.diag(gram))
        assert products.min() > -1e-3 * np.abs(products).max()
