"""Similarity of tasks, against scikit-learn, QR and the formulas of the paper."""

import time

import numpy as np
import pytest
from sklearn.cross_decomposition import CCA

from dmtrl_keras import canonical_correlation as cc
from dmtrl_keras import task_similarity, task_similarity_matrix


def related(rng, n=400, first=4, second=3, noise=1.0):
    """Two sets with something in common."""
    common = rng.normal(size=(n, 2))
    x = common @ rng.normal(size=(2, first)) + noise * rng.normal(size=(n, first))
    y = common @ rng.normal(size=(2, second)) + noise * rng.normal(size=(n, second))
    return x + 5.0, y * [[100.0] + [1.0] * (second - 1)]


def by_qr(x, y):
    """Björck and Golub: the singular values of the product of two orthonormal bases."""
    q = [np.linalg.qr(values - values.mean(axis=0))[0] for values in (x, y)]
    return np.linalg.svd(q[0].T @ q[1], compute_uv=False)


@pytest.mark.parametrize("sizes", [(4, 3), (2, 5), (1, 1), (3, 3)])
def test_spectrum(sizes, rng):
    """The whole spectrum by another route, and Eq. 9 with matrix square roots."""
    x, y = related(rng, 300, *sizes)
    found = cc.canonical_correlation(x, y)
    np.testing.assert_allclose(found.correlations, by_qr(x, y), atol=1e-9)
    both = np.cov(np.concatenate([x, y], axis=1).T)
    d = sizes[0]
    inverse = np.linalg.inv(np.atleast_2d(both[d:, d:]))
    omega = np.linalg.solve(both[:d, :d], both[:d, d:] @ inverse @ both[d:, :d])
    largest = np.sqrt(np.linalg.eigvals(omega).real.max())
    assert task_similarity(x, y) == pytest.approx(largest, abs=1e-9)


def test_scikit_learn(rng):
    """The first pair of directions of its iterative algorithm."""
    x, y = related(rng)
    model = CCA(n_components=2, max_iter=5000, tol=1e-12).fit(x, y)
    u, v = model.transform(x, y)
    expected = [np.corrcoef(u[:, k], v[:, k])[0, 1] for k in range(2)]
    found = cc.canonical_correlation(x, y)
    np.testing.assert_allclose(found.correlations[:2], expected, atol=1e-5)
    for k in range(2):
        a, b = x @ found.x_directions[:, k], y @ found.y_directions[:, k]
        assert np.corrcoef(a, b)[0, 1] == pytest.approx(found.correlations[k], abs=1e-9)
        assert a.std() == pytest.approx(1) and b.std() == pytest.approx(1)
        assert abs(np.corrcoef(a, u[:, k])[0, 1]) == pytest.approx(1, abs=1e-4)


def test_symmetry_and_invariance(rng):
    """Proposition 1; invertible linear maps and shifts of either side."""
    x, y = related(rng)
    tau = task_similarity(x, y)
    assert 0 < tau < 1
    assert task_similarity(y, x) == pytest.approx(tau, abs=1e-12)
    mapped = x @ rng.normal(size=(4, 4)) * 1e3 - 7
    assert task_similarity(mapped, y) == pytest.approx(tau, abs=1e-8)
    scaled = x * [1e-8, 1.0, 1e8, 1.0]
    assert task_similarity(scaled, y) == pytest.approx(tau, abs=1e-8)
    assert task_similarity(x[::-1], y[::-1]) == pytest.approx(tau, abs=1e-12)


def test_binary_labels_give_phi(rng):
    """From the four counts, and by one-hot labels as by single columns."""
    x = rng.integers(2, size=500)
    y = np.where(rng.random(500) < 0.3, x, rng.integers(2, size=500))
    n = np.array([[np.sum((x == a) & (y == b)) for b in (0, 1)] for a in (0, 1)])
    phi = (n[1, 1] * n[0, 0] - n[1, 0] * n[0, 1]) / np.sqrt(
        np.prod(n.sum(axis=0)) * np.prod(n.sum(axis=1))
    )
    assert task_similarity(x, y) == pytest.approx(abs(phi), abs=1e-12)
    assert task_similarity(np.eye(2)[x], 1 - y) == pytest.approx(abs(phi), abs=1e-9)


