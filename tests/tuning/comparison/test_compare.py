"""Comparisons of methods: fair, resumed, and right about planted tasks."""

import html
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pandas as pd
import pytest

from applications.results import Results
from tuning.comparison import (
    CANDIDATES,
    Problem,
    candidates,
    command,
    compare,
    example,
    problem,
)
from tuning.comparison.compared import compare_on
from tuning.comparison.search import (
    Chooser,
    Options,
    Trial,
    draw,
    methods_of,
    plan,
    train,
)


def planted(kind, seed, tasks=8, count=40, features=12):
    """Linear regressions whose relations are known."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, features))
    # Groups that have nothing in common; by chance they would, and be one.
    second -= first * (first @ second) / (first @ first)
    first, second = (1.5 * w / np.linalg.norm(w) for w in (first, second))
    slopes = {
        "copies": [first] * tasks,
        "independent": 1.5 * rng.normal(size=(tasks, features)) / np.sqrt(features),
        "outlier": [first] * (tasks - 1) + [-first],
        "groups": [first] * (tasks // 2) + [second] * (tasks - tasks // 2),
    }[kind]
    x = {f"task_{k}": rng.normal(size=(count, features)) for k in range(tasks)}
    y = {t: x[t] @ w + rng.normal(size=count) for (t, w) in zip(x, slopes)}
    return x, y


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Networks of few steps."""
    monkeypatch.setattr(candidates, "LEAST_STEPS", 20)


LINEAR = {"methods": ["ridge", "pooled", "related"], "test": 0.5, "trials": 5}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("copies", "pooled"),
        ("independent", "ridge"),
        ("outlier", "related"),
        ("groups", "related"),
    ],
)
def test_planted(kind, expected):
    """All-shared for copies, single tasks for independent ones, relations for the others.

    In nine of ten seeds.
    """
    found = [
        compare(*planted(kind, seed), repeats=4, seed=seed, **LINEAR).recommendation.method
        for seed in range(10)
    ]
    assert found.count(expected) >= 9, found


def test_resumed(tmp_path, monkeypatch):
    """A second call trains nothing, and finds the same."""
    data = planted("copies", 0, tasks=3, count=20)
    arguments = {**LINEAR, "methods": ["ridge", "pooled"], "repeats": 2, "trials": 2}
    first = compare(*data, tmp_path, **arguments)
    assert first.recommendation.method in ("ridge", "pooled")
    assert list(first.table.index) == ["ridge", "pooled"]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    # Of each method two trials, two draws, and that it is done.
    assert len(lines) == 2 * (2 + 2 + 1)
    monkeypatch.setattr(CANDIDATES["ridge"], "train", None)
    again = compare(*data, tmp_path, **arguments)
    assert again.sentence == first.sentence
    np.testing.assert_array_equal(again.errors["pooled"], first.errors["pooled"])
    assert all("settings" in json.loads(line) for line in lines)


def test_draws_are_paired_and_apart(rng):
    """All methods see the same examples; test examples are for testing only."""
    x = {"a": rng.normal(size=(20, 2)), "b": rng.normal(size=(30, 2))}
    y = {"a": rng.integers(2, size=20), "b": rng.integers(3, size=30)}
    own = Problem(x, y)
    assert own.kinds == {"a": "binary", "b": "classes"} and own.heads == {"a": 1, "b": 3}
    for number in range(3):
        train, test = draw(own, Options(test=0.25), number)
        for task, count in {"a": 5, "b": 8}.items():
            assert len(test[task]) == count
            assert sorted([*train[task], *test[task]]) == list(range(len(y[task])))
        again = draw(own, Options(test=0.25), number)
        np.testing.assert_array_equal(again[1]["b"], test["b"])
    shared = Problem(rng.normal(size=(20, 2)), {"a": y["a"], "b": y["b"][:20]})
    train, test = draw(shared, Options(), 0)
    np.testing.assert_array_equal(test["a"], test["b"])


