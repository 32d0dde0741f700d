"""How fast the layers are, as ratios measured in one process, in turn.

On a machine that has other work, hold the command to one core (`taskset -c 0`): its seconds
are then those that the processor gave to it.

Training steps of the paper's LeNet with T tasks:

- (a) T plain Keras networks in one model,
- (b) `keras.layers.Conv2D(groups=T)` (a few steps only: on a CPU it is slow),
- (c) this library, independent kernels,
- (d) this library, LAF, Tucker and TT at several ranks, with the kernel composed, with
  the activations contracted, and with the choice left to the library (`auto`),
- (e) the bare convolutions and matrix products of the same size, forward and backward.

Those of a backbone of `keras.applications`, T copies of it in one model against
`multitask` of it, with the seconds that building takes.

What a tensor-normal prior, a Task Relation Layer, or the sharing of similar kernels adds to
a backbone's step.

Copies of layers of one input of each task, against T layers and against copies that run one
after another; what balancing adds to a step; and streams of a `keras.utils.PyDataset`,
against those of a plain Keras model.

    python -m applications.benchmark
    python -m applications.benchmark --parts prior --page docs/performance.md
"""

import argparse
import functools
import math
import os
import pathlib
import platform
import statistics
import time
import warnings

import keras
import numpy as np
import pandas as pd
from rich.progress import track

from dmtrl_keras import (
    MultiTaskModel,
    TensorNormalRegularizer,
    balancing,
    factorization_report,
    factorize,
    multitask,
    tensor_normal,
)
from dmtrl_keras.ground.backend import tensorflow
from dmtrl_keras.ground.tables import make_console
from dmtrl_keras.layers import TRL, FactorizedLayer, TaskCopies, TaskDense, TaskFlatten
from dmtrl_keras.losses import TaskHinge
from dmtrl_keras.parameterizations import SimilarKernels

from .arguments import add_page, check_page, parse_arguments, real, whole
from .experiment import Table, publish
from .files import working_in
from .mnist import FACTORIZATIONS, Trainer, draw_part, lenet
from .mnist import parse as parse_mnist
from .reading import one_line
from .resnet import resnet18

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


def backbone_of(name, size, copy=""):
    """A backbone of keras.applications with random weights, a vector its output."""
    return getattr(keras.applications, name)(
        weights=None,
        input_shape=(size, size, 3),
        include_top=False,
        pooling="avg",
        name=f"{name}{copy}",
    )


def plain_backbones(name, tasks, size, classes, shared_input):
    """T backbones in one model, each with its head, by task name."""
    names = [f"task_{t}" for t in range(tasks)]
    if shared_input:
        inputs = keras.Input((size, size, 3))
        own = dict.fromkeys(names, inputs)
    else:
        inputs = own = {task: keras.Input((size, size, 3), name=task) for task in names}
    outputs = {
        task: keras.layers.Dense(classes, "softmax")(
            backbone_of(name, size, f"_{task}")(own[task])
        )
        for task in names
    }
    return keras.Model(inputs, outputs)


def backbone_tables(options, console):
    """Building and training of T backbones: plain, and by `multitask`."""
    name, size, tasks = options.backbone, options.image_size, options.backbone_tasks
    rng = np.random.default_rng(0)
    shape = (options.backbone_batch, size, size, 3)
    images = rng.normal(size=shape).astype("float32")
    labels = {f"task_{t}": rng.integers(10, size=len(images)) for t in range(tasks)}
    rows = []
    for shared_input in (True, False):
        given = images if shared_input else dict.fromkeys(labels, images)
        variants = {
            f"{tasks} plain networks": lambda shared_input=shared_input: plain_backbones(
                name, tasks, size, 10, shared_input
            ),
            "multitask, independent": lambda shared_input=shared_input: multitask(
                backbone_of(name, size), tasks, heads=10, shared_input=shared_input
            ),
        }
        if shared_input:
            variants["multitask, Tucker, rank 0.25"] = lambda: multitask(
                backbone_of(name, size),
                tasks,
                sharing="tucker",
                rank=0.25,
                heads=10,
                verbose=False,
            )
        steps, seconds, sizes = {}, {}, {}
        for variant, build in variants.items():
            start = time.perf_counter()
            model = build()
            seconds[variant] = time.perf_counter() - start
            sizes[variant] = model.count_params()
            loss = "sparse_categorical_crossentropy"
            steps[variant] = training_step(model, given, labels, loss)
        times = in_turn(steps, options.repeats)
        first = next(iter(times))
        for variant, value in times.items():
            rows.append(
                {
                    "Training step": variant,
                    "Input": "shared" if shared_input else "one per task",
                    "Parameters": f"{sizes[variant]:,}",
                    "Build s": f"{seconds[variant]:.1f}",
                    "ms": f"{value * 1e3:.0f}",
                    "Ratio to plain": f"{value / times[first]:.2f}",
                }
            )
    size = f"images {size} x {size}, batch {options.backbone_batch}"
    return [measured(f"{name}, T = {tasks}, {size}", pd.DataFrame(rows), options, keys=2)]


