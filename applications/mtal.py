"""MTAL's experiments: tasks that are data sets of different images and labels.

Feng & Chen, "Learning Twofold Heterogeneous Multi-Task by Sharing Similar Convolution
Kernel Pairs" (2021), section 4: Tables 2-5 and Figure 8 (methods), Table 6 (shared
kernels), Figure 9 (threshold), Figures 10 and 11 (activation maps), Figure 12
(convergence).
"""

import functools
import pathlib
import typing

import keras
import numpy as np
import pandas as pd
from keras import layers
from sklearn.model_selection import train_test_split

from dmtrl_keras import (
    MultiTaskModel,
    kernel_sharing_ratio,
    multitask,
    task_layers,
    zip_tasks,
)
from dmtrl_keras.layers import NDDR, CrossStitch
from dmtrl_keras.mtal.similarity import cosine_similarity, kernel_rows
from dmtrl_keras.optimizers import LearningRateMultiplier
from dmtrl_keras.parameterizations import SimilarKernels

from .arguments import add_images, check_names, real, whole
from .experiment import (
    Experiment,
    Table,
    decaying,
    digest_of,
    figure_of,
    held_out_by_task,
    hits,
    predict_by_task,
    ticking,
    timed,
    trainable_parameters,
)
from .image_tasks import load_task
from .mtda import MultiTaskDiscriminantAnalysis
from .reading import DataError, reason
from .resnet import resnet18
from .results import mean_and_spread
from .vgg import BLOCKS, vgg

TITLES = {
    "single": "Single-task",
    "shared": "Multi-task (all shared)",
    "mtda": "MTDA",
    "stitch": "Cross-Stitch",
    "nddr": "NDDR",
    "mtal": "MTAL",
    "mtal_r": "MTAL_R",
    "mtal_forward": "MTAL, gradients to both",
    "mtal_common": "MTAL, common start",
    "mtal_filters": "MTAL of filters",
    "mtal_filters_common": "MTAL of filters, common start",
}
# What they have otherwise than `--kernels`, `--mode` and `--start` say.
VARIANTS: dict[str, dict[str, str]] = {
    "mtal": {},
    "mtal_r": {},
    "mtal_forward": {"mode": "forward"},
    "mtal_common": {"start": "common"},
    "mtal_filters": {"kernels": "filter", "mode": "forward"},
    "mtal_filters_common": {"kernels": "filter", "mode": "forward", "start": "common"},
}
SIMILAR = tuple(VARIANTS)
TOLD = ("mtal_r",)  # Which tasks are related.
SHRINKAGES = (0.01, 0.1, 0.5, 0.9)  # Of MTDA.


class Group(typing.NamedTuple):
    """Tasks that are trained together.

    Attributes:
        tasks: their sources, as for `image_tasks.load_task`, perhaps after `name=`.
        related: groups of those that are known to be related, for MTAL_R; or None.
        threshold: float, of MTAL.
    """

    tasks: tuple = ()
    related: tuple | None = None
    threshold: float = 0.4


# As in the paper: handwritten and printed characters (Tables 2, 3), and digits beside
# objects (Tables 4, 5).
GROUPS = {
    "related": Group(
        ("mnist", "usps", "typographic", "capitals"),
        (("mnist", "usps"), ("typographic", "capitals")),
    ),
    "unrelated": Group(("mnist", "coil20", "amazon"), (("coil20", "amazon"),), 0.55),
}


def make_network(options):
    """One task's network up to its features: VGG or ResNet-18."""
    inputs = keras.Input((options.size, options.size, 3), name="image")
    if options.network == "resnet18":
        x = resnet18(inputs, options.width, pool=options.size >= 64, name="resnet")
        x = layers.GlobalAveragePooling2D(name="mean")(x)
    else:
        x = vgg(
            inputs,
            options.width,
            BLOCKS[options.network],
            normalize=not options.no_normalization,
            weight_decay=options.weight_decay,
        )
    return keras.Model(inputs, x, name="network")


