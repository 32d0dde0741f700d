"""Landmarks, pose and attributes of faces: the experiment of Task Relation Networks.

Li et al., "Task Relation Networks" (WACV 2019), section 4.2.3, Table 1: the places of five
landmarks (regression) and the pose (five classes), on the MTFL data set (Zhang et al.
2014), with ResNet-18; or any of these, gender, smile and glasses (`--tasks`), and a small
network on principal components (`--network mlp`), which takes seconds. Or age, gender and
race of faces as UTKFace and Adience have them (`portraits`).

- `stl`: a network for each task;
- `mtl`: the first four of the five stages are shared, or the first layer of the two;
- `trn-output`: the same, the outputs held to the similarity of the labels;
- `trn-hidden`: the hidden features (those of the last stage, after pooling) instead;
- `trn`: outputs and hidden features;
- `trn-wrong`: the same, held to a wrong similarity (`--wrong-target`). What it gains too is
  none of the relation's.

With `--validation` the weights of the relations are chosen, among the `--scales`, on a part
of the training images of the first seed.

    python -m applications.mtfl --data FOLDER
    python -m applications.mtfl --data FOLDER --convergence
"""

import copy
import itertools
import pathlib
import typing
import zipfile

import keras
import numpy as np
import pandas as pd
from keras import layers
from PIL import Image
from sklearn.decomposition import PCA

from dmtrl_keras import MultiTaskModel, Relation, TaskRelationModel, task_similarity
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.layers import TRL

from .arguments import MOMENTUM, add_images, real, whole, whole_batches
from .experiment import (
    Experiment,
    Table,
    decaying,
    digest_of,
    figure_of,
    held_out,
    hits,
    ticking,
    timed,
)
from .files import cached_arrays
from .portraits import AGES, RACES, is_portraits, load_portraits
from .reading import DataError, open_zip, read_image, read_text, reading
from .resnet import STAGES, resnet18
from .results import mean_and_spread

TITLES = {
    "stl": "STL",
    "mtl": "MTL",
    "trn-output": "TRN (output)",
    "trn-hidden": "TRN (hidden)",
    "trn": "TRN (hidden + output)",
    "trn-wrong": "TRN (hidden + output), wrong target",
}
# Tasks and the units of their outputs: numbers, and scores of classes.
TASKS = {"landmarks": 10, "pose": 5, "gender": 2, "smile": 2, "glasses": 2}
TASKS |= {"age": len(AGES), "race": RACES}
TRAINING, TESTING = "training.txt", "testing.txt"
# As in `layers.TRL`: features are never quite independent of each other.
RIDGE = 1e-3


# The argument `--data` of faces.
DATA = {
    "type": pathlib.Path,
    "required": True,
    "help": "folder or zip file: MTFL, or faces named as UTKFace's or listed as Adience's",
}


class Faces(typing.NamedTuple):
    """Faces with their labels; None is what a data set does not have.

    Attributes:
        images: uint8 `(n, size, size, 3)`.
        landmarks: float32 `(n, 10)`, in shares of the image's side: x of the left eye, the
            right eye, the nose, the left and the right corner of the mouth, then y.
        pose: ints `(n,)`, 0 to 4, from the left profile to the right.
        gender: ints `(n,)`, 0 (male) and 1.
        smile: ints `(n,)`, 0 (smiling) and 1.
        glasses: ints `(n,)`, 0 (with) and 1.
        age: ints `(n,)`, numbers of groups, see `portraits.AGES`.
        race: ints `(n,)`.
        years: float32 `(n,)`, the age.
    """

    images: np.ndarray
    landmarks: np.ndarray | None
    pose: np.ndarray | None
    gender: np.ndarray
    smile: np.ndarray | None
    glasses: np.ndarray | None
    age: np.ndarray | None = None
    race: np.ndarray | None = None
    years: np.ndarray | None = None


def some(faces, indices):
    """Some of the faces, as `Faces`."""
    return Faces(*(None if x is None else x[indices] for x in faces))


def load_mtfl(path, size):
    """The training and the test part of MTFL, in the data set's original layout.

    Args:
        path: a folder, or a zip file, that somewhere has `training.txt` and `testing.txt`,
            and beside them the images that these name. A line is the path of an image, x of
            five landmarks, y of five landmarks, gender, smile, glasses and pose (1 to 5).
        size: int; images are scaled to this side.

    Returns:
        `(training, testing)`, each `Faces`.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if a file is not in that form.
    """
    root = _root(pathlib.Path(path))
    return _faces(root, TRAINING, size), _faces(root, TESTING, size)


