"""Copies of layers, with what is in no configuration."""

import inspect
import tempfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


def config_of(operation: Any) -> dict[str, Any]:
    """The configuration of an operation, of which another one can be made.

    Some layers, such as a few of KerasHub, say what they don't take.
    """
    try:
        # Some take entries out of what they are given.
        type(operation).from_config(operation.get_config())
    except (TypeError, ValueError):
        return _taken(operation)
    return operation.get_config()


def _taken(operation: Any) -> dict[str, Any]:
    """The part of a configuration that the constructor takes."""
    own = inspect.signature(type(operation).__init__).parameters
    names = {*own, "name", "trainable", "dtype"}
    return {n: value for n, value in operation.get_config().items() if n in names}


def copy_of(operation: Any) -> Any:
    """A new, unbuilt operation with the same configuration, and vocabulary."""
    try:
        new = type(operation).from_config(operation.get_config())
    except (TypeError, ValueError):
        new = type(operation).from_config(_taken(operation))
    if hasattr(operation, "save_assets") and hasattr(operation, "get_vocabulary"):
        # What was adapted is in no configuration, and no weight.
        with tempfile.TemporaryDirectory() as folder:
            operation.save_assets(folder)
            new.load_assets(folder)
    return new


def load_weights(layer: keras.layers.Layer, weights: Sequence[np.ndarray]) -> None:
    """Give a built layer its weights."""
    layer.set_weights(weights)
    if isinstance(layer, keras.layers.Normalization):
        # What it computes with is derived from its weights.
        layer.finalize_state()