def prepared(x, task, size):
    """Images of one task as the network wants them: size, colours, values about 0."""
    shape = x.shape
    x = layers.Rescaling(1 / 127.5, -1, name=f"{task}_rescaling")(x)
    if shape[1:3] != (size, size):
        x = layers.Resizing(size, size, antialias=True, name=f"{task}_resizing")(x)
    if shape[-1] == 1:
        x = layers.Concatenate(name=f"{task}_colours")([x, x, x])
    return x


def make_model(options, method, tasks, threshold=None):
    """The network of all tasks by one method, not compiled.

    Args:
        options: parsed arguments.
        method: a key of `TITLES`.
        tasks: dict from name to `ImageTask`.
        threshold: of MTAL, one for all layers; None: those of the options.

    Returns:
        A `MultiTaskModel` that takes each task's original images, uint8.
    """
    names = list(tasks)
    arguments = {}
    if method == "shared":
        arguments["sharing"] = "hard"
    elif method in ("stitch", "nddr"):
        # As all batch normalization of the networks: there are few steps to average over.
        nddr = functools.partial(NDDR, momentum=0.9)
        layer = CrossStitch if method == "stitch" else nddr
        # After the pooling layers, or where ResNet's stages end.
        residual = options.network == "resnet18"
        arguments["between"] = {"*_block2_out": layer} if residual else layer
    elif method in SIMILAR:
        thresholds = options.threshold if threshold is None else [threshold]
        patterns = ["*"] if len(thresholds) == 1 else block_patterns(options.network)
        chosen = {n: getattr(options, n) for n in ("kernels", "mode", "start")}
        chosen |= VARIANTS[method]
        arguments["start"] = chosen.pop("start")
        arguments["sharing"] = {
            pattern: SimilarKernels(
                value,
                weights=options.weights,
                pairs=options.pairs,
                related=options.related if method == "mtal_r" else None,
                update_every=options.update_every,
                **chosen,
            )
            for pattern, value in zip(patterns, thresholds)
        }
    model = multitask(
        make_network(options),
        names,
        shared_input=False,
        heads={name: len(task.classes) for name, task in tasks.items()},
        **arguments,
    )
    inputs = {
        name: keras.Input(task.images.shape[1:], dtype="uint8", name=name)
        for name, task in tasks.items()
    }
    ready = {name: prepared(x, name, options.size) for name, x in inputs.items()}
    return MultiTaskModel(inputs, model(ready))


def block_patterns(network):
    """Patterns of the layers' names, one for each of the network's five blocks."""
    name = "resnet_conv" if network == "resnet18" else "block"
    return [f"{name}{number}_*" for number in range(1, 6)]


def split(tasks, options, seed):
    """For each task, `(train, test)`: indices, the same shares of every class.

    Args:
        tasks: dict from name to `ImageTask`.
        options: parsed arguments: `training_share`, and the most images of one class.
        seed: int.

    Raises:
        DataError: if a class has too few images.
    """
    parts = {}
    for number, (name, task) in enumerate(tasks.items()):
        own = np.random.RandomState([seed, number])
        try:
            train, test = train_test_split(
                np.arange(len(task.labels)),
                train_size=options.training_share,
                stratify=task.labels,
                random_state=own,
            )
        except ValueError as error:
            raise DataError(f"Task {name!r} can't be split: {reason(error)}") from error
        parts[name] = (
            _at_most(train, task.labels, options.training_images),
            _at_most(test, task.labels, options.test_images),
        )
    return parts


def _at_most(indices, labels, count):
    """The first `count` of each class; all if it is None."""
    if count is None:
        return indices
    own = pd.Series(labels[indices])
    return indices[(own.groupby(own).cumcount() < count).to_numpy()]


