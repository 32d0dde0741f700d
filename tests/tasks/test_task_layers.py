"""Layers with T kernels: equal to T Keras layers, and what every layer promises."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import layers, parameterizations
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.layers import (
    TaskConv1D,
    TaskConv1DTranspose,
    TaskConv2D,
    TaskConv2DTranspose,
    TaskConv3D,
    TaskConv3DTranspose,
    TaskDense,
    TaskDepthwiseConv1D,
    TaskDepthwiseConv2D,
)
from dmtrl_keras.testing import check_layer

T = 3
# Class, arguments, input shape of one task.
CASES = {
    "dense": (TaskDense, {"units": 5}, (4,)),
    "dense-3d": (TaskDense, {"units": 5, "activation": "tanh"}, (6, 4)),
    "conv1d": (TaskConv1D, {"filters": 5, "kernel_size": 3, "strides": 2}, (8, 4)),
    "conv1d-causal": (
        TaskConv1D,
        {"filters": 5, "kernel_size": 3, "padding": "causal", "dilation_rate": 2},
        (7, 4),
    ),
    "conv2d": (TaskConv2D, {"filters": 5, "kernel_size": 3}, (7, 6, 4)),
    # As many channels as are taken apart one task after the other.
    "conv2d-wide": (TaskConv2D, {"filters": 40, "kernel_size": 2}, (4, 3, 4)),
    "conv2d-strided": (
        TaskConv2D,
        {"filters": 5, "kernel_size": (3, 2), "strides": (2, 1), "padding": "same"},
        (7, 6, 4),
    ),
    "conv2d-dilated": (
        TaskConv2D,
        {"filters": 5, "kernel_size": 2, "dilation_rate": 2, "use_bias": False},
        (7, 6, 4),
    ),
    "conv2d-groups": (
        TaskConv2D,
        {"filters": 6, "kernel_size": 3, "groups": 2},
        (7, 6, 4),
    ),
    "conv2d-pointwise": (TaskConv2D, {"filters": 5, "kernel_size": 1}, (7, 6, 4)),
    "conv3d": (
        TaskConv3D,
        {"filters": 5, "kernel_size": 2, "activation": "relu"},
        (4, 5, 4, 2),
    ),
    "depthwise": (
        TaskDepthwiseConv2D,
        {"kernel_size": 3, "depth_multiplier": 2, "padding": "same"},
        (7, 6, 4),
    ),
    "depthwise1d": (TaskDepthwiseConv1D, {"kernel_size": 3, "strides": 2}, (7, 4)),
    "upwards": (
        TaskConv2DTranspose,
        {"filters": 5, "kernel_size": 3, "strides": 2, "padding": "same"},
        (4, 3, 4),
    ),
    "upwards-padded": (
        TaskConv2DTranspose,
        {
            "filters": 3,
            "kernel_size": (3, 2),
            "strides": (3, 2),
            "output_padding": (2, 0),
            "activation": "relu",
        },
        (4, 3, 4),
    ),
    "upwards1d": (
        TaskConv1DTranspose,
        {"filters": 40, "kernel_size": 3, "dilation_rate": 2, "use_bias": False},
        (5, 4),
    ),
    "upwards3d": (
        TaskConv3DTranspose,
        {"filters": 2, "kernel_size": 2, "strides": 2},
        (2, 3, 2, 2),
    ),
    "conv2d-pointwise-strided": (
        TaskConv2D,
        {"filters": 5, "kernel_size": 1, "strides": 2, "activation": "relu"},
        (7, 6, 4),
    ),
}
GRADIENT_CASES = (
    "dense",
    "dense-3d",
    "conv1d-causal",
    "conv2d-strided",
    "conv2d-groups",
    "upwards",
)


def sharing_of(name, **choice):
    """A parameterization by name, with other arguments where it has ranks."""
    sharing = parameterizations.get(name)
    ranked = (parameterizations.FactorizedParameterization, parameterizations.LoRA)
    return type(sharing)(**choice) if isinstance(sharing, ranked) else sharing


def make(case, **kwargs):
    """A layer of a case, its tasks started from different draws."""
    cls, arguments, _ = CASES[case]
    kwargs = {"tasks": T, "common_draw": False, **kwargs}
    return cls(**arguments, bias_initializer="random_normal", **kwargs)


def inputs_of(case, rng, shared):
    """`(one input per task, what the layer takes)`."""
    shape = CASES[case][2]
    own = [rng.normal(size=(2, *shape)).astype("float32") for _ in range(T)]
    if shared:
        return [own[0]] * T, own[0]
    return own, np.concatenate(own, axis=-1)


def twins_of(layer, shape):
    """T ordinary Keras layers that hold the kernels of a built layer."""
    twins = []
    for t in range(layer.tasks):
        twin = layer.task_twin()
        twin.build((None, *shape))
        weights = [ops.convert_to_numpy(layer.task_kernel(t))]
        if layer.use_bias:
            weights.append(ops.convert_to_numpy(layer.bias)[:, t])
        twin.set_weights(weights)
        twins.append(twin)
    return twins


@pytest.mark.parametrize("shared", [False, True], ids=["grouped", "shared"])
@pytest.mark.parametrize("name", parameterizations.names())
@pytest.mark.parametrize("case", CASES)
def test_equals_separate_layers(case, name, shared, rng):
    """Values equal those of T Keras layers with the same kernels."""
    layer = make(case, sharing=sharing_of(name), shared_input=shared)
    own, x = inputs_of(case, rng, shared)
    outputs = ops.convert_to_numpy(layer(x))
    assert outputs.shape == layer.compute_output_shape(x.shape)
    twins = twins_of(layer, CASES[case][2])
    expected = [ops.convert_to_numpy(twin(x)) for twin, x in zip(twins, own)]
    np.testing.assert_allclose(outputs, np.concatenate(expected, -1), atol=2e-4)


@pytest.mark.parametrize("shared", [False, True], ids=["grouped", "shared"])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_equal_separate_layers(case, shared, rng):
    """The gradient of the stacked kernel holds the gradients of the T kernels."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are compared on TensorFlow")
    tf = tensorflow()
    layer = make(case, shared_input=shared)
    own, x = inputs_of(case, rng, shared)
    layer(x)
    twins = twins_of(layer, CASES[case][2])
    tensor = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        loss = tf.reduce_sum(layer(tensor) ** 3)
    kernel, bias, from_x = tape.gradient(
        loss, [layer.kernel.value, layer.bias.value, tensor]
    )
    tensors = [tf.constant(x) for x in own]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        loss = tf.add_n([tf.reduce_sum(t(x) ** 3) for t, x in zip(twins, tensors)])
    variables = [[t.kernel.value, t.bias.value] for t in twins]
    theirs, inputs = tape.gradient(loss, [variables, tensors])
    if case == "upwards":
        # Keras has the outputs first.
        kernel = np.swapaxes(kernel, 2, 3)
    for t in range(T):
        np.testing.assert_allclose(kernel[..., t], theirs[t][0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(bias[:, t], theirs[t][1], rtol=1e-3, atol=1e-3)
    together = sum(inputs) if shared else np.concatenate(inputs, -1)
    np.testing.assert_allclose(from_x, together, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["laf", "tucker", "tt"])
@pytest.mark.parametrize("shared", [False, True], ids=["grouped", "shared"])
def test_gradients_of_factors(name, shared, rng):
    """Contracting and composing give the same gradients of the factors."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("gradients are compared on TensorFlow")
    tf = tensorflow()
    _, x = inputs_of("conv2d", rng, shared)
    found = {}
    for implementation in ("compose", "contract"):
        keras.utils.set_random_seed(0)
        layer = make(
            "conv2d",
            sharing=sharing_of(name, implementation=implementation),
            shared_input=shared,
            kernel_initializer=keras.initializers.GlorotUniform(seed=1),
        )
        layer(x)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x) ** 2)
        variables = [v.value for v in layer.factors.values()]
        found[implementation] = [g.numpy() for g in tape.gradient(loss, variables)]
    for a, b in zip(*found.values()):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)


# One case of each class for all parameterizations, and all cases for one that is applied
# in two ways.
CLASSES = ("dense", "conv1d", "conv2d", "conv3d", "depthwise")
# Dense and convolutional layers with these have names of their own (`TuckerConv2D`,
# `SimilarKernelConv1D`, ...), and are checked under these names, in tests/dmtrl and
# tests/mtal.
NAMED = ("laf", "tucker", "tt", "similar")
PROMISES = [
    pytest.param(case, name, marks=[pytest.mark.long] if repeated else [])
    for case in CASES
    for name in parameterizations.names()
    if case in CLASSES or name == "tucker"
    for repeated in [
        case in CLASSES
        and case != "depthwise"
        and name in NAMED
        and (case, name) != ("dense", "similar")
    ]
]


@pytest.mark.parametrize("case, name", PROMISES)
def test_promises(case, name, rng):
    """Saving, export, mixed precision, unknown batch size: `check_layer`."""
    _, x = inputs_of(case, rng, shared=False)
    cls = CASES[case][0]
    # One export for each class and parameterization is enough.
    export = case in CLASSES
    check_layer(
        lambda **kwargs: make(case, sharing=sharing_of(name), **kwargs), x, export=export
    )
    assert cls.__name__ in layers.__all__


@pytest.mark.parametrize("name", parameterizations.names())
@pytest.mark.parametrize("case", ["dense", "conv2d-strided", "depthwise"])
def test_single_task(case, name, rng):
    """T = 1 is the Keras twin."""
    layer = make(case, tasks=1, sharing=sharing_of(name))
    shape = CASES[case][2]
    x = rng.normal(size=(2, *shape)).astype("float32")
    outputs = ops.convert_to_numpy(layer(x))
    twin = twins_of(layer, shape)[0]
    np.testing.assert_allclose(outputs, ops.convert_to_numpy(twin(x)), atol=1e-5)


@pytest.mark.parametrize("name", parameterizations.names())
@pytest.mark.parametrize("case", ["dense", "conv2d"])
def test_permuting_tasks(case, name, rng):
    """Where all tasks have one input, permuted kernels give permuted outputs."""
    layer = make(case, sharing=sharing_of(name, rank=1.0), shared_input=True)
    _, x = inputs_of(case, rng, shared=True)
    outputs = np.split(ops.convert_to_numpy(layer(x)), T, -1)
    order = [2, 0, 1]
    kernel = layer.factors["kernel"] if name == "similar" else layer.kernel
    values = layer.sharing.decompose(ops.convert_to_numpy(kernel)[..., order])
    for key, variable in layer.factors.items():
        variable.assign(values[key])
    if layer.selection is not None:
        layer.selection.refresh()
    layer.bias.assign(ops.convert_to_numpy(layer.bias)[:, order])
    again = np.split(ops.convert_to_numpy(layer(x)), T, -1)
    for t in range(T):
        np.testing.assert_allclose(again[t], outputs[order[t]], atol=1e-4)


@pytest.mark.parametrize("case", ["conv1d", "conv2d-strided", "depthwise"])
@pytest.mark.parametrize("shared", [False, True], ids=["grouped", "shared"])
def test_channels_first(case, shared, rng):
    """The same as channels-last, transposed."""
    _, x = inputs_of(case, rng, shared)
    keras.utils.set_random_seed(0)
    last = make(case, shared_input=shared)
    expected = np.moveaxis(ops.convert_to_numpy(last(x)), -1, 1)
    first = make(case, shared_input=shared, data_format="channels_first")
    moved = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    first.build(moved.shape)
    first.set_weights(last.get_weights())
    outputs = ops.convert_to_numpy(first(moved))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert first.compute_output_shape(moved.shape) == outputs.shape


def test_causal_channels_first_is_causal(rng):
    """A later step changes no earlier output."""
    layer = TaskConv1D(2, 3, tasks=2, padding="causal", data_format="channels_first")
    x = rng.normal(size=(1, 4, 6)).astype("float32")
    changed = x.copy()
    changed[..., 4] += 1
    a, b = (ops.convert_to_numpy(layer(v)) for v in (x, changed))
    np.testing.assert_array_equal(a[..., :4], b[..., :4])
    assert not np.allclose(a[..., 4:], b[..., 4:])


def test_common_and_independent_draws():
    """All tasks equal by default; each its own draw on request; both reproducible."""
    common = TaskDense(4, 3, shared_input=True)
    common.build((None, 5))
    kernel = ops.convert_to_numpy(common.kernel)
    assert np.ptp(kernel, axis=-1).max() == 0
    seeded = keras.initializers.GlorotUniform(seed=3)
    kernels = []
    for _ in range(2):
        own = TaskDense(
            4, 3, shared_input=True, common_draw=False, kernel_initializer=seeded
        )
        own.build((None, 5))
        kernels.append(ops.convert_to_numpy(own.kernel))
    np.testing.assert_array_equal(*kernels)
    assert np.ptp(kernels[0], axis=-1).min() > 0
    for initializer in (
        keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(1)),
        "ones",
        None,
    ):
        own = TaskDense(
            4, 3, shared_input=True, common_draw=False, kernel_initializer=initializer
        )
        own.build((None, 5))
        assert own.kernel.shape == (5, 4, 3)


@pytest.mark.parametrize("name", ["independent", "laf", "tucker", "tt"])
@pytest.mark.parametrize("common", [True, False])
def test_start_variance(name, common):
    """The fans are those of one task; at full rank the variance is the initializer's."""
    sharing = sharing_of(name, rank=1.0)
    layer = TaskConv2D(
        24, 3, 4, sharing=sharing, kernel_initializer="he_normal", common_draw=common
    )
    layer.build((None, 8, 8, 4 * 16))
    kernel = ops.convert_to_numpy(layer.kernel)
    assert np.var(kernel) == pytest.approx(2 / (9 * 16), rel=0.1)


def test_common_draw_with_tolerance():
    """A tolerance draws independently, unless told otherwise: else task rank 1."""
    tt = parameterizations.TT
    layer = TaskDense(8, 4, shared_input=True, sharing=tt(tolerance=0.3))
    layer.build((None, 16))
    assert layer.rank[-1] > 1
    layer = TaskDense(8, 4, shared_input=True, sharing=tt(tolerance=0.3), common_draw=True)
    with pytest.warns(UserWarning, match="task rank is 1"):
        layer.build((None, 16))
    assert layer.rank[-1] == 1


@pytest.mark.parametrize("name", parameterizations.names())
def test_regularizer_of_the_stacked_kernel(name):
    """L2 is that of the composed kernel, counted once, and gone when frozen."""
    layer = make(
        "dense", sharing=sharing_of(name), kernel_regularizer=keras.regularizers.L2(0.5)
    )
    layer.build((None, 12))
    kernel = ops.convert_to_numpy(layer.kernel)
    penalties = layer.sharing.factor_regularizers
    own = sum(float(penalties[part](layer.factors[part])) for part in penalties)
    loss = float(sum(layer.losses)) - own
    assert len(layer.losses) == max(len(penalties), 1)
    np.testing.assert_allclose(loss, 0.5 * np.sum(kernel**2), rtol=1e-5)
    layer.trainable = False
    assert not layer.losses


@pytest.mark.parametrize("name", parameterizations.names())
def test_constraint_of_the_stacked_kernel(name, rng):
    """Every task's kernel obeys the constraint, composed or not."""
    layer = make(
        "dense",
        sharing=sharing_of(name),
        kernel_constraint=keras.constraints.MaxNorm(0.5),
        kernel_regularizer="l2",
    )
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(rng.normal(size=(8, 12)), 9 * np.ones((8, 15)), epochs=3, verbose=0)
    for t in range(T):
        norms = np.linalg.norm(ops.convert_to_numpy(layer.task_kernel(t)), axis=0)
        assert norms.max() <= 0.5 + 1e-5
        assert norms.max() > 0.1
    x = rng.normal(size=(2, 12)).astype("float32")
    twins = twins_of(layer, (4,))
    expected = [twin(x[:, 4 * t : 4 * t + 4]) for t, twin in enumerate(twins)]
    np.testing.assert_allclose(layer(x), np.concatenate(expected, -1), atol=1e-5)


def test_task_matrices():
    """S is the identity, one row of ones, or that of the factors."""
    for name in parameterizations.names():
        layer = make("dense", sharing=sharing_of(name))
        layer.build((None, 12))
        matrix = ops.convert_to_numpy(layer.task_matrix)
        assert matrix.shape[1] == T
        if name in ("independent", "lora", "parts"):
            np.testing.assert_array_equal(matrix, np.eye(T))
        elif name == "hard":
            np.testing.assert_array_equal(matrix, np.ones((1, T)))
        elif name == "similar":
            np.testing.assert_allclose(matrix.sum(axis=0), 1, atol=1e-6)
        else:
            assert matrix.shape[0] == layer.rank[-1]


def test_parameters_of_hard_sharing():
    """One kernel, T biases."""
    layer = TaskDense(5, 3, sharing="hard")
    layer.build((None, 12))
    assert layer.count_params() == 4 * 5 + 3 * 5
    assert ops.convert_to_numpy(layer.kernel).shape == (4, 5, 3)


def test_built_inside_a_traced_model(rng):
    """A subclassed model builds its layers while it is traced; ranks still resolve."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = layers.TTDense(6, 2, tolerance=0.4, shared_input=True)
            self.head = TaskDense(1, 2)

        def call(self, x):
            return self.head(self.hidden(x))

    model = Model()
    model.compile("adam", "mse")
    model.fit(rng.normal(size=(8, 5)), np.zeros((8, 2)), epochs=1, verbose=0)
    assert len(model.hidden.rank) == 2


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (lambda: TaskDense(3, 0), r"TaskDense.*positive int.*tasks=0"),
        (lambda: TaskDense(3, 2.0), r"tasks=2\.0"),
        (lambda: TaskDense(3, True), "tasks=True"),
        (lambda: TaskDense(0, 2), "units"),
        (lambda: TaskConv2D(3, 0, 2), "kernel_size"),
        (lambda: TaskConv2D(3, 3, 2, data_format="last"), "data_format"),
        (lambda: TaskConv2D(3, 3, 2, strides=2, dilation_rate=2), "strides > 1"),
        (lambda: TaskDense(3, 2, sharing="cp"), "'cp'"),
        (lambda: TaskDense(4, 2, name="fc").build((None, 7)), r"'fc'.*tasks=2.*7 channels"),
        (lambda: TaskDense(4, 2, name="fc").build((None, None)), "'fc'.*known"),
        (
            lambda: TaskConv2D(4, 9, 2, name="c").build((None, 4, 4, 2)),
            "'c'",
        ),
        (lambda: TaskConv2D(4, 3, 2, groups=2).build((None, 8, 8, 6)), "groups=2"),
        (
            lambda: layers.TuckerDense(4, 2, rank=99, name="fc").build((None, 6)),
            r"'fc'.*\(3, 4, 2\).*at most 4.*rank=99",
        ),
        (
            lambda: layers.TTDense(4, 2, rank=(9, 1), name="fc").build((None, 6)),
            r"'fc'.*\(3, 2\)",
        ),
        (lambda: layers.LAFDense(4, 2, tolerance=1.5), r"1\.5"),
        (lambda: layers.LAFDense(4, 2, rank=2, tolerance=0.5), "not both"),
        (
            lambda: layers.LAFConv2D(
                4, 3, 2, groups=2, rank=2, implementation="contract"
            ).build((None, 8, 8, 8)),
            "groups",
        ),
        (
            lambda: TaskDepthwiseConv2D(
                3, 2, sharing=parameterizations.LAF(rank=2, implementation="contract")
            ).build((None, 8, 8, 8)),
            "depthwise",
        ),
    ],
)
def test_errors(make_layer, message):
    """What was received, what was expected, and which layer."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_layer()


def test_errors_of_access():
    """Nothing to see before build, and no task beyond T."""
    layer = TaskDense(3, 2, name="fc")
    # PyTorch's modules raise errors of their own for attributes that raise them.
    message = "TaskDense" if keras.backend.backend() == "torch" else "'fc'"
    for attribute in ("kernel", "task_matrix", "rank", "factors", "stacked_kernel_shape"):
        with pytest.raises(AttributeError, match=message):
            getattr(layer, attribute)
    layer.build((None, 4))
    for task in (2, -1, 0.5):
        with pytest.raises(ValueError, match="from 0 to 1"):
            layer.task_kernel(task)
    for given in (lambda x: layer(x), lambda x: layer(inputs=x)):
        with pytest.raises(ValueError, match="expected 4 channels, those of 2 tasks"):
            given(np.zeros((2, 6), "float32"))


@pytest.mark.parametrize("shared", [False, True], ids=["grouped", "shared"])
@pytest.mark.parametrize("implementation", ["compose", "contract"])
@pytest.mark.parametrize("name", ["laf", "tucker", "tt"])
def test_images_of_any_size(name, implementation, shared, rng):
    """Height and width may be unknown when the layer is built."""
    sharing = sharing_of(name, implementation=implementation)
    layer = TaskConv2D(5, 3, 2, padding="same", sharing=sharing, shared_input=shared)
    inputs = keras.Input((None, None, 4))
    model = keras.Model(inputs, layer(inputs))
    fixed = TaskConv2D.from_config(layer.get_config())
    for size in ((5, 7), (8, 4)):
        x = rng.normal(size=(3, *size, 4)).astype("float32")
        fixed.build(x.shape)
        fixed.set_weights(layer.get_weights())
        outputs = model.predict(x, verbose=0)
        assert outputs.shape == (3, *size, 10)
        np.testing.assert_allclose(outputs, fixed(x), atol=1e-5)
        fixed = TaskConv2D.from_config(layer.get_config())
