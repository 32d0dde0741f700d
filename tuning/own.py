"""What is searched: a user's own backbone and data, by any family."""

import argparse
import importlib
import inspect
import time

import keras
import keras_tuner as kt
import numpy as np
from sklearn.model_selection import train_test_split

from dmtrl_keras import balancing, zip_tasks
from dmtrl_keras.ground.backend import tensorflow

from . import application
from .hypermodels import FAMILIES, MultiTask, Several
from .spaces import explore
from .studies import ALL, Study

arguments = application("arguments")
experiment = application("experiment")
DataError = application("reading").DataError


class Whole(MultiTask):
    """A model that is tuned as it is, with hyperparameters of its own."""

    methods = ("own",)

    def network(self, hp):
        return self._backbone(hp)


class Own(Study):
    """A user's own backbone and data, by any family.

    Args:
        family: one of `families`, or as for `Study`; `"own"`: the model as it is.
        given: list of str, the arguments of `parser`.
        tune: as for `Study`.
        per_layer: bool, whether ranks or thresholds are searched for each layer.
        validation_share: as for `Study`.
        model: `"module:function"`. The function returns a backbone for
            `dmtrl_keras.multitask`; for `"own"` it takes `keras_tuner.HyperParameters` and
            returns the whole model, not compiled.
    """

    name = "own"
    families = (*FAMILIES, "own")
    objectives = {"task_loss": "min", "parameters": "min", "seconds": "min"}

    def __init__(self, family, given, tune, per_layer, validation_share, model):
        super().__init__(family, tune, validation_share)
        parser = self.parser()
        self.options = self.parse(parser, given)
        self.given["model"] = model
        if self.methods == [ALL]:
            self.methods = list(FAMILIES)
        whole = "own" in self.methods
        if whole and self.several:
            parser.error("--methods: a model that is tuned as it is has no other family")
        try:
            make, data = function_of(model), function_of(self.options.data)
        except ValueError as error:
            parser.error(str(error))
        try:
            _check_call("--data", self.options.data, data)
            if not isinstance(make, keras.Model):
                _check_call("--model", model, make, *([None] * whole))
        except TypeError as error:
            parser.error(str(error))
        if not isinstance(make, keras.Model):
            make = _making_models(make, model, parser)
        self._data = checked_data(data(), self.options.data)
        common = {
            "heads": self._data.get("heads"),
            "metrics": self._data.get("metrics"),
            "tune": tune,
            "per_layer": per_layer,
            "shared_input": not self.per_task,
            "optimizer": self.options.optimizer,
            "learning_rate": self.options.learning_rate,
            "loss_weights": self.options.loss_weights,
        }
        kinds = {name: FAMILIES.get(name, Whole) for name in self.methods}
        defaults = {name: self._given_of(kind) for name, kind in kinds.items()}
        losses = self._data["losses"]
        if not self.several:
            ((name, kind),) = kinds.items()
            self.hypermodel = kind(name, make, losses, defaults=defaults[name], **common)
            return
        try:
            found = Several(self.methods, make, losses, defaults=defaults, **common)
        except ValueError as error:
            parser.error(f"--methods: {error}")
        self.hypermodel, self.left_out = found, found.left_out
        self.methods = list(found.families)

    def _given_of(self, kind):
        """A family's defaults that were given as arguments."""
        found = {name: getattr(self.options, name) for name in kind.defaults}
        return {name: value for name, value in found.items() if value is not None}

    @staticmethod
    def parser():
        """The arguments beside those of every search."""
        p = argparse.ArgumentParser(
            prog="python -m tuning.search --model MODULE:FUNCTION",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        positive = arguments.real(above=0)
        p.add_argument("--data", required=True, metavar="MODULE:FUNCTION")
        p.add_argument("--epochs", type=arguments.whole(1), default=10)
        p.add_argument("--batch-size", type=arguments.whole(1), default=32)
        p.add_argument("--learning-rate", type=positive, default=1e-3)
        arguments.add_training(p, "adam")
        p.add_argument("--tolerance", type=arguments.real(above=0, below=1), default=0.1)
        p.add_argument(
            "--task-rank", type=arguments.whole(1), help="of Tucker and TT; by default full"
        )
        p.add_argument("--rank", type=arguments.whole(1), default=4, help="of LoRA")
        p.add_argument("--threshold", type=arguments.real(least=0, most=1), default=0.4)
        p.add_argument(
            "--strength", type=positive, help="of a prior or a norm; by default its own"
        )
        p.add_argument("--epsilon", type=positive, default=1e-2, help="of a prior")
        p.add_argument("--update-every", type=arguments.whole(1), default=10)
        p.add_argument("--output-weight", type=positive, default=0.01, help="TRN's λ")
        p.add_argument("--momentum", type=arguments.MOMENTUM, default=0.99, help="of TRN")
        p.add_argument(
            "--balancing",
            choices=balancing.names(),
            help="of hard sharing, balanced; by default Nash-MTL",
        )
        p.add_argument("--share-until", help="TRN: the last layer that tasks share")
        p.add_argument("--seed", type=arguments.SEED, default=0)
        return p

    @property
    def per_task(self):
        """Whether each task has examples of its own."""
        return isinstance(self._data["train"][0], dict)

    @property
    def tasks(self):
        return list(self._data["losses"])

    def declare(self, hp):
        explore(hp, self.hypermodel.build, self.methods)

    def settings(self, hp):
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
        own = self.own(settings)
        method = own.pop("method") if self.several else self.family
        return {**self.describe(), "method": method, "hyperparameters": own}

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
            callbacks=experiment.ticking(tick, callbacks),
        )
        seconds = time.perf_counter() - started
        found = model.evaluate(self._stream(options, test), verbose=0, return_dict=True)
        # Keras's losses by task are means over batches, of which the last one is smaller.
        found |= self._losses(model, test, options.batch_size)
        self.model = model
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
            parts = {task: self._split(len(x[task]), seed) for task in x}
            return tuple(
                tuple({t: of[t][parts[t][n]] for t in x} for of in (x, y)) for n in range(2)
            )
        split = self._split(len(x), seed)
        return tuple((x[n], {task: y[task][n] for task in y}) for n in split)

    def _split(self, count, seed):
        share = self.validation_share
        return train_test_split(np.arange(count), test_size=share, random_state=seed)

    def _stream(self, options, part, seed=None):
        """Batches of a part of the data; shuffled if there is a seed."""
        x, y = part
        if self.per_task:
            data = {task: (x[task], y[task]) for task in x}
            shuffle = seed is not None
            return zip_tasks(data, options.batch_size, shuffle=shuffle, seed=seed)
        data = tensorflow().data.Dataset.from_tensor_slices((x, y))
        if seed is not None:
            count = arguments.whole_batches(options, len(x))
            data = data.shuffle(len(x), seed, True).take(count)
        return data.batch(options.batch_size).prefetch(tensorflow().data.AUTOTUNE)


