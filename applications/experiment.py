"""What experiments have in common: the command, and what a search needs of it.

An experiment is one file here with a subclass of `Experiment`, of which the file has one
object, `EXPERIMENT`, and its name in `EXPERIMENTS` below.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import math
import pathlib
import shutil
import time
import types
import typing

import keras
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split

from dmtrl_keras.ground.tables import make_console, print_table

from .arguments import (
    OPTIMIZERS,
    REPEATS,
    SEED,
    add_page,
    add_training,
    check_names,
    check_page,
    parse_arguments,
    real,
    whole,
)
from .files import replacing, working_in, write
from .reading import one_line
from .results import (
    BestModels,
    Results,
    Run,
    Tick,
    has_block,
    markdown_table,
    run_all,
    write_block,
)

# All experiments that a search knows, by the names of their modules.
EXPERIMENTS = ("mnist", "mtal", "mtfl", "office_caltech", "celeba", "omniglot")


def experiment_of(name):
    """The object that is an experiment, by the name of its module."""
    return importlib.import_module(f".{name}", __package__).EXPERIMENT


class Table(typing.NamedTuple):
    """A table of results.

    Attributes:
        title: str, for the terminal.
        frame: data frame of strings.
        file: str, the file's name without its suffix; None: that of the page's block.
        keys: int, how many of the first columns name a row.
        note: str, which stands above the table in its file and in the page.
        optional: bool; a page need not have its marks.
    """

    title: str
    frame: pd.DataFrame
    file: str | None = None
    keys: int = 1
    note: str = ""
    optional: bool = False

    def print(self, console):
        """Print it so that it can be read in a narrow terminal."""
        rows = self.frame.to_numpy().tolist()
        print_table(
            self.title, list(self.frame), rows, self.keys, self.keys, console=console
        )

    def markdown(self):
        """The note and the table."""
        table = markdown_table(self.frame)
        return f"{self.note}\n\n{table}" if self.note else table


def publish(tables, options, console, figures=()):
    """Print tables, and write them into the folder of results and into a page.

    Args:
        tables: dict from the name of a page's block to `Table`, or to a list of them.
        options: parsed arguments: `output`, a folder that exists, and `page`.
        console: `rich.console.Console`.
        figures: paths of figures; with a page, copied to its folder of figures, where
            their names begin with that of `output`.
    """
    texts, optional = {}, set()
    for name, several in tables.items():
        several = several if isinstance(several, list) else [several]
        if any(table.optional for table in several):
            optional.add(name)
        for table in several:
            table.print(console)
        texts[name] = "\n".join(table.markdown() for table in several)
        write(options.output / f"{several[0].file or name}.md", texts[name])
    if options.page is None:
        return
    for name, text in texts.items():
        if name not in optional or has_block(options.page, name):
            write_block(options.page, name, text)
    folder = figures_of(options.page)
    for path in figures:
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"{options.output.name}_{path.name}") as part:
            shutil.copy(path, part)


def figures_of(page):
    """The folder of a page's figures, which need not be there.

    It is the folder `figures` beside the folder that the page is in, where there is one;
    else the one beside the page. The page of a repository's top has its figures there.
    """
    own = page.absolute().parent
    beside = own.parent / "figures"
    inside = beside.is_dir() and not (own / ".git").exists()
    return beside if inside else own / "figures"


def figure_of(columns, rows=1, size=(4, 3), **options):
    """A figure of Matplotlib and its axes, a list of `rows` lists.

    Args:
        columns: int.
        rows: int.
        size: width and height of one of the axes, in inches.
        **options: of `Figure.subplots`.
    """
    shape = columns * size[0], rows * size[1]
    figure = Figure(figsize=shape, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def held_out(indices, labels, share, seed):
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


def held_out_by_task(parts, tasks, share, seed):
    """For each task, `(train, valid)` of its training part.

    Args:
        parts: dict from task to `(train, test)`, indices.
        tasks: dict from task to what has `labels`.
        share: float.
        seed: int.
    """
    return {
        name: held_out(train, tasks[name].labels, share, seed)
        for name, (train, _) in parts.items()
    }


def digest_of(pieces):
    """A str that names data.

    Args:
        pieces: iterable of bytes and arrays.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece if isinstance(piece, bytes) else np.asarray(piece).tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def timed(seed=None):
    """Measure a block of a `with` statement, which has the time it took as `.seconds`.

    Args:
        seed: int, with which all random numbers begin; None: they go on.
    """
    if seed is not None:
        keras.utils.set_random_seed(seed)
    took = types.SimpleNamespace(seconds=None)
    started = time.perf_counter()
    yield took
    took.seconds = time.perf_counter() - started