def test_what_does_not_fit(rng):
    """Left out, with the reason."""
    images = rng.normal(size=(12, 4, 4, 1))
    labels = {"a": rng.integers(2, size=12), "b": rng.integers(2, size=12)}
    flat = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten()])
    methods, lacks = methods_of(Problem(images, labels, backbone=lambda: flat), Options())
    linear = {"ridge", "pooled", "related", "mean", "trace-linear", "group-linear"}
    assert {*linear, "clustered", "similar", "cut", "lora"} == set(lacks)
    assert "rows of numbers" in lacks["ridge"] and "convolution" in lacks["similar"]
    assert {"stl", "hard", "tucker", "drn", "trn", "trace"} <= set(methods)
    own = Problem({t: rng.normal(size=(12, 3)) for t in labels}, labels)
    lacks = methods_of(own, Options())[1]
    assert all("not the same" in lacks[name] for name in ("trn", "stitch", "nddr"))
    assert "regressions" in lacks["related"]


@pytest.mark.long
def test_networks(rng):
    """Networks of each family on a table, classes and regressions side by side."""
    x = {"a": rng.normal(size=(24, 3)), "b": rng.normal(size=(16, 3))}
    y = {"a": (x["a"][:, 0] > 0).astype(int), "b": 5 + 10 * x["b"] @ [1.0, 2.0, 3.0]}
    methods = ["ridge", "stl", "hard", "wide", "cut", "deviation", "trace", "tucker", "drn"]
    settings = {"repeats": 2, "trials": 1, "epochs": 2, "batch_size": 8}
    found = compare(x, y, methods=methods, baseline="stl", **settings)
    assert list(found.table.index) == methods and found.baseline == "stl"
    assert np.isfinite(found.table[["error", "delta", "weights", "seconds"]]).all(axis=None)
    assert found.table.weights["hard"] < found.table.weights["stl"]
    weights = found.table.weights
    assert weights["hard"] < weights["cut"] < weights["stl"]
    assert weights["wide"] == pytest.approx(weights["stl"], rel=0.03)
    assert weights["stl"] == weights["trace"] == weights["deviation"]
    assert found.by_task.shape == (9, 2) and not len(found.curve)
    assert set(found.relations) == {"drn", "tucker"}
    assert found.by_task.b["ridge"] < 0.5
    # Networks of which a task sees the others' features, on the same examples.
    y = {"a": y["a"], "b": x["a"] @ [1.0, 2.0, 3.0]}
    methods = ["stl", "stitch", "nddr", "trn"]
    found = compare(x["a"], y, methods=methods, **settings)
    assert found.table.weights["stl"] < found.table.weights["stitch"]
    assert set(found.relations) == {"stitch", "nddr", "trn"}
    assert all(matrix.shape == (2, 2) for _, matrix in found.relations.values())


def test_errors(rng):
    """Malformed data."""
    x = {"a": rng.normal(size=(8, 2)), "b": rng.normal(size=(8, 2))}
    with pytest.raises(problem.DataError, match="two tasks at least"):
        Problem({"a": x["a"]}, {"a": np.zeros(8)})
    with pytest.raises(problem.DataError, match=r"'b': \(8, 7\)"):
        Problem(x, {"a": np.zeros(8), "b": np.zeros(7)})
    y = {"a": rng.normal(size=8), "b": rng.normal(size=8)}
    with pytest.raises(
        problem.DataError, match=r"auc: it is of .*'a' is of kind 'regr.*rmse"
    ):
        Problem(x, y, metric="auc")
    ones = np.ones(8, int)
    for labels, message in (
        ({"a": np.zeros(8), "b": y["b"]}, "'a': expected targets that differ.*all are 0"),
        ({"a": 2 * np.arange(8) % 4 - 1, "b": ones}, "Received: -1 and 1 only"),
        ({"a": -ones, "b": ones}, "'a' has no label that is known"),
        ({"a": np.array(list("abababab")), "b": ones}, "'a': expected numbers, classes as"),
        (np.zeros((8, 2)), "`y`: expected a dict"),
        ({"a": ones}, "`x`: expected the examples of the tasks"),
    ):
        with pytest.raises(problem.DataError, match=message):
            Problem(x, labels)
    with pytest.raises(problem.DataError, match="`backbone`: expected a function"):
        Problem(x, y, backbone=3)
    for wrong in (
        {"methods": ["rigde"]},
        {"methods": "ridge"},
        {"methods": ["similar"]},
        {"metric": "f1"},
        {"repeats": 0},
        {"budget": -1},
        {"fractions": 0.5},
        {"fractions": [2.0]},
    ):
        with pytest.raises(problem.DataError, match=next(iter(wrong))):
            compare(x, y, **wrong)
    own = Problem(x, y)
    with pytest.raises(problem.DataError, match="'nope'"):
        train(own, "nope", {})
    with pytest.raises(problem.DataError, match=r"\['strength'\].*\['alpha'\]"):
        train(own, "ridge", {"alpha": 1})
    with pytest.raises(problem.DataError, match=r"Expected tasks of.*\['z'\]"):
        train(own, "ridge", {}).predict({"z": x["a"]})


