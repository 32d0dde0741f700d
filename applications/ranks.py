"""How to choose ranks: LAF, Tucker and TT by rank and by tolerance, on few faces.

Four tasks on the faces of MTFL (Zhang et al. 2014): the places of five landmarks
(regression), gender, smile (two classes each) and pose (five), from a small convolutional
network and a few hundred images. All methods start from the kernels of one network, but
for those that say so:

- `stl`, `stl-apart`: independent kernels, and with a start of their own for each task;
- `hard`: all kernels are shared;
- `tucker-half`: the factors have at most half of the weights; `tucker-proportional`: the
  same with a task rank of 1; `tucker-0.1`: half of each rank, that of the tasks too, which
  is what a rank of 0.5 was in version 0.1;
- `tucker-tolerance`: within a tolerance of the start kernel; `tucker-apart`: from starts of
  their own, as fresh layers with a tolerance have;
- the same for TT and LAF, whose only rank is that of the tasks.

    python -m applications.ranks --data FOLDER
"""

import pathlib
import warnings

import keras
import numpy as np
import pandas as pd
from keras import layers

from dmtrl_keras import factorize, multitask, task_layers
from dmtrl_keras.kernels.task_kernel import draw_stacked_kernel
from dmtrl_keras.parameterizations import LAF, TT, Tucker

from .arguments import OPTIMIZERS, real, whole
from .experiment import (
    Experiment,
    Table,
    digest_of,
    ticking,
    timed,
    trainable_parameters,
)
from .mtfl import cut_out, load_mtfl, normalized_mean_error, some
from .results import mean_and_spread

CLASSES = {"gender": 2, "smile": 2, "pose": 5}
TASKS = ("landmarks", *CLASSES)
KINDS = {"laf": LAF, "tucker": Tucker, "tt": TT}
_TITLES = {"laf": "LAF", "tucker": "Tucker", "tt": "TT"}
METHODS = {
    "stl": "STL",
    "stl-apart": "STL, starts of their own",
    "hard": "hard sharing",
}
for _kind in ("tucker", "tt", "laf"):
    METHODS |= {
        f"{_kind}-0.1": f"{_TITLES[_kind]}, half of each rank",
        f"{_kind}-proportional": f"{_TITLES[_kind]}, half of the weights, task rank 1",
        f"{_kind}-half": f"{_TITLES[_kind]}, half of the weights",
        f"{_kind}-tolerance": f"{_TITLES[_kind]}, by tolerance",
    }
METHODS["tucker-apart"] = "Tucker, by tolerance, starts of their own"
# Half of LAF's ranks is half of its weights.
del METHODS["laf-0.1"]
METHODS["laf-proportional"] = "LAF, task rank 1"


def backbone(size, width):
    """Three convolutions and a fully connected layer."""
    x = images = keras.Input((size, size, 3), name="image")
    x = layers.Rescaling(1 / 127.5, -1, name="rescaling")(x)
    for number, filters in enumerate((width, 2 * width, 4 * width), start=1):
        x = layers.Conv2D(filters, 3, padding="same", name=f"conv{number}")(x)
        x = layers.ReLU(name=f"relu{number}")(x)
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(images, layers.Dense(4 * width, "relu", name="fc")(x), name="faces")


def network(options, method):
    """The network of a method, and by layer the ranks that it has and its weights' share.

    Returns:
        `(model, ranks)`, a `MultiTaskModel` and a dict from layer to `[rank, share]`.
    """
    start = backbone(options.size, options.width)
    heads = {task: layers.Dense(CLASSES.get(task, 10)) for task in TASKS}
    common = {"heads": heads, "verbose": False}
    kind, _, how = method.partition("-")
    if kind == "hard":
        return multitask(start, TASKS, "hard", **common), {}
    if kind == "stl" or how == "apart":
        model = multitask(start, TASKS, **common)
        if how == "apart":
            # What a layer of its own starts from for each task.
            for layer in task_layers(model):
                shape = layer.stacked_kernel_shape[:-1]
                layer.kernel.assign(draw_stacked_kernel(None, shape, len(TASKS), False))
        if kind != "stl":
            how_close = {"tolerance": options.tolerance, "keep_larger": True}
            model = factorize(model, kind, verbose=False, **how_close)
    else:
        with warnings.catch_warnings():
            # Tasks that can't differ are meant here; LAF has no half of two kernels.
            warnings.simplefilter("ignore", UserWarning)
            model = multitask(start, TASKS, sharing_of(options, kind, how), **common)
    ranks = {}
    for layer in task_layers(model):
        if layer.rank is not None:
            size = sum(np.prod(factor.shape) for factor in layer.factors.values())
            share = size / np.prod(layer.stacked_kernel_shape)
            ranks[layer.name] = [list(layer.rank), float(share)]
    return model, ranks


def sharing_of(options, kind, how):
    """The parameterization of a method."""
    kind = KINDS[kind]
    if how == "0.1":
        # As a file of that version has it.
        return kind.from_config({"rank": 0.5})
    if how == "proportional":
        return kind(None if kind is LAF else 0.5, task_rank=1)
    return kind(0.5) if how == "half" else kind(tolerance=options.tolerance)