def trainable_parameters(model):
    """The number of weights that are trained."""
    return sum(math.prod(v.shape) for v in model.trainable_variables)


def predict_by_task(model, inputs, batch_size):
    """Outputs by task for inputs of different lengths, dicts of arrays."""
    longest = max(len(x) for x in inputs.values())
    padded = {
        name: np.concatenate([x, np.zeros((longest - len(x), *x.shape[1:]), x.dtype)])
        for name, x in inputs.items()
    }
    outputs = model.predict(padded, batch_size=batch_size, verbose=0)
    return {name: outputs[name][: len(x)] for name, x in inputs.items()}


def hits(outputs, labels):
    """Which examples were classified right, by their greatest output.

    Args:
        outputs: array `(n, classes)`.
        labels: int array `(n,)`.

    Returns:
        A float array `(n,)`: 1 where right, 0 where wrong, NaN where an output is NaN, so
        that a network that diverged has no accuracy.
    """
    found = (outputs.argmax(axis=-1) == labels).astype(float)
    return np.where(np.isnan(outputs).any(axis=-1), np.nan, found)


def errors_by_task(outputs, labels):
    """The share of examples of each task that were classified wrong, as `hits` says."""
    return {
        name: 1 - float(np.mean(hits(output, labels[name])))
        for name, output in outputs.items()
    }


def mean_error(errors):
    """The mean over the tasks of a dict of errors."""
    return float(np.mean(list(errors.values())))


def make_optimizer(optimizer, learning_rate, weight_decay=0.0):
    """An optimizer.

    Args:
        optimizer: a key of `OPTIMIZERS`.
        learning_rate: float, or a schedule.
        weight_decay: float; in each step all weights but biases shrink by it, times the
            learning rate. 0: what the optimizer has by default.
    """
    made = OPTIMIZERS[optimizer](learning_rate)
    if weight_decay:
        made.weight_decay = weight_decay
        made.exclude_from_weight_decay(var_names=["bias"])
    return made


def decaying(options, steps, weight_decay=0.0):
    """The optimizer whose learning rate falls along half a cosine.

    Args:
        options: parsed arguments: `optimizer`, `learning_rate`.
        steps: int, of the whole training.
        weight_decay: as for `make_optimizer`.
    """
    rate = keras.optimizers.schedules.CosineDecay(options.learning_rate, steps)
    return make_optimizer(options.optimizer, rate, weight_decay)


class _EachEpoch(keras.callbacks.Callback):
    """Calls a function after each epoch, and tells a `Tick` what is trained."""

    def __init__(self, tick):
        super().__init__()
        self._tick = tick

    def on_train_begin(self, logs=None):
        if isinstance(self._tick, Tick):
            self._tick.model = self.model

    def on_epoch_end(self, epoch, logs=None):
        self._tick()


def ticking(tick, callbacks):
    """Callbacks of Keras: some, or None, and a tick after each epoch.

    Args:
        tick: function without arguments, or a `Tick`, which has the model then.
        callbacks: None, or a list.
    """
    return [_EachEpoch(tick), *(callbacks or ())]


def _needed(method):
    """A method without which an experiment can't do something; the error says which."""

    @functools.wraps(method)
    def missing(self, *arguments, **options):
        raise NotImplementedError(self.lack(method.__name__))

    missing.is_missing = True
    return missing