@pytest.mark.long
def test_missing_labels(rng):
    """NaN of regressions and -1 of classes: nothing is learned from them, or tested."""
    x = {t: rng.normal(size=(60, 2)) for t in "ab"}
    numbers = {t: rows @ [1.0, -1.0] for t, rows in x.items()}
    classes = {t: (values > 0).astype(int) for t, values in numbers.items()}
    three = {t: v + (numbers[t] > 1) for t, v in classes.items()}
    settings = {
        "methods": ["ridge", "pooled", "stl"],
        "repeats": 2,
        "trials": 1,
        "epochs": 30,
    }
    for labels, mark in ((numbers, np.nan), (classes, -1), (three, -1)):
        holes = {t: values.copy() for t, values in labels.items()}
        holes["a"][::3] = mark
        found = compare(x, holes, **settings)
        assert np.isfinite(found.by_task).all(axis=None)
        assert (found.by_task.loc["ridge"] < 0.2).all(), found.by_task


def test_a_shared_array(rng):
    """Trained and predicted as it was given."""
    x = rng.normal(size=(30, 2))
    own = Problem(x, {"a": x[:, 0], "b": x[:, 1] - x[:, 0]})
    predicted = train(own, "ridge", {"strength": 0.01}).predict(x)
    np.testing.assert_allclose(predicted["b"][:, 0], x[:, 1] - x[:, 0], atol=0.02)


@pytest.mark.parametrize("trials", [2, 4, 6, 12])
def test_networks_are_tuned(trials, tmp_path, rng, monkeypatch):
    """Few trials, too, have another at full length than the defaults, the best of them."""
    x = {t: rng.normal(size=(20, 2)) for t in "ab"}
    own = Problem(x, {t: rows[:, 0] for t, rows in x.items()})
    results = Results(tmp_path / "runs.jsonl")
    chooser = Chooser(own, Options(trials=trials, epochs=30), "stl", results, "data")
    asked = []

    def tried(values, epochs):
        asked.append(epochs)
        # The larger the rate, the better; and the longer.
        error = 1 / values["learning_rate"] + 1 / epochs
        return Trial(epochs, dict(values), error, 1.0, error)

    monkeypatch.setattr(chooser, "_tried", tried)
    values, found = chooser.choose(trials)
    full = [trial for trial in found if trial.epochs == 30]
    assert len(full) > 1 and asked[0] == 30
    rates = [trial.values["learning_rate"] for trial in found]
    assert values["learning_rate"] == max(rates)


def test_results_of_other_questions(rng):
    """Another metric, network or test part is another comparison in the same folder."""
    x = {t: rng.normal(size=(20, 2)) for t in "ab"}
    y = {t: rows[:, 0] for t, rows in x.items()}

    def network(units):
        layers = [keras.Input((2,)), keras.layers.Dense(units)]
        return lambda: keras.Sequential(layers)

    others = [
        Problem(x, y),
        Problem(x, y, metric="rmse"),
        Problem(x, y, backbone=network(2)),
        Problem(x, y, backbone=network(64)),
        Problem(x, y, test_data=(x, y)),
        Problem(x, y, test_data=(x, {t: own + 1 for t, own in y.items()})),
    ]
    assert len({one.digest() for one in others}) == len(others)
    assert Problem(x, y, backbone=network(2)).digest() == others[2].digest()


def test_metrics(rng):
    """Errors against their definitions."""
    y, outputs = rng.normal(size=10), rng.normal(size=(10, 1))
    residual = y - outputs[:, 0]
    metrics = problem.METRICS
    assert metrics["rmse"].error(y, outputs) == pytest.approx(np.sqrt(np.mean(residual**2)))
    # Relative to the variance of all targets of the task, whatever the test part has.
    own = Problem({"a": outputs, "b": outputs}, {"a": y, "b": 3 * y})
    found = own.errors({"a": y[:4], "b": 3 * y}, {"a": outputs[:4], "b": 3 * outputs})
    assert found["a"] == pytest.approx(np.mean(residual[:4] ** 2) / y.var())
    assert found["b"] == pytest.approx(np.mean(residual**2) / y.var())
    labels = np.array([0, 0, 1, 1])
    logits = np.array([-1.0, 2.0, 1.0, 3.0])
    assert metrics["error"].error(labels, logits) == 0.25
    pairs = [logits[i] > logits[j] for i in (2, 3) for j in (0, 1)]
    assert metrics["auc"].error(labels, logits) == pytest.approx(1 - np.mean(pairs))