def _root(path):
    """The folder of the lists, in a folder or a zip file."""
    if path.is_dir():
        found = sorted(path.rglob(TRAINING))
        if found:
            return found[0].parent
    elif path.exists():
        archive = open_zip(path)
        found = [n for n in archive.namelist() if pathlib.PurePath(n).name == TRAINING]
        if found:
            return zipfile.Path(archive, found[0]).parent
    else:
        raise FileNotFoundError(f"There is no {path}.")
    raise FileNotFoundError(f"{path} has no {TRAINING}.")


def _faces(root, name, size):
    listed = root.joinpath(name)
    if not listed.is_file():
        raise FileNotFoundError(f"There is no {listed}.")
    lines = [line.split() for line in read_text(listed).splitlines() if line.strip()]
    images, landmarks, classes = [], [], []
    for number, (path, *values) in enumerate(lines, start=1):
        with reading(f"{listed}, line {number}"):
            row = np.array(values, "float64")
            if len(row) != 14 or row[13] not in range(1, 6):
                raise DataError("expected 14 numbers, the last one the pose, 1 to 5.")
            if not np.isin(row[10:13], (1, 2)).all():
                raise DataError("expected gender, smile and glasses to be 1 or 2.")
            # The original was written on Windows.
            file = root.joinpath(*path.replace("\\", "/").split("/"))
            image = read_image(file).convert("RGB")
            points = row[:10].reshape(2, 5) / [[image.width], [image.height]]
            # NaN is nowhere.
            if not np.all((points >= -1) & (points <= 2)):
                raise DataError(
                    "expected landmarks on the image, or no farther from it than its own "
                    f"size. Received: {' '.join(values[:10])}."
                )
            if np.hypot(*(points[:, 0] - points[:, 1])) < 1e-3:
                raise DataError(
                    "expected eyes in two places, since errors are shares of their "
                    f"distance. Received: {' '.join(values[:10])}."
                )
            images.append(np.asarray(image.resize((size, size)), "uint8"))
        landmarks.append(points.ravel())
        classes.append(row[[13, 10, 11, 12]].astype(int) - 1)
    if not images:
        raise DataError(f"{listed} has no lines.")
    return Faces(np.stack(images), np.float32(landmarks), *np.transpose(classes))


def of_portraits(options):
    """`(faces, folds)` of UTKFace or Adience, the latter None where there are none."""
    found = load_portraits(options.data, options.size)
    faces = Faces(
        found.images,
        None,
        None,
        found.gender,
        None,
        None,
        found.age,
        found.race,
        found.years,
    )
    return faces, found.fold


def _completely_labelled(options, console):
    """`(training, testing)` of these, the latter None where there are no folds."""
    faces, folds = of_portraits(options)
    known = (faces.age >= 0) & (faces.gender >= 0)
    if console is not None:
        console.print(
            f"{known.sum()} faces; {len(known) - known.sum()} with a label that is not "
            "known are left out."
        )
    if not known.any():
        raise DataError(f"{options.data}: expected faces with age and gender. Found none.")
    if folds is None:
        return some(faces, known), None
    test = folds == folds.max()
    return some(faces, known & ~test), some(faces, known & test)


def add_faces(parser):
    """Add the arguments that say which faces are trained and tested on."""
    parser.add_argument(
        "--training-images",
        nargs="+",
        type=whole(2),
        help="random parts of as many, of each seed; else all",
    )
    parser.add_argument(
        "--test-images",
        type=whole(1),
        help="test on as many of the training part, cut out once, instead of on the test "
        "part, whose photographs are of another kind; without a test part a fifth",
    )
    parser.add_argument(
        "--extent",
        nargs=2,
        type=real(above=0, most=1),
        default=[0.28, 0.48],
        help="share of a training image's side that the landmarks take up",
    )


def check_extent(parser, options):
    """Refuse a span of extents that is none."""
    if options.extent[0] > options.extent[1]:
        parser.error(f"--extent: expected the least and the most, got {options.extent}")


def check_tasks(options, faces, known):
    """Refuse tasks, of those that are known, that a data set does not have."""
    for task in options.tasks:
        if getattr(faces, task) is None:
            has = [name for name in known if getattr(faces, name) is not None]
            raise DataError(f"--tasks: {options.data} has {has}. Received: {task!r}.")


def check_counts(options, count):
    """Refuse parts of the training images that are larger than all."""
    if max(options.training_images or [0]) > count:
        raise DataError(
            f"--training-images: there are {count}. Received: {options.training_images}."
        )


def apart(options, training):
    """The training part, in two: the second one's faces are cut out, as test images."""
    count, most = options.test_images, len(training.images) - 2
    if count is None:
        # The data set has no test part.
        count = max(1, len(training.images) // 5)
    if count > most:
        raise DataError(
            f"--test-images: expected at most {most}, so that two are left for "
            f"training. Received: {count}."
        )
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(training.images))
    testing = cut_out(some(training, order[:count]), options.extent, rng)
    return some(training, order[count:]), testing


