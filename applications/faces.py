"""Attributes of faces as tasks: the second experiment of the DMTRL paper.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4.2 and Figure 3: tasks of several kinds on the same images.
The paper's are gender and age group of Adience's faces; here they are those that a data
set has (`--tasks`), with labels that may be missing (`--missing`), and each of the
library's ways to share the kernels of all layers but the last:

- `stl`: nothing is shared;
- `hard`: the first N layers are (UD-MTL), by default all;
- `hard-large`: all are, sqrt(T) times as wide, which is about as many weights as those of
  `stl` (of the paper's network only);
- `laf`, `tucker`, `tt`: DMTRL;
- `tucker-alone`: each task has factors of its own, a control: what it gains is none of the
  sharing's;
- `similar` (MTAL), `stitch`, `nddr`, `drn`, `mrn`;
- `trace`, `deviation`: norms of the kernels of all tasks;
- `trn`: all layers are shared, and the outputs held to the similarity of the labels.

The network is the paper's, of Levi & Hassner (2015), or a trunk of `keras.applications`, or
a file. Rates, ranks and strengths are chosen on a part of the first seed's training images.

    python -m applications.faces --data FOLDER
    python -m applications.faces --data FOLDER --tasks age gender --missing 0.3
"""

import copy
import functools
import itertools
import math
import pathlib
import typing
import warnings

import keras
import numpy as np
import pandas as pd
from keras import layers

from dmtrl_keras import (
    MultiTaskModel,
    Relation,
    TaskRelationModel,
    multitask,
    parameterizations,
)
from dmtrl_keras.conversion.survey import POOLINGS
from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.layers import NDDR, CrossStitch
from dmtrl_keras.losses import MaskedLoss
from dmtrl_keras.mrn.network import prior_by_name
from dmtrl_keras.parameterizations import SimilarKernels
from dmtrl_keras.regularizers import MeanDeviation, TraceNorm

from .arguments import real, whole, whole_batches
from .experiment import (
    Experiment,
    Table,
    digest_of,
    figure_of,
    held_out,
    hits,
    make_optimizer,
    mean_error,
    timed,
    trainable_parameters,
)
from .mtfl import (
    DATA,
    Faces,
    add_faces,
    apart,
    check_counts,
    check_extent,
    check_tasks,
    cut_out,
    fit_anew,
    load_mtfl,
    of_portraits,
    some,
)
from .mtfl import (
    TASKS as CLASSES,
)
from .portraits import is_portraits
from .reading import DataError
from .results import mean_and_spread, paired
from .trunks import load_trunk


class Method(typing.NamedTuple):
    """A way to share.

    Attributes:
        title: str.
        setting: the option with the values that are chosen from; None: it has no setting.
        letter: str, what tables call it.
    """

    title: str
    setting: str | None = None
    letter: str = ""


_TOLERANCE, _STRENGTH = ("tolerances", "tolerance"), ("strengths", "strength")
HOW = {
    "stl": Method("STL"),
    "hard": Method("UD-MTL", "shared_layers", "N"),
    "hard-large": Method("UD-MTL-Large"),
    "laf": Method("DMTRL-LAF", *_TOLERANCE),
    "tucker": Method("DMTRL-Tucker", *_TOLERANCE),
    "tt": Method("DMTRL-TT", *_TOLERANCE),
    "tucker-alone": Method("Tucker factors of each task by itself", *_TOLERANCE),
    "similar": Method("similar kernels (MTAL)", "thresholds", "threshold"),
    "stitch": Method("Cross-Stitch"),
    "nddr": Method("NDDR"),
    "drn": Method("DRN", *_STRENGTH),
    "mrn": Method("MRN", *_STRENGTH),
    "trace": Method("trace norm", "norms", "strength"),
    "deviation": Method("deviation from the mean", "norms", "strength"),
    "trn": Method("TRN (output)", "relation_weights", "λ"),
}
METHODS = {name: how.title for name, how in HOW.items()}
# Tasks and the units of their outputs; an age in years is a number.
TASKS = {name: units for name, units in CLASSES.items() if name != "landmarks"}
TASKS["years"] = 1
# Filters and side of the kernels, and units of the fully connected layers.
CONVOLUTIONS, UNITS = ((96, 7), (256, 5), (384, 3)), 512


