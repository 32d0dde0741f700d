"""Domains as tasks: the experiment of Deep Relationship Networks.

Long, Wang & Yu, "Learning Multiple Tasks with Deep Relationship Networks" (2015), section
5. Each domain of Office-Caltech-10 (amazon, caltech10, dslr, webcam) is a task with the
same ten classes; any other folder tree of domains and classes will do. The methods differ
in what the tasks share, and in the prior over what they do not share:

- `stl`: a network for each task;
- `mtcnn`: all layers are shared but the classifiers;
- `shared`: one network for all tasks, as if they were one;
- `drn8`, `drn`: task covariances of the classifiers, or of bottlenecks and classifiers;
- `drn-bi`: DRN with one-versus-rest classifiers;
- `mrn8`, `mrn`: covariances of features, classes and tasks, of the same layers;
- `frozen`, `lora`, `lora-tt`, where a trunk is fine-tuned (`--tune-from`): it stays as it
  is; or each task has a difference of rank 4 to it, or one of Tensor-Train factors of all.

With `--outlier DOMAIN` the labels of one domain are shifted, so that it contradicts the
others: what is shared with it does harm, unless the sign of the relation is learned. With
`--missing-classes N` each domain has no training example of N classes, other ones in each;
nothing is said about those there, so that they are known from other domains, if at all.

    python -m applications.office_caltech --features FOLDER
    python -m applications.office_caltech --features FOLDER --outlier amazon
    python -m applications.office_caltech --data FOLDER --trunk ResNet50
"""

import argparse
import functools
import itertools
import pathlib

import keras
import numpy as np
import pandas as pd
from keras import ops

from dmtrl_keras import (
    mode_correlation,
    mode_covariance,
    plot_eigenvectors,
    plot_heat_map,
    plot_hinton,
    relationship_network,
    task_correlation,
    zip_tasks,
)
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.keras_private import flatten_layers
from dmtrl_keras.mrn.network import PRIORS, prior_by_name
from dmtrl_keras.mrn.regularizer import MEANS
from dmtrl_keras.optimizers import LearningRateMultiplier
from dmtrl_keras.parameterizations import TT, LoRA

from .arguments import OPTIMIZERS, REPEATS, real, whole
from .domains import (
    draw,
    load_features,
    load_images,
    with_shifted_labels,
    without_classes,
)
from .experiment import (
    Experiment,
    Table,
    digest_of,
    figure_of,
    held_out_by_task,
    hits,
    predict_by_task,
    ticking,
    timed,
    trainable_parameters,
)
from .files import cached_arrays
from .reading import DataError, read_arrays, reading
from .results import mean_and_spread
from .trunks import load_trunk

_OWN = ("trunk", "bottleneck", "classifier")
METHODS = {
    "stl": {"prior": None, "layers": _OWN},
    "mtcnn": {"prior": None, "layers": ("classifier",)},
    "shared": {"prior": None, "layers": ()},
    "drn8": {"prior": "drn", "layers": ("classifier",)},
    "drn-bi": {"prior": "drn", "binary": True},
    "drn": {"prior": "drn"},
    "mrn8": {"prior": "mrn", "layers": ("classifier",)},
    "mrn": {"prior": "mrn"},
    "frozen": {"prior": None, "layers": ("classifier",), "frozen": True},
    "lora": {"prior": None, "layers": _OWN, "trunk_sharing": LoRA(4)},
    "lora-tt": {
        "prior": None,
        "layers": _OWN,
        "trunk_sharing": LoRA(together=TT(rank=0.02)),
    },
}
TITLES = {
    "stl": "STL",
    "mtcnn": "MTCNN",
    "shared": "all shared",
    "drn8": "DRN_8",
    "drn-bi": "DRN_bi",
    "drn": "DRN",
    "mrn8": "MRN_8",
    "mrn": "MRN",
    "frozen": "frozen trunk",
    "lora": "LoRA",
    "lora-tt": "LoRA, TT of all",
}
# They say something about trunks that are fine-tuned only.
ON_TRUNKS = ("frozen", "lora", "lora-tt")
NEW_LAYERS = ("bottleneck", "classifier")
PREDICT_BATCH = 256


