"""Fifty alphabets as fifty tasks: the third experiment of the DMTRL paper.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4.3 and Figure 4. Every alphabet of Omniglot is a task with
images and classes of its own, its characters. The methods differ in how the fifty networks
share the kernels of their first four layers; the last one is each task's own:

- `stl`: single-task learning, nothing is shared;
- `ud-mtl`: user-defined sharing, the first N of the four layers are the same for all tasks;
- `ud-mtl-large`: all four are, and wider, with as many weights as those of DMTRL;
- `laf`, `tucker`, `tt`: DMTRL, kernels generated from shared factors, of a random start or
  of networks that were trained one by one (`--start`);
- other families of the library: `similar` (MTAL), `stitch`, `nddr`, `drn`, `mrn`.

    python -m applications.omniglot --data FOLDER
    python -m applications.omniglot --data FOLDER --size 52 --validation
"""

import functools
import itertools
import pathlib
import warnings

import keras
import numpy as np
import pandas as pd
from scipy import stats

from dmtrl_keras import (
    chance_of_sharing,
    factorize,
    multitask,
    plot_sharing_strength,
    task_layers,
    zip_tasks,
)
from dmtrl_keras.layers import NDDR, CrossStitch
from dmtrl_keras.monitoring.relations import cosines
from dmtrl_keras.mrn.network import PRIORS, prior_by_name

from .alphabets import load_alphabets, split
from .arguments import ByName, check_names, real, whole
from .experiment import (
    Experiment,
    Table,
    decaying,
    digest_of,
    errors_by_task,
    figure_of,
    held_out_by_task,
    mean_error,
    predict_by_task,
    ticking,
    timed,
    trainable_parameters,
)
from .mnist import rank, strengths
from .reading import DataError
from .results import mean_and_spread, paired

LAYERS = ("conv1", "conv2", "conv3", "fc")
# Filters and side of the kernels; the units of the fully connected layer.
CONVOLUTIONS, UNITS = ((8, 5), (12, 3), (16, 3)), 64
FACTORIZATIONS = ("laf", "tucker", "tt")
HARD = ("ud-mtl", "ud-mtl-large")
METHODS = {
    "stl": "STL",
    "ud-mtl": "UD-MTL",
    "ud-mtl-large": "UD-MTL-Large",
    "laf": "DMTRL-LAF",
    "tucker": "DMTRL-Tucker",
    "tt": "DMTRL-TT",
    "similar": "similar kernels (MTAL)",
    "stitch": "Cross-Stitch",
    "nddr": "NDDR",
    "drn": "DRN",
    "mrn": "MRN",
}
# Errors in percent, 10% of the images being test images (Meyerson & Miikkulainen, "Beyond
# Shared Hierarchies: Deep Multitask Learning through Soft Layer Ordering", ICLR 2018).
PUBLISHED = {"stl": 34.4, "ud-mtl": 30.0, "laf": 31.1, "tucker": 29.7, "tt": 28.8}
# Options of factorisations.
FACTORS = ("start", "tolerance", "rank", "ranks", "task_rank", "layers")


def make_backbone(options, width=1.0):
    """One alphabet's network up to its classes.

    8 filters of 5x5, 12 of 3x3, 16 of 3x3, each followed by 2x2 max pooling and tanh, and
    64 units. Tanh is after the pooling, which gives the same and is cheaper.

    Args:
        options: parsed arguments: `size`, `padding`, `dropout`.
        width: float, how many times as many filters and units.

    Returns:
        A Keras model from images, 0 to 255, of which black becomes 1 and white 0.
    """
    layers = keras.layers
    parts = [
        keras.Input((options.size, options.size, 1), name="image"),
        layers.Rescaling(-1 / 255, 1.0, name="ink"),
    ]
    for number, (filters, side) in enumerate(CONVOLUTIONS, start=1):
        own = {"padding": options.padding, "name": f"conv{number}"}
        parts.append(layers.Conv2D(round(width * filters), side, **own))
        parts.append(layers.MaxPooling2D(name=f"pool{number}"))
        parts.append(layers.Activation("tanh", name=f"tanh{number}"))
    parts.append(layers.Flatten(name="flatten"))
    parts.append(layers.Dense(round(width * UNITS), "tanh", name="fc"))
    if options.dropout:
        parts.append(layers.Dropout(options.dropout, name="dropout"))
    return keras.Sequential(parts, name="network")