class Part(typing.NamedTuple):
    """What a run is trained and tested on.

    Attributes:
        training: `Faces`.
        testing: `Faces`.
        known: dict from task to bools `(n,)`, which labels of `training` are there.
    """

    training: Faces
    testing: Faces
    known: dict


def make_cnn(size, width, stride, dropout):
    """The network of Levi & Hassner, without its local response normalisation.

    Convolutions of 96 filters of 7x7, 256 of 5x5, 384 of 3x3, each followed by 3x3 max
    pooling of stride 2, and two layers of 512 units with dropout.

    Args:
        size: int, side of the images, 0 to 255.
        width: float, the share of filters and units.
        stride: int, of the first convolution; the original's is 4, for images of 227.
        dropout: float.
    """
    parts = [
        keras.Input((size, size, 3), name="image"),
        layers.Rescaling(1 / 127.5, -1, name="rescaling"),
    ]
    for number, (filters, side) in enumerate(CONVOLUTIONS, start=1):
        own = {"strides": stride if number == 1 else 1, "padding": "same"}
        own |= {"activation": "relu", "name": f"conv{number}"}
        parts.append(layers.Conv2D(max(1, round(width * filters)), side, **own))
        parts.append(layers.MaxPooling2D(3, 2, "same", name=f"pool{number}"))
    parts.append(layers.Flatten(name="flatten"))
    for number in (1, 2):
        units = max(1, round(width * UNITS))
        parts.append(layers.Dense(units, "relu", name=f"fc{number}"))
        if dropout:
            parts.append(layers.Dropout(dropout, name=f"dropout{number}"))
    return keras.Sequential(parts, name="network")


class Network:
    """Makes the network of a method.

    Args:
        options: parsed arguments, of one setting.
    """

    def __init__(self, options):
        self.options = options
        self.prepare = None
        self._trunk = None
        if options.trunk != "paper":
            self._trunk, self.prepare = _trunk_of(
                options.trunk, options.size, options.feature_layer, options.weights
            )

    def backbone(self, wider=1.0):
        """A new backbone of all tasks; of a trunk, with its weights."""
        o = self.options
        if self._trunk is None:
            return make_cnn(o.size, wider * o.width, o.stride, o.dropout)
        new = keras.models.clone_model(self._trunk)
        new.set_weights(self._trunk.get_weights())
        if o.share_until is not None:
            try:
                border = new.get_layer(o.share_until)
            except ValueError as error:
                raise DataError(f"--share-until: {error}") from None
            for layer in keras.Model(new.inputs, border.output).layers:
                layer.trainable = False
        return new

    def prepared(self, images):
        """Images as the network takes them."""
        return images if self.prepare is None else self.prepare(images.astype("float32"))

    def make(self, method):
        """The network, not compiled."""
        o = self.options
        if method == "tucker-alone":
            return self._alone("tucker")
        return self._together(method, list(o.tasks))

    def _alone(self, method):
        """A network of each task, side by side."""
        found = {task: self._together(method, [task]) for task in self.options.tasks}
        inputs = keras.Input(next(iter(found.values())).input_shape[1:], name="image")
        outputs = {task: model(inputs)[task] for task, model in found.items()}
        return MultiTaskModel(inputs, outputs)

    def _together(self, method, tasks):
        """The network of some tasks."""
        o = self.options
        backbone = self.backbone(len(tasks) ** 0.5 if method == "hard-large" else 1.0)
        own = _layers_of(backbone, o.share_until)
        heads = {
            task: TASKS[task] if task != "years" else layers.Dense(1, name="years_head")
            for task in tasks
        }
        with warnings.catch_warnings():
            # How many weights there are, the results say.
            warnings.simplefilter("ignore", UserWarning)
            model = multitask(
                backbone,
                tasks,
                heads=heads,
                name=tasks[0] if len(tasks) == 1 else None,
                share_until=o.share_until,
                verbose=False,
                **self._sharing(method, own, backbone),
            )
        if method == "trn":
            return TaskRelationModel(model, Relation("output", o.relation_weights[0]))
        return model

    def _sharing(self, method, own, backbone):
        """Arguments of `multitask`."""
        o = self.options
        if method in ("hard", "hard-large", "trn"):
            count = len(own)
            if method == "hard" and o.shared_layers is not None:
                count = o.shared_layers[0]
            if count > len(own):
                raise DataError(
                    f"--shared-layers: expected at most {len(own)}, as many as the network "
                    f"has before the last. Received: {count}."
                )
            return {"sharing": dict.fromkeys(own[:count], "hard")}
        if method in ("laf", "tucker", "tt"):
            kind = type(parameterizations.get(method))
            return {"sharing": dict.fromkeys(own, kind(tolerance=o.tolerances[0]))}
        if method == "similar":
            return {"sharing": SimilarKernels(o.thresholds[0])}
        if method in ("stitch", "nddr"):
            between = {"stitch": CrossStitch, "nddr": NDDR}[method]
            if not any(isinstance(one, POOLINGS) for one in flatten_layers(backbone)):
                return {"between": dict.fromkeys(own, between)}
            return {"between": between}
        if method in ("drn", "mrn"):
            prior = prior_by_name(method, o.strengths[0], o.epsilon, o.update_every)
            return {"prior": dict.fromkeys(own, prior)}
        if method in ("trace", "deviation"):
            kind = {"trace": TraceNorm, "deviation": MeanDeviation}[method]
            return {"prior": dict.fromkeys(own, kind(o.norms[0]))}
        return {}