def train(options, method, tasks, parts, seed, tick, threshold=None, watch=None):
    """Train one network.

    Args:
        options: parsed arguments.
        method: a key of `TITLES`.
        tasks: dict from name to `ImageTask`.
        parts: as from `split`.
        seed: int, of the order of the examples.
        tick: function without arguments, called after each epoch.
        threshold: as for `make_model`.
        watch: None, or a list of Keras callbacks that see the loss on the other part as
            `val_loss`.

    Returns:
        `(model, history)`: the latter a dict from task to its training loss by epoch.
    """
    model = make_model(options, method, tasks, threshold)
    data = [
        {
            name: (task.images[parts[name][number]], task.labels[parts[name][number]])
            for name, task in tasks.items()
        }
        for number in range(2)
    ]
    stream = zip_tasks(data[0], options.batch_size, seed=seed)
    watched = None
    if watch is not None:
        watched = zip_tasks(data[1], options.batch_size, shuffle=False)
    optimizer = decaying(options, len(stream) * options.epochs)
    if method in ("stitch", "nddr"):
        factor = {"*_fusion": options.fusion_rate}
        optimizer = LearningRateMultiplier(optimizer, factor)
    model.compile(
        optimizer,
        "sparse_categorical_crossentropy",
        loss_weights=options.loss_weights or None,
    )
    history = model.fit(
        stream,
        validation_data=watched,
        epochs=options.epochs,
        shuffle=False,
        verbose=0,
        callbacks=ticking(tick, watch),
    )
    return model, {name: history.history[f"{name}_loss"] for name in tasks}


def train_and_test(
    options, method, tasks, parts, seed, tick, threshold=None, watch=None, figures=False
):
    """Train and test one method.

    Args:
        options: parsed arguments.
        method: a key of `TITLES`.
        tasks: dict from name to `ImageTask`.
        parts: as from `split`.
        seed: int.
        tick: function without arguments, called after each epoch.
        threshold: as for `make_model`.
        watch: as for `train`.
        figures: bool, whether to draw the activation maps of MTAL.

    Returns:
        A dict that JSON takes: accuracy by task, the loss by task and epoch, parameters,
        seconds of training, and the shared kernels of MTAL.
    """
    if method == "mtda":
        return discriminant_analysis(options, tasks, parts, seed, tick)
    with timed(seed) as took:
        model, losses = train(options, method, tasks, parts, seed, tick, threshold, watch)
    inputs = {name: task.images[parts[name][1]] for name, task in tasks.items()}
    outputs = predict_by_task(model, inputs, 100)
    accuracy = {}
    for name, task in tasks.items():
        values = hits(outputs[name], task.labels[parts[name][1]])
        accuracy[name] = float(np.mean(values))
    results = {
        "accuracy": accuracy,
        "losses": losses,
        "parameters": trainable_parameters(model),
        "seconds": took.seconds,
    }
    if method in SIMILAR:
        results["sharing"] = [
            {
                name: getattr(row, name)
                for name in ("layer", "pair_ratio", "chance", "ratio", "saved")
            }
            for row in kernel_sharing_ratio(model, verbose=False)
        ]
        if figures:
            for number, layer in enumerate(_convolutions(model)[:2], start=1):
                path = f"activations_{options.group}_{method}_{number}.png"
                plot_activations(model, layer, tasks, parts, options.output / path)
    return results


def discriminant_analysis(options, tasks, parts, seed, tick):
    """Train and test MTDA on pixels, its shrinkage chosen on a part of the training images.

    Args:
        options: parsed arguments: `size`.
        tasks: dict from name to `ImageTask`.
        parts: as from `split`.
        seed: int, of the part held out.
        tick: function without arguments, called at the end.

    Returns:
        A dict as from `train_and_test`, without losses.
    """
    pixels, labels = [], []
    for number in range(2):
        chosen = {name: parts[name][number] for name in tasks}
        pixels.append(
            {
                name: keras.ops.convert_to_numpy(
                    prepared(tasks[name].images[own], name, options.size)
                ).reshape(len(own), -1)
                for name, own in chosen.items()
            }
        )
        labels.append({name: tasks[name].labels[own] for name, own in chosen.items()})
    fitted, watched = held_out_by_task(parts, tasks, 0.25, seed), []
    with timed(seed) as took:
        sides = [
            {n: np.isin(parts[n][0], fitted[n][side]) for n in tasks} for side in range(2)
        ]
        for shrinkage in SHRINKAGES:
            (x, y), (x_out, y_out) = (
                [{n: own[n][side[n]] for n in tasks} for own in (pixels[0], labels[0])]
                for side in sides
            )
            found = MultiTaskDiscriminantAnalysis(shrinkage=shrinkage).fit(x, y)
            watched.append(np.mean(list(_shares_right(found, x_out, y_out).values())))
        best = SHRINKAGES[int(np.argmax(watched))]
        found = MultiTaskDiscriminantAnalysis(shrinkage=best).fit(pixels[0], labels[0])
    tick()
    return {
        "accuracy": _shares_right(found, pixels[1], labels[1]),
        "losses": {},
        "parameters": sum(p.size for p in found.projections_.values()),
        "seconds": took.seconds,
        "shrinkage": best,
    }