# The places of the landmarks in a mirror image: eyes and corners of the mouth change sides.
_MIRRORED = [1, 0, 2, 4, 3]


def cut_out(faces, extent, rng):
    """Faces cut out of their images, at random scales and places, half of them mirrored.

    Faces without landmarks are cut out already, and only mirrored.

    The training images of MTFL show heads and shoulders, the test images faces. Where
    the faces are is known from the landmarks, which a test image must not tell.

    Args:
        faces: `Faces`.
        extent: pair of floats, the least and the most of the new image's side that the
            landmarks' bounding box takes up.
        rng: NumPy generator.

    Returns:
        `Faces` of the same number and size.
    """
    count, size = faces.images.shape[:2]
    if faces.landmarks is None:
        mirrored = rng.random(count) < 0.5
        images = faces.images.copy()
        images[mirrored] = images[mirrored, :, ::-1]
        return faces._replace(images=images)
    points = faces.landmarks.reshape(-1, 2, 5)
    low, high = points.min(axis=2), points.max(axis=2)
    side = (high - low).max(axis=1) / rng.uniform(*extent, size=count)
    middle = (low + high) / 2 + side[:, None] * rng.uniform(-0.1, 0.1, (count, 2))
    corner = middle - side[:, None] / 2
    images = np.empty_like(faces.images)
    for n, (image, (x, y), width) in enumerate(zip(faces.images, corner, side)):
        box = tuple(size * value for value in (x, y, x + width, y + width))
        # What lies outside of the image is black.
        images[n] = Image.fromarray(image).transform(
            (size, size), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
        )
    points = (points - corner[:, :, None]) / side[:, None, None]
    mirrored = rng.random(count) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    points[mirrored] = points[mirrored][:, :, _MIRRORED]
    points[mirrored, 0] = 1 - points[mirrored, 0]
    pose = np.where(mirrored, 4 - faces.pose, faces.pose)
    landmarks = points.reshape(-1, 10).astype("float32")
    return faces._replace(images=images, landmarks=landmarks, pose=pose)


def normalized_mean_error(truth, predicted):
    """The mean distance of landmarks, as a share of the distance of the eyes.

    Args:
        truth: array `(n, 10)`, as in `Faces`.
        predicted: array `(n, 10)`.

    Returns:
        A float.

    Example:

    >>> import numpy as np
    >>> truth = np.array([[0.2, 0.8, 0.5, 0.3, 0.7, 0.3, 0.3, 0.5, 0.8, 0.8]])
    >>> moved = truth + np.array([[0.3, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    >>> round(normalized_mean_error(truth, moved), 3)
    0.1
    """
    truth, predicted = (np.reshape(x, (-1, 2, 5)) for x in (truth, predicted))
    distances = np.linalg.norm(predicted - truth, axis=1)
    eyes = np.linalg.norm(truth[:, :, 0] - truth[:, :, 1], axis=1)
    return float(np.mean(distances / eyes[:, None]))