@functools.lru_cache(maxsize=1)
def _trunk_of(name, size, feature_layer, weights):
    """As `load_trunk`; read once."""
    return load_trunk(name, size, feature_layer, None if weights == "none" else weights)


def _layers_of(backbone, share_until):
    """The names of the layers with kernels, after the common ones."""
    names = [
        layer.name
        for layer in flatten_layers(backbone)
        if getattr(layer, "kernel", None) is not None
    ]
    if share_until is None:
        return names
    border = backbone.get_layer(share_until).output
    common = {layer.name for layer in keras.Model(backbone.inputs, border).layers}
    return [name for name in names if name not in common]


# --- training and testing ---------------------------------------------------------


class Labels:
    """Labels for the losses, and errors; an age in years is standardised.

    Args:
        tasks: list of keys of `TASKS`.
        part: `Part`.
    """

    def __init__(self, tasks, part):
        self.tasks = tasks
        self._known = {
            task: own & part.known[task] for task, own in _there(part.training, tasks)
        }
        self._level = self._constant = None
        if "years" in tasks:
            years = part.training.years[self._known["years"]]
            self._level = float(years.mean()), float(years.std()) or 1.0
        self._answers = {
            task: _most_frequent(getattr(part.training, task)[self._known[task]], task)
            for task in tasks
        }

    def of(self, faces, rows=None):
        """Labels by task, of which those that are missing are marked.

        Args:
            faces: `Faces`.
            rows: slice of the training part that they are of; None: they are another part.
        """
        found = {}
        for task, known in _there(faces, self.tasks):
            if rows is not None:
                known = self._known[task][rows]
            values = getattr(faces, task)
            if task == "years":
                scaled = (values - self._level[0]) / self._level[1]
                found[task] = np.where(known, scaled, np.nan).astype("float32")[:, None]
            else:
                found[task] = np.where(known, values, -1)
        return found

    def losses(self):
        """The losses by task, which leave missing labels out."""
        classes = {"missing": -1}
        return {
            task: MaskedLoss("mean_absolute_error")
            if task == "years"
            else MaskedLoss("sparse_categorical_crossentropy", **classes)
            for task in self.tasks
        }

    def errors(self, outputs, faces):
        """`(errors, constant)` by task, those of outputs and of a constant answer.

        Of classes the share of wrong answers, of years the mean absolute error as a share
        of that of the constant answer, the median of the training images.
        """
        errors, constant = {}, {}
        for task, known in _there(faces, self.tasks):
            truth, answer = getattr(faces, task)[known], self._answers[task]
            if not len(truth):
                errors[task] = constant[task] = float("nan")
            elif task == "years":
                level, spread = self._level
                found = np.squeeze(outputs[task], -1)[known] * spread + level
                worst = np.abs(truth - answer).mean() or 1.0
                errors[task] = float(np.abs(truth - found).mean() / worst)
                constant[task] = 1.0
            else:
                errors[task] = 1 - float(np.mean(hits(outputs[task][known], truth)))
                constant[task] = float(np.mean(truth != answer))
        return errors, constant


def _there(faces, tasks):
    """Tasks, and which of their labels the data set has."""
    for task in tasks:
        values = getattr(faces, task)
        yield task, ~np.isnan(values) if task == "years" else values >= 0


def _most_frequent(values, task):
    """The best constant answer."""
    if not len(values):
        raise DataError(f"Expected training images with a label of {task!r}. Found none.")
    return (
        float(np.median(values)) if task == "years" else int(np.bincount(values).argmax())
    )


