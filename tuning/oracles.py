"""Keras Tuner's oracles, with what a search here needs of each.

The defaults first; several objectives; workers that die.
"""

import functools
import json
import pathlib
import time

import keras_tuner as kt
import numpy as np
from keras_tuner.engine.trial import Trial
from threadpoolctl import threadpool_limits

from . import application
from .spaces import set_defaults

files = application("files")

# Knowles (2006) takes 0.05 for the sum beside the maximum.
_SUM = 0.05
_ENDED = ("COMPLETED", "FAILED")
_ROUND = "tuner/round"


def scalarize(values, weights):
    """One number for several objectives, the augmented Chebyshev function of ParEGO.

    `max_k w_k f_k + 0.05 sum_k w_k f_k`, each objective scaled to [0, 1] over the
    trials.

    Source: Knowles, "ParEGO: A Hybrid Algorithm With On-Line Landscape Approximation for
    Expensive Multiobjective Optimization Problems" (2006), Eq. 2.

    Args:
        values: array `(n, k)`, to be minimised.
        weights: array `(k,)`, not negative.

    Returns:
        A float array `(n,)`.

    Example:

    >>> scalarize([[0, 4], [1, 2], [2, 0]], [0.5, 0.5]).tolist()
    [0.525, 0.275, 0.525]
    """
    values = np.asarray(values, "float64")
    low, high = values.min(axis=0), values.max(axis=0)
    scaled = (values - low) / np.where(high > low, high - low, 1)
    weighted = scaled * np.asarray(weights, "float64")
    return weighted.max(axis=1) + _SUM * weighted.sum(axis=1)


def pareto_front(values):
    """Which points no other point is better than in all objectives.

    Args:
        values: array `(n, k)`, to be minimised.

    Returns:
        A bool array `(n,)`. Of equal points all are on the front.

    Example:

    >>> pareto_front([[1, 3], [2, 2], [3, 3]]).tolist()
    [True, True, False]
    """
    values = np.asarray(values, "float64")
    no_worse = (values[:, None] <= values).all(axis=-1)
    better = (values[:, None] < values).any(axis=-1)
    return ~(no_worse & better).any(axis=0)


class SearchOracle:
    """To be mixed into an oracle of Keras Tuner.

    - The first trial has the default values; or the first ones have, with what `firsts`
      has for each of them.
    - With several `objectives` (`keras_tuner.Objective`s), the trials so far are scored by
      `scalarize` with new random weights before each new trial (with equal
      ones for Hyperband, which compares trials), so that the trials spread along the front.
    - Where workers run the trials, one that hasn't been heard of for `silence` seconds
      is given up, and its trial is another's. (Keras Tuner waits for it forever.)
    - Killed at any moment and resumed, the search goes on as if nothing had happened: files
      are whole or not there, and what they have is brought to one state.
    """

    objectives = ()
    firsts = ({},)
    silence = float("inf")
    random_weights = True
    _tuners = frozenset()

    @functools.cached_property
    def _heard(self):
        return {}

    @property
    def tuner_ids(self):
        """The workers that haven't ended, a set; the chief waits for them."""
        now = time.monotonic()
        for tuner_id in [i for i in self._tuners if i not in self._working()]:
            if now - self._heard.get(tuner_id, now) > self.silence:
                self._tuners.discard(tuner_id)
        return self._tuners

    @tuner_ids.setter
    def tuner_ids(self, value):
        self._tuners = value

    def _working(self):
        return self.ongoing_trials if hasattr(self, "ongoing_trials") else ()

    @kt.synchronized
    def create_trial(self, tuner_id):
        """A trial for a worker: that of a silent one, or a new one."""
        now = self._heard[tuner_id] = time.monotonic()
        for other, trial in list(self.ongoing_trials.items()):
            if now - self._heard.setdefault(other, now) > self.silence:
                del self.ongoing_trials[other]
                self._tuners.discard(other)
                self._retry_queue.append(trial.trial_id)
        trial = super().create_trial(tuner_id)
        if trial.status == "STOPPED" and self.ongoing_trials:
            # Whose worker may yet fall silent.
            trial.status = "IDLE"
            self._tuners.add(tuner_id)
        return trial

    def get_trial(self, trial_id):
        """A trial by its number. Workers ask for theirs to say that they are alive."""
        for tuner_id, trial in list(self.ongoing_trials.items()):
            if trial.trial_id == trial_id:
                self._heard[tuner_id] = time.monotonic()
        return super().get_trial(trial_id)

    @kt.synchronized
    def end_trial(self, trial):
        """Record how a trial ended, unless its worker was given up meanwhile."""
        ongoing = {one.trial_id for one in self.ongoing_trials.values()}
        if trial.trial_id in ongoing:
            super().end_trial(trial)

    def save(self):
        """Write down all but the trials."""
        files.write(self._get_oracle_fname(), json.dumps(self.get_state()))

    def _save_trial(self, trial):
        path = pathlib.Path(self._get_trial_dir(trial.trial_id), "trial.json")
        files.write(path, json.dumps(trial.get_state()))

    def reload(self):
        """Go on from the files, of which those of a trial are written before the others.

        Raises:
            UnusableFileError: if one of them can't be read.
        """
        folder = pathlib.Path(self._project_dir)
        for path in folder.glob("trial_*/trial.json"):
            _tried(Trial.load, path)
        _tried(lambda _: super(SearchOracle, self).reload(), self._get_oracle_fname())
        missing = sorted(set(self.start_order) - set(self.trials))
        if missing:
            raise files.UnusableFileError(
                f"{folder / f'trial_{missing[0]}' / 'trial.json'} is not there. {_HOW}"
            )
        # In the order in which they were begun; one that was not written down begins anew.
        self.trials = {trial_id: self.trials[trial_id] for trial_id in self.start_order}
        again = set(self._retry_queue) - set(self.end_order)
        self._retry_queue = [name for name in self.start_order if name in again]
        for trial_id in again:
            one = self.trials[trial_id]
            # Nothing of the run that was killed.
            fresh = Trial(one.hyperparameters, trial_id)
            self.trials[trial_id] = fresh

    def populate_space(self, trial_id):
        """Values of a new trial."""
        if len(self.objectives) > 1:
            self._score()
        response = super().populate_space(trial_id)
        if response["status"] != "RUNNING" or response["values"].get(_ROUND):
            return response
        # Those of Hyperband's later rounds go on from others.
        begun = sum(
            not one.hyperparameters.values.get(_ROUND) for one in self.trials.values()
        )
        if begun < len(self.firsts):
            given = response["values"]
            response["values"] = self._defaults(self.firsts[begun]) | {
                name: value for name, value in given.items() if name.startswith("tuner/")
            }
        return response

    def _defaults(self, others):
        hp = self.get_space()
        set_defaults(hp, others)
        return hp.values

    def _score(self):
        done = [trial for trial in self.trials.values() if trial.status == "COMPLETED"]
        if not done:
            return
        count = len(self.objectives)
        weights = np.full(count, 1 / count)
        if self.random_weights:
            # Resumed, the search draws what it would have drawn.
            rng = np.random.default_rng([self.seed, len(self.trials)])
            weights = rng.dirichlet(np.ones(count))
        values = [objective_values(trial, self.objectives) for trial in done]
        for trial, score in zip(done, scalarize(values, weights)):
            trial.score = float(score)


