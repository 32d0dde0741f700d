"""Many alphabets, few drawings: what classifiers of other classes know of the features.

Every alphabet of Omniglot is a task with classes of its own, its characters, of which there
are a few drawings each. All tasks have the same features, principal components of the
images, and a linear classifier of their own. What they can have in common is which features
tell characters apart: the feature covariance of a tensor-normal prior (Long et al., MRN,
NIPS 2017), one for all classifiers.

- `alone`: no prior;
- `decay`: a prior whose covariances stay identities, which is weight decay;
- `own`: each alphabet learns a feature covariance of its own;
- `mrn`: one feature covariance of all alphabets;
- `shuffled`: the same, where the features of each alphabet are in an order of their own, so
  that they have nothing in common: a control, which should gain nothing;
- `hard`: a common hidden layer, with weight decay of the classifiers.

The strength of the prior is chosen on drawings that are held back, with the first split.

    python -m applications.characters --data FOLDER
"""

import itertools
import pathlib

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from dmtrl_keras import TensorNormalRegularizer, mode_covariance, zip_tasks
from dmtrl_keras import relationship_network as network_of

from .alphabets import load_alphabets, split
from .arguments import real, whole
from .experiment import (
    Experiment,
    Table,
    decaying,
    digest_of,
    errors_by_task,
    figure_of,
    mean_error,
    predict_by_task,
    ticking,
    timed,
)
from .reading import DataError
from .results import half_interval, mean_and_spread

METHODS = {
    "alone": "classifiers alone",
    "decay": "weight decay",
    "own": "feature covariances of their own",
    "mrn": "one feature covariance (MRN)",
    "shuffled": "one covariance, features shuffled",
    "hard": "a common hidden layer",
}
LEARNED = ("own", "mrn", "shuffled")


class Part:
    """Features of one split, by task.

    Args:
        tasks: dict from name to `ImageTask`.
        parts: as from `alphabets.split`.
        components: int, the most principal components.
    """

    def __init__(self, tasks, parts, components):
        self.classes = {
            # Characters of two alphabets are never the same classes.
            name: [f"{name}.{character}" for character in task.classes]
            for name, task in tasks.items()
        }
        self.labels = {
            name: [tasks[name].labels[side] for side in sides]
            for name, sides in parts.items()
        }
        pixels = {
            name: [255.0 - _flat(tasks[name].images[side]) for side in sides]
            for name, sides in parts.items()
        }
        trained = np.concatenate([train for train, _ in pixels.values()])
        found = PCA(min(components, *trained.shape), random_state=0).fit(trained)
        # The first component has variance one.
        scale = np.sqrt(found.explained_variance_[0])
        self.x = {
            name: [found.transform(side).astype("float32") / scale for side in sides]
            for name, sides in pixels.items()
        }

    def features(self, method, seed):
        """What a method sees of them, a dict from task to `[train, test]`."""
        if method != "shuffled":
            return self.x
        rng = np.random.default_rng(seed)
        orders = {
            name: rng.permutation(sides[0].shape[1]) for name, sides in self.x.items()
        }
        return {
            name: [side[:, orders[name]] for side in sides]
            for name, sides in self.x.items()
        }


def _flat(images):
    return images.reshape(len(images), -1).astype("float32")


def make_network(options, method, classes, features):
    """The classifiers of a method, one network.

    Args:
        options: parsed arguments: `strength`, `update_every`, `hidden`.
        method: a key of `METHODS`.
        classes: dict from task to the names of its classes.
        features: int.
    """
    prior = None
    if method != "alone":
        every = options.update_every if method in LEARNED else None
        # By its number the axis is of each kernel its own.
        mode = 0 if method == "own" else "feature"
        prior = TensorNormalRegularizer(options.strength, mode, every, "auto")
    return network_of(
        (features,),
        list(classes),
        classes,
        options.hidden if method == "hard" else None,
        prior,
        ("classifier",),
        shared_input=False,
        kernel_initializer={"classifier": "zeros"},
    )


