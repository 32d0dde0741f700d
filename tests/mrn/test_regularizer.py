"""The tensor-normal prior as a regularizer: penalty, update, state, errors."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import (
    ModeCovariance,
    MultiTaskModel,
    TensorNormalRegularizer,
    factorize,
    mode_correlation,
    mode_covariance,
    multitask,
    relationship_network,
    single_task,
    task_correlation,
    task_covariance,
    tensor_normal,
)
from dmtrl_keras.layers import (
    TaskConv2D,
    TaskDense,
    TaskDepthwiseConv2D,
    TaskSplit,
    TensorNormalPrior,
    TuckerDense,
)
from dmtrl_keras.regularizers import mode_names
from dmtrl_keras.testing import check_layer

MRN = ("feature", "class", "task")


def numpy(x):
    """A tensor as an array."""
    return ops.convert_to_numpy(x)


def built(layer, channels):
    """A layer that was built for features."""
    layer.build((None, channels))
    return layer


def train_steps(layer, steps, channels):
    """Calls in training, without gradient steps."""
    for _ in range(steps):
        layer(np.zeros((1, channels), "float32"), training=True)


def loop_update(kernel, modes, covariances, epsilon, trace):
    """One sweep of DRN Eq. 5 and 13, with inverses and Kronecker products written out."""
    covariances = list(covariances)
    for mode in modes:
        rest = [matrix for k, matrix in enumerate(covariances) if k != mode]
        inverse = np.linalg.inv(functools.reduce(np.kron, rest, np.eye(1)))
        size = kernel.shape[mode]
        unfolded = np.moveaxis(kernel, mode, 0).reshape(size, -1)
        new = unfolded @ inverse @ unfolded.T / unfolded.shape[1]
        new = new + epsilon * np.trace(new) / size * np.eye(size)
        covariances[mode] = new * (trace or np.trace(new)) / np.trace(new)
    return covariances


def test_mode_names():
    """From the axes that Keras gives a kernel."""
    assert mode_names(3, True) == MRN
    assert mode_names(5, True) == ("height", "width", *MRN)
    assert mode_names(2, False) == ("feature", "class")
    assert mode_names(1, False) == ("axis_0",)


@pytest.mark.parametrize("modes", ["task", ("task", "class"), MRN])
def test_penalty_is_the_negative_log_density(modes, rng):
    """Half of the quadratic form plus the log-determinants, up to the constant."""
    modes = (modes,) if isinstance(modes, str) else modes
    prior = TensorNormalRegularizer(0.3, modes=modes)
    layer = built(TaskDense(3, 2, common_draw=False, kernel_regularizer=prior), 8)
    train_steps(layer, 3, 8)
    covariances = [layer.prior.covariances.get(mode) for mode in MRN]
    assert all((m is None) == (name not in modes) for m, name in zip(covariances, MRN))
    kernel = numpy(layer.kernel)
    density = float(tensor_normal.log_density(kernel, covariances))
    expected = 0.3 * (-density - kernel.size / 2 * math.log(2 * math.pi))
    (penalty,) = layer.losses
    assert float(penalty) == pytest.approx(expected, rel=1e-4)


def test_penalty_is_eq_11_with_plus(rng):
    """`tr(W_(3)^T S^-1 W_(3)) + D_in D_out ln|S|`, halved, for the task mode."""
    matrix = np.array([[1.0, 0.6], [0.6, 2.0]])
    prior = TensorNormalRegularizer(1.0, start={"task": matrix}, update_every=None)
    layer = built(TaskDense(3, 2, common_draw=False, kernel_regularizer=prior), 8)
    train_steps(layer, 2, 8)
    np.testing.assert_allclose(layer.prior.covariances["task"], matrix, rtol=1e-6)
    unfolded = numpy(layer.kernel).reshape(-1, 2).T
    form = np.trace(unfolded.T @ np.linalg.inv(matrix) @ unfolded)
    expected = (form + 12 * np.log(np.linalg.det(matrix))) / 2
    assert float(layer.losses[0]) == pytest.approx(expected, rel=1e-5)


def test_gradient_is_eq_12():
    """`S^-1 W_(3)`, folded: that of the penalty's quadratic form for every mode."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are taken with TensorFlow")
    from dmtrl_keras.ground.backend import tensorflow

    for modes in ("task", MRN):
        prior = TensorNormalRegularizer(0.3, modes=modes, epsilon=0.05)
        layer = built(TaskDense(4, 3, common_draw=False, kernel_regularizer=prior), 15)
        train_steps(layer, 2, 15)
        with tensorflow().GradientTape() as tape:
            (penalty,) = layer.losses
        found = tape.gradient(penalty, layer.kernel.value)
        covariances = [layer.prior.covariances.get(mode) for mode in MRN]
        whole = [np.eye(d) if m is None else m for m, d in zip(covariances, (5, 4, 3))]
        kernel = numpy(layer.kernel)
        inverse = np.linalg.inv(functools.reduce(np.kron, whole))
        expected = 0.3 * (inverse @ kernel.ravel()).reshape(kernel.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_identity_is_l2():
    """Without a learned covariance the prior is weight decay, as `L2(strength / 2)`."""
    prior = TensorNormalRegularizer(0.1, update_every=None)
    layer = built(TaskDense(3, 2, kernel_regularizer=prior), 8)
    expected = keras.regularizers.L2(0.05)(layer.kernel)
    assert float(layer.losses[0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("modes", ["task", MRN, ("class", "task")])
def test_update_is_the_formula(modes):
    """Eq. 5 and 13 written out, sweep by sweep, starting from identities."""
    modes = (modes,) if isinstance(modes, str) else modes
    prior = TensorNormalRegularizer(modes=modes, epsilon=0.05)
    layer = built(TaskDense(4, 3, common_draw=False, kernel_regularizer=prior), 15)
    kernel = numpy(layer.kernel).astype("float64")
    expected = [np.eye(d) for d in kernel.shape]
    axes = [MRN.index(mode) for mode in MRN if mode in modes]
    for _ in range(3):
        train_steps(layer, 1, 15)
        for axis in axes:
            size = kernel.shape[axis]
            expected = loop_update(kernel, [axis], expected, 0.05, size)
        for axis in axes:
            found = layer.prior.covariances[MRN[axis]]
            np.testing.assert_allclose(found, expected[axis], rtol=1e-3, atol=1e-5)


def test_epsilon_by_mode():
    """A number for each covariance."""
    epsilon = {"class": 0.5, "task": 0.01}
    prior = TensorNormalRegularizer(modes=["class", "task"], epsilon=epsilon)
    layer = built(TaskDense(4, 3, common_draw=False, kernel_regularizer=prior), 15)
    train_steps(layer, 1, 15)
    expected = [np.eye(5), np.eye(4), np.eye(3)]
    kernel = numpy(layer.kernel).astype("float64")
    for axis, own in ((1, 0.5), (2, 0.01)):
        expected = loop_update(kernel, [axis], expected, own, kernel.shape[axis])
    for mode, matrix in zip(("class", "task"), expected[1:]):
        np.testing.assert_allclose(layer.prior.covariances[mode], matrix, rtol=1e-3)


def test_choices_of_eq_13(rng):
    """Absolute epsilon, sum instead of mean, trace one or as it comes."""
    scatter = rng.normal(size=(3, 20))
    scatter = (scatter @ scatter.T).astype("float32")
    tensor = ops.convert_to_tensor(scatter)

    def estimate(**arguments):
        found = ModeCovariance(**arguments).estimate(tensor, 20)
        covariance, whitener, precision = (numpy(matrix) for matrix in found)
        np.testing.assert_allclose(np.linalg.inv(precision), covariance, rtol=1e-3)
        np.testing.assert_allclose(whitener.T @ whitener, precision, rtol=1e-5, atol=1e-6)
        return covariance

    printed = scatter / 20 + 0.1 * np.eye(3)
    found = estimate(epsilon=0.1, relative=False, trace=1)
    np.testing.assert_allclose(found, printed / np.trace(printed), rtol=1e-5)
    found = estimate(epsilon=0.1, relative=False, trace=None)
    np.testing.assert_allclose(found, printed, rtol=1e-5)
    found = estimate(epsilon=0.1, relative=False, average=False, trace=None)
    np.testing.assert_allclose(found, scatter + 0.1 * np.eye(3), rtol=1e-5)
    found = estimate(epsilon=0.1)
    expected = scatter + 0.1 * np.trace(scatter) / 3 * np.eye(3)
    np.testing.assert_allclose(found, expected * 3 / np.trace(expected), rtol=1e-5)
    zero = ModeCovariance().estimate(ops.zeros((3, 3)), 20)
    np.testing.assert_allclose(zero[0], np.eye(3), rtol=1e-5)


def test_resting_kernel_converges_to_maximum_likelihood(rng):
    """In `fit` every covariance moves, to what `flip_flop` finds for the kernel."""
    prior = TensorNormalRegularizer(modes=MRN, epsilon=0.02)
    inputs = keras.Input((8,))
    layer = TaskDense(4, 3, shared_input=True, kernel_regularizer=prior, name="fc")
    model = keras.Model(inputs, layer(inputs))
    truth = [np.diag(np.linspace(0.2, 2, 8)), np.eye(4) + 0.5, np.eye(3) * 0.4 + 0.6]
    kernel = tensor_normal.sample(truth, seed=0)[0]
    layer.kernel.assign(kernel)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.zeros((60, 8)), np.zeros((60, 12))
    model.fit(x, y, batch_size=2, verbose=0)
    fitted = tensor_normal.flip_flop(kernel[None], mean=np.zeros_like(kernel), ridge=0.02)
    assert fitted.converged
    for mode, expected in zip(MRN, fitted.covariances):
        found = layer.prior.covariances[mode]
        assert np.abs(found - np.eye(len(found))).max() > 0.1, mode
        # The scale of the last mode is free in `flip_flop`.
        expected = expected * len(expected) / np.trace(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(layer.kernel, kernel, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_update_every(every):
    """The covariances move at every so many training steps, and at no other time."""
    prior = TensorNormalRegularizer(update_every=every)
    layer = built(TaskDense(4, 3, common_draw=False, kernel_regularizer=prior), 6)
    moved = []
    for _ in range(6):
        before = layer.prior.covariances["task"]
        layer.kernel.assign(numpy(layer.kernel) + np.array([0.1, 0.2, -0.3]))
        train_steps(layer, 1, 6)
        moved.append(not np.array_equal(layer.prior.covariances["task"], before))
        state = layer.prior.get_weights()
        layer(np.zeros((1, 6), "float32"), training=False)
        layer(np.zeros((1, 6), "float32"))
        for a, b in zip(layer.prior.get_weights(), state):
            np.testing.assert_array_equal(a, b)
    assert moved == [(step + 1) % every == 0 for step in range(6)]


def two_layers(shared, first=None, second=None):
    """A network of two layers with priors."""
    inputs = keras.Input((6,))
    prior = functools.partial(TensorNormalRegularizer, epsilon=0.01)
    arguments = {} if shared is None else {"task_covariance": shared}
    x = TaskDense(
        4,
        3,
        shared_input=True,
        common_draw=False,
        kernel_regularizer=prior(**arguments, **(first or {})),
        name="fc7",
    )(inputs)
    x = TaskDense(
        2,
        3,
        common_draw=False,
        kernel_regularizer=prior(**arguments, **(second or {})),
        name="fc8",
    )(x)
    return MultiTaskModel(inputs, TaskSplit(["a", "b", "c"])(x))


def test_shared_task_covariance(tmp_path):
    """One covariance of both layers: the mean over all columns; saved as one."""
    shared = ModeCovariance(epsilon=0.0, trace=None)
    model = two_layers(shared)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.zeros((4, 6)), {name: np.zeros((4, 2)) for name in "abc"}
    model.fit(x, y, batch_size=1, verbose=0)
    unfolded = [numpy(model.get_layer(n).kernel).reshape(-1, 3) for n in ("fc7", "fc8")]
    whole = np.concatenate(unfolded)
    np.testing.assert_allclose(
        shared.covariance, whole.T @ whole / len(whole), rtol=1e-4, atol=1e-6
    )
    found = task_covariance(model)
    np.testing.assert_array_equal(found["fc7"], found["fc8"])
    model.save(tmp_path / "model.keras")
    for copy in (
        keras.saving.load_model(tmp_path / "model.keras"),
        MultiTaskModel.from_config(model.get_config()),
        factorize(model, "tucker", rank=0.6, layers=["fc7"], verbose=False),
    ):
        a, b = (copy.get_layer(name).prior.modes["task"] for name in ("fc7", "fc8"))
        assert a is b and a is not shared
    np.testing.assert_array_equal(a.covariance, shared.covariance)


@pytest.mark.parametrize("mean", ["zero", "shared"])
def test_shared_feature_covariance(mean, tmp_path, rng):
    """Classifiers of different classes and tasks: the mean over all their columns."""
    shared = ModeCovariance(epsilon=0.0, trace=None)
    inputs, outputs, columns, free = keras.Input((6,)), {}, [], 0
    for name, units, tasks in (("a", 4, 3), ("b", 2, 2)):
        prior = TensorNormalRegularizer(
            modes="feature", mean=mean, shared={"feature": shared}
        )
        layer = TaskDense(
            units,
            tasks,
            shared_input=True,
            common_draw=False,
            kernel_regularizer=prior,
            name=name,
        )
        outputs[name] = layer(inputs)
        kernel = numpy(layer.kernel).astype("float64")
        kernel -= kernel.mean(axis=-1, keepdims=True) * (mean == "shared")
        columns.append(kernel.reshape(6, -1))
        free += units * (tasks - (mean == "shared"))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), dict.fromkeys("ab", "mse"))
    x, y = np.zeros((2, 6)), {"a": np.zeros((2, 12)), "b": np.zeros((2, 4))}
    model.fit(x, y, batch_size=1, verbose=0)
    whole = np.concatenate(columns, axis=1)
    expected = whole @ whole.T / free
    np.testing.assert_allclose(shared.covariance, expected, rtol=1e-4, atol=1e-6)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    a, b = (copy.get_layer(name).prior.modes["feature"] for name in "ab")
    assert a is b and a is not shared
    np.testing.assert_array_equal(a.covariance, shared.covariance)


def test_identity_in_proportion_to_the_columns_that_lack(rng):
    """`epsilon="auto"` is 10 d / n, of each mode its own, and at least one."""
    prior = TensorNormalRegularizer(modes=["feature", "task"], epsilon="auto")
    layer = built(TaskDense(8, 3, common_draw=False, kernel_regularizer=prior), 15)
    train_steps(layer, 1, 15)
    expected = [np.eye(5), np.eye(8), np.eye(3)]
    kernel = numpy(layer.kernel).astype("float64")
    for axis, own in ((0, 10 * 5 / 24), (2, 1.0)):
        expected = loop_update(kernel, [axis], expected, own, kernel.shape[axis])
    for mode, matrix in zip(("feature", "task"), expected[::2]):
        np.testing.assert_allclose(layer.prior.covariances[mode], matrix, rtol=1e-3)


@pytest.mark.parametrize("epsilon, hides", [("auto", False), (1e-3, True)])
def test_few_columns_of_many_features(epsilon, hides):
    """Whitened by a covariance that they alone have made, kernels look unrelated.

    Kernels of 40 columns that fill 40 of 256 dimensions: an estimate of the features'
    covariance must not take the correlation of the tasks away in one sweep.
    """
    tasks = np.full((4, 4), 0.9) + 0.1 * np.eye(4)
    kernel = tensor_normal.sample([np.eye(256), np.eye(10), tasks], seed=0)[0]
    prior = TensorNormalRegularizer(
        modes=("feature", "task"), epsilon={"feature": epsilon, "task": 0.01}
    )
    layer = built(TaskDense(10, 4, shared_input=True, kernel_regularizer=prior), 256)
    layer.kernel.assign(kernel)
    train_steps(layer, 1, 256)
    found = layer.prior.covariances["task"]
    correlation = found[0, 1] / np.sqrt(found[0, 0] * found[1, 1])
    assert (correlation < 0.1) if hides else (correlation > 0.8), correlation


def test_one_regularizer_for_two_layers_shares_nothing():
    """Sharing is never by accident: the object is settings, each layer has its state."""
    prior = TensorNormalRegularizer()
    first, second = (
        built(TaskDense(2, 3, common_draw=False, kernel_regularizer=prior), 6)
        for _ in range(2)
    )
    train_steps(first, 1, 6)
    assert np.abs(first.prior.covariances["task"] - np.eye(3)).max() > 1e-3
    np.testing.assert_array_equal(second.prior.covariances["task"], np.eye(3))


def test_each_class_has_its_own(rng):
    """`each`: as many independent problems, their penalties summed."""
    prior = TensorNormalRegularizer(0.2, each="class")
    layer = built(TaskDense(5, 3, common_draw=False, kernel_regularizer=prior), 12)
    train_steps(layer, 1, 12)
    kernel, found = numpy(layer.kernel), layer.prior.covariances["task"]
    assert found.shape == (5, 3, 3)
    total = 0.0
    for kind in range(5):
        one = built(TaskDense(1, 3, kernel_regularizer=TensorNormalRegularizer(0.2)), 12)
        one.kernel.assign(kernel[:, kind : kind + 1])
        train_steps(one, 1, 12)
        np.testing.assert_allclose(
            found[kind], one.prior.covariances["task"], rtol=1e-4, atol=1e-6
        )
        total += float(one.losses[0])
    assert float(layer.losses[0]) == pytest.approx(total, rel=1e-4)


def layers_with_priors():
    """Makers of layers, with inputs."""
    dense = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype("float32")
    prior = functools.partial(TensorNormalRegularizer, 0.01)

    def wrapped(dtype=None, **kwargs):
        inner = keras.layers.Dense(4, dtype=dtype)
        return TensorNormalPrior(inner, prior(modes=(0, 1)), dtype=dtype, **kwargs)

    return {
        "dense": (functools.partial(TaskDense, 4, 3, kernel_regularizer=prior()), dense),
        "one task": (functools.partial(TaskDense, 4, 1, kernel_regularizer=prior()), dense),
        "mrn": (
            functools.partial(TaskDense, 4, 3, kernel_regularizer=prior(MRN)),
            dense,
        ),
        "each": (
            functools.partial(TaskDense, 4, 3, kernel_regularizer=prior(each="class")),
            dense,
        ),
        "tucker": (
            functools.partial(TuckerDense, 4, 3, rank=2, kernel_regularizer=prior()),
            dense,
        ),
        "convolution": (
            functools.partial(
                TaskConv2D, 4, 2, 3, kernel_regularizer=prior(("height", "task"))
            ),
            images,
        ),
        "depthwise": (
            functools.partial(TaskDepthwiseConv2D, 2, 3, depthwise_regularizer=prior()),
            images,
        ),
        "wrapper": (wrapped, dense),
        "axes": (
            functools.partial(
                TaskDense,
                4,
                3,
                kernel_regularizer=prior(
                    (1, 2), epsilon={1: 0.5, 2: 0.1}, start={2: np.eye(3) + 0.5}
                ),
            ),
            dense,
        ),
    }


@pytest.mark.parametrize("name", list(layers_with_priors()))
def test_layer_checks(name):
    """Saving, training, evaluation without a trace, mixed precision, XLA, export."""
    make, inputs = layers_with_priors()[name]
    check_layer(make, inputs)


def test_state_is_saved(tmp_path):
    """With the model, and with its weights."""
    model = two_layers(None)
    for name in ("fc7", "fc8"):
        layer = model.get_layer(name)
        layer(np.zeros((1, 6 if name == "fc7" else 12), "float32"), training=True)
    expected = task_covariance(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = two_layers(None)
    fresh.load_weights(tmp_path / "model.weights.h5")
    for copy in (keras.saving.load_model(tmp_path / "model.keras"), fresh):
        found = task_covariance(copy)
        for name, matrix in expected.items():
            np.testing.assert_array_equal(found[name], matrix)


def test_mixed_precision_learns_in_full(rng):
    """The update sees the float32 kernel, not its cast."""
    prior = TensorNormalRegularizer(epsilon=1e-6)
    layer = TaskDense(
        4, 3, common_draw=False, kernel_regularizer=prior, dtype="mixed_float16"
    )
    layer.build((None, 6))
    train_steps(layer, 1, 6)
    unfolded = numpy(layer.kernel).reshape(-1, 3).astype("float64")
    expected = unfolded.T @ unfolded
    np.testing.assert_allclose(
        layer.prior.covariances["task"], expected * 3 / np.trace(expected), atol=1e-5
    )


def test_compiled_by_xla():
    """The same covariances, update included."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("JAX always compiles")
    found = []
    for compiled in (False, True):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        prior = TensorNormalRegularizer(0.1, modes=MRN, update_every=2, epsilon=0.1)
        outputs = TaskDense(
            4, 3, shared_input=True, common_draw=False, kernel_regularizer=prior
        )(inputs)
        model = keras.Model(inputs, outputs)
        model.compile("sgd", "mse", jit_compile=compiled)
        model.fit(np.ones((16, 6)), np.ones((16, 12)), batch_size=4, verbose=0)
        found.append(model.layers[1].prior.covariances)
    for mode in MRN:
        np.testing.assert_allclose(found[0][mode], found[1][mode], rtol=1e-3, atol=1e-5)


def test_two_groups_of_tasks(rng):
    """Related within and negatively across: learned from data, with the right signs."""
    tasks, features = 6, 10
    group = np.array([1, 1, 1, -1, -1, -1])
    common = rng.normal(size=features)
    truth = np.outer(common, group) + 0.3 * rng.normal(size=(features, tasks))
    x = rng.normal(size=(400, features)).astype("float32")
    y = x @ truth + 0.1 * rng.normal(size=(400, tasks))
    inputs = keras.Input((features,))
    names = [f"task_{t}" for t in range(tasks)]
    outputs = TaskDense(
        1,
        tasks,
        shared_input=True,
        common_draw=False,
        kernel_regularizer=TensorNormalRegularizer(1e-3),
        name="regression",
    )(inputs)
    model = MultiTaskModel(inputs, TaskSplit(names)(outputs))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    labels = {name: y[:, t : t + 1] for t, name in enumerate(names)}
    model.fit(x, labels, epochs=10, verbose=0)
    correlation = task_correlation(model)["regression"]
    np.testing.assert_allclose(np.diag(correlation), 1, rtol=1e-5)
    same = np.equal.outer(group, group)
    assert np.all(correlation[same] > 0.6) and np.all(correlation[~same] < -0.6)
    expected = np.corrcoef(truth.T)
    assert np.abs(correlation - expected).max() < 0.3


def test_wrapper_on_a_pretrained_layer(rng):
    """A layer that is built already; its kernel may have a task axis of its own."""
    inner = keras.layers.EinsumDense("bi,tio->bto", (3, 4))
    x = rng.normal(size=(8, 6)).astype("float32")
    inner(x)
    layer = TensorNormalPrior(
        inner, TensorNormalRegularizer(), axes=("task", "feature", "class")
    )
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((8, 3, 4)), verbose=0)
    (matrix,) = task_covariance(model).values()
    assert matrix.shape == (3, 3) and np.abs(matrix - np.eye(3)).max() > 1e-4
    np.testing.assert_allclose(model(x), inner(x), rtol=1e-5)


def test_multitask_and_back(rng):
    """A backbone gets priors by layer name; one task's network knows nothing of them."""
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, "relu", name="fc7")(inputs)
    backbone = keras.Model(inputs, keras.layers.Dense(4, name="fc8")(x))
    prior = TensorNormalRegularizer(0.5)

    def head(features):
        own = TensorNormalRegularizer(modes=("feature", "class"))
        return TensorNormalPrior(keras.layers.Dense(3), own)(features)

    model = multitask(
        backbone, ["a", "b"], prior={"fc8": prior}, heads={"a": head, "b": 2}, verbose=False
    )
    assert list(task_covariance(model)) == ["fc8"]
    alone = single_task(model, "a")
    assert not alone.losses and "dmtrl" not in alone.to_json()
    data = rng.normal(size=(3, 6)).astype("float32")
    np.testing.assert_allclose(alone(data), model(data)["a"], atol=1e-5)
    with pytest.raises(ValueError, match="fits none of"):
        multitask(backbone, 2, prior={"conv*": prior})
    with pytest.raises(ValueError, match="such as TensorNormalRegularizer"):
        multitask(backbone, 2, prior="drn")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strength": -1}, "`strength` must be a number"),
        ({"modes": ()}, "one or several distinct"),
        ({"modes": ("task", "task")}, "one or several distinct"),
        ({"update_every": 0}, "`update_every` must be a positive int"),
        ({"epsilon": -1e-3}, "`epsilon` must be a number"),
        ({"epsilon": {"class": 1}}, r"each of the modes \['task'\]"),
        ({"trace": "one"}, "`trace` must be"),
        ({"trace": 0}, "`trace` must be"),
        ({"start": {"class": np.eye(2)}}, "that are in `modes`"),
        ({"start": {"task": [[1, 2], [2, 1]]}}, "positive definite.*eigenvalue -1"),
        ({"start": {"task": [[1, np.nan], [0, 1]]}}, "positive definite"),
        ({"task_covariance": np.eye(2)}, "must be a ModeCovariance"),
        ({"shared": np.eye(2)}, "dict from mode to ModeCovariance"),
        ({"shared": {"feature": ModeCovariance()}}, r"its mode among `modes`.*'feature'"),
        ({"shared": {"task": ModeCovariance()}, "each": "class"}, "no `each`"),
        ({"shared": {"task": ModeCovariance()}, "task_covariance": ModeCovariance()}, "no"),
        ({"epsilon": "large"}, "`epsilon` must be a number.*'auto'.*'large'"),
        ({"epsilon": "auto", "relative": False}, "a number where it is absolute.*'auto'"),
    ],
)
def test_bad_arguments(arguments, message):
    """The error says what was received."""
    with pytest.raises(ValueError, match=message):
        TensorNormalRegularizer(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"modes": "tasks"}, r"TaskDense 'fc8'.*'feature', 'class', 'task'.*'tasks'"),
        ({"modes": 3}, "TaskDense 'fc8'.*Received: 3"),
        ({"modes": ("task", -1)}, "distinct modes"),
        ({"modes": "task", "each": "task"}, "distinct modes"),
        ({"start": {"task": np.eye(3)}}, r"'task'.*expected a start of shape \(2, 2\)"),
    ],
)
def test_bad_modes_of_a_layer(arguments, message):
    """Found when the layer is built, whose name is in the error."""
    prior = TensorNormalRegularizer(**arguments)
    with pytest.raises(ValueError, match=message):
        built(TaskDense(3, 2, kernel_regularizer=prior, name="fc8"), 4)