def make_resnet(tasks, shared_stages, size, width, pool=True):
    """ResNet-18 with several tasks.

    Args:
        tasks: list of keys of `TASKS`.
        shared_stages: int, how many of the five stages the tasks share: 0 are networks of
            their own.
        size: int, side of the images.
        width: int, filters of the first stage.
        pool: bool, whether the first stage ends with max pooling.

    Returns:
        A `MultiTaskModel` with an output for each task, landmarks (standardised) or logits,
        and layers `<task>_hidden`.
    """
    images = keras.Input((size, size, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1, name="rescaling")(images)
    x = resnet18(x, width, 1, shared_stages, pool, name="shared")
    outputs = {}
    for task in tasks:
        own = resnet18(x, width, shared_stages + 1, STAGES, pool, name=task)
        own = layers.GlobalAveragePooling2D(name=f"{task}_hidden")(own)
        outputs[task] = layers.Dense(TASKS[task], name=task)(own)
    return MultiTaskModel(images, outputs)


def make_mlp(tasks, shared, components, units):
    """Two hidden layers on principal components, of which the tasks may share the first.

    Args:
        tasks: list of keys of `TASKS`.
        shared: bool, whether they do.
        components: int.
        units: int, of the first layer; the second, of each task, has half of them.

    Returns:
        As `make_resnet`.
    """
    inputs = keras.Input((components,), name="components")
    common = layers.Dense(units, "relu", name="shared")(inputs) if shared else None
    outputs = {}
    for task in tasks:
        own = common
        if own is None:
            own = layers.Dense(units, "relu", name=f"{task}_first")(inputs)
        own = layers.Dense(max(units // 2, 1), "relu", name=f"{task}_hidden")(own)
        outputs[task] = layers.Dense(TASKS[task], name=task)(own)
    return MultiTaskModel(inputs, outputs)


def make_model(options, method, components=None):
    """The network of a method, with its relations.

    Args:
        options: the command's.
        method: a key of `TITLES`.
        components: int, how many principal components there are; None: `options` says it.
    """
    if options.network == "mlp":
        components = options.components if components is None else components
        network = make_mlp(options.tasks, method != "stl", components, options.units)
    else:
        shared = 0 if method == "stl" else options.shared_stages
        sizes = options.size, options.width, not options.no_pool
        network = make_resnet(options.tasks, shared, *sizes)
    places = places_of(method)
    if not places:
        return network
    hidden = {task: f"{task}_hidden" for task in options.tasks}
    target = options.wrong_target if method == "trn-wrong" else None
    relations = [
        Relation(
            "output" if place == "output" else hidden,
            getattr(options, f"{place}_weight"),
            name=place,
            target=target,
        )
        for place in places
    ]
    return TaskRelationModel(
        network,
        relations,
        momentum=options.momentum,
        estimate=options.estimate,
        gradient=options.gradient,
    )


def places_of(method):
    """Where a method relates features, a tuple of `"output"` and `"hidden"`."""
    places = {"trn-output": ("output",), "trn-hidden": ("hidden",)}
    return places.get(method, ("output", "hidden") if method.startswith("trn") else ())


def components_of(images, most):
    """Principal components of images, of unit variance.

    Args:
        images: uint8 `(n, size, size, 3)`; their colours are averaged.
        most: int, the number of components, if there are as many examples.

    Returns:
        A function from images like these to a float32 array `(n, components)`.
    """

    def grey(images):
        return images.mean(axis=-1, dtype="float32").reshape(len(images), -1)

    pixels = grey(images)
    found = PCA(min(most, *pixels.shape), whiten=True, random_state=0).fit(pixels)
    return lambda images: found.transform(grey(images)).astype("float32")


class Trained(typing.NamedTuple):
    """A trained network, with what its inputs and outputs mean.

    Attributes:
        model: `MultiTaskModel`.
        inputs: function from images to what the model takes.
        mean: array `(10,)`, of the landmarks.
        deviation: array `(10,)`, of the landmarks.
    """

    model: MultiTaskModel
    inputs: typing.Callable
    mean: np.ndarray
    deviation: np.ndarray


def train(options, method, training, seed, tick, watch=None):
    """Train the network of a method.

    The images are cut out anew in every epoch, for principal components once.

    Args:
        options: the command's.
        method: a key of `TITLES`.
        training: `Faces`.
        seed: int, of the images that are cut out.
        tick: function without arguments, called after each epoch.
        watch: None, or `(callbacks, faces)`: Keras callbacks, which see the loss on these
            `Faces` as `val_loss`.

    Returns:
        A `Trained`.
    """
    rng = np.random.default_rng(seed)
    cut = cut_out(training, options.extent, rng)
    points = np.zeros((1, 10)) if cut.landmarks is None else cut.landmarks
    mean, deviation = points.mean(axis=0), points.std(axis=0)
    count = whole_batches(options, len(training.images))
    inputs, components = _same, None
    if options.network == "mlp":
        inputs = components_of(cut.images, options.components)
        components = inputs(cut.images[:1]).shape[1]
    model = make_model(options, method, components)
    classes = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses = {
        t: "mean_squared_error" if t == "landmarks" else classes for t in options.tasks
    }
    steps = -(-len(training.images) // options.batch_size)
    model.compile(
        decaying(options, steps * options.epochs),
        losses,
        loss_weights=options.loss_weights or None,
    )

    def data(faces):
        labels = {task: getattr(faces, task) for task in options.tasks}
        if "landmarks" in labels:
            labels["landmarks"] = (faces.landmarks - mean) / deviation
        return inputs(faces.images), labels

    callbacks, watched = ([], None) if watch is None else (watch[0], data(watch[1]))
    if options.network == "mlp":
        model.fit(
            *data(some(cut, slice(count))),
            batch_size=options.batch_size,
            epochs=options.epochs,
            validation_data=watched,
            callbacks=ticking(tick, callbacks),
            verbose=0,
        )
        return Trained(model, inputs, mean, deviation)
    fit_anew(
        model,
        lambda: data(some(cut_out(training, options.extent, rng), slice(count))),
        options.epochs,
        options.batch_size,
        tick,
        callbacks,
        watched,
    )
    return Trained(model, inputs, mean, deviation)


def fit_anew(model, data, epochs, batch_size, tick, callbacks=(), watched=None):
    """Train on data that each epoch makes anew.

    As arrays, since TensorFlow's generators make it return memory at every step, with
    which a step of the small networks took twice as long.

    Args:
        model: a compiled Keras model.
        data: function without arguments that returns the `(inputs, labels)` of an epoch.
        epochs: int.
        batch_size: int.
        tick: function without arguments, called after each epoch.
        callbacks: Keras callbacks, which see the end of each epoch.
        watched: None, or `(inputs, labels)` of which these see the loss as `val_loss`.
    """
    every = keras.callbacks.CallbackList(ticking(tick, callbacks), model=model)
    every.on_train_begin()
    for epoch in range(epochs):
        fitted = model.fit(
            *data(),
            batch_size=batch_size,
            initial_epoch=epoch,
            epochs=epoch + 1,
            validation_data=watched,
            verbose=0,
        )
        logs = {name: values[-1] for name, values in fitted.history.items()}
        every.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    every.on_train_end()


def _same(images):
    return images


def features_of(trained, images, tasks):
    """Outputs and hidden features: by `"output"` and `"hidden"`, dicts by task."""
    model = trained.model
    hidden = {task: model.get_layer(f"{task}_hidden").output for task in tasks}
    both = keras.Model(model.input, {"output": model.output, "hidden": hidden})
    return both.predict(trained.inputs(images), batch_size=256, verbose=0)


def labels_of(faces, tasks=("landmarks", "pose")):
    """The labels as vectors, a dict by task."""
    found = {task: getattr(faces, task) for task in tasks}
    return {t: y if t == "landmarks" else np.eye(TASKS[t])[y] for t, y in found.items()}


def similarity_of(sets):
    """Offline similarity (TRN Eq. 11) of the arrays of tasks, the mean over their pairs."""
    return float(np.mean(list(similarities_of(sets).values())))


def similarities_of(sets):
    """Offline similarities (TRN Eq. 11) of the arrays of tasks, a dict by pair."""
    return {
        f"{i}-{j}": task_similarity(sets[i], sets[j], RIDGE)
        for i, j in itertools.combinations(sets, 2)
    }


def train_and_test(options, method, training, testing, seed, tick, callbacks=None):
    """Train and test one method.

    Args:
        options: the command's.
        method: a key of `TITLES`.
        training: `Faces`.
        testing: `Faces`.
        seed: int.
        tick: function without arguments, called after each epoch.
        callbacks: None, or Keras callbacks that see the loss on `testing` as `val_loss`.

    Returns:
        A dict: errors in shares by task, the similarities of features and labels on the
        test part by pair of tasks, the number of weights, seconds of training; with
        relations also the last online similarities.
    """
    watch = None if callbacks is None else (callbacks, testing)
    with timed(seed) as took:
        trained = train(options, method, training, seed, tick, watch)
    features = features_of(trained, testing.images, options.tasks)
    sets = features | {"labels": labels_of(testing, options.tasks)}
    errors = {}
    for task, outputs in features["output"].items():
        if task == "landmarks":
            predicted = outputs * trained.deviation + trained.mean
            errors[task] = normalized_mean_error(testing.landmarks, predicted)
        else:
            errors[task] = 1 - float(np.mean(hits(outputs, getattr(testing, task))))
    results = {
        "errors": errors,
        "similarity": {name: similarities_of(by_task) for name, by_task in sets.items()},
        "weights": trained.model.count_params(),
        "seconds": took.seconds,
    }
    if isinstance(trained.model, TaskRelationModel):
        results["online"] = {
            name: {f"{i}-{j}": value for (i, j), value in pairs.items()}
            for name, pairs in trained.model.similarities().items()
        }
    return results


def scaled(options, scale):
    """The options with both weights of the relations times a scale."""
    own = copy.copy(options)
    own.output_weight = scale * options.output_weight
    own.hidden_weight = scale * options.hidden_weight
    return own


def summarize(runs, tasks):
    """The table of the paper's Table 1, a data frame of strings."""
    rows = []
    by = ["training_images", "method", "output_weight", "hidden_weight"]
    for keys, group in runs.groupby(by, sort=False, dropna=False):
        images, method, *weights = keys
        similarity = pd.DataFrame(list(group["similarity"]))
        errors = pd.DataFrame(list(group["errors"]))
        row = {
            "Images": "all" if pd.isna(images) else f"{images:g}",
            "Method": TITLES[method],
        }
        for place, weight in zip(("output", "hidden"), weights):
            row[f"λ {place}"] = "-" if pd.isna(weight) else f"{weight:g}"
        for name in ("hidden", "output", "labels"):
            values = [np.mean(list(by_pair.values())) for by_pair in similarity[name]]
            row[f"τ {name}"] = mean_and_spread(values)
        # The test part is the same in all runs.
        row["τ labels"] = row["τ labels"].split()[0]
        for task in tasks:
            if task == "landmarks":
                row["Landmarks, error %"] = mean_and_spread(100 * errors[task])
            else:
                accuracy = 100 * (1 - errors[task])
                row[f"{task.capitalize()}, accuracy %"] = mean_and_spread(accuracy)
        row["Runs"] = len(group)
        row["Seconds"] = mean_and_spread(group["seconds"], 0)
        rows.append(row)
    return pd.DataFrame(rows)


def online_estimates(features, momentum, batch_size, steps, rng):
    """The similarities that Algorithm 1 finds, step by step.

    Args:
        features: dict from name to a dict from task to array `(n, d)`.
        momentum: float in [0, 1).
        batch_size: int.
        steps: int.
        rng: NumPy generator; batches are drawn without replacement, epoch by epoch.

    Returns:
        A data frame with a column for each name and a row for each step.
    """
    count = len(next(iter(next(iter(features.values())).values())))
    size = min(batch_size, count)
    epochs = -(-steps // (count // size))
    batches = [
        order[start : start + size]
        for order in (rng.permutation(count) for _ in range(epochs))
        for start in range(0, count - size + 1, size)
    ]
    found = {}
    for name, by_task in features.items():
        layer = TRL(momentum=momentum, ridge=RIDGE)
        layer.build({task: (size, x.shape[1]) for task, x in by_task.items()})
        step = tensorflow().function(lambda sets, layer=layer: layer(sets, training=True))
        found[name] = [
            float(np.squeeze(step({task: x[chosen] for task, x in by_task.items()})))
            for chosen in batches[:steps]
        ]
    return pd.DataFrame(found)


def examples_remembered(momentum, batch_size):
    """How many examples, equally weighted, estimate as well as the moving covariance.

    Batch `k` before the last has the weight `(1 - m) m**k`, and the squares of these
    weights sum to `(1 - m) / (1 + m)`.

    Args:
        momentum: float `m` in [0, 1).
        batch_size: int.

    Returns:
        An int, `batch_size (1 + m) / (1 - m)`.
    """
    return round(batch_size * (1 + momentum) / (1 - momentum))


def offline_estimates(sets, examples, draws, rng):
    """Offline similarities on random parts of the data.

    Args:
        sets: dict from task to array `(n, d)`.
        examples: int, size of a part; all `n` where there are no more.
        draws: int, how many parts.
        rng: NumPy generator.

    Returns:
        A float64 array `(draws,)`.
    """
    count = len(next(iter(sets.values())))
    parts = (rng.choice(count, min(examples, count), replace=False) for _ in range(draws))
    return np.array(
        [similarity_of({task: x[part] for task, x in sets.items()}) for part in parts]
    )


def plot_convergence(curves, offline, path):
    """The paper's Figure 4: online estimates, and offline values as horizontal lines.

    Args:
        curves: dict from `(batch_size, momentum)` to a data frame of `online_estimates`.
        offline: dict from name to float.
        path: where the PNG goes.
    """
    batch_sizes, momenta = (sorted(set(values)) for values in zip(*curves))
    figure, axes = figure_of(len(momenta), len(batch_sizes), sharey=True)
    for (batch_size, momentum), curve in curves.items():
        axis = axes[batch_sizes.index(batch_size), momenta.index(momentum)]
        for index, name in enumerate(curve):
            axis.plot(curve.index + 1, curve[name], color=f"C{index}", label=name, lw=1)
            axis.axhline(offline[name], color=f"C{index}", ls="--", lw=1)
        axis.set_title(f"batch {batch_size}, momentum {momentum:g}")
        axis.set_xlabel("step")
        axis.set_ylim(0, 1.02)
    axes[0, 0].set_ylabel("similarity")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def compared_features(options, training, cache, console):
    """Features of the networks of `stl`, and the labels as they are.

    Args:
        options: the command's.
        training: `Faces`.
        cache: path of the file of the networks' features.
        console: `rich.console.Console`.

    Returns:
        As `features_of`, and `"labels"`.
    """
    faces = cut_out(training, options.extent, np.random.default_rng(options.seed))

    def features():
        console.print("Training the two networks whose features are compared.")
        with timed(options.seed):
            trained = train(options, "stl", training, options.seed, lambda: None)
        return {
            f"{name}/{task}": x
            for name, by_task in features_of(trained, faces.images, options.tasks).items()
            for task, x in by_task.items()
        }

    found = {"labels": labels_of(faces, options.tasks)}
    for key, x in cached_arrays(cache, features).items():
        name, task = key.split("/")
        found.setdefault(name, {})[task] = x
    return {
        name: {task: x.astype("float32") for task, x in by_task.items()}
        for name, by_task in found.items()
    }


class Mtfl(Experiment):
    """Landmarks, pose and attributes of faces."""

    name = page_block = "mtfl"
    description = "Landmarks, pose and attributes of faces: STL, MTL and TRN."
    methods = TITLES
    defaults = {
        "epochs": 20,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "repeats": 3,
        "optimizer": "adam",
    }
    least = {"batch_size": 2}
    settings = ("tasks", "network", "size", "width", "shared_stages", "no_pool")
    settings += ("components", "units", "training_images", "extent")
    settings += ("epochs", "batch_size", "learning_rate", "optimizer", "loss_weights")
    families = {"independent": "stl", "hard": "mtl"}
    data_argument = DATA

    def add_arguments(self, p):
        p.add_argument(
            "--tasks", nargs="+", choices=list(TASKS), default=["landmarks", "pose"]
        )
        p.add_argument(
            "--network",
            choices=("resnet", "mlp"),
            default="resnet",
            help="ResNet-18, or two layers on principal components",
        )
        add_images(p, 64)
        p.add_argument(
            "--shared-stages",
            type=whole(0, STAGES),
            default=4,
            help=f"of the network's {STAGES}",
        )
        p.add_argument(
            "--no-pool", action="store_true", help="no pooling in the first stage"
        )
        p.add_argument(
            "--components",
            type=whole(1),
            default=100,
            help="principal components that `mlp` sees",
        )
        p.add_argument(
            "--units", type=whole(1), default=256, help="of the first layer of `mlp`"
        )
        add_faces(p)
        for name, default in (("output", 0.01), ("hidden", 0.001)):
            p.add_argument(
                f"--{name}-weight", type=real(least=0), default=default, help="λ"
            )
        p.add_argument(
            "--scales",
            nargs="+",
            type=real(above=0),
            default=[1.0],
            help="of both λ, one TRN for each, or what --validation chooses from",
        )
        p.add_argument(
            "--validation",
            type=real(above=0, below=1),
            help="choose the scale of λ by this share of the first seed's training images",
        )
        p.add_argument(
            "--wrong-target",
            type=real(least=0, most=1),
            default=0.4,
            help="what `trn-wrong` holds features to",
        )
        p.add_argument(
            "--estimate",
            choices=("mean", "sum"),
            default="mean",
            help="of the covariances, see layers.TRL",
        )
        p.add_argument(
            "--gradient",
            choices=("full", "moving"),
            default="full",
            help="of the similarities, see layers.TRL",
        )
        p.add_argument("--momentum", type=MOMENTUM, default=0.99, help="of the covariances")
        p.add_argument("--convergence", action="store_true", help="the paper's Figure 4")
        p.add_argument(
            "--momenta",
            nargs="+",
            # The steps that are taken are 4 / (1 - momentum).
            type=real(least=0, most=0.99999),
            default=[0.9, 0.99, 0.999],
        )
        p.add_argument("--batch-sizes", nargs="+", type=whole(2), default=[32, 128])

    def check(self, p, options):
        check_extent(p, options)
        if len(set(options.tasks)) != len(options.tasks) or len(options.tasks) < 2:
            p.error(f"--tasks: expected two different tasks at least, got {options.tasks}")
        if options.convergence and len(options.tasks) > 2:
            p.error(f"--convergence: expected two tasks, got {options.tasks}")

    def mode(self, options):
        return Convergence() if options.convergence else self

    def load(self, options, console=None):
        """`(training, testing, digest)`: two `Faces`, and a str that names the images."""
        if is_portraits(options.data):
            training, testing = _completely_labelled(options, console)
        else:
            training, testing = load_mtfl(options.data, options.size)
        if options.test_images is not None or testing is None:
            training, testing = apart(options, training)
        check_tasks(options, training, TASKS)
        check_counts(options, len(training.images))
        return training, testing, digest_of([training.images, testing.images])

    def plan(self, options, data):
        """Part by part and seed by seed."""
        for count, (_, seed, method) in itertools.product(
            options.training_images or [None], self.by_seed(options, options.methods)
        ):
            for scale in self._scales(options, method):
                yield self._planned(options, data, count, seed, method, scale)

    def _scales(self, options, method):
        return options.scales if places_of(method) else [None]

    def _planned(self, options, data, count, seed, method, scale, share=None):
        """A run, of which a share of the training images may be what is tested on."""
        own = copy.copy(options) if scale is None else scaled(options, scale)
        own.training_images = count
        names = {"data": data[-1], "seed": seed, "validation": share}
        title = f"{'all' if count is None else count} images, seed {seed}"
        if scale is not None:
            names |= {"momentum": options.momentum, "estimate": options.estimate}
            names |= {"gradient": options.gradient, "scale": scale}
            title += f", scale {scale:g}"
        if share is not None:
            title += ", validation"
        for place in ("output", "hidden"):
            used = place in places_of(method)
            names[f"{place}_weight"] = getattr(own, f"{place}_weight") if used else None
        if method == "trn-wrong":
            names["wrong_target"] = options.wrong_target

        def part():
            found = self._part(data, count, seed)
            return found if share is None else self.hold_out(found, own, share, seed)

        return self.planned(title, own, method, part, seed, names)

    def find(self, options, data, console):
        """The results of all runs; with `--validation` of those with the best scales."""
        if options.validation is None:
            return super().find(options, data, console)

        def group(count, method):
            def planned(scale, seed, choosing):
                share = options.validation if choosing else None
                return self._planned(options, data, count, seed, method, scale, share)

            return self._scales(options, method), planned

        counts = options.training_images or [None]
        groups = itertools.starmap(group, itertools.product(counts, options.methods))
        return self.find_chosen(options, console, groups)

    def _part(self, data, count, seed):
        """`(training, testing)`, with a random part of the training images by a seed."""
        training, testing, _ = data
        if count is not None:
            order = np.random.default_rng(seed).permutation(len(training.images))
            training = some(training, order[:count])
        return training, testing

    def draw(self, options, data, seed):
        counts = options.training_images or [None]
        return self._part(data, counts[0], seed)

    def hold_out(self, part, options, share, seed):
        training, _ = part
        labels = training.gender if training.pose is None else training.pose
        train, valid = held_out(np.arange(len(labels)), labels, share, seed)
        # Faces as the test images are.
        rng = np.random.default_rng(seed)
        return some(training, train), cut_out(some(training, valid), options.extent, rng)

    def run(self, options, method, part, seed, tick, callbacks=None):
        return train_and_test(options, method, *part, seed, tick, callbacks)

    def describe(self, found):
        return ", ".join(f"{task} {error:.2%}" for task, error in found["errors"].items())

    def tasks(self, options, data=None):
        return list(options.tasks)

    def errors(self, found):
        return found["errors"]

    def costs(self, found):
        return {"parameters": found["weights"], "seconds": found["seconds"]}

    def space(self, method, options, space):
        if method == "mtl" and options.network == "resnet":
            default = options.shared_stages
            return {"shared_stages": space.integer("shared_stages", 1, STAGES, default)}
        weights = {p: getattr(options, f"{p}_weight") for p in places_of(method)}
        if not weights:
            return {}
        weights, momentum = space.relation(weights, options.momentum)
        found = {f"{name}_weight": weight for name, weight in weights.items()}
        return found | {"momentum": momentum}

    def tables(self, options, data, runs):
        title = f"MTFL, {options.epochs} epochs"
        frame = summarize(runs, options.tasks)
        return {options.page_block: Table(title, frame, "mtfl", keys=4)}


class Convergence(Mtfl):
    """Algorithm 1 beside the offline similarities, on the features of `stl`."""

    def find(self, options, data, console):
        """Curves, and offline similarities.

        Returns:
            `(curves, offline, frame)`, as for `plot_convergence`, and a data frame.
        """
        training, _ = self.draw(options, data, options.seed)
        cache = options.output / f"features_{data[-1]}.npz"
        features = compared_features(options, training, cache, console)
        offline = {name: similarity_of(sets) for name, sets in features.items()}
        curves, rows = {}, []
        for batch_size, momentum in itertools.product(options.batch_sizes, options.momenta):
            # Until as many examples are remembered as can be.
            steps = max(200, round(4 / (1 - momentum)))
            rng = np.random.default_rng(options.seed)
            curve = online_estimates(features, momentum, batch_size, steps, rng)
            curves[batch_size, momentum] = curve
            late = curve[len(curve) // 2 :]
            examples = examples_remembered(momentum, batch_size)
            for name, sets in features.items():
                equally_many = offline_estimates(sets, examples, 20, rng)
                rows.append(
                    {
                        "Features": name,
                        "Batch": batch_size,
                        "Momentum": f"{momentum:g}",
                        "Steps": steps,
                        "After 30 steps": f"{curve[name][29]:.3f}",
                        "Online": mean_and_spread(late[name], 3),
                        "Examples remembered": examples,
                        "Offline on as many": mean_and_spread(equally_many, 3),
                        "Offline on all": f"{offline[name]:.3f}",
                    }
                )
            console.print(f"batch {batch_size}, momentum {momentum:g}: done")
        return curves, offline, pd.DataFrame(rows).sort_values("Features", kind="stable")

    def blocks(self, options):
        return ["mtfl-convergence"]

    def tables(self, options, data, found):
        title = "Online and offline similarities"
        return {"mtfl-convergence": Table(title, found[-1], keys=3)}

    def figures(self, options, data, found):
        path = options.output / "convergence.png"
        plot_convergence(*found[:2], path)
        return [path]


EXPERIMENT = Mtfl()
parse, main = EXPERIMENT.parse, EXPERIMENT.main

if __name__ == "__main__":
    main()