def weights_of(backbone, shared_layers, classes):
    """How many weights T networks have whose first layers are one for all.

    Args:
        backbone: as from `make_backbone`.
        shared_layers: int, N.
        classes: list of int, T of them.
    """
    total = sum((backbone.outputs[0].shape[-1] + 1) * own for own in classes)
    for number, name in enumerate(LAYERS, start=1):
        own = backbone.get_layer(name).count_params()
        total += own if number <= shared_layers else own * len(classes)
    return total


def width_of(options, classes):
    """How much wider four shared layers are with `--large` of the weights of STL."""
    most = options.large * weights_of(make_backbone(options), 0, classes)
    found = 1.0
    # In steps of one filter of the first layer.
    for filters in range(CONVOLUTIONS[0][0] + 1, 1000):
        width = filters / CONVOLUTIONS[0][0]
        if weights_of(make_backbone(options, width), len(LAYERS), classes) > most:
            break
        found = width
    return found


class Trainer:
    """Trains the methods on one split.

    Args:
        options: parsed arguments, of one training share.
        tasks: dict from name to `ImageTask`.
        parts: as from `split`.
        seed: int.
        tick: function without arguments, called after each epoch.
        watch: None, or Keras callbacks that see the loss on the other part as `val_loss`.

    Attributes:
        spared: float, the seconds of a start that an earlier method has trained.
    """

    def __init__(self, options, tasks, parts, seed, tick=lambda: None, watch=None):
        self.options = options
        self.tasks = tasks
        self.parts = parts
        self.seed = seed
        self.tick = tick
        self.watch = watch
        self.spared = 0.0
        self._started = None

    @property
    def classes(self):
        """The number of classes by task."""
        return {name: len(task.classes) for name, task in self.tasks.items()}

    def network(self, sharing="independent", width=1.0, **more):
        """A new network of all tasks, with which all random numbers begin anew."""
        keras.utils.set_random_seed(self.seed)
        return multitask(
            make_backbone(self.options, width),
            list(self.tasks),
            sharing,
            shared_input=False,
            heads=self.classes,
            verbose=False,
            **more,
        )

    def fit(self, model, method, epochs):
        """Train a network for some epochs; the learning rate falls along half a cosine."""
        o = self.options
        data = [
            {
                name: (
                    task.images[self.parts[name][side]],
                    task.labels[self.parts[name][side]],
                )
                for name, task in self.tasks.items()
            }
            for side in range(2)
        ]
        epoch = o.steps or "longest"
        stream = zip_tasks(data[0], o.batch_size, epoch=epoch, seed=self.seed)
        watched = None
        if self.watch is not None:
            watched = zip_tasks(data[1], o.batch_size, shuffle=False)
        own = _with_rate(o, method)
        optimizer = decaying(own, len(stream) * epochs, o.weight_decay)
        weights = o.loss_weights or None
        model.compile(optimizer, "sparse_categorical_crossentropy", loss_weights=weights)
        model.fit(
            stream,
            epochs=epochs,
            validation_data=watched,
            shuffle=False,
            verbose=0,
            callbacks=ticking(self.tick, self.watch),
        )
        return model

    def ranks(self, method):
        """The options that say which ranks, of `multitask` and `factorize`."""
        o = self.options
        given = {"rank": o.ranks or o.rank}
        if method != "laf":
            # LAF has no other rank than that of the tasks.
            given["task_rank"] = o.task_rank
        if given["rank"] is None and o.weights is None:
            given["tolerance"] = o.tolerance
        return given

    def train(self, method, shared_layers):
        """Train one method.

        Returns:
            The network.
        """
        o = self.options
        if method in FACTORIZATIONS and o.start == "stl":
            source = self._start_of_factors()
            with warnings.catch_warnings():
                # A small layer whose factors would be more stays; the results have ranks.
                warnings.simplefilter("ignore", UserWarning)
                own = {"layers": o.layers, "weights": o.weights, **self.ranks(method)}
                model = factorize(source, method, verbose=False, **own)
            return self.fit(model, method, o.epochs - o.stl_epochs)
        return self.fit(self._untrained(method, shared_layers), method, o.epochs)

    def _start_of_factors(self):
        """Networks without sharing after the first epochs, trained once for all methods."""
        if self._started is None:
            with timed() as took:
                model = self.fit(self.network(), "stl", self.options.stl_epochs)
            self._started = model, took.seconds
            return model
        for _ in range(self.options.stl_epochs):
            self.tick()
        model, self.spared = self._started
        return model

    def _untrained(self, method, shared_layers):
        o = self.options
        if method in HARD:
            width = 1.0
            if method == "ud-mtl-large":
                shared_layers, width = len(LAYERS), width_of(o, list(self.classes.values()))
            sharing = dict.fromkeys(LAYERS[:shared_layers], "hard")
            return self.network(sharing, width)
        if method in FACTORIZATIONS:
            with warnings.catch_warnings():
                # How many weights there are, the results say.
                warnings.simplefilter("ignore", UserWarning)
                sharing = dict.fromkeys(o.layers, method)
                return self.network(sharing, start=o.start, **self.ranks(method))
        if method in PRIORS:
            prior = prior_by_name(method, o.strength, o.epsilon, o.update_every)
            return self.network(prior=dict.fromkeys(LAYERS, prior))
        if method in ("stitch", "nddr"):
            return self.network(between=CrossStitch if method == "stitch" else NDDR)
        return self.network("similar" if method == "similar" else "independent")

    def choose_shared_layers(self, method):
        """N by cross-validation on the training images, the same number of each character.

        With two images of each character there are two folds at most.

        Returns:
            A dict from N to the mean error; empty where each character has one image.
        """
        folds, labels = self.options.folds, {}
        for name, task in self.tasks.items():
            labels[name] = task.labels[self.parts[name][0]]
            folds = min(folds, np.bincount(labels[name]).min())
        if folds < 2:
            return {}
        errors = {n: [] for n in range(1, len(LAYERS) + 1)}
        for fold, n in itertools.product(range(folds), errors):
            parts = {}
            for name, (train, _) in self.parts.items():
                # The number of each image among those of its character.
                place = pd.Series(labels[name]).groupby(labels[name]).cumcount().to_numpy()
                out = place % folds == fold
                parts[name] = train[~out], train[out]
            inner = Trainer(self.options, self.tasks, parts, self.seed)
            errors[n].append(mean_error(inner.errors(inner.train(method, n))))
        return {n: float(np.mean(found)) for n, found in errors.items()}

    def errors(self, model):
        """The error of each task on its other part, NaN if the network diverged."""
        inputs = {n: self.tasks[n].images[test] for n, (_, test) in self.parts.items()}
        outputs = predict_by_task(model, inputs, 64)
        return errors_by_task(
            outputs, {n: self.tasks[n].labels[test] for n, (_, test) in self.parts.items()}
        )


