"""MTAL's similar kernels: a plain loop over tasks, kernels and pairs, and properties."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy import special

from dmtrl_keras import kernel_sharing_ratio
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.layers import (
    SimilarKernelConv,
    SimilarKernelConv1D,
    SimilarKernelConv2D,
    SimilarKernelConv3D,
    TaskConv2D,
    TaskDense,
)
from dmtrl_keras.mtal import similarity as similar_kernels
from dmtrl_keras.mtal.similarity import aggregate_similar_kernels
from dmtrl_keras.parameterizations import SimilarKernels
from dmtrl_keras.testing import check_layer

SHAPE = (2, 3, 2, 5)


def draw(rng, tasks, noise=1.0, shape=SHAPE):
    """Kernels of T tasks around common ones, so that all thresholds find some pairs."""
    common = rng.normal(size=(*shape, 1))
    kernel = common + noise * rng.normal(size=(*shape, tasks))
    return kernel.astype("float32")


def plain_loop(
    kernel, threshold, weights, pairs="all", groups=None, gradient=None, kind="filter"
):
    """Eq. 3-6 by loops over tasks, kernels and pairs; and the gradient's way back.

    Returns:
        `(aggregated, gradient of the kernel)`, for the sum of `gradient * aggregated`.
    """
    kernel = kernel.astype("float64")
    if kind == "slice":
        *window, inputs, outputs, tasks = kernel.shape
        flat = (*window, inputs * outputs, tasks)
        gradient = None if gradient is None else gradient.reshape(flat)
        found = plain_loop(
            kernel.reshape(flat), threshold, weights, pairs, groups, gradient
        )
        return tuple(x.reshape(kernel.shape) for x in found)
    *_, outputs, tasks = kernel.shape
    gradient = np.zeros_like(kernel) if gradient is None else gradient
    result, back = np.empty_like(kernel), np.zeros_like(kernel)
    for i in range(tasks):
        for a in range(outputs):
            own = kernel[..., a, i]
            bank = []
            for j in range(tasks):
                if i == j or (groups and not any({i, j} <= set(g) for g in groups)):
                    continue
                for b in range(outputs) if pairs == "all" else [a]:
                    other = kernel[..., b, j]
                    cosine = np.vdot(own, other)
                    cosine = cosine / np.linalg.norm(own) / np.linalg.norm(other)
                    if cosine >= threshold:
                        bank.append((j, b))
            if not bank:
                result[..., a, i] = own
                back[..., a, i] += gradient[..., a, i]
                continue
            aggregates = []
            for j, b in bank:
                other = kernel[..., b, j]
                aggregates.append(weights[i, j] * own + weights[j, i] * other)
                share = gradient[..., a, i] / len(bank)
                back[..., a, i] += weights[i, j] * share
                back[..., b, j] += weights[j, i] * share
            result[..., a, i] = sum(aggregates) / len(bank)
    return result, back


def random_weights(rng, tasks):
    """A matrix of phi with `phi_ij + phi_ji = 1`."""
    upper = np.triu(rng.uniform(size=(tasks, tasks)), 1)
    lower = np.tril(1 - upper.T, -1)
    return upper + lower


@pytest.mark.parametrize("kind", similar_kernels.KINDS)
@pytest.mark.parametrize("pairs", similar_kernels.PAIRINGS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.55, 0.9])
def test_equals_a_plain_loop(threshold, tasks, pairs, kind, rng):
    """Values and gradients."""
    kernel = draw(rng, tasks)
    weights = random_weights(rng, tasks)
    sharing = SimilarKernels(threshold, weights, pairs, kernels=kind)
    gradient = rng.normal(size=kernel.shape).astype("float32")
    expected, back = plain_loop(
        kernel, threshold, weights, pairs, gradient=gradient, kind=kind
    )

    def aggregated(x):
        composed = sharing.compose({"kernel": x}, tasks)
        return ops.moveaxis(composed, 0, -1)

    actual = ops.convert_to_numpy(aggregated(ops.convert_to_tensor(kernel)))
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    if tasks > 1 and threshold < 0.5:
        assert not np.allclose(expected, kernel), "no pair passes: nothing is tested"
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are compared on TensorFlow")
    tf = tensorflow()
    variable = tf.Variable(kernel)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(aggregated(variable) * gradient)
    np.testing.assert_allclose(tape.gradient(loss, variable), back, atol=1e-5)


@pytest.mark.parametrize("kind", similar_kernels.KINDS)
@pytest.mark.parametrize("pairs", similar_kernels.PAIRINGS)
@pytest.mark.parametrize("weights", ["matrix", "learned"])
@pytest.mark.parametrize("threshold", [0.8, 0.3])
def test_training_equals_the_loop(threshold, weights, pairs, kind, rng):
    """By lists of partners, and by the matrix where they are too long: also gradients."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are compared on TensorFlow")
    tf = tensorflow()
    tasks, shape = 3, (3, 4, 30) if kind == "filter" else (3, 4, 2, 15)
    kernel = draw(rng, tasks, shape=shape)
    logits = rng.normal(size=(tasks, tasks)).astype("float32")
    phi = 1 / (1 + np.exp(logits.T - logits))
    phis = phi if weights == "matrix" else "learned"
    sharing = SimilarKernels(threshold, phis, pairs, kernels=kind)
    found = sharing.select(tf.constant(kernel), 0)
    assert int(ops.sum(ops.cast(found["selection"], "int32"))) > 10
    if pairs == "index":
        assert list(found) == ["selection"]
    else:
        assert found["partners"].shape[1] == 4
        assert (int(ops.max(found["counts"])) <= 4) == (threshold == 0.8)
    gradient = rng.normal(size=kernel.shape).astype("float32")
    expected, back = plain_loop(kernel, threshold, phi, pairs, gradient=gradient, kind=kind)
    variables = {"kernel": tf.Variable(kernel)}
    if weights == "learned":
        variables["logits"] = tf.Variable(logits)
    results = []
    for factors in (found, {"selection": found["selection"]}):
        with tf.GradientTape() as tape:
            composed = sharing.compose(
                {n: tf.convert_to_tensor(v) for n, v in variables.items()} | factors, tasks
            )
            loss = tf.reduce_sum(ops.moveaxis(composed, 0, -1) * gradient)
        actual = np.moveaxis(ops.convert_to_numpy(composed), 0, -1)
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        results.append(tape.gradient(loss, list(variables.values())))
        np.testing.assert_allclose(results[-1][0], back, atol=1e-5)
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("pairs", similar_kernels.PAIRINGS)
def test_threshold_above_one_is_independent(pairs, rng):
    """Nothing is shared, whatever the kernels, in the function and by a schedule."""
    kernel = draw(rng, 3, noise=0)
    actual = aggregate_similar_kernels(kernel, 1.01, pairs=pairs)
    np.testing.assert_array_equal(ops.convert_to_numpy(actual), kernel)
    never = keras.optimizers.schedules.PiecewiseConstantDecay([10], [1.01, 0.5])
    layer = TaskDense(4, 3, sharing=SimilarKernels(never, pairs=pairs, kernels="filter"))
    layer.build((None, 9))
    np.testing.assert_array_equal(layer.kernel, layer.factors["kernel"])