class Trunk:
    """A pretrained network that gives features, in two parts.

    The lower part is frozen, and runs once over all images; the upper part is fine-tuned.

    Args:
        name: a class of `keras.applications`, or the path of a `.keras` file.
        size: int, the side of the images.
        feature_layer: name of the layer whose output are the features; None: the last.
        tune_from: name of the last layer of the lower part; None: all is frozen.
        scale: `(offset, divisor)`, for images as `(pixel - offset) / divisor`. None: as
            `keras.applications` wants them, and for a file as they are.
        weights: of `keras.applications`.
    """

    def __init__(
        self, name, size, feature_layer=None, tune_from=None, scale=None, weights="imagenet"
    ):
        self._scale = scale
        model, self._preprocess = load_trunk(name, size, feature_layer, weights)
        for layer in flatten_layers(model):
            if isinstance(layer, keras.layers.BatchNormalization):
                # A few images of a few domains say little about the statistics.
                layer.trainable = False
        features = model.output
        if len(features.shape) != 2:
            raise DataError(
                f"Trunk {name!r}: expected features (batch, d). Received: "
                f"{tuple(features.shape)}. Name a layer with --feature-layer."
            )
        self.lower, self.upper = model, None
        if tune_from is not None:
            border = model.get_layer(tune_from).output
            self.lower = keras.Model(model.input, border)
            self.upper = keras.Model(border, features, name="trunk")

    def run_lower(self, images):
        """The outputs of the frozen part, a float32 array."""
        batches = np.array_split(images, range(64, len(images), 64))
        return np.concatenate(
            [
                self.lower.predict_on_batch(self._prepared(batch.astype("float32")))
                for batch in batches
            ]
        )

    def _prepared(self, images):
        if self._scale is not None:
            offset, divisor = self._scale
            return (images - offset) / divisor
        return images if self._preprocess is None else self._preprocess(images)

    def new_upper(self):
        """A copy of the part that is fine-tuned, with the pretrained weights."""
        copy = keras.models.clone_model(self.upper)
        copy.set_weights(self.upper.get_weights())
        return copy


