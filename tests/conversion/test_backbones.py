"""Every backbone of the list: T independent networks at once, and back to one."""

import gc
import inspect
import os

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import multitask, single_task
from dmtrl_keras.conversion.survey import survey
from dmtrl_keras.ground.keras_private import flatten_layers

# The smallest images that each takes without its default size being asked for.
SIZES = {
    "VGG16": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "DenseNet121": 32,
    "InceptionV3": 75,
    "InceptionResNetV2": 75,
    "Xception": 71,
    "NASNetMobile": 32,
    "ConvNeXtTiny": 32,
}


# The others take minutes, and are of the same kinds of layers.
LONG = ("EfficientNetB0", "ConvNeXtTiny")
QUICK = ("VGG16", "MobileNet", "MobileNetV3Small", *LONG)
TRIED = [
    pytest.param(name, marks=[pytest.mark.long] * (name in LONG))
    for name in (SIZES if os.environ.get("DMTRL_ALL_BACKBONES") else QUICK)
]


def backbone_of(name, rng):
    """A backbone whose batch statistics are not those that it starts with."""
    size = SIZES[name]
    backbone = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=5, classifier_activation=None
    )
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            weights = [rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()]
            layer.set_weights(weights)
    # Logits of a few units, so that an absolute error means something.
    images = rng.uniform(0, 255, size=(2, 2, size, size, 3)).astype("float32")
    logits = ops.convert_to_numpy(backbone(images[0]))
    last = [layer for layer in backbone.layers if layer.weights][-1]
    last.set_weights([w / logits.std() for w in last.get_weights()])
    return backbone, images


def trainable(model):
    """The number of trainable parameters."""
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


@pytest.mark.parametrize("name", TRIED)
def test_round_trip(name, rng):
    """Both tasks hold the backbone's weights: its outputs, with one input and with two."""
    backbone, (first, second) = backbone_of(name, rng)
    expected = [ops.convert_to_numpy(backbone(x)) for x in (first, second)]
    assert 0.1 < expected[0].std() < 10
    tolerance = {"rtol": 0, "atol": 1e-4}
    for shared_input in (True, False):
        model = multitask(backbone, ["a", "b"], shared_input=shared_input)
        assert trainable(model) == 2 * trainable(backbone)
        outputs = model(first if shared_input else {"a": first, "b": second})
        np.testing.assert_allclose(outputs["a"], expected[0], **tolerance)
        other = expected[0] if shared_input else expected[1]
        np.testing.assert_allclose(outputs["b"], other, **tolerance)
        alone = single_task(model, "b")
        assert alone.count_params() == backbone.count_params()
        np.testing.assert_allclose(alone(second), expected[1], **tolerance)
    keras.utils.clear_session(free_memory=False)
    gc.collect()


FUNCTIONS = sorted(
    name for name, value in vars(keras.applications).items() if inspect.isfunction(value)
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_application_converts(name):
    """What `multitask` asks of every layer before it builds anything, without a weight."""
    with keras.StatelessScope(initialize_variables=False):
        backbone = getattr(keras.applications, name)(weights=None)
        surveyed = survey(backbone, None)
    # Nested models are entered; the statistics of an input normalization are settings.
    others = (keras.Model, keras.layers.Normalization)
    with_weights = {
        layer.name
        for layer in flatten_layers(backbone)
        if layer.weights and not isinstance(layer, others)
    }
    assert set(surveyed.with_weights) == with_weights
    keras.utils.clear_session(free_memory=False)


def test_there_are_forty():
    """Of Keras 3.13 to 3.15; the guide says so."""
    assert len(FUNCTIONS) == 40


def test_scaled_sums(rng):
    """The sums of InceptionResNetV2's blocks, `x + scale * r`, and back to one task."""
    from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 1, name="x")(inputs)
    r = keras.layers.Conv2D(4, 1, name="r")(x)
    outputs = CustomScaleLayer(0.17, name="sum")([x, r])
    backbone = keras.Model(inputs, outputs)
    images = rng.normal(size=(2, 6, 6, 3)).astype("float32")
    model = multitask(backbone, ["a", "b"], shared_input=False)
    expected = ops.convert_to_numpy(backbone(images))
    np.testing.assert_allclose(model({"a": images, "b": images})["b"], expected, atol=1e-6)
    alone = single_task(model, "b")
    assert type(alone.layers[-1]) is CustomScaleLayer
    np.testing.assert_allclose(alone(images), expected, atol=1e-6)