_HOW = "Put back a copy of it, or delete the folder of the search, which begins anew then."


def _tried(read, path):
    """Call a function that reads a file; what it raises names the file."""
    try:
        read(str(path))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise files.UnusableFileError(
            f"{path} is cut off, or no file of a search ({type(error).__name__}: {error}). "
            f"{_HOW}"
        ) from error


def objective_values(trial, objectives):
    """The objectives of a completed trial, to be minimised: a list of floats."""
    return [
        trial.metrics.get_best_value(one.name) * (-1 if one.direction == "max" else 1)
        for one in objectives
    ]


class RandomOracle(SearchOracle, kt.oracles.RandomSearchOracle):
    """Random search."""


class BayesianOracle(SearchOracle, kt.oracles.BayesianOptimizationOracle):
    """Bayesian optimization with a Gaussian process."""

    def populate_space(self, trial_id):
        """Values of a new trial."""
        # Resumed, the search draws what it would have drawn.
        self._random_state = np.random.RandomState([self.seed, len(self.trials)])
        # The matrices are small: several threads would do nothing but wait for each other.
        with threadpool_limits(1, "blas"):
            return super().populate_space(trial_id)


class GridOracle(SearchOracle, kt.oracles.GridSearchOracle):
    """Grid search; ten values of each continuous hyperparameter."""

    def reload(self):
        """Go on from the files, in which Keras Tuner has no place in the grid."""
        super().reload()

        def compared(one, other):
            return self._compare(
                *(self.trials[i].hyperparameters.values for i in (one, other))
            )

        for trial_id in sorted(self.trials, key=functools.cmp_to_key(compared)):
            self._ordered_ids.insert(trial_id)
        # Those whose next combination was tried are passed over.
        self._populate_next = list(self.trials)


class HyperbandOracle(SearchOracle, kt.oracles.HyperbandOracle):
    """Hyperband: many trials of few epochs, the best of them again with more."""

    random_weights = False


TUNERS = ("random", "bayesian", "hyperband", "grid")


def make_oracle(
    tuner,
    space,
    objectives,
    max_trials,
    seed,
    budget,
    factor=3,
    silence=None,
    firsts=({},),
):
    """An oracle by name.

    Args:
        tuner: one of `TUNERS`.
        space: `keras_tuner.HyperParameters`.
        objectives: list of `keras_tuner.Objective`.
        max_trials: int; None: no limit (grid and Hyperband).
        seed: int.
        budget: int, the most epochs (or steps) of a trial, for Hyperband.
        factor: int, of Hyperband.
        silence: seconds after which a worker is given up; None: never.
        firsts: dicts of what the first trials have other than the defaults. (A grid begins
            with the defaults.)

    Returns:
        A `SearchOracle`.
    """
    first = objectives[0]
    common = {
        # The scores of several are set by the oracle itself.
        "objective": kt.Objective(first.name, first.direction)
        if len(objectives) == 1
        else kt.Objective(first.name, "min"),
        "hyperparameters": space,
        # Keras Tuner takes 0 for none.
        "seed": seed + 1,
        # One that can't be trained says nothing of the next.
        "max_consecutive_failed_trials": 10**9,
    }
    if tuner == "hyperband":
        oracle = HyperbandOracle(max_epochs=budget, factor=factor, **common)
        oracle.max_trials = max_trials
    elif tuner == "bayesian":
        # By default three trials for each hyperparameter are random.
        points = min(3 * len(space.space), max(3, (max_trials or 30) // 2))
        oracle = BayesianOracle(max_trials=max_trials, num_initial_points=points, **common)
    else:
        kind = {"random": RandomOracle, "grid": GridOracle}[tuner]
        oracle = kind(max_trials=max_trials, **common)
    oracle.objectives = list(objectives)
    if tuner != "grid":
        oracle.firsts = tuple(firsts)
    if silence is not None:
        oracle.silence = silence
    oracle.verbose = 0
    return oracle
