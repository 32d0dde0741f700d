"""What is searched: an experiment with some settings.

A study trains with some settings on one part of the data and tests on another. In a
search both are parts of the training data; at its end the test part is used, once.
"""

import copy
import functools
import warnings

import keras

from . import application
from .spaces import Space, explore, of_method

arguments = application("arguments")
experiment = application("experiment")
files = application("files")
EXPERIMENTS = experiment.EXPERIMENTS
ALL = "all"


class Study:
    """One method with some settings, or several of which one is searched for, too.

    Args:
        family: a name from `families`, or a list of them; of `"all"` alone, all that fit.
        tune: what is searched for, some of `hypermodels.TUNABLE`.
        validation_share: float in (0, 1), of the training data.

    Attributes:
        name: str.
        families: the names that a search knows its methods by.
        family: str, as it was given.
        methods: list of the methods.
        left_out: dict from those that don't fit to the reason.
        model: the Keras model that `learn` has trained last; None: there is none.
        budget: name of the option that says how long is trained.
        least: int, the smallest budget.
        early_stopping: bool, whether training has epochs after which it may stop.
        objectives: dict from the name of a result to its direction.
        options: the parsed arguments, the default settings.
        given: dict of these, as they were given.
    """

    name = None
    families = ()
    budget = "epochs"
    least = 1
    early_stopping = True
    objectives = {}
    model = None

    def __init__(self, family, tune, validation_share):
        self.methods = [family] if isinstance(family, str) else list(family)
        self.family = "-".join(self.methods)
        self.left_out = {}
        self.tune = tune
        self.validation_share = validation_share

    @property
    def several(self):
        """Whether the method is searched for."""
        return len(self.methods) > 1

    def parse(self, parser, given):
        """Parse arguments for `options`, and for `given`."""
        options = arguments.parse_arguments(parser, given)
        self.given = {k: v for k, v in vars(options).items() if k != "strategy"}
        return options

    def load(self):
        """Load the data, so that what is wrong with it is known before a search begins."""

    def declare(self, hp):
        """Declare all hyperparameters, which have their defaults then."""
        explore(hp, self.settings, self.methods)

    def firsts(self):
        """What the first trials have other than the defaults: each of the methods."""
        return [{"method": name} for name in self.methods] if self.several else [{}]

    def own(self, values):
        """Values of hyperparameters, those of a method by their own names."""
        return of_method(values) if self.several else values

    def settings(self, hp):
        """The settings that hyperparameters stand for, a dict from option to value."""
        raise NotImplementedError

    def with_settings(self, settings, budget=None):
        """The options with some settings, and another budget."""
        options = copy.copy(self.options)
        for name, value in settings.items():
            setattr(options, name, value)
        if budget is not None:
            setattr(options, self.budget, max(self.least, budget))
        return options

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

    def ticks(self, options):
        """How often `learn` calls `tick`."""
        return getattr(options, self.budget)

    def config(self, settings):
        """What the file of the best settings has."""
        raise NotImplementedError

    def command(self, path):
        """How the settings in a file are run; None if there is no command for it."""
        return None

    def describe(self):
        """What a search must be the same in, to be resumed: a dict for JSON."""
        return {
            "experiment": self.name,
            "method": self.methods if self.several else self.family,
            "arguments": plain(self.given),
        }

    def stopping(self, patience):
        """Callbacks that end a training which doesn't improve; None without patience."""
        if patience is None:
            return None
        return [keras.callbacks.EarlyStopping("val_loss", patience=patience)]

    def keep(self, folder):
        """Save the model that the last `learn` has trained, as `best.keras`.

        Where it has none, or one that can't be saved, what was there before is deleted: it
        is not that of the best settings any more.

        Returns:
            The path; None if there is no file.
        """
        path = folder / "best.keras"
        if self.model is not None:
            try:
                with files.replacing(path) as part:
                    self.model.save(part)
                return path
            except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                warnings.warn(f"The model could not be saved: {error}", stacklevel=2)
        path.unlink(missing_ok=True)
        return None