def _shares_right(model, x, y):
    predicted = model.predict(x)
    return {name: float(np.mean(predicted[name] == y[name])) for name in y}


def _convolutions(model):
    return [
        layer for layer in task_layers(model) if isinstance(layer.sharing, SimilarKernels)
    ]


def plot_activations(model, layer, tasks, parts, path, columns=8):
    """Maps of one layer that similar filters of two tasks make (Figures 10 and 11).

    Each column is a pair of filters of different tasks, the most similar first, below each
    other the maps of the two for a test image of their task; a red frame marks the pairs
    above the threshold.

    Args:
        model: the trained network, as from `make_model`.
        layer: one of its layers of similar kernels.
        tasks: dict from name to `ImageTask`.
        parts: as from `split`.
        path: where the PNG goes.
        columns: int, how many pairs.
    """
    names = list(tasks)
    pairs, cosines = _most_similar_pairs(layer, len(names), columns)
    maps = _maps(model, layer, {n: t.images[parts[n][1][:1]] for n, t in tasks.items()})
    threshold = float(layer.sharing.threshold_at(0))
    figure, axes = figure_of(len(pairs), 2, size=(1.3, 1.6))
    for column, pair, cosine in zip(axes.T, pairs, cosines):
        for axis, kernel_number in zip(column, pair):
            index, task = divmod(kernel_number, len(names))
            axis.imshow(maps[..., task * layer.filters + index], cmap="gray")
            axis.set(xticks=[], yticks=[], xlabel=f"{names[task]}, {index}")
            axis.xaxis.label.set_size(7)
            for spine in axis.spines.values():
                spine.set(color="red" if cosine >= threshold else "gray", linewidth=2)
        column[0].set_title(f"cosine {cosine:.2f}", fontsize=8)
    figure.suptitle(f"{layer.name}, threshold {threshold:g}", fontsize=9)
    figure.savefig(path)


def _most_similar_pairs(layer, tasks, most):
    """Pairs of kernels of different tasks, and their cosines, the most similar first.

    Returns:
        `(pairs, cosines)`, of which no kernel is in two: lists of pairs of numbers of rows
        as in `kernel_rows`, and of floats.
    """
    kernel = keras.ops.convert_to_tensor(layer.factors["kernel"])
    rows = kernel_rows(kernel)
    cosines = keras.ops.convert_to_numpy(cosine_similarity(rows[None]))[0]
    task = np.arange(len(cosines)) % tasks
    cosines[task[:, None] >= task] = -np.inf
    pairs, found, used = [], [], set()
    for flat in np.argsort(-cosines, axis=None):
        pair = tuple(map(int, np.unravel_index(flat, cosines.shape)))
        if len(pairs) == most or not np.isfinite(cosines[pair]):
            break
        if not used.intersection(pair):
            pairs.append(pair)
            found.append(cosines[pair])
            used.update(pair)
    return pairs, found


def _maps(model, layer, images):
    """What a layer of the inner network makes of one image of each task."""
    inner = next(part for part in model.layers if isinstance(part, keras.Model))
    ready = keras.Model(
        model.input,
        {n: prepared(x, n, inner.input[n].shape[1]) for n, x in model.input.items()},
    )
    maps = keras.Model(inner.input, layer.output)(ready(images))
    return keras.ops.convert_to_numpy(maps)[0]


