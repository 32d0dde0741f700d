"""Search for the best settings of a method, on an experiment or on your own data.

    python -m tuning.search --experiment mnist --method tucker --tuner bayesian
    python -m tuning.search --experiment mtfl --method trn --data FOLDER --width 8
    python -m tuning.search --model module:backbone --data module:data --method tt
    python -m tuning.search --model module:backbone --data module:data --method all

What follows the arguments of the search are those of the experiment, its default settings:
the first trial. Trials are compared on a part of the training data; the test part is
used once, with the best settings, at the end. Called again, it goes on where it was.
"""

import argparse
import gc
import ipaddress
import itertools
import json
import os
import pathlib
import shutil
import socket
import sys
import threading
import time

import keras
import keras_tuner as kt
import numpy as np
import pandas as pd
from keras_tuner import errors

from . import application, hypermodels, oracles, studies
from .own import Own

arguments = application("arguments")
experiment = application("experiment")
files = application("files")
reading = application("reading")
results = application("results")

_DEFAULT_TRIALS = 20
_TRIALS_OF_METHOD = 3
# A process that was killed so often in one trial was killed by it.
_MOST_STARTS = 3


class Search(kt.Tuner):
    """Runs the trials of a study.

    Args:
        study: `studies.Study`.
        oracle: `oracles.SearchOracle`.
        options: the parsed arguments of the search.
        console: `rich.console.Console`.
    """

    def __init__(self, study, oracle, options, console):
        self.study = study
        self.search_options = options
        self.console = console
        self._ran = True
        super().__init__(
            oracle, directory=options.directory.parent, project_name=options.directory.name
        )

    def _get_tuner_fname(self):
        # By which Keras Tuner sees that there is something to go on from.
        return os.path.join(self.project_dir, "oracle.json")

    def save(self):
        """Write down the state, all of which is the oracle's."""
        if not _is_worker():
            self.oracle.save()

    def reload(self):
        """Go on from what is written down."""
        if not _is_worker():
            self.oracle.reload()

    def pre_create_trial(self):
        """Wait a little where the chief had nothing to do."""
        if not self._ran:
            time.sleep(1)
        self._ran = False

    def on_trial_begin(self, trial):
        """Say what is tried, and to the chief, from now on, that this process lives."""
        self._ran = True
        values = ", ".join(
            f"{name}={_short(value)}"
            for name, value in self.study.own(trial.hyperparameters.values).items()
        )
        self.console.print(f"Trial {trial.trial_id}: {values}", highlight=False)
        self._ended = threading.Event()
        if _is_worker():
            arguments = (trial.trial_id, self._ended)
            threading.Thread(target=self._beat, args=arguments, daemon=True).start()

    def _beat(self, trial_id, ended):
        while not ended.wait(self.search_options.worker_timeout / 4):
            self.oracle.get_trial(trial_id)

    def run_trial(self, trial):
        """Train and validate; the results, means over the repeats."""
        try:
            with _counted(pathlib.Path(self.get_trial_dir(trial.trial_id))):
                metrics = self._metrics(trial)
        except errors.FatalError:
            raise
        except Exception as error:
            raise errors.FailedTrialError(_reason(error)) from error
        _write_hparams(self.search_options.directory, trial, metrics)
        return metrics

    def _metrics(self, trial):
        study, options = self.study, self.search_options
        hp = trial.hyperparameters
        settings = study.settings(hp)
        own = study.with_settings(settings, hp.values.get("tuner/epochs"))
        found = []
        with results.progress_bars(self.console) as progress:
            steps = options.repeats * study.ticks(own)
            bar = progress.add_task(f"trial {trial.trial_id}", total=steps)
            for repeat in range(options.repeats):
                study.model = None
                keras.utils.clear_session()
                gc.collect()
                with own.strategy.scope():
                    found.append(
                        study.learn(
                            own,
                            True,
                            repeat,
                            lambda: progress.advance(bar),
                            study.stopping(options.patience),
                        )
                    )
        frame = pd.DataFrame(found)
        metrics = frame.mean().to_dict()
        for name in options.objectives:
            if name not in metrics:
                raise errors.FatalValueError(
                    f"--objective: expected one of {sorted(metrics)}. Received: {name!r}."
                )
        # A training that diverged has no results, also where an objective has a value.
        for name in (*options.objectives, *metrics):
            if not np.isfinite(metrics[name]):
                raise ValueError(f"{name} is {metrics[name]}")
        if options.repeats > 1:
            metrics |= {f"{n}_spread": v for n, v in frame.std().to_dict().items()}
        return metrics

    def on_trial_end(self, trial):
        """Record the trial and say how it went."""
        self._ended.set()
        if trial.status == "COMPLETED":
            done = self.oracle.get_trial(trial.trial_id)
            # Before it is recorded, after which nothing is trained again.
            self._keep(done)
            text = ", ".join(
                f"{name} {_short(done.metrics.get_best_value(name))}"
                for name in self.search_options.objectives
            )
        else:
            text = f"failed, {reason_of(trial)}"
        self.console.print(f"Trial {trial.trial_id}: {text}", highlight=False)
        super().on_trial_end(trial)

    def _keep(self, trial):
        """Keep the model of the best trial so far, of several repeats the last one's."""
        if _is_worker():
            # The chief, which has the results of all, trains the best at the end.
            return
        objectives = self.oracle.objectives
        own = oracles.objective_values(trial, objectives)
        others = [
            oracles.objective_values(one, objectives)
            for one in self.oracle.trials.values()
            if one.status == "COMPLETED" and one.trial_id != trial.trial_id
        ]
        if all(own < other for other in others):
            self.study.keep(self.search_options.directory)
        # Not in memory beside the next one.
        self.study.model = None


