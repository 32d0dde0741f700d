"""A tenth digit for a network of nine, from a few examples.

A network of nine one-versus-rest tasks is trained on images of nine digits of MNIST. The
tenth digit then is a new task (`dmtrl_keras.add_task`) with a few examples, half of them of
the digit. The extension is what the conclusion of Yang & Hospedales, "Deep Multi-task
Representation Learning: A Tensor Factorisation Approach" (ICLR 2017) names. The methods
differ in what the new task has for itself:

- `alone`: a network of its own, trained on the few examples only;
- `independent`: a copy of the nearest task's network;
- `hard`: a head on the features that all tasks share;
- `laf`, `tucker`, `tt`: a column of each layer's task matrix, biases, and a head;
- `control`: as `tucker`, but the network was never trained on the nine tasks.

Learning rate and number of steps are chosen by method on other digits, whose networks and
examples are drawn likewise.

    python -m applications.new_task --data FOLDER
"""

import keras
import numpy as np
import pandas as pd
from keras import layers
from sklearn.metrics import roc_auc_score

from dmtrl_keras import MultiTaskModel, add_task, multitask
from dmtrl_keras.parameterizations import LAF, TT, Tucker

from .arguments import OPTIMIZERS, real, whole
from .digits import load_digits
from .experiment import Experiment, Table, ticking, timed, trainable_parameters
from .mnist import EXPERIMENT as MNIST
from .mnist import TASKS as DIGITS
from .results import mean_and_spread

NEW = "new"
KINDS = {"laf": LAF, "tucker": Tucker, "tt": TT, "control": Tucker}
METHODS = {
    "alone": "alone",
    "independent": "a copy of the nearest task",
    "hard": "hard sharing: a head",
    "laf": "LAF: columns, biases, head",
    "tucker": "Tucker: columns, biases, head",
    "tt": "TT: columns, biases, head",
    "control": "Tucker, shared factors at random",
}


def backbone(width):
    """A LeNet without its last layer: two convolutions and a fully connected layer."""
    x = images = keras.Input((28, 28, 1), name="image")
    x = layers.Rescaling(1 / 255, name="rescaling")(x)
    for number, (filters, size) in enumerate(((width, 5), (2 * width, 4)), start=1):
        x = layers.Conv2D(filters, size, activation="relu", name=f"conv{number}")(x)
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(images, layers.Dense(4 * width, "relu", name="fc")(x), name="lenet")


class Part:
    """Images of nine digits, and of the tenth a few examples.

    Args:
        digits: `Digits`.
        digit: int, the new one.
        images: int, how many images of the nine.
        examples: int, half of them of the new digit.
        test_images: int, at most so many.
        seed: int.
    """

    def __init__(self, digits, digit, images, examples, test_images, seed):
        rng = np.random.default_rng(seed)
        self.digit = digit
        self.known = [n for n in range(DIGITS) if n != digit]
        labels = digits.train_labels
        old = rng.permutation(np.flatnonzero(labels != digit))
        new = rng.permutation(np.flatnonzero(labels == digit))
        half = examples // 2
        chosen = old[:images]
        self.images = digits.train_images[chosen].astype("float32")
        self.labels = labels[chosen]
        few = np.concatenate([new[:half], old[images : images + examples - half]])
        self.few = digits.train_images[few].astype("float32")
        self.is_new = (labels[few] == digit).astype("int32")
        tested = rng.permutation(len(digits.test_labels))[:test_images]
        self.test_images = digits.test_images[tested].astype("float32")
        self.test_labels = digits.test_labels[tested]


def balanced_error(is_new, outputs):
    """The mean of the error rates on the new digit and on all others, at one half."""
    answers = np.asarray(outputs).reshape(-1) >= 0.5
    return float(np.mean([np.mean(answers[is_new == n] != bool(n)) for n in (0, 1)]))


