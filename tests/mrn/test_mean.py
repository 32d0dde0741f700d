"""The mean of the tensor-normal prior: what the covariances see, and what is kept."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import ops
from scipy import optimize, stats

from dmtrl_keras import (
    ModeCovariance,
    MultiTaskModel,
    TensorNormalRegularizer,
    factorize,
    multitask,
    tensor_normal,
)
from dmtrl_keras.layers import TaskConv2D, TaskDense, TaskSplit, TensorNormalPrior
from dmtrl_keras.testing import check_layer

MRN = ("feature", "class", "task")


def numpy(x):
    """A tensor as an array."""
    return ops.convert_to_numpy(x)


def built(mean, modes="task", tasks=3, strength=0.3, **arguments):
    """A layer 5 -> 4 whose kernel has moved from its start."""
    epsilon = arguments.pop("epsilon", 0.05)
    regularizer = arguments.pop("regularizer", {})
    prior = TensorNormalRegularizer(
        strength, modes, epsilon=epsilon, mean=mean, **regularizer
    )
    layer = TaskDense(4, tasks, kernel_regularizer=prior, **arguments)
    layer.build((None, 5 * tasks))
    return layer


def moved(layer, rng, scale=0.3):
    """The start, and the kernel to which it was moved, in float64."""
    start = numpy(layer.kernel).astype("float64")
    kernel = start + scale * rng.normal(size=start.shape)
    layer.kernel.assign(kernel)
    return start, kernel


def train_steps(layer, steps=1):
    """Calls in training, without gradient steps."""
    for _ in range(steps):
        layer(np.zeros((1, 5 * layer.tasks), "float32"), training=True)


def whole(layer, modes):
    """The Kronecker product of the learned covariances, written out."""
    found = layer.prior.covariances
    parts = [
        found[mode].astype("float64") if mode in modes else np.eye(d)
        for mode, d in zip(MRN, layer.kernel.shape)
    ]
    return functools.reduce(np.kron, parts)


def least_squares(kernel, covariance):
    """The mean kernel of all tasks by generalized least squares, `(*kernel.shape)`."""
    design = np.kron(np.eye(kernel[..., 0].size), np.ones((kernel.shape[-1], 1)))
    inverse = np.linalg.inv(covariance)
    normal = design.T @ inverse
    common = np.linalg.solve(normal @ design, normal @ kernel.ravel())
    return (design @ common).reshape(kernel.shape)


def given():
    """A mean for all tasks."""
    return np.random.default_rng(1).normal(size=(5, 4, 1))


MEANS = ["zero", "start", "shared", "given"]


@pytest.mark.parametrize("modes", [("task",), MRN])
@pytest.mark.parametrize("name", MEANS)
def test_penalty_and_gradient_are_scipys(name, modes, rng):
    """The log density with the full Kronecker product, and its differences."""
    layer = built(given() if name == "given" else name, modes)
    start, kernel = moved(layer, rng)
    train_steps(layer, 2)
    covariance = whole(layer, modes)

    def penalty(flat):
        own = flat.reshape(kernel.shape)
        mean = {
            "zero": np.zeros_like(own),
            "start": start,
            "shared": least_squares(own, covariance),
            "given": np.broadcast_to(given(), own.shape),
        }[name]
        density = stats.multivariate_normal(mean.ravel(), covariance).logpdf(flat)
        return 0.3 * (-density - own.size / 2 * math.log(2 * math.pi))

    (found,) = layer.losses
    assert float(found) == pytest.approx(penalty(kernel.ravel()), rel=1e-4)
    if keras.config.backend() != "tensorflow":
        return
    from dmtrl_keras.ground.backend import tensorflow

    with tensorflow().GradientTape() as tape:
        (value,) = layer.losses
    gradient = numpy(tape.gradient(value, layer.kernel.value))
    # A quadratic function's central differences are exact but for rounding.
    expected = optimize.approx_fprime(kernel.ravel(), penalty, 1e-6)
    np.testing.assert_allclose(gradient.ravel(), expected, rtol=1e-2, atol=2e-3)
    if name == "shared":
        np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-4)


@pytest.mark.parametrize("name", ["zero", "start", "given"])
def test_resting_kernel_converges_to_flip_flop_of_the_deviations(name, rng):
    """Every covariance moves, to the maximum likelihood of what was learned."""
    layer = built(given() if name == "given" else name, MRN)
    start, kernel = moved(layer, rng, 1.0)
    train_steps(layer, 40)
    mean = {"zero": 0 * kernel, "start": start, "given": given() + 0 * kernel}[name]
    np.testing.assert_allclose(layer.prior.mean, mean, atol=1e-6)
    fitted = tensor_normal.flip_flop(kernel[None], mean=mean, ridge=0.05)
    assert fitted.converged
    for mode, expected in zip(MRN, fitted.covariances):
        expected = expected * len(expected) / np.trace(expected)
        found = layer.prior.covariances[mode]
        assert np.abs(found - np.eye(len(found))).max() > 0.05
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("each", [None, "class"])
def test_shared_mean_in_loops(each, rng):
    """The update from the plain mean of the tasks, its lost direction restored."""
    layer = built("shared", regularizer={"each": each})
    _, kernel = moved(layer, rng, 1.0)
    train_steps(layer, 3)
    expected = []
    for part in np.moveaxis(kernel, 1, 0)[:, :, None] if each else [kernel]:
        deviations = (part - part.mean(axis=-1, keepdims=True)).reshape(-1, 3)
        matrix = sum(np.outer(row, row) for row in deviations) / len(deviations)
        matrix = matrix + np.trace(matrix) / (3 * 2) * np.ones((3, 3))
        matrix = matrix + 0.05 * np.trace(matrix) / 3 * np.eye(3)
        expected.append(matrix * 3 / np.trace(matrix))
    found = layer.prior.covariances["task"]
    np.testing.assert_allclose(found, np.squeeze(expected), rtol=1e-3, atol=1e-4)
    average = np.broadcast_to(kernel.mean(axis=-1, keepdims=True), kernel.shape)
    np.testing.assert_allclose(layer.prior.mean, average, rtol=1e-3, atol=1e-5)


def test_shared_mean_with_all_covariances_in_loops(rng):
    """Sweeps with inverses and Kronecker products written out; then it rests."""
    layer = built("shared", MRN)
    _, kernel = moved(layer, rng, 1.0)
    covariances = [np.eye(size) for size in kernel.shape]
    for _ in range(40):
        train_steps(layer)
        before = [matrix.copy() for matrix in covariances]
        own = kernel - least_squares(kernel, functools.reduce(np.kron, covariances))
        for axis, size in enumerate(kernel.shape):
            rest = [matrix for k, matrix in enumerate(covariances) if k != axis]
            unfolded = np.moveaxis(own, axis, 0).reshape(size, -1)
            new = unfolded @ np.linalg.inv(np.kron(*rest)) @ unfolded.T
            if axis == 2:
                new = new + np.trace(new) / (size * (size - 1)) * np.ones((size, size))
            new = new + 0.05 * np.trace(new) / size * np.eye(size)
            covariances[axis] = new * size / np.trace(new)
        for mode, expected in zip(MRN, covariances):
            found = layer.prior.covariances[mode]
            np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)
    for matrix, last in zip(covariances, before):
        np.testing.assert_allclose(matrix, last, atol=1e-4)


def test_independent_deviations_have_no_correlation(rng):
    """Nor have those of two tasks, of which there is nothing to say."""
    for tasks, tolerance in ((4, 0.1), (2, 1e-4)):
        prior = TensorNormalRegularizer(mean="shared")
        layer = TaskDense(50, tasks, kernel_regularizer=prior)
        layer.build((None, 60 * tasks))
        layer.kernel.assign(rng.normal(size=(60, 50, tasks)) + 3)
        layer(np.zeros((1, 60 * tasks), "float32"), training=True)
        found = layer.prior.covariances["task"]
        np.testing.assert_allclose(found, np.eye(tasks), atol=tolerance)


def test_without_covariances_it_is_evgeniou_and_pontil(rng):
    """`strength / 2 sum_t |W_t - mean W|^2`."""
    layer = built("shared", regularizer={"update_every": None})
    _, kernel = moved(layer, rng)
    expected = 0.15 * np.sum((kernel - kernel.mean(axis=-1, keepdims=True)) ** 2)
    assert float(layer.losses[0]) == pytest.approx(expected, rel=1e-4)
    one = built("shared", MRN, tasks=1)
    moved(one, rng)
    train_steps(one, 2)
    np.testing.assert_allclose(one.prior.covariances["feature"], np.eye(5), atol=1e-5)


@pytest.mark.parametrize("mean", ["start", "shared"])
@pytest.mark.parametrize("tasks", [3, 7])
def test_a_common_draw_says_nothing(mean, tasks):
    """The first update gives identities; with a mean of zero, correlations of 1."""
    layer = built(mean, tasks=tasks)
    train_steps(layer, 2)
    found = layer.prior.covariances["task"]
    np.testing.assert_allclose(found, np.eye(tasks), atol=1e-6)
    layer = built("zero", tasks=tasks)
    train_steps(layer, 2)
    assert layer.prior.covariances["task"].min() > 0.9


def test_the_sign_of_a_relation_is_learned(rng):
    """One task is the opposite of the others; all start from one draw."""
    x = rng.normal(size=(200, 8)).astype("float32")
    truth = 3 * rng.normal(size=(8, 1))
    y = {name: sign * x @ truth for name, sign in zip("abc", (1, 1, -1))}
    for mean in ("start", "shared"):
        inputs = keras.Input((8,))
        prior = TensorNormalRegularizer(0.1, epsilon=0.01, mean=mean)
        layer = TaskDense(1, 3, shared_input=True, kernel_regularizer=prior)
        model = MultiTaskModel(inputs, TaskSplit(list("abc"))(layer(inputs)))
        model.compile(keras.optimizers.SGD(0.02), "mse")
        model.fit(x, y, batch_size=20, epochs=5, verbose=0)
        found = layer.prior.covariances["task"]
        assert found[0, 1] > 0.5 and found[0, 2] < -0.2


def test_one_covariance_of_two_layers(rng):
    """Each layer's deviations from its own mean, before they are added."""
    shared = ModeCovariance(epsilon=0.0, trace=None)
    x = keras.Input((5,))
    inputs, layers = x, []
    for first, mean in ((True, "start"), (False, "shared")):
        prior = TensorNormalRegularizer(task_covariance=shared, mean=mean)
        layers.append(TaskDense(4, 3, shared_input=first, kernel_regularizer=prior))
        x = layers[-1](x)
    model = keras.Model(inputs, x)
    (start, kernel), (_, other) = (moved(layer, rng) for layer in layers)
    first = (kernel - start).reshape(-1, 3)
    other = other.reshape(-1, 3)
    first, last = first.T @ first, 16 * np.eye(3)
    for _ in range(3):
        model(np.zeros((1, 5)), training=True)
        weights = np.linalg.inv((first + last) / (20 + 16)).sum(axis=0)
        deviations = other - (other @ weights / weights.sum())[:, None]
        last = deviations.T @ deviations
        last = last + np.trace(last) / 6
    expected = (first + last) / (20 + 16)
    np.testing.assert_allclose(shared.covariance, expected, rtol=1e-3, atol=1e-5)