def plot_curves(runs, path):
    """Loss of each task by epoch, MTAL's and single-task's (Figure 12).

    Args:
        runs: data frame of runs.
        path: where the PNG goes.
    """
    runs = runs[runs.method != "mtda"]  # It has no steps.
    present = list(dict.fromkeys(runs.method))
    shown = [m for m in ("single", "mtal", "mtal_r") if m in present] or present[:3]
    figure, (axes,) = figure_of(max(len(shown), 1), sharey=True)
    for axis, method in zip(axes, shown):
        losses = [pd.DataFrame(losses) for losses in runs[runs.method == method].losses]
        for name in losses[0]:
            curves = np.stack([loss[name] for loss in losses])
            line, *_ = axis.plot(1 + np.arange(curves.shape[1]), curves.mean(0), label=name)
            spread = curves.min(0), curves.max(0)
            axis.fill_between(line.get_xdata(), *spread, color=line.get_color(), alpha=0.2)
        axis.set(title=TITLES[method], xlabel="epoch", yscale="log")
    axes[0].set_ylabel("training loss")
    if shown:
        axes[0].legend()
    figure.savefig(path)


def plot_sweep(runs, path):
    """Accuracy of each task by threshold (Figure 9).

    Args:
        runs: data frame of runs, with a column `swept`, the threshold.
        path: where the PNG goes.
    """
    figure, ((axis,),) = figure_of(1, size=(5, 3.5))
    accuracy = pd.DataFrame(list(runs.accuracy)).assign(threshold=list(runs.swept))
    by_threshold = accuracy.groupby("threshold")
    mean, spread = by_threshold.mean(), by_threshold.std().fillna(0)
    for name in mean:
        axis.errorbar(mean.index, mean[name], spread[name], label=name, capsize=2)
    axis.plot(mean.index, mean.mean(axis=1), "k--", label="mean")
    axis.set(xlabel="threshold", ylabel="accuracy")
    axis.legend(fontsize=8)
    figure.savefig(path)


def error_table(runs):
    """Mean accuracy and mean square error of each method (Figure 8).

    The paper does not say of what the mean square error is. Read here as that of the
    accuracies from 100%: with `a_t` the accuracy of task t in percent,

    `MSE = mean over t of (100 - a_t)^2`,

    so that a method which is bad at one task is behind one that is a little worse at all.
    The figure can also be read as the `±` of Tables 2 to 5; that is the spread here. The
    paper has two panels, of all methods on tasks grouped by their relations and of all
    without; here MTAL_R alone is told of relations, and is marked.

    Args:
        runs: data frame of runs, with columns `method` and `accuracy`.

    Returns:
        A data frame by method, in the order of the runs: `title`; `told`, whether it is
        told which tasks are related; `accuracy` in percent, the mean over tasks and draws,
        and `error`, that of the squares; `accuracy_spread` and `error_spread`, standard
        deviations over draws, NaN of one draw.

    Example:

    >>> one = {"method": "single", "accuracy": {"a": 1.0, "b": 0.8}}
    >>> two = {"method": "shared", "accuracy": {"a": 0.9, "b": 0.9}}
    >>> found = error_table(pd.DataFrame([one, two]))
    >>> found.accuracy.round(1).to_dict(), found.error.round(1).to_dict()
    ({'single': 90.0, 'shared': 90.0}, {'single': 200.0, 'shared': 100.0})
    """
    accuracy = 100 * pd.DataFrame(list(runs.accuracy))
    by_run = pd.DataFrame(
        {
            "method": list(runs.method),
            "accuracy": accuracy.mean(axis=1),
            "error": (100 - accuracy).pow(2).mean(axis=1),
        }
    )
    by_method = by_run.groupby("method", sort=False)
    found = by_method.mean().join(by_method.std().add_suffix("_spread"))
    methods = found.index
    return found.assign(title=methods.map(TITLES), told=methods.isin(TOLD))