def prior_tables(options, console):
    """What MRN's prior over one kernel adds to the training step of a backbone."""
    shape, every = tuple(options.prior_kernel), options.prior_update_every
    features, units, tasks = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, features)).astype("float32")
    y = np.zeros((1, units * tasks), "float32")

    def host(prior):
        inputs = keras.Input((features,))
        layer = TaskDense(
            units, tasks, shared_input=True, common_draw=False, kernel_regularizer=prior
        )
        return training_step(keras.Model(inputs, layer(inputs)), x, y, "mse")

    def prior(every):
        return TensorNormalRegularizer(
            modes=("feature", "class", "task"), update_every=every
        )

    name, size, batch = options.backbone, options.prior_image_size, options.prior_batch
    backbone = backbone_of(name, size)
    (output,) = backbone.outputs
    head = keras.layers.Dense(10, "softmax")(output)
    images = rng.normal(size=(batch, size, size, 3)).astype("float32")
    labels = rng.integers(10, size=batch)
    loss = "sparse_categorical_crossentropy"
    step = training_step(keras.Model(backbone.inputs, head), images, labels, loss)
    times = in_turn(
        {
            "step": step,
            "without": host(None),
            "penalty": host(prior(None)),
            "update": host(prior(1)),
        },
        options.repeats,
    )
    penalty = times["penalty"] - times["without"]
    update = times["update"] - times["penalty"]
    parts = {
        f"{name}, one training step": times["step"],
        "penalty and its gradient, in each step": penalty,
        "one update of all covariances": update,
        f"together, with an update every {every} steps": penalty + update / every,
    }
    frame = pd.DataFrame(
        {
            "Part": part,
            "ms": f"{seconds * 1e3:.0f}",
            "Ratio to the step": f"{seconds / times['step']:.3f}",
        }
        for part, seconds in parts.items()
    )
    size = f"images {size} x {size}, batch {batch}"
    title = f"Kernel {' x '.join(map(str, shape))}, beside {name}, {size}"
    naive = Table("Quadratic form and gradient", naive_table(options))
    return [measured(title, frame, options), naive]


