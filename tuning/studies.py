"""What is searched: the experiments, and users' own models and data.

A study trains with some settings on one part of the data and tests on another. In a
search both are parts of the training data; at its end the test part is used, once.
"""

import argparse
import copy
import functools
import importlib
import math
import time

import keras
import keras_tuner as kt
import numpy as np
from sklearn.model_selection import train_test_split

from dmtrl_keras import zip_tasks
from dmtrl_keras.ground.backend import tensorflow

from . import application, spaces
from .hypermodels import FAMILIES, MultiTask

experiment = application("experiment")


class Study:
    """One method of one experiment.

    Args:
        method: a key of `methods`.
        arguments: list of str, the experiment's own arguments.
        tune: what is searched for, some of `hypermodels.TUNABLE`.
        per_layer: bool, whether ranks or thresholds are searched for each layer.
        validation_share: float in (0, 1), of the training data.

    Attributes:
        name: str, `python -m applications.<name>`.
        methods: dict from a family's name, or the experiment's own, to the latter.
        budget: name of the option that says how long is trained.
        least: int, the smallest budget.
        early_stopping: bool, whether training has epochs after which it may stop.
        objectives: dict from the name of a result to its direction.
        options: the parsed arguments, the default settings.
    """

    name = None
    methods = {}
    budget = "epochs"
    least = 1
    early_stopping = True
    objectives = {"error": "min", "parameters": "min", "seconds": "min"}

    def __init__(self, method, arguments, tune, per_layer, validation_share):
        self.family = method
        self.method = self.methods[method]
        self.tune = tune
        self.per_layer = per_layer
        self.validation_share = validation_share
        module = application(self.name)
        given = self.fixed_arguments(arguments)
        # As the experiment fills them in, and as they were given.
        self.options = module.parse(given)
        parser = module.parser()
        self.given = vars(experiment.parse_arguments(parser, given))
        del self.given["strategy"]
        self._standard = {a.dest: a.default for a in parser._actions}

    def fixed_arguments(self, arguments):
        """The arguments, with those that a search of this experiment needs."""
        return list(arguments)

    # What experiments define.

    def sharing(self, hp):
        """The method's own hyperparameters, a dict from option to value."""
        return {}

    def learn(self, options, validation, repeat, tick, callbacks):
        """Train and test.

        Args:
            options: parsed arguments.
            validation: bool; whether to test on a part of the training data.
            repeat: int, which draw.
            tick: function without arguments, called after each epoch.
            callbacks: None, or Keras callbacks.

        Returns:
            A dict of floats, the objectives among them.
        """
        raise NotImplementedError

    @property
    def tasks(self):
        """The names of the tasks."""
        raise NotImplementedError

    # What they have in common.

    def settings(self, hp):
        """The settings that hyperparameters stand for, a dict from option to value."""
        options = self.options
        name, rate = spaces.optimizer_and_rate(hp, options.optimizer, self.rate, self.tune)
        weights = spaces.loss_weights(hp, self.tasks, options.loss_weights, self.tune)
        found = {"optimizer": name, "loss_weights": weights, **self.rate_settings(rate)}
        if "dropout" in self.tune and hasattr(options, "dropout"):
            most = max(0.6, options.dropout)
            found["dropout"] = hp.Float("dropout", 0.0, most, default=options.dropout)
        return found | (self.sharing(hp) if "sharing" in self.tune else {})

    @property
    def rate(self):
        """The default learning rate."""
        return self.options.learning_rate

    def rate_settings(self, rate):
        """The option of the learning rate."""
        return {"learning_rate": rate}

    def with_settings(self, settings, budget=None):
        """The options with some settings, and another budget."""
        options = copy.copy(self.options)
        for name, value in settings.items():
            setattr(options, name, value)
        if budget is not None:
            setattr(options, self.budget, max(self.least, budget))
        return options

    def epochs(self, options):
        """How often `learn` calls `tick`."""
        return getattr(options, self.budget)

    def config(self, settings):
        """All settings that differ from the experiment's own, for `--config`."""
        left_out = {"config", "output", "readme", "readme_block", "help", "methods"}
        changed = {
            name: _plain(value)
            for name, value in self.given.items()
            if name not in left_out and value != self._standard.get(name)
        }
        return changed | {"methods": [self.method]} | settings

    def command(self, path):
        """How the experiment is run with the settings in a file."""
        return f"python -m {application(self.name).__name__} --config {path}"

    def describe(self):
        """What a search must be the same in, to be resumed: a dict for JSON."""
        return {
            "experiment": self.name,
            "method": self.family,
            "arguments": _plain(self.given),
        }

    def stopping(self, patience):
        """Callbacks that end a training which doesn't improve; None without patience."""
        if patience is None:
            return None
        return [keras.callbacks.EarlyStopping("val_loss", patience=patience)]

    def keep(self, folder):
        """Save what the last `learn` has trained, where that is kept; returns the path."""
        return None