def test_kernel_without_a_task_axis():
    """A plain layer has none; and can't learn covariances by itself."""
    prior = TensorNormalRegularizer()
    with pytest.raises(ValueError, match="has no task axis"):
        built(TensorNormalPrior(keras.layers.Dense(3), prior), 4)
    layer = built(keras.layers.Dense(3, kernel_regularizer=prior), 4)
    with pytest.raises(ValueError, match="Wrap the layer instead"):
        layer.losses  # noqa: B018
    with pytest.raises(ValueError, match="a variable `kernel`"):
        TensorNormalPrior(keras.layers.ReLU(), prior).build((None, 4))
    with pytest.raises(ValueError, match="has a regularizer already"):
        inner = keras.layers.Dense(3, kernel_regularizer="l2")
        TensorNormalPrior(inner, TensorNormalRegularizer(modes=0)).build((None, 4))


def test_shared_covariance_of_other_tasks():
    """T must be the same in all layers."""
    prior = TensorNormalRegularizer(task_covariance=ModeCovariance(name="related"))
    built(TaskDense(3, 2, kernel_regularizer=prior), 4)
    with pytest.raises(ValueError, match=r"'related' is shared.*one size.*2.*with 4"):
        built(TaskDense(3, 4, kernel_regularizer=prior), 4)