def test_matrix_is_all_pairs(rng):
    """Sets of different dimensions at once, as pair by pair; permuting permutes."""
    x, y = related(rng)
    sets = {"x": x, "y": y, "z": rng.normal(size=400), "w": x[:, :2] ** 2}
    matrix = task_similarity_matrix(sets)
    for i, first in enumerate(sets.values()):
        for j, second in enumerate(sets.values()):
            expected = task_similarity(first, second)
            assert matrix[i, j] == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_array_equal(matrix, matrix.T)
    order = [2, 0, 3, 1]
    permuted = task_similarity_matrix([list(sets.values())[k] for k in order])
    np.testing.assert_allclose(permuted, matrix[np.ix_(order, order)], atol=1e-12)


def test_degenerate_sets(rng):
    """Constant, collinear and too many columns: finite, in [0, 1], and sensible."""
    x, y = related(rng)
    tau = task_similarity(x, y)
    padded = np.concatenate([x, x[:, :1] * 3, np.full((400, 1), 1e6)], axis=1)
    assert task_similarity(padded, y) == pytest.approx(tau, abs=1e-6)
    assert task_similarity(np.ones(400), y) == 0
    assert len(cc.canonical_correlation(np.ones((400, 2)), y).correlations) == 0
    matrix = task_similarity_matrix([np.ones(400), np.zeros((400, 2))])
    np.testing.assert_array_equal(matrix, np.zeros((2, 2)))
    few = rng.normal(size=(5, 20)), rng.normal(size=(5, 30))
    assert task_similarity(*few) == pytest.approx(1)
    with_ridge = task_similarity(*few, ridge=1.0)
    assert 0 < with_ridge < 1
    assert task_similarity(x, y, ridge=0.1) < tau
    assert task_similarity(x[:1], y[:1]) == 0


def test_chunks(rng):
    """As from one piece; far from zero nothing is lost."""
    x, y = related(rng)
    whole = task_similarity(x, y)
    assert task_similarity(x, y, chunk=7) == pytest.approx(whole, abs=1e-10)
    assert task_similarity(x + 1e5, y, chunk=50) == pytest.approx(whole, abs=1e-6)


def test_speed(rng):
    """200,000 examples of 40 tasks in seconds."""
    labels = rng.integers(2, size=(200_000, 40)).astype("int8")
    # Of the processor, whatever else runs beside.
    start = time.process_time()
    matrix = task_similarity_matrix(labels)
    assert time.process_time() - start < 10
    off = matrix[~np.eye(40, dtype=bool)]
    assert matrix.shape == (40, 40) and off.max() < 0.02


@pytest.mark.parametrize(
    "sets, message",
    [
        ([np.zeros(3), np.zeros(4)], r"same n examples.*\(3, 1\).*\(4, 1\)"),
        ([np.zeros((0, 2)), np.zeros((0, 1))], "no examples"),
        ([np.zeros((2, 2, 2)), np.zeros(2)], "same n examples"),
        ([np.zeros(3), np.array([0, np.nan, 1])], "'1' has 1 values .* not finite"),
    ],
)
def test_bad_input(sets, message):
    """The error says what was received."""
    with pytest.raises(ValueError, match=message):
        task_similarity_matrix(sets)
    with pytest.raises(ValueError, match=r"`ridge` must be a number from 0.*ridge=-1"):
        task_similarity(np.arange(3), np.arange(3), ridge=-1)
    with pytest.raises(ValueError, match="`chunk` must be a positive int"):
        task_similarity(np.arange(3), np.arange(3), chunk=0)