@pytest.mark.parametrize("weights", [0.5, "learned"])
def test_identical_tasks_stay_identical(weights, rng):
    """Equal kernels, equal inputs and labels: equal after training."""
    layer = SimilarKernelConv2D(
        4, 3, 3, threshold=0.2, weights=weights, shared_input=True, common_draw=True
    )
    model = keras.Sequential([keras.Input((6, 6, 2)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = rng.normal(size=(16, 6, 6, 2))
    y = np.tile(rng.normal(size=(16, 4, 4, 4)), 3)
    before = ops.convert_to_numpy(layer.kernel)
    model.fit(x, y, epochs=3, verbose=0)
    kernel = ops.convert_to_numpy(layer.kernel)
    assert np.abs(kernel - before).max() > 1e-3
    np.testing.assert_allclose(kernel, np.repeat(kernel[..., :1], 3, -1), atol=1e-5)


@pytest.mark.parametrize("kind", similar_kernels.KINDS)
def test_permuting_tasks(kind, rng):
    """Tasks in another order give the same kernels in that order."""
    kernel, weights = draw(rng, 4), random_weights(rng, 4)
    order = [2, 0, 3, 1]
    a = aggregate_similar_kernels(kernel, 0.3, weights, kind=kind)
    theirs = weights[np.ix_(order, order)]
    b = aggregate_similar_kernels(kernel[..., order], 0.3, theirs, kind=kind)
    a, b = map(ops.convert_to_numpy, (a, b))
    np.testing.assert_allclose(a[..., order], b, atol=1e-5)
    assert not np.allclose(a, kernel)


def test_rescaling(rng):
    """Cosines ignore the scale of kernels; a kernel of zeros has no similar ones."""
    kernel = draw(rng, 3)
    a = ops.convert_to_numpy(aggregate_similar_kernels(kernel, 0.3))
    b = ops.convert_to_numpy(aggregate_similar_kernels(1e-3 * kernel, 0.3))
    np.testing.assert_allclose(b, 1e-3 * a, rtol=1e-4, atol=1e-8)
    kernel[..., 0, 0] = 0  # All slices of a filter.
    c = ops.convert_to_numpy(aggregate_similar_kernels(kernel, 0.3, pairs="index"))
    assert np.all(c[..., 0, 0] == 0) and np.all(np.isfinite(c))


def test_related_groups(rng):
    """MTAL_R: only the tasks of a group share; the task matrix shows it."""
    kernel, weights = draw(rng, 4), np.full((4, 4), 0.5)
    groups = [[0, 2], [1, 3]]
    actual = aggregate_similar_kernels(kernel, 0.2, weights, related=groups, kind="filter")
    expected, _ = plain_loop(kernel, 0.2, weights, groups=groups)
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, atol=1e-5)
    sharing = SimilarKernels(0.2, related=groups, kernels="filter")
    matrix = sharing.task_matrix({"kernel": ops.convert_to_tensor(kernel)}, 4)
    matrix = ops.convert_to_numpy(matrix)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, atol=1e-6)
    strangers = ~similar_kernels.related_tasks(4, groups) & ~np.eye(4, dtype=bool)
    assert np.all(matrix[strangers] == 0) and np.all(matrix[~strangers] > 0)


def test_only_training_chooses(rng):
    """Every `update_every` steps, at the threshold of the schedule; never elsewhere."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([5], [0.9, -1.0])
    sharing = SimilarKernels(schedule, pairs="all", update_every=3)
    layer = TaskDense(4, 2, sharing=sharing, shared_input=True, common_draw=False)
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = rng.normal(size=(4, 5)), rng.normal(size=(4, 8))
    counts = []
    for _ in range(8):
        model.fit(x, y, verbose=0)
        before = ops.convert_to_numpy(layer.selection._chosen["selection"])
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
        after = ops.convert_to_numpy(layer.selection._chosen["selection"])
        np.testing.assert_array_equal(before, after)
        counts.append(int(after.astype(int).sum()))
    # Steps 0, 3 and 6 choose; from step 6 on, every pair of the two tasks passes.
    assert counts == [counts[0]] * 6 + [2 * 4 * 4] * 2
    assert counts[0] < 32
    layer.factors["kernel"].assign(ops.ones((5, 4, 2)))
    layer.selection.refresh()
    assert int(ops.sum(ops.cast(layer.selection.tensors()["selection"], "int32"))) == 32


@pytest.mark.parametrize("weights", [0.5, "learned"])
def test_modes_of_training(weights, rng):
    """Compiled by XLA, several steps at once, and in mixed precision: the same losses."""
    x = rng.normal(size=(16, 6, 6, 6)).astype("float32")
    y = rng.normal(size=(16, 4, 4, 60)).astype("float32")
    losses = []
    for dtype, jit, steps in (
        ("float32", "auto", 1),
        ("float32", True, 1),
        ("float32", "auto", 2),
        ("mixed_bfloat16", "auto", 1),
    ):
        if steps > 1 and keras.backend.backend() == "torch":
            continue  # Keras has it on the other backends.
        keras.utils.set_random_seed(0)
        layer = SimilarKernelConv2D(
            20, 3, 3, threshold=0.3, weights=weights, common_draw=False, dtype=dtype
        )
        model = keras.Sequential([keras.Input((6, 6, 6)), layer])
        sgd = keras.optimizers.SGD(0.1)
        model.compile(sgd, "mse", jit_compile=jit, steps_per_execution=steps)
        history = model.fit(x, y, batch_size=4, verbose=0, shuffle=False).history
        losses.append(history["loss"][0])
        assert int(layer.selection.step) == 4
    np.testing.assert_allclose(losses, losses[0], rtol=1e-3)


@pytest.mark.parametrize("kind", similar_kernels.KINDS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
def test_overwriting_equals_the_loop(tasks, kind, rng):
    """Algorithm 1: aggregated, each task by its own gradient, aggregated again."""
    kernel, phi = draw(rng, tasks, 1.5), random_weights(rng, tasks)
    sharing = SimilarKernels(0.4, phi, "index", kernels=kind, mode="overwrite")
    *window, inputs, outputs, _ = kernel.shape
    layer = TaskConv2D(outputs, window, tasks, sharing=sharing, use_bias=False)
    layer.build((None, 6, 6, inputs * tasks))
    variable = layer.factors["kernel"]
    assert list(layer.factors) == ["kernel"] and layer.kernel is variable

    def loop(kernel):
        return plain_loop(kernel, 0.4, phi, "index", kind=kind)[0]

    start = sharing.decompose(kernel)["kernel"]
    np.testing.assert_allclose(start, loop(kernel), atol=1e-5)
    variable.assign(start)
    gradient = rng.normal(size=kernel.shape).astype("float32")
    sgd = keras.optimizers.SGD(0.5)
    for _ in range(2):
        expected = loop(ops.convert_to_numpy(variable) - 0.5 * gradient)
        sgd.apply([ops.convert_to_tensor(gradient)], [variable])
        np.testing.assert_allclose(variable, expected, atol=1e-5)
    if tasks > 1:
        assert not np.allclose(expected, kernel - gradient, atol=0.01)


def test_overwriting_separates_the_gradients(rng):
    """A pair: equal gradients with the aggregate as a function, own ones if overwritten."""
    x = rng.normal(size=(8, 5, 5, 1)).astype("float32")
    y = rng.normal(size=(8, 3, 3, 2)).astype("float32")
    between = {}
    for mode in ("forward", "overwrite"):
        sharing = SimilarKernels(0.4, mode=mode)
        layer = TaskConv2D(1, 3, 2, shared_input=True, sharing=sharing, common_draw=False)
        model = keras.Sequential([keras.Input((5, 5, 1)), layer])
        kernel = np.stack([np.ones((3, 3, 1, 1)), np.ones((3, 3, 1, 1))], axis=-1)
        kernel[0, 0, 0, 0, 0] = 1.5
        layer.factors["kernel"].assign(kernel)
        if mode == "forward":
            layer.selection.refresh()
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, y, verbose=0)
        found = ops.convert_to_numpy(layer.factors["kernel"])
        between[mode] = np.squeeze(found[..., 0] - found[..., 1])
    expected = np.zeros((3, 3))
    expected[0, 0] = 0.5
    np.testing.assert_allclose(between["forward"], expected, atol=1e-6)
    np.testing.assert_allclose(between["overwrite"], 0, atol=1e-6)


@pytest.mark.skipif(keras.config.backend() == "jax", reason="refused, see the next test")
def test_overwriting_now_and_then(rng):
    """Every `update_every` steps, at the threshold of the schedule."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([5], [1.5, -1.0])
    sharing = SimilarKernels(schedule, update_every=3, mode="overwrite")
    layer = TaskConv2D(2, 3, 2, shared_input=True, sharing=sharing)
    model = keras.Sequential([keras.Input((3, 3, 2)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    start, equal = ops.convert_to_numpy(layer.kernel), []
    for _ in range(7):
        model.fit(rng.normal(size=(4, 3, 3, 2)), np.zeros((4, 1, 1, 4)), verbose=0)
        kernel = ops.convert_to_numpy(layer.kernel)
        equal.append(np.allclose(kernel[..., 0], kernel[..., 1]))
        assert equal[-1] or np.array_equal(kernel, start)
    assert equal == [False] * 5 + [True] * 2
    assert int(layer.selection.step) == 7


def test_overwriting_refused():
    """Learned weights; on JAX, what needs the number of the step."""
    with pytest.raises(ValueError, match=r"no gradient.*weights='learned'"):
        SimilarKernels(weights="learned", mode="overwrite")
    if keras.config.backend() == "jax":
        layer = SimilarKernelConv2D(2, 3, 2, mode="overwrite", update_every=2)
        with pytest.raises(ValueError, match="update_every=2"):
            layer.build((None, 5, 5, 4))
    layer = SimilarKernelConv2D(64, 3, 3, pairs="all", name="many")
    with pytest.raises(ValueError, match=r"'many'.*12,288 kernels \(slices.*at most 8,192"):
        layer.build((None, 8, 8, 3 * 64))


@pytest.mark.parametrize("size", [3, 5])
def test_chance_of_similar_slices(size, rng):
    """Random slices pass by the area of a cap, in closed form; the share falls with it."""
    found = []
    for threshold in (0.1, 0.4, 0.55, 0.9):
        layer = SimilarKernelConv2D(
            64, size, 2, threshold=threshold, kernel_initializer="random_normal"
        )
        model = keras.Sequential([keras.Input((size, size, 2 * 32)), layer])
        row, _ = kernel_sharing_ratio(model, verbose=False)
        cap = (size**2 - 1) / 2
        closed = special.betainc(cap, 0.5, 1 - threshold**2) / 2
        assert row.chance == pytest.approx(closed, rel=1e-9) and row.pairs == 32 * 64
        spread = np.sqrt(closed * (1 - closed) / row.pairs)
        assert abs(row.pair_ratio - closed) <= 4 * spread + 1e-9
        assert row.ratio == pytest.approx(row.pair_ratio)
        found.append(row.pair_ratio)
    assert found == sorted(found, reverse=True) and found[0] > 0.3


@pytest.mark.parametrize("dimensions", [2, 3, 9, 27, 576])
def test_chance_is_the_incomplete_beta_function(dimensions):
    """Also below zero, and for a single number."""
    for threshold in (0.0, 0.1, 0.4, 0.9, 1.0):
        closed = special.betainc((dimensions - 1) / 2, 0.5, 1 - threshold**2) / 2
        chance = similar_kernels.chance_of_similar(threshold, dimensions)
        assert chance == pytest.approx(closed, rel=1e-9, abs=1e-12)
        other = similar_kernels.chance_of_similar(-threshold, dimensions)
        assert other == pytest.approx(1 - closed)
    assert similar_kernels.chance_of_similar(0.4, 1) == 0.5
    for bad in ((1.5, 9), (0.4, 0), (0.4, 2.5)):
        with pytest.raises(ValueError, match=r"chance_of_similar.*Received"):
            similar_kernels.chance_of_similar(*bad)


def test_slices_of_a_single_entry_are_filters(rng):
    """In 1 x 1 convolutions and dense layers numbers would be compared."""
    kernel = draw(rng, 3, shape=(1, 1, 8, 4))
    slices = aggregate_similar_kernels(kernel, 0.3)
    filters = aggregate_similar_kernels(kernel, 0.3, kind="filter", pairs="index")
    np.testing.assert_array_equal(slices, filters)
    assert similar_kernels.compared_shape((8, 4, 3), "slice") == (8, 4, 3)
    assert similar_kernels.compared_shape((3, 3, 8, 4, 2), "slice") == (3, 3, 1, 32, 2)


def test_learned_weights_are_trained(rng):
    """They move, stay between 0 and 1, and sum to 1 for each pair."""
    layer = SimilarKernelConv1D(3, 2, 3, threshold=0.1, weights="learned")
    model = keras.Sequential([keras.Input((6, 6)), layer])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(rng.normal(size=(8, 6, 6)), rng.normal(size=(8, 5, 9)), epochs=3, verbose=0)
    weights = ops.convert_to_numpy(layer.sharing.task_weights(layer.stacked.tensors()))
    np.testing.assert_allclose(weights + weights.T, 1, atol=1e-6)
    assert np.abs(weights - 0.5).max() > 0.01


@pytest.mark.parametrize(
    ("cls", "arguments", "shape"),
    [
        (SimilarKernelConv1D, {"pairs": "index"}, (6, 6)),
        (SimilarKernelConv2D, {"weights": "learned", "update_every": 2}, (5, 5, 6)),
        (SimilarKernelConv2D, {"related": [[0, 2]]}, (5, 5, 6)),
        (SimilarKernelConv2D, {"mode": "overwrite"}, (5, 5, 6)),
        (SimilarKernelConv2D, {"kernels": "filter"}, (5, 5, 6)),
        (SimilarKernelConv3D, {"threshold": "unrelated"}, (4, 4, 4, 6)),
    ],
)
def test_promises(cls, arguments, shape, rng):
    """Saving, export, mixed precision, unknown batch size: `check_layer`."""
    arguments = {"threshold": 0.1} | arguments
    x = rng.normal(size=(2, *shape)).astype("float32")
    check_layer(lambda **k: cls(5, 2, 3, common_draw=False, **arguments, **k), x)


def test_promises_with_many_kernels(rng):
    """The same where kernels have more partners than are listed."""
    x = rng.normal(size=(2, 4, 4, 3)).astype("float32")
    check_layer(lambda **k: SimilarKernelConv(90, 3, 3, kernels="filter", **k), x)


def test_schedule_survives_a_file(tmp_path, rng):
    """The threshold's schedule, the step and the choice are in a `.keras` file."""
    schedule = keras.optimizers.schedules.PolynomialDecay(0.9, 10, 0.1)
    layer = SimilarKernelConv2D(3, 2, 2, threshold=schedule, common_draw=False)
    model = keras.Sequential([keras.Input((4, 4, 4)), layer])
    model.compile("sgd", "mse")
    x = rng.normal(size=(8, 4, 4, 4))
    model.fit(x, np.zeros((8, 3, 3, 6)), batch_size=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    (copy,) = loaded.layers
    assert int(copy.selection.step) == 4
    assert float(copy.sharing.threshold_at(5)) == pytest.approx(0.5)


@pytest.mark.parametrize("threshold", [0.1, 0.55, 1.0])
def test_pairs_of_equal_index(threshold, rng):
    """As the stacked kernel lies, and by rows: the same pairs, of any scale."""
    kernel = draw(rng, 3, shape=(9, 40)) * 10.0 ** rng.integers(-30, 30, (1, 40, 1))
    kernel[:, 0, 0], kernel[:, 1] = 0, kernel[:, 1, :1]
    kernel = ops.convert_to_tensor(kernel.astype("float32"))
    related = similar_kernels.related_tasks(3, [[0, 1], [1, 2]])
    rows = similar_kernels.comparable(similar_kernels.kernel_rows(kernel), 3, "index")
    expected = similar_kernels.similar_pairs(rows, threshold, related)
    actual = similar_kernels.similar_by_task(kernel, threshold, related)
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, (actual, expected)))
    assert ops.convert_to_numpy(actual)[1, 0].tolist() == [False, True, False]


def test_files_with_lists_of_equal_index(rng):
    """Version 0.1 kept the partners of equal index as lists, too."""
    layer = SimilarKernelConv2D(4, 3, 2, kernels="filter", pairs="index", threshold=0.2)
    layer.build((None, 5, 5, 4))
    state = layer.selection
    chosen = rng.integers(2, size=state._chosen["selection"].shape).astype(bool)
    lists = np.zeros((8, 1), "int32"), np.zeros(8, "int32")
    saved = (chosen, *lists, np.int32(7))
    state.load_own_variables({str(n): value for n, value in enumerate(saved)})
    np.testing.assert_array_equal(state._chosen["selection"], chosen)
    assert int(state.step) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.2}, r"threshold=1\.2"),
        ({"threshold": -0.1}, r"in \[0, 1\]"),
        ({"threshold": "near"}, "'related', 'unrelated'"),
        ({"weights": 0.3}, "phi_ij"),
        ({"weights": [[0, 0.3], [0.3, 0]]}, "phi_ij"),
        ({"pairs": "some"}, '"all" or "index"'),
        ({"kernels": "channel"}, '"slice" or "filter"'),
        ({"mode": "own"}, '"forward" or "overwrite"'),
        ({"update_every": 0}, "positive int"),
        ({"related": [[1]]}, "two or more different"),
        ({"related": [[1, 1]]}, "two or more different"),
        ({"related": [["a", 1]]}, "numbers, or names"),
        ({"related": "ab"}, "list of groups"),
    ],
)
def test_malformed_arguments(arguments, message):
    """Say what was received and what was expected."""
    with pytest.raises(ValueError, match=message):
        SimilarKernels(**arguments)


