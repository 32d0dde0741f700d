"""Results that survive interruptions, and tables."""

import argparse
import copy

import pandas as pd
import pytest

from applications.experiment import (
    Results,
    check_names,
    in_range,
    markdown_table,
    mean_and_spread,
    parse_arguments,
    rich_table,
    write_block,
)


def test_results_come_back(tmp_path):
    """A run is found by its settings, in this process and in the next."""
    path = tmp_path / "deep" / "runs.jsonl"
    results = Results(path)
    assert results.get({"method": "stl"}) is None
    results.add({"method": "stl", "seed": 1}, {"error": 0.5, "ranks": (1, 2)})
    for found in (results, Results(path)):
        assert found.get({"seed": 1, "method": "stl"}) == {"error": 0.5, "ranks": [1, 2]}
        assert found.get({"method": "stl", "seed": 2}) is None


def test_interrupted_write(tmp_path):
    """A line cut off at the end is dropped; the file stays usable."""
    path = tmp_path / "runs.jsonl"
    Results(path).add({"n": 1}, {"error": 0.5})
    with path.open("a") as file:
        file.write('{"settings": {"n": 2}, "resul')
    results = Results(path)
    assert results.get({"n": 2}) is None
    results.add({"n": 2}, {"error": 0.25})
    again = Results(path)
    assert (again.get({"n": 1}), again.get({"n": 2})) == ({"error": 0.5}, {"error": 0.25})


def test_foreign_file(tmp_path):
    """Something else in the file is an error, and is not overwritten."""
    path = tmp_path / "runs.jsonl"
    path.write_text("method,error\nstl,0.5\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 1.*method,error"):
        Results(path)
    assert path.read_text() == "method,error\nstl,0.5\n"


def test_tables():
    """Mean and sample standard deviation; Markdown; a table for the terminal."""
    assert mean_and_spread([1, 2, 3]) == "2.00 ± 1.00"
    assert mean_and_spread([0.123], digits=1) == "0.1"
    frame = pd.DataFrame({"Method": ["stl", "tt"], "Error": ["1.0", "2.0"]})
    expected = "| Method | Error |\n| --- | --- |\n| stl | 1.0 |\n| tt | 2.0 |\n"
    assert markdown_table(frame) == expected
    assert rich_table(frame, "MNIST").row_count == 2


def test_readme_block(tmp_path):
    """Only what is between the marks changes; marks must be there."""
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    write_block(path, "a", "new\n")
    write_block(path, "a", "newer\n")
    expected = "before\n<!-- a:begin -->\nnewer\n<!-- a:end -->\nafter\n"
    assert path.read_text() == expected
    with pytest.raises(ValueError, match="b:begin"):
        write_block(path, "b", "new")


def test_settings_from_a_file(tmp_path, capsys):
    """A JSON file gives arguments, which those of the command line overrule."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning-rate", type=in_range(float, 0), default=0.1)
    parser.add_argument("--methods", nargs="+", choices=("stl", "tt"), default=["stl"])
    parser.add_argument("--no-bias", action="store_true")
    parser.add_argument("--epochs", type=int, required=True)
    path = tmp_path / "best.json"
    path.write_text(
        '{"learning_rate": 0.5, "methods": ["stl", "tt"], "no_bias": true, "epochs": 3}'
    )

    def parse(*arguments):
        # A parser learns `--config` only once.
        return parse_arguments(copy.deepcopy(parser), arguments)

    options = parse("--config", str(path), "--epochs", "5")
    assert options.strategy.num_replicas_in_sync == 1
    del options.strategy
    assert vars(options) == {
        "learning_rate": 0.5,
        "methods": ["stl", "tt"],
        "no_bias": True,
        "epochs": 5,
    }
    assert parse("--epochs", "2").learning_rate == 0.1
    for content, message in (
        ('{"rate": 1}', "rate"),
        ("[1]", "object of settings"),
        ("{", "no JSON file"),
        ('{"learning_rate": -1}', "more than 0"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit):
            parse("--config", str(path), "--epochs", "5")
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path / "none.json"), "--epochs", "5")


def test_names_are_checked(capsys):
    """An error of the command, or of a function; known names pass."""
    check_names("--loss-weights", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match=r"--loss-weights: .*'a', 'b'.*\['c'\]"):
        check_names("--loss-weights", {"c": 1.0}, ["a", "b"])
    with pytest.raises(SystemExit):
        check_names("--ranks", ["c"], ["a"], argparse.ArgumentParser())
    assert "--ranks: expected names from ['a'], received ['c']" in capsys.readouterr().err