def test_nan_in_a_kernel():
    """The update is refused with the layer's name, and what was learned stays."""
    layer = TaskDense(
        3,
        2,
        shared_input=True,
        common_draw=False,
        kernel_regularizer=TensorNormalRegularizer(),
        name="fc8",
    )
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    train_steps(layer, 1, 4)
    before = layer.prior.get_weights()
    kernel = numpy(layer.kernel).copy()
    kernel[0, 0, 0] = np.nan
    layer.kernel.assign(kernel)
    with pytest.raises(Exception, match=r"'fc8'.*not finite"):
        train_steps(layer, 1, 4)
    for a, b in zip(layer.prior.get_weights(), before):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"'fc8'.*1 values that are not finite"):
        task_covariance(model)
    if keras.config.backend() == "tensorflow":
        model.compile("sgd", "mse")
        with pytest.raises(Exception, match="kernel has values that are not finite"):
            model.fit(np.zeros((2, 4)), np.zeros((2, 6)), verbose=0)


def test_no_prior():
    """Nothing to ask for."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, TaskDense(3, 2, shared_input=True)(inputs))
    with pytest.raises(ValueError, match=r"no layer that learns a task covariance"):
        task_covariance(model)
    with pytest.raises(ValueError, match="`mode` must be a string"):
        mode_covariance(model, 2)


def test_covariances_of_modes():
    """Those of each mode by layer; what is not learned is said."""
    mrn = relationship_network((6,), ["a", "b"], 3, prior="mrn", bottleneck=4)
    classifier = mrn.get_layer("classifier")
    rng = np.random.default_rng(0)
    for variable in classifier.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    prior = classifier.prior
    prior.update()
    for mode in MRN:
        found = mode_covariance(mrn, mode)
        assert set(found) == {"bottleneck", "classifier"}
        covariance = found["classifier"]
        np.testing.assert_allclose(covariance, prior.covariances[mode])
        assert np.ptp(covariance) > 0.5
        deviation = np.sqrt(np.diag(covariance))
        correlation = mode_correlation(mrn, mode)["classifier"]
        np.testing.assert_allclose(
            correlation * np.outer(deviation, deviation), covariance, rtol=1e-5, atol=1e-6
        )
    drn = relationship_network((6,), ["a", "b"], 3, prior="drn")
    with pytest.raises(ValueError, match=r"a class covariance.*one of .*task"):
        mode_correlation(drn, "class")


@pytest.mark.parametrize("make", ["task", "composed", "wrapped", "inner", "model"])
def test_frozen_covariances(make):
    """Of a kernel that is not trained nothing moves, and there is no penalty."""
    prior = TensorNormalRegularizer(0.1, modes=("feature", "class"))
    arguments = {"kernel_regularizer": prior, "common_draw": False}
    if make in ("wrapped", "inner"):
        layer = TensorNormalPrior(keras.layers.Dense(3), prior)
    elif make == "composed":
        layer = TuckerDense(3, 2, rank=2, **arguments)
    else:
        layer = TaskDense(3, 2, **arguments)
    built(layer, 4)
    frozen = layer.layer if make == "inner" else layer
    if make == "model":
        inputs = keras.Input((4,))
        frozen = keras.Model(inputs, layer(inputs))
    train_steps(layer, 1, 4)
    before = layer.prior.get_weights()
    frozen.trainable = False
    train_steps(layer, 2, 4)
    for old, new in zip(before, layer.prior.get_weights()):
        np.testing.assert_array_equal(old, new)
    assert not layer.losses
    frozen.trainable = True
    train_steps(layer, 1, 4)
    assert any(np.any(a != b) for a, b in zip(before, layer.prior.get_weights()))
    assert float(layer.losses[0]) != 0