def _plain(value):
    """A setting as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value if isinstance(value, (int, float, bool, type(None))) else str(value)


def _held_out(indices, labels, share, seed):
    """`(train, valid)`, parts of the indices with the same shares of the labels.

    Where a class is too small for that, any examples.
    """
    own = labels[indices]
    counts = np.unique(own, return_counts=True)[1]
    held = math.ceil(share * len(indices))
    enough = counts.min() > 1 and min(held, len(indices) - held) >= len(counts)
    return train_test_split(
        indices,
        test_size=share,
        random_state=seed,
        stratify=own if enough else None,
    )


def _held_out_by_task(parts, tasks, share, seed):
    """For each task, `(train, valid)` of its training part.

    Args:
        parts: dict from task to `(train, test)`, indices.
        tasks: dict from task to what has `labels`.
        share: float.
        seed: int.
    """
    return {
        name: _held_out(train, tasks[name].labels, share, seed)
        for name, (train, _) in parts.items()
    }


def _errors(accuracy):
    """The error of each task, from a dict of accuracies."""
    return {f"{name}_error": 1 - value for name, value in accuracy.items()}


def _results(errors, found):
    """What `learn` returns, of the tasks' errors and an experiment's results."""
    return {
        "error": float(np.mean(list(errors.values()))),
        **errors,
        "parameters": found["parameters"],
        "seconds": found["seconds"],
    }


class Mnist(Study):
    """Ten digits as ten tasks."""

    name = "mnist"
    least = 2
    methods = {
        "stl": "stl",
        "independent": "stl",
        "ud-mtl": "ud-mtl",
        "hard": "ud-mtl",
        "laf": "laf",
        "tucker": "tucker",
        "tt": "tt",
    }
    objectives = Study.objectives | {"multiclass_error": "min"}

    @property
    def tasks(self):
        return [str(digit) for digit in range(10)]

    def sharing(self, hp):
        if self.method == "stl":
            return {}
        if self.method == "ud-mtl":
            default = self.options.shared_layers
            default = 3 if default == "cv" else default
            return {"shared_layers": hp.Int("shared_layers", 1, 3, default=default)}
        tolerance, ranks = spaces.factorization(
            hp, application("mnist").LAYERS, self.options.tolerance, self.per_layer
        )
        return {"tolerance": tolerance} if ranks is None else {"ranks": ranks}

    @functools.cached_property
    def _data(self):
        return application("digits").load_digits(self.options.data)

    def learn(self, options, validation, repeat, tick, callbacks):
        mnist, digits = application("mnist"), self._data
        seed = options.seed + 1000 * repeat
        chosen = mnist.draw(digits, options.fraction[0], seed)
        images, labels = digits.train_images, digits.train_labels
        if validation:
            chosen, valid = _held_out(chosen, labels, self.validation_share, seed)
            digits = digits._replace(test_images=images[valid], test_labels=labels[valid])
        watch = None
        if callbacks is not None:
            watch = (callbacks, digits.test_images, digits.test_labels)
        trainer = mnist.Trainer(options, images[chosen], labels[chosen], seed, tick, watch)
        found = mnist.run(trainer, options, digits, self.method)
        return {
            # The mean over the ten tasks.
            "error": found["binary_error"],
            "multiclass_error": found["multiclass_error"],
            "parameters": found["parameters"],
            "seconds": found["seconds"],
        }


class Mtal(Study):
    """Tasks that are data sets of different images and labels."""

    name = "mtal"
    methods = {
        "single": "single",
        "independent": "single",
        "shared": "shared",
        "hard": "shared",
        "stitch": "stitch",
        "nddr": "nddr",
        "mtal": "mtal",
        "similar": "mtal",
        "mtal_r": "mtal_r",
        "mtal_apart": "mtal_apart",
    }

    @property
    def tasks(self):
        return list(self.options.sources)

    def sharing(self, hp):
        if self.method in ("stitch", "nddr"):
            return {"fusion_rate": spaces.around(hp, "fusion_rate", 1.0, 100)}
        if self.method not in application("mtal").SIMILAR:
            return {}
        blocks = [f"block{number}" for number in range(1, 6)]
        default = self.options.threshold[0]
        return {"threshold": spaces.threshold(hp, default, blocks, self.per_layer)}

    @functools.cached_property
    def _data(self):
        return application("mtal").load(self.options)

    def learn(self, options, validation, repeat, tick, callbacks):
        mtal, seed = application("mtal"), options.seed + repeat
        parts = mtal.split(self._data, options, seed)
        if validation:
            parts = _held_out_by_task(parts, self._data, self.validation_share, seed)
        found = mtal.run(
            options, self.method, self._data, parts, seed, tick, watch=callbacks
        )
        return _results(_errors(found["accuracy"]), found)


class Mtfl(Study):
    """Landmarks and pose of faces."""

    name = "mtfl"
    methods = {
        "stl": "stl",
        "independent": "stl",
        "mtl": "mtl",
        "hard": "mtl",
        "trn-output": "trn-output",
        "trn": "trn",
    }

    @property
    def tasks(self):
        return list(application("mtfl").TASKS)

    def sharing(self, hp):
        if not self.method.startswith("trn"):
            stages = application("mtfl").STAGES
            if self.method == "stl":
                return {}
            default = self.options.shared_stages
            return {"shared_stages": hp.Int("shared_stages", 1, stages, default=default)}
        weights = {"output": self.options.output_weight}
        if self.method == "trn":
            weights["hidden"] = self.options.hidden_weight
        weights, momentum = spaces.relation(hp, weights, self.options.momentum)
        found = {f"{name}_weight": weight for name, weight in weights.items()}
        return found | {"momentum": momentum}

    @functools.cached_property
    def _data(self):
        return application("mtfl").load(self.options)[:2]

    def learn(self, options, validation, repeat, tick, callbacks):
        mtfl, seed = application("mtfl"), options.seed + repeat
        training, testing = self._data
        if validation:
            train, valid = _held_out(
                np.arange(len(training.pose)), training.pose, self.validation_share, seed
            )
            # Faces as the test images are.
            own = mtfl.Faces(*(x[valid] for x in training))
            testing = mtfl.cut_out(own, options.extent, np.random.default_rng(seed))
            training = mtfl.Faces(*(x[train] for x in training))
        found = mtfl.run(options, self.method, training, testing, seed, tick, callbacks)
        errors = {"landmarks_error": found["error"], "pose_error": 1 - found["accuracy"]}
        return _results(errors, found | {"parameters": found["weights"]})


class OfficeCaltech(Study):
    """Domains as tasks."""

    name = "office_caltech"
    budget = "steps"
    early_stopping = False
    methods = {
        "stl": "stl",
        "independent": "stl",
        "mtcnn": "mtcnn",
        "shared": "shared",
        "hard": "shared",
        "drn8": "drn8",
        "drn-bi": "drn-bi",
        "drn": "drn",
        "mrn": "mrn",
    }

    @property
    def tasks(self):
        return list(self._data[0])

    @property
    def rate(self):
        rates = sorted(self.options.learning_rates)
        return rates[len(rates) // 2]

    def rate_settings(self, rate):
        return {"learning_rates": [rate]}

    def sharing(self, hp):
        strengths = sorted(self.options.strengths)
        strength = strengths[len(strengths) // 2]
        if application("office_caltech").METHODS[self.method]["prior"] is None:
            return {"strengths": [strength]}
        strength, epsilon = spaces.prior(hp, strength, self.options.epsilon)
        return {"strengths": [strength], "epsilon": epsilon}

    def epochs(self, options):
        return 1

    @functools.cached_property
    def _data(self):
        from rich.console import Console

        return application("office_caltech").load(self.options, Console())

    def learn(self, options, validation, repeat, tick, callbacks):
        office = application("office_caltech")
        domains, classes, new_backbone, _ = self._data
        seed = options.seed + 1000 * repeat
        parts = application("domains").draw(
            domains, options.fractions[0], seed, options.stratified
        )
        if validation:
            parts = _held_out_by_task(parts, domains, self.validation_share, seed)
        trainer = office.Trainer(options, domains, len(classes), new_backbone, tick)
        found, _ = office.run(trainer, options, self.method, parts, seed)
        return _results(_errors(found["accuracy"]), found)


class Celeba(Study):
    """Attributes of faces; CelebA has a validation part of its own."""

    name = "celeba"
    methods = {"mtl": "mtl", "hard": "mtl", "trn": "trn"}
    objectives = Study.objectives | {"precision": "max"}

    def fixed_arguments(self, arguments):
        needed = [] if "--classification" in arguments else ["--classification"]
        return [*needed, "--tables", "2", *arguments]

    @property
    def tasks(self):
        return self.options.attributes or list(self._data["train"].labels)

    def sharing(self, hp):
        if self.method != "trn":
            return {}
        weights, momentum = spaces.relation(
            hp, {"output": self.options.weight}, self.options.momentum
        )
        return {"weight": weights["output"], "momentum": momentum}

    @functools.cached_property
    def _data(self):
        o = self.options
        return application("celeba").load_images(o.data, o.size, o.images)

    def learn(self, options, validation, repeat, tick, callbacks):
        parts = dict(self._data)
        if validation:
            parts["test"] = parts["validation"]
        found = application("celeba").run(
            options, self.method, self.tasks, parts, options.seed + repeat, tick, callbacks
        )
        return {
            "error": float(np.mean(list(found["error"].values()))),
            "precision": float(np.mean(list(found["precision"].values()))),
            "parameters": found["parameters"],
            "seconds": found["seconds"],
        }


EXPERIMENTS = {study.name: study for study in (Mnist, Mtal, Mtfl, OfficeCaltech, Celeba)}


class Own(Study):
    """A user's own backbone and data, by any family.

    Args:
        method: a key of `methods`; `"own"`: the model as it is.
        arguments: list of str.
        tune: as for `Study`.
        per_layer: as for `Study`.
        validation_share: as for `Study`.
        model: `"module:function"`. The function returns a backbone for
            `dmtrl_keras.multitask`; for `"own"` it takes `keras_tuner.HyperParameters` and
            returns the whole model, not compiled.
    """

    name = "own"
    methods = {**{method: method for method in FAMILIES}, "own": "own"}
    objectives = {"task_loss": "min", "parameters": "min", "seconds": "min"}
    _trained = None

    def __init__(self, method, arguments, tune, per_layer, validation_share, model):
        self.family = self.method = method
        self.tune = tune
        self.validation_share = validation_share
        parser = self.parser()
        self.options = experiment.parse_arguments(parser, arguments)
        self.given = vars(copy.copy(self.options)) | {"model": model}
        del self.given["strategy"]
        self._declared = False
        try:
            make, data = _function(model), _function(self.options.data)
        except ValueError as error:
            parser.error(str(error))
        self._data = _checked(data(), self.options.data)
        family = FAMILIES.get(method, Whole)
        self.hypermodel = family(
            method,
            make,
            self._data["losses"],
            heads=self._data.get("heads"),
            metrics=self._data.get("metrics"),
            tune=tune,
            per_layer=per_layer,
            shared_input=not self.per_task,
            optimizer=self.options.optimizer,
            learning_rate=self.options.learning_rate,
            loss_weights=self.options.loss_weights,
            defaults={name: getattr(self.options, name) for name in family.defaults},
        )

    @staticmethod
    def parser():
        """The arguments beside those of every search."""
        p = argparse.ArgumentParser(
            prog="python -m tuning.search --model MODULE:FUNCTION",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        positive = experiment.in_range(float, 0)
        p.add_argument("--data", required=True, metavar="MODULE:FUNCTION")
        p.add_argument("--epochs", type=experiment.in_range(int, 0), default=10)
        p.add_argument("--batch-size", type=experiment.in_range(int, 0), default=32)
        p.add_argument("--learning-rate", type=positive, default=1e-3)
        experiment.add_training(p, "adam")
        p.add_argument("--tolerance", type=experiment.in_range(float, 0, 1), default=0.1)
        p.add_argument(
            "--threshold", type=experiment.in_range(float, -1e-9, 1), default=0.4
        )
        p.add_argument("--strength", type=positive, default=1e-3, help="of a prior")
        p.add_argument("--epsilon", type=positive, default=1e-3, help="of a prior")
        p.add_argument("--update-every", type=experiment.in_range(int, 0), default=10)
        p.add_argument("--output-weight", type=positive, default=0.01, help="TRN's λ")
        p.add_argument("--momentum", type=float, default=0.99, help="of TRN")
        p.add_argument("--share-until", help="TRN: the last layer that tasks share")
        p.add_argument("--seed", type=int, default=0)
        return p

    @property
    def per_task(self):
        """Whether each task has examples of its own."""
        return isinstance(self._data["train"][0], dict)

    @property
    def tasks(self):
        return list(self._data["losses"])

    def settings(self, hp):
        if not self._declared:
            self.hypermodel.build(hp)
            self._declared = True
        return {
            name: value
            for name, value in hp.values.items()
            if not name.startswith("tuner/")
        }

    def with_settings(self, settings, budget=None):
        options = super().with_settings({}, budget)
        options.values = settings
        return options

    def config(self, settings):
        return {**self.describe(), "hyperparameters": settings}

    def command(self, path):
        return None

    def learn(self, options, validation, repeat, tick, callbacks):
        seed = options.seed + repeat
        train, test = self._parts(validation, seed)
        keras.utils.set_random_seed(seed)
        hp = kt.HyperParameters()
        hp.values = dict(options.values)
        model = self.hypermodel.build(hp)
        started = time.perf_counter()
        watched = None if callbacks is None else self._stream(options, test)
        model.fit(
            self._stream(options, train, seed),
            validation_data=watched,
            epochs=options.epochs,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: tick()),
                *(callbacks or ()),
            ],
        )
        seconds = time.perf_counter() - started
        found = model.evaluate(self._stream(options, test), verbose=0, return_dict=True)
        # Keras's losses by task are means over batches, of which the last one is smaller.
        found |= self._losses(model, test, options.batch_size)
        self._trained = model
        return {
            # Without penalties, and with equal weights, which may be searched for.
            "task_loss": float(np.mean([found[f"{task}_loss"] for task in self.tasks])),
            **{f"val_{name}": float(value) for name, value in found.items()},
            "parameters": experiment.trainable_parameters(model),
            "seconds": seconds,
        }

    def _losses(self, model, part, batch_size):
        """The mean loss of each task over a part of the data, a dict."""
        x, y = part
        if self.per_task:
            outputs = experiment.predict_by_task(model, x, batch_size)
        else:
            outputs = model.predict(x, batch_size=batch_size, verbose=0)
        found = {}
        for task, loss in self._data["losses"].items():
            values = keras.losses.get(loss)(y[task], outputs[task])
            found[f"{task}_loss"] = float(np.mean(keras.ops.convert_to_numpy(values)))
        return found

    def _parts(self, validation, seed):
        """`(train, test)`, each `(x, y)`."""
        train = self._data["train"]
        if not validation:
            return train, self._data["test"]
        if "validation" in self._data:
            return train, self._data["validation"]
        x, y = train
        if self.per_task:
            parts = {}
            for task in x:
                split = train_test_split(
                    np.arange(len(x[task])),
                    test_size=self.validation_share,
                    random_state=seed,
                )
                parts[task] = split
            return tuple(
                tuple({t: of[t][parts[t][n]] for t in x} for of in (x, y)) for n in range(2)
            )
        split = train_test_split(
            np.arange(len(x)), test_size=self.validation_share, random_state=seed
        )
        return tuple((x[n], {task: y[task][n] for task in y}) for n in split)

    def _stream(self, options, part, seed=None):
        """Batches of a part of the data; shuffled if there is a seed."""
        x, y = part
        if self.per_task:
            data = {task: (x[task], y[task]) for task in x}
            shuffle = seed is not None
            return zip_tasks(data, options.batch_size, shuffle=shuffle, seed=seed)
        data = tensorflow().data.Dataset.from_tensor_slices((x, y))
        if seed is not None:
            count = experiment.whole_batches(options, len(x))
            data = data.shuffle(len(x), seed, True).take(count)
        return data.batch(options.batch_size).prefetch(tensorflow().data.AUTOTUNE)

    def keep(self, folder):
        path = folder / "best.keras"
        self._trained.save(path)
        return path


class Whole(MultiTask):
    """A model that is tuned as it is, with hyperparameters of its own."""

    methods = ("own",)

    def network(self, hp):
        return self._backbone(hp)


def _function(name):
    """What `module:function` stands for."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"expected MODULE:FUNCTION. Received: {name!r}")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _checked(data, owner):
    """The data of a user's function.

    Args:
        data: dict with `"train"` and `"test"`, and perhaps `"validation"`, each `(x, y)`:
            `x` an array, or a dict of one for each task that has examples of its own, `y` a
            dict of arrays by task; `"losses"`, a dict by task; and perhaps `"heads"` and
            `"metrics"`, as `multitask` and `compile` take them.
        owner: str, for errors.

    Raises:
        ValueError: if it is not in that form.
    """
    parts = ("train", "validation", "test")
    known = {*parts, "losses", "heads", "metrics"}
    needed = {"train", "test", "losses"}
    if not isinstance(data, dict) or not needed <= set(data) <= known:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"--data {owner}: expected a dict with {sorted(needed)}, and perhaps "
            f"{sorted(known - needed)}. Received: {found}."
        )
    tasks = set(data["losses"])
    for part in parts:
        if part not in data:
            continue
        x, y = data[part]
        inputs = x if isinstance(x, dict) else dict.fromkeys(y, x)
        if set(y) != tasks or set(inputs) != tasks:
            raise ValueError(
                f"--data {owner}: {part!r} must have labels (and inputs, if they are "
                f"by task) for {sorted(tasks)}. Received: {sorted(y)}, {sorted(inputs)}."
            )
        lengths = {task: (len(inputs[task]), len(y[task])) for task in y}
        if any(one != other or not one for one, other in lengths.values()):
            raise ValueError(
                f"--data {owner}: {part!r} must have as many labels as inputs, and some. "
                f"Received: {lengths}."
            )
    return data
