"""Landmarks and pose of faces as two tasks: the experiment of Task Relation Networks.

Li et al., "Task Relation Networks" (WACV 2019), section 4.2.3, Table 1: the places of five
landmarks (regression) and the pose (five classes), on the MTFL data set (Zhang et al.
2014), with ResNet-18.

- `stl`: a network for each task;
- `mtl`: the first four of the five stages are shared;
- `trn-output`: the same, the outputs held to the similarity of the labels;
- `trn`: outputs and hidden features (those of the last stage, after pooling).

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
from sklearn import preprocessing

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
    timed,
)
from .files import cached_arrays
from .reading import DataError, open_zip, read_image, read_text, reading
from .resnet import STAGES, resnet18
from .results import mean_and_spread

TITLES = {
    "stl": "STL",
    "mtl": "MTL",
    "trn-output": "TRN (output)",
    "trn": "TRN (hidden + output)",
}
TASKS = {"landmarks": 10, "pose": 5}
TRAINING, TESTING = "training.txt", "testing.txt"
# As in `layers.TRL`: features are never quite independent of each other.
RIDGE = 1e-3


class Faces(typing.NamedTuple):
    """Faces with their labels.

    Attributes:
        images: uint8 `(n, size, size, 3)`.
        landmarks: float32 `(n, 10)`, in shares of the image's side: x of the left eye, the
            right eye, the nose, the left and the right corner of the mouth, then y.
        pose: ints `(n,)`, 0 to 4, from the left profile to the right.
    """

    images: np.ndarray
    landmarks: np.ndarray
    pose: np.ndarray


def some(faces, indices):
    """Some of the faces, as `Faces`."""
    return Faces(*(x[indices] for x in faces))


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
    images, landmarks, poses = [], [], []
    for number, (path, *values) in enumerate(lines, start=1):
        with reading(f"{listed}, line {number}"):
            row = np.array(values, "float64")
            if len(row) != 14 or row[13] not in range(1, 6):
                raise DataError("expected 14 numbers, the last one the pose, 1 to 5.")
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
        poses.append(int(row[13]) - 1)
    if not images:
        raise DataError(f"{listed} has no lines.")
    return Faces(np.stack(images), np.float32(landmarks), np.array(poses))


# The places of the landmarks in a mirror image: eyes and corners of the mouth change sides.
_MIRRORED = [1, 0, 2, 4, 3]


def cut_out(faces, extent, rng):
    """Faces cut out of their images, at random scales and places, half of them mirrored.

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
    return Faces(images, points.reshape(-1, 10).astype("float32"), pose)


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