def relation_tables(options, console):
    """What a TRL between two tasks adds to the step of a ResNet-18, by both its routes."""
    batch, size = options.relation_batch, options.relation_image_size
    rng = np.random.default_rng(0)
    images = keras.Input((size, size, 3))
    x = resnet18(images, options.relation_width)
    x = keras.layers.GlobalAveragePooling2D()(x)
    network = keras.Model(images, keras.layers.Dense(10)(x))
    network = training_step(
        network,
        rng.integers(256, size=(batch, size, size, 3)).astype("float32"),
        rng.integers(10, size=batch),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    tf = tensorflow()
    shape = (batch, options.relation_features)
    features = [tf.constant(rng.normal(size=shape), "float32") for _ in range(2)]

    def relation(method):
        layer = TRL(method=method)
        layer.build([shape, shape])

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                tape.watch(features)
                similarity = layer(features, training=True)
            return tape.gradient(similarity, features)

        return lambda: step()[0].numpy()

    times = in_turn(
        {"step": network, "cholesky": relation("cholesky"), "svd": relation("svd")},
        options.repeats,
    )
    parts = {
        "ResNet-18, one training step": "step",
        "TRL with its gradient, Cholesky whitening": "cholesky",
        "TRL with its gradient, the paper's route by SVD": "svd",
    }
    frame = pd.DataFrame(
        {
            "Part": part,
            "ms": f"{times[key] * 1e3:.0f}",
            "Ratio to the step": f"{times[key] / times['step']:.3f}",
            "Ratio to Cholesky": f"{times[key] / times['cholesky']:.1f}",
        }
        for part, key in parts.items()
    )
    title = (
        f"Two tasks, {options.relation_features} features each, batch {batch}, beside a "
        f"ResNet-18 of width {options.relation_width}, images {size} x {size}"
    )
    return [measured(title, frame, options)]


def similar_tables(options, console):
    """What MTAL's sharing adds to the training step of T independent backbones.

    Filters start from one backbone, so that every one has a partner in each task; slices
    from draws of their own, of which about one in eight has.
    """
    name, size, tasks = options.similar_backbone, options.image_size, options.backbone_tasks
    every = options.similar_update_every
    rng = np.random.default_rng(0)
    shape = (options.backbone_batch, size, size, 3)
    images = {f"task_{t}": rng.normal(size=shape).astype("float32") for t in range(tasks)}
    labels = {task: rng.integers(10, size=len(x)) for task, x in images.items()}
    backbone = backbone_of(name, size)
    never = 10**9
    filters = functools.partial(SimilarKernels, kernels="filter")
    variants = {
        "independent": "independent",
        "slices": SimilarKernels(0.4),
        "slices kept": SimilarKernels(0.4, update_every=never),
        "overwritten": SimilarKernels(0.4, mode="overwrite"),
        "overwritten never": SimilarKernels(0.4, mode="overwrite", update_every=never),
        "filters": filters(0.4),
        "filters kept": filters(0.4, update_every=never),
    }
    steps = {}
    for key, sharing in variants.items():
        start = "common" if key.startswith("filters") else "apart"
        model = multitask(
            backbone, tasks, sharing=sharing, shared_input=False, heads=10, start=start
        )
        loss = "sparse_categorical_crossentropy"
        steps[key] = training_step(model, images, labels, loss)
    times = in_turn(steps, options.repeats)
    parts = {"independent kernels": "independent"}
    for key, kept, title in (
        ("slices", "slices kept", "slices of equal index"),
        ("overwritten", "overwritten never", "slices of equal index, overwritten"),
        ("filters", "filters kept", "all pairs of filters"),
    ):
        times[f"now and then {key}"] = times[kept] + (times[key] - times[kept]) / every
        parts[f"{title}: chosen in every step"] = key
        parts[f"{title}: every {every} steps (computed)"] = f"now and then {key}"
    frame = pd.DataFrame(
        {
            "Training step": part,
            "ms": f"{times[key] * 1e3:.0f}",
            "Ratio to independent": f"{times[key] / times['independent']:.2f}",
        }
        for part, key in parts.items()
    )
    size = f"images {size} x {size}, batch {options.backbone_batch}"
    title = f"{name}, T = {tasks}, threshold 0.4, {size}"
    return [measured(title, frame, options)]


class _OneByOne(TaskCopies):
    """Copies that are run one after another, whatever they are."""

    def build(self, input_shape):
        super().build(input_shape)
        self._held.of_all = None


def copied_layers():
    """Layers of which there are copies: a constructor, and the shape of one input."""
    kl = keras.layers
    found = {}
    for places, channels in ((8, 16), (16, 32), (32, 64)):
        found[f"attention, {places} places, {channels} channels"] = (
            lambda size=channels: kl.MultiHeadAttention(4, size // 4),
            (places, channels),
        )
    for units in (32, 128):
        found[f"LSTM, 16 places, {units} units"] = (
            lambda units=units: kl.LSTM(units),
            (16, 32),
        )
    for size in (64, 256):
        found[f"EinsumDense, {size} x {size}"] = (
            lambda size=size: kl.EinsumDense("abc,cd->abd", (16, size), bias_axes="d"),
            (16, size),
        )
    for words, size in ((1000, 32), (20000, 64)):
        found[f"Embedding, {words} x {size}"] = (
            lambda words=words, size=size: kl.Embedding(words, size),
            words,
        )
    return found


def _zeros(outputs, count):
    """Labels of zeros for some outputs."""
    return keras.tree.map_structure(lambda y: np.zeros((count, *y.shape[1:])), outputs)


def copies_tables(options, console):
    """Training steps of T copies of a layer, each task with its own examples."""
    tasks, batch = options.copies_tasks, options.copies_batch
    rng = np.random.default_rng(0)
    rows = []
    for title, (make, shape) in track(
        copied_layers().items(), description="copies", console=console
    ):
        twice = isinstance(make(), keras.layers.MultiHeadAttention)
        given = {"args": [{"input": 0}, {"input": 0}], "kwargs": {}} if twice else None
        if isinstance(shape, int):
            x = rng.integers(shape, size=(tasks * batch, 32))
            inputs = [keras.Input((32,), dtype="int32") for _ in range(tasks)]
            whole = keras.Input((32,), dtype="int32")
        else:
            x = rng.normal(size=(tasks * batch, *shape)).astype("float32")
            inputs = [keras.Input(shape) for _ in range(tasks)]
            whole = keras.Input(shape)
        apart = np.split(x, tasks)
        layers = [make() for _ in range(tasks)]
        plain = keras.Model(
            inputs,
            [layer(x, x) if twice else layer(x) for layer, x in zip(layers, inputs)],
        )
        models = {"layers": (plain, apart)}
        for name, kind in (("at once", TaskCopies), ("one by one", _OneByOne)):
            copies = kind(make(), tasks, arguments=given)
            models[name] = keras.Model(whole, copies(whole)), x
        steps = {}
        for name, (model, data) in models.items():
            outputs = _zeros(model.output, batch if name == "layers" else tasks * batch)
            steps[name] = training_step(model, data, outputs, "mse")
        times = in_turn(steps, options.repeats)
        rows.append(
            {
                "Layer": title,
                "ms, T layers": f"{times['layers'] * 1e3:.1f}",
                "copies / T layers": f"{times['at once'] / times['layers']:.2f}",
                "one by one / T layers": f"{times['one by one'] / times['layers']:.2f}",
                "copies / one by one": f"{times['at once'] / times['one by one']:.2f}",
            }
        )
    title = f"T = {tasks}, {batch} examples of each task"
    return [measured(title, pd.DataFrame(rows), options)]


def balancing_tables(options, console):
    """Training steps of a network with balanced losses, against the plain ones."""
    rng = np.random.default_rng(0)
    # Epochs of many steps, as what a call of `fit` itself takes is little beside it.
    count = options.balancing_steps
    images = rng.normal(size=(64 * count, 28, 28, 1)).astype("float32")
    methods = {
        "dwa": "dwa",
        "famo": "famo",
        "upgrad, features": balancing.UPGrad(at="features"),
        "cagrad, features": balancing.CAGrad(at="features"),
        "upgrad": "upgrad",
        "cagrad": "cagrad",
        "moco": "moco",
    }
    rows = []
    for tasks in track(options.balancing_tasks, description="balancing", console=console):
        names = [f"task_{t}" for t in range(tasks)]
        labels = {
            task: rng.normal(size=(len(images), 1)).astype("float32") for task in names
        }
        steps = {}
        for key, method in {"plain": None, **methods}.items():
            kl = keras.layers
            trunk = [kl.Conv2D(32, 5, activation="relu"), kl.MaxPooling2D()]
            trunk += [kl.Conv2D(64, 4, activation="relu"), kl.MaxPooling2D()]
            trunk += [kl.Flatten(), kl.Dense(128, "relu")]
            backbone = keras.Sequential([keras.Input((28, 28, 1)), *trunk])
            model = multitask(backbone, names, "hard", heads=1, verbose=False)
            model.compile("adam", "mse", balancing=method)
            steps[key] = functools.partial(
                model.fit, images, labels, batch_size=64, verbose=0
            )
        times = in_turn(steps, options.repeats)
        ratios = {key: f"{times[key] / times['plain']:.2f}" for key in methods}
        rows.append(
            {"T": str(tasks), "ms": f"{times['plain'] / count * 1e3:.1f}", **ratios}
        )
    title = f"LeNet, hard sharing, epochs of {count} steps of 64"
    title += ": ratios to those without balancing"
    return [measured(title, pd.DataFrame(rows), options)]


class _Images(keras.utils.PyDataset):
    """Batches of 32 images with labels of all tasks; one input, or one for each task."""

    def __init__(self, x, y, own, workers):
        super().__init__(workers=workers)
        self._x, self._y, self._own = x, y, own

    def __len__(self):
        return len(self._x) // 32

    def __getitem__(self, number):
        part = slice(32 * number, 32 * number + 32)
        labels = {task: y[part] for task, y in self._y.items()}
        images = self._x[part]
        return (dict.fromkeys(labels, images) if self._own else images), labels


def streams_tables(options, console):
    """An epoch of `fit` on a `PyDataset`, `MultiTaskModel` against a plain Keras model."""
    tasks = [f"task_{t}" for t in range(8)]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1024, 16, 16, 1)).astype("float32")
    y = {task: rng.integers(5, size=len(x)) for task in tasks}
    kl = keras.layers

    def network(kind, own):
        def trunk(inputs):
            return kl.GlobalAveragePooling2D()(kl.Conv2D(8, 3, activation="relu")(inputs))

        if own:
            inputs = {task: keras.Input((16, 16, 1), name=task) for task in tasks}
            features = {task: trunk(inputs[task]) for task in tasks}
        else:
            inputs = keras.Input((16, 16, 1))
            features = dict.fromkeys(tasks, trunk(inputs))
        heads = {
            t: kl.Dense(5, "softmax", name=f"{t}_head")(f) for t, f in features.items()
        }
        model = kind(inputs, heads)
        loss = dict.fromkeys(tasks, "sparse_categorical_crossentropy")
        model.compile("adam", loss, metrics={task: ["accuracy"] for task in tasks})
        return model

    rows = []
    for own in track((False, True), description="streams", console=console):
        steps = {}
        for name, kind in (("keras", keras.Model), ("ours", MultiTaskModel)):
            model = network(kind, own)
            stream = _Images(x, y, own, workers=3)
            steps[name] = functools.partial(model.fit, stream, verbose=0)
        times = in_turn(steps, options.repeats)
        rows.append(
            {
                "Inputs": "one for each task" if own else "one",
                "Batches a second, plain Keras": f"{len(stream) / times['keras']:.0f}",
                "MultiTaskModel": f"{len(stream) / times['ours']:.0f}",
                "Ratio": f"{times['keras'] / times['ours']:.2f}",
            }
        )
    title = "A PyDataset with three workers, 8 tasks, batches of 32 images of 16 x 16"
    frame = pd.DataFrame(rows)
    note = (
        f"{title}, medians of {options.repeats} epochs, {keras.config.backend()} backend."
    )
    return [Table(title, frame, note=note)]


