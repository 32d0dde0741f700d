"""Values, gradients and proximal steps of the norms, as their formulas say."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from scipy.optimize import minimize

from dmtrl_keras import multitask
from dmtrl_keras.layers import LAFDense, TaskConv2D, TaskDense
from dmtrl_keras.optimizers import ProximalOptimizer
from dmtrl_keras.parameterizations import LAF, Parts
from dmtrl_keras.regularizers import ClusteredTasks, GroupLasso, MeanDeviation, TraceNorm

NORMS = [
    TraceNorm(0.7),
    TraceNorm(0.7, "tucker"),
    TraceNorm(0.7, "tt"),
    TraceNorm(0.7, squared=True),
    GroupLasso(0.7),
    GroupLasso(0.7, "task", squared=True),
    GroupLasso(0.7, ("feature", "class")),
    GroupLasso(0.7, "entry"),
    MeanDeviation(0.7, 0.2),
    ClusteredTasks(0.7, 2, 0.1, 1.0, 0.3),
]


def name_of(norm):
    return f"{type(norm).__name__}-{list(norm.get_config().values())[1:]}"


def nuclear(matrix):
    return np.linalg.svd(matrix, compute_uv=False).sum()


def test_trace_norms_are_those_of_the_unfoldings(rng):
    """Each matrix filled entry by entry; axes of size one don't count."""
    w = rng.normal(size=(2, 3, 4))
    unfoldings = {
        "laf": [w.transpose(2, 0, 1)],
        "tucker": [w, w.transpose(1, 0, 2), w.transpose(2, 0, 1)],
        "tt": [w, w.reshape(6, 4)],
    }
    for form, tensors in unfoldings.items():
        expected = sum(nuclear(each.reshape(len(each), -1)) for each in tensors)
        assert TraceNorm(2.0, form).terms(w, np)[0] == pytest.approx(expected)
        assert float(TraceNorm(2.0, form)(w)) == pytest.approx(2 * expected, rel=1e-6)
    matrix = w[:, :1]
    for form, times in (("laf", 1), ("tucker", 2), ("tt", 1)):
        value = TraceNorm(1.0, form).terms(matrix, np)[0]
        assert value == pytest.approx(times * nuclear(matrix[:, 0]))


def test_groups(rng):
    """Sums over groups, written out; names of modes, and axes, also of convolutions."""
    w = rng.normal(size=(2, 2, 3, 4, 5))

    def value(groups):
        return float(GroupLasso(1.0, groups).terms(w, np)[0])

    rows = sum(np.sqrt((w[:, :, i] ** 2).sum()) for i in range(3))
    assert value("feature") == value(2) == value([-3]) == pytest.approx(rows)
    assert value("task") == pytest.approx(sum(np.linalg.norm(w[..., t]) for t in range(5)))
    pairs = itertools.product(range(3), range(4))
    both = sum(np.linalg.norm(w[:, :, i, j]) for i, j in pairs)
    assert value(("feature", "class")) == pytest.approx(both)
    assert value("entry") == pytest.approx(np.abs(w).sum())
    with pytest.raises(ValueError, match=r"GroupLasso: expected `groups` of .*'width'"):
        GroupLasso(1.0, "length").terms(w, np)


@pytest.mark.parametrize("norm", NORMS, ids=name_of)
def test_gradients(norm, rng):
    """Of `terms`, and of what Keras differentiates, by finite differences."""
    w = rng.normal(size=(3, 2, 4))
    _, gradient = norm.terms(w, np)
    step = 1e-6
    for _ in range(6):
        way = rng.normal(size=w.shape)
        up, down = (norm.terms(w + sign * step * way, np)[0] for sign in (1, -1))
        difference = (up - down) / (2 * step)
        assert difference == pytest.approx(float(np.sum(gradient * way)), rel=1e-4)
    layer = TaskDense(2, tasks=4, kernel_regularizer=norm, shared_input=True)
    layer.build((None, 3))
    layer.kernel.assign(w)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(1.0), lambda y, x: 0.0 * ops.mean(x))
    assert float(model.losses[0]) == pytest.approx(0.7 * norm.terms(w, np)[0], rel=1e-5)
    model.train_on_batch(np.ones((2, 3)), np.ones((2, 8)))
    moved = (w - ops.convert_to_numpy(layer.kernel)) / 0.7
    np.testing.assert_allclose(moved, gradient, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS, ids=name_of)
