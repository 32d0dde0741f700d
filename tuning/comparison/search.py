"""Fair training of all methods: equal trials, equal examples, paired draws."""

import dataclasses
import time
import typing

import keras_tuner as kt
import numpy as np

from .. import oracles
from .candidates import CANDIDATES

# Hyperband's: a third of the trials goes on with three times the epochs.
FACTOR = 3


@dataclasses.dataclass
class Options:
    """How methods are compared.

    Attributes:
        methods: list of names, keys of `CANDIDATES`; None: all that fit.
        baseline: str, what the others are compared with.
        trials: int, of each method that has something to choose.
        repeats: int, how many draws.
        epochs: int, of networks.
        batch_size: int.
        validation: float, the share of the training part by which settings are chosen.
        test: float, the share of the examples that are for testing, where no test part is
            given.
        seed: int.
    """

    methods: typing.Sequence | None = None
    baseline: str | None = None
    trials: int = 6
    repeats: int = 5
    epochs: int = 30
    batch_size: int = 32
    validation: float = 0.25
    test: float = 0.3
    seed: int = 0


def methods_of(problem, options):
    """The methods that fit, and for the others why not.

    Returns:
        `(names, lacks)`: a list, and a dict from name to str.
    """
    asked = list(CANDIDATES) if options.methods is None else list(options.methods)
    lacks = {name: CANDIDATES[name].lack(problem) for name in asked}
    lacks = {name: lack for name, lack in lacks.items() if lack is not None}
    return [name for name in asked if name not in lacks], lacks


def draw(problem, options, number):
    """`(train, test)` of a draw, dicts of indices; the same for all methods."""
    if problem.test is not None:
        return problem.everything(), None
    seed = options.seed + 1000 * number
    return problem.split(problem.everything(), options.test, seed)


def choose(problem, options, method, results, data):
    """The best hyperparameters of a method, on the validation part of the first draw.

    Successive halving: the trials of Keras Tuner's Hyperband with its smallest
    number of epochs first, the best of them again with three times as many.

    Args:
        problem: `Problem`.
        options: `Options`.
        method: str.
        results: `Results`, where trials are kept.
        data: str that names the data.

    Returns:
        `(values, trials)`: a dict, and a list of `(values, score)`.
    """
    candidate = CANDIDATES[method]
    space = kt.HyperParameters()
    candidate.declare(space, problem)
    if not space.space:
        return {}, []
    train, _ = draw(problem, options, 0)
    first, second = problem.split(train, options.validation, options.seed)
    x, y = problem.rows(second)
    epochs = options.epochs if candidate.has_epochs else 1
    oracle = oracles.make_oracle(
        "hyperband" if epochs > FACTOR else "random",
        space,
        [kt.Objective("error", "min")],
        options.trials,
        options.seed,
        epochs,
        FACTOR,
    )
    oracle._set_project_dir(str(results.path.parent), f"trials_{method}")
    tried = []
    while True:
        trial = oracle.create_trial("compare")
        if trial.status != "RUNNING":
            break
        hp = trial.hyperparameters
        own = hp.values.get("tuner/epochs", epochs)
        values = {k: v for k, v in hp.values.items() if not k.startswith("tuner/")}
        settings = _settings(options, data, method, values, own)
        settings["validation"] = options.validation
        found = results.get(settings)
        if found is None:
            trained = candidate.train(problem, first, hp, options, own, options.seed)
            found = {"error": problem.score(train, y, trained.predict(x))}
            results.add(settings, found)
        # What diverged is worse than all else.
        error = found["error"] if np.isfinite(found["error"]) else 1e9
        oracle.update_trial(trial.trial_id, {"error": error})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
        tried.append((own, values, error))
    longest = max(own for own, *_ in tried)
    best = min((one for one in tried if one[0] == longest), key=lambda one: one[-1])
    return best[1], tried


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


def run(problem, options, method, values, number, results, data):
    """Train on a draw with the chosen settings, and test.

    Returns:
        The results, a dict: `errors` by task, `weights`, `seconds`.
    """
    settings = _settings(options, data, method, values, options.epochs)
    settings["draw"] = number
    found = results.get(settings)
    if found is not None:
        return found
    train, test = draw(problem, options, number)
    x, y = problem.test if test is None else problem.rows(test)
    hp = kt.HyperParameters()
    hp.values = dict(values)
    seed = options.seed + 1000 * number
    started = time.perf_counter()
    trained = CANDIDATES[method].train(problem, train, hp, options, options.epochs, seed)
    found = {
        "seconds": time.perf_counter() - started,
        "errors": problem.errors(y, trained.predict(x)),
        "weights": trained.weights,
    }
    results.add(settings, found)
    return found
