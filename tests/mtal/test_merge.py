"""How much MTAL shares, and the network that stores equal kernels once."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import (
    kernel_sharing_ratio,
    layers,
    merge_similar_kernels,
    multitask,
    single_task,
    task_summary,
)
from dmtrl_keras.layers import SimilarKernelConv2D
from dmtrl_keras.parameterizations import StoredOnce
from dmtrl_keras.testing import check_layer


def network(values, **arguments):
    """One layer with given kernels `(3, 3, 2, filters, T)`, and its choice of pairs."""
    *_, filters, tasks = values.shape
    inputs = keras.Input((6, 6, 2))
    layer = SimilarKernelConv2D(
        filters,
        3,
        tasks,
        threshold=0.9,
        shared_input=True,
        name="conv",
        bias_initializer="random_normal",
        **{"kernels": "filter", **arguments},
    )
    model = keras.Model(inputs, layers.TaskSplit(tasks)(layer(inputs)))
    layer.factors["kernel"].assign(values)
    if layer.selection is not None:
        layer.selection.refresh()
    return model


def near(rng, kernel, noise=0.05):
    """A kernel that is similar to another, not equal."""
    return kernel + noise * rng.normal(size=kernel.shape)


@pytest.mark.parametrize(
    "weights", [0.5, "learned", [[0, 0.3, 0.3], [0.7, 0, 0.3], [0.7, 0.7, 0]]]
)
@pytest.mark.parametrize("filters", [4, 100])
def test_pairs_are_stored_once(weights, filters, rng):
    """Two similar filters become one; a bank of three has three aggregates."""
    kernels = rng.normal(size=(3, 3, 2, filters, 3))
    kernels[..., 1, 0] = near(rng, kernels[..., 0, 2])
    kernels[..., 2, :] = near(rng, np.repeat(kernels[..., 2, :1], 3, axis=-1))
    model = network(kernels, weights=weights)
    row, total = kernel_sharing_ratio(model, verbose=False)
    assert (row.kernels, row.shared, row.distinct) == (3 * filters, 5, 3 * filters - 1)
    assert row.ratio == pytest.approx(5 / (3 * filters))
    assert (row.pairs, row.similar) == (3 * filters**2, 4)
    assert row.saved == total.saved == pytest.approx(1 / (3 * filters))
    merged = merge_similar_kernels(model, verbose=False)
    assert merged.count_params() == (3 * filters - 1) * 18 + 3 * filters
    x = rng.normal(size=(2, 6, 6, 2)).astype("float32")
    for task, output in model(x).items():
        np.testing.assert_allclose(output, merged(x)[task], atol=1e-5)


@pytest.mark.parametrize("mode", ["forward", "overwrite"])
def test_slices_are_stored_once(mode, rng, tmp_path):
    """The same of slices; their numbers are short in a file."""
    kernels = rng.normal(size=(3, 3, 2, 8, 3))
    kernels[..., 0, 1, 0] = near(rng, kernels[..., 0, 1, 2])
    kernels[..., 1, 5, 1] = near(rng, kernels[..., 1, 5, 0])
    model = network(kernels, kernels="slice", mode=mode)
    row, _ = kernel_sharing_ratio(model, verbose=False)
    assert (row.kernels, row.pairs, row.similar, row.shared) == (48, 48, 2, 4)
    # Overwritten ones are equal only after a step.
    assert row.distinct == (46 if mode == "forward" else 48)
    if mode == "overwrite":
        layer = model.get_layer("conv")
        zeros = ops.zeros(layer.kernel.shape)
        keras.optimizers.SGD(0.1).apply([zeros], [layer.factors["kernel"]])
    merged = merge_similar_kernels(model, verbose=False)
    assert merged.count_params() == 46 * 9 + 24
    assert len(merged.get_layer("conv").sharing.get_config()["numbers"]) < 100
    x = rng.normal(size=(2, 6, 6, 2)).astype("float32")
    merged.save(tmp_path / "merged.keras")
    loaded = keras.saving.load_model(tmp_path / "merged.keras", safe_mode=True)
    for task, output in model(x).items():
        np.testing.assert_allclose(output, merged(x)[task], atol=1e-5)
        np.testing.assert_array_equal(merged(x)[task], loaded(x)[task])


def test_merged_network_trains_and_saves(rng, tmp_path):
    """Shared kernels stay shared, in files and exports, and for one task alone."""
    kernels = rng.normal(size=(3, 3, 2, 4, 2))
    kernels[..., 0, 0] = near(rng, kernels[..., 3, 1])
    merged = merge_similar_kernels(network(kernels))
    merged.compile("sgd", "mse")
    x = rng.normal(size=(8, 6, 6, 2))
    y = {name: rng.normal(size=(8, 4, 4, 4)) for name in merged.output}
    merged.fit(x, y, epochs=2, verbose=0)
    kernel = ops.convert_to_numpy(merged.get_layer("conv").kernel)
    np.testing.assert_array_equal(kernel[..., 0, 0], kernel[..., 3, 1])
    assert np.abs(kernel - kernels).max() > 1e-3
    merged.save(tmp_path / "merged.keras")
    loaded = keras.saving.load_model(tmp_path / "merged.keras", safe_mode=True)
    x = x.astype("float32")
    for task, output in merged(x).items():
        np.testing.assert_allclose(loaded(x)[task], output, atol=1e-6)
        alone = single_task(merged, task)(x)
        np.testing.assert_allclose(alone, output, atol=1e-5)
    (row,) = task_summary(merged, verbose=False)
    assert row.parameters == 7 * 18 + 8 and row.parameters_if_independent == 8 * 19


def test_nothing_in_common(rng):
    """Kernels that no other is similar to become independent ones."""
    model = network(rng.normal(size=(3, 3, 2, 4, 2)))
    *_, total = kernel_sharing_ratio(model, verbose=False)
    assert total.shared == 0 and total.saved == 0
    merged = merge_similar_kernels(model, verbose=False)
    assert type(merged.get_layer("conv")) is layers.TaskConv2D
    assert merged.get_layer("conv").sharing.name == "independent"


def test_table_of_a_backbone(capsys):
    """Tasks that start from one backbone: every kernel is stored once."""
    backbone = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(8, 3, activation="relu", name="conv1"),
            keras.layers.BatchNormalization(),
            keras.layers.Conv2D(6, 3, activation="relu", name="conv2"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5, name="fc"),
        ]
    )
    model = multitask(
        backbone,
        ["a", "b", "c"],
        sharing="similar",
        threshold={"conv1": 0.95, "*": 1.0},
        start="common",
    )
    assert model.get_layer("conv1").sharing.threshold == 0.95
    assert model.get_layer("conv2").sharing.threshold == 1.0
    assert model.get_layer("fc").sharing.name == "independent"
    rows = kernel_sharing_ratio(model)
    assert [row.layer for row in rows] == ["conv1", "conv2", "total"]
    assert all(row.ratio == 1 and row.saved == pytest.approx(2 / 3) for row in rows)
    assert all(row.pair_ratio == 1 for row in rows)
    assert [row.pairs for row in rows] == [3 * 3 * 8, 3 * 8 * 6, 3 * 72]
    assert "66.7%" in capsys.readouterr().out
    merged = merge_similar_kernels(model, verbose=False)
    expected = backbone.get_layer("conv1").count_params() + 2 * 8
    assert merged.get_layer("conv1").count_params() == expected


def test_errors(rng):
    """No layers of similar kernels, models that can't be cloned, bad numbers."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.TaskDense(3, 2, shared_input=True)(inputs))
    for function in (kernel_sharing_ratio, merge_similar_kernels):
        with pytest.raises(ValueError, match="no built layer of similar kernels"):
            function(model)

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = SimilarKernelConv2D(2, 3, 2, shared_input=True)

        def call(self, inputs):
            return self.conv(inputs)

    subclassed = Subclassed()
    subclassed(rng.normal(size=(1, 5, 5, 2)).astype("float32"))
    with pytest.raises(ValueError, match="functional or Sequential"):
        merge_similar_kernels(subclassed)
    for numbers in ([[0, 2]], [0, 1], [[0.5]]):
        with pytest.raises(ValueError, match="each used"):
            StoredOnce(numbers)
    with pytest.raises(ValueError, match="2 inputs and each output channel"):
        StoredOnce([[0, 0], [1, 2], [3, 1]], inputs=2)
    with pytest.raises(ValueError, match=r"\(out, T\)"):
        layers.TaskDense(3, 2, sharing=StoredOnce([[0, 1]])).build((None, 8))


def test_promises_of_stored_kernels(rng):
    """Saving, export, mixed precision: `check_layer`."""
    numbers = [[0, 0], [1, 2], [3, 1]]
    x = rng.normal(size=(2, 5, 5, 4)).astype("float32")
    check_layer(lambda **k: layers.TaskConv2D(3, 3, 2, sharing=StoredOnce(numbers), **k), x)
    layer = layers.TaskConv2D(3, 3, 2, sharing=StoredOnce(numbers))
    layer.build(x.shape)
    matrix = ops.convert_to_numpy(layer.task_matrix)
    np.testing.assert_allclose(matrix, [[1, 1 / 3], [1 / 3, 1]], atol=1e-6)