def test_zero_has_no_gradient(norm):
    """And none of NaN: kernels may start from zeros, or be equal."""
    for w in (np.zeros((3, 2, 4)), np.ones((3, 2, 4)), np.full((3, 2, 4), 1e-30)):
        value, gradient = norm.terms(w, np)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
        value, gradient = norm.terms(ops.convert_to_tensor(w, "float32"), ops)
        assert np.isfinite(float(value)) and np.all(np.isfinite(gradient))
    assert not np.any(norm.terms(np.zeros((3, 2, 4)), np)[1])


@pytest.mark.parametrize("norm", NORMS[:1] + NORMS[3:8], ids=name_of)
@pytest.mark.parametrize("step", [0.1, 1.0, 30.0])
def test_proximal_steps_are_minima(norm, step, rng):
    """No point near it has a smaller `|Z - W|^2 / 2 + step penalty(Z)`; on both hosts."""
    w = rng.normal(size=(3, 2, 4))
    z = norm.proximal_step(w, step, np)

    def objective(z):
        return np.sum((z - w) ** 2) / 2 + step * 0.7 * norm.terms(z, np)[0]

    best = objective(z)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            assert objective(z + size * rng.normal(size=w.shape)) >= best - 1e-10
        assert objective(z * (1 - size)) >= best - 1e-10
    on_device = norm.proximal_step(ops.convert_to_tensor(w, "float32"), step)
    np.testing.assert_allclose(ops.convert_to_numpy(on_device), z, atol=1e-5)


def test_clusters(rng):
    """The relaxation is SciPy's minimum, and below the penalty of any true clusters."""
    t, r, between, within, mean = 6, 3, 0.1, 1.0, 0.3
    norm = ClusteredTasks(1.0, r, between, within, mean)
    w = rng.normal(size=(4, 1, t))
    value = 2 * norm.terms(w, np)[0]
    own = w[:, 0] - w[:, 0].mean(axis=1, keepdims=True)
    s = np.linalg.svd(own, compute_uv=False)
    total = (t - r + 1) / within + (r - 1) / between - (t - len(s)) / within
    found = minimize(
        lambda v: np.sum(s**2 / v),
        np.full(len(s), 1 / within),
        bounds=[(1 / within, 1 / between)] * len(s),
        constraints={"type": "ineq", "fun": lambda v: total - v.sum()},
    )
    of_mean = mean * t * np.sum(w[:, 0].mean(axis=1) ** 2)
    assert value == pytest.approx(found.fun + of_mean, rel=1e-4)
    for clusters in itertools.product(range(r), repeat=t):
        if len(set(clusters)) < r:
            continue
        means = np.zeros_like(own)
        for cluster in range(r):
            mine = np.array(clusters) == cluster
            means[:, mine] = own[:, mine].mean(axis=1, keepdims=True)
        true = between * np.sum(means**2) + within * np.sum((own - means) ** 2) + of_mean
        assert value <= true + 1e-9
    one = ClusteredTasks(1.0, 1, between, within, 1.0)
    assert one.terms(w, np)[0] == pytest.approx(np.sum(w**2) / 2)
    with pytest.raises(ValueError, match="ClusteredTasks: expected a kernel of 3 tasks"):
        norm.terms(w[..., :2], np)


