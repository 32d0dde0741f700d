"""Few drawings in many alphabets, on generated ones."""

import numpy as np
import pytest
from test_omniglot import write_alphabets

from applications import characters
from applications.alphabets import load_alphabets, split
from applications.reading import DataError
from applications.results import Results
from dmtrl_keras.layers import TaskDense

SIZES = {"A": 3, "B": 2, "C": 3}
SMALL = "--size 8 --components 4 --steps 3 --examples 2 --repeats 2 --hidden 3".split()


@pytest.fixture
def part(tmp_path, rng):
    """Features of three alphabets, two drawings of each character to train on."""
    tasks = load_alphabets(write_alphabets(tmp_path, rng, SIZES), 8)
    parts = split(tasks, lambda _: 2, 2, False, 0, "2 of")
    return characters.Part(tasks, parts, 4)


def options(*more):
    """Parsed arguments of a small run."""
    found = characters.parse(["--data", "x", *SMALL, *more])
    found.strength = 0.1
    return found


def test_split(tmp_path, rng):
    """As many of each character, others than those held back; larger parts grow."""
    tasks = load_alphabets(write_alphabets(tmp_path, rng, SIZES), 8)
    for name, task in tasks.items():
        found = {}
        for count in (2, 3):
            for validation in (False, True):
                parts = split(tasks, lambda _, n=count: n, 2, validation, 0, "")
                train, test = parts[name]
                found[count, validation] = set(train), set(test)
                assert np.all(np.bincount(task.labels[train]) == count)
                assert not found[count, validation][0] & found[count, validation][1]
            assert found[count, False][0] == found[count, True][0]
            back = found[count, True][1]
            assert not back & found[count, False][1]
            assert np.all(np.bincount(task.labels[list(back)]) == 2)
        assert found[2, False][0] < found[3, False][0]


def test_features(part):
    """Principal components of the training drawings, as scikit-learn has them by hand."""
    train = np.concatenate([sides[0] for sides in part.x.values()])
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    covariance = np.cov(train.T)
    np.testing.assert_allclose(covariance[0, 0], 1, rtol=1e-4)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    shuffled = part.features("shuffled", 3)
    orders = []
    for name, sides in part.x.items():
        order = [
            int(np.flatnonzero(np.all(sides[0] == column[:, None], axis=0))[0])
            for column in shuffled[name][0].T
        ]
        assert sorted(order) == list(range(4))
        np.testing.assert_array_equal(shuffled[name][1], sides[1][:, order])
        orders.append(tuple(order))
    assert len(set(orders)) > 1
    assert part.features("mrn", 3) is part.x


def test_networks(part):
    """What the methods share: nothing, a covariance, a layer; never classes."""
    for method in characters.METHODS:
        model = characters.make_network(options(), method, part.classes, 4)
        layers = [layer for layer in model.layers if isinstance(layer, TaskDense)]
        # A and C have equally many characters, and none in common.
        assert [layer.tasks for layer in layers] == [1, 1, 1]
        priors = [layer.prior for layer in layers]
        if method == "alone":
            assert priors == [None] * 3
            continue
        covariances = {next(iter(prior.modes.values())) for prior in priors}
        common = method in ("decay", "mrn", "shuffled", "hard")
        assert len(covariances) == (1 if common else 3), method
        every = {prior.regularizer.update_every for prior in priors}
        assert every == ({10} if method in characters.LEARNED else {None})
        assert ("bottleneck" in [layer.name for layer in model.layers]) == (
            method == "hard"
        )


@pytest.mark.long
def test_command(tmp_path, rng):
    """The strength is chosen on what is held back; the table's values are the runs'."""
    folder = write_alphabets(tmp_path / "data", rng, SIZES)
    arguments = ["--data", str(folder), "--output", str(tmp_path / "results"), *SMALL]
    arguments += ["--strengths", "0.01", "1", "--methods", "alone", "decay", "mrn"]
    page = tmp_path / "page.md"
    page.write_text("<!-- characters:begin -->\n<!-- characters:end -->\n")
    table = characters.main([*arguments, "--page", str(page)])["characters"]
    stored = list(Results(tmp_path / "results" / "runs.jsonl")._runs.values())
    tried = [run for run in stored if run["settings"]["validation"]]
    # Two strengths of two methods; one method has none.
    assert len(tried) == 4 and len(stored) == 4 + 3 * 2
    for method in ("decay", "mrn"):
        own = {
            run["settings"]["strength"]: np.mean(list(run["results"]["errors"].values()))
            for run in tried
            if run["settings"]["method"] == method
        }
        best = min(own, key=own.get)
        final = [
            run
            for run in stored
            if run["settings"]["method"] == method and not run["settings"]["validation"]
        ]
        assert {run["settings"]["strength"] for run in final} == {best}
        row = table[table.Method == characters.METHODS[method]].iloc[0]
        errors = [100 * np.mean(list(run["results"]["errors"].values())) for run in final]
        assert row["Error %"].startswith(f"{np.mean(errors):.1f} ±")
        assert row["Strength"] == f"{best:g}"
    assert (tmp_path / "results" / "variances.png").exists()
    assert "one feature covariance (MRN)" in page.read_text()
    with pytest.raises(SystemExit, match=r"5 of 5 drawings.*none to test on"):
        characters.main([*arguments, "--examples", "5"])
    with pytest.raises(DataError, match="none to test on"):
        split(load_alphabets(folder, 8), lambda kept: kept, 0, False, 0, "all of")