class Ranks(Experiment):
    """Ranks and tolerances, on few faces. Its methods are what a search chooses among."""

    name = "ranks"
    description = "LAF, Tucker and TT by rank and by tolerance, on few faces."
    methods = METHODS
    defaults = {
        "epochs": 10,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "repeats": 3,
        "optimizer": "adam",
    }
    settings = ("size", "width", "training_images", "testing_images", "cuts", "extent")
    settings += ("epochs", "batch_size", "learning_rate", "optimizer", "loss_weights")
    data_argument = {
        "type": pathlib.Path,
        "required": True,
        "help": "MTFL, a folder or a zip file",
    }

    def add_arguments(self, p):
        side = whole(8)
        p.add_argument("--size", type=side, default=32, help="side of the images")
        width = whole(1)
        p.add_argument("--width", type=width, default=16, help="of the first layer")
        p.add_argument("--training-images", type=whole(2), default=300)
        p.add_argument("--testing-images", type=whole(2), default=2000)
        p.add_argument(
            "--cuts",
            type=whole(1),
            default=4,
            help="how often a training face is cut out of its image, each time otherwise",
        )
        p.add_argument(
            "--extent", nargs=2, type=real(above=0, most=1), default=[0.28, 0.48]
        )
        p.add_argument("--tolerance", type=real(above=0, below=1), default=0.3)

    def tasks(self, options, data=None):
        return list(TASKS)

    def load(self, options, console):
        """`(faces, digest)` of the training part of MTFL."""
        faces, _ = load_mtfl(options.data, options.size)
        needed = options.training_images + options.testing_images
        if len(faces.pose) < needed:
            raise ValueError(
                "--training-images and --testing-images: expected at most "
                f"{len(faces.pose)} together, got {needed}"
            )
        return faces, digest_of([faces.images])

    def settings_of_method(self, options, data, method):
        own = {"data": data[-1]}
        if method.partition("-")[2] in ("tolerance", "apart"):
            own["tolerance"] = options.tolerance
        return own

    def draw(self, options, data, seed):
        """Random training faces, and others of the same kind to test on.

        Those of the test part of MTFL are of another kind than its training faces.
        """
        faces, _ = data
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(faces.pose))
        train, test = np.split(order, [options.training_images])
        train = np.tile(train, options.cuts)
        parts = []
        for chosen in (train, test[: options.testing_images]):
            parts.append(cut_out(some(faces, chosen), options.extent, rng))
        return parts

    def run(self, options, method, part, seed, tick, callbacks=None):
        training, testing = part
        mean, deviation = training.landmarks.mean(axis=0), training.landmarks.std(axis=0)
        labels = {task: getattr(training, task) for task in CLASSES}
        labels["landmarks"] = (training.landmarks - mean) / deviation
        with timed(seed) as took:
            model, ranks = network(options, method)
            losses = {
                task: keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                for task in CLASSES
            }
            model.compile(
                OPTIMIZERS[options.optimizer](options.learning_rate),
                {**losses, "landmarks": "mean_squared_error"},
                loss_weights=options.loss_weights or None,
            )
            model.fit(
                training.images,
                labels,
                batch_size=options.batch_size,
                epochs=options.epochs,
                callbacks=ticking(tick, callbacks),
                verbose=0,
            )
        outputs = model.predict(testing.images, batch_size=500, verbose=0)
        predicted = outputs["landmarks"] * deviation + mean
        truth = {task: getattr(testing, task) for task in CLASSES}
        return {
            "error": normalized_mean_error(testing.landmarks, predicted),
            "accuracy": {
                task: float(np.mean(np.argmax(outputs[task], axis=-1) == truth[task]))
                for task in CLASSES
            },
            "parameters": trainable_parameters(model),
            "ranks": ranks,
            "seconds": took.seconds,
        }

    def describe(self, found):
        accuracy = np.mean(list(found["accuracy"].values()))
        return f"landmark error {found['error']:.2%}, accuracy {accuracy:.1%}"

    def tables(self, options, data, runs):
        title = f"MTFL, {options.training_images} faces, {options.epochs} epochs"
        return {
            "ranks": Table(title, summarize(runs)),
            "ranks-by-layer": Table("Ranks by layer", by_layer(runs)),
        }

    def blocks(self, options):
        return ["ranks", "ranks-by-layer"]


def summarize(runs):
    """Errors, accuracies and weights by method, a data frame of strings."""
    whole = runs[runs.method == "stl"].parameters.mean()
    rows = []
    for method, group in runs.groupby("method", sort=False):
        accuracy = pd.DataFrame(list(group.accuracy))
        rows.append(
            {
                "Method": METHODS[method],
                "Weights": f"{group.parameters.mean() / whole:.2f}",
                "Landmarks, error %": mean_and_spread(100 * group.error),
                **{
                    f"{task.capitalize()} %": mean_and_spread(100 * accuracy[task], 1)
                    for task in CLASSES
                },
                "Mean accuracy %": mean_and_spread(100 * accuracy.mean(axis=1), 1),
                "Runs": len(group),
            }
        )
    return pd.DataFrame(rows)


def by_layer(runs):
    """Ranks of the first run of each method, and the shares of the weights they are."""
    rows = []
    for method, group in runs.groupby("method", sort=False):
        found = group.ranks.iloc[0]
        if found:
            rows.append(
                {
                    "Method": METHODS[method],
                    **{
                        name: f"{' '.join(map(str, rank))}: {share:.2f}"
                        for name, (rank, share) in found.items()
                    },
                }
            )
    return pd.DataFrame(rows, columns=["Method", "conv1", "conv2", "conv3", "fc"])


parse, main = Ranks().parse, Ranks().main

if __name__ == "__main__":
    main()
