"""The decompositions: their guarantee, their bounds, and TensorLy's results."""

import math

import numpy as np
import pytest
import scipy.linalg.interpolative
import tensorly as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tensorly.decomposition import tensor_train
from tensorly.decomposition import tucker as tl_tucker

from dmtrl_keras import decomposition
from dmtrl_keras.dmtrl.decomposition import TT_RANKS, TUCKER_RANKS, common_tolerance

METHODS = ("laf", "tucker", "tt")
BOUNDS = {
    "laf": decomposition.laf_bounds,
    "tucker": decomposition.tucker_bounds,
    "tt": decomposition.tt_bounds,
}

RANKS = {
    "laf": decomposition.laf_ranks,
    "tucker": decomposition.tucker_ranks,
    "tt": decomposition.tt_ranks,
}

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)
tensors = shapes.flatmap(
    lambda shape: arrays(
        "float64", shape, elements=st.floats(-10, 10, allow_subnormal=False)
    )
)


def decompose(method, tensor, **choice):
    """Run a method; returns its arrays in a list."""
    if method == "tucker":
        core, factors = decomposition.tucker(tensor, **choice)
        return [core, *factors]
    return list(getattr(decomposition, method)(tensor, **choice))


def recompose(method, parts):
    """The tensor that the arrays stand for, written out with einsum or loops."""
    if method == "laf":
        return np.einsum("...k,kt->...t", *parts)
    if method == "tucker":
        core, *factors = parts
        for mode, factor in enumerate(factors):
            core = np.moveaxis(np.tensordot(factor, core, (1, mode)), 0, mode)
        return core
    tensor = parts[0]
    for core in parts[1:]:
        tensor = np.tensordot(tensor, core, 1)
    return tensor


def ranks_of(method, parts):
    """The ranks that the arrays' shapes imply."""
    if method == "laf":
        return (parts[1].shape[0],)
    if method == "tucker":
        return parts[0].shape
    return tuple(core.shape[-1] for core in parts[:-1])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(tensor=tensors, tolerance=st.floats(0.001, 0.999))
def test_error_within_tolerance(method, tensor, tolerance):
    """`||W - W'|| <= tolerance * ||W||`, and no rank is above its bound."""
    parts = decompose(method, tensor, tolerance=tolerance)
    error = np.linalg.norm(recompose(method, parts) - tensor)
    assert error <= tolerance * np.linalg.norm(tensor) * (1 + 1e-9) + 1e-12
    ranks, bounds = ranks_of(method, parts), BOUNDS[method](tensor.shape)
    assert len(ranks) == len(bounds)
    assert all(1 <= rank <= bound for rank, bound in zip(ranks, bounds))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(tensor=tensors)
