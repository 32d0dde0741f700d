"""What experiments have in common, by one that trains nothing."""

import json
import pathlib

import keras
import numpy as np
import pandas as pd
import pytest

import applications
from applications import experiment
from applications.arguments import real
from applications.experiment import Experiment, Table, held_out, hits
from applications.files import working_in


class Toy(Experiment):
    """Three numbers by two methods."""

    name = "toy"
    description = "Numbers."
    methods = {"one": "One", "two": "Two"}
    defaults = {"epochs": 3, "repeats": 2, "optimizer": "sgd"}
    least = {"epochs": 2}
    settings = ("epochs", "scale")

    def __init__(self):
        self.trained = []

    def add_arguments(self, p):
        p.add_argument("--scale", type=real(above=0), default=1.0)

    def check(self, p, options):
        if options.scale > 100:
            p.error("--scale: too large")

    def blocks(self, options):
        return ["toy", "again"]

    def load(self, options, console):
        return options.scale * np.arange(3)

    def draw(self, options, data, seed):
        return data + seed

    def run(self, options, method, part, seed, tick, callbacks=None):
        self.trained.append((method, seed))
        for _ in range(options.epochs):
            tick()
        return {"accuracy": {"a": 0.25, "b": 0.75}, "sum": float(part.sum())}

    def describe(self, found):
        return f"sum {found['sum']:g}"

    def tables(self, options, data, runs):
        sums = runs.groupby("method")["sum"].mean()
        frame = pd.DataFrame(
            {"Method": self.methods[name], "Sum": f"{sums[name]:,.1f}"}
            for name in sums.index
        )
        return {"toy": Table("Sums", frame, "table"), "again": Table("Again", frame)}

    def figures(self, options, data, runs):
        figure, ((axis,),) = experiment.figure_of(1)
        axis.plot(data)
        figure.savefig(options.output / "data.png")
        return [options.output / "data.png"]


def test_command(tmp_path, capsys):
    """Runs, tables, figures, a page; a second call finds all results."""
    page = tmp_path / "docs" / "experiments" / "toy.md"
    page.parent.mkdir(parents=True)
    blocks = ("toy", "again")
    page.write_text("\n".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->" for n in blocks))
    output = tmp_path / "results" / "toy"
    arguments = ["--output", str(output), "--page", str(page), "--scale", "1000e-1"]
    toy = Toy()
    tables = toy.main(arguments)
    assert toy.trained == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert list(tables["toy"]["Sum"]) == ["301.5", "301.5"]
    printed = capsys.readouterr().out
    assert "Two, seed 1: sum 303, 0 s" in printed and "Results are in" in printed
    assert "| One | 301.5 |" in (output / "table.md").read_text()
    assert page.read_text().count("| Two | 301.5 |") == 2
    copied = page.parent / "figures" / "toy_data.png"
    assert copied.read_bytes() == (output / "data.png").read_bytes()
    assert toy.main(arguments)["again"].equals(tables["again"])
    assert len(toy.trained) == 4
    toy.main([*arguments, "--epochs", "2", "--methods", "two", "--repeats", "1"])
    assert toy.trained[4:] == [("two", 0)]


def test_interrupted(tmp_path, capsys, monkeypatch):
    """Ctrl-C, and again: the run that was interrupted is the first one to be run."""

    class Interrupted(Toy):
        def run(self, options, method, part, seed, tick, callbacks=None):
            if method == "two":
                raise KeyboardInterrupt
            return super().run(options, method, part, seed, tick, callbacks)

    arguments = ["--output", str(tmp_path / "toy")]
    with pytest.raises(SystemExit) as ended:
        Interrupted().main(arguments)
    assert ended.value.code == 130
    assert "toy has what is done. The same command goes on" in capsys.readouterr().err
    toy = Toy()
    toy.main(arguments)
    assert toy.trained == [("two", 0), ("one", 1), ("two", 1)]
    with (tmp_path / "toy" / "runs.jsonl").open("a") as file:
        file.write("no run\n")
    with pytest.raises(SystemExit, match=r"runs\.jsonl, line 5"):
        toy.main(arguments)


def test_in_use(tmp_path):
    """A folder that another command writes into is refused before anything is loaded."""
    toy = Toy()
    toy.load = None
    with working_in(tmp_path), pytest.raises(SystemExit, match="in use by process"):
        toy.main(["--output", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "1"],
        ["--repeats", "0"],
        ["--scale", "101"],
        ["--methods", "three"],
        ["--batch-size", "4"],
    ],
)
def test_arguments(arguments, capsys):
    """An experiment has those that it has defaults for; the parser says what is wrong."""
    with pytest.raises(SystemExit):
        Toy().parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_figures_of_a_page(tmp_path):
    """Beside the page's folder if they are there, and never outside of a repository."""
    top = tmp_path / "top"
    docs = top / "docs"
    (docs / "figures").mkdir(parents=True)
    found = experiment.figures_of
    assert found(docs / "experiments" / "mnist.md") == docs / "figures"
    assert found(docs / "start.md") == docs / "figures"
    assert found(top / "README.md") == top / "figures"
    (tmp_path / "figures").mkdir()
    (top / ".git").touch()
    assert found(top / "README.md") == top / "figures"