def write_csv(path, rng):
    """Four schools, two of which teach the same; a column of categories, missing values."""
    lines = ["school,age,sex,score"]
    for number, school in enumerate(["north", "south", "west", "east"]):
        for _ in range(24):
            age, sex = rng.normal(), rng.choice(["m", "f"])
            score = 3 * age * (1 if number < 2 else -1) + (sex == "m") + rng.normal() / 5
            shown = "" if rng.random() < 0.1 else f"{age:.3f}"
            lines.append(f"{school},{shown},{sex},{score:.3f}")
    path.write_text("\n".join(lines))


def test_command(tmp_path, rng, capsys):
    """A CSV file: the table, the sentence, a report with the numbers of results.json."""
    write_csv(tmp_path / "schools.csv", rng)
    arguments = [
        *["--csv", str(tmp_path / "schools.csv"), "--task", "school", "--target", "score"],
        *["--methods", "ridge", "pooled", "related", "--trials", "2"],
        *["--repeats", "2", "--epochs", "3", "--output", str(tmp_path / "out")],
        *["--fractions", "0.5"],
    ]
    found = command.main(arguments)
    # What shares nothing and is better on the validation part.
    assert found.baseline == "ridge"
    assert list(found.tasks) == ["north", "south", "west", "east"]
    assert found.by_task.loc["ridge"].mean() < found.by_task.loc["pooled"].mean()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    assert results["sentence"] == found.sentence and html.escape(found.sentence) in page
    for row in results["methods"].values():
        assert f'data-value="{row["error"]}"' in page or f"{row['error']:.4f}" in page
    assert "Plotly.newPlot" in page and "http-equiv" not in page
    text = capsys.readouterr().out
    assert "linear, DRN" in text and "report.html" in text and "Learning curve" in text
    curve = pd.DataFrame(results["curve"])
    assert sorted(curve.fraction.unique()) == [0.5, 1.0] and len(curve) == 2 * 3
    full = curve[curve.fraction == 1].set_index("method").error
    np.testing.assert_allclose(full, found.table.error[full.index])
    for name in ("size", "gains", "curve"):
        assert f'id="{name}"' in page
    with pytest.raises(SystemExit):
        command.main(["--csv", "x.csv", "--task", "school"])
    wrong = [*arguments[:2], "--task", "scool", "--target", "score"]
    with pytest.raises(
        SystemExit, match=r"there is no column 'scool'. The columns, .*school"
    ):
        command.main([*wrong, "--output", str(tmp_path / "wrong")])
    with pytest.raises(SystemExit):
        command.main([*arguments, "--model", "m:f"])


@pytest.mark.long
def test_script(tmp_path, rng):
    """`best.py` trains what is recommended, of a table and of functions, and predicts."""
    write_csv(tmp_path / "schools.csv", rng)
    (tmp_path / "mine.py").write_text(
        "import keras, numpy as np\n"
        "x = np.random.default_rng(0).normal(size=(40, 3))\n"
        "y = {'a': x.sum(1), 'b': x[:, 0]}\n"
        "def data():\n    return {'train': (x, y), 'test': (x, y),\n"
        "            'losses': {'a': 'mse', 'b': 'mse'}}\n"
        "def backbone():\n    return keras.Sequential([keras.Input((3,)),\n"
        "        keras.layers.Dense(4, 'relu', name='fc')])\n"
    )
    # `python -m` finds what is in the folder that it is called from.
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=own,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    short = ["--trials", "1", "--repeats", "2", "--epochs", "2"]
    table = ["--csv", "schools.csv", "--task", "school", "--target", "score"]
    table += ["--methods", "ridge", "pooled", "--output", "table"]
    python("-m", "dmtrl_keras.compare", *table, *short)
    assert "north (24, 1)" in python("table/best.py")
    functions = ["--model", "mine:backbone", "--data", "mine:data", "--methods", "stl"]
    python("-m", "dmtrl_keras.compare", *functions, "--output", "functions", *short)
    assert "a (40, 1)" in python("functions/best.py")
    model = keras.saving.load_model(tmp_path / "functions" / "best.keras")
    assert set(model.output) == {"a", "b"}