def test_full_rank_is_exact(method, tensor):
    """The fraction 1.0 and the bounds themselves both reproduce the tensor."""
    for rank in (1.0, BOUNDS[method](tensor.shape)):
        parts = decompose(method, tensor, rank=rank)
        np.testing.assert_allclose(recompose(method, parts), tensor, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(tensor=tensors, fraction=st.floats(0.05, 1.0), cap=st.integers(1, 3))
def test_given_ranks_are_kept(method, tensor, fraction, cap):
    """Fractions and caps give exactly the ranks that they stand for."""
    bounds = BOUNDS[method](tensor.shape)
    # In a tuple, and as a file of version 0.1 has it, a fraction is one of the bound.
    wanted = tuple(max(1, math.ceil(fraction * b - 1e-9)) for b in bounds)
    saved = RANKS[method](tensor.shape, fraction, "as_saved")
    assert saved == wanted == RANKS[method](tensor.shape, (fraction,) * len(bounds))
    if method != "tt" or len(bounds) == 1 or fraction == 1:
        parts = decompose(method, tensor, rank=(fraction,) * len(bounds))
        assert ranks_of(method, parts) == wanted
        size = sum(part.size for part in parts)
        assert size == entries(method, tensor.shape, wanted)
    if len(bounds) > 1 and cap <= max(bounds[:-1]):
        parts = decompose(method, tensor, rank=cap)
        *others, task = ranks_of(method, parts)
        assert tuple(others) == tuple(min(cap, b) for b in bounds[:-1])
        size = others[-1] * tensor.shape[-2] if method == "tt" else math.prod(others)
        assert task == min(bounds[-1], size)


def entries(method, shape, ranks):
    """How many numbers the factors have."""
    if method == "laf":
        return ranks[0] * (math.prod(shape[:-1]) + shape[-1])
    if method == "tucker":
        return math.prod(ranks) + sum(d * k for d, k in zip(shape, ranks))
    return sum(a * d * b for a, d, b in zip((1, *ranks), shape, (*ranks, 1)))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(
        *[st.sampled_from([1, 2, 3, 5])] * 2,
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(1, 8),
    ),
    window=st.integers(0, 2),
    fraction=st.floats(0.02, 0.99),
)
def test_a_fraction_is_one_of_the_weights(method, shape, window, fraction):
    """The most that keeps to it; the tasks stay whole, and Tucker's window."""
    shape = shape[2 - window :]

    def size_of(ranks):
        return entries(method, shape, ranks)

    ranks, full = (RANKS[method](shape, choice) for choice in (fraction, 1.0))
    size, budget = size_of(ranks), fraction * math.prod(shape)
    if method == "laf":
        fitting = [k for k in range(1, full[0] + 1) if size_of((k,)) <= budget]
        assert ranks == (max([*fitting, min(2, full[0])]),)
        return
    useful = ranks[-2] * shape[-2] if method == "tt" else math.prod(ranks[:-1])
    assert ranks[-1] == min(full[-1], useful)
    if size > budget:
        # There are no smaller ones with which the tasks can differ.
        assert ranks == RANKS[method](shape, 1e-9)
    if method == "tucker":
        assert ranks[:window] == full[:window]
    # No cap that keeps to it gives more.
    cut = 2 if method == "tucker" else 1
    for cap in range(1, max(full) + 1):
        capped = (min(cap, bound) for bound in full[:-1][-cut:])
        capped = RANKS[method](shape, (*full[: -1 - cut], *capped))
        if capped[-1] == full[-1] and size_of(capped) <= budget:
            assert all(a >= b for a, b in zip(ranks[-1 - cut : -1], capped[-1 - cut : -1]))


def test_shares_of_usual_layers():
    """What half of the weights is: close to it, window and tasks whole, T = 2 to 10."""
    for shape in [(3, 3, 16, 32, 2), (3, 3, 64, 128, 4), (5, 5, 32, 64, 10), (512, 64, 2)]:
        for fraction in (0.5, 0.25, 0.1):
            for method in ("tucker", "tt"):
                ranks = RANKS[method](shape, fraction)
                share = entries(method, shape, ranks) / math.prod(shape)
                assert 0.75 * fraction < share <= fraction, (shape, method)
                assert ranks[-1] == shape[-1] and ranks[0] >= min(shape[0], 3)
    assert decomposition.tucker_ranks((3, 3, 16, 32, 2), 0.5) == (3, 3, 14, 15, 2)
    # A task rank of 1 leaves more for the channels, and half of LAF's latent kernels.
    assert decomposition.tucker_ranks((64, 32, 4), 0.25, task_rank=1) == (17, 18, 1)
    assert decomposition.laf_ranks((3, 3, 16, 32, 10), 0.5) == (4,)
    assert decomposition.laf_ranks((3, 3, 16, 32, 10), None, task_rank=0.5) == (5,)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(tensor=tensors)
def test_rows_of_the_task_matrix(method, tensor):
    """S has orthogonal rows of norm sqrt(T), for all methods alike."""
    parts = decompose(method, tensor, rank=1.0)
    matrix = parts[-1].T if method == "tucker" else parts[-1]
    np.testing.assert_allclose(
        matrix @ matrix.T, tensor.shape[-1] * np.eye(len(matrix)), atol=1e-9
    )