class Trainer:
    """Trains the methods on parts of the domains.

    A method's network is traced once for each strength of its prior, and starts
    anew for each run.

    Args:
        options: the parsed arguments.
        domains: dict from name to `Domain`, of features.
        classes: int.
        new_backbone: function without arguments that returns a trunk, or the shape of the
            features.
        tick: function without arguments, called after each training.
    """

    def __init__(self, options, domains, classes, new_backbone, tick=lambda: None):
        self.options = options
        self.domains = domains
        self.classes = classes
        self._new_backbone = new_backbone
        self.tick = tick
        # Networks of an earlier method are not needed any more.
        self._compiled = functools.lru_cache(maxsize=len(options.strengths))(self._compile)

    def network(self, method, strength):
        """A new network of one method."""
        o, arguments = self.options, dict(METHODS[method])
        prior = arguments.pop("prior")
        if prior is not None:
            prior = prior_by_name(
                prior, strength, o.epsilon, o.update_every, o.mean, not o.absolute
            )
            if o.initializer is not None:
                arguments["kernel_initializer"] = {"classifier": o.initializer}
        backbone = self._new_backbone()
        if arguments.pop("frozen", False) and isinstance(backbone, keras.Model):
            backbone.trainable = False
        return relationship_network(
            backbone,
            list(self.domains),
            self.classes,
            o.bottleneck or None,
            prior=prior,
            dropout=o.dropout,
            common_draw=not o.own_draws,
            **arguments,
        )

    def _compile(self, method, strength):
        model = self.network(method, strength)
        binary = METHODS[method].get("binary")
        loss = "binary_crossentropy" if binary else "sparse_categorical_crossentropy"
        if self.options.missing_classes and not binary:
            loss = known_crossentropy
        terms = self.classes if binary else 1
        model.compile(
            LearningRateMultiplier(
                OPTIMIZERS[self.options.optimizer](self.options.learning_rates[0]),
                dict.fromkeys(
                    [name for name in NEW_LAYERS if _has_layer(model, name)],
                    self.options.multiplier,
                ),
            ),
            loss,
            # The sum over the one-versus-rest classifiers, of which Keras takes the mean.
            loss_weights={
                name: self.options.loss_weights.get(name, 1) * terms
                for name in self.domains
            },
        )
        model.optimizer.build(model.trainable_variables)
        return model

    def train(self, method, parts, seed, learning_rate, strength):
        """Train one network.

        Args:
            method: str.
            parts: dict from domain to the indices of its training examples.
            seed: int, of the new layers and of the order of the examples.
            learning_rate: float, of the trunk.
            strength: float, of the prior.

        Returns:
            The model, which the next call with this method and strength trains anew.
        """
        o = self.options
        model = self._compiled(method, strength)
        keras.utils.set_random_seed(seed)
        model.set_weights(self.network(method, strength).get_weights())
        for variable in model.optimizer.variables:
            variable.assign(ops.zeros_like(variable))
        model.optimizer.learning_rate = learning_rate
        binary = METHODS[method].get("binary")
        data = {}
        for name, domain in self.domains.items():
            labels = domain.labels[parts[name]]
            if binary or o.missing_classes:
                labels = np.eye(self.classes, dtype="float32")[labels]
            if o.missing_classes and not binary:
                known = np.broadcast_to(labels.max(axis=0), labels.shape)
                labels = np.concatenate([labels, known], axis=1)
            data[name] = domain.x[parts[name]], labels
        stream = zip_tasks(data, o.batch_size, epoch=o.steps, seed=seed)
        model.fit(stream, shuffle=False, verbose=0, callbacks=ticking(self.tick, None))
        return model

    def correct(self, model, parts):
        """For each domain, which examples were classified right, as `hits` says."""
        inputs = {n: self.domains[n].x[i] for n, i in parts.items()}
        outputs = predict_by_task(model, inputs, PREDICT_BATCH)
        return {
            name: hits(output, self.domains[name].labels[parts[name]])
            for name, output in outputs.items()
        }

    def _tried(self, method, train, valid, seed, learning_rate, strength):
        """Which examples are right, as `correct`; all NaN where training diverges."""
        try:
            model = self.train(method, train, seed, learning_rate, strength)
        # Of TensorFlow's while it runs the step, a ValueError of the library otherwise.
        except (ValueError, tensorflow().errors.InvalidArgumentError) as error:
            if not _diverged(error):
                raise
            self.tick()
            return {name: np.full(len(part), np.nan) for name, part in valid.items()}
        return self.correct(model, valid)

    def cross_validate(self, method, parts, seed, grid):
        """The mean accuracy of each setting over the folds of the training part.

        Args:
            method: str.
            parts: dict from domain to the indices of its training examples.
            seed: int.
            grid: list of `(learning_rate, strength)`.

        Returns:
            A list of floats, one for each setting.
        """
        folds = self.options.folds
        rng = np.random.default_rng(seed)
        shuffled = {name: rng.permutation(part) for name, part in parts.items()}
        right = [{name: [] for name in parts} for _ in grid]
        for fold in range(folds):
            train, valid = {}, {}
            for number, (name, part) in enumerate(shuffled.items()):
                # Where the examples don't divide, the domains' larger folds differ.
                held_out = np.arange(len(part)) % folds == (fold + number) % folds
                train[name], valid[name] = part[~held_out], part[held_out]
            if any(not len(part) for part in train.values()):
                raise DataError(
                    f"{folds} folds leave no training example for a domain of "
                    f"{ {name: len(part) for name, part in parts.items()} }: expected 2 at "
                    "least. Give a larger --fractions."
                )
            for index, setting in enumerate(grid):
                found = self._tried(method, train, valid, seed + fold, *setting)
                for name, values in found.items():
                    right[index][name].extend(values)
        return [
            float(np.mean([np.mean(values) for values in own.values()])) for own in right
        ]


def _diverged(error):
    """Whether a training ended since the prior's kernel was no number any more."""
    return "values that are not finite" in str(error)