class _counted:
    """Counts how often a trial was begun and its process ended in it."""

    def __init__(self, folder):
        self._file = folder / "starts.txt"

    def __enter__(self):
        starts = self._starts() if self._file.exists() else 0
        if starts >= _MOST_STARTS:
            raise MemoryError(
                f"the process was ended from outside in each of {starts} tries"
            )
        files.write(self._file, str(starts + 1))

    def _starts(self):
        text = self._file.read_text(errors="replace")
        if not (text.isascii() and text.isdecimal()):
            raise errors.FatalValueError(
                f"{self._file}: expected how often the process was killed in this trial. "
                f"Received: {text[:80]!r}. Delete the file: it was not, then."
            )
        return int(text)

    def __exit__(self, kind, error, trace):
        # Also when a user interrupts it, which says nothing of the trial.
        self._file.unlink(missing_ok=True)


def _reason(error):
    """Why a trial failed, in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def reason_of(trial):
    """Why a trial failed, from the record that Keras Tuner keeps of it."""
    lines = [line for line in (trial.message or "").splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    return last.partition("FailedTrialError: ")[2] or last


def _write_hparams(folder, trial, metrics):
    """What TensorBoard shows under HPARAMS."""
    from tensorboard.plugins.hparams import api as hparams

    from dmtrl_keras.ground.backend import tensorflow

    summary = tensorflow().summary
    path = folder / "tensorboard" / trial.trial_id
    with summary.create_file_writer(str(path)).as_default():
        hparams.hparams(trial.hyperparameters.values, trial_id=trial.trial_id)
        for name, value in metrics.items():
            summary.scalar(name, value, step=0)


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- what comes of it ---------------------------------------------------------------


def table_of(trials, objectives, own=dict):
    """All completed trials, the best first.

    Args:
        trials: list of Keras Tuner's trials.
        objectives: list of `keras_tuner.Objective`.
        own: function of the values of a trial's hyperparameters, as `Study.own`.

    Returns:
        A data frame: the trial, results, hyperparameters, and with several objectives
        whether it is on the Pareto front.
    """
    done = [trial for trial in trials if trial.status == "COMPLETED"]
    rows = []
    for trial in done:
        row = {"trial": trial.trial_id}
        row |= {name: trial.metrics.get_best_value(name) for name in trial.metrics.metrics}
        rows.append(row | own(trial.hyperparameters.values))
    frame = pd.DataFrame(rows)
    values = np.array([oracles.objective_values(t, objectives) for t in done])
    if len(objectives) > 1:
        frame.insert(1, "pareto", oracles.pareto_front(values))
    order = np.lexsort(values.T[::-1])
    return frame.iloc[order].reset_index(drop=True)


def shown(frame, options, count=10):
    """The first rows of the table, as strings, without what is of no interest."""
    names = ["trial", *options.objectives]
    names += ["pareto"] if "pareto" in frame else []
    hidden = {"tuner/trial_id", "tuner/bracket", "tuner/round", "tuner/initial_epoch"}
    results = set(options.results)
    names += [n for n in frame if n not in {*names, *hidden} and n not in results]
    text = frame[names].head(count).copy()
    for name in options.objectives:
        if f"{name}_spread" in frame:
            spread = frame[f"{name}_spread"].map(_short)
            text[name] = frame[name].map(_short) + " ± " + spread
    return text.map(lambda value: "-" if pd.isna(value) else _short(value))


def plot_pareto(frame, objectives, path):
    """All trials, those on the front joined, for each pair of objectives."""
    names = [one.name for one in objectives]
    pairs = list(itertools.combinations(names, 2))
    figure, (panels,) = experiment.figure_of(len(pairs), size=(4.5, 3.5))
    for axes, (one, other) in zip(panels, pairs):
        front = frame[frame.pareto].sort_values(one)
        axes.scatter(frame[one], frame[other], color="lightgray", label="trials")
        axes.plot(front[one], front[other], "o-", label="Pareto front")
        axes.set(xlabel=one, ylabel=other)
    axes.legend()
    figure.savefig(path)


def finish(study, trials, options, objectives, console):
    """Tables, files, and the test of the best settings.

    Returns:
        A dict: `best`, the settings; `validation` and `test`, their results; `default`, the
        results of the first trial, None if it failed; `table`, a data frame.

    Raises:
        SystemExit: if no trial was completed.
    """
    folder = options.directory
    failed = [trial for trial in trials if trial.status == "FAILED"]
    for trial in failed:
        console.print(f"Trial {trial.trial_id} failed: {reason_of(trial)}", highlight=False)
    if len(failed) == len(trials):
        raise SystemExit(
            f"All {len(trials)} trials failed; the reasons are above. Delete {folder} to "
            "try the same again."
        )
    frame = table_of(trials, objectives, study.own)
    by_id = {trial.trial_id: trial for trial in trials}
    text = shown(frame, options)
    experiment.Table("Best trials", text).print(console)
    if study.several:
        of_each = shown(frame.drop_duplicates("method"), options, len(frame))
        experiment.Table("Best trial of each method", of_each).print(console)
    files.write(folder / "trials.md", results.markdown_table(text))
    files.write(folder / "trials.csv", frame.to_csv(index=False))
    if len(objectives) > 1:
        plot_pareto(frame, objectives, folder / "pareto.png")
        front = shown(frame[frame.pareto], options, len(frame))
        experiment.Table("Pareto front", front).print(console)
        for trial_id in frame.trial[frame.pareto]:
            settings = study.settings(by_id[trial_id].hyperparameters)
            _write(folder / f"pareto_{trial_id}.json", study.config(settings))
    best = by_id[frame.trial[0]]
    settings = study.settings(best.hyperparameters)
    _write(folder / "best.json", study.config(settings))
    validation = dict(zip(frame, frame.iloc[0]))
    first = frame[frame.trial == min(by_id)]
    name = objectives[0].name
    default = None if first.empty else float(first[name].iloc[0])
    said = "failed" if default is None else f"{name} {_short(default)}"
    whose = f" of {study.methods[0]}" if study.several else ""
    verdict = (
        f"Validation: the default settings{whose} (trial {min(by_id)}) {said}, the best "
        f"(trial {best.trial_id}) {name} {_short(validation[name])}."
    )
    console.print(verdict, highlight=False)
    test = tested(study, settings, best.trial_id, options, console)
    digits = {name: 0 if test[name].min() > 100 else 4 for name in test}
    said = ", ".join(
        f"{name} {results.mean_and_spread(test[name], digits[name])}" for name in test
    )
    verdict += f" That one, trained on all training data, on the test part: {said}."
    console.print(f"Test: {said}", highlight=False)
    if options.page is not None:
        block = f"search-{study.name}-{study.family}"
        table = results.markdown_table(text)
        results.write_block(options.page, block, f"{table}\n{verdict}")
    console.print(f"Trials, figures and settings are in {folder}.")
    command = study.command(folder / "best.json")
    if command is not None:
        console.print(f"Run them: {command}", highlight=False, soft_wrap=True)
    return {
        "best": settings,
        "validation": validation,
        "default": default,
        "test": test.mean().to_dict(),
        "table": frame,
    }


def tested(study, settings, trial_id, options, console):
    """The results of the best settings on the test part, trained on all training data.

    Returns:
        A data frame with a row for each repeat.
    """
    tests = results.Results(options.directory / "test.jsonl")
    found = []
    for repeat in range(options.repeats):
        key = {"trial": trial_id, "settings": settings, "repeat": repeat}
        if tests.get(key) is None:
            if not repeat:
                console.print(
                    "Training on the whole training part with the best settings; the test "
                    "part is used here for the first time."
                )
            own = study.with_settings(settings)
            with own.strategy.scope():
                result = study.learn(own, False, repeat, lambda: None, None)
            # Before the result, with which nothing is trained again.
            path = study.keep(options.directory)
            tests.add(key, result)
            if path is not None:
                console.print(f"The model is {path}.")
        found.append(tests.get(key))
    return pd.DataFrame(found)


def _write(path, content):
    files.write(path, json.dumps(content, indent=2) + "\n")


# --- the command --------------------------------------------------------------------


def parser():
    """The search's own arguments; others are those of the experiment."""
    p = argparse.ArgumentParser(
        prog="python -m tuning.search",
        description="Search for the best settings of a method. Further arguments are those "
        "of the experiment, such as --data; with --model, see --help with it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--experiment", choices=studies.EXPERIMENTS)
    what.add_argument("--model", metavar="MODULE:FUNCTION", help="your own; needs --data")
    p.add_argument(
        "--method",
        "--methods",
        nargs="+",
        required=True,
        dest="methods",
        help="a family, or the experiment's name of it; 'all', or several: the method is "
        "searched for, too",
    )
    p.add_argument("--tuner", choices=oracles.TUNERS, default="bayesian")
    p.add_argument(
        "--objective",
        nargs="+",
        dest="objectives",
        metavar="NAME[:max]",
        help="several give a Pareto front; by default the mean error of the tasks",
    )
    p.add_argument(
        "--tune",
        nargs="+",
        choices=hypermodels.TUNABLE,
        default=["sharing", "learning_rate"],
        help="'sharing': ranks, thresholds, strengths, ... of the family; 'dropout' where "
        "the experiment has it",
    )
    p.add_argument(
        "--per-layer",
        action="store_true",
        help="also a rank for each layer, or a threshold for each block",
    )
    p.add_argument(
        "--max-trials",
        type=arguments.whole(1),
        help=f"by default {_DEFAULT_TRIALS}, with several methods at least "
        f"{_TRIALS_OF_METHOD} for each, and all for grid and hyperband",
    )
    p.add_argument("--repeats", type=arguments.REPEATS, default=1)
    p.add_argument(
        "--validation-share", type=arguments.real(above=0, most=0.9), default=0.25
    )
    p.add_argument(
        "--patience",
        type=arguments.whole(1),
        help="epochs without a better validation loss after which a training is stopped",
    )
    p.add_argument("--factor", type=arguments.whole(2), default=3, help="Hyperband")
    p.add_argument("--seed", type=arguments.SEED, default=0)
    p.add_argument("--directory", type=pathlib.Path, help="results/tuning/... by default")
    arguments.add_page(p)
    p.add_argument(
        "--insecure-bind",
        action="store_true",
        help="let the chief, which asks nobody who they are, listen on all interfaces",
    )
    p.add_argument(
        "--worker-timeout",
        type=arguments.real(above=0, most=1e6),
        default=120.0,
        help="seconds of silence after which a worker's trial is given to another",
    )
    return p