def naive_table(options):
    """The penalty and its gradient, with mode products and with the Kronecker product."""
    tf = tensorflow()
    rows = []
    for shape in ((8, 8, 4), (16, 16, 4), (32, 16, 4)):
        covariances = [np.eye(d) + 0.5 for d in shape]
        kernel = tf.constant(np.random.default_rng(0).normal(size=(1, *shape)), "float32")
        whole = tf.constant(functools.reduce(np.kron, covariances), "float32")
        whiteners = [
            tensor_normal.whitener(tf.constant(matrix, "float32")) for matrix in covariances
        ]

        def naive(x, whole=whole):
            flat = tf.reshape(x, (-1, 1))
            return tf.matmul(flat, tf.linalg.solve(whole, flat), transpose_a=True)

        def ours(x, whiteners=whiteners):
            return tensor_normal.quadratic_form(x, whiteners)

        def compiled(form, kernel=kernel):
            @tf.function
            def step():
                with tf.GradientTape() as tape:
                    tape.watch(kernel)
                    value = form(kernel)
                return tape.gradient(value, kernel)

            return step

        steps = {"naive": compiled(naive), "ours": compiled(ours)}
        times = in_turn(steps, options.repeats)
        np.testing.assert_allclose(steps["naive"](), steps["ours"](), rtol=1e-2, atol=1e-3)
        rows.append(_naive_row(shape, times))
    # Where the Kronecker product has no place any more.
    rows.append(_naive_row(tuple(options.prior_kernel), None))
    return pd.DataFrame(rows)