def make_network(shared_stages, size, width, pool=True):
    """ResNet-18 with two tasks.

    Args:
        shared_stages: int, how many of the five stages the tasks share: 0 are two networks.
        size: int, side of the images.
        width: int, filters of the first stage.
        pool: bool, whether the first stage ends with max pooling.

    Returns:
        A `MultiTaskModel` with outputs "landmarks" (standardised) and "pose" (logits), and
        layers `<task>_hidden`.
    """
    images = keras.Input((size, size, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1, name="rescaling")(images)
    x = resnet18(x, width, 1, shared_stages, pool, name="shared")
    outputs = {}
    for task, units in TASKS.items():
        own = resnet18(x, width, shared_stages + 1, STAGES, pool, name=task)
        own = layers.GlobalAveragePooling2D(name=f"{task}_hidden")(own)
        outputs[task] = layers.Dense(units, name=task)(own)
    return MultiTaskModel(images, outputs)


def make_model(options, method):
    """The network of a method, with its relations."""
    shared = 0 if method == "stl" else options.shared_stages
    network = make_network(shared, options.size, options.width, not options.no_pool)
    relations = []
    if method.startswith("trn"):
        relations.append(Relation("output", options.output_weight))
    if method == "trn":
        hidden = {task: f"{task}_hidden" for task in TASKS}
        relations.append(Relation(hidden, options.hidden_weight))
    if not relations:
        return network
    return TaskRelationModel(network, relations, momentum=options.momentum)


def train(options, method, training, seed, tick, watch=None):
    """Train the network of a method.

    Args:
        options: the command's.
        method: a key of `TITLES`.
        training: `Faces`.
        seed: int, of the images that are cut out.
        tick: function without arguments, called after each epoch.
        watch: None, or `(callbacks, faces)`: Keras callbacks, which see the loss on these
            `Faces` as `val_loss`.

    Returns:
        `(model, standard)`, the model, and mean and deviation of the landmarks.
    """
    model = make_model(options, method)
    rng = np.random.default_rng(seed)
    landmarks = cut_out(training, options.extent, rng).landmarks
    standard = landmarks.mean(axis=0), landmarks.std(axis=0)
    steps = -(-len(training.images) // options.batch_size)
    model.compile(
        decaying(options, steps * options.epochs),
        {
            "landmarks": "mean_squared_error",
            "pose": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        },
        loss_weights=options.loss_weights or None,
    )

    def data(faces):
        labels = (faces.landmarks - standard[0]) / standard[1]
        return faces.images, {"landmarks": labels, "pose": faces.pose}

    callbacks, watched = ([], None) if watch is None else (watch[0], data(watch[1]))
    every = keras.callbacks.CallbackList(callbacks, model=model)
    every.on_train_begin()
    count = whole_batches(options, len(training.images))
    for epoch in range(options.epochs):
        # Arrays, since TensorFlow's generators make it return memory at every step, with
        # which a step of the small networks took twice as long.
        part = Faces(*(x[:count] for x in cut_out(training, options.extent, rng)))
        fitted = model.fit(
            *data(part),
            batch_size=options.batch_size,
            initial_epoch=epoch,
            epochs=epoch + 1,
            validation_data=watched,
            verbose=0,
        )
        tick()
        logs = {name: values[-1] for name, values in fitted.history.items()}
        every.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    every.on_train_end()
    return model, standard


def features_of(model, images):
    """Outputs and hidden features: by `"output"` and `"hidden"`, dicts by task."""
    hidden = {task: model.get_layer(f"{task}_hidden").output for task in TASKS}
    both = keras.Model(model.input, {"output": model.output, "hidden": hidden})
    return both.predict(images, batch_size=256, verbose=0)


def labels_of(faces):
    """The labels as vectors, a dict by task."""
    return {"landmarks": faces.landmarks, "pose": np.eye(5)[faces.pose]}


def similarity_of(sets):
    """Offline similarity (TRN Eq. 11) of the two tasks' arrays."""
    return task_similarity(sets["landmarks"], sets["pose"], RIDGE)


def similarities_of(features, faces):
    """Offline similarities of the tasks (TRN Eq. 11, 12): hidden, output, labels.

    Args:
        features: as from `features_of`.
        faces: `Faces`.

    Returns:
        A dict of floats.
    """
    sets = features | {"labels": labels_of(faces)}
    return {name: similarity_of(by_task) for name, by_task in sets.items()}


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
        A dict of floats: errors in shares, similarities on the test part, seconds of
        training.
    """
    watch = None if callbacks is None else (callbacks, testing)
    with timed(seed) as took:
        model, (mean, deviation) = train(options, method, training, seed, tick, watch)
    features = features_of(model, testing.images)
    predicted = features["output"]["landmarks"] * deviation + mean
    results = {
        "error": normalized_mean_error(testing.landmarks, predicted),
        "accuracy": float(np.mean(hits(features["output"]["pose"], testing.pose))),
        "similarity": similarities_of(features, testing),
        "weights": model.count_params(),
        "seconds": took.seconds,
    }
    if isinstance(model, TaskRelationModel):
        results["online"] = {
            name: next(iter(pairs.values())) for name, pairs in model.similarities().items()
        }
    return results


def summarize(runs):
    """The table of the paper's Table 1, a data frame of strings."""
    rows = []
    by = ["method", "output_weight", "hidden_weight"]
    for (method, output, hidden), group in runs.groupby(by, sort=False, dropna=False):
        similarity = pd.DataFrame(list(group["similarity"]))
        rows.append(
            {
                "Method": TITLES[method],
                "λ output": "-" if pd.isna(output) else f"{output:g}",
                "λ hidden": "-" if pd.isna(hidden) else f"{hidden:g}",
                "τ hidden": mean_and_spread(similarity["hidden"]),
                "τ output": mean_and_spread(similarity["output"]),
                "τ labels": f"{similarity['labels'].iloc[0]:.2f}",
                "Error %": mean_and_spread(100 * group["error"]),
                "Accuracy %": mean_and_spread(100 * group["accuracy"]),
                "Runs": len(group),
                "Seconds": mean_and_spread(group["seconds"], 0),
            }
        )
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
    count = len(sets["landmarks"])
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


def standard_features(options, training, cache, console):
    """Features of the two networks of `stl`, and labels, in units of their deviations.

    So the networks learn the labels; and Algorithm 1 starts from the identity, which
    features of small variance remember for long.

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
            model, _ = train(options, "stl", training, options.seed, lambda: None)
        return {
            f"{name}/{task}": x
            for name, by_task in features_of(model, faces.images).items()
            for task, x in by_task.items()
        }

    found = {"labels": {t: preprocessing.scale(x) for t, x in labels_of(faces).items()}}
    for key, x in cached_arrays(cache, features).items():
        name, task = key.split("/")
        found.setdefault(name, {})[task] = x
    return {
        name: {task: x.astype("float32") for task, x in by_task.items()}
        for name, by_task in found.items()
    }


class Mtfl(Experiment):
    """Landmarks and pose of faces."""

    name = "mtfl"
    description = "Landmarks and pose of faces: STL, MTL and TRN."
    methods = TITLES
    defaults = {
        "epochs": 20,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "repeats": 3,
        "optimizer": "adam",
    }
    least = {"batch_size": 2}
    settings = ("size", "width", "shared_stages", "no_pool", "training_images", "extent")
    settings += ("epochs", "batch_size", "learning_rate", "optimizer", "loss_weights")
    families = {"independent": "stl", "hard": "mtl"}
    data_argument = {"type": pathlib.Path, "required": True, "help": "folder or zip file"}

    def add_arguments(self, p):
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
        p.add_argument("--training-images", type=whole(2), help="a random part; else all")
        p.add_argument(
            "--extent",
            nargs=2,
            type=real(above=0, most=1),
            default=[0.28, 0.48],
            help="share of a training image's side that the landmarks take up",
        )
        for name, default in (("output", 0.01), ("hidden", 0.001)):
            p.add_argument(
                f"--{name}-weight", type=real(least=0), default=default, help="λ"
            )
        p.add_argument(
            "--scales",
            nargs="+",
            type=real(above=0),
            default=[1.0],
            help="of both λ, one TRN for each",
        )
        p.add_argument("--momentum", type=MOMENTUM, default=0.99, help="of the covariances")
        p.add_argument("--convergence", action="store_true", help="the paper's Figure 4")
        p.add_argument(
            "--momenta",
            nargs="+",
            # The steps that are needed are 10 / (1 - momentum).
            type=real(least=0, most=0.99999),
            default=[0.9, 0.99, 0.999],
        )
        p.add_argument("--batch-sizes", nargs="+", type=whole(2), default=[32, 128])

    def check(self, p, options):
        if options.extent[0] > options.extent[1]:
            p.error(f"--extent: expected the least and the most, got {options.extent}")

    def mode(self, options):
        return Convergence() if options.convergence else self

    def load(self, options, console=None):
        """`(training, testing, digest)`: two `Faces`, and a str that names the images."""
        training, testing = load_mtfl(options.data, options.size)
        digest = digest_of([training.images, testing.images])
        if options.training_images is not None:
            count = len(training.images)
            if options.training_images > count:
                raise DataError(
                    f"--training-images: there are {count}. "
                    f"Received: {options.training_images}."
                )
            order = np.random.default_rng(options.seed).permutation(count)
            training = some(training, order[: options.training_images])
        return training, testing, digest

    def plan(self, options, data):
        """Seed by seed."""
        digest = data[-1]
        for _, seed, method in self.by_seed(options, options.methods):
            for scale in options.scales if method.startswith("trn") else [None]:
                own = copy.copy(options)
                own.output_weight = own.hidden_weight = None
                names = {"data": digest, "seed": seed}
                title = f"seed {seed}"
                if scale is not None:
                    own.output_weight = scale * options.output_weight
                    names["momentum"] = options.momentum
                    title += f", λ {own.output_weight:g}"
                if method == "trn":
                    own.hidden_weight = scale * options.hidden_weight
                names["output_weight"] = own.output_weight
                names["hidden_weight"] = own.hidden_weight
                yield self.planned(title, own, method, lambda: data[:2], seed, names)

    def draw(self, options, data, seed):
        return data[:2]

    def hold_out(self, part, options, share, seed):
        training, _ = part
        indices = np.arange(len(training.pose))
        train, valid = held_out(indices, training.pose, share, seed)
        # Faces as the test images are.
        rng = np.random.default_rng(seed)
        return some(training, train), cut_out(some(training, valid), options.extent, rng)

    def run(self, options, method, part, seed, tick, callbacks=None):
        return train_and_test(options, method, *part, seed, tick, callbacks)

    def describe(self, found):
        return f"error {found['error']:.2%}, accuracy {found['accuracy']:.1%}"

    def tasks(self, options, data=None):
        return list(TASKS)

    def errors(self, found):
        return {"landmarks": found["error"], "pose": 1 - found["accuracy"]}

    def costs(self, found):
        return {"parameters": found["weights"], "seconds": found["seconds"]}

    def space(self, method, options, space):
        if method == "mtl":
            default = options.shared_stages
            return {"shared_stages": space.integer("shared_stages", 1, STAGES, default)}
        if method == "stl":
            return {}
        weights = {"output": options.output_weight}
        if method == "trn":
            weights["hidden"] = options.hidden_weight
        weights, momentum = space.relation(weights, options.momentum)
        found = {f"{name}_weight": weight for name, weight in weights.items()}
        return found | {"momentum": momentum}

    def tables(self, options, data, runs):
        title = f"MTFL, {options.epochs} epochs"
        return {"mtfl": Table(title, summarize(runs), keys=3)}


class Convergence(Mtfl):
    """Algorithm 1 beside the offline similarities, on the features of `stl`."""

    def find(self, options, data, console):
        """Curves, and offline similarities.

        Returns:
            `(curves, offline, frame)`, as for `plot_convergence`, and a data frame.
        """
        training, _, digest = data
        cache = options.output / f"features_{digest}.npz"
        features = standard_features(options, training, cache, console)
        offline = {name: similarity_of(sets) for name, sets in features.items()}
        curves, rows = {}, []
        for batch_size, momentum in itertools.product(options.batch_sizes, options.momenta):
            # The share that the identity keeps is momentum ** steps.
            steps = max(200, round(10 / (1 - momentum)))
            rng = np.random.default_rng(options.seed)
            curve = online_estimates(features, momentum, batch_size, steps, rng)
            curves[batch_size, momentum] = curve
            # The last half of the steps, when the start is forgotten.
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