@pytest.mark.parametrize("method", METHODS)
def test_rescaling_and_permuting_tasks(method, rng):
    """A scale leaves ranks alone; permuted tasks permute the columns of the result."""
    tensor = rng.normal(size=(4, 3, 5)) * np.linspace(0.01, 3, 5)
    order = rng.permutation(5)
    plain = decompose(method, tensor, tolerance=0.3)
    scaled = decompose(method, 1e6 * tensor, tolerance=0.3)
    moved = decompose(method, tensor[..., order], tolerance=0.3)
    assert ranks_of(method, plain) == ranks_of(method, scaled) == ranks_of(method, moved)
    np.testing.assert_allclose(
        recompose(method, scaled), 1e6 * recompose(method, plain), rtol=1e-6, atol=1e-3
    )
    np.testing.assert_allclose(
        recompose(method, moved), recompose(method, plain)[..., order], atol=1e-8
    )


@pytest.mark.parametrize("shape", [(6, 5, 4), (3, 3, 4, 5, 4)])
def test_agreement_with_tensorly(shape, rng):
    """At equal ranks, HOSVD and TT-SVD compose to TensorLy's tensors."""
    tensor = rng.normal(size=shape)
    ranks = tuple(max(1, b // 2) for b in decomposition.tucker_bounds(shape))
    # Without iterations TensorLy's Tucker is its HOSVD start.
    theirs = tl.tucker_to_tensor(
        tl_tucker(tl.tensor(tensor), ranks, n_iter_max=0, init="svd")
    )
    ours = decompose("tucker", tensor, rank=ranks)
    projected = tensor
    for mode, rank in enumerate(ranks):
        u = np.linalg.svd(decomposition.unfold(tensor, mode), full_matrices=False)[0]
        u = u[:, :rank]
        projected = decomposition.mode_product(projected, u @ u.T, mode)
    np.testing.assert_allclose(recompose("tucker", ours), projected, atol=1e-9)
    error = np.linalg.norm(recompose("tucker", ours) - tensor)
    assert error <= np.linalg.norm(theirs - tensor) * 1.05 + 1e-9

    ranks = decomposition.resolve_rank(0.5, decomposition.tt_bounds(shape))
    theirs = tl.tt_to_tensor(tensor_train(tl.tensor(tensor), [1, *ranks, 1]))
    ours = decompose("tt", tensor, rank=ranks)
    np.testing.assert_allclose(recompose("tt", ours), theirs, atol=1e-9)


def test_laf_is_the_best_low_rank_matrix(rng):
    """Eckart and Young: the error is that of the discarded singular values."""
    tensor = rng.normal(size=(4, 3, 6))
    values = np.linalg.svd(tensor.reshape(12, 6), compute_uv=False)
    for rank in range(1, 7):
        parts = decompose("laf", tensor, rank=rank)
        error = np.linalg.norm(recompose("laf", parts) - tensor)
        np.testing.assert_allclose(error, np.linalg.norm(values[rank:]), atol=1e-9)


def test_smallest_ranks_are_chosen(rng):
    """One singular vector fewer would break the promise (LAF, where it is exact)."""
    tensor = rng.normal(size=(5, 4, 8))
    for tolerance in (0.1, 0.3, 0.6):
        rank = ranks_of("laf", decompose("laf", tensor, tolerance=tolerance))[0]
        if rank > 1:
            parts = decompose("laf", tensor, rank=rank - 1)
            error = np.linalg.norm(recompose("laf", parts) - tensor)
            assert error > tolerance * np.linalg.norm(tensor)


def test_per_svd_threshold_of_the_authors_code(rng):
    """On fast-falling spectra it gives the rank that SciPy's routine gives there."""
    u = np.linalg.qr(rng.normal(size=(30, 8)))[0]
    v = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    matrix = u * (10.0 ** -np.arange(8)) @ v
    for tolerance in (0.3, 0.03, 0.003):
        theirs = scipy.linalg.interpolative.svd(matrix, tolerance, rand=False)[1]
        parts = decompose("laf", matrix, tolerance=tolerance, threshold="singular_value")
        assert abs(ranks_of("laf", parts)[0] - len(theirs)) <= 1
    np.testing.assert_array_equal(
        [
            decomposition.truncation_rank(np.array([4.0, 2, 1]), t, 1, "singular_value")
            for t in (0.6, 0.4, 0.1)
        ],
        [1, 2, 3],
    )


@pytest.mark.parametrize("method", METHODS)
def test_zero_tensor_and_single_task(method, rng):
    """Zeros have rank 1; one task keeps its kernel."""
    parts = decompose(method, np.zeros((3, 4, 2)), tolerance=0.1)
    assert set(ranks_of(method, parts)) == {1}
    assert all(np.all(np.isfinite(part)) for part in parts)
    tensor = rng.normal(size=(3, 4, 1))
    parts = decompose(method, tensor, rank=1.0)
    np.testing.assert_allclose(recompose(method, parts), tensor, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"tolerance": 1.5}, r"\(0, 1\).*1\.5"),
        ({"tolerance": 0.0}, r"\(0, 1\)"),
        ({"tolerance": 1}, r"\(0, 1\)"),
        ({"tolerance": True}, r"\(0, 1\)"),
        ({"rank": 0}, "positive int"),
        ({"rank": 1.5}, "fraction"),
        ({"rank": True}, "positive int"),
        ({"rank": "all"}, "positive int"),
        ({"rank": 1000}, "at most.*1000"),
        ({"rank": (1,) * 7}, "entries"),
        ({"rank": 0.5, "task_rank": 3}, "at most 2|once"),
        ({"rank": 0.5, "task_rank": 0}, "`task_rank` must.*task_rank=0"),
        ({"rank": 0.5, "task_rank": "full"}, "`task_rank` must.*'full'"),
        ({"rank": (1.0,) * 3, "task_rank": 2}, "task"),
        ({"rank": ()}, "positive int"),
        ({"rank": float("nan")}, "positive int"),
        ({"rank": 2, "tolerance": 0.1}, "not both"),
        ({}, "neither"),
        ({"tolerance": 0.1, "threshold": "energy"}, "energy"),
    ],
)
def test_errors(method, choice, message):
    """Every bad choice is an error that says what was received."""
    with pytest.raises(ValueError, match=message):
        decompose(method, np.ones((4, 3, 2)), **choice)