def _naive_row(shape, times):
    kernel = 4 * math.prod(shape)
    state = 12 * sum(d * d for d in shape)
    return {
        "Kernel": " x ".join(map(str, shape)),
        "Kronecker product, MB": f"{kernel**2 / 4 / 1e6:,.1f}",
        "Kernel and state, MB": f"{(kernel + state) / 1e6:,.2f}",
        "Naive, ms": "-" if times is None else f"{times['naive'] * 1e3:.2f}",
        "Mode products, ms": "-" if times is None else f"{times['ours'] * 1e3:.2f}",
    }


def measured(title, frame, options, **more):
    """A table whose note says what was measured, and how."""
    return Table(title, frame, note=f"{title}, {how(options)}.", **more)


def training_step(model, images, labels, loss=None):
    """A function that makes one training step of a model with Adam."""
    model.compile("adam", loss or TaskHinge())

    def step():
        model.train_on_batch(images, labels)

    return step


def on_one_core():
    """Whether the process is held to one core."""
    cores = getattr(os, "sched_getaffinity", None)  # Linux has it.
    return cores is not None and len(cores(0)) == 1


def in_turn(steps, repeats):
    """Median seconds of some functions, run in turn after two runs of warming up.

    On one core the processor's seconds are those that would pass without other work. What
    other work takes of the memory's speed remains: each turn is taken at the median speed
    of all turns.

    Args:
        steps: dict of functions without arguments.
        repeats: int.

    Returns:
        A dict of floats.
    """
    for step in steps.values():
        step()
        step()
    clock = time.process_time if on_one_core() else time.perf_counter
    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(clock() - start)
    return at_one_speed(times)


