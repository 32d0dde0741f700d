"""What becomes of each Keras layer in a network of T tasks: a table that is tried out.

    python -m docs.convertible

converts a small network around each layer of `keras.layers`, compares it with what it was
made of, and writes the table of `docs/guides/backbones.md`.
"""

import collections
import dataclasses
import functools
import pathlib

import keras
import numpy as np
from keras import layers as kl

from applications.results import write_block
from dmtrl_keras import multitask, single_task
from dmtrl_keras.ground.forms import Form
from dmtrl_keras.layers import TaskBatch, TaskCopies, TaskGroup, TaskSplit
from dmtrl_keras.tasks.graph import trace

PAGE = pathlib.Path(__file__).parent / "guides" / "backbones.md"
BLOCK = "convertible"
TASKS = ["a", "b"]
MOVES = (TaskBatch, TaskGroup, TaskSplit)
SIDE, COPIED, BATCH, NOT = (
    "all tasks side by side",
    "copies, one for each task",
    "as it is, on the examples of all tasks",
    "not converted",
)
IMAGE, SEQUENCE, ROW, VOLUME = (6, 6, 3), (6, 4), (8,), (4, 4, 4, 3)


@dataclasses.dataclass
class Example:
    """A layer, and the network that it is in.

    Attributes:
        make: function that returns the layer.
        shape: of an example.
        of_ids: whether it takes whole numbers, or words.
        call: function of the layer and of the features before it; by default it is called
            with them.
        direct: whether it takes the input itself, not features of a layer before it.
    """

    make: object
    shape: tuple = ROW
    of_ids: object = None
    call: object = lambda layer, x: layer(x)
    direct: bool = False


def _twice(layer, x):
    return layer([x, kl.Dense(x.shape[-1])(x)])


def _attending(layer, x):
    return layer(x, x)


def _made(name, *arguments):
    return getattr(kl, name)(*arguments)


def _class(name):
    """A class of `keras.layers`; Keras 3.13 lacks some."""
    return vars(kl).get(name)


def _ranks(name, made, shapes=(SEQUENCE, IMAGE, VOLUME)):
    found = {}
    for number, shape in enumerate(shapes, start=1):
        if hasattr(kl, f"{name}{number}D"):
            cls = getattr(kl, f"{name}{number}D")
            found[f"{name}{number}D"] = Example(lambda cls=cls: made(cls), shape)
    return found