def train_and_test(options, method, part, seed, tick=lambda: None, callbacks=None):
    """Train the classifiers of a method, and test them; results for JSON."""
    x = part.features(method, seed)
    names = list(x)
    with timed(seed) as took:
        model = make_network(options, method, part.classes, x[names[0]][0].shape[1])
        data = [
            {name: (x[name][side], part.labels[name][side]) for name in names}
            for side in range(2)
        ]
        stream = zip_tasks(data[0], options.batch_size, epoch=options.steps, seed=seed)
        watched = None
        if callbacks is not None:
            watched = zip_tasks(data[1], options.batch_size, shuffle=False)
        model.compile(
            decaying(options, options.steps * options.epochs),
            "sparse_categorical_crossentropy",
            loss_weights=options.loss_weights or None,
        )
        model.fit(
            stream,
            epochs=options.epochs,
            validation_data=watched,
            shuffle=False,
            verbose=0,
            callbacks=ticking(tick, callbacks),
        )
    outputs = predict_by_task(model, {name: x[name][1] for name in names}, 256)
    errors = errors_by_task(outputs, {name: part.labels[name][1] for name in names})
    found = {"errors": errors, "seconds": took.seconds}
    if method == "mrn":
        matrix = next(iter(mode_covariance(model, "feature").values()))
        found["variances"] = np.diagonal(matrix).astype(float).round(4).tolist()
        found["eigenvalues"] = np.linalg.eigvalsh(matrix)[::-1].round(4).tolist()
    return found


# --- tables -----------------------------------------------------------------------


def summarize(runs):
    """Error by method and number of drawings, and paired differences to weight decay."""
    rows = []
    runs = runs.assign(error=[mean_error(one) for one in runs["errors"]])
    for examples, of_count in runs.groupby("examples", sort=False):
        base = of_count[of_count.method == "decay"].set_index("seed")
        for method, group in of_count.groupby("method", sort=False):
            group = group.set_index("seed")
            row = {
                "Drawings": str(examples),
                "Method": METHODS[method],
                "Strength": "-" if method == "alone" else f"{group.strength.iloc[0]:g}",
                "Error %": mean_and_spread(100 * group.error, 1),
                "To weight decay": "-",
                "95% interval": "-",
                "Alphabets better": "-",
                "Splits": str(len(group)),
                "Seconds": mean_and_spread(group.seconds, 0),
            }
            shared = group.index.intersection(base.index)
            if method != "decay" and len(shared):
                gaps = 100 * (group.error[shared] - base.error[shared])
                row["To weight decay"] = f"{gaps.mean():+.1f}"
                if len(shared) > 1:
                    half = half_interval(gaps)
                    ends = gaps.mean() - half, gaps.mean() + half
                    row["95% interval"] = "{:.1f} to {:.1f}".format(*ends)
                means = [
                    pd.DataFrame(list(frame.errors[shared])).mean()
                    for frame in (group, base)
                ]
                better = int((means[0] < means[1]).sum())
                row["Alphabets better"] = f"{better} of {len(means[0])}"
            rows.append(row)
    return pd.DataFrame(rows)


def plot_variances(runs, path):
    """What features are worth: the learned variance of each component."""
    figure, ((axes,),) = figure_of(1, size=(5, 3.5))
    for examples, group in runs[runs.method == "mrn"].groupby("examples"):
        mean = np.mean(list(group.variances), axis=0)
        axes.plot(np.arange(1, len(mean) + 1), mean, label=f"drawings: {examples}")
    axes.axhline(1, color="grey", lw=1, ls="--", label="weight decay")
    axes.set(xlabel="principal component", ylabel="learned variance", xscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path)