def test_budget():
    """Equal trials and draws for all, fewer if need be; the slowest are left out last."""
    seconds = {"ridge": 1.0, "stl": 10.0, "drn": 30.0}

    def planned(minutes, **more):
        return plan(Options(trials=6, repeats=5, budget=minutes, **more), seconds)

    # Linear models are tried on five splits: 45 seconds for all defaults, 0.6 * 5 * 45 for
    # the other trials, 5 * 41 for the draws.
    whole = (45 * (1 + 0.6 * 5) + 5 * 41) / 60
    free = planned(None)
    assert (free.methods, free.trials, free.repeats) == (list(seconds), 6, 5)
    assert free.minutes == pytest.approx(whole)
    assert planned(whole)[:3] == free[:3]
    less = planned(0.98 * whole)
    assert (less.trials, less.repeats) == (5, 4) and len(less.methods) == 3
    tight = planned(0.5 * whole)
    assert tight.methods == ["ridge", "stl"] and list(tight.too_slow) == ["drn"]
    assert tight.minutes <= 0.5 * whole
    none = planned(0.01)
    assert none.methods == ["ridge"] and "10 seconds" in none.too_slow["stl"]
    # As little as there is, where not even that fits.
    assert (none.trials, none.repeats) == (3, 3)
    curve = planned(None, fractions=[0.5])
    assert curve.minutes == pytest.approx(whole + 2.5 * 41 / 60)
    # What takes a moment is not left out for what another one has spent.
    fast = plan(Options(budget=1.0), {"ridge": 0.01, "pooled": 0.02, "stl": 50.0})
    assert fast.methods == ["ridge", "pooled"]


def test_budget_is_kept_and_resumed(tmp_path):
    """What was planned is not planned anew, though the times would be others."""
    data, told = planted("copies", 0, tasks=3, count=20), []
    arguments = {**LINEAR, "methods": ["ridge", "pooled"], "budget": 1.0, "repeats": 3}
    first = compare(*data, tmp_path, told.append, **arguments)
    lines = (tmp_path / "runs.jsonl").read_text()
    assert any("Planned: 5 trials and 3 draws of each of 2 methods" in t for t in told)
    again = compare(*data, tmp_path, told.append, **arguments)
    assert (tmp_path / "runs.jsonl").read_text() == lines
    pd.testing.assert_frame_equal(again.table, first.table)


def test_a_budget_that_is_spent_on_first_trainings(tmp_path):
    """Further methods are not tried, but those that others are compared with."""
    data, told = planted("copies", 0, tasks=3, count=20), []
    methods = ["pooled", "related", "ridge"]
    arguments = {**LINEAR, "methods": methods, "budget": 1e-5, "repeats": 3}
    found = compare(*data, tmp_path, told.append, **arguments)
    assert "first trainings took most" in found.left_out["related"]
    assert "ridge" in found.table.index
    assert sum("with its defaults" in text for text in told) == 2
    count = len(told)
    again = compare(*data, tmp_path, told.append, **arguments)
    assert again.left_out == found.left_out
    assert not any("with its defaults" in text for text in told[count:])


def test_learning_curve():
    """Smaller random parts of the same training part, the same for all methods."""
    data = planted("copies", 1, tasks=3, count=40)
    arguments = {**LINEAR, "methods": ["ridge", "pooled"], "repeats": 4}
    curve = compare(*data, fractions=[0.3], **arguments).curve
    errors = curve.pivot(index="method", columns="fraction", values="error")
    assert list(errors) == [0.3, 1.0]
    # Six examples of twelve features are few; copies are learned from all tasks'.
    assert (errors[0.3] > errors[1.0]).all()
    gains = curve.set_index(["method", "fraction"]).delta["pooled"]
    assert gains[0.3] > 0