class NewTask(Experiment):
    """A tenth digit for a network of nine."""

    name = "new_task"
    description = "A tenth digit for a network of nine, from a few examples."
    methods = METHODS
    defaults = {
        "epochs": 4,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "repeats": 5,
        "optimizer": "adam",
    }
    helps = {"epochs": "of the nine tasks", "learning_rate": "of the nine tasks"}
    settings = ("images", "examples", "test_images", "width", "rank", "rates", "steps")
    settings += ("epochs", "batch_size", "learning_rate", "optimizer")
    data_argument = MNIST.data_argument

    def add_arguments(self, p):
        p.add_argument("--images", type=whole(1), default=2000, help="of the nine digits")
        p.add_argument("--examples", type=whole(4), default=20, help="of the new task")
        p.add_argument("--test-images", type=whole(1), default=2000)
        p.add_argument("--width", type=whole(1), default=8, help="of the first layer")
        p.add_argument(
            "--rank",
            type=real(above=0, most=1),
            default=0.5,
            help="the share of the weights that a factorised layer has",
        )
        p.add_argument(
            "--rates",
            nargs="+",
            type=real(above=0),
            default=[3e-3, 1e-2],
            help="learning rates of the new task to choose from",
        )
        p.add_argument(
            "--steps",
            nargs="+",
            type=whole(1),
            default=[30, 100, 300],
            help="numbers of steps of the new task to choose from",
        )
        p.add_argument(
            "--choose-on",
            nargs="+",
            type=whole(0, DIGITS - 1),
            default=[3, 4],
            help="digits that are the new one where rate and steps are chosen",
        )

    def check(self, p, options):
        options.steps = sorted(set(options.steps))
        if len(set(options.choose_on)) + options.repeats > DIGITS:
            p.error(
                f"argument --repeats: expected at most {DIGITS} with the digits of "
                f"--choose-on, got {options.repeats} and {len(set(options.choose_on))}"
            )

    def load(self, options, console):
        return load_digits(options.data)

    def plan(self, options, digits):
        others = [n for n in reversed(range(DIGITS)) if n not in options.choose_on]
        drawn = [(digit, True) for digit in sorted(set(options.choose_on))]
        drawn += [(digit, False) for digit in others[: options.repeats]]
        for number, (digit, chooses) in enumerate(drawn):
            seed = options.seed + number
            for method in options.methods:
                yield self.planned(
                    f"new digit {digit}",
                    options,
                    method,
                    lambda digit=digit, seed=seed: Part(
                        digits,
                        digit,
                        options.images,
                        options.examples,
                        options.test_images,
                        seed,
                    ),
                    seed,
                    {"data": digits.name, "seed": seed, "digit": digit, "chooses": chooses},
                )

    def run(self, options, method, part, seed, tick, callbacks=None):
        with timed(seed) as took:
            old = None
            if method in ("alone", "control"):
                # The nine tasks are not trained.
                for _ in range(options.epochs):
                    tick()
            if method != "alone":
                old = self._old(options, method, part, tick)
                before = old.predict(part.test_images, batch_size=500, verbose=0)
            keras.utils.set_random_seed(seed)
            model, larger = self._new(options, method, old, part)
            start, found = model.get_weights(), {}
            for rate in options.rates:
                model.set_weights(start)
                errors = self._train(options, model, rate, part)
                found |= {f"{rate:g}, {steps}": own for steps, own in errors.items()}
            unchanged = None
            if larger is not None:
                after = larger.predict(part.test_images, batch_size=500, verbose=0)
                unchanged = all(np.array_equal(after[t], before[t]) for t in before)
        return {
            "errors": found,
            "parameters": trainable_parameters(model),
            "unchanged": unchanged,
            "seconds": took.seconds,
        }

    def _old(self, options, method, part, tick):
        """The network of nine tasks."""
        tasks = [f"digit_{n}" for n in part.known]
        sharing = "hard" if method == "hard" else "independent"
        if method in KINDS:
            sharing = KINDS[method](options.rank)
        model = multitask(backbone(options.width), tasks, sharing, heads=1, verbose=False)
        if method == "control":
            return model
        labels = {
            task: (part.labels == n).astype("float32")[:, None]
            for task, n in zip(tasks, part.known)
        }
        model.compile(
            OPTIMIZERS[options.optimizer](options.learning_rate), "binary_crossentropy"
        )
        model.fit(
            part.images,
            labels,
            batch_size=options.batch_size,
            epochs=options.epochs,
            callbacks=ticking(tick, None),
            verbose=0,
        )
        return model

    def _new(self, options, method, old, part):
        """The network of the new task alone, and the whole one, with the same layers."""
        if old is None:
            features = backbone(options.width)
            output = layers.Dense(1, "sigmoid", name=f"{NEW}_head")(features.output)
            return MultiTaskModel(features.input, {NEW: output}), None
        larger = add_task(old, NEW, head=1, data=(part.few, part.is_new))
        return MultiTaskModel(larger.input, {NEW: larger.output[NEW]}), larger

    def _train(self, options, model, rate, part):
        """`[balanced error, 1 - area under the curve]` by the number of steps."""
        model.compile(OPTIMIZERS[options.optimizer](rate), "binary_crossentropy")
        is_new, done, found = part.test_labels == part.digit, 0, {}
        for steps in options.steps:
            # All examples are one batch, and all steps one epoch, which costs by itself.
            more = steps - done
            labels = part.is_new[:, None].astype("float32")
            model.fit(
                np.tile(part.few, (more, 1, 1, 1)),
                {NEW: np.tile(labels, (more, 1))},
                batch_size=len(part.few),
                shuffle=False,
                verbose=0,
            )
            done = steps
            outputs = model.predict(part.test_images, batch_size=500, verbose=0)[NEW]
            area = roc_auc_score(is_new, outputs.reshape(-1))
            found[steps] = [balanced_error(is_new, outputs), 1 - float(area)]
        return found

    def describe(self, found):
        return f"balanced error {min(own[0] for own in found['errors'].values()):.1%}"

    def tables(self, options, digits, runs):
        title = f"MNIST, a tenth digit with {options.examples} examples"
        return {"new-task": Table(title, summarize(runs))}


def summarize(runs):
    """Errors by method, at the rate and steps chosen on other digits."""
    rows = []
    for method, group in runs.groupby("method", sort=False):
        balanced, area = (
            pd.DataFrame([{k: own[n] for k, own in run.items()} for run in group.errors])
            for n in (0, 1)
        )
        chooses = group.chooses.to_numpy(dtype=bool)
        chosen = balanced[chooses].mean().idxmin()
        final = ~chooses
        unchanged = [run for run in group.unchanged[final] if run is not None]
        rows.append(
            {
                "Method": METHODS[method],
                "Trained": f"{group.parameters.mean():,.0f}",
                "Rate, steps": chosen,
                "Balanced error %": mean_and_spread(100 * balanced[chosen][final]),
                "1 - AUC %": mean_and_spread(100 * area[chosen][final]),
                "Old outputs": "-"
                if not unchanged
                else "equal"
                if all(unchanged)
                else "changed",
                "Digits": int(final.sum()),
            }
        )
    return pd.DataFrame(rows)


parse, main = NewTask().parse, NewTask().main

if __name__ == "__main__":
    main()
