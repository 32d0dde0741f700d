"""Arguments of the commands, from the command line and from files."""

import argparse
import copy

import pytest

from applications.arguments import add_page, check_names, parse_arguments, real


def test_settings_from_a_file(tmp_path, capsys):
    """A JSON file gives arguments, which those of the command line overrule."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning-rate", type=real(above=0), default=0.1)
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
        ('{"learning_rate": -1}', "above 0"),
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


def test_the_old_name_of_a_page():
    """It is taken, and not shown."""
    parser = argparse.ArgumentParser()
    add_page(parser)
    assert parser.parse_args([]).page is None
    for name in ("--page", "--readme"):
        assert str(parser.parse_args([name, "docs/a.md"]).page) == "docs/a.md"
    assert "--readme" not in parser.format_help()