def test_tasks_that_are_left_out(tmp_path):
    """Few rows, a constant target, one class: it is said, and the others are compared."""
    path = tmp_path / "t.csv"
    rows = [f"{task},{n},{n % 3 + n}" for task in ("a", "b") for n in range(12)]
    rows += ["few,1,2", *[f"same,{n},7" for n in range(6)]]
    path.write_text("\n".join(["task,x,y", *rows]))
    found = problem.table_problem(path, "task", "y")
    assert found.tasks == ["a", "b"]
    assert ["few: left out, 1 rows" in found.notes[0], "always 7" in found.notes[1]] == [
        1,
        1,
    ]
    told = []
    settings = {"methods": ["ridge", "pooled"], "repeats": 1, "trials": 1}
    whole = compare_on(found, Options(**settings), tmp_path / "out", told.append)
    assert told[:2] == found.notes and "1 draw: too few" in whole.sentence


def test_what_was_learned_of_the_tasks():
    """Signs of a planted outlier; matrices of the tasks, of those that have them."""
    data = planted("outlier", 0, tasks=4, count=60)
    methods = ["ridge", "mean", "clustered", "related"]
    found = compare(*data, methods=methods, repeats=2, trials=3, test=0.5).relations
    assert list(found) == ["mean", "clustered", "related"]
    for title, matrix in found.values():
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-3)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-3)
        assert title in ("learned correlation", "cosine of the slopes")
    _, matrix = found["related"]
    assert (matrix[3, :3] < -0.5).all() and (matrix[0, 1:3] > 0.5).all()


def test_example(tmp_path):
    """A table with the columns that it says, written as one's own."""
    for name, make in example.EXAMPLES.items():
        path, task, target = example.write_example(name, tmp_path)
        found = problem.table_problem(path, task, target)
        table, *_ = make()
        assert len(found.tasks) == table[task].nunique()
        assert found.regression and np.isfinite(table[target]).all()
    assert {*example.METHODS} <= {*CANDIDATES}


def test_names_and_classes_of_a_table(tmp_path, rng):
    """Tasks called as TensorFlow can't take; targets that are words."""
    lines = ["firm,size,grade"]
    for firm in ("General Motors", "Café Söhne", "IBM"):
        for number in range(12):
            lines.append(f"{firm},{rng.normal():.3f},{'abc'[number % 3]}")
    path = tmp_path / "firms.csv"
    path.write_text("\n".join(lines))
    found = problem.table_problem(path, "firm", "grade")
    assert found.tasks == ["General_Motors", "Cafe_Sohne", "IBM"]
    (note,) = found.notes
    assert "General_Motors (General Motors)" in note and "IBM" not in note
    assert set(found.kinds.values()) == {"classes"} and found.classes["IBM"] == 3
    trained = train(found, "ridge", {})
    assert trained.predict(found.x)["IBM"].shape == (12, 3)
    path.write_text(path.read_text().replace(",c", ",a"))
    assert set(problem.table_problem(path, "firm", "grade").kinds.values()) == {"binary"}
    with pytest.raises(problem.DataError, match="the target has no numbers"):
        problem.table_problem(path, "firm", "grade", "regression")
    with pytest.raises(problem.DataError, match="'A B'"):
        Problem(
            {"A B": np.zeros((4, 1)), "C": np.zeros((4, 1))}, {"A B": [0] * 4, "C": [0] * 4}
        )


@pytest.mark.long
def test_own_data(tmp_path, monkeypatch, rng):
    """A user's functions, with a test part of their own; missing labels are left out."""
    images = rng.normal(size=(24, 6, 6, 1)).astype("float32")
    y = {"a": (images.mean(axis=(1, 2, 3)) > 0).astype(int), "b": rng.integers(3, size=24)}
    data = {"train": (images, y), "test": (images[:8], {t: v[:8] for t, v in y.items()})}
    data["losses"] = {"a": "binary_crossentropy", "b": "sparse_categorical_crossentropy"}

    def backbone():
        conv = keras.layers.Conv2D(2, 3, activation="relu", name="conv")
        pool = keras.layers.GlobalAveragePooling2D()
        return keras.Sequential([keras.Input((6, 6, 1)), conv, pool])

    functions = {"m:f": backbone, "d:f": lambda: data}
    monkeypatch.setattr(command, "function_of", functions.__getitem__)
    arguments = ["--model", "m:f", "--data", "d:f", "--methods", "stl", "similar", "ridge"]
    arguments += ["--trials", "1", "--repeats", "1", "--epochs", "2"]
    found = command.main([*arguments, "--output", str(tmp_path)])
    assert list(found.table.index) == ["stl", "similar"]
    assert "rows of numbers" in found.left_out["ridge"]
