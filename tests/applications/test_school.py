"""The experiment on tables of many tasks, on generated ones; on School where it is."""

import os
import pathlib

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from applications import school
from applications.tabular import read_tabular, split_rows


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Twelve clinics with four to nine patients, whose slopes are nearly the same."""
    rng = np.random.default_rng(0)
    rows = []
    for clinic in range(12):
        slope = np.array([2.0, -1.0]) + 0.1 * rng.normal(size=2)
        for _ in range(rng.integers(4, 10)):
            x, kind = rng.normal(size=2), rng.choice(["a", "b"])
            days = 3 * clinic + slope @ x + (kind == "b") + 0.5 * rng.normal()
            first = "" if rng.random() < 0.05 else f"{x[0]:.3f}"
            rows.append(f"c{clinic},{first},{x[1]:.3f},{kind},{days:.3f}")
    path = tmp_path_factory.mktemp("table") / "clinics.csv"
    path.write_text("\n".join(["clinic,x,z,kind,days", *rows, ""]))
    return path


def command(table, output, *more):
    arguments = ["--data", str(table), "--task", "clinic", "--target", "days"]
    return school.main([*arguments, "--output", str(output), *more])["school"]


@pytest.mark.parametrize("name", school.METHODS)
def test_every_method(name, table):
    """With each of its settings' first values, on rows with categories and gaps."""
    data = read_tabular(table, "clinic", "days")
    part = school.Part(data, *split_rows(data.rows(), 0.5, 0))
    method = school.METHODS[name]
    found = part.predict(method, method.settings()[0])
    errors = school.scores(found, part.test_y)
    assert list(found) == list(part.test_y) and errors["rmse"] < 12
    for task, values in part.test_y.items():
        assert found[task].shape == values.shape


def test_command(table, tmp_path, capsys):
    """Resumed with one split more; differences to STL are paired; a page is written."""
    page = tmp_path / "page.md"
    page.write_text("<!-- school:begin -->\n<!-- school:end -->\n")
    chosen = ["stl", "slope", "trace"]
    names = ["--methods", *chosen]
    command(table, tmp_path / "out", "--repeats", "1", *names)
    capsys.readouterr()
    more = ["--repeats", "2", *names, "--page", str(page)]
    frame = command(table, tmp_path / "out", *more).set_index("Method")
    said = capsys.readouterr().out
    assert "split 1: RMSE" in said and "split 0: RMSE" not in said
    assert len(frame) == len(chosen) and set(frame["Splits"]) == {"2"}
    runs = pd.read_json(tmp_path / "out" / "runs.jsonl", lines=True)
    results = pd.json_normalize(runs.results).assign(
        **{name: [own[name] for own in runs.settings] for name in ("method", "seed")}
    )
    explained = results.pivot(index="seed", columns="method", values="explained_variance")
    difference = 100 * (explained.slope - explained.stl)
    row = frame.loc["one slope, own intercepts"]
    assert row["To STL"] == f"{difference.mean():+.1f}"
    low, high = stats.t.interval(0.95, 1, difference.mean(), stats.sem(difference, ddof=1))
    assert row["95% interval"] == f"{low:+.1f} to {high:+.1f}"
    assert row["Better in"] == "2 of 2"
    assert explained.slope.min() > explained.stl.max()
    assert "one slope, own intercepts" in page.read_text()


def test_small_shares(table, tmp_path):
    """Where some tasks have one row to train on."""
    more = "--repeats 1 --methods stl slope --fractions 0.1 0.5 --folds 2".split()
    frame = command(table, tmp_path / "out", *more)
    assert frame["Trained on"].tolist() == ["50%", "50%", "10%", "10%"]
    assert frame["95% interval"].tolist() == ["-"] * 4


