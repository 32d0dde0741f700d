"""Trunks of networks: classes of `keras.applications`, and files."""

import pathlib

import keras

from .reading import DataError


def load_trunk(name, size, feature_layer=None, weights="imagenet"):
    """A network from images to features.

    Args:
        name: a class of `keras.applications`, or the path of a `.keras` file.
        size: int, the side of the images.
        feature_layer: name of the layer whose output are the features; None: the last.
        weights: of `keras.applications`.

    Returns:
        `(model, preprocess)`: a Keras model, and a function of images, 0 to 255, or None:
        the images are taken as they are.

    Raises:
        DataError: if it is neither.
    """
    if pathlib.Path(name).suffix == ".keras":
        model = _up_to(keras.saving.load_model(name), feature_layer)
        small = keras.Input((size, size, 3))
        copy = keras.models.clone_model(model, input_tensors=[small])
        copy.set_weights(model.get_weights())
        return copy, None
    if not callable(getattr(keras.applications, name, None)):
        raise DataError(
            "The trunk must be a class of keras.applications or a .keras file. "
            f"Received: {name!r}."
        )
    make = getattr(keras.applications, name)
    model = make(
        weights=weights, include_top=False, pooling="avg", input_shape=(size, size, 3)
    )
    for module in vars(keras.applications).values():
        if getattr(module, name, None) is make and hasattr(module, "preprocess_input"):
            return _up_to(model, feature_layer), module.preprocess_input
    return _up_to(model, feature_layer), None


def _up_to(model, layer):
    """The functional model from the only input to a layer, or to the only output."""
    (output,) = model.outputs if layer is None else [model.get_layer(layer).output]
    return keras.Model([model.inputs[0]], output)