def at_one_speed(times):
    """Medians of seconds that were taken in turn, while the machine's speed changed.

    Args:
        times: dict of lists of floats of one length, the seconds of each turn.

    Returns:
        A dict of floats: the medians over turns, of which each is scaled so that all
        functions together take the median over turns.

    Example:

    >>> at_one_speed({"a": [1.0, 2.0, 10.0], "b": [2.0, 4.0, 20.0]})
    {'a': 2.0, 'b': 4.0}
    """
    turns = [sum(turn) for turn in zip(*times.values())]
    usual = statistics.median(turns)
    return {
        name: statistics.median(x * usual / turn for x, turn in zip(values, turns))
        for name, values in times.items()
    }


def trained_networks(options):
    """STL trained on real digits, whose kernels 10% error is measured on."""
    from .digits import load_digits

    arguments = ["--padding", options.padding, "--fc", str(options.fc)]
    arguments += ["--epochs", str(2 * options.stl_epochs)]
    part = draw_part(load_digits("sample"), 0.01, 0)
    options = parse_mnist(arguments)
    return Trainer(options, part.train_images, part.train_labels, 0).half_trained()[0]


def _with_implementation(model, implementation):
    def clone(layer):
        config = layer.get_config()
        if not isinstance(layer, FactorizedLayer):
            return type(layer).from_config(config)
        copy = type(layer).from_config({**config, "implementation": implementation})
        factors = layer.factors.items()
        copy.start_from({n: keras.ops.convert_to_numpy(f) for n, f in factors})
        return copy

    new = keras.models.clone_model(model, clone_function=clone)
    new.set_weights(model.get_weights())
    return new


def factorized_variants(source, method, rank, tolerance):
    """The same factors in the three implementations.

    Returns:
        `(models, weights)`: a dict of models by implementation, and the number of kernel
        weights relative to the independent kernels.
    """
    with warnings.catch_warnings():
        # LeNet's output of one unit can't have a fraction of its weights.
        warnings.simplefilter("ignore", UserWarning)
        choice = {"rank": rank, "tolerance": tolerance, "keep_larger": True}
        model = factorize(source, method, verbose=False, **choice)
    models = {name: _with_implementation(model, name) for name in IMPLEMENTATIONS}
    report = factorization_report(model)
    after = sum(entry.parameters_after for entry in report)
    return models, after / sum(entry.parameters_before for entry in report)


# Arguments that are whole numbers: their defaults, and their helps.
COUNTS = {
    "batch-size": (64, "of LeNet"),
    "fc": (512, "units of LeNet's fully connected layer"),
    "repeats": (5, "steps of each kind"),
    "stl-epochs": (8, "of STL before 10%% error is measured"),
    "backbone-tasks": (4, "of the backbone"),
    "backbone-batch": (16, "of the backbone"),
    "image-size": (64, "of the backbone"),
    "prior-update-every": (20, "steps"),
    "prior-batch": (32, "of the backbone beside it"),
    "prior-image-size": (224, "of the backbone beside it"),
    "relation-features": (512, "of each of two tasks"),
    "relation-batch": (128, "of the ResNet-18"),
    "relation-image-size": (64, "of the ResNet-18"),
    "relation-width": (64, "of the ResNet-18"),
    "similar-update-every": (20, "steps"),
    "balancing-steps": (20, "of an epoch"),
    "copies-tasks": (10, "of the copied layers"),
    "copies-batch": (32, "of each task of the copied layers"),
}


