"""The layout layers: against slices and concatenations written out."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras.layers import (
    TaskBatch,
    TaskConcatenate,
    TaskFlatten,
    TaskGroup,
    TaskRepeat,
    TaskSplit,
    TaskStack,
)
from dmtrl_keras.testing import check_layer

NAMES = ["age", "gender", "pose"]


def tasks_of(x, tasks, axis=-1):
    """The part of each task."""
    return np.split(ops.convert_to_numpy(x), tasks, axis)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_stack_and_split(data_format, rng):
    """Split undoes stack, by name, in both data formats."""
    axis = -1 if data_format == "channels_last" else 1
    parts = {name: rng.normal(size=(2, 4, 5, 6)) for name in NAMES}
    stacked = TaskStack(NAMES, data_format=data_format)(parts)
    expected = np.concatenate([parts[name] for name in NAMES], axis)
    np.testing.assert_allclose(stacked, expected, rtol=1e-6)
    split = TaskSplit(NAMES, data_format=data_format)(stacked)
    assert list(split) == NAMES
    for name in NAMES:
        np.testing.assert_allclose(split[name], parts[name], rtol=1e-6)
    as_list = TaskStack(3, data_format=data_format)(list(parts.values()))
    np.testing.assert_allclose(as_list, expected, rtol=1e-6)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_flatten(data_format, rng):
    """Each task's part is what keras.layers.Flatten makes of its features."""
    axis = -1 if data_format == "channels_last" else 1
    x = rng.normal(size=(2, 6, 6, 6)).astype("float32")
    outputs = TaskFlatten(3, data_format=data_format)(x)
    flatten = keras.layers.Flatten(data_format=data_format)
    for ours, part in zip(tasks_of(outputs, 3), tasks_of(x, 3, axis)):
        np.testing.assert_array_equal(ours, ops.convert_to_numpy(flatten(part)))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_concatenate(data_format, rng):
    """Task by task, as keras.layers.Concatenate on each task's features."""
    axis = -1 if data_format == "channels_last" else 1
    a, b = (rng.normal(size=(2, 6, 6, 6)).astype("float32") for _ in range(2))
    a = a[..., :2] if axis == 1 else a[:, :, :2]
    b = b[..., :2] if axis == 1 else b[:, :, :2]
    outputs = TaskConcatenate(3, data_format=data_format)([a, b])
    pairs = zip(tasks_of(a, 3, axis), tasks_of(b, 3, axis))
    for ours, pair in zip(tasks_of(outputs, 3, axis), pairs):
        np.testing.assert_array_equal(ours, np.concatenate(pair, axis))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_batch_and_group(data_format, rng):
    """The tasks' examples one task after another; `TaskGroup` undoes `TaskBatch`."""
    axis = -1 if data_format == "channels_last" else 1
    parts = {name: rng.normal(size=(2, 4, 5, 6)).astype("float32") for name in NAMES}
    expected = np.concatenate([parts[name] for name in NAMES])
    batch = TaskBatch(NAMES, data_format=data_format)
    np.testing.assert_array_equal(batch(parts), expected)
    grouped = TaskStack(NAMES, data_format=data_format)(parts)
    np.testing.assert_array_equal(batch(grouped), expected)
    back = TaskGroup(NAMES, data_format=data_format)(expected)
    np.testing.assert_array_equal(back, grouped)
    for part, name in zip(tasks_of(back, 3, axis), NAMES):
        np.testing.assert_array_equal(part, parts[name])


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_repeat(data_format, rng):
    """Every task's part is the input."""
    axis = -1 if data_format == "channels_last" else 1
    x = rng.normal(size=(2, 4, 5, 6)).astype("float32")
    for part in tasks_of(TaskRepeat(3, data_format=data_format)(x), 3, axis):
        np.testing.assert_array_equal(part, x)


@pytest.mark.parametrize("tasks", [1, 3])
def test_promises(tasks, rng):
    """`check_layer` for all of them, T = 1 included."""
    x = rng.normal(size=(2, 4, 6)).astype("float32")
    check_layer(lambda **k: TaskSplit(tasks, **k), x)
    check_layer(lambda **k: TaskFlatten(tasks, **k), x)
    check_layer(lambda **k: TaskStack(tasks, **k), [x] * tasks, export=tasks == 1)
    check_layer(lambda **k: TaskConcatenate(tasks, **k), [x, x[..., :3]], export=False)
    check_layer(lambda **k: TaskRepeat(tasks, **k), x)


