"""Fair training of all methods: equal trials, equal examples, paired draws."""

import dataclasses
import time
import typing

import keras_tuner as kt
import numpy as np

from .. import application, oracles
from .candidates import CANDIDATES

DataError = application("reading").DataError

# Methods that share nothing.
ALONE = ("ridge", "stl")

# Hyperband's: a third of the trials goes on with three times the epochs.
FACTOR = 3


@dataclasses.dataclass
class Options:
    """How methods are compared.

    Attributes:
        methods: list of names, keys of `CANDIDATES`; None: all that fit.
        baseline: str, what the others are compared with; None: of the methods that share
            nothing the one that is better on the validation part.
        trials: int, of each method that has something to choose.
        repeats: int, how many draws.
        budget: float, minutes; where it does not bear as many trials and draws, there are
            fewer, of all methods. None: no limit.
        fractions: shares of the training part to train on, too, for a learning curve.
        epochs: int, of networks; at least 600 steps in all, for which few examples are
            repeated within an epoch.
        batch_size: int.
        validation: float, the share of the training part by which settings are chosen.
        test: float, the share of the examples that are for testing, where no test part is
            given; None: what suits the problem.
        seed: int.
    """

    methods: typing.Sequence | None = None
    baseline: str | None = None
    trials: int = 6
    repeats: int = 5
    budget: float | None = None
    fractions: typing.Sequence = ()
    epochs: int = 30
    batch_size: int = 32
    validation: float = 0.25
    test: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("trials", "repeats", "epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise DataError(f"`{name}`: expected a positive int. Received: {value!r}.")
        shares = {"validation": self.validation}
        if self.test is not None:
            shares["test"] = self.test
        if isinstance(self.fractions, (int, float, str)):
            raise DataError(f"`fractions`: expected a list. Received: {self.fractions!r}.")
        shares |= {f"fractions[{n}]": value for n, value in enumerate(self.fractions)}
        for name, value in shares.items():
            if not 0 < value < 1:
                raise DataError(
                    f"`{name}`: expected a number between 0 and 1. Received: {value!r}."
                )
        if self.budget is not None and not self.budget > 0:
            raise DataError(f"`budget`: expected minutes. Received: {self.budget!r}.")


# Networks of tables with fewer rows of a task extrapolate to anything.
FEW_ROWS = 20


def methods_of(problem, options):
    """The methods that fit, and for the others why not.

    Returns:
        `(names, lacks)`: a list, and a dict from name to str.
    """
    asked = list(CANDIDATES) if options.methods is None else options.methods
    if isinstance(asked, str) or not set(asked) <= set(CANDIDATES):
        raise DataError(
            f"`methods`: expected some of {list(CANDIDATES)}. Received: {asked!r}."
        )
    asked = list(asked)
    lacks = {name: CANDIDATES[name].lack(problem) for name in asked}
    lacks = {name: lack for name, lack in lacks.items() if lack is not None}
    if options.methods is None and problem.tabular:
        rows = int(np.median([len(own) for own in draw(problem, options, 0)[0].values()]))
        if rows < FEW_ROWS:
            few = f"of {rows} rows of a task it learns too little; --methods takes it"
            networks = (name for name in asked if CANDIDATES[name].has_epochs)
            lacks = {**dict.fromkeys(networks, few), **lacks}
    if len(lacks) == len(asked):
        raise DataError(f"`methods`: none of these fits. {lacks}")
    return [name for name in asked if name not in lacks], lacks


def draw(problem, options, number):
    """`(train, test)` of a draw, dicts of indices; the same for all methods."""
    if problem.test is not None:
        return problem.everything(), None
    seed = options.seed + 1000 * number
    share = problem.test_share if options.test is None else options.test
    return problem.split(problem.everything(), share, seed)


class Trial(typing.NamedTuple):
    """Settings that were tried.

    Attributes:
        epochs: int.
        values: dict of hyperparameters.
        error: float, on the validation part; what diverged has 1e9.
        seconds: float.
        first: float, the error on the first of several validation parts, which is that of
            all methods.
    """

    epochs: int
    values: dict
    error: float
    seconds: float
    first: float


class Chooser:
    """Chooses a method's hyperparameters, on parts of the first draw's training part.

    On one, of linear models on the mean over five.

    Args:
        problem: `Problem`.
        options: `Options`.
        method: str.
        results: `Results`, where trials are kept.
        data: str that names the data.
    """

    def __init__(self, problem, options, method, results, data):
        self.problem, self.options, self.method = problem, options, method
        self.results, self.data = results, data
        self.candidate = CANDIDATES[method]
        self.space = kt.HyperParameters()
        self.candidate.declare(self.space, problem)
        self.epochs = options.epochs if self.candidate.has_epochs else 1

    def defaults(self):
        """The trial of the defaults, at full length."""
        return self._tried(dict(self.space.values), self.epochs)

    def has_defaults(self):
        """Whether that was trained already."""
        settings = self._settings(dict(self.space.values), self.epochs)
        return self.results.get(settings) is not None

    def _settings(self, values, epochs):
        """What names a trial."""
        settings = _settings(self.options, self.data, self.method, values, epochs)
        return {**settings, "validation": self.options.validation}

    def _tried(self, values, epochs):
        o = self.options
        settings = self._settings(values, epochs)
        found = self.results.get(settings)
        if found is None:
            train, _ = draw(self.problem, o, 0)
            hp = self.space.copy()
            hp.values = dict(values)
            started, errors = time.perf_counter(), []
            for fold in range(self.candidate.folds):
                seed = o.seed + fold
                first, second = self.problem.split(train, o.validation, seed)
                x, y = self.problem.rows(second)
                trained = self.candidate.train(self.problem, first, hp, o, epochs, seed)
                errors.append(self.problem.score(train, y, trained.predict(x)))
            seconds = (time.perf_counter() - started) / self.candidate.folds
            found = {
                "error": float(np.mean(errors)),
                "seconds": seconds,
                "first": float(errors[0]),
            }
            self.results.add(settings, found)
        # What diverged is worse than all else; earlier versions kept no `first`.
        error, first = (
            value if np.isfinite(value) else 1e9
            for value in (found["error"], found.get("first", found["error"]))
        )
        return Trial(epochs, values, error, found["seconds"], first)

    def choose(self, trials):
        """The best hyperparameters.

        The defaults, and by successive halving others: the trials of Keras Tuner's
        Hyperband with its smallest number of epochs first, the best of them again with
        three times as many. Hyperband counts on dozens of trials before it trains one at
        full length; where there are fewer, the best third of those that have had the most
        epochs are trained so, that they can be held against the defaults.

        Args:
            trials: int, with that of the defaults.

        Returns:
            `(values, tried)`: a dict, and a list of `Trial`.
        """
        tried = [self.defaults()]
        if trials > 1 and self.space.space:
            tried += self._search(trials)
            tried += self._promoted(tried)
        return best_of(tried).values, tried

    def _promoted(self, tried):
        """The best of the short trials at full length, if no other than the defaults is."""
        longest = max((trial.epochs for trial in tried[1:]), default=self.epochs)
        if longest == self.epochs:
            return []
        last = [trial for trial in tried[1:] if trial.epochs == longest]
        last.sort(key=lambda trial: trial.error)
        best = last[: max(1, len(last) // FACTOR)]
        return [self._tried(trial.values, self.epochs) for trial in best]

    def _search(self, trials):
        halving = self.epochs > FACTOR
        oracle = oracles.make_oracle(
            "hyperband" if halving else "random",
            self.space.copy(),
            [kt.Objective("error", "min")],
            # A random search begins with the defaults, at full length.
            trials - halving,
            self.options.seed,
            self.epochs,
            FACTOR,
        )
        folder = str(self.results.path.parent)
        oracle._set_project_dir(folder, f"trials_{self.method}")
        while True:
            trial = oracle.create_trial("compare")
            if trial.status != "RUNNING":
                return
            values = trial.hyperparameters.values
            own = {k: v for k, v in values.items() if not k.startswith("tuner/")}
            found = self._tried(own, values.get("tuner/epochs", self.epochs))
            oracle.update_trial(trial.trial_id, {"error": found.error})
            trial.status = "COMPLETED"
            oracle.end_trial(trial)
            yield found


def best_of(tried):
    """The trial of full length with the smallest error."""
    longest = max(trial.epochs for trial in tried)
    whole = [trial for trial in tried if trial.epochs == longest]
    return min(whole, key=lambda trial: trial.error)


class Plan(typing.NamedTuple):
    """What is done within a budget.

    Attributes:
        methods: list of names.
        trials: int, of each of them.
        repeats: int, draws.
        too_slow: dict from the other methods to the reason.
        minutes: float, that it takes, about.
    """

    methods: list
    trials: int
    repeats: int
    too_slow: dict
    minutes: float


# The share of a budget after which no further method is tried.
TRYING = 0.5

# A trial of successive halving has about so much of the epochs of a whole training.
_TRIAL = 0.6


def spent(seconds):
    """What trainings with the defaults took, by the seconds of one training of each."""
    return sum(own * CANDIDATES[m].folds for m, own in seconds.items())


def plan(options, seconds):
    """As many trials and draws of all methods as a budget bears, equally many of each.

    What was spent on the defaults counts. If not even three trials and draws are possible,
    the slowest methods are left out, but one that shares nothing.

    Args:
        options: `Options`.
        seconds: dict from method to those of its training with the defaults.

    Returns:
        A `Plan`.
    """
    already = spent(seconds)
    budget = np.inf if options.budget is None else 60 * options.budget
    methods, too_slow = list(seconds), {}
    # A part of the examples takes its part of the time, if at all.
    curve = 1 + sum(options.fractions)

    def need(amount, of):
        trials, repeats = amount
        return sum(
            (_TRIAL * (trials - 1) * CANDIDATES[m].folds + repeats * curve) * seconds[m]
            for m in of
        )

    amounts = [
        tuple(
            max(min(3, most), round(share * most))
            for most in (options.trials, options.repeats)
        )
        for share in (1, 0.8, 0.6, 0.5, 0.4, 0.3, 0)
    ]
    while True:
        fits = [one for one in amounts if already + need(one, methods) <= budget]
        kept = options.baseline
        if kept not in methods:
            kept = next((name for name in ALONE if name in methods), methods[0])
        slowest = max(methods, key=lambda m: (m != kept, seconds[m]))
        # Methods of a moment are not what takes too long.
        if fits or slowest == kept or need(amounts[-1], [slowest]) < budget / 50:
            amount = fits[0] if fits else amounts[-1]
            minutes = (already + need(amount, methods)) / 60
            return Plan(methods, *amount, too_slow, minutes)
        methods.remove(slowest)
        too_slow[slowest] = (
            f"a training takes {seconds[slowest]:.0f} seconds, too long for a budget of "
            f"{options.budget:g} minutes"
        )


def _settings(options, data, method, values, epochs):
    """What names a training, a dict."""
    return {
        "data": data,
        "method": method,
        "values": values,
        "epochs": epochs,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "test": options.test,
    }


def run(problem, options, method, values, number, results, data, fraction=1.0):
    """Train on a draw with the chosen settings, and test.

    Args:
        problem: `Problem`.
        options: `Options`.
        method: str.
        values: dict of hyperparameters.
        number: int, of the draw.
        results: `Results`.
        data: str that names the data.
        fraction: float, the share of the training part to train on.

    Returns:
        The results, a dict: `errors` by task, `weights`, `seconds`, `predict_ms`, the
        milliseconds of a prediction, among as many as there are in the test part, and
        `relations`, what was learned of the tasks, `(title, matrix)` or None.
    """
    settings = _settings(options, data, method, values, options.epochs)
    settings["draw"] = number
    if fraction < 1:
        settings["fraction"] = fraction
    found = results.get(settings)
    if found is not None:
        return found
    seed = options.seed + 1000 * number
    train, test = draw(problem, options, number)
    if fraction < 1:
        train, _ = problem.split(train, 1 - fraction, seed)
    x, y = problem.test if test is None else problem.rows(test)
    hp = kt.HyperParameters()
    hp.values = dict(values)
    started = time.perf_counter()
    trained = CANDIDATES[method].train(problem, train, hp, options, options.epochs, seed)
    took = time.perf_counter() - started
    outputs = trained.predict(x)
    started = time.perf_counter()
    # The first time a network is traced.
    trained.predict(x)
    predicting = time.perf_counter() - started
    found = {
        "seconds": took,
        "errors": problem.errors(y, outputs),
        "weights": trained.weights,
        "predict_ms": 1000 * predicting / sum(len(own) for own in y.values()),
        "step_ms": trained.step_ms,
        "flops": trained.flops,
    }
    if trained.relations is not None:
        title, matrix = trained.relations
        found["relations"] = [title, np.asarray(matrix, float).round(4).tolist()]
    results.add(settings, found)
    return found


def train(problem, method, values, epochs=30, batch_size=32, seed=0):
    """Train one method on all examples.

    Args:
        problem: `Problem`.
        method: a key of `CANDIDATES`.
        values: dict of its hyperparameters, as chosen; those that it lacks have defaults.
        epochs: int, of networks, as for `Options`.
        batch_size: int, likewise.
        seed: int.

    Returns:
        A `candidates.Trained`.
    """
    if method not in CANDIDATES:
        raise DataError(
            f"`method`: expected one of {list(CANDIDATES)}. Received: {method!r}."
        )
    candidate, hp = CANDIDATES[method], kt.HyperParameters()
    lack = candidate.lack(problem)
    if lack is not None:
        raise DataError(f"`method`: {method!r} does not fit: {lack}.")
    candidate.declare(hp, problem)
    if not set(values) <= set(hp.values):
        raise DataError(
            f"`values`: {method!r} has {list(hp.values)}. Received: {list(values)}."
        )
    hp.values = {**hp.values, **values}
    options = Options(epochs=epochs, batch_size=batch_size, seed=seed)
    return candidate.train(problem, problem.everything(), hp, options, epochs, seed)
