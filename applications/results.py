"""Runs whose results survive an interruption, and the tables made of them."""

import json
import math
import pathlib
import time
import typing

import pandas as pd
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from scipy import stats

from .files import UnusableFileError, locked, replacing, write

# Of every line.
_START = b'{"settings": '


class Results:
    """Finished runs in a JSON lines file, written as they come.

    A run is named by its settings; asked for again with the same settings it is found,
    so that an interrupted call resumes.

    Args:
        path: path of the file; its folder is made.

    Raises:
        UnusableFileError: if a line is no run, but for a last one that was cut off.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = []
        self._runs = {}
        if self.path.exists():
            self._read()

    def _read(self):
        # What follows the last newline is empty, or a run but for its newline.
        *lines, last = self.path.read_bytes().split(b"\n")
        for number, line in enumerate([*lines, last] if last else lines, start=1):
            try:
                self._keep(line)
            except (ValueError, KeyError, TypeError) as error:
                cut = number > len(lines) and isinstance(error, json.JSONDecodeError)
                if cut and _START.startswith(line[: len(_START)]):
                    # That run is done again.
                    return
                received = line[:80].decode(errors="replace")
                raise UnusableFileError(
                    f"{self.path}, line {number}: expected a JSON object with "
                    f"'settings' and 'results'. Received: {received!r}. Delete the line, "
                    "and its run is done again."
                ) from error

    def _keep(self, line):
        run = json.loads(line)
        if not all(isinstance(run[name], dict) for name in ("settings", "results")):
            raise TypeError
        self._runs[self._key(run["settings"])] = run
        self._lines.append(line)

    @staticmethod
    def _key(settings):
        return json.dumps(settings, sort_keys=True)

    def get(self, settings):
        """The results of a finished run, or None."""
        run = self._runs.get(self._key(settings))
        return None if run is None else run["results"]

    def add(self, settings, results):
        """Write a finished run to the file."""
        line = json.dumps({"settings": settings, "results": results}).encode()
        # All lines, so that none is ever cut off.
        write(self.path, b"".join(one + b"\n" for one in [*self._lines, line]))
        # As a later call would read it.
        self._keep(line)


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


def half_interval(differences):
    """Half of the 95% interval of the mean of paired differences, by Student's t.

    Args:
        differences: sequence of floats; of fewer than two there is none, NaN.
    """
    count = len(differences)
    if count < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, count - 1) * stats.sem(differences))


def paired(own, baseline):
    """The mean difference of errors in points, with half of its 95% interval.

    Args:
        own: data frame of a method's runs, with `seed` and `error`.
        baseline: likewise.

    Returns:
        A str; empty without a run of the same seed.
    """
    both = own.set_index("seed").error - baseline.set_index("seed").error
    both = 100 * both.dropna()
    if both.empty:
        return ""
    if len(both) < 2:
        return f"{both.mean():+.1f}"
    return f"{both.mean():+.1f} ± {half_interval(both):.1f}"


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


class Tick:
    """What a run calls after each epoch, and what knows the network of the run.

    Args:
        function: function without arguments.

    Attributes:
        model: the Keras model that was trained last, if with the callbacks of `ticking`;
            None: there was none.
    """

    def __init__(self, function):
        self._function = function
        self.model = None

    def __call__(self):
        self._function()


class BestModels:
    """Keeps the network of each method that has the least error of its runs, as a file.

    Args:
        folder: `pathlib.Path`, of `METHOD.keras` and of `models.json`, which says how each
            was made and what error it has.
        error: function from the results of a run to its error, a float.
    """

    def __init__(self, folder, error):
        self._folder, self._error = folder, error
        self._list = folder / "models.json"

    def see(self, settings, found, model):
        """Keep the network of a run, if it is the best of its method so far.

        Args:
            settings: dict, those of the run.
            found: dict, its results.
            model: the Keras model, or None.
        """
        self._folder.mkdir(exist_ok=True)
        kept = json.loads(self._list.read_text()) if self._list.exists() else {}
        method, error = settings["method"], self._error(found)
        before = kept.get(method, {"error": math.inf})["error"]
        if model is None or not error < before:
            return
        path = self._folder / f"{method}.keras"
        with replacing(path) as part:
            model.save(part)
        kept[method] = {"file": path.name, "error": error, "settings": settings}
        write(self._list, json.dumps(kept, indent=1))


def run_all(results, runs, console, describe, strategy, best=None):
    """Run what has no results yet, one after the other.

    Args:
        results: `Results`.
        runs: list of `Run`.
        console: `rich.console.Console`.
        describe: function from the results of a run to a str for the screen.
        strategy: `tf.distribute.Strategy`, in whose scope they run.
        best: `BestModels` that looks at the networks, or None.

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
                    tick = Tick(lambda: progress.advance(inner))
                    found = run.function(tick)
                if best is not None:
                    # First: what has results is not trained again.
                    best.see(run.settings, found, tick.model)
                results.add(run.settings, found)
                seconds = time.perf_counter() - started
                console.print(f"{run.title}: {describe(found)}, {seconds:.0f} s")
            rows.append(run.settings | results.get(run.settings))
            progress.advance(bar)
    return pd.DataFrame(rows)


def markdown_table(frame):
    """A data frame of strings as a Markdown table."""
    rows = [list(frame.columns), ["---"] * len(frame.columns)]
    rows += [list(map(str, row)) for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _marks(name):
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def check_marks(path, names):
    """Refuse a file that lacks the marks of a block, or has them in another order.

    Args:
        path: path of a text file.
        names: list of str, of the blocks.

    Raises:
        OSError: if the file can't be read.
        ValueError: if the file lacks marks.
    """
    _check(path, _content(path), names)


def _content(path):
    # Its newlines stay as they are.
    return pathlib.Path(path).read_bytes().decode()


def _check(path, content, names):
    for name in names:
        begin, end = _marks(name)
        once = content.count(begin) == content.count(end) == 1
        if not once or content.index(begin) > content.index(end):
            raise ValueError(f"{path}: expected the marks {begin} and {end}, once each.")


def has_block(path, name):
    """Whether a text file has one of the marks of a block."""
    return any(mark in _content(path) for mark in _marks(name))


def write_block(path, name, text):
    """Replace what stands between a file's marks `<!-- name:begin -->` and `:end`.

    The file is replaced as a whole, or stays as it was; others that write it wait.

    Args:
        path: path of a text file.
        name: str.
        text: what to put there.

    Raises:
        ValueError: if the file lacks the marks.
    """
    with locked(path):
        content = _content(path)
        _check(path, content, [name])
        begin, end = _marks(name)
        head, rest = content.split(begin)
        _, tail = rest.split(end)
        write(path, f"{head}{begin}\n{text.strip()}\n{end}{tail}")