class Characters(Experiment):
    """Few drawings of each character, many alphabets."""

    name = page_block = "characters"
    description = "Classifiers of many alphabets, with one covariance of features (MRN)."
    methods = METHODS
    defaults = {
        "epochs": 1,
        "batch_size": 128,
        "learning_rate": 0.1,
        "repeats": 5,
        "optimizer": "adam",
    }
    helps = {
        "batch_size": "drawings of each alphabet in a step",
        "learning_rate": "at the start; it falls along half a cosine",
    }
    settings = ("size", "components", "held_back", "epochs", "steps", "batch_size")
    settings += ("learning_rate", "optimizer", "loss_weights")
    families = {"independent": "alone"}
    early_stopping = False
    data_argument = {
        "type": pathlib.Path,
        "required": True,
        "help": "folder with images_background and images_evaluation, folders or zip files",
    }

    def add_arguments(self, p):
        p.add_argument(
            "--alphabets", type=whole(2), help="how many, in alphabetical order; else all"
        )
        p.add_argument("--size", type=whole(8), default=28, help="side of the images")
        p.add_argument(
            "--components", type=whole(1), default=100, help="the most, of the images"
        )
        p.add_argument(
            "--examples",
            nargs="+",
            type=whole(1),
            default=[1, 2, 5],
            help="drawings of each character to train on",
        )
        p.add_argument(
            "--held-back",
            type=whole(1, 1000),
            default=2,
            help="drawings of each character that the strength is chosen by",
        )
        p.add_argument(
            "--strengths",
            nargs="+",
            type=real(above=0),
            default=[0.003, 0.01, 0.03, 0.1],
            help="of the priors; several are chosen from",
        )
        p.add_argument("--update-every", type=whole(1), default=10, help="steps")
        p.add_argument("--hidden", type=whole(1), default=100, help="units of `hard`")
        p.add_argument("--steps", type=whole(1), default=300, help="of an epoch")

    def load(self, options, console):
        """The tasks, a dict from name to `ImageTask`."""
        tasks = load_alphabets(options.data, options.size, options.alphabets)
        if len(tasks) < 2:
            raise DataError(f"--data: expected 2 alphabets or more, got {list(tasks)}.")
        for examples in options.examples:
            self._split(options, tasks, options.seed, examples)
        return tasks

    def tasks(self, options, data=None):
        return None if data is None else list(data())

    def _split(self, options, tasks, seed, examples, validation=False):
        what, held_back = f"{examples} of", options.held_back
        return split(tasks, lambda _: examples, held_back, validation, seed, what)

    def _planned(self, options, tasks, digest, examples, method, seed, strength, valid):
        own = type(options)(**vars(options))
        own.strength = strength
        names = {"data": digest, "examples": examples, "seed": seed, "validation": valid}
        if method != "alone":
            names["strength"] = strength
        if method in LEARNED:
            names["update_every"] = options.update_every
        if method == "hard":
            names["hidden"] = options.hidden
        title = f"{examples} of each, seed {seed}"
        if valid:
            title += f", strength {strength:g}, validation"

        def part():
            parts = self._split(options, tasks, seed, examples, valid)
            return Part(tasks, parts, options.components)

        return self.planned(title, own, method, part, seed, names)

    def find(self, options, data, console):
        """The results with the best strengths."""
        digest = digest_of(task.images for task in data.values())

        def group(examples, method):
            def planned(strength, seed, choosing):
                of = (method, seed, strength, choosing)
                return self._planned(options, data, digest, examples, *of)

            strengths = options.strengths if method != "alone" else [0.0]
            return strengths, planned

        pairs = itertools.product(options.examples, options.methods)
        return self.find_chosen(options, console, itertools.starmap(group, pairs))

    def run(self, options, method, part, seed, tick, callbacks=None):
        return train_and_test(options, method, part, seed, tick, callbacks)

    def describe(self, found):
        return f"error {mean_error(found['errors']):.1%}"

    def errors(self, found):
        return found["errors"]

    def tables(self, options, tasks, runs):
        characters = sum(len(task.classes) for task in tasks.values())
        note = (
            f"Omniglot, {len(tasks)} alphabets, {characters} characters, "
            f"{options.components} components of images of {options.size} x "
            f"{options.size}. Mean error over the alphabets ± standard deviation over the "
            "splits; the differences are paired by split."
        )
        table = Table("Errors by drawings", summarize(runs), "table", keys=2, note=note)
        return {options.page_block: table}

    def figures(self, options, tasks, runs):
        if "mrn" not in options.methods:
            return []
        path = options.output / "variances.png"
        plot_variances(runs, path)
        return [path]


parse, main = Characters().parse, Characters().main

if __name__ == "__main__":
    main()