# --- what is kept ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MEANS)
def test_layer_checks(name):
    """Saving, training, evaluation without a trace, mixed precision, XLA, export."""
    mean = given() if name == "given" else name
    prior = TensorNormalRegularizer(0.01, MRN, mean=mean)
    make = functools.partial(TaskDense, 4, 3, kernel_regularizer=prior)
    check_layer(make, np.ones((4, 15), "float32"))


def test_start_is_state(tmp_path):
    """It comes from the file, not from the new layer's draw; each layer has its own."""
    prior = TensorNormalRegularizer(0.1, mean="start")
    inputs = keras.Input((5,))
    x = TaskDense(4, 3, shared_input=True, kernel_regularizer=prior, name="fc7")(inputs)
    x = TaskDense(2, 3, kernel_regularizer=prior, name="fc8")(x)
    model = MultiTaskModel(inputs, TaskSplit(["a", "b", "c"])(x))
    starts = {name: numpy(model.get_layer(name).kernel) for name in ("fc7", "fc8")}
    model.compile(keras.optimizers.SGD(0.1), "mse")
    y = {name: np.ones((4, 2)) for name in "abc"}
    model.fit(np.ones((4, 5)), y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    shallow = factorize(model, "tucker", rank=0.9, layers=["fc7"], verbose=False)
    for copy in (model, loaded, shallow):
        for name, start in starts.items():
            layer = copy.get_layer(name)
            np.testing.assert_array_equal(layer.prior.mean, start)
            assert not np.array_equal(numpy(layer.kernel), start)
    frozen = model.get_layer("fc8")
    frozen.trainable = False
    model.fit(np.ones((4, 5)), y, verbose=0)
    np.testing.assert_array_equal(frozen.prior.mean, starts["fc8"])
    frozen.prior.restart()
    np.testing.assert_array_equal(frozen.prior.mean, numpy(frozen.kernel))
    zero = built("zero")
    with pytest.raises(ValueError, match=r"is for mean=.start.\. Received: mean=.zero."):
        zero.prior.restart()


def test_pretrained_kernels_are_the_start(rng):
    """Those of a backbone, composed ones, and of a layer that was built before."""
    inputs = keras.Input((5,))
    backbone = keras.Model(inputs, keras.layers.Dense(4, name="fc")(inputs))
    pretrained = numpy(backbone.get_layer("fc").kernel)
    prior = TensorNormalRegularizer(0.1, mean="start")
    for sharing in ("independent", "tucker"):
        model = multitask(backbone, 3, sharing, prior={"fc": prior}, heads=2, verbose=False)
        layer = model.get_layer("fc")
        expected = np.repeat(pretrained[..., None], 3, axis=-1)
        np.testing.assert_allclose(layer.prior.mean, expected, atol=1e-5)
    prior = TensorNormalRegularizer(modes="class", mean="start")
    wrapper = TensorNormalPrior(backbone.get_layer("fc"), prior)
    wrapper(np.ones((2, 5)))
    np.testing.assert_array_equal(wrapper.prior.mean, pretrained)
    images = TensorNormalRegularizer(mean="shared", each="class")
    layer = TaskConv2D(4, 2, 3, kernel_regularizer=images)
    layer.build((None, 5, 5, 6))
    assert layer.prior.mean.shape == (2, 2, 2, 4, 3)


def test_configuration():
    """Complete; what was saved before there was a mean has a mean of zero."""
    for mean in ("zero", "start", "shared", given()):
        config = TensorNormalRegularizer(mean=mean).get_config()
        again = TensorNormalRegularizer.from_config(config)
        assert again.get_config() == config
    del config["mean"]
    assert TensorNormalRegularizer.from_config(config).mean == "zero"


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        ("mean", r"`mean` must be one of .*'shared'.*mean='mean'"),
        (None, "or an array. Received: mean=None"),
        (0.5, "or an array.*mean=0.5"),
        ([np.nan], "`mean` must be finite"),
        (np.zeros((4, 5, 1)), r"TaskDense 'fc8'.*\(5, 4, 3\).*Received: \(4, 5, 1\)"),
        (np.full((5, 4, 1), 1e300), "TaskDense 'fc8'.*finite in float32"),
    ],
)
def test_bad_means(mean, message):
    """What was received, and whose it is."""
    with pytest.raises(ValueError, match=message):
        built(mean, name="fc8")


def test_no_tasks_to_share():
    """A plain layer has no task axis; and slices that are drawn one by one no mean."""
    prior = TensorNormalRegularizer(modes="class", mean="shared")
    with pytest.raises(ValueError, match="with a task axis that is not `each`"):
        TensorNormalPrior(keras.layers.Dense(3), prior).build((None, 4))
    with pytest.raises(ValueError, match="Received: each='task'"):
        built("shared", "class", regularizer={"each": "task"})