def examples():
    """An `Example` of each layer by the name of its class."""
    found = {}
    for name in (
        *("AveragePooling", "MaxPooling", "UpSampling"),
        *("AdaptiveAveragePooling", "AdaptiveMaxPooling"),
    ):
        found |= _ranks(name, lambda cls: cls(2))
    for name in ("GlobalAveragePooling", "GlobalMaxPooling", "ZeroPadding", "Cropping"):
        found |= _ranks(name, lambda cls: cls())
    found |= _ranks("SpatialDropout", lambda cls: cls(0.5))
    for name in ("Conv", "SeparableConv"):
        found |= _ranks(name, lambda cls: cls(4, 2))
    found |= _ranks("DepthwiseConv", lambda cls: cls(2))
    found |= {
        f"Conv{n}DTranspose": Example(
            functools.partial(_made, f"Conv{n}DTranspose", 4, 2), shape
        )
        for n, shape in enumerate((SEQUENCE, IMAGE, VOLUME), start=1)
    }
    found |= {
        f"ConvLSTM{n}D": Example(
            functools.partial(_made, f"ConvLSTM{n}D", 3, 2), (2, *shape)
        )
        for n, shape in enumerate((SEQUENCE, IMAGE, (3, 3, 3, 2)), start=1)
    }
    for name in ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply"):
        found[name] = Example(_class(name), call=_twice)
    found["Subtract"] = Example(kl.Subtract, call=_twice)
    found["Dot"] = Example(lambda: kl.Dot(axes=-1), SEQUENCE, call=_twice)
    for name in ("Dropout", "AlphaDropout", "GaussianDropout", "GaussianNoise"):
        found[name] = Example(functools.partial(_made, name, 0.3))
    for name in ("ELU", "LeakyReLU", "ReLU", "PReLU", "Softmax", "Identity", "Flatten"):
        found[name] = Example(_class(name))
    for name in ("ActivityRegularization", "Masking", "UnitNormalization"):
        found[name] = Example(_class(name), SEQUENCE)
    for name in ("BatchNormalization", "LayerNormalization", "RMSNormalization"):
        found[name] = Example(_class(name))
    found["GroupNormalization"] = Example(lambda: kl.GroupNormalization(2))
    found["Normalization"] = Example(lambda: kl.Normalization(mean=1.0, variance=2.0))
    found["Rescaling"] = Example(lambda: kl.Rescaling(0.5))
    found["Activation"] = Example(lambda: kl.Activation("gelu"))
    found["Permute"] = Example(lambda: kl.Permute((2, 1)), SEQUENCE)
    found["RepeatVector"] = Example(lambda: kl.RepeatVector(3))
    found["Reshape"] = Example(lambda: kl.Reshape((2, 4)))
    found["Resizing"] = Example(lambda: kl.Resizing(4, 4), IMAGE)
    found["CenterCrop"] = Example(lambda: kl.CenterCrop(4, 4), IMAGE)
    found["Dense"] = Example(lambda: kl.Dense(4))
    found["EinsumDense"] = Example(
        lambda: kl.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), SEQUENCE
    )
    found["Embedding"] = Example(lambda: kl.Embedding(9, 4), (6,), "int32", direct=True)
    found["ReversibleEmbedding"] = Example(
        lambda: kl.ReversibleEmbedding(9, 4), (6,), "int32", direct=True
    )
    found["MultiHeadAttention"] = Example(
        lambda: kl.MultiHeadAttention(2, 3), SEQUENCE, call=_attending
    )
    found["GroupedQueryAttention"] = Example(
        lambda: kl.GroupQueryAttention(3, 4, 2), SEQUENCE, call=_attending
    )
    for name in ("Attention", "AdditiveAttention"):
        found[name] = Example(_class(name), SEQUENCE, call=_twice)
    for name in ("GRU", "LSTM", "SimpleRNN"):
        found[name] = Example(functools.partial(_made, name, 3), SEQUENCE)
    found["RNN"] = Example(
        lambda: kl.RNN(kl.StackedRNNCells([kl.GRUCell(3), kl.LSTMCell(3)])), SEQUENCE
    )
    found["Bidirectional"] = Example(lambda: kl.Bidirectional(kl.GRU(3)), SEQUENCE)
    found["TimeDistributed"] = Example(lambda: kl.TimeDistributed(kl.Dense(3)), SEQUENCE)
    found["SpectralNormalization"] = Example(lambda: kl.SpectralNormalization(kl.Dense(3)))
    found["STFTSpectrogram"] = Example(
        lambda: kl.STFTSpectrogram(frame_length=8, fft_length=8), (64, 1)
    )
    found["MelSpectrogram"] = Example(
        lambda: kl.MelSpectrogram(fft_length=8, num_mel_bins=4, sequence_stride=4), (64,)
    )
    images = (
        "RandomFlip",
        *("RandomGrayscale", "RandomInvert"),
        *("AutoContrast", "RandomErasing"),
        *("ContrastLimitedAdaptiveHistogramEqualization", "RandomElasticTransform"),
        *("RandAugment", "AugMix", "RandomGaussianBlur", "RandomPerspective"),
        *("RandomColorJitter", "Solarization"),
    )
    for name in images:
        found[name] = Example(_class(name), IMAGE)
    for name in ("RandomBrightness", "RandomContrast", "RandomHue", "RandomRotation"):
        found[name] = Example(functools.partial(_made, name, 0.2), IMAGE)
    for name in ("RandomColorDegeneration", "RandomSaturation", "RandomSharpness"):
        found[name] = Example(functools.partial(_made, name, 0.2), IMAGE)
    found["RandomZoom"] = Example(lambda: kl.RandomZoom(0.2), IMAGE)
    found["RandomTranslation"] = Example(lambda: kl.RandomTranslation(0.1, 0.1), IMAGE)
    found["RandomCrop"] = Example(lambda: kl.RandomCrop(4, 4), IMAGE)
    found["RandomPosterization"] = Example(lambda: kl.RandomPosterization(4), IMAGE)
    found["Pipeline"] = Example(
        lambda: kl.Pipeline([kl.RandomFlip(), kl.Rescaling(0.5)]), IMAGE
    )
    words = {"of_ids": "string", "direct": True}
    found["StringLookup"] = Example(
        lambda: kl.StringLookup(vocabulary=["a", "b"], output_mode="one_hot"), (1,), **words
    )
    found["TextVectorization"] = Example(
        lambda: kl.TextVectorization(vocabulary=["a", "b"], output_sequence_length=4),
        (1,),
        **words,
    )
    found["Hashing"] = Example(lambda: kl.Hashing(5), (1,), **words)
    ids = {"of_ids": "int32", "direct": True}
    found["IntegerLookup"] = Example(
        lambda: kl.IntegerLookup(vocabulary=[1, 2, 3]), (1,), **ids
    )
    found["CategoryEncoding"] = Example(lambda: kl.CategoryEncoding(9), (1,), **ids)
    found["Discretization"] = Example(
        lambda: kl.Discretization(bin_boundaries=[0.0, 1.0]), direct=True
    )
    # Keras 3.13 lacks some.
    known = keras_layers()
    return {name: one for name, one in found.items() if name in known}