def test_page_without_marks(tmp_path, capsys):
    """It is refused before anything is run."""
    toy, page = Toy(), tmp_path / "page.md"
    for text in (
        "",
        "<!-- toy:begin --><!-- toy:end --><!-- again:end --><!-- again:begin -->",
    ):
        page.write_text(text)
        with pytest.raises(SystemExit):
            toy.main(["--output", str(tmp_path), "--page", str(page)])
        assert "--page: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        toy.main(["--output", str(tmp_path), "--page", str(tmp_path / "none.md")])
    assert "none.md" in capsys.readouterr().err
    assert not toy.trained


def test_what_is_missing():
    """The error says which method of which experiment."""
    toy = Toy()
    assert toy.lack("draw", "run") is None
    for call, name in (
        (lambda: toy.tasks(None), "tasks"),
        (lambda: toy.hold_out(None, None, 0.1, 0), "hold_out"),
        (lambda: toy.parse(["--loss-weights", "a=2"]), "tasks"),
    ):
        with pytest.raises(NotImplementedError, match=rf"'toy' \(Toy\).*`{name}`"):
            call()
    assert "`tasks`, `hold_out`" in toy.lack("run", "tasks", "hold_out")


def test_seeds():
    """The last list changes most often; draws are as far apart as the experiment says."""
    toy = Toy()
    options = toy.parse(["--seed", "5"])
    assert list(toy.by_seed(options)) == [(0, 5), (1, 6)]
    toy.draw_step = 10
    found = list(toy.by_seed(options, "ab", [None]))
    seeds = [(0, 5, "a"), (0, 5, "b"), (1, 15, "a"), (1, 15, "b")]
    assert found == [(*each, None) for each in seeds]


def test_timed():
    """Seconds of a block, in which random numbers begin with the seed."""
    drawn = []
    for _ in range(2):
        with experiment.timed(3) as took:
            drawn.append(np.random.random())
        assert took.seconds >= 0
    assert drawn[0] == drawn[1]


def test_digest():
    """It depends on all pieces, and is that of their bytes one after the other."""
    array = np.arange(6).reshape(2, 3)
    assert experiment.digest_of([b"a", array]) == experiment.digest_of(
        [b"a" + array.tobytes()]
    )
    assert experiment.digest_of([array]) != experiment.digest_of([array.T])


def test_scores():
    """The error of each task, and their mean."""
    found = Toy().scores({"accuracy": {"a": 0.25, "b": 0.75}})
    assert found == {"error": 0.5, "a_error": 0.75, "b_error": 0.25}


def test_every_experiment_is_listed():
    """Each module with an experiment is one that a search knows, by its name."""
    folder = pathlib.Path(applications.__file__).parent
    modules = {
        path.stem for path in folder.glob("*.py") if "\nEXPERIMENT = " in path.read_text()
    }
    assert modules == set(experiment.EXPERIMENTS)
    for name in experiment.EXPERIMENTS:
        assert experiment.experiment_of(name).name == name


@pytest.mark.parametrize("name", experiment.EXPERIMENTS)
def test_defaults_are_settings(name):
    """What results depend on is an argument, and methods are what families stand for."""
    found = experiment.experiment_of(name)
    known = {action.dest for action in found.parser()._actions}
    assert {*found.settings, found.budget, "output", "page", "methods"} <= known
    assert set(found.families.values()) <= set(found.methods)
    assert set(found.default_methods or ()) <= set(found.methods)


def test_held_out():
    """The same shares of the classes; any examples where classes are too small."""
    labels = np.repeat([0, 1], [30, 10])
    train, valid = held_out(np.arange(40), labels, 0.2, 0)
    assert np.bincount(labels[valid]).tolist() == [6, 2] and len(train) == 32
    train, valid = held_out(np.arange(5), np.array([0, 0, 1, 2, 3]), 0.2, 0)
    assert len(valid) == 1 and len(train) == 4


def test_hits():
    """Which are right; a network that diverged has no accuracy."""
    outputs = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, np.nan]])
    np.testing.assert_array_equal(hits(outputs, np.array([1, 1, 0])), [1, 0, np.nan])
    assert hits(outputs[:2], np.array([1, 1])).mean() == 0.5


class Networks(Toy):
    """The same, with networks whose error goes down and up again by the seed."""

    def run(self, options, method, part, seed, tick, callbacks=None):
        found = super().run(options, method, part, seed, tick)
        network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        network.set_weights([np.full((2, 1), float(seed)), np.zeros(1)])
        if method == "one":
            tick.model = network
        error = {0: 0.5, 1: 0.2, 2: 0.3, 3: np.nan}[seed]
        return {**found, "accuracy": {"a": 1 - error}}


def test_best_models(tmp_path):
    """Of each method the network with the least error is kept, also in a later call."""
    arguments = ["--output", str(tmp_path), "--methods", "one", "two"]
    Networks().main(arguments)
    assert not (tmp_path / "models").exists()
    folder = tmp_path / "kept"
    arguments[1] = str(folder)
    Networks().main([*arguments, "--keep-models", "--repeats", "2"])
    Networks().main([*arguments, "--keep-models", "--repeats", "4"])
    kept = json.loads((folder / "models" / "models.json").read_text())
    assert list(kept) == ["one"]
    assert kept["one"]["error"] == pytest.approx(0.2)
    assert kept["one"]["settings"]["seed"] == 1
    network = keras.saving.load_model(folder / "models" / kept["one"]["file"])
    assert float(network.get_weights()[0][0, 0]) == 1.0
    assert len(list((folder / "models").iterdir())) == 2
