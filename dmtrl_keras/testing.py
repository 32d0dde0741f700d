"""Checks that every layer of the library passes, for its own tests and for users'."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.validation import check_bool, check_number, refusal


def _values(outputs: Any) -> Any:
    return tree.map_structure(
        lambda x: np.asarray(ops.convert_to_numpy(x), "float32"), outputs
    )


def _assert_close(actual: Any, expected: Any, tolerance: float, what: str) -> None:
    tree.assert_same_structure(actual, expected)
    for a, b in zip(tree.flatten(actual), tree.flatten(expected)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=what)


def _model(layer: keras.layers.Layer, inputs: Any) -> keras.Model:
    symbolic = tree.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype="float32"), inputs
    )
    return keras.Model(symbolic, layer(symbolic))


def check_layer(
    make_layer: Callable[..., keras.layers.Layer],
    inputs: Any,
    tolerance: float = 1e-4,
    export: bool = True,
) -> None:
    """Assert what every layer of this library promises.

    Symbolic and real shapes agree; the batch size may be unknown and change; the config is
    complete; `.keras` and weights files round trip, in safe mode; the layer trains, and
    the steps of `evaluate` and `predict` leave every variable as it was; it runs in mixed
    precision, and, on TensorFlow, compiled by XLA and exported as a SavedModel, with equal
    outputs.

    Args:
        make_layer: function with keyword arguments (`dtype`) that returns a new layer.
        inputs: float32 array `(batch, ...)`, or a list or dict of them.
        tolerance: float, relative and absolute, of the compared outputs.
        export: bool, whether to export too.

    Raises:
        AssertionError: if something does not hold.
        ValueError: on malformed arguments.

    Example:

    >>> import numpy as np
    >>> from dmtrl_keras.layers import TaskDense
    >>> check_layer(lambda **k: TaskDense(3, 2, **k), np.ones((4, 6), "float32"))
    """
    owner = "check_layer"
    check_number("tolerance", tolerance, owner)
    check_bool("export", export, owner)
    if not callable(make_layer):
        raise refusal("make_layer", make_layer, owner, "a function that returns a layer")
    flat = tree.flatten(inputs)
    if not flat or not all(getattr(x, "ndim", 0) > 1 for x in flat):
        raise refusal(
            "inputs", inputs, owner, "arrays (batch, ...), alone or in a structure"
        )
    layer = make_layer()
    if not isinstance(layer, keras.layers.Layer):
        raise refusal("make_layer", layer, owner, "a function that returns a layer")
    model = _model(layer, inputs)
    expected = _values(model(inputs))

    symbolic = tree.map_structure(lambda x: tuple(x.shape), model.outputs)
    for shape, output in zip(symbolic, tree.flatten(expected)):
        assert shape[0] is None, f"the batch size is fixed: {shape}"
        assert shape[1:] == output.shape[1:], (shape, output.shape)
    shapes = tree.map_structure(lambda x: x.shape, inputs)
    computed = layer.compute_output_shape(shapes)
    flat = computed.values() if isinstance(computed, dict) else [computed]
    real = [tuple(output.shape) for output in tree.flatten(expected)]
    assert sorted(map(tuple, flat)) == sorted(real), (computed, real)
    double = tree.map_structure(lambda x: np.concatenate([x, x]), inputs)
    for a, b in zip(tree.flatten(_values(model(double))), tree.flatten(expected)):
        np.testing.assert_allclose(a, np.concatenate([b, b]), tolerance, tolerance)

    config = layer.get_config()
    copy = type(layer).from_config(config)
    assert copy.get_config() == config, "from_config changes the config"
    names = [weight.path.split("/", 1)[-1] for weight in layer.weights]
    assert len(set(names)) == len(names), f"weights share a name: {names}"

    with tempfile.TemporaryDirectory() as folder:
        _check_files(model, make_layer, inputs, expected, pathlib.Path(folder), tolerance)
        if export and keras.config.backend() == "tensorflow":
            _check_export(model, inputs, expected, pathlib.Path(folder), tolerance)
    _check_training(model, inputs, expected)
    _check_mixed_precision(make_layer, inputs)


def _check_files(
    model: keras.Model,
    make_layer: Callable[..., keras.layers.Layer],
    inputs: Any,
    expected: Any,
    folder: pathlib.Path,
    tolerance: float,
) -> None:
    path = folder / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path, safe_mode=True)
    _assert_close(_values(loaded(inputs)), expected, tolerance, ".keras file")
    assert loaded.count_params() == model.count_params()
    path = folder / "model.weights.h5"
    model.save_weights(path)
    fresh = type(model).from_config(model.get_config())
    fresh.load_weights(path)
    _assert_close(_values(fresh(inputs)), expected, tolerance, "weights file")


def _check_export(
    model: keras.Model, inputs: Any, expected: Any, folder: pathlib.Path, tolerance: float
) -> None:
    model.export(folder / "saved", format="tf_saved_model", verbose=False)
    loaded = tensorflow().saved_model.load(str(folder / "saved"))
    _assert_close(_values(loaded.serve(inputs)), expected, tolerance, "SavedModel")


def _check_training(model: keras.Model, inputs: Any, expected: Any) -> None:
    labels = tree.map_structure(np.zeros_like, expected)
    # One batch by each of Keras's steps, without what `fit` and its like put around them:
    # that takes as long as the layer.
    model.compile("sgd", "mean_squared_error")
    before = [ops.convert_to_numpy(v) for v in model.variables]
    jit_compile = model.jit_compile
    if keras.config.backend() == "tensorflow":
        # This one function is compiled by XLA; the others are as Keras chooses.
        model.jit_compile = True
    outputs = _values(model.predict_on_batch(inputs))
    _assert_close(outputs, expected, 1e-3, "predict, on TensorFlow by XLA")
    model.jit_compile = jit_compile
    model.test_on_batch(inputs, labels)
    for variable, value in zip(model.variables, before):
        if "loss" in variable.path or "metric" in variable.path:
            continue
        np.testing.assert_array_equal(
            ops.convert_to_numpy(variable), value, err_msg=variable.path
        )
    if not model.trainable_variables:
        return
    # The sum keeps the gradient from vanishing in layers that average.
    start = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    labels = tree.map_structure(lambda x: x + 10.0, labels)
    model.train_on_batch(inputs, labels)
    moved = [
        not np.array_equal(ops.convert_to_numpy(v), value)
        for v, value in zip(model.trainable_variables, start)
    ]
    assert any(moved), "no variable was trained"
    for variable in model.trainable_variables:
        assert np.all(np.isfinite(ops.convert_to_numpy(variable))), variable.path


def _check_mixed_precision(
    make_layer: Callable[..., keras.layers.Layer], inputs: Any
) -> None:
    layer = make_layer(dtype="mixed_bfloat16")
    outputs = tree.flatten(layer(inputs))
    for output in outputs:
        dtype = keras.backend.standardize_dtype(output.dtype)
        assert dtype == "bfloat16", f"mixed precision gives {dtype}"
        assert np.all(np.isfinite(_values(output)))
    for weight in layer.weights:
        dtype = keras.backend.standardize_dtype(weight.dtype)
        discrete = dtype.startswith(("int", "bool"))
        assert dtype == "float32" or discrete, f"{weight.path} is {dtype}"