# Why layers of `keras.layers` are in no network that `multitask` converts.
WITHOUT = {
    "InputLayer": "every network has its own",
    "Layer": "the base of all",
    "Wrapper": "the base of layers that have another one",
    "Lambda": "it can't be loaded in safe mode; write a layer",
    "FlaxLayer": "JAX's own",
    "JaxLayer": "JAX's own",
    "TFSMLayer": "a SavedModel, whose weights can't be seen",
    "TorchModuleWrapper": "PyTorch's own",
    "GRUCell": "within `RNN`",
    "LSTMCell": "within `RNN`",
    "SimpleRNNCell": "within `RNN`",
    "StackedRNNCells": "within `RNN`",
    "HashedCrossing": "it takes a tuple of columns; before the network, in the data",
    "MixUp": "of images and labels together; before the network, in the data",
    "CutMix": "of images and labels together; before the network, in the data",
    "Equalization": "Keras can't put it into a functional model",
    "RandomShear": "Keras can't load its configuration",
    "MaxNumBoundingBoxes": "of boxes, not of tensors; before the network, in the data",
}


def keras_layers():
    """The classes of `keras.layers` by name, each once."""
    found = {}
    for name in sorted(dir(kl)):
        cls = _class(name)
        if isinstance(cls, type) and issubclass(cls, kl.Layer):
            found[cls.__name__] = cls
    return found


def network(example):
    """A backbone with a layer between two others, or right after the input."""
    inputs = keras.Input(example.shape, dtype=example.of_ids or "float32")
    x = inputs if example.direct else kl.Dense(example.shape[-1], name="before")(inputs)
    layer = example.make()
    layer.name = "tried"
    x = example.call(layer, x)
    if example.of_ids or example.direct:
        x = keras.ops.cast(x, "float32")
    return keras.Model(inputs, x)


def drawn(example, rng, count=3):
    """Examples of it."""
    shape = (count, *example.shape)
    if example.of_ids == "string":
        words = rng.choice(["a", "b", "c"], size=shape)
        return keras.ops.convert_to_tensor(words.tolist())
    if example.of_ids:
        return rng.integers(1, 4, size=shape).astype("int32")
    return rng.normal(size=shape).astype("float32")


def how(example):
    """How a layer is converted, and how far the outputs are from the backbone's.

    Returns:
        `(how, error)`: one of the ways, and the largest difference, relative to the
        largest output, of the network of all tasks and that of one.
    """
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    backbone = network(example)
    # What takes the input itself meets features of each task's own, too.
    shared = not example.direct
    model = multitask(backbone, TASKS, shared_input=shared, verbose=False)
    x = drawn(example, rng)
    expected = np.asarray(backbone(x, training=False), "float64")
    found = model(x if shared else dict.fromkeys(TASKS, x), training=False)["b"]
    alone = single_task(model, "b")(x, training=False)
    scale = np.abs(expected).max() or 1.0
    error = max(np.abs(np.asarray(y) - expected).max() / scale for y in (found, alone))
    calls = [c for c in trace(model).calls if c.operation.name.startswith("tried")]
    calls = [c for c in calls if not isinstance(c.operation, MOVES)]
    if any(isinstance(call.operation, TaskCopies) for call in calls):
        return COPIED, error
    forms = {keras.tree.flatten(call.outputs)[0].form for call in calls}
    return (SIDE if Form.GROUPED in forms else BATCH), error


def table():
    """The rows of the table: ways, and the layers of each."""
    found = collections.defaultdict(list)
    for name, example in sorted(examples().items()):
        found[how(example)[0]].append(name)
    return found


def markdown(found):
    """The table as it stands on the page."""
    lines = ["| how | number | layers |", "| --- | --- | --- |"]
    for way in (SIDE, COPIED, BATCH):
        names = ", ".join(f"`{name}`" for name in found[way])
        lines.append(f"| {way} | {len(found[way])} | {names} |")
    reasons = ", ".join(f"`{name}` ({why})" for name, why in WITHOUT.items())
    lines.append(f"| {NOT} | {len(WITHOUT)} | {reasons} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_block(PAGE, BLOCK, markdown(table()))