def _with_rate(options, method):
    """Options whose learning rate is that of a method."""
    own = type(options)(**vars(options))
    own.learning_rate = options.rates.get(method, options.learning_rate)
    return own


def similarity(model, layer="fc"):
    """The cosine of every two tasks' columns of S in a layer, after Eq. 9's normalisation.

    Returns:
        A list of floats, the pairs in the order of `itertools.combinations`; None where no
        sharing is learned.
    """
    (own,) = [one for one in task_layers(model) if one.name == layer] or [None]
    if own is None or own.rank is None:
        return None
    matrix = cosines(keras.ops.convert_to_numpy(own.task_matrix).astype("float64"))
    pairs = np.triu_indices(len(matrix), 1)
    return [round(float(value), 4) for value in matrix[pairs]]


# --- tables -----------------------------------------------------------------------


def _groups(runs):
    """Share, method and their runs, in the order of shares and of `METHODS`."""
    for share in sorted(runs.training_share.unique()):
        for method in METHODS:
            own = runs[(runs.training_share == share) & (runs.method == method)]
            if len(own):
                yield share, method, own


def table_of_errors(runs):
    """Figure 4 as a table: the mean error over the alphabets."""
    rows = []
    for share, method, own in _groups(runs):
        stl = runs[(runs.training_share == share) & (runs.method == "stl")]
        title = METHODS[method]
        if method == "ud-mtl":
            chosen = sorted({int(n) for n in own.shared_layers})
            title += f" (N = {', '.join(map(str, chosen))})"
        row = {
            "Training": f"{share:.0%}",
            "Method": title,
            "Splits": len(own),
            "Error %": mean_and_spread(100 * own.error, 1),
            "To STL": "" if method == "stl" else paired(own, stl),
            "Weights": f"{own.parameters.mean():,.0f}",
            "Seconds": f"{own.seconds.mean():.0f}",
            "Published %": f"{PUBLISHED.get(method, '')}" if share == 0.9 else "",
        }
        rows.append(row)
    frame = pd.DataFrame(rows)
    if not frame["Published %"].any():
        del frame["Published %"]
    return frame