def known_crossentropy(y_true, y_pred):
    """The crossentropy among the classes that a domain has examples of.

    A class without examples is unknown there, not absent: nothing is said about it, so
    that what it is comes from the prior, if from anywhere.

    Args:
        y_true: tensor `(n, 2 classes)`, one-hot labels, and ones for the known classes.
        y_pred: tensor `(n, classes)`, probabilities.
    """
    own, known = ops.split(ops.cast(y_true, y_pred.dtype), 2, axis=-1)
    share = ops.sum(own * y_pred, axis=-1) / ops.sum(known * y_pred, axis=-1)
    return -ops.log(ops.clip(share, 1e-7, 1.0))


def _has_layer(model, name):
    return any(layer.name == name for layer in model.layers)


def embeddings(model, inputs):
    """What the classifier sees, by task: the features of the bottleneck.

    Args:
        model: a network of `Trainer`.
        inputs: dict from task to array.

    Returns:
        A dict from task to array `(n, units)`.
    """
    tensor = model.get_layer("classifier").input
    part = keras.Model(model.input, tensor)
    tasks = list(inputs)
    found = {}
    for number, task in enumerate(tasks):
        pieces = []
        for start in range(0, len(inputs[task]), PREDICT_BATCH):
            x = inputs[task][start : start + PREDICT_BATCH]
            values = ops.convert_to_numpy(part(dict.fromkeys(tasks, x)))
            # All tasks' examples are one batch where the bottleneck is shared.
            batched = len(values) == len(tasks) * len(x)
            pieces.append(np.split(values, len(tasks), axis=0 if batched else -1)[number])
        found[task] = np.concatenate(pieces)
    return found


def train_and_test(trainer, options, method, parts, seed):
    """Choose the settings of one method, train and test it; results for JSON.

    Returns:
        `(results, model)`.
    """
    train = {name: part[0] for name, part in parts.items()}
    test = {name: part[1] for name, part in parts.items()}
    grid = settings_grid(options, method)
    results, best = {}, grid[0]
    with timed() as took:
        if len(grid) > 1:
            accuracies = trainer.cross_validate(method, train, seed, grid)
            # A setting with which training diverges has none.
            best = grid[int(np.argmax(np.nan_to_num(accuracies, nan=-1)))]
            results["cross_validation"] = [
                {"learning_rate": rate, "strength": strength, "accuracy": accuracy}
                for (rate, strength), accuracy in zip(grid, accuracies)
            ]
        model = trainer.train(method, train, seed, *best)
    results["seconds"] = took.seconds
    right = trainer.correct(model, test)
    results["accuracy"] = {name: float(np.mean(values)) for name, values in right.items()}
    results["learning_rate"], results["strength"] = best
    results["parameters"] = trainable_parameters(model)
    if METHODS[method]["prior"] is not None:
        results["task_correlation"] = {
            # One for each class with one-versus-rest classifiers; their mean.
            layer: np.mean(np.reshape(matrix, (-1, *matrix.shape[-2:])), axis=0).tolist()
            for layer, matrix in task_correlation(model).items()
        }
    if METHODS[method]["prior"] == "mrn":
        results["class_correlation"] = {
            layer: matrix.tolist()
            for layer, matrix in mode_correlation(model, "class").items()
            if layer == "classifier"
        }
        results["feature_eigenvalues"] = {
            layer: np.sort(np.linalg.eigvalsh(matrix))[::-1].tolist()
            for layer, matrix in mode_covariance(model, "feature").items()
        }
    return results, model


def settings_grid(options, method):
    """The settings to choose from: learning rates, and strengths if there is a prior."""
    prior = METHODS[method]["prior"]
    strengths = options.strengths if prior is not None else options.strengths[:1]
    return list(itertools.product(options.learning_rates, strengths))


