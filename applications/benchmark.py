"""How fast the layers are, as ratios measured in one process, in turn.

Training steps of the paper's LeNet with T tasks:

- (a) T plain Keras networks in one model,
- (b) `keras.layers.Conv2D(groups=T)` (a few steps only: on a CPU it is slow),
- (c) this library, independent kernels,
- (d) this library, LAF, Tucker and TT at several ranks, with the kernel composed, with
  the activations contracted, and with the choice left to the library (`auto`),
- (e) the bare convolutions and matrix products of the same size, forward and backward.

    python -m applications.benchmark
    python -m applications.benchmark --readme README.md
"""

import argparse
import pathlib
import platform
import statistics
import time

import keras
import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

from dmtrl_keras import factorization_report, factorize
from dmtrl_keras.backend import tensorflow
from dmtrl_keras.layers import TaskDense, TaskFlatten
from dmtrl_keras.losses import TaskHinge

from .experiment import markdown_table, rich_table, write_block
from .mnist import FACTORIZATIONS, Trainer, draw, lenet
from .mnist import parser as mnist_parser

IMPLEMENTATIONS = ("compose", "contract", "auto")


def plain_networks(tasks, padding, fc):
    """(a): T ordinary LeNets with one input, their outputs side by side."""
    inputs = keras.Input((28, 28, 1))
    outputs = []
    for _ in range(tasks):
        x = inputs
        for filters, size in ((32, 5), (64, 4)):
            x = keras.layers.Conv2D(filters, size, padding=padding)(x)
            x = keras.layers.ReLU()(keras.layers.MaxPooling2D()(x))
        x = keras.layers.Flatten()(x)
        x = keras.layers.Dense(fc, "relu")(x)
        outputs.append(keras.layers.Dense(1)(x))
    return keras.Model(inputs, keras.layers.Concatenate()(outputs))


def grouped_network(tasks, padding, fc):
    """(b): Keras's grouped convolution, which runs compiled by itself on TensorFlow."""
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.Conv2D(32 * tasks, 5, padding=padding)(inputs)
    x = keras.layers.ReLU()(keras.layers.MaxPooling2D()(x))
    x = keras.layers.Conv2D(64 * tasks, 4, padding=padding, groups=tasks)(x)
    x = keras.layers.ReLU()(keras.layers.MaxPooling2D()(x))
    x = TaskDense(fc, tasks, "relu")(TaskFlatten(tasks)(x))
    return keras.Model(inputs, TaskDense(1, tasks)(x))


def bare_step(tasks, batch, padding, fc):
    """(e): a function that does the convolutions and products, forward and backward."""
    tf = tensorflow()
    rng = np.random.default_rng(0)

    def array(*shape):
        return tf.constant(rng.normal(size=shape).astype("float32"))

    mode = padding.upper()
    half = 14 if padding == "same" else 12
    quarter = 7 if padding == "same" else 4
    image, first = array(batch, 28, 28, 1), array(5, 5, 1, 32 * tasks)
    maps = [array(batch, half, half, 32) for _ in range(tasks)]
    second = [array(4, 4, 32, 64) for _ in range(tasks)]
    flat = [array(batch, quarter * quarter * 64) for _ in range(tasks)]
    third = [array(quarter * quarter * 64, fc) for _ in range(tasks)]

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            tape.watch([first, *maps, *second, *flat, *third])
            outputs = [tf.nn.conv2d(image, first, 1, mode)]
            outputs += [tf.nn.conv2d(x, k, 1, mode) for x, k in zip(maps, second)]
            outputs += [tf.matmul(x, k) for x, k in zip(flat, third)]
        # The gradient that arrives is as large as the output, and costs nothing.
        return tape.gradient(
            outputs,
            [first, *maps, *second, *flat, *third],
            [tf.ones_like(y) for y in outputs],
        )

    return step


def training_step(model, images, labels):
    """A function that makes one training step of a model with Adam."""
    model.compile("adam", TaskHinge())

    def step():
        model.train_on_batch(images, labels)

    return step


def in_turn(steps, repeats):
    """Median seconds of some functions, run in turn after two runs of warming up.

    Args:
        steps: dict of functions without arguments.
        repeats: int.

    Returns:
        A dict of floats.
    """
    for step in steps.values():
        step()
        step()
    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def trained_networks(options):
    """STL trained on real digits, whose kernels 10% error is measured on."""
    from .digits import load_digits

    arguments = ["--padding", options.padding, "--fc", str(options.fc)]
    arguments += ["--epochs", str(2 * options.stl_epochs)]
    digits = load_digits("sample")
    chosen = draw(digits, 0.01, 0)
    trainer = Trainer(
        mnist_parser().parse_args(arguments),
        digits.train_images[chosen],
        digits.train_labels[chosen],
        0,
    )
    return trainer.half_trained()[0]


