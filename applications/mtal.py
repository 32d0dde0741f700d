"""MTAL's experiments: tasks that are data sets of different images and labels.

Feng & Chen, "Learning Twofold Heterogeneous Multi-Task by Sharing Similar Convolution
Kernel Pairs" (2021), section 4: Tables 2-5 (methods), Table 6 (shared kernels), Figure 9
(threshold), Figures 10 and 11 (activation maps), Figure 12 (convergence).
"""

import argparse
import functools
import hashlib
import itertools
import pathlib
import time

import keras
import numpy as np
import pandas as pd
from keras import layers
from matplotlib.figure import Figure
from rich.console import Console
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
from dmtrl_keras.tasks.task_layer import draw_stacked_kernel

from .experiment import (
    OPTIMIZERS,
    Results,
    Run,
    add_training,
    check_names,
    in_range,
    markdown_table,
    mean_and_spread,
    parse_arguments,
    predict_by_task,
    rich_table,
    run_all,
    trainable_parameters,
    write_block,
)
from .image_tasks import load_task
from .resnet import resnet18
from .vgg import BLOCKS, vgg

TITLES = {
    "single": "Single-task",
    "shared": "Multi-task (all shared)",
    "stitch": "Cross-Stitch",
    "nddr": "NDDR",
    "mtal": "MTAL",
    "mtal_r": "MTAL_R",
    "mtal_apart": "MTAL, each task its own start",
}
SIMILAR = ("mtal", "mtal_r", "mtal_apart")
# Tasks, and those among them that are known to be related, as in the paper: handwritten
# and printed characters (Tables 2, 3), and digits beside objects (Tables 4, 5).
GROUPS = {
    "related": (
        ("mnist", "usps", "typographic", "capitals"),
        (("mnist", "usps"), ("typographic", "capitals")),
        "related",
    ),
    "unrelated": (("mnist", "coil20", "amazon"), (("coil20", "amazon"),), "unrelated"),
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
        arguments["sharing"] = {
            pattern: SimilarKernels(
                value,
                weights=options.weights,
                pairs=options.pairs,
                related=options.related if method == "mtal_r" else None,
                update_every=options.update_every,
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
    if method == "mtal_apart":
        start_apart(model)
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


def start_apart(model):
    """Draw the kernels of each task anew, where tasks start from equal ones."""
    for layer in task_layers(model):
        kernel = layer.factors["kernel"]
        kernel.assign(
            draw_stacked_kernel(
                layer.kernel_initializer, kernel.shape[:-1], layer.tasks, common=False
            )
        )
        if layer.selection is not None:
            layer.selection.refresh()


def split(tasks, options, seed):
    """For each task, `(train, test)`: indices, the same shares of every class.

    Args:
        tasks: dict from name to `ImageTask`.
        options: parsed arguments: `training_share`, and the most images of one class.
        seed: int.

    Raises:
        ValueError: if a class has too few images.
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
            raise ValueError(f"Task {name!r} can't be split: {error}") from error
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
        seed: int.
        tick: function without arguments, called after each epoch.
        threshold: as for `make_model`.
        watch: None, or a list of Keras callbacks that see the loss on the other part as
            `val_loss`.

    Returns:
        `(model, history)`: the latter a dict from task to its training loss by epoch.
    """
    keras.utils.set_random_seed(seed)
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
    rate = keras.optimizers.schedules.CosineDecay(
        options.learning_rate, len(stream) * options.epochs
    )
    optimizer = OPTIMIZERS[options.optimizer](rate)
    if method in ("stitch", "nddr"):
        factor = {"*_fusion": options.fusion_rate}
        optimizer = LearningRateMultiplier(optimizer, factor)
    model.compile(
        optimizer,
        "sparse_categorical_crossentropy",
        loss_weights=options.loss_weights or None,
    )
    each = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: tick())
    history = model.fit(
        stream,
        validation_data=watched,
        epochs=options.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[each, *(watch or ())],
    )
    return model, {name: history.history[f"{name}_loss"] for name in tasks}


def run(
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
    started = time.perf_counter()
    model, losses = train(options, method, tasks, parts, seed, tick, threshold, watch)
    seconds = time.perf_counter() - started
    inputs = {name: task.images[parts[name][1]] for name, task in tasks.items()}
    outputs = predict_by_task(model, inputs, 100)
    accuracy = {}
    for name, task in tasks.items():
        found = outputs[name].argmax(axis=-1)
        accuracy[name] = float(np.mean(found == task.labels[parts[name][1]]))
    results = {
        "accuracy": accuracy,
        "losses": losses,
        "parameters": trainable_parameters(model),
        "seconds": seconds,
    }
    if method in SIMILAR:
        results["sharing"] = [
            {"layer": row.layer, "ratio": row.ratio, "saved": row.saved}
            for row in kernel_sharing_ratio(model, verbose=False)
        ]
        if figures:
            for number, layer in enumerate(_convolutions(model)[:2], start=1):
                path = options.output / f"activations_{options.group}_{method}_{number}.png"
                plot_activations(model, layer, tasks, parts, path)
    return results


def _convolutions(model):
    return [layer for layer in task_layers(model) if layer.selection is not None]


def plot_activations(model, layer, tasks, parts, path, columns=8):
    """Maps of one layer that similar kernels of two tasks make (Figures 10 and 11).

    Each column is a pair of kernels of different tasks, the most similar first, below each
    other the maps of the two for a test image of their task; a red frame marks the pairs
    that are shared.

    Args:
        model: the trained network, as from `make_model`.
        layer: one of its layers of similar kernels.
        tasks: dict from name to `ImageTask`.
        parts: as from `split`.
        path: where the PNG goes.
        columns: int, how many pairs.
    """
    names = list(tasks)
    kernel = keras.ops.convert_to_tensor(layer.factors["kernel"])
    rows = kernel_rows(kernel)
    cosines = keras.ops.convert_to_numpy(cosine_similarity(rows[None]))[0]
    count = len(names)
    number = np.arange(len(cosines))
    cosines[number[:, None] % count >= number % count] = -np.inf
    order = np.argsort(-cosines, axis=None)
    # A kernel in no more than one column.
    pairs, used = [], set()
    for one, other in zip(*np.unravel_index(order, cosines.shape)):
        if len(pairs) == columns or not np.isfinite(cosines[one, other]):
            break
        if not {one, other} & used:
            pairs.append((int(one), int(other)))
            used |= {one, other}
    images = {name: task.images[parts[name][1][:1]] for name, task in tasks.items()}
    inner = next(part for part in model.layers if isinstance(part, keras.Model))
    ready = keras.Model(
        model.input,
        {n: prepared(x, n, inner.input[n].shape[1]) for n, x in model.input.items()},
    )
    maps = keras.Model(inner.input, layer.output)(ready(images))
    maps = keras.ops.convert_to_numpy(maps)[0]
    threshold = float(
        layer.sharing.threshold_at(int(keras.ops.convert_to_numpy(layer.selection.step)))
    )
    figure = Figure(figsize=(1.3 * len(pairs), 3.2), layout="constrained")
    axes = figure.subplots(2, len(pairs), squeeze=False)
    for column, pair in zip(axes.T, pairs):
        cosine = cosines[pair]
        for axis, kernel_number in zip(column, pair):
            task, index = kernel_number % count, kernel_number // count
            axis.imshow(maps[..., task * layer.filters + index], cmap="gray")
            axis.set(xticks=[], yticks=[], xlabel=f"{names[task]}, {index}")
            axis.xaxis.label.set_size(7)
            for spine in axis.spines.values():
                spine.set(color="red" if cosine >= threshold else "gray", linewidth=2)
        column[0].set_title(f"cosine {cosine:.2f}", fontsize=8)
    figure.suptitle(f"{layer.name}, threshold {threshold:g}", fontsize=9)
    figure.savefig(path)


def plot_curves(runs, path):
    """Loss of each task by epoch, MTAL's and single-task's (Figure 12).

    Args:
        runs: data frame of runs.
        path: where the PNG goes.
    """
    shown = [
        method for method in ("single", "mtal", "mtal_r") if method in set(runs.method)
    ]
    figure = Figure(figsize=(4 * len(shown), 3), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, method in zip(axes, shown):
        losses = [pd.DataFrame(losses) for losses in runs[runs.method == method].losses]
        for name in losses[0]:
            curves = np.stack([loss[name] for loss in losses])
            line, *_ = axis.plot(1 + np.arange(curves.shape[1]), curves.mean(0), label=name)
            spread = curves.min(0), curves.max(0)
            axis.fill_between(line.get_xdata(), *spread, color=line.get_color(), alpha=0.2)
        axis.set(title=TITLES[method], xlabel="epoch", yscale="log")
    axes[0].set_ylabel("training loss")
    axes[0].legend()
    figure.savefig(path)


def plot_sweep(runs, path):
    """Accuracy of each task by threshold (Figure 9).

    Args:
        runs: data frame of runs, with a column `swept`, the threshold.
        path: where the PNG goes.
    """
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    accuracy = pd.DataFrame(list(runs.accuracy)).assign(threshold=list(runs.swept))
    by_threshold = accuracy.groupby("threshold")
    mean, spread = by_threshold.mean(), by_threshold.std().fillna(0)
    for name in mean:
        axis.errorbar(mean.index, mean[name], spread[name], label=name, capsize=2)
    axis.plot(mean.index, mean.mean(axis=1), "k--", label="mean")
    axis.set(xlabel="threshold", ylabel="accuracy")
    axis.legend(fontsize=8)
    figure.savefig(path)


def table_of_methods(runs, names):
    """Tables 2-5: accuracy of each method, in percent, by task and on average."""
    rows = []
    for method, own in runs.groupby("method", sort=False):
        accuracy = 100 * pd.DataFrame(list(own.accuracy))[list(names)]
        row = {"Method": TITLES[method]}
        row |= {name: mean_and_spread(accuracy[name], 1) for name in names}
        row["mean"] = mean_and_spread(accuracy.mean(axis=1), 1)
        row["Parameters"] = f"{own.parameters.iloc[0]:,}"
        row["Seconds"] = f"{own.seconds.mean():.0f}"
        rows.append(row)
    return pd.DataFrame(rows)


def table_of_sweep(runs, names):
    """Figure 9 as a table."""
    rows = []
    for threshold, own in runs.groupby("swept"):
        accuracy = 100 * pd.DataFrame(list(own.accuracy))[list(names)]
        shared = [found[-1]["ratio"] for found in own.sharing]
        row = {"Threshold": f"{threshold:g}"}
        row |= {name: mean_and_spread(accuracy[name], 1) for name in names}
        row["mean"] = mean_and_spread(accuracy.mean(axis=1), 1)
        row["Kernels shared (%)"] = mean_and_spread(100 * np.array(shared), 1)
        rows.append(row)
    return pd.DataFrame(rows)


def table_of_sharing(runs):
    """Table 6: kernels that are shared, in percent, by layer and method."""
    columns = {}
    for method, own in runs[runs.method.isin(SIMILAR)].groupby("method", sort=False):
        ratios = [{row["layer"]: 100 * row["ratio"] for row in run} for run in own.sharing]
        saved = [100 * run[-1]["saved"] for run in own.sharing]
        ratios = pd.DataFrame(ratios)
        column = {layer: mean_and_spread(ratios[layer], 1) for layer in ratios}
        column["weights saved"] = mean_and_spread(saved, 1)
        columns[TITLES[method]] = column
    return pd.DataFrame(columns).rename_axis("Layer").reset_index()


def parser():
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m applications.mtal",
        description="Tasks of different images and labels: MTAL and its baselines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--data", type=pathlib.Path, help="folder of the data sets that have names"
    )
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
    p.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES))
    p.add_argument("--network", choices=[*BLOCKS, "resnet18"], default="vgg16")
    p.add_argument("--width", type=in_range(int, 0), default=64, help="of the first block")
    p.add_argument("--no-normalization", action="store_true", help="VGG as published")
    p.add_argument("--size", type=in_range(int, 7), default=32, help="side of the images")
    p.add_argument("--training-share", type=in_range(float, 0, 0.99), default=0.7)
    p.add_argument(
        "--training-images", type=in_range(int, 0), help="of each class at most; else all"
    )
    p.add_argument(
        "--test-images", type=in_range(int, 0), help="of each class at most; else all"
    )
    p.add_argument("--epochs", type=in_range(int, 0), default=20)
    p.add_argument("--batch-size", type=in_range(int, 0), default=32, help="of each task")
    p.add_argument("--learning-rate", type=in_range(float, 0), default=0.02)
    p.add_argument(
        "--fusion-rate",
        type=in_range(float, 0),
        default=1.0,
        help="learning rate of Cross-Stitch and NDDR layers, as a factor",
    )
    add_training(p, "sgd")
    p.add_argument("--weight-decay", type=in_range(float, -1e-9), default=1e-4)
    p.add_argument(
        "--threshold",
        nargs="+",
        type=in_range(float, -1e-9, 1),
        help="of MTAL, one, or five, for the network's blocks (ResNet: its stages); by "
        "default 0.55 for the group 'unrelated', else 0.4",
    )
    p.add_argument("--weights", choices=["0.5", "learned"], default="0.5", help="phi")
    p.add_argument("--pairs", choices=["all", "index"], default="all")
    p.add_argument("--update-every", type=in_range(int, 0), default=1)
    p.add_argument(
        "--sweep",
        nargs="?",
        choices=SIMILAR,
        const="mtal",
        metavar="METHOD",
        help="Figure 9: accuracy by threshold, of mtal, mtal_r or mtal_apart",
    )
    p.add_argument(
        "--thresholds",
        nargs="+",
        type=in_range(float, -1e-9, 1),
        default=[round(0.1 * n, 1) for n in range(1, 10)],
    )
    p.add_argument("--repeats", type=in_range(int, 0), default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=pathlib.Path, default="results/mtal")
    p.add_argument("--readme", type=pathlib.Path, help="write the tables into this file")
    return p


# What makes a run another one; the other arguments don't.
_SETTINGS = (
    "network",
    "width",
    "no_normalization",
    "size",
    "training_share",
    "training_images",
    "test_images",
    "epochs",
    "batch_size",
    "learning_rate",
    "optimizer",
    "loss_weights",
    "fusion_rate",
    "weight_decay",
    "threshold",
    "weights",
    "pairs",
    "related",
    "update_every",
)


def parse(arguments=None):
    """The arguments, with the group's tasks, relations and threshold filled in.

    Raises:
        SystemExit: on tasks that have one name or are too few, on unknown relations.
    """
    p = parser()
    options = parse_arguments(p, arguments)
    tasks, related, threshold = GROUPS.get(options.group, ((), None, "related"))
    if options.tasks is None and not tasks:
        p.error(f"--group: expected one of {list(GROUPS)}, or --tasks with it")
    if options.tasks is not None:
        tasks, related = options.tasks, None
    names = [task.partition("=")[0] if "=" in task else task for task in tasks]
    sources = [task.partition("=")[2] if "=" in task else task for task in tasks]
    names = [name.replace(":", "_").replace("/", "_") for name in names]
    if len(set(names)) < len(names) or len(names) < 2:
        p.error(f"--tasks: expected two or more of different names, got {names}")
    options.sources = dict(zip(names, sources))
    if options.related is not None:
        related = [group.split(",") for group in options.related]
    options.related = None if related is None else [list(group) for group in related]
    named = (name for group in options.related or () for name in group)
    check_names("--related", named, names, p)
    if options.related is None and "mtal_r" in options.methods:
        options.methods = [method for method in options.methods if method != "mtal_r"]
    if options.threshold is None:
        options.threshold = [{"related": 0.4, "unrelated": 0.55}[threshold]]
    if len(options.threshold) not in (1, 5):
        p.error(f"--threshold: expected one or five, got {len(options.threshold)}")
    check_names("--loss-weights", options.loss_weights, names, p)
    options.weights = options.weights if options.weights == "learned" else 0.5
    return options


def plan(options, tasks, digest):
    """The runs, seed by seed."""
    thresholds = options.thresholds if options.sweep else [None]
    methods = [options.sweep] if options.sweep else options.methods
    for repeat, method, threshold in itertools.product(
        range(options.repeats), methods, thresholds
    ):
        seed = options.seed + repeat
        settings = {key: getattr(options, key) for key in _SETTINGS}
        settings |= {"method": method, "seed": seed, "data": digest, "swept": threshold}
        title = f"{TITLES[method]}, seed {seed}"
        if threshold is not None:
            title += f", threshold {threshold:g}"
        yield Run(
            title,
            settings,
            options.epochs,
            lambda tick, method=method, seed=seed, threshold=threshold: run(
                options,
                method,
                tasks,
                split(tasks, options, seed),
                seed,
                tick,
                threshold,
                figures=seed == options.seed and threshold is None,
            ),
        )


def load(options):
    """The tasks, a dict from name to `ImageTask`."""
    return {
        name: load_task(source, options.data, options.size)
        for name, source in options.sources.items()
    }


def main(arguments=None):
    """Run the experiment; returns the table as a data frame."""
    options = parse(arguments)
    console = Console()
    tasks = load(options)
    digest = hashlib.sha256()
    for name, task in tasks.items():
        digest.update(name.encode() + task.images.tobytes() + task.labels.tobytes())
    options.output.mkdir(parents=True, exist_ok=True)
    runs = run_all(
        Results(options.output / "runs.jsonl"),
        list(plan(options, tasks, digest.hexdigest()[:16])),
        console,
        lambda found: f"accuracy {np.mean(list(found['accuracy'].values())):.1%}",
        options.strategy,
    )
    kind = f"mtal-{options.group}"
    tables = {}
    if options.sweep:
        kind = f"{options.sweep.replace('_', '-')}-sweep-{options.group}"
        tables[kind] = table_of_sweep(runs, tasks)
        path = options.output / f"sweep_{options.sweep}_{options.group}.png"
        plot_sweep(runs, path)
    else:
        tables[kind] = table_of_methods(runs, tasks)
        plot_curves(runs, options.output / f"losses_{options.group}.png")
        if runs.method.isin(SIMILAR).any():
            tables[f"mtal-sharing-{options.group}"] = table_of_sharing(runs)
    for name, table in tables.items():
        console.print(rich_table(table, name))
        (options.output / f"{name}.md").write_text(markdown_table(table))
        if options.readme is not None:
            write_block(options.readme, name, markdown_table(table))
    console.print(f"Runs, tables and figures are in {options.output}.")
    return tables[kind]


if __name__ == "__main__":
    main()