def parser():
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m applications.benchmark",
        description="Training steps of LeNet with T tasks, as ratios to T plain networks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count = whole(1)
    for name, (default, text) in COUNTS.items():
        p.add_argument(f"--{name}", type=count, default=default, help=text)
    p.add_argument("--padding", choices=("same", "valid"), default="valid")
    p.add_argument(
        "--ranks",
        nargs="+",
        type=real(above=0, most=1),
        default=[0.2, 0.5, 0.8],
        help="fractions of the weights of independent kernels",
    )
    p.add_argument("--methods", nargs="+", choices=FACTORIZATIONS, default=FACTORIZATIONS)
    p.add_argument("--skip-grouped", action="store_true", help="leave out (b)")
    p.add_argument("--backbone", default="ResNet50", help="of keras.applications")
    p.add_argument("--similar-backbone", default="VGG16", help="of keras.applications")
    p.add_argument(
        "--prior-kernel",
        nargs=3,
        type=count,
        default=[2048, 256, 4],
        metavar=("FEATURES", "UNITS", "TASKS"),
    )
    p.add_argument(
        "--balancing-tasks", nargs="+", type=whole(2), default=[2, 5, 10], metavar="TASKS"
    )
    p.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    p.add_argument("--output", type=pathlib.Path, default="results/benchmark")
    add_page(p)
    return p


def parse(arguments=None):
    """The parsed arguments, as `Experiment.parse` has them, but for the devices."""
    p = parser()
    options = parse_arguments(p, arguments, training=False)
    for name in ("backbone", "similar_backbone"):
        if not callable(getattr(keras.applications, getattr(options, name), None)):
            flag = f"--{name.replace('_', '-')}"
            p.error(f"{flag}: keras.applications has no {getattr(options, name)!r}")
    check_page(p, options, [PARTS[part][0] for part in options.parts])
    return options


def lenet_tables(options, console):
    """(a) to (e): the training steps, and the orders of work of each method."""
    tasks, batch = 10, options.batch_size
    size = f"LeNet, T = {tasks}, batch {batch}, padding {options.padding}, FC {options.fc}"
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
    steps = pd.DataFrame(
        {
            "Training step": name,
            "ms": f"{seconds * 1e3:.0f}",
            "Ratio to (a)": f"{seconds / base:.2f}",
        }
        for name, seconds in sorted(times.items())
    )
    first = measured(size, steps, options)
    source = trained_networks(options)
    rows = []
    kinds = [(method, None) for method in options.methods]
    kinds += [(method, rank) for method in options.methods for rank in options.ranks]
    for method, rank in track(kinds, description="(d)", console=console):
        tolerance = 0.1 if rank is None else None
        models, weights = factorized_variants(source, method, rank, tolerance)
        steps = {
            name: training_step(model, images, labels) for name, model in models.items()
        }
        found = in_turn({"a": plain, **steps}, options.repeats)
        best = min(found["compose"], found["contract"])
        rows.append(
            {
                "Method": method,
                "Rank": "10% error" if rank is None else f"{rank:g}",
                "Weights": f"{weights:.2f}",
                **{name: f"{found[name] / found['a']:.2f}" for name in IMPLEMENTATIONS},
                "auto / better": f"{found['auto'] / best:.2f}",
            }
        )
    title = "(d) ours, factorised: ratio to (a)"
    return [first, Table(title, pd.DataFrame(rows), keys=2)]


def how(options):
    """How the times are taken, in words."""
    device = f"{platform.machine()}, {keras.config.backend()} backend"
    core = ", seconds of one core" if on_one_core() else ""
    return f"medians of {options.repeats} steps with Adam, {device}{core}"


# The name of a part's block in a page, and the function that measures it.
PARTS = {
    "lenet": ("benchmark", lenet_tables),
    "backbone": ("backbone", backbone_tables),
    "prior": ("prior", prior_tables),
    "relation": ("relation", relation_tables),
    "similar": ("similar", similar_tables),
    "copies": ("copies", copies_tables),
    "balancing": ("balancing", balancing_tables),
    "streams": ("streams", streams_tables),
}


@one_line()
def main(arguments=None):
    """Run the benchmark; returns its tables, a dict of lists of data frames."""
    options = parse(arguments)
    console = make_console()
    found = {}
    with working_in(options.output, "`--parts` takes the names of the others."):
        for part in options.parts:
            block, measure = PARTS[part]
            tables = measure(options, console)
            # Each as it comes: the next may take minutes.
            publish({block: tables}, options, console)
            found[block] = [table.frame for table in tables]
    return found


if __name__ == "__main__":
    main()