def factorized_variants(source, method, rank, tolerance):
    """The same factors in the three implementations.

    Returns:
        `(models, weights)`: a dict of models by implementation, and the number of kernel
        weights relative to the independent kernels.
    """
    models = {}
    for implementation in IMPLEMENTATIONS:
        keras.utils.set_random_seed(0)
        model = factorize(
            source,
            method,
            rank=rank,
            tolerance=tolerance,
            implementation=implementation,
            verbose=False,
        )
        models[implementation] = model
    report = factorization_report(model)
    after = sum(entry.parameters_after for entry in report)
    return models, after / sum(entry.parameters_before for entry in report)


def parser():
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m applications.benchmark",
        description="Training steps of LeNet with T tasks, as ratios to T plain networks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--padding", choices=("same", "valid"), default="valid")
    p.add_argument("--fc", type=int, default=512)
    p.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    p.add_argument(
        "--ranks",
        nargs="+",
        type=float,
        default=[0.2, 0.5, 0.8],
        help="fractions of the largest ranks",
    )
    p.add_argument(
        "--stl-epochs", type=int, default=8, help="of STL before 10%% error is measured"
    )
    p.add_argument("--methods", nargs="+", choices=FACTORIZATIONS, default=FACTORIZATIONS)
    p.add_argument("--skip-grouped", action="store_true", help="leave out (b)")
    p.add_argument("--output", type=pathlib.Path, default="results/benchmark")
    p.add_argument(
        "--readme",
        type=pathlib.Path,
        help="also write the tables between this file's marks 'benchmark'",
    )
    return p


def main(arguments=None):
    """Run the benchmark; returns both tables as data frames."""
    options = parser().parse_args(arguments)
    console = Console()
    tasks, batch = 10, options.batch_size
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, size=(batch, 28, 28, 1)).astype("float32")
    labels = np.sign(rng.normal(size=(batch, tasks))).astype("float32")
    sizes = (options.padding, options.fc)

    console.print("Plain networks, and independent kernels ...")
    plain = training_step(plain_networks(tasks, *sizes), images, labels)
    times = in_turn(
        {
            "(a) T plain Keras networks": plain,
            "(c) ours, independent": training_step(lenet(0, *sizes), images, labels),
            "(e) bare products": bare_step(tasks, batch, *sizes),
        },
        options.repeats,
    )
    if not options.skip_grouped:
        grouped = training_step(grouped_network(tasks, *sizes), images, labels)
        slow = in_turn({"a": plain, "b": grouped}, 2)
        # In terms of (a) in the same turn, since the machine's speed drifts.
        times["(b) keras Conv2D(groups=T)"] = (
            slow["b"] / slow["a"] * times["(a) T plain Keras networks"]
        )
    base = times["(a) T plain Keras networks"]
    first = pd.DataFrame(
        {
            "Training step": name,
            "ms": f"{seconds * 1e3:.0f}",
            "Ratio to (a)": f"{seconds / base:.2f}",
        }
        for name, seconds in sorted(times.items())
    )
    console.print(rich_table(first, f"LeNet, T = {tasks}, batch {batch}, {sizes}"))

    source = trained_networks(options)
    rows = []
    kinds = [(method, None) for method in options.methods]
    kinds += [(method, rank) for method in options.methods for rank in options.ranks]
    for method, rank in track(kinds, description="(d)", console=console):
        tolerance = 0.1 if rank is None else None
        models, size = factorized_variants(source, method, rank, tolerance)
        steps = {
            name: training_step(model, images, labels) for name, model in models.items()
        }
        found = in_turn({"a": plain, **steps}, options.repeats)
        best = min(found["compose"], found["contract"])
        rows.append(
            {
                "Method": method,
                "Rank": "10% error" if rank is None else f"{rank:g}",
                "Weights": f"{size:.2f}",
                **{name: f"{found[name] / found['a']:.2f}" for name in IMPLEMENTATIONS},
                "auto / better": f"{found['auto'] / best:.2f}",
            }
        )
    second = pd.DataFrame(rows)
    console.print(rich_table(second, "(d) ours, factorised: ratio to (a)"))
    device = f"{platform.machine()}, {keras.config.backend()} backend"
    text = (
        f"LeNet, T = {tasks}, batch {batch}, padding {sizes[0]}, FC {sizes[1]}, medians of "
        f"{options.repeats} steps with Adam, {device}.\n\n{markdown_table(first)}\n"
        f"{markdown_table(second)}"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    options.output.joinpath("tables.md").write_text(text)
    if options.readme is not None:
        write_block(options.readme, "benchmark", text)
    return first, second


if __name__ == "__main__":
    main()