def draw_errors(table, axes):
    """Figure 8 of one group: a point for each method, its spread a line.

    Args:
        table: data frame, as from `error_table`.
        axes: two axes of Matplotlib, of the accuracy and of the mean square error.
    """
    labels = {"accuracy": "mean accuracy, %", "error": "mean square error, %²"}
    places = np.arange(len(table))[::-1]  # The first on top.
    kinds = (("not told of relations", "tab:blue"), ("told of relations", "tab:orange"))
    for axis, (name, label) in zip(axes, labels.items()):
        for told, (kind, colour) in enumerate(kinds):
            own = (table.told == told).to_numpy()
            values, spreads = table[name][own], table[f"{name}_spread"][own].fillna(0)
            style = {"fmt": "o", "capsize": 2, "color": colour, "markersize": 4}
            axis.errorbar(values, places[own], xerr=spreads, label=kind, **style)
        axis.set_yticks(places, table.title)
        axis.set_xlabel(label)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)


def plot_errors(runs, path):
    """Mean accuracy and mean square error of each method (Figure 8).

    Args:
        runs: data frame of runs.
        path: where the PNG goes.
    """
    figure, (axes,) = figure_of(2, size=(4.5, 3.5), sharey=True)
    draw_errors(error_table(runs), axes)
    axes[0].legend(fontsize=8)
    figure.savefig(path)


def _accuracies(own, names):
    """Accuracy in percent by task and on average, the cells of some runs."""
    accuracy = 100 * pd.DataFrame(list(own.accuracy))[list(names)]
    cells = {name: mean_and_spread(accuracy[name], 1) for name in names}
    return cells | {"mean": mean_and_spread(accuracy.mean(axis=1), 1)}


def table_of_methods(runs, names):
    """Tables 2-5: accuracy of each method, in percent, by task and on average."""
    return pd.DataFrame(
        {
            "Method": TITLES[method],
            **_accuracies(own, names),
            "Parameters": f"{own.parameters.iloc[0]:,}",
            "Seconds": f"{own.seconds.mean():.0f}",
        }
        for method, own in runs.groupby("method", sort=False)
    )


def table_of_sweep(runs, names):
    """Figure 9 as a table."""
    rows = []
    for threshold, own in runs.groupby("swept"):
        total = pd.DataFrame(found[-1] for found in own.sharing)
        row = {"Threshold": f"{threshold:g}", **_accuracies(own, names)}
        row["Pairs shared (%)"] = mean_and_spread(100 * total.pair_ratio, 1)
        rows.append(row | {"Chance (%)": mean_and_spread(100 * total.chance, 1)})
    return pd.DataFrame(rows)


def table_of_sharing(runs):
    """Table 6: pairs that are shared, in percent, by layer and method."""
    columns = {}
    for method, own in runs[runs.method.isin(SIMILAR)].groupby("method", sort=False):
        found = pd.concat(map(pd.DataFrame, own.sharing))
        by_layer = found.groupby("layer", sort=False)
        column = {
            layer: mean_and_spread(100 * rows.pair_ratio, 1) for layer, rows in by_layer
        }
        total = by_layer.get_group("total")
        column["chance, total"] = mean_and_spread(100 * total.chance, 1)
        column["kernels with a partner"] = mean_and_spread(100 * total.ratio, 1)
        column["weights saved"] = mean_and_spread(100 * total.saved, 1)
        columns[TITLES[method]] = column
    return pd.DataFrame(columns).rename_axis("Layer").reset_index()


def sources_of(tasks):
    """A dict from a task's name to its source, from `NAME=SOURCE` or `SOURCE`.

    Raises:
        ValueError: on tasks that have one name or are too few.

    Example:

    >>> sources_of(["usps", "own=folder:digits"])
    {'usps': 'usps', 'own': 'folder:digits'}
    """
    found = [task.partition("=") if "=" in task else (task, "", task) for task in tasks]
    names = [name.replace(":", "_").replace("/", "_") for name, _, _ in found]
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError(f"expected two or more of different names, got {names}")
    return dict(zip(names, (source for _, _, source in found)))