def function_of(name):
    """What `module:function` stands for."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"expected MODULE:FUNCTION. Received: {name!r}")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _check_call(flag, name, function, *arguments):
    """Refuse what can't be called with the arguments that a search gives it.

    Raises:
        TypeError: with the function and what it is called with.
    """
    given = "`keras_tuner.HyperParameters` alone" if arguments else "no arguments"
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{flag} {name}: expected a function that is called with {given}. "
            f"Received: {error}."
        ) from error
    except ValueError:  # Some built-in functions don't tell what they take.
        pass


def _making_models(function, name, parser):
    """A user's function of a backbone or model; what else it returns ends the program."""

    def make(*arguments):
        try:
            model = function(*arguments) if callable(function) else function
        except TypeError as error:
            # With its traceback: it may be a mistake within the function.
            raise TypeError(f"--model {name}: {error}") from error
        if not isinstance(model, keras.Model):
            parser.error(
                f"--model {name}: expected a function that returns a Keras model. "
                f"Received: {type(model).__name__}."
            )
        return model

    return make


def checked_data(data, owner):
    """The data of a user's function.

    Args:
        data: dict with `"train"` and `"test"`, and perhaps `"validation"`, each `(x, y)`:
            `x` an array, or a dict of one for each task that has examples of its own, `y` a
            dict of arrays by task; `"losses"`, a dict by task; and perhaps `"heads"` and
            `"metrics"`, as `multitask` and `compile` take them.
        owner: str, for errors.

    Raises:
        DataError: if it is not in that form.
    """
    parts = ("train", "validation", "test")
    known = {*parts, "losses", "heads", "metrics"}
    needed = {"train", "test", "losses"}
    if not isinstance(data, dict) or not needed <= set(data) <= known:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise DataError(
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
            raise DataError(
                f"--data {owner}: {part!r} must have labels (and inputs, if they are "
                f"by task) for {sorted(tasks)}. Received: {sorted(y)}, {sorted(inputs)}."
            )
        lengths = {task: (len(inputs[task]), len(y[task])) for task in y}
        if any(one != other or not one for one, other in lengths.values()):
            raise DataError(
                f"--data {owner}: {part!r} must have as many labels as inputs, and some. "
                f"Received: {lengths}."
            )
    return data
