"""What experiments share: results that survive an interruption, tables, README blocks."""

import argparse
import json
import math
import pathlib
import sys
import time
import typing

import keras
import numpy as np
import pandas as pd
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dmtrl_keras.distribution import STRATEGIES, divisible, make_strategy


class Results:
    """Finished runs in a JSON lines file, written as they come.

    A run is named by its settings; asked for again with the same settings it is found,
    so that an interrupted call resumes.

    Args:
        path: path of the file; its folder is made.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._runs = {}
        if self.path.exists():
            self._read()

    def _read(self):
        lines = self.path.read_text().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                run = json.loads(line)
                self._runs[self._key(run["settings"])] = run
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    # The last write was cut off; that run is done again.
                    self.path.write_text("".join(lines[:-1]))
                    return
                raise ValueError(
                    f"{self.path}, line {number}: expected a JSON object with "
                    f"'settings' and 'results'. Received: {line[:80]!r}."
                ) from error

    @staticmethod
    def _key(settings):
        return json.dumps(settings, sort_keys=True)

    def get(self, settings):
        """The results of a finished run, or None."""
        run = self._runs.get(self._key(settings))
        return None if run is None else run["results"]

    def add(self, settings, results):
        """Write a finished run to the file."""
        run = {"settings": settings, "results": results}
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        # As a later call would read it.
        self._runs[self._key(settings)] = json.loads(json.dumps(run))


def mean_and_spread(values, digits=2):
    """`"5.31 ± 0.20"`: mean and sample standard deviation; the mean alone for one value.

    Example:

    >>> mean_and_spread([1.0, 3.0])
    '2.00 ± 1.41'
    """
    values = pd.Series(values, dtype="float64")
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def progress_bars(console):
    """Progress bars that say what is done, how much of it, and the time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


class Run(typing.NamedTuple):
    """One run of an experiment.

    Attributes:
        title: str, how it is called on the screen.
        settings: dict that JSON takes, by which its results are found again.
        steps: int, how often it calls `tick`.
        function: function of `tick`, itself a function without arguments, that returns the
            results: a dict that JSON takes.
    """

    title: str
    settings: dict
    steps: int
    function: typing.Callable


def run_all(results, runs, console, describe, strategy):
    """Run what has no results yet, one after the other.

    Args:
        results: `Results`.
        runs: list of `Run`.
        console: `rich.console.Console`.
        describe: function from the results of a run to a str for the screen.
        strategy: `tf.distribute.Strategy`, in whose scope they run.

    Returns:
        A data frame with a row for each run, its settings and its results.
    """
    rows = []
    with progress_bars(console) as progress:
        bar = progress.add_task("runs", total=len(runs))
        inner = progress.add_task("this run", total=1)
        for run in runs:
            progress.update(bar, description=run.title)
            progress.reset(inner, total=run.steps)
            if results.get(run.settings) is None:
                started = time.perf_counter()
                with strategy.scope():
                    found = run.function(lambda: progress.advance(inner))
                results.add(run.settings, found)
                seconds = time.perf_counter() - started
                console.print(f"{run.title}: {describe(found)}, {seconds:.0f} s")
            rows.append(run.settings | results.get(run.settings))
            progress.advance(bar)
    return pd.DataFrame(rows)


def rich_table(frame, title):
    """A data frame of strings as a table for the terminal."""
    table = Table(title=title)
    for index, column in enumerate(frame.columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    return table


def markdown_table(frame):
    """A data frame of strings as a Markdown table."""
    rows = [list(frame.columns), ["---"] * len(frame.columns)]
    rows += [list(map(str, row)) for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_block(path, name, text):
    """Replace what stands between a file's marks `<!-- name:begin -->` and `:end`.

    Args:
        path: path of a text file.
        name: str.
        text: what to put there.

    Raises:
        ValueError: if the file lacks the marks.
    """
    path = pathlib.Path(path)
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = path.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path}: expected the marks {begin} and {end}, once each.")
    head, rest = content.split(begin)
    _, tail = rest.split(end)
    path.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}")