@pytest.mark.parametrize("tasks", [1, 3])
def test_promises_of_batches(tasks, rng):
    """Batch and group change the batch axis, so that they are checked together."""
    x = rng.normal(size=(2, 4, 6)).astype("float32")

    def both(**kwargs):
        inner = [TaskBatch(tasks, **kwargs), TaskGroup(tasks, **kwargs)]
        return keras.Sequential(inner)

    np.testing.assert_array_equal(both()(x), x)
    inputs = keras.Input((4, 6))
    model = keras.Model(inputs, both()(inputs))
    np.testing.assert_array_equal(model.predict(x, verbose=0), x)
    assert TaskBatch(tasks).compute_output_shape((None, 4, 6)) == (None, 4, 6 // tasks)
    assert TaskBatch(tasks).compute_output_shape((2, 6)) == (2 * tasks, 6 // tasks)
    assert TaskGroup(tasks).compute_output_shape((6, 4)) == (6 // tasks, 4 * tasks)
    for layer in both(dtype="mixed_bfloat16").layers:
        copy = type(layer).from_config(layer.get_config())
        assert copy.get_config() == layer.get_config()
    half = both(dtype="mixed_bfloat16")(x)
    assert keras.backend.standardize_dtype(half.dtype) == "bfloat16"


def test_one_tensor_is_a_list_of_one(rng):
    """TaskStack of one task takes the tensor itself."""
    x = rng.normal(size=(2, 4)).astype("float32")
    np.testing.assert_array_equal(TaskStack(1)(x), x)


def test_split_carries_a_mask():
    """A mask of the input is the mask of every task."""
    masked = keras.layers.Masking()(np.array([[[0.0, 0, 0]], [[1.0, 2, 3]]]))
    layer = TaskSplit(NAMES)
    masks = layer.compute_mask(masked, masked._keras_mask)
    assert list(masks) == NAMES


def test_unknown_middle_axes(rng):
    """Stack, split and concatenate take images of any size."""
    inputs = keras.Input((None, None, 6))
    joined = TaskConcatenate(3)([inputs, inputs])
    model = keras.Model(inputs, TaskSplit(NAMES)(joined))
    outputs = model.predict(rng.normal(size=(2, 5, 7, 6)), verbose=0)
    assert outputs["pose"].shape == (2, 5, 7, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaskSplit([]), r"tasks=\[\]"),
        (lambda: TaskSplit(["a", "a"]), "distinct"),
        (lambda: TaskSplit(["a", 1]), "distinct"),
        (lambda: TaskSplit("ab"), "tasks='ab'"),
        (lambda: TaskSplit(0), "tasks=0"),
        (lambda: TaskSplit(2, data_format="NCHW"), "NCHW"),
        (
            lambda: TaskSplit(4, name="heads")(np.zeros((2, 6))),
            "'heads'.*tasks=4.*6 channels",
        ),
        (lambda: TaskFlatten(2)(keras.Input((None, 4))), "known size"),
        (lambda: TaskFlatten(4)(np.zeros((2, 3, 6))), "tasks=4"),
        (lambda: TaskStack(["a", "b"])({"a": np.zeros((1, 2))}), r"'a', 'b'.*\['a'\]"),
        (lambda: TaskStack(2)([np.zeros((1, 2))] * 3), "expected 2 inputs.*3"),
        (lambda: TaskStack(2)([np.zeros((1, 2)), np.zeros((1, 3))]), "one shape"),
        (lambda: TaskConcatenate(2)(np.zeros((1, 4))), "expected a list"),
        (lambda: TaskConcatenate(2)([np.zeros((1, 4)), np.zeros((1, 3))]), "tasks=2"),
        (
            lambda: TaskConcatenate(2)([np.zeros((1, 5, 4)), np.zeros((1, 6, 4))]),
            "must agree",
        ),
        (lambda: TaskBatch(4)(np.zeros((2, 6))), "tasks=4.*6 channels"),
        (lambda: TaskBatch(2)([np.zeros((1, 2))] * 3), "expected 2 inputs.*3"),
        (lambda: TaskBatch(["a", "b"])({"a": np.zeros((1, 2))}), r"'a', 'b'.*\['a'\]"),
        (lambda: TaskGroup(2)(np.zeros((3, 4))), r"divides by tasks=2.*\(3, 4\)"),
        (lambda: TaskGroup(2)(keras.Input((3, None))), "known size"),
        (lambda: TaskRepeat(2)(keras.Input((3, None))), "known size"),
    ],
)
def test_errors(call, message):
    """What was received, what was expected, and which layer."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