def make_study(p, options, rest):
    """The study that the arguments describe.

    Raises:
        SystemExit: on methods that the experiment doesn't have, and on what its own parser
            refuses.
    """
    name = options.experiment
    families = Own.families if name is None else studies.families_of(name)
    methods = list(dict.fromkeys(options.methods))
    if methods != [studies.ALL] and not {*methods} <= {*families}:
        known = f"{studies.ALL!r} or some of {list(families)}"
        p.error(f"--method: expected {known}, got {' '.join(methods)!r}")
    given = [*rest, "--seed", str(options.seed)]
    how = (options.tune, options.per_layer, options.validation_share)
    if name is None:
        return Own(methods, given, *how, options.model)
    study = studies.ExperimentStudy(name, methods, given, *how)
    if not study.methods:
        p.error(f"--method: none of {methods} fits the arguments of {name}")
    if options.patience is not None and not study.early_stopping:
        p.error(f"--patience: {name} trains without epochs, it can't be stopped early")
    return study


def make_objectives(p, options, known):
    """Keras Tuner's objectives, and their names in the options.

    Raises:
        SystemExit: on names of which it is not clear what is better.
    """
    found = []
    for text in options.objectives or [next(iter(known))]:
        name, _, direction = text.partition(":")
        direction = direction or known.get(name) or _direction_of_metric(name)
        if direction not in ("min", "max"):
            p.error(f"--objective: say {name}:min or {name}:max, got {text!r}")
        found.append(kt.Objective(name, direction))
    options.objectives = [one.name for one in found]
    if len(set(options.objectives)) < len(found):
        p.error(f"--objective: expected different ones, got {options.objectives}")
    return found