class ExperimentStudy(Study):
    """One method of one experiment, or several.

    Args:
        name: str, one of `EXPERIMENTS`.
        family: a family of `hypermodels`, or the experiment's own name of a method; or as
            for `Study`. `"all"` are those that the experiment runs by default.
        given: list of str, the experiment's own arguments.
        tune: as for `Study`.
        per_layer: bool, whether ranks or thresholds are searched for each layer.
        validation_share: as for `Study`.
    """

    def __init__(self, name, family, given, tune, per_layer, validation_share):
        super().__init__(family, tune, validation_share)
        self.experiment = found = experiment.experiment_of(name)
        lack = found.lack("draw", "hold_out", "load", "run", "tasks")
        if lack is not None:
            raise NotImplementedError(f"{lack} A search needs it.")
        self.name = name
        self.per_layer = per_layer
        self.budget = found.budget
        self.least = found.least.get(found.budget, 1)
        self.early_stopping = found.early_stopping
        self.objectives = found.objectives
        parser = found.parser()
        given = found.search_arguments(given)
        if self.methods == [ALL]:
            searched = found.searched or found.methods
            default = found.default_methods or found.methods
            self.methods = [name for name in default if name in searched]
        else:
            families = families_of(name)
            self.methods = list(dict.fromkeys(families[one] for one in self.methods))
        if self.several:
            # By which the experiment knows which of them fit.
            given = [*given, "--methods", *self.methods]
        self.options = self.parse(parser, given)
        found.complete(parser, self.options)
        if self.several:
            fits = self.options.methods
            left_out = [name for name in self.methods if name not in fits]
            reason = "it does not fit the experiment's arguments"
            self.left_out = dict.fromkeys(left_out, reason)
            self.methods = [name for name in self.methods if name in fits]
        self._standard = {a.dest: a.default for a in parser._actions}

    @functools.cached_property
    def data(self):
        """The experiment's data, loaded when it is needed."""
        return self.experiment.loaded(self.options, experiment.make_console())

    def load(self):
        return self.data

    def tasks(self):
        """The names of the tasks."""
        return self.experiment.tasks(self.options, lambda: self.data)

    def settings(self, hp):
        options, found = self.options, self.experiment
        space = Space(hp, self.tune, self.per_layer)
        if self.several:
            # Before those of all methods.
            hp.Choice("method", self.methods)
        name, rate = space.optimizer_and_rate(options.optimizer, found.rate(options))
        weights = space.loss_weights(self.tasks, options.loss_weights)
        settings = {"optimizer": name, "loss_weights": weights, **found.with_rate(rate)}
        if "dropout" in self.tune and hasattr(options, "dropout"):
            most = max(0.6, options.dropout)
            settings["dropout"] = hp.Float("dropout", 0, most, default=options.dropout)

        def of(method):
            return found.space(method, options, space) if "sharing" in self.tune else {}

        method, own = space.chosen(self.methods, of)
        if self.several:
            settings["methods"] = [method]
        return settings | own

    def learn(self, options, validation, repeat, tick, callbacks):
        found = self.experiment
        method = (options.methods if self.several else self.methods)[0]
        seed = options.seed + found.draw_step * repeat
        part = found.draw(options, self.data, seed)
        if validation:
            part = found.hold_out(part, options, self.validation_share, seed)
        tick = experiment.Tick(tick)
        results = found.run(options, method, part, seed, tick, callbacks)
        self.model = tick.model
        return found.scores(results) | found.costs(results)

    def ticks(self, options):
        return self.experiment.ticks(options)

    def config(self, settings):
        """All settings that differ from the experiment's own, for `--config`."""
        left_out = {"config", "output", "page", "page_block", "help", "methods"}
        changed = {
            name: plain(value)
            for name, value in self.given.items()
            if name not in left_out and value != self._standard.get(name)
        }
        return changed | {"methods": self.methods} | settings

    def command(self, path):
        module = type(self.experiment).__module__
        return f"python -m {module} --config {path}"


def families_of(name):
    """The families that an experiment has, a dict from their names to its methods."""
    found = experiment.experiment_of(name)
    methods = found.searched or found.methods
    return {method: method for method in methods} | found.families


def plain(value):
    """A setting as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return value if isinstance(value, (int, float, bool, type(None))) else str(value)