def train_and_test(options, method, part, seed, tick, callbacks=None):
    """Train and test one method; results for JSON."""
    rng = np.random.default_rng(seed)
    labels = Labels(options.tasks, part)
    count = whole_batches(options, len(part.training.images))
    with timed(seed) as took:
        network = Network(options)
        model = network.make(method)
        steps = -(-count // options.batch_size)
        epochs = epochs_of(options, steps)
        rate = keras.optimizers.schedules.CosineDecay(
            options.learning_rates[0], steps * epochs
        )
        model.compile(
            make_optimizer(options.optimizer, rate, options.weight_decay),
            labels.losses(),
            loss_weights=options.loss_weights or None,
        )

        def data():
            cut = some(cut_out(part.training, options.extent, rng), slice(count))
            return network.prepared(cut.images), labels.of(cut, slice(count))

        watched = None
        if callbacks is not None:
            faces = part.testing
            watched = network.prepared(faces.images), labels.of(faces)
        fit_anew(model, data, epochs, options.batch_size, tick, callbacks or (), watched)
    outputs = model.predict(
        network.prepared(part.testing.images), batch_size=256, verbose=0
    )
    errors, constant = labels.errors(outputs, part.testing)
    return {
        "errors": errors,
        "constant": constant,
        "parameters": trainable_parameters(model),
        "seconds": took.seconds,
    }


def epochs_of(options, steps):
    """How many epochs of so many steps are trained."""
    return max(options.epochs, -(-options.steps // steps))


# --- tables -----------------------------------------------------------------------


def summarize(runs, tasks):
    """Errors by number of images and method, and paired differences: a data frame."""
    runs = runs.assign(error=[mean_error(one) for one in runs["errors"]])
    rows = []
    for images, of_count in runs.groupby("training_images", sort=False, dropna=False):
        title = "all" if pd.isna(images) else f"{images:g}"
        constant = of_count.drop_duplicates("seed")
        row = {"Images": title, "Method": "most frequent answer", "Setting": ""}
        rows.append(row | _errors(constant["constant"], tasks))
        for method, group in of_count.groupby("method", sort=False):
            row = {"Images": title, "Method": METHODS[method]}
            row["Setting"] = _setting(method, group.iloc[0])
            row |= _errors(group["errors"], tasks)
            for name, other in (("To STL", "stl"), ("To all shared", "hard")):
                base = of_count[of_count.method == other]
                row[name] = "" if method == other else paired(group, base)
            row["Weights"] = f"{group.parameters.mean():,.0f}"
            row["Runs"] = f"{len(group)}"
            row["Seconds"] = f"{group.seconds.mean():.0f}"
            rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _errors(found, tasks):
    frame = 100 * pd.DataFrame(list(found))
    cells = {f"{task.capitalize()} %": mean_and_spread(frame[task], 1) for task in tasks}
    return cells | {"Mean %": mean_and_spread(frame[list(tasks)].mean(axis=1), 1)}


def _setting(method, run):
    """The learning rate and the method's own setting, in words."""
    words = [f"rate {run.learning_rate:g}"]
    if pd.notna(run.setting):
        words.append(f"{HOW[method].letter} {run.setting:g}")
    return ", ".join(words)


def plot_errors(runs, tasks, path):
    """Figure 3: the error of each task by the number of training images."""
    figure, (row,) = figure_of(len(tasks), sharex=True)
    for axes, task in zip(row, tasks):
        for method, group in runs.groupby("method", sort=False):
            errors = group.assign(error=[100 * one[task] for one in group["errors"]])
            by_count = errors.groupby("training_images").error
            mean, spread = by_count.mean(), by_count.std().fillna(0)
            axes.errorbar(
                mean.index, mean, spread, marker="o", capsize=2, label=METHODS[method]
            )
        axes.set(xlabel="training images", ylabel="error, %", title=task, xscale="log")
    row[0].legend(fontsize=7)
    figure.savefig(path)


class FacesExperiment(Experiment):
    """Attributes of faces."""

    name = page_block = "faces"
    description = "Age, gender and other attributes of faces, by every way to share."
    methods = METHODS
    default_methods = ("stl", "hard", "laf", "tucker", "tt")
    defaults = {"epochs": 10, "batch_size": 64, "repeats": 3, "optimizer": "adam"}
    helps = {"epochs": "at least; see --steps"}
    least = {"batch_size": 2}
    settings = ("tasks", "trunk", "feature_layer", "share_until", "size", "width", "stride")
    settings += ("dropout", "training_images", "missing", "extent", "test_images")
    settings += ("epochs", "steps", "batch_size", "optimizer", "loss_weights")
    settings += ("weight_decay",)
    families = {"independent": "stl"}
    early_stopping = False
    data_argument = DATA

    def add_arguments(self, p):
        p.add_argument(
            "--tasks",
            nargs="+",
            choices=list(TASKS),
            help="by default those that the data set has, age as a class",
        )
        p.add_argument(
            "--trunk",
            default="paper",
            help="'paper', or a class of keras.applications, or a .keras file",
        )
        p.add_argument("--feature-layer", help="the trunk's layer with the features")
        p.add_argument(
            "--share-until",
            help="the last layer of a trunk that stays as it is, one for all tasks of "
            "every method",
        )
        p.add_argument(
            "--weights", default="imagenet", help="of keras.applications, or 'none'"
        )
        p.add_argument("--size", type=whole(8), default=64, help="side of the images")
        p.add_argument(
            "--width",
            type=real(above=0),
            default=0.125,
            help="of the paper's network, the share of its filters and units",
        )
        p.add_argument(
            "--stride", type=whole(1), default=2, help="of its first convolution"
        )
        p.add_argument("--dropout", type=real(least=0, below=1), default=0.5)
        add_faces(p)
        p.add_argument(
            "--missing",
            type=real(least=0, below=1),
            default=0.0,
            help="the share of the training labels that are dropped at random",
        )
        p.add_argument(
            "--steps", type=whole(1), default=500, help="at least, of the whole training"
        )
        p.add_argument("--weight-decay", type=real(least=0), default=0.0)
        p.add_argument(
            "--validation",
            type=real(above=0, below=1),
            default=0.2,
            help="choose among several settings by this share of the first seed's training "
            "images",
        )
        grids = {
            "--learning-rates": ([1e-3], real(above=0), "at the start; half a cosine"),
            "--tolerances": ([0.1, 0.3], real(above=0, below=1), "of LAF, Tucker and TT"),
            "--shared-layers": (None, whole(1), "N of UD-MTL; by default all"),
            "--strengths": ([0.01, 0.1], real(above=0), "of DRN and MRN"),
            "--norms": ([1e-4, 1e-3], real(above=0), "strengths of the norms"),
            "--thresholds": ([0.4], real(least=0, most=1), "of similar kernels"),
            "--relation-weights": ([0.03, 0.3], real(above=0), "λ of TRN"),
        }
        for name, (default, kind, what) in grids.items():
            p.add_argument(name, nargs="+", type=kind, default=default, help=what)
        p.add_argument("--epsilon", type=real(above=0), default=0.01, help="of the priors")
        p.add_argument("--update-every", type=whole(1), default=10, help="steps, theirs")

    def check(self, p, options):
        check_extent(p, options)
        tasks = options.tasks
        if tasks is not None and (len({*tasks}) != len(tasks) or len(tasks) < 2):
            p.error(f"--tasks: expected two different tasks at least, got {tasks}")
        if options.share_until is not None and options.trunk == "paper":
            p.error("--share-until: expected a --trunk with it")
        if options.trunk != "paper" and "hard-large" in options.methods:
            p.error("--methods: expected 'hard-large' with the paper's network only")

    def load(self, options, console=None):
        """`(training, testing, folds, digest)`.

        With `folds`, an array of ints, `training` is all faces and `testing` is None. Fills
        in the tasks.
        """
        folds = testing = None
        if is_portraits(options.data):
            training, folds = of_portraits(options)
        else:
            training, testing = load_mtfl(options.data, options.size)
        if options.tasks is None:
            options.tasks = [
                task
                for task in TASKS
                if getattr(training, task) is not None and task != "years"
            ]
        check_tasks(options, training, TASKS)
        if options.test_images is not None or (testing is None and folds is None):
            training, testing = apart(options, training)
            folds = None
        count = len(training.images)
        if folds is not None:
            # Of the folds without the largest one.
            count -= np.bincount(folds).max()
        check_counts(options, count)
        given = [training.images] if testing is None else [training.images, testing.images]
        return training, testing, folds, digest_of(given)

    def tasks(self, options, data=None):
        if options.tasks is None and data is not None:
            # Loading fills them in.
            data()
        return options.tasks

    def _part(self, options, data, count, seed):
        """The part of a run: with folds the seed says which one is tested on."""
        training, testing, folds, _ = data
        if folds is not None:
            numbers = np.unique(folds)
            tested = folds == numbers[seed % len(numbers)]
            training, testing = some(training, ~tested), some(training, tested)
        rng = np.random.default_rng(seed)
        if count is not None:
            order = rng.permutation(len(training.images))
            training = some(training, order[:count])
        known = {
            task: rng.random(len(training.images)) >= options.missing
            for task in options.tasks
        }
        return Part(training, testing, known)

    def draw(self, options, data, seed):
        return self._part(options, data, (options.training_images or [None])[0], seed)

    def hold_out(self, part, options, share, seed):
        task = min(options.tasks, key=lambda name: TASKS[name])
        labels = getattr(part.training, task)
        train, valid = held_out(np.arange(len(labels)), labels, share, seed)
        # Faces as the test images are.
        rng = np.random.default_rng(seed)
        return Part(
            some(part.training, train),
            cut_out(some(part.training, valid), options.extent, rng),
            {task: own[train] for task, own in part.known.items()},
        )

    def _values(self, options, method):
        """Pairs of a learning rate and the method's own setting, or None."""
        name = HOW[method].setting
        own = None if name is None else getattr(options, name)
        return list(itertools.product(options.learning_rates, own or [None]))

    def _planned(self, options, data, count, method, seed, values, share=None):
        """A run, of which a share of the training images may be what is tested on."""
        own = copy.copy(options)
        own.training_images, own.learning_rates = count, [values[0]]
        if values[1] is not None:
            setattr(own, HOW[method].setting, [values[1]])
        names = {"data": data[-1], "seed": seed, "validation": share}
        names |= {"learning_rate": values[0], "setting": values[1]}
        if method in ("drn", "mrn"):
            names |= {"epsilon": options.epsilon, "update_every": options.update_every}
        if options.trunk != "paper":
            names["weights"] = options.weights
        images = "all" if count is None else count
        title = f"{images} images, seed {seed}, rate {values[0]:g}"
        if values[1] is not None:
            title += f", {HOW[method].letter} {values[1]:g}"
        if share is not None:
            title += ", validation"

        def part():
            found = self._part(options, data, count, seed)
            return found if share is None else self.hold_out(found, own, share, seed)

        planned = self.planned(title, own, method, part, seed, names)
        examples = len(data[0].images) if count is None else count
        examples -= math.ceil(examples * (share or 0))
        steps = -(-whole_batches(options, examples) // options.batch_size)
        return planned._replace(steps=epochs_of(options, steps))

    def find(self, options, data, console):
        """The results with the best settings."""

        def group(count, method):
            def planned(values, seed, choosing):
                share = options.validation if choosing else None
                return self._planned(options, data, count, method, seed, values, share)

            return self._values(options, method), planned

        counts = options.training_images or [None]
        groups = itertools.starmap(group, itertools.product(counts, options.methods))
        return self.find_chosen(options, console, groups)

    def run(self, options, method, part, seed, tick, callbacks=None):
        return train_and_test(options, method, part, seed, tick, callbacks)

    def describe(self, found):
        return ", ".join(f"{task} {error:.1%}" for task, error in found["errors"].items())

    def errors(self, found):
        return found["errors"]

    def rate(self, options):
        return options.learning_rates[0]

    def with_rate(self, rate):
        return {"learning_rates": [rate]}

    def tables(self, options, data, runs):
        trunk = pathlib.Path(options.trunk).name
        trunk = "the paper's network" if trunk == "paper" else trunk
        note = (
            f"Faces of {options.size} x {options.size}, {trunk}; errors ± standard "
            "deviation over the draws; differences of the mean error in points, paired by "
            "draw, ± half of the 95% interval."
        )
        if options.missing:
            note += f" Of the training labels {options.missing:.0%} are missing."
        frame = summarize(runs, options.tasks)
        return {options.page_block: Table("Faces", frame, "table", keys=2, note=note)}

    def figures(self, options, data, runs):
        if len(options.training_images or ()) < 2:
            return []
        path = options.output / "errors.png"
        plot_errors(runs, options.tasks, path)
        return [path]


parse, main = FacesExperiment().parse, FacesExperiment().main

if __name__ == "__main__":
    main()