def _direction_of_metric(name):
    """What Keras Tuner knows of a metric; `val_<task>_accuracy` is an accuracy."""
    while name:
        try:
            return kt.Oracle(name).objective.direction
        except ValueError:
            name = name.partition("_")[2]
    return None


def check_same(p, study, options, objectives):
    """Refuse to mix the trials of different searches in one directory.

    Returns:
        A dict for `search.json`, what the next call must be the same in.
    """
    own = study.describe() | {
        name: getattr(options, name)
        for name in (
            "tuner",
            "tune",
            "per_layer",
            "repeats",
            "validation_share",
            "patience",
            "factor",
            "seed",
        )
    }
    own["objectives"] = [f"{one.name}:{one.direction}" for one in objectives]
    own = json.loads(json.dumps(own))
    folder = options.directory
    path = folder / "search.json"
    if path.exists():
        try:
            there = json.loads(path.read_bytes())
            different = sorted(k for k in {*own, *there} if own.get(k) != there.get(k))
        except (ValueError, TypeError, AttributeError) as error:
            raise files.UnusableFileError(
                f"{path} is cut off, or not a search's ({error}). If {folder} is of this "
                "search, delete the file, and it goes on; else give another --directory."
            ) from error
        if different and _found_something(folder):
            p.error(
                f"--directory: {folder} has a search with other {different}. "
                "Give another directory, or delete it."
            )
        if different:
            # Of a call that was wrong, or stopped before it had found anything.
            for trial in folder.glob("trial_*/"):
                shutil.rmtree(trial)
            for name in ("oracle.json", "search.json"):
                (folder / name).unlink(missing_ok=True)
    return own


