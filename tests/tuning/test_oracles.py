"""The oracles, on functions of two numbers instead of networks."""

import doctest

import keras_tuner as kt
import numpy as np
import pytest

from tuning import oracles


def space():
    hp = kt.HyperParameters()
    hp.Float("x", -1.0, 3.0, default=0.25)
    hp.Choice("kind", ["one", "two"])
    with hp.conditional_scope("kind", ["two"]):
        hp.Int("units", 1, 4, default=3)
    return hp


def make(tuner="random", objectives=("loss",), trials=6, **arguments):
    objectives = [kt.Objective(name, "min") for name in objectives]
    return oracles.make_oracle(tuner, space(), objectives, trials, 0, budget=9, **arguments)


@pytest.fixture
def oracle(tmp_path):
    """A function that makes an oracle with a folder."""

    def made(*arguments, **options):
        one = make(*arguments, **options)
        one._set_project_dir(tmp_path, "search")
        return one

    return made


def run(oracle, function, worker="tuner0"):
    """One trial; None at the end."""
    trial = oracle.create_trial(worker)
    if trial.status == "STOPPED":
        return None
    oracle.update_trial(trial.trial_id, function(trial.hyperparameters.values))
    trial.status = "COMPLETED"
    oracle.end_trial(trial)
    return trial


def test_scalarize_and_front_are_loops(rng):
    assert doctest.testmod(oracles).failed == 0
    values = rng.integers(0, 5, size=(12, 3)).astype(float)
    weights = rng.dirichlet(np.ones(3))
    spans = values.max(0) - values.min(0)
    for row, score in zip(values, oracles.scalarize(values, weights)):
        terms = [
            w * (v - low) / span
            for w, v, low, span in zip(weights, row, values.min(0), spans)
        ]
        assert score == pytest.approx(max(terms) + 0.05 * sum(terms))
    for row, on_front in zip(values, oracles.pareto_front(values)):
        dominated = any(
            all(o <= r for o, r in zip(other, row))
            and any(o < r for o, r in zip(other, row))
            for other in values
        )
        assert on_front != dominated
    equal = oracles.scalarize(np.ones((3, 2)), [0.5, 0.5])
    np.testing.assert_array_equal(equal, 0)


@pytest.mark.parametrize("tuner", oracles.TUNERS)
def test_defaults_first(oracle, tuner):
    """All tuners begin with the default values, and inactive ones have none."""
    one = oracle(tuner)
    first = run(one, lambda values: {"loss": 1.0}).hyperparameters.values
    own = {name: v for name, v in first.items() if not name.startswith("tuner/")}
    assert own == {"x": 0.25, "kind": "one"}
    assert ("tuner/epochs" in first) == (tuner == "hyperband")
    others = [run(one, lambda values: {"loss": values["x"]}) for _ in range(5)]
    assert all(
        "units" in t.hyperparameters.values
        for t in others
        if t.hyperparameters.values["kind"] == "two"
    )
    assert run(one, lambda values: {"loss": 1.0}) is None
    assert len(one.trials) == 6


@pytest.mark.parametrize("tuner", oracles.TUNERS)
def test_what_the_first_trials_have(oracle, tuner):
    """The defaults of each kind before all else; a grid has an order of its own."""
    trials = 11 if tuner == "hyperband" else 4
    one = oracle(tuner, trials=trials, firsts=({"kind": "one"}, {"kind": "two"}))
    loss = {"one": 2.0, "two": 1.0}
    while run(one, lambda values: {"loss": loss[values["kind"]] + values["x"] ** 2}):
        pass
    trials = [trial.hyperparameters.values for trial in one.trials.values()]
    own = [{n: v for n, v in t.items() if not n.startswith("tuner/")} for t in trials]
    assert own[0] == {"x": 0.25, "kind": "one"}
    assert tuner == "grid" or own[1] == {"x": 0.25, "kind": "two", "units": 3}
    assert all(("units" in values) == (values["kind"] == "two") for values in own)
    if tuner == "hyperband":
        again = [t for t in trials if t["tuner/round"]]
        assert again
        for trial in again:
            assert trial["x"] == trials[int(trial["tuner/trial_id"])]["x"]


def test_front_is_covered(oracle):
    """x**2 and (x - 2)**2: the front is [0, 2], and trials are found all along it."""

    def functions(values):
        return {"loss": values["x"] ** 2, "size": (values["x"] - 2) ** 2}

    wide = kt.HyperParameters()
    wide.Float("x", -9.0, 11.0, default=-5.0)
    one = oracle("bayesian", ("loss", "size"), trials=20)
    one.hyperparameters = wide
    while run(one, functions):
        pass
    found = np.array([t.hyperparameters.values["x"] for t in one.trials.values()])
    # A tenth of what is random lies there.
    on_front = (found > -0.2) & (found < 2.2)
    assert on_front[10:].mean() >= 0.5
    assert np.histogram(found[on_front], [-0.2, 1, 2.2])[0].min() >= 2


def test_same_after_a_restart(oracle, tmp_path):
    """A search that is interrupted goes on with the trial that had begun."""
    function = lambda values: {"loss": values["x"]}  # noqa: E731
    whole = oracle("random")
    expected = [run(whole, function).hyperparameters.values for _ in range(4)]
    for path in tmp_path.rglob("*.json"):
        path.unlink()
    first = oracle("random")
    for _ in range(2):
        run(first, function)
    begun = first.create_trial("tuner0")
    again = oracle("random")
    again.reload()
    found = [again.trials[key].hyperparameters.values for key in sorted(again.trials)]
    assert run(again, function).trial_id == begun.trial_id
    found = [*found[:2], again.trials[begun.trial_id].hyperparameters.values]
    found.append(run(again, function).hyperparameters.values)
    assert found == expected


def test_silent_workers(oracle, monkeypatch):
    """The trial of a worker that died is another's; what it still says is not counted."""
    now = [0.0]
    monkeypatch.setattr(oracles.time, "monotonic", lambda: now[0])
    one = oracle("random", trials=2, silence=60.0)
    lost = one.create_trial("a")
    kept = one.create_trial("b")
    now[0] = 50
    # One of them says that it lives.
    one.get_trial(kept.trial_id)
    now[0] = 100
    again = one.create_trial("c")
    assert again.trial_id == lost.trial_id and set(one.ongoing_trials) == {"b", "c"}
    # All trials are given out, but may yet be lost: no one is sent away.
    assert one.create_trial("d").status == "IDLE"
    for trial in (again, kept):
        one.update_trial(trial.trial_id, {"loss": 1.0})
        trial.status = "COMPLETED"
        one.end_trial(trial)
    ended = list(one.end_order)
    one.end_trial(lost)
    assert one.end_order == ended and len(ended) == 2
    assert one.create_trial("c").status == "STOPPED"
    # The dead one is not waited for, and the others as long as they may live.
    assert one.tuner_ids == {"b", "d"}
    now[0] = 200
    assert one.tuner_ids == set()


def test_failures_never_end_it(oracle):
    """Keras Tuner gives up after three in a row."""
    one = oracle("random")
    for _ in range(5):
        trial = one.create_trial("tuner0")
        trial.status, trial.message = "FAILED", "ValueError: too large"
        one.end_trial(trial)
    assert one.create_trial("tuner0").status == "RUNNING"