@pytest.mark.parametrize("form", ["tucker", "tt"])
def test_sums_of_trace_norms_against_admm(form, rng):
    """`|W - A|^2 / 2 + tau sum |W_[n]|_*`: subgradient steps, and ADMM in plain NumPy."""
    tau, a = 0.4, rng.normal(size=(3, 4, 5))
    ways = [(0, 1, 2), (1, 0, 2), (2, 0, 1)] if form == "tucker" else [(0, 1, 2), (0, 1, 2)]
    rows = [3, 4, 5] if form == "tucker" else [3, 12]

    def there(w, n):
        return w.transpose(ways[n]).reshape(rows[n], -1)

    def back(matrix, n):
        shape = [a.shape[axis] for axis in ways[n]]
        return matrix.reshape(shape).transpose(np.argsort(ways[n]))

    count, w = len(rows), a.copy()
    z, dual = [a.copy() for _ in rows], [np.zeros_like(a) for _ in rows]
    for _ in range(2000):
        w = (a + sum(zn - un for zn, un in zip(z, dual))) / (1 + count)
        for n in range(count):
            u, s, v = np.linalg.svd(there(w + dual[n], n), full_matrices=False)
            z[n] = back(u @ np.diag(np.maximum(s - tau, 0)) @ v, n)
            dual[n] = dual[n] + w - z[n]

    def objective(w):
        norms = sum(nuclear(there(w, n)) for n in range(count))
        return np.sum((w - a) ** 2) / 2 + tau * norms

    norm, own = TraceNorm(tau, form), a.copy()
    for step in range(4000):
        own = own - (own - a + tau * norm.terms(own, np)[1]) / (step / 4 + 4)
    assert objective(own) == pytest.approx(objective(w), rel=1e-4)


def linear(penalty, tasks=4, **options):
    """T linear regressions as a network, and their data."""
    rng = np.random.default_rng(0)
    names = [f"t{t}" for t in range(tasks)]
    x = rng.normal(size=(30, 3)).astype("float32")
    slopes = np.outer([1.0, 2.0, 0.0], np.arange(1.0, tasks + 1))
    y = (x @ slopes + 0.5 * rng.normal(size=(30, tasks))).astype("float32")
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="fc")])
    model = multitask(
        backbone, names, shared_input=True, prior=penalty, verbose=False, **options
    )
    return model, x, {name: y[:, t : t + 1] for t, name in enumerate(names)}


def train(model, x, y, steps):
    """Full batches, one epoch of them: an epoch takes longer than its steps."""
    repeated = {task: np.tile(values, (steps, 1)) for task, values in y.items()}
    tiled = np.tile(x, (steps, 1))
    model.fit(tiled, repeated, batch_size=len(x), shuffle=False, verbose=0)


@pytest.mark.parametrize(("kind", "momentum"), [(TraceNorm, 0.8), (GroupLasso, 0.0)])
def test_training_ends_where_the_solver_does(kind, momentum, tmp_path):
    """`multitask(prior=...)` by proximal steps: the same objective, exact zeros; saved."""
    from dmtrl_keras import norm_regression

    model, x, y = linear(kind(1.5, proximal=True))
    eta = 0.05 * (1 - momentum)
    model.compile(ProximalOptimizer(keras.optimizers.SGD(eta, momentum)), "mse")
    train(model, x, y, 400)
    expected = norm_regression(dict.fromkeys(y, x), y, kind(1.5))
    found = model.evaluate(x, y, batch_size=30, verbose=0, return_dict=True)["loss"]
    assert found == pytest.approx(expected.objective, rel=1e-4)
    kernel = ops.convert_to_numpy(model.get_layer("fc").kernel)[:, 0]
    np.testing.assert_allclose(kernel, expected.kernel, atol=5e-3)
    assert np.linalg.matrix_rank(kernel, 1e-4) == np.linalg.matrix_rank(expected.kernel)
    assert np.array_equal(kernel == 0, expected.kernel == 0) or kind is TraceNorm
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, ProximalOptimizer)
    regularizer = loaded.get_layer("fc").kernel_regularizer
    assert regularizer.get_config() == kind(1.5, proximal=True).get_config()
    train(loaded, x, y, 2)
    again = ops.convert_to_numpy(loaded.get_layer("fc").kernel)[:, 0]
    np.testing.assert_allclose(again, kernel, atol=1e-3)


def test_a_gradient_gets_near():
    """Without proximal steps, any optimizer: a small third row, and not zero."""
    model, x, y = linear(GroupLasso(1.5))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    train(model, x, y, 200)
    rows = np.linalg.norm(ops.convert_to_numpy(model.get_layer("fc").kernel)[:, 0], axis=1)
    assert 0 < rows[2] < 0.1 < rows[0]