def _found_something(folder):
    """Whether a trial was completed, or says nothing and should be looked at."""
    for path in folder.glob("trial_*/trial.json"):
        try:
            status = json.loads(path.read_bytes())["status"]
        except (ValueError, LookupError, TypeError):
            return True
        if status == "COMPLETED":
            return True
    return False


def check_address(p, options):
    """Refuse to give out trials to everybody who can reach this machine."""
    if not _is_chief() or options.insecure_bind:
        return
    address = os.environ["KERASTUNER_ORACLE_IP"]
    try:
        # An empty one is all of them for gRPC.
        found = socket.getaddrinfo(address.strip("[]") or "0.0.0.0", None)
    except OSError as error:
        p.error(
            "KERASTUNER_ORACLE_IP: expected the address or name of this machine, as its "
            f"workers reach it. Received: {address!r} ({error})"
        )
    for *_, (host, *_) in found:
        ip = ipaddress.ip_address(host)
        if (getattr(ip, "ipv4_mapped", None) or ip).is_unspecified:
            p.error(
                f"KERASTUNER_ORACLE_IP: {address!r} is every interface of this machine, "
                "and the chief asks nobody who they are: whoever reaches it can read and "
                "change the search. Give an address that only the workers reach, or "
                "--insecure-bind"
            )