def test_strengths_are_chosen_on_training_data(table):
    """Neither the choice nor the encoder sees the test rows."""
    data = read_tabular(table, "clinic", "days")
    options = school.parse(
        ["--data", str(table), "--task", "clinic", "--target", "days", "--repeats", "1"]
    )
    part = school.School().draw(options, data, 0)
    method = school.METHODS["slope"]
    chosen = part.choose(method, 3, 0)
    held = {name: set(map(float, y)) for name, y in part.test_y.items()}
    for name, own in part.test_y.items():
        rows = np.flatnonzero((data.tasks == name) & np.isin(data.target, list(held[name])))
        assert len(rows) == len(own)
        data.target[rows] = 1e6
        data.features.loc[rows, "x"] = -1e6
    again = school.School().draw(options, data, 0)
    assert again.choose(method, 3, 0) == chosen
    for name in part.x:
        np.testing.assert_array_equal(part.x[name], again.x[name])


def test_scores():
    """Explained variance and errors over all rows, and by task."""
    target = {"a": np.array([1.0, 3.0]), "b": np.array([5.0])}
    found = school.scores({"a": np.array([1.0, 2.0]), "b": np.array([5.0])}, target)
    assert found["explained_variance"] == pytest.approx(1 - (1 / 3) / (8 / 3))
    assert found["rmse"] == pytest.approx(np.sqrt(1 / 3))
    assert found["rmse_of_tasks"] == pytest.approx(np.sqrt(0.5) / 2)


def test_simple_methods_are_those_of_scikit_learn(rng):
    """Ridge regressions: alone, pooled, and on data centred by task."""
    from sklearn.linear_model import Ridge

    x = {name: rng.normal(size=(6, 3)) for name in "ab"}
    y = {name: rng.normal(size=6) for name in "ab"}
    new = {name: rng.normal(size=(2, 3)) for name in "ab"}
    pooled = Ridge(2.0).fit(np.concatenate([*x.values()]), np.concatenate([*y.values()]))
    centred = [(x[t] - x[t].mean(axis=0), y[t] - y[t].mean()) for t in "ab"]
    slope = Ridge(2.0, fit_intercept=False).fit(*map(np.concatenate, zip(*centred)))
    for name in "ab":
        expected = {
            "stl": Ridge(2.0).fit(x[name], y[name]).predict(new[name]),
            "pooled": pooled.predict(new[name]),
            "slope": slope.predict(new[name] - x[name].mean(axis=0)) + y[name].mean(),
        }
        for method, values in expected.items():
            found = school.METHODS[method].fit(x, y, False, strength=2.0)(new)[name]
            np.testing.assert_allclose(found, values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data x.csv", "a CSV file needs --task COLUMN and --target COLUMN"),
        ("--data x.mat --separator ab", "--separator: expected one character"),
        ("--data x.mat --folds 1", "--folds: expected a whole number from 2 to 100"),
        ("--data x.mat --fractions 1", "finite number above 0 and below 1, got '1'"),
        ("--task a", "the following arguments are required: --data"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        school.parse(arguments.split())
    assert message in capsys.readouterr().err


def test_errors_are_one_line(table, tmp_path, capsys):
    """A missing file, and a table with a wrong cell."""
    with pytest.raises(SystemExit, match=r"none\.csv"):
        command(tmp_path / "none.csv", tmp_path / "out")
    text = table.read_text().replace("c3,", "c3,x", 1)
    (tmp_path / "wrong.csv").write_text(text)
    with pytest.raises(
        SystemExit, match=r"wrong\.csv, row .*, column 'x': expected finite"
    ):
        command(tmp_path / "wrong.csv", tmp_path / "out")


@pytest.mark.skipif("DMTRL_DATA_DIR" not in os.environ, reason="no folder of data is named")
def test_on_school(tmp_path):
    """All 139 schools; one slope with an intercept each is far above ridge by itself."""
    path = pathlib.Path(os.environ["DMTRL_DATA_DIR"]) / "school.mat"
    arguments = f"--data {path} --repeats 1 --methods stl slope --output {tmp_path}".split()
    frame = school.main(arguments)["school"]
    explained = frame["Explained variance %"].astype(float).tolist()
    assert explained[0] == pytest.approx(33.1, abs=0.5)
    assert explained[1] == pytest.approx(37.8, abs=0.3)