def summarize(runs, domains):
    """The table of the finished runs, as the paper's Table 1.

    Args:
        runs: data frame with a row for each run.
        domains: list of names.

    Returns:
        A data frame of strings: accuracy in per cent of each domain and of their mean, as
        mean ± sample standard deviation over the draws; seconds with the
        cross-validation.
    """
    rows = []
    for fraction, method in itertools.product(sorted(runs["fraction"].unique()), METHODS):
        group = runs[(runs.fraction == fraction) & (runs.method == method)]
        if group.empty:
            continue
        accuracy = pd.DataFrame(list(group.accuracy))[domains] * 100
        row = {"Training": f"{fraction:.0%}", "Method": TITLES[method]}
        row |= {name: mean_and_spread(accuracy[name], digits=1) for name in domains}
        row["Average"] = mean_and_spread(accuracy.mean(axis=1), digits=1)
        row["Draws"] = len(group)
        row["Seconds"] = mean_and_spread(group.seconds, digits=0)
        rows.append(row)
    return pd.DataFrame(rows)


def relations_table(runs, domains):
    """What the priors learned: the correlation of each pair of domains.

    Args:
        runs: data frame with a row for each run.
        domains: list of names.

    Returns:
        A data frame of strings, mean ± sample standard deviation over the draws; without
        rows if no method has a prior.
    """
    pairs = list(itertools.combinations(range(len(domains)), 2))
    rows = []
    for fraction, method in itertools.product(sorted(runs["fraction"].unique()), METHODS):
        group = runs[(runs.fraction == fraction) & (runs.method == method)]
        if group.empty or METHODS[method]["prior"] is None:
            continue
        for layer in group.task_correlation.iloc[0]:
            every = np.array([found[layer] for found in group.task_correlation])
            row = {"Training": f"{fraction:.0%}", "Method": TITLES[method], "Layer": layer}
            for a, b in pairs:
                name = f"{domains[a]}, {domains[b]}"
                row[name] = mean_and_spread(every[:, a, b], digits=2)
            rows.append(row)
    return pd.DataFrame(rows)


def plot_relations(runs, domains, path):
    """Hinton diagrams of the mean learned task correlations at the smallest fraction."""
    smallest = runs[runs.fraction == runs.fraction.min()]
    matrices = {}
    for method, group in smallest.groupby("method", sort=False):
        if METHODS[method]["prior"] is not None:
            for layer in group.task_correlation.iloc[0]:
                every = [correlation[layer] for correlation in group.task_correlation]
                matrices[f"{TITLES[method]}, {layer}"] = np.mean(every, axis=0)
    if matrices:
        plot_hinton(matrices, domains, path)


def plot_classes(runs, classes, path):
    """What MRN learned of classes: mean correlations, and their leading eigenvectors."""
    smallest = runs[runs.fraction == runs.fraction.min()]
    matrices = {}
    for method, group in smallest.groupby("method", sort=False):
        if METHODS[method]["prior"] == "mrn":
            # Results of earlier versions have none.
            known = group.class_correlation.dropna() if "class_correlation" in group else []
            every = [found["classifier"] for found in known]
            if not every:
                continue
            matrices[f"{TITLES[method]}, classes"] = np.mean(every, axis=0)
    if matrices:
        plot_heat_map(matrices, classes, path)
        vectors = path.with_stem(f"{path.stem}_vectors")
        plot_eigenvectors(matrices, classes, vectors, min(3, len(classes)))


def plot_embeddings(folder, domains, classes, path):
    """t-SNE of bottleneck features, coloured by class and by task, as Figure 2."""
    from sklearn.manifold import TSNE

    files = [f for method in METHODS for f in folder.glob(f"embeddings_{method}.npz")]
    if not files:
        return
    rng = np.random.default_rng(0)
    figure, panels = figure_of(len(files), 2, size=(5, 4.5))
    for column, file in enumerate(files):
        found = read_arrays(file)
        with reading(file):
            x, kinds, tasks = found["x"], found["labels"], found["tasks"]
        # A thousand points are enough to see, and quick.
        some = rng.permutation(len(x))[:1000]
        x, kinds, tasks = x[some], kinds[some], tasks[some]
        perplexity = min(30, (len(x) - 1) / 3)
        tsne = TSNE(random_state=0, init="pca", perplexity=perplexity)
        flat = tsne.fit_transform(x)
        for axes, colours, names in (
            (panels[0, column], kinds, classes),
            (panels[1, column], tasks, domains),
        ):
            for index, name in enumerate(names):
                axes.scatter(*flat[colours == index].T, s=4, label=name)
            axes.set(xticks=[], yticks=[])
            if column == len(files) - 1:
                axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3)
        panels[0, column].set_title(TITLES[file.stem.removeprefix("embeddings_")])
    figure.savefig(path)