class Mtal(Experiment):
    """Tasks that are data sets of different images and labels."""

    name = "mtal"
    description = "Tasks of different images and labels: MTAL and its baselines."
    methods = TITLES
    defaults = {
        "epochs": 20,
        "batch_size": 32,
        "learning_rate": 0.02,
        "repeats": 3,
        "optimizer": "sgd",
    }
    helps = {"batch_size": "examples of each task in a step"}
    settings = ("network", "width", "no_normalization", "size", "training_share")
    settings += ("training_images", "test_images", "epochs", "batch_size")
    settings += ("learning_rate", "optimizer", "loss_weights", "fusion_rate")
    settings += ("weight_decay", "threshold", "weights", "pairs", "related", "update_every")
    settings += ("kernels", "mode", "start")
    families = {"independent": "single", "hard": "shared", "similar": "mtal"}
    data_argument = {"type": pathlib.Path, "help": "folder of the data sets with names"}

    def add_arguments(self, p):
        p.add_argument(
            "--group", default="related", help=f"{list(GROUPS)}, or a name of your own"
        )
        p.add_argument(
            "--tasks",
            nargs="+",
            metavar="[NAME=]SOURCE",
            help="mnist, usps, typographic, capitals, coil20, amazon, sample, folder:PATH, "
            "idx:PATH or tfds:NAME; by default those of the group",
        )
        p.add_argument(
            "--related",
            nargs="+",
            metavar="NAME,NAME",
            help="MTAL_R: the tasks that may share; by default those of the group",
        )
        p.add_argument("--network", choices=[*BLOCKS, "resnet18"], default="vgg16")
        add_images(p, 32, "block")
        p.add_argument("--no-normalization", action="store_true", help="VGG as published")
        p.add_argument("--training-share", type=real(above=0, below=1), default=0.7)
        for part in ("training", "test"):
            p.add_argument(
                f"--{part}-images",
                type=whole(1),
                help="of each class at most; else all",
            )
        p.add_argument(
            "--fusion-rate",
            type=real(above=0),
            default=1.0,
            help="learning rate of Cross-Stitch and NDDR layers, as a factor",
        )
        p.add_argument(
            "--weight-decay",
            type=real(least=0),
            default=1e-4,
            help="of a loss that is a mean; the paper's 0.1 is of a sum (Eq. 7), which is "
            "about 0.003 of a mean over 32",
        )
        p.add_argument(
            "--threshold",
            nargs="+",
            type=real(least=0, most=1),
            help="of MTAL, one, or five, for the network's blocks (ResNet: its stages); by "
            "default 0.55 for the group 'unrelated', else 0.4",
        )
        p.add_argument("--weights", choices=["0.5", "learned"], default="0.5", help="phi")
        p.add_argument(
            "--kernels",
            choices=["slice", "filter"],
            default="slice",
            help="what is compared: one input and one output channel, or one output one",
        )
        p.add_argument(
            "--pairs",
            choices=["all", "index"],
            help="by default index for slices, all for filters",
        )
        p.add_argument(
            "--mode",
            choices=["overwrite", "forward"],
            default="overwrite",
            help="the aggregates take the place of the weights (Algorithm 1), or are "
            "functions of them",
        )
        p.add_argument("--start", choices=["apart", "common"], default="apart")
        p.add_argument("--update-every", type=whole(1), default=1)
        p.add_argument(
            "--sweep",
            nargs="?",
            choices=SIMILAR,
            const="mtal",
            metavar="METHOD",
            help="Figure 9: accuracy by threshold, of mtal or a variant",
        )
        p.add_argument(
            "--thresholds",
            nargs="+",
            type=real(least=0, most=1),
            default=[round(0.1 * n, 1) for n in range(1, 10)],
        )

    def check(self, p, options):
        """Fill in the group's tasks, relations and threshold."""
        group = GROUPS.get(options.group, Group())
        if options.tasks is not None:
            group = group._replace(tasks=options.tasks, related=None)
        if options.related is not None:
            group = group._replace(related=[text.split(",") for text in options.related])
        if not group.tasks:
            p.error(f"--group: expected one of {list(GROUPS)}, or --tasks with it")
        try:
            options.sources = sources_of(group.tasks)
        except ValueError as error:
            p.error(f"--tasks: {error}")
        options.threshold = options.threshold or [group.threshold]
        if len(options.threshold) not in (1, 5):
            p.error(f"--threshold: expected one or five, got {len(options.threshold)}")
        options.related = None
        if group.related is None:
            options.methods = [name for name in options.methods if name != "mtal_r"]
        else:
            options.related = list(map(list, group.related))
            for related in options.related:
                check_names("--related", related, options.sources, p)
        options.weights = "learned" if options.weights == "learned" else 0.5
        overwritten = {*SIMILAR} & {*options.methods} - {"mtal_forward"}
        if options.weights == "learned" and options.mode == "overwrite" and overwritten:
            p.error("--weights learned: with --mode forward only")

    def mode(self, options):
        return Sweep() if options.sweep else self

    def load(self, options, console):
        """The tasks, a dict from name to `ImageTask`."""
        return {
            name: load_task(source, options.data, options.size)
            for name, source in options.sources.items()
        }

    def plan(self, options, tasks):
        """Seed by seed."""
        return self._planned(options, tasks, options.methods, [None])

    def _planned(self, options, tasks, methods, thresholds):
        digest = digest_of(
            piece
            for name, task in tasks.items()
            for piece in (name.encode(), task.images, task.labels)
        )
        for repeat, seed, method, threshold in self.by_seed(options, methods, thresholds):
            swept = threshold is not None
            yield self.planned(
                f"seed {seed}" + (f", threshold {threshold:g}" if swept else ""),
                options,
                method,
                functools.partial(self.draw, options, tasks, seed),
                seed,
                {"seed": seed, "data": digest, "swept": threshold},
                threshold=threshold,
                figures=repeat == 0 and not swept,
            )

    def draw(self, options, tasks, seed):
        return tasks, split(tasks, options, seed)

    def hold_out(self, part, options, share, seed):
        tasks, parts = part
        return tasks, held_out_by_task(parts, tasks, share, seed)

    def run(self, options, method, part, seed, tick, callbacks=None, **more):
        return train_and_test(options, method, *part, seed, tick, watch=callbacks, **more)

    def tasks(self, options, data=None):
        return list(options.sources)

    def space(self, method, options, space):
        if method in ("stitch", "nddr"):
            return {"fusion_rate": space.around("fusion_rate", options.fusion_rate, 100)}
        if method in SIMILAR:
            blocks = [f"block{number}" for number in range(1, 6)]
            return {"threshold": space.threshold(options.threshold[0], blocks)}
        return {}

    def blocks(self, options):
        kinds = ["mtal", "mtal-sharing"] if {*SIMILAR} & {*options.methods} else ["mtal"]
        return [f"{kind}-{options.group}" for kind in kinds]

    def tables(self, options, tasks, runs):
        frames = [table_of_methods(runs, tasks), table_of_sharing(runs)]
        names = self.blocks(options)
        return {name: Table(name, frame) for name, frame in zip(names, frames)}

    def figures(self, options, tasks, runs):
        drawn = []
        for name, plot in (("errors", plot_errors), ("losses", plot_curves)):
            drawn.append(options.output / f"{name}_{options.group}.png")
            plot(runs, drawn[-1])
        # The first runs of MTAL have drawn these.
        return [*drawn, *sorted(options.output.glob(f"activations_{options.group}_*.png"))]


class Sweep(Mtal):
    """Figure 9: one method with several thresholds."""

    def plan(self, options, tasks):
        return self._planned(options, tasks, [options.sweep], options.thresholds)

    def blocks(self, options):
        return [f"{options.sweep.replace('_', '-')}-sweep-{options.group}"]

    def tables(self, options, tasks, runs):
        (name,) = self.blocks(options)
        return {name: Table(name, table_of_sweep(runs, tasks))}

    def figures(self, options, tasks, runs):
        path = options.output / f"sweep_{options.sweep}_{options.group}.png"
        plot_sweep(runs, path)
        return [path]


EXPERIMENT = Mtal()
parse, main = EXPERIMENT.parse, EXPERIMENT.main

if __name__ == "__main__":
    main()