def table_of_sharing(runs):
    """Sharing strength by layer, and in brackets that of independent kernels."""
    rows = []
    for share, method, own in _groups(runs):
        found, chance = (
            pd.DataFrame(list(own[name])) for name in ("sharing_strength", "chance")
        )
        cells = {
            name: f"{mean_and_spread(found[name])} ({chance[name].mean():.2f})"
            for name in found
        }
        rows.append({"Training": f"{share:.0%}", "Method": METHODS[method], **cells})
    return pd.DataFrame(rows).fillna("")


def table_of_alphabets(runs, tasks):
    """The error of each alphabet at the smallest training share."""
    share = runs.training_share.min()
    columns = {"Alphabet": list(tasks)}
    columns["Characters"] = [len(task.classes) for task in tasks.values()]
    for own_share, method, own in _groups(runs):
        if own_share == share:
            errors = 100 * pd.DataFrame(list(own.errors))
            columns[METHODS[method]] = [mean_and_spread(errors[name], 1) for name in tasks]
    return pd.DataFrame(columns)


def table_of_pairs(runs, tasks, count=3):
    """The languages whose tasks are the most and the least alike in the layer `fc`.

    The agreement of the splits is the mean rank correlation of the similarities of all
    pairs between two splits; it is empty for one split, and where all pairs are alike.
    """
    names = list(itertools.combinations(tasks, 2))
    rows = []
    for share, method, own in _groups(runs):
        known = own.similarity.dropna()
        if known.empty:
            continue
        values = np.array(list(known))
        mean = values.mean(axis=0)
        order = np.argsort(-mean, kind="stable")
        agreement = ""
        if len(values) > 1 and np.ptp(values, axis=1).min() > 0:
            # Of every two splits.
            matrix = np.corrcoef(stats.rankdata(values, axis=1))
            agreement = f"{matrix[np.triu_indices(len(values), 1)].mean():.2f}"
        for most, least in zip(order[:count], order[::-1]):
            both = (f"{' and '.join(names[n])} ({mean[n]:.2f})" for n in (most, least))
            row = {"Training": f"{share:.0%}", "Method": METHODS[method]}
            row |= dict(zip(("Most alike", "Least alike"), both))
            rows.append(row | {"Agreement of splits": agreement})
    return pd.DataFrame(rows)


def plot_errors(runs, path):
    """Mean error by training share, as in Figure 4."""
    figure, ((axes,),) = figure_of(1, size=(5, 4))
    for method in METHODS:
        own = runs[runs.method == method].groupby("training_share").error
        if not len(own):
            continue
        mean, spread = 100 * own.mean(), 100 * own.std().fillna(0)
        axes.errorbar(
            100 * mean.index, mean, spread, marker="o", capsize=2, label=METHODS[method]
        )
    axes.set(xlabel="training data, %", ylabel="mean error over the alphabets, %")
    axes.legend(fontsize=8)
    figure.savefig(path)