def _is_worker():
    """Whether another process, the chief, gives out the trials (see Keras Tuner)."""
    return "KERASTUNER_ORACLE_IP" in os.environ and not _is_chief()


def _is_chief():
    """Whether this process gives out the trials."""
    tuner_id = os.environ.get("KERASTUNER_TUNER_ID", "")
    return "KERASTUNER_ORACLE_IP" in os.environ and "chief" in tuner_id


@reading.one_line()
def main(arguments=None):
    """Search; returns what `finish` does, or None in a worker."""
    p = parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--model" in given and {"-h", "--help"} & set(given):
        p.print_help()
        Own.parser().parse_args(["--help"])
    options, rest = p.parse_known_args(given)
    study = make_study(p, options, rest)
    objectives = make_objectives(p, options, study.objectives)
    if options.directory is None:
        name = f"{study.name}_{study.family}_{options.tuner}"
        options.directory = pathlib.Path("results", "tuning", name)
    check_address(p, options)
    # Workers are many, each with its own name.
    name = f"lock-{os.environ['KERASTUNER_TUNER_ID']}" if _is_worker() else "lock"
    with files.working_in(options.directory, name=name):
        return run(p, study, options, objectives)


def run(p, study, options, objectives):
    """Search, in a directory that is this process's.

    Args:
        p: `argparse.ArgumentParser`, for `p.error`.
        study: `studies.Study`.
        options: parsed arguments of the search.
        objectives: list of `keras_tuner.Objective`.
    """
    # The chief of workers has the trials.
    same = None if _is_worker() else check_same(p, study, options, objectives)
    space = kt.HyperParameters()
    with study.options.strategy.scope():
        study.declare(space)
    if not space.space:
        p.error(f"--tune: {study.family} has nothing to search for in {options.tune}")
    study.load()
    if same is not None:
        _write(options.directory / "search.json", same)
    limit, count = options.max_trials, len(study.methods)
    if limit is None and options.tuner in ("random", "bayesian"):
        of_all = _TRIALS_OF_METHOD * count if study.several else 0
        limit = max(_DEFAULT_TRIALS, of_all)
    console = experiment.make_console()
    for name, reason in study.left_out.items():
        console.print(f"{name} is left out: {reason}.", highlight=False)
    if study.several:
        console.print(f"Methods: {', '.join(study.methods)}", highlight=False)
        if limit is not None and limit < count:
            console.print(f"{limit} trials are not one for each of {count} methods.")
    oracle = oracles.make_oracle(
        options.tuner,
        space,
        objectives,
        limit,
        options.seed,
        getattr(study.options, study.budget),
        options.factor,
        options.worker_timeout,
        study.firsts(),
    )
    tuner = Search(study, oracle, options, console)
    try:
        tuner.search()
    except errors.FatalError as error:
        raise SystemExit(str(error)) from error
    if _is_worker():
        return None
    trials = [oracle.trials[trial_id] for trial_id in sorted(oracle.trials)]
    options.results = {name for trial in trials for name in trial.metrics.metrics}
    return finish(study, trials, options, objectives, console)


if __name__ == "__main__":
    main()
