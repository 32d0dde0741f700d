"""How well trained kernels compress: ten digits, by training and by its length.

The tasks of `applications.mnist`, each with a LeNet of its own, all from one start. After
some epochs, how many of the weights would `factorize` keep? The trainings are

- `adam`, `sgd` (with momentum);
- `adam-decay`, `sgd-decay`: with (decoupled) weight decay.

The ranks of a tensor train are those of the unfoldings of the whole kernel, which are a
little larger than what its SVDs, one after the other, find.

    python -m applications.compression --data FOLDER
"""

import math

import numpy as np
import pandas as pd
from keras import ops

from dmtrl_keras import task_layers
from dmtrl_keras.dmtrl.decomposition import THRESHOLDS
from dmtrl_keras.losses import TaskHinge, one_vs_rest
from dmtrl_keras.parameterizations import LAF, TT, Tucker

from .arguments import real, whole
from .digits import load_digits
from .experiment import Experiment, Table, make_optimizer, timed
from .mnist import EXPERIMENT as MNIST
from .mnist import TASKS, draw_part, evaluate, lenet
from .results import mean_and_spread

KINDS = {"LAF": LAF, "Tucker": Tucker, "TT": TT}
METHODS = {
    "adam": "Adam",
    "adam-decay": "Adam, weight decay",
    "sgd": "SGD",
    "sgd-decay": "SGD, weight decay",
}


def in_parts(images, labels, after, batch_size, seed):
    """The images in the order of training, cut where kernels are looked at.

    Args:
        images: array.
        labels: array.
        after: list of floats, epochs.
        batch_size: int; each part is a whole number of batches.
        seed: int.

    Yields:
        `(epochs, images, labels)` for each of `after`, in ascending order.
    """
    rng = np.random.default_rng(seed)
    steps = len(images) // batch_size
    order = [
        rng.permutation(len(images))[: steps * batch_size]
        for _ in range(math.ceil(max(after)))
    ]
    order, start = np.concatenate(order), 0
    for epochs in sorted(after):
        end = max(1, round(epochs * steps)) * batch_size
        chosen = order[start:end]
        yield epochs, images[chosen], labels[chosen]
        start = end


def kept(model, tolerance):
    """The share of the weights that factors within a tolerance have.

    Returns:
        A dict from the threshold's rule to one from the decomposition to a float.
    """
    found = {threshold: dict.fromkeys(KINDS, 0) for threshold in THRESHOLDS}
    whole_size = 0
    for layer in task_layers(model):
        kernel = ops.convert_to_numpy(layer.kernel).astype("float64")
        whole_size += kernel.size
        for name, kind in KINDS.items():
            rule = kind._rule
            spectra = rule.spectra(kernel)
            for threshold, sizes in found.items():
                ranks = rule.within(kernel.shape, spectra, tolerance, threshold)
                # As `factorize` does, which makes no layer larger.
                sizes[name] += min(rule.size(kernel.shape, ranks), kernel.size)
    return {
        threshold: {name: size / whole_size for name, size in sizes.items()}
        for threshold, sizes in found.items()
    }