def test_errors_name_the_layer():
    """Groups of tasks that there aren't, a single task, matrices for other tasks."""
    for arguments in (
        {"related": [[0, 3]], "tasks": 3},
        {"related": [[0, 1]], "tasks": 1},
        {"related": [["a", "b"]], "tasks": 2},
        {"weights": [[0, 0.3], [0.7, 0]], "tasks": 3},
    ):
        layer = SimilarKernelConv2D(2, 3, name="block1", **arguments)
        with pytest.raises(ValueError, match="SimilarKernelConv2D 'block1'"):
            layer.build((None, 8, 8, 2 * arguments["tasks"]))
    with pytest.raises(ValueError, match="one shape"):
        aggregate_similar_kernels([np.ones((3, 3, 2, 4)), np.ones((3, 3, 1, 4))], 0.4)


def test_other_layers(rng):
    """Any layer with T kernels takes it; here a dense one equals the function."""
    layer = TaskDense(6, 3, sharing=SimilarKernels(0.3), common_draw=False)
    layer.build((None, 12))
    expected = aggregate_similar_kernels(layer.factors["kernel"], 0.3)
    np.testing.assert_allclose(layer.kernel, expected, atol=1e-6)
    named = SimilarKernelConv2D(2, 3, 2)
    assert isinstance(named, TaskConv2D) and named.sharing.name == "similar"


def test_frozen_selection(rng):
    """Kernels that are not trained keep their pairs, and no step is counted."""
    layer = SimilarKernelConv2D(5, 3, tasks=2, threshold=0.3, common_draw=False)
    x = rng.normal(size=(1, 5, 5, 4)).astype("float32")
    layer(x, training=True)
    layer.trainable = False
    # Without a choice anew these kernels have other pairs than theirs.
    layer.factors["kernel"].assign(rng.normal(size=layer.factors["kernel"].shape))
    before = layer.selection.get_weights()
    layer(x, training=True)
    for old, new in zip(before, layer.selection.get_weights()):
        np.testing.assert_array_equal(old, new)
    layer.trainable = True
    layer(x, training=True)
    assert int(layer.selection.step) == 2