def load_domains(options, console):
    """The domains as features, their classes, and a function that makes the trunk.

    Returns:
        `(domains, classes, new_backbone, source)`, where `source` names the data.
    """
    if options.features is not None:
        domains, classes = load_features(options.features, options.domains)
        shape = next(iter(domains.values())).x.shape[1:]
        source = {"data": options.features.name, "domains": list(domains)}
        return domains, classes, lambda: shape, source
    weights = None if options.weights == "none" else options.weights
    with reading(f"--trunk {options.trunk}"):
        trunk = Trunk(
            options.trunk,
            options.image_size,
            options.feature_layer,
            options.tune_from,
            options.scale,
            weights,
        )
    domains, classes = load_images(options.data, options.image_size, options.domains)
    source = {
        "data": options.data.name,
        "domains": list(domains),
        "trunk": pathlib.Path(options.trunk).name,
        "image_size": options.image_size,
        "feature_layer": options.feature_layer,
        "tune_from": options.tune_from,
        "scale": options.scale,
        "weights": options.weights,
    }
    images = [domain.x for domain in domains.values()]
    name = digest_of([repr(source).encode(), *images])[:12]

    def run_lower():
        console.print(f"Features of {trunk.lower.name} for all images ...")
        return {n: trunk.run_lower(domain.x) for n, domain in domains.items()}

    features = cached_arrays(options.output / f"features_{name}.npz", run_lower)
    domains = {n: domain._replace(x=features[n]) for n, domain in domains.items()}
    shape = next(iter(domains.values())).x.shape[1:]
    new_backbone = (lambda: shape) if trunk.upper is None else trunk.new_upper
    return domains, classes, new_backbone, source


def _save_embeddings(model, domains, parts, method, folder):
    test = {name: part[1] for name, part in parts.items()}
    found = embeddings(model, {name: domains[name].x[i] for name, i in test.items()})
    np.savez(
        folder / f"embeddings_{method}.npz",
        x=np.concatenate(list(found.values())),
        labels=np.concatenate([domains[name].labels[i] for name, i in test.items()]),
        tasks=np.repeat(range(len(test)), [len(i) for i in test.values()]),
    )


