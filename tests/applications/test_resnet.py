"""ResNet-18: its parameters, shapes, and stages in parts."""

import doctest

import keras
import pytest

from applications import resnet
from applications.resnet import STAGES, resnet18


def test_parameters():
    """11,689,512 with a classifier of 1000 classes, as He et al.'s network has."""
    images = keras.Input((224, 224, 3))
    x = resnet18(images)
    assert tuple(x.shape) == (None, 7, 7, 512)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(1000)(x))
    trainable = sum(v.shape.num_elements() for v in model.trainable_variables)
    assert trainable == 11_689_512


@pytest.mark.parametrize("border", range(STAGES + 1))
def test_in_two_parts(border):
    """Stages of two calls are those of one."""
    images = keras.Input((64, 64, 3))
    whole = keras.Model(images, resnet18(images, 4))
    x = resnet18(images, 4, 1, border, name="first")
    parts = keras.Model(images, resnet18(x, 4, border + 1, name="second"))
    assert parts.output.shape == whole.output.shape == (None, 2, 2, 32)
    assert parts.count_params() == whole.count_params()


def test_without_pooling():
    """Twice the size."""
    assert resnet18(keras.Input((64, 64, 3)), 4, pool=False).shape == (None, 4, 4, 32)
    assert doctest.testmod(resnet).failed == 0