@pytest.mark.filterwarnings("ignore:multitask. the factors have")
def test_penalties_of_factors(tmp_path):
    """GO-MTL: LAF with L1 on S, exact zeros by proximal steps; RMTL: a sum of parts."""
    sparse = {"task_matrix": GroupLasso(0.8, "entry", proximal=True), "latent": "l2"}
    robust = [TraceNorm(0.5, proximal=True), GroupLasso(3.0, "task", proximal=True)]
    for sharing in (LAF(2, factor_regularizers=sparse), Parts(robust)):
        model, x, y = linear(None, sharing=sharing)
        layer = model.get_layer("fc")
        if "latent" in layer.factors:
            rng = np.random.default_rng(0)
            layer.factors["latent"].assign(rng.normal(size=layer.factors["latent"].shape))
        model.compile(ProximalOptimizer(keras.optimizers.SGD(0.01)), "mse")
        first = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
        train(model, x, y, 100)
        assert model.evaluate(x, y, verbose=0, return_dict=True)["loss"] < first
        name = "task_matrix" if "latent" in layer.factors else "part_2"
        values = ops.convert_to_numpy(layer.factors[name])
        assert np.any(values == 0) and (np.any(values != 0) or name == "part_2")
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras").get_layer("fc")
        kept = loaded.sharing.factor_regularizers
        assert list(kept) == list(layer.sharing.factor_regularizers)
        ours = layer.sharing.factor_regularizers[name].get_config()
        assert kept[name].get_config() == ours
        assert loaded.factors[name].regularizer.proximal


def test_both_on_the_first_factor():
    """A penalty on the composed kernel beside that of the factor it hangs on."""
    options = {"factor_regularizers": {"latent": GroupLasso(1.0, "entry")}, "rank": 2}
    layer = LAFDense(2, tasks=3, kernel_regularizer=TraceNorm(2.0), **options)
    layer.build((None, 9))
    latent, kernel = (
        ops.convert_to_numpy(v) for v in (layer.factors["latent"], layer.kernel)
    )
    expected = np.abs(latent).sum() + 2 * nuclear(kernel.reshape(-1, 3))
    assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)


def test_refusals():
    """What would do nothing, or something else, is refused with what to do."""
    with pytest.raises(ValueError, match="`optimizer` must be a keras"):
        ProximalOptimizer(keras.optimizers.Adam())
    model, x, y = linear(TraceNorm(0.1, proximal=True))
    with pytest.raises(ValueError, match="without which regularizers with `proximal=True`"):
        model.compile("adam", "mse")
    plain, _, _ = linear(TraceNorm(0.1))
    plain.compile(ProximalOptimizer(keras.optimizers.SGD()), "mse")
    with pytest.raises(ValueError, match="expected a trainable variable with a"):
        plain.fit(x, y, verbose=0)
    proximal = {"kernel_regularizer": TraceNorm(0.1, proximal=True)}
    with pytest.raises(ValueError, match="needs a kernel that is a variable"):
        TaskConv2D(2, 2, 2, sharing="tucker", **proximal).build((None, 4, 4, 4))
    with pytest.raises(ValueError, match="TraceNorm: `proximal` must be False with form="):
        TraceNorm(0.1, "tucker", proximal=True)
    with pytest.raises(ValueError, match=r"a kernel \(2, 3, 4\) gives 3 matrices"):
        TraceNorm(0.1, "tucker").proximal_step(np.ones((2, 3, 4)), 0.1, np)
    with pytest.raises(ValueError, match=r"regularizers of the factors \['latent', "):
        layer = TaskDense(2, 2, sharing=LAF(2, factor_regularizers={"core": "l2"}))
        layer.build((None, 4))
    with pytest.raises(ValueError, match="`between` must be a positive number, at most"):
        ClusteredTasks(1.0, between=2.0)
    with pytest.raises(ValueError, match="prior` must be a regularizer of the tasks' kern"):
        linear(keras.regularizers.L2(0.1))