class OfficeCaltech(Experiment):
    """Domains as tasks."""

    name = "office_caltech"
    page_block = "office"
    description = "Domains as tasks: STL, MTCNN, DRN and MRN."
    methods = TITLES
    default_methods = [name for name in TITLES if name not in ON_TRUNKS]
    defaults = {"batch_size": 16, "optimizer": "sgd"}
    helps = {"batch_size": "examples of each task in a step"}
    settings = ("seed", "steps", "batch_size", "bottleneck", "dropout", "multiplier")
    settings += ("learning_rates", "optimizer", "loss_weights", "folds", "stratified")
    families = {"independent": "stl", "hard": "shared"}
    budget = "steps"
    early_stopping = False
    repeats = "draws"
    draw_step = 1000

    def add_arguments(self, p):
        source = p.add_mutually_exclusive_group(required=True)
        source.add_argument(
            "--data", type=pathlib.Path, help="folder/domain/class/image.jpg"
        )
        source.add_argument(
            "--features",
            type=pathlib.Path,
            help="folder with one .npz file for each domain",
        )
        p.add_argument("--domains", nargs="+", help="those to use; all by default")
        p.add_argument(
            "--outlier", metavar="DOMAIN", help="shift the labels of this domain"
        )
        p.add_argument(
            "--shift", type=whole(1), default=3, help="by so many classes, modulo all"
        )
        p.add_argument(
            "--missing-classes",
            type=whole(0),
            default=0,
            help="so many, other ones in each domain, have no example for training",
        )
        p.add_argument(
            "--trunk",
            default="ResNet50",
            help="for images: a class of keras.applications, or a .keras file",
        )
        p.add_argument("--feature-layer", help="the trunk's layer with the features")
        p.add_argument(
            "--tune-from",
            help="fine-tune the trunk after this layer, and freeze it up to here; by "
            "default all of it is frozen",
        )
        p.add_argument(
            "--scale",
            nargs=2,
            type=real(),
            metavar=("OFFSET", "DIVISOR"),
            help="images as (pixel - OFFSET) / DIVISOR; by default as keras.applications "
            "wants them",
        )
        p.add_argument(
            "--weights", default="imagenet", help="of keras.applications, or 'none'"
        )
        p.add_argument("--image-size", type=whole(1), default=224)
        p.add_argument(
            "--fractions",
            nargs="+",
            type=real(above=0, below=1),
            default=[0.05, 0.1, 0.2],
            help="of each domain, for training",
        )
        p.add_argument(
            "--stratified",
            action="store_true",
            help="the fraction of each class; the paper takes it of the domain as a "
            "whole, so that a small domain may lack classes",
        )
        p.add_argument("--draws", type=REPEATS, default=5)
        p.add_argument("--steps", type=whole(1), default=100)
        p.add_argument(
            "--learning-rates",
            nargs="+",
            type=real(above=0),
            default=[1e-3],
            help="of the trunk; several are chosen from by cross-validation",
        )
        p.add_argument(
            "--multiplier",
            type=real(above=0),
            default=10.0,
            help="bottleneck and classifier learn so many times faster than the trunk",
        )
        p.add_argument(
            "--strengths",
            nargs="+",
            type=real(above=0),
            default=[1e-2, 1e-1, 3e-1, 1.0],
            help="of the priors; several are chosen from by cross-validation",
        )
        p.add_argument("--folds", type=whole(2), default=5)
        p.add_argument(
            "--epsilon",
            type=real(above=0),
            default=1e-2,
            help="ridge of the task covariances, relative to their mean variance",
        )
        p.add_argument(
            "--absolute",
            action="store_true",
            help="the ridge is absolute, as Eq. 13 is printed",
        )
        p.add_argument(
            "--mean",
            choices=MEANS,
            default="start",
            help="of the priors: what the covariances are deviations from",
        )
        p.add_argument(
            "--initializer",
            choices=("zeros", "glorot_uniform"),
            help="of the classifiers with a prior; zeros by default",
        )
        p.add_argument("--update-every", type=whole(1), default=10)
        p.add_argument("--bottleneck", type=whole(0), default=256, help="units; 0: none")
        p.add_argument("--dropout", type=real(least=0, below=1), default=0.0)
        p.add_argument(
            "--own-draws",
            action="store_true",
            help="the tasks' own layers start from different draws (classifiers start at "
            "zero, unless --initializer says otherwise)",
        )
        # As --page-block was called at first.
        p.add_argument(
            "--readme-block",
            dest="page_block",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )

    def check(self, p, options):
        if options.scale is not None and not options.scale[1]:
            p.error("--scale: expected a divisor that is not 0")
        on_trunks = [name for name in options.methods if name in ON_TRUNKS]
        if on_trunks and options.tune_from is None:
            p.error(f"--methods: {', '.join(on_trunks)}: for a trunk, by --tune-from")
        if options.missing_classes and "drn-bi" in options.methods:
            if options.methods != self.default_methods:
                p.error("--missing-classes: drn-bi would take what is missing for absent")
            options.methods.remove("drn-bi")

    def load(self, options, console):
        """As `load_domains`."""
        domains, classes, new_backbone, source = load_domains(options, console)
        if options.outlier is not None:
            domains = with_shifted_labels(
                domains, options.outlier, options.shift, len(classes)
            )
            source |= {"outlier": options.outlier, "shift": options.shift}
        # Before the first hour of training, not after it.
        if options.missing_classes:
            source |= {"missing_classes": options.missing_classes}
        for fraction in options.fractions:
            self._parts(options, domains, options.seed, fraction)
        return domains, classes, new_backbone, source

    def plan(self, options, data):
        """Method by method, since a network that is traced serves all its runs."""
        domains, classes, new_backbone, source = data
        trainer = Trainer(options, domains, len(classes), new_backbone)
        draws = [(f, *each) for f in options.fractions for each in self.by_seed(options)]
        for method, (fraction, number, seed) in itertools.product(options.methods, draws):
            own = source | {"fraction": fraction, "draw": number}
            if METHODS[method]["prior"] is not None:
                names = ("strengths", "epsilon", "absolute", "update_every", "mean")
                names += ("initializer", "own_draws")
                own |= {name: getattr(options, name) for name in names}
            if METHODS[method]["prior"] == "mrn":
                own["ridges"] = PRIORS["mrn"]
            run = self.planned(
                f"{fraction:.0%}, draw {number + 1}",
                options,
                method,
                functools.partial(self.draw, options, data, seed, fraction),
                seed,
                own,
                trainer=trainer,
                keep=(fraction, number, seed) == draws[0],
            )
            size = len(settings_grid(options, method))
            yield run._replace(steps=1 + (options.folds * size if size > 1 else 0))

    def draw(self, options, data, seed, fraction=None):
        """`(data, parts)`, the latter as from `domains.draw`."""
        fraction = options.fractions[0] if fraction is None else fraction
        return data, self._parts(options, data[0], seed, fraction)

    def _parts(self, options, domains, seed, fraction):
        parts = draw(domains, fraction, seed, options.stratified)
        if options.missing_classes:
            parts = without_classes(parts, domains, options.missing_classes, seed)
        return parts

    def hold_out(self, part, options, share, seed):
        data, parts = part
        return data, held_out_by_task(parts, data[0], share, seed)

    def run(
        self, options, method, part, seed, tick, callbacks=None, trainer=None, keep=False
    ):
        """As for every experiment, perhaps with a trainer that has networks of it.

        `keep`: bool, whether what the classifiers see is saved, for the figure.
        """
        (domains, classes, new_backbone, _), parts = part
        if trainer is None:
            trainer = Trainer(options, domains, len(classes), new_backbone)
        trainer.tick = tick
        found, model = train_and_test(trainer, options, method, parts, seed)
        if keep:
            _save_embeddings(model, domains, parts, method, options.output)
        return found

    def describe(self, found):
        return f"{np.mean(list(found['accuracy'].values())):.1%}"

    def tasks(self, options, data=None):
        return None if data is None else list(data()[0])

    def rate(self, options):
        return _middle(options.learning_rates)

    def with_rate(self, rate):
        return {"learning_rates": [rate]}

    def ticks(self, options):
        return 1

    def space(self, method, options, space):
        strength = _middle(options.strengths)
        if METHODS[method]["prior"] is None:
            return {"strengths": [strength]}
        strength, epsilon = space.prior(strength, options.epsilon)
        return {"strengths": [strength], "epsilon": epsilon}

    def tables(self, options, data, runs):
        domains, _, _, source = data
        title = f"Accuracy in %, {source['data']}"
        if options.outlier is not None:
            title += f", labels of {options.outlier} shifted by {options.shift}"
        if options.missing_classes:
            title += f", {options.missing_classes} classes missing in each"
        frame = summarize(runs, list(domains))
        tables = [Table(title, frame, "table", keys=2)]
        learned = relations_table(runs, list(domains))
        if len(learned):
            note = "Learned task correlations, mean ± standard deviation over the draws:"
            tables.append(Table("Correlations", learned, "relations", keys=3, note=note))
        return {options.page_block: tables}

    def figures(self, options, data, runs):
        domains, classes, *_ = data
        names = ("relations", "classes", "classes_vectors", "tsne")
        paths = [options.output / f"{name}.png" for name in names]
        plot_relations(runs, list(domains), paths[0])
        plot_classes(runs, list(classes), paths[1])
        plot_embeddings(options.output, list(domains), classes, paths[-1])
        return [path for path in paths if path.exists()]


def _middle(values):
    return sorted(values)[len(values) // 2]


EXPERIMENT = OfficeCaltech()
parse, main = EXPERIMENT.parse, EXPERIMENT.main

if __name__ == "__main__":
    main()