def plot_sharing(runs, path):
    """Sharing strength by layer at the smallest share, as in Figure 4, and chance."""
    runs = runs[runs.training_share == runs.training_share.min()]
    found, chance = {}, {}
    for _, method, own in _groups(runs):
        found[METHODS[method]] = pd.DataFrame(list(own.sharing_strength)).mean().to_dict()
        chance[METHODS[method]] = pd.DataFrame(list(own.chance)).mean().to_dict()
    plot_sharing_strength(found, path, chance)


class Omniglot(Experiment):
    """Fifty alphabets as fifty tasks."""

    name = page_block = "omniglot"
    description = "Omniglot's 50 alphabets as 50 tasks: STL, UD-MTL, DMTRL and others."
    methods = METHODS
    default_methods = tuple(METHODS)[:6]
    defaults = {
        "epochs": 20,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "repeats": 1,
        "optimizer": "adam",
    }
    helps = {
        "epochs": "the whole budget of every method",
        "batch_size": "images of each alphabet in a step",
        "learning_rate": "at the start; it falls along half a cosine",
    }
    settings = ("size", "padding", "dropout", "held_back", "validation", "epochs", "steps")
    settings += ("batch_size", "optimizer", "loss_weights", "weight_decay")
    families = {"independent": "stl", "hard": "ud-mtl"}
    data_argument = {
        "type": pathlib.Path,
        "help": "folder with images_background and images_evaluation, folders or zip files",
    }

    def add_arguments(self, p):
        p.add_argument(
            "--alphabets",
            nargs="+",
            metavar="NAME",
            help="their names, or how many of them, in alphabetical order; by default all",
        )
        p.add_argument("--size", type=whole(8), default=105, help="side of the images")
        p.add_argument(
            "--training-share",
            nargs="+",
            type=real(above=0, below=1),
            default=[0.1],
            help="of each character's drawings; several give curves",
        )
        p.add_argument(
            "--held-back",
            type=whole(0, 1000),
            default=2,
            help="drawings of each character that are neither trained nor tested on",
        )
        p.add_argument(
            "--validation",
            action="store_true",
            help="test on the drawings that are held back, to choose settings by",
        )
        p.add_argument("--padding", choices=("same", "valid"), default="same")
        p.add_argument("--dropout", type=real(least=0, below=1), default=0.0)
        p.add_argument(
            "--steps",
            type=whole(1),
            help="of an epoch; by default as many as the largest alphabet needs",
        )
        p.add_argument(
            "--rates",
            nargs="+",
            action=ByName,
            type=real(above=0),
            default={},
            metavar="METHOD=RATE",
            help="learning rates of methods that have another than --learning-rate",
        )
        p.add_argument("--weight-decay", type=real(least=0), default=0.0)
        p.add_argument(
            "--shared-layers",
            type=lambda text: int(text) if text in ("1", "2", "3", "4") else text,
            choices=(1, 2, 3, 4, "cv"),
            default=3,
            help="N of UD-MTL; 'cv': by cross-validation on the training images, where a "
            "character has two of them, else 3, that of the paper",
        )
        p.add_argument("--folds", type=whole(2), default=5)
        p.add_argument(
            "--large",
            type=real(above=0, most=1),
            default=0.38,
            help="the share of STL's weights that UD-MTL-Large has at most",
        )
        p.add_argument(
            "--start",
            choices=("common", "apart", "stl"),
            default="common",
            help="of the factors: one draw for all tasks, one for each, or networks that "
            "were trained one by one for --stl-epochs",
        )
        p.add_argument(
            "--stl-epochs",
            type=whole(1),
            help="of --start stl; by default half of the epochs",
        )
        p.add_argument(
            "--tolerance",
            type=real(above=0, below=1),
            default=0.1,
            help="relative error of the factorisations",
        )
        p.add_argument(
            "--rank",
            type=rank,
            help="instead of the tolerance: an int (a cap), or a fraction of the weights",
        )
        p.add_argument(
            "--ranks",
            nargs="+",
            action=ByName,
            type=rank,
            default={},
            metavar="LAYER=RANK",
            help="likewise, of each of --layers",
        )
        p.add_argument(
            "--weights",
            type=real(above=0, most=1),
            help="instead of the tolerance, with --start stl: the share of the weights of "
            "all kernels that factors have",
        )
        p.add_argument("--task-rank", type=rank, help="of Tucker and TT, likewise")
        p.add_argument(
            "--layers",
            nargs="+",
            choices=LAYERS,
            default=list(LAYERS),
            help="those that are factorised; the others stay independent",
        )
        p.add_argument(
            "--strength",
            type=real(least=0),
            default=0.1,
            help="of the priors of DRN and MRN",
        )
        p.add_argument("--epsilon", type=real(above=0), default=0.01, help="their ridge")
        p.add_argument("--update-every", type=whole(1), default=10, help="steps, theirs")

    def check(self, p, options):
        if options.data is None:
            p.error("--data: expected the folder of Omniglot")
        if options.validation and not options.held_back:
            p.error("--validation: expected --held-back of 1 or more")
        check_names("--rates", options.rates, METHODS, p)
        check_names("--ranks", options.ranks, LAYERS, p)
        if options.ranks and {*options.ranks} != {*options.layers}:
            p.error(f"--ranks: expected those of {options.layers}, as --layers says")
        given = (options.rank, options.weights, options.ranks or None)
        if sum(value is not None for value in given) > 1:
            p.error("--rank: expected one of --rank, --ranks and --weights")
        if options.weights is not None and options.start != "stl":
            p.error("--weights: expected --start stl with it")
        if options.stl_epochs is None:
            options.stl_epochs = max(1, options.epochs // 2)
        factorized = {*FACTORIZATIONS} & {*options.methods}
        if options.start == "stl" and factorized and options.stl_epochs >= options.epochs:
            p.error(
                f"--stl-epochs: expected less than --epochs, {options.epochs}, got "
                f"{options.stl_epochs}"
            )

    def load(self, options, console):
        """The tasks, a dict from name to `ImageTask`."""
        chosen = options.alphabets
        if chosen is not None and len(chosen) == 1 and chosen[0].isdecimal():
            chosen = int(chosen[0])
        tasks = load_alphabets(options.data, options.size, chosen)
        if len(tasks) < 2:
            raise DataError(
                f"--alphabets: expected 2 alphabets or more, got {list(tasks)}."
            )
        characters = sum(len(task.classes) for task in tasks.values())
        console.print(f"{len(tasks)} alphabets with {characters} characters.")
        return tasks

    def tasks(self, options, data=None):
        return None if data is None else list(data())

    def plan(self, options, tasks):
        """Split by split, of each all shares; the methods share what STL has trained."""
        digest = digest_of(
            piece
            for name, task in tasks.items()
            for piece in (name.encode(), task.images, task.labels)
        )

        # One at a time is in memory.
        @functools.lru_cache(maxsize=1)
        def trainer_of(share, seed):
            own = self._of_share(options, share)
            return Trainer(own, tasks, self._split(own, tasks, seed), seed)

        for _, seed, share, method in self.by_seed(
            options, options.training_share, options.methods
        ):
            own = self._of_share(options, share)
            yield self.planned(
                f"{share:.0%}, seed {seed}",
                own,
                method,
                lambda: (tasks, None),
                seed,
                {
                    "data": digest,
                    "seed": seed,
                    "training_share": share,
                    "learning_rate": options.rates.get(method, options.learning_rate),
                    **self._own_settings(options, method),
                },
                trainer=functools.partial(trainer_of, share, seed),
            )

    def _split(self, options, tasks, seed):
        def count(kept):
            return max(1, round(options.training_share * kept))

        share = f"a training share of {options.training_share:g} of"
        validated = options.held_back, options.validation
        return split(tasks, count, *validated, seed, share)

    def _of_share(self, options, share):
        """The options of one training share."""
        own = type(options)(**vars(options))
        own.training_share = share
        return own

    def _own_settings(self, options, method):
        names = ()
        if method in FACTORIZATIONS:
            names = FACTORS
            if options.start == "stl":
                names += ("weights", "stl_epochs")
        elif method == "ud-mtl":
            cross = options.shared_layers == "cv"
            names = ("shared_layers", "folds") if cross else ("shared_layers",)
        elif method == "ud-mtl-large":
            names = ("large",)
        elif method in PRIORS:
            names = ("strength", "epsilon", "update_every")
        own = {name: getattr(options, name) for name in names}
        if method == "mrn":
            own["ridges"] = PRIORS["mrn"]
        if own.get("start") == "stl":
            own["stl_rate"] = options.rates.get("stl", options.learning_rate)
        return own

    def draw(self, options, tasks, seed):
        own = self._of_share(options, options.training_share[0])
        return tasks, self._split(own, tasks, seed)

    def hold_out(self, part, options, share, seed):
        tasks, parts = part
        return tasks, held_out_by_task(parts, tasks, share, seed)

    def run(self, options, method, part, seed, tick, callbacks=None, trainer=None):
        """As for every experiment.

        `trainer` returns the `Trainer` of this split, which has perhaps trained the start
        of the factors.
        """
        trainer = Trainer(options, *part, seed) if trainer is None else trainer()
        trainer.options, trainer.tick, trainer.watch = options, tick, callbacks
        trainer.spared = 0.0
        results, shared_layers = {}, options.shared_layers
        if method == "ud-mtl":
            if shared_layers == "cv":
                errors = trainer.choose_shared_layers(method)
                shared_layers = min(errors, key=errors.get) if errors else 3
                results["cross_validation"] = errors
            results["shared_layers"] = shared_layers
        with timed(seed) as took:
            model = trainer.train(method, shared_layers)
        errors = trainer.errors(model)
        # Layers that one network has for all tasks count as they are.
        return results | {
            "errors": errors,
            "error": mean_error(errors),
            "parameters": trainable_parameters(model),
            "seconds": took.seconds + trainer.spared,
            "sharing_strength": strengths(model, LAYERS),
            "chance": strengths(model, LAYERS, chance_of_sharing),
            "similarity": similarity(model),
            "ranks": {layer.name: layer.rank for layer in task_layers(model)},
        }

    def describe(self, found):
        return f"error {found['error']:.1%}"

    def errors(self, found):
        return found["errors"]

    def space(self, method, options, space):
        if method == "ud-mtl":
            default = 3 if options.shared_layers == "cv" else options.shared_layers
            return {"shared_layers": space.integer("shared_layers", 1, 4, default)}
        if method in FACTORIZATIONS:
            tolerance, ranks = space.factorization(LAYERS, options.tolerance)
            return {"tolerance": tolerance} if ranks is None else {"ranks": ranks}
        return {}

    def tables(self, options, tasks, runs):
        found = {
            "": ("Mean error over the alphabets", table_of_errors(runs), 2),
            "-sharing": ("Sharing strength (chance)", table_of_sharing(runs), 2),
            "-alphabets": ("Error by alphabet, %", table_of_alphabets(runs, tasks), 1),
        }
        if {*FACTORIZATIONS} & {*options.methods}:
            found["-pairs"] = ("Pairs of languages", table_of_pairs(runs, tasks), 2)
        note = (
            f"Omniglot, {len(tasks)} alphabets, images of {options.size} x {options.size}, "
            f"{options.epochs} epochs"
            + (f" of {options.steps} steps" if options.steps else "")
            + f" with {options.batch_size} images of each alphabet in a step"
            + (", tested on the validation drawings" if options.validation else "")
            + "."
        )
        return {
            options.page_block + kind: Table(
                title, frame, keys=keys, note=note, optional=kind != ""
            )
            for kind, (title, frame, keys) in found.items()
        }

    def figures(self, options, tasks, runs):
        errors, sharing = (
            options.output / f"{name}.png" for name in ("errors", "sharing_strength")
        )
        plot_errors(runs, errors)
        plot_sharing(runs, sharing)
        return [errors, sharing]


EXPERIMENT = Omniglot()
parse, main = EXPERIMENT.parse, EXPERIMENT.main

if __name__ == "__main__":
    main()