class Experiment:
    """One experiment.

    What the data is to be trained and tested on in a run is called its part here; what that
    is, is the experiment's own business.

    Attributes:
        name: str, `python -m applications.<name>`.
        description: str, for `--help`.
        methods: dict from a method's name to its title in tables.
        default_methods: the methods that are run by default; None: all.
        defaults: dict of the defaults of `epochs`, `batch_size`, `learning_rate`,
            `repeats`, `optimizer`, of which an experiment has those that are there.
        least: dict of the least value of some of these, where it is not 1.
        helps: dict of what `--help` says of some of these.
        settings: names of the options on which the results of every run depend.
        families: dict from a family of `tuning.hypermodels` to the method that it is, where
            their names differ.
        searched: the methods that can be searched; None: all.
        objectives: dict from the name of a score to its direction.
        budget: the option that says how long is trained.
        early_stopping: bool, whether training has epochs after which it may stop.
        repeats: the option that says how often is drawn.
        draw_step: int, how far apart the seeds of two draws are.
        data_argument: dict of the options of the argument `--data`; None: there is none.
        page_block: str, the name of the page's block that `--page-block` is for; None:
            there is no such argument.
    """

    name = None
    description = None
    methods = {}
    default_methods = None
    defaults = {}
    least = {}
    helps = {}
    settings = ()
    families = {}
    searched = None
    objectives = {"error": "min", "parameters": "min", "seconds": "min"}
    budget = "epochs"
    early_stopping = True
    repeats = "repeats"
    draw_step = 1
    data_argument = None
    page_block = None

    # --- what an experiment defines ---------------------------------------------------

    def add_arguments(self, p):
        """Add the experiment's own arguments to the command's."""

    def check(self, p, options):
        """Check the parsed arguments, and fill in what follows from them.

        Args:
            p: `argparse.ArgumentParser`, for `p.error`.
            options: parsed arguments, changed in place.
        """

    def mode(self, options):
        """The experiment that some options ask for instead of this one."""
        return self

    def blocks(self, options):
        """The names of the tables, which are those of a page's blocks."""
        if self.page_block is not None:
            return [options.page_block]
        return [self.name.replace("_", "-")]

    @_needed
    def load(self, options, console):
        """Load the data."""

    def plan(self, options, data):
        """The runs, an iterable of `Run`; by default each method with each seed."""
        for _, seed, method in self.by_seed(options, options.methods):
            part = functools.partial(self.draw, options, data, seed)
            own = {"seed": seed, **self.settings_of_method(options, data, method)}
            yield self.planned(f"seed {seed}", options, method, part, seed, own)

    def settings_of_method(self, options, data, method):
        """What else names a run of a method, a dict."""
        return {}

    @_needed
    def draw(self, options, data, seed):
        """The part of a run by its seed."""

    @_needed
    def run(self, options, method, part, seed, tick, callbacks=None):
        """Train and test one method.

        Args:
            options: parsed arguments.
            method: a key of `methods`.
            part: as from `draw` or `hold_out`.
            seed: int.
            tick: function without arguments, called after each epoch, by `ticking`: in a
                search it is a `Tick`, by which the network that was trained last is kept.
            callbacks: None, or Keras callbacks that see the loss on what is tested on as
                `val_loss`.

        Returns:
            A dict that JSON takes.
        """

    def describe(self, found):
        """The results of a run in a few words; by default the tasks' mean accuracy."""
        return f"accuracy {np.mean(list(found['accuracy'].values())):.1%}"

    @_needed
    def tables(self, options, data, runs):
        """The tables, a dict from the name of a page's block to `Table`."""

    def figures(self, options, data, runs):
        """Draw figures into `options.output`; returns their paths."""
        return []

    # --- what a search needs of it ----------------------------------------------------

    def search_arguments(self, arguments):
        """The arguments, with those that a search needs."""
        return list(arguments)

    @_needed
    def tasks(self, options, data=None):
        """The names of the tasks.

        Args:
            options: parsed arguments.
            data: function that loads the data, which may tell; or None, then the names are
                None if only the data tells.
        """

    @_needed
    def hold_out(self, part, options, share, seed):
        """A part that is tested on a share of its training data."""

    def space(self, method, options, space):
        """The method's own hyperparameters.

        Args:
            method: a key of `methods`.
            options: parsed arguments, the defaults.
            space: `tuning.spaces.Space`, which declares hyperparameters.

        Returns:
            A dict from option to value.
        """
        return {}

    def rate(self, options):
        """The default learning rate."""
        return options.learning_rate

    def with_rate(self, rate):
        """The option that says it, a dict."""
        return {"learning_rate": rate}

    def ticks(self, options):
        """How often a run calls `tick`."""
        return getattr(options, self.budget)

    def errors(self, found):
        """The error of each task, from a run's results; by default 1 - its accuracy."""
        return {name: 1 - value for name, value in found["accuracy"].items()}

    def scores(self, found):
        """What trials are compared by, from a run's results: a dict of floats."""
        errors = self.errors(found)
        return {
            "error": float(np.mean(list(errors.values()))),
            **{f"{name}_error": value for name, value in errors.items()},
        }

    def costs(self, found):
        """Parameters and seconds, from a run's results."""
        return {"parameters": found["parameters"], "seconds": found["seconds"]}

    def lack(self, *methods):
        """Which of these methods it does not define, in words; None if it has them."""
        absent = [m for m in methods if hasattr(getattr(type(self), m), "is_missing")]
        if not absent:
            return None
        absent, own = ", ".join(f"`{name}`" for name in absent), type(self).__name__
        return f"The experiment {self.name!r} ({own}) does not define {absent}."

    # --- the command ------------------------------------------------------------------

    def parser(self):
        """The command's arguments."""
        p = argparse.ArgumentParser(
            prog=f"python -m applications.{self.name}",
            description=self.description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if self.data_argument is not None:
            p.add_argument("--data", **self.data_argument)
        self.add_arguments(p)
        p.add_argument(
            "--methods",
            nargs="+",
            choices=list(self.methods),
            default=list(self.default_methods or self.methods),
        )
        kinds = {
            "epochs": whole(self.least.get("epochs", 1)),
            "batch_size": whole(self.least.get("batch_size", 1)),
            "learning_rate": real(above=0),
            "repeats": REPEATS,
        }
        for name, kind in kinds.items():
            if name in self.defaults:
                p.add_argument(
                    f"--{name.replace('_', '-')}",
                    type=kind,
                    default=self.defaults[name],
                    help=self.helps.get(name, "of every method"),
                )
        # An experiment on optimizers has none of its own.
        if "optimizer" in self.defaults:
            add_training(p, self.defaults["optimizer"])
        p.add_argument("--seed", type=SEED, default=0, help="of the first run")
        p.add_argument(
            "--output",
            type=pathlib.Path,
            default=f"results/{self.name}",
            help="folder of results; a call that was interrupted goes on from them",
        )
        p.add_argument(
            "--keep-models",
            action="store_true",
            help="keep each method's network with the least error, in OUTPUT/models",
        )
        add_page(p)
        if self.page_block is not None:
            help_text = "the name of the page's marks"
            p.add_argument("--page-block", default=self.page_block, help=help_text)
        return p

    def parse(self, arguments=None):
        """The parsed arguments.

        Args:
            arguments: list of strings; None: those of the process.

        Raises:
            SystemExit: on what is wrong with them.
        """
        p = self.parser()
        options = parse_arguments(p, arguments)
        self.complete(p, options)
        check_page(p, options, self.mode(options).blocks(options))
        return options

    def complete(self, p, options):
        """Check the parsed arguments, as `check` does, and the weights of the tasks."""
        self.check(p, options)
        self.check_weights(options, None, p)

    def weighted(self, options, data=None):
        """The names that weights may be given for, or None, as those of the tasks."""
        return self.tasks(options, data)

    def check_weights(self, options, data=None, p=None):
        """Refuse weights of the losses of tasks that there are not."""
        if getattr(options, "loss_weights", None):
            known = self.weighted(options, data)
            if known is not None:
                check_names("--loss-weights", options.loss_weights, known, p)

    def loaded(self, options, console):
        """The data, after a check of what only it tells."""
        data = self.load(options, console)
        self.check_weights(options, lambda: data)
        return data

    def by_seed(self, options, *others):
        """Numbers of the draws and their seeds, and products of other lists.

        Args:
            options: parsed arguments.
            *others: iterables, the last of which changes most often.

        Yields:
            `(number, seed, ...)`.
        """
        numbers = range(getattr(options, self.repeats))
        for number, *chosen in itertools.product(numbers, *others):
            yield number, options.seed + self.draw_step * number, *chosen

    def settings_of(self, options, **own):
        """What names a run: the settings, and others that are its own."""
        return {name: getattr(options, name) for name in self.settings} | own

    def planned(self, title, options, method, part, seed, own, **more):
        """A run.

        Args:
            title: str, on the screen after the method's title.
            options: parsed arguments.
            method: a key of `methods`.
            part: function without arguments that returns the part.
            seed: int.
            own: dict, the settings that are this run's own.
            **more: of `run`.
        """

        def function(tick):
            return self.run(options, method, part(), seed, tick, **more)

        settings = self.settings_of(options, method=method, **own)
        title = f"{self.methods[method]}, {title}"
        return Run(title, settings, self.ticks(options), function)

    def find(self, options, data, console):
        """The results of all runs, a data frame; what has no results yet is run."""
        results = Results(options.output / "runs.jsonl")
        runs = list(self.plan(options, data))
        return self._run_all(results, runs, options, console)

    def _run_all(self, results, runs, options, console):
        best = None
        if options.keep_models:
            models = options.output / "models"
            best = BestModels(models, lambda found: self.scores(found)["error"])
        return run_all(results, runs, console, self.describe, options.strategy, best)

    def find_chosen(self, options, console, groups):
        """The results of the runs with the best settings, a data frame.

        Args:
            options: parsed arguments.
            console: `rich.console.Console`.
            groups: iterable of `(values, planned)`: the settings to choose from, and a
                function of one of them, of a seed, and of whether it is for the choice,
                that returns the run. Of one setting no run is needed to choose.
        """
        results = Results(options.output / "runs.jsonl")
        rows = []
        for values, planned in groups:
            best = values[0]
            if len(values) > 1:
                trials = [planned(value, options.seed, True) for value in values]
                found = run_all(results, trials, console, self.describe, options.strategy)
                errors = [mean_error(one) for one in found["errors"]]
                # A setting with which training diverges has none.
                best = values[int(np.argmin(np.nan_to_num(errors, nan=np.inf)))]
            chosen = [planned(best, seed, False) for _, seed in self.by_seed(options)]
            rows.append(self._run_all(results, chosen, options, console))
        return pd.concat(rows, ignore_index=True)

    @one_line()
    def main(self, arguments=None):
        """Run the experiment.

        Returns:
            A dict of its tables, data frames of strings.

        Raises:
            SystemExit: with one line, on arguments and on files that are wrong.
        """
        options = self.parse(arguments)
        console = make_console()
        with working_in(options.output):
            return self.mode(options).report(options, console)

    def report(self, options, console):
        """Load, run, and write down."""
        data = self.loaded(options, console)
        runs = self.find(options, data, console)
        tables = self.tables(options, data, runs)
        figures = self.figures(options, data, runs)
        publish(tables, options, console, figures)
        console.print(f"Results are in {options.output}.")
        # Of several tables in a block, the first.
        first = {n: t[0] if isinstance(t, list) else t for n, t in tables.items()}
        return {name: table.frame for name, table in first.items()}