class Compression(Experiment):
    """By training and epochs, the share of the weights that factors keep."""

    name = "compression"
    description = "How well the kernels of ten digits' networks compress, by training."
    methods = METHODS
    defaults = {"batch_size": 16, "learning_rate": 2e-3, "repeats": 3}
    helps = {"learning_rate": "of Adam"}
    settings = ("fraction", "validation", "after", "batch_size", "padding", "fc")
    settings += ("tolerance",)
    data_argument = MNIST.data_argument
    budget = "ticks"

    def add_arguments(self, p):
        share = real(above=0, most=1)
        p.add_argument("--fraction", type=share, default=0.01, help="of 60,000 images")
        p.add_argument(
            "--validation",
            type=whole(1),
            default=1000,
            help="other training images, on which the networks are tested",
        )
        p.add_argument(
            "--after",
            nargs="+",
            type=real(above=0),
            default=[0.5, 1.0, 2.0, 3.0, 5.0, 10.0],
            help="epochs of single-task learning",
        )
        p.add_argument("--padding", choices=("same", "valid"), default="same")
        p.add_argument("--fc", type=whole(1), default=128)
        tolerance = real(above=0, below=1)
        p.add_argument("--tolerance", type=tolerance, default=0.1)
        p.add_argument("--sgd-learning-rate", type=real(above=0), default=0.1)
        p.add_argument(
            "--weight-decay",
            type=real(above=0),
            default=1.0,
            help="of Adam, times its learning rate in each step",
        )
        p.add_argument(
            "--sgd-weight-decay", type=real(above=0), default=0.01, help="of SGD, likewise"
        )

    def check(self, p, options):
        options.ticks = len(options.after)
        options.after = sorted(options.after)

    def tasks(self, options, data=None):
        return [str(digit) for digit in range(TASKS)]

    def load(self, options, console):
        return load_digits(options.data)

    def settings_of_method(self, options, data, method):
        return {"data": data.name, **_training(options, method)}

    def draw(self, options, data, seed):
        """The training images of a draw of `applications.mnist`, and the next ones."""
        return draw_part(data, options.fraction, seed, options.validation)

    def run(self, options, method, part, seed, tick, callbacks=None):
        rows = []
        with timed(seed) as took:
            model = lenet(0, options.padding, options.fc)
            training = _training(options, method)
            model.compile(make_optimizer(**training), TaskHinge())
            parts = in_parts(
                part.train_images.astype("float32"),
                one_vs_rest(part.train_labels, TASKS),
                options.after,
                options.batch_size,
                seed,
            )
            for epochs, images, labels in parts:
                if len(images):
                    batch = options.batch_size
                    model.fit(images, labels, batch, shuffle=False, verbose=0)
                binary, multiclass = evaluate(model, part.test_images, part.test_labels)
                rows.append(
                    {
                        "epochs": epochs,
                        "binary_error": binary,
                        "multiclass_error": multiclass,
                        **kept(model, options.tolerance),
                    }
                )
                tick()
        return {"rows": rows, "seconds": took.seconds}

    def describe(self, found):
        last = found["rows"][-1]
        shares = ", ".join(f"{n} {s:.2f}" for n, s in last["frobenius"].items())
        return f"multi-class error {last['multiclass_error']:.1%}, weights {shares}"

    def tables(self, options, data, runs):
        title = f"Weights kept at {options.tolerance:.0%} error"
        return {"mnist-compression": Table(title, summarize(runs), keys=2)}

    def blocks(self, options):
        return ["mnist-compression"]


def _training(options, method):
    """The arguments of `make_optimizer` for a method."""
    name, _, decay = method.partition("-")
    sgd = "sgd_" if name == "sgd" else ""
    return {
        "optimizer": name,
        "learning_rate": getattr(options, f"{sgd}learning_rate"),
        "weight_decay": getattr(options, f"{sgd}weight_decay") if decay else 0.0,
    }


def summarize(runs):
    """The table, one row for each training and number of epochs."""
    rows = []
    for method, group in runs.groupby("method", sort=False):
        for entries in zip(*group.rows):
            of = pd.DataFrame(list(entries))
            row = {"Training": METHODS[method], "Epochs": f"{of.epochs[0]:g}"}
            for threshold in THRESHOLDS:
                note = "" if threshold == "frobenius" else ", singular values"
                shares = pd.DataFrame(list(of[threshold]))
                for name in KINDS:
                    row[f"{name}{note}"] = mean_and_spread(shares[name])
            row["Binary %"] = mean_and_spread(100 * of.binary_error, 1)
            row["Multi-class %"] = mean_and_spread(100 * of.multiclass_error, 1)
            row["Runs"] = len(group)
            rows.append(row)
    return pd.DataFrame(rows)


parse, main = Compression().parse, Compression().main

if __name__ == "__main__":
    main()