def parse_arguments(parser, arguments=None):
    """Parse a command's arguments, of which a JSON file may hold some.

    With `--config FILE`, the file's settings come first, so that what is given on the
    command line wins. It is an object from the names of arguments, such as
    `{"learning_rate": 0.01, "methods": ["stl", "tt"], "no_bias": true}`.

    The other arguments that all experiments have are `--strategy` and `--replicas`, from
    which the strategy is made.

    Args:
        parser: `argparse.ArgumentParser`.
        arguments: list of strings; None: those of the process.

    Returns:
        The parsed arguments, without `config` and `replicas`; `strategy` is a
        `tf.distribute.Strategy`.

    Raises:
        SystemExit: on malformed arguments, a file that can't be read, unknown names in
            it, devices that are not there, batches that don't divide among replicas.
    """
    parser.add_argument(
        "--config",
        type=pathlib.Path,
        help="JSON file of settings, such as a search's best ones",
    )
    add_strategy(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    alone.add_argument("--config", type=pathlib.Path)
    path = alone.parse_known_args(given)[0].config
    first = [] if path is None else _arguments_of(path, parser)
    options = parser.parse_args([*first, *given])
    del options.config
    set_strategy(parser, options)
    return options


def add_strategy(parser):
    """Add the arguments that say on which devices to train."""
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="'mirrored': data parallel on all GPUs; 'cpu': no GPU; 'auto': mirrored where "
        "there are several GPUs",
    )
    parser.add_argument(
        "--replicas",
        type=in_range(int, 0),
        help="how many GPUs, or logical CPU devices, which are made; all GPUs by default",
    )


def set_strategy(parser, options):
    """Replace the name of the strategy by a `tf.distribute.Strategy`."""
    try:
        options.strategy = make_strategy(options.strategy, options.replicas)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--strategy: {error}")
    replicas = options.strategy.num_replicas_in_sync
    batch_size = getattr(options, "batch_size", replicas)
    if batch_size % replicas:
        parser.error(
            f"--batch-size: {batch_size} does not divide among {replicas} replicas"
        )
    del options.replicas


def check_names(argument, given, known, parser=None):
    """Refuse names that are not known.

    Args:
        argument: str, the argument of the command that has them.
        given: iterable of names.
        known: iterable of names.
        parser: the parser whose error it is; without one, a `ValueError` is raised.
    """
    known = list(known)
    unknown = sorted(set(given) - set(known))
    if unknown:
        message = f"{argument}: expected names from {known}, received {unknown}"
        if parser is None:
            raise ValueError(message)
        parser.error(message)


def whole_batches(options, count):
    """How many of `count` examples give batches that divide among the replicas."""
    replicas = options.strategy.num_replicas_in_sync
    return divisible(count, options.batch_size, replicas)


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


OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "rmsprop": keras.optimizers.RMSprop,
    # With the momentum that is usual for networks.
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
}


def add_training(parser, optimizer):
    """Add the arguments of every experiment's training.

    Args:
        parser: `argparse.ArgumentParser`.
        optimizer: a key of `OPTIMIZERS`, the default.
    """
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=optimizer)
    parser.add_argument(
        "--loss-weights",
        nargs="+",
        action=ByName,
        type=in_range(float, 0),
        default={},
        metavar="TASK=WEIGHT",
        help="of tasks; 1 by default",
    )


class ByName(argparse.Action):
    """Arguments such as `conv1=0.5 fc=3` as a dict.

    `type` converts the values; a JSON file has them as an object.
    """

    def __init__(self, *arguments, type=str, **options):
        self._convert = type
        super().__init__(*arguments, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        found = {}
        for text in values:
            name, equals, value = text.partition("=")
            try:
                if not (name and equals):
                    raise ValueError("no name, or no '='")
                found[name] = self._convert(value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise argparse.ArgumentError(
                    self, f"expected {self.metavar}, got {text!r} ({error})"
                ) from error
        setattr(namespace, self.dest, found)


def _arguments_of(path, parser):
    """The settings in a file as command line arguments."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"--config: {path} is no JSON file that can be read ({error})")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    if not isinstance(settings, dict) or not set(settings) <= known:
        wrong = sorted(set(settings) - known) if isinstance(settings, dict) else settings
        parser.error(
            f"--config: {path} must be an object of settings from {sorted(known)}. "
            f"Received: {wrong}"
        )
    arguments = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False or value == {}:
            continue
        arguments.append(flag)
        if value is not True:
            if isinstance(value, dict):
                value = [f"{key}={entry}" for key, entry in value.items()]
            values = value if isinstance(value, list) else [value]
            arguments += map(str, values)
    return arguments


def in_range(kind, low, high=math.inf):
    """A converter for `argparse`: numbers above `low`, and `high` at most.

    Args:
        kind: int or float.
        low: number.
        high: number.

    Returns:
        A function from a string to a number.

    Example:

    >>> in_range(int, 0)("3")
    3
    """

    def convert(text):
        value = kind(text)
        if not low < value <= high:
            raise argparse.ArgumentTypeError(
                f"expected more than {low:g} and at most {high:g}, got {text}"
            )
        return value

    return convert