def test_impossible_tensors_and_ranks():
    """NaN, empty tensors, vectors, and a rank above its own bound."""
    with pytest.raises(ValueError, match="NaN"):
        decomposition.laf(np.array([[1.0, np.nan]]), rank=1)
    with pytest.raises(ValueError, match="shape="):
        decomposition.tt(np.ones(3), rank=1)
    with pytest.raises(ValueError, match="non-empty"):
        decomposition.tucker(np.ones((0, 2)), rank=1)
    with pytest.raises(ValueError, match=r"bound \(4, 3, 2\)"):
        decomposition.tucker(np.ones((4, 3, 2)), rank=(4, 3, 3))
    with pytest.raises(ValueError, match=r"TT rank 2 can be at most 3"):
        decomposition.tt(np.ones((9, 3, 9)), rank=(1, 4))


@pytest.mark.parametrize("rule", [TUCKER_RANKS, TT_RANKS])
def test_room_for_the_tasks(rule, rng):
    """With a task rank of its own the other ranks are such that it matters."""
    # Nearly equal kernels of one output, of which a tolerance leaves one.
    common = np.repeat(rng.normal(size=(20, 1, 1)), 4, axis=-1)
    near = common + 0.01 * rng.normal(size=(20, 1, 4))
    other = rng.normal(size=(12, 10, 4))
    _, alone = common_tolerance(rule, [near, other], 0.8)
    assert alone[0][-1] == 1
    _, full = common_tolerance(rule, [near, other], 0.8, task_rank=1.0)
    assert full[0][0] == full[0][-1] == full[1][-1] == 4
    # Factors that are larger than their kernel count as that.
    sizes = [
        min(kernel.size, rule.size(kernel.shape, ranks))
        for kernel, ranks in zip([near, other], full)
    ]
    assert sum(sizes) <= 0.8 * (near.size + other.size)
