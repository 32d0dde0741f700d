"""Arguments of the commands, from the command line and from files."""

import argparse
import copy
import json
import pathlib

import numpy as np
import pytest

from applications import benchmark
from applications.arguments import (
    ByName,
    add_page,
    add_strategy,
    check_names,
    parse_arguments,
    real,
)
from applications.experiment import EXPERIMENTS, experiment_of
from tuning import own, search
from tuning.studies import plain


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
        ('{"epochs": "a\\u0000b"}', "without a NUL"),
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


# Texts that are no number, or none of a reasonable size.
NO_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e39",
    "-1e39",
    "x",
    "",
    "9" * 5000,
    "--output",
)
NO_WHOLE_NUMBERS = (*NO_NUMBERS, "-1", "1e3", "0.5", "1.0", str(2**31), "9" * 30)


def parsers():
    """The parsers of all commands by name."""
    found = {name: experiment_of(name).parser() for name in EXPERIMENTS}
    found |= {"benchmark": benchmark.parser(), "search": search.parser()}
    found["own"] = own.Own.parser()
    for name in (*EXPERIMENTS, "own"):
        add_strategy(found[name])
    return found


NAMES = (*EXPERIMENTS, "benchmark", "search", "own")
# What has other arguments than numbers, in whatever command.
WORDS = set(
    (
        "alphabets attributes backbone balancing benchmark data directory domains estimate "
        "experiment feature_layer features gradient group initializer kernels layers "
        "mean method methods mode model network objectives optimizer outlier output "
        "padding page page_block pairs parts related share_until shared_layers "
        "similar_backbone start stl_optimizer strategy sweep tasks threshold trunk tune "
        "tune_from tuner weights"
    ).split()
)


@pytest.mark.parametrize("name", NAMES)
def test_every_number(name):
    """Each argument that is a number says what it takes, and takes nothing else."""
    numbers = 0
    for action in parsers()[name]._actions:
        convert = action._convert if isinstance(action, ByName) else action.type
        flag, default = action.dest, action.default
        if action.nargs == 0 or convert in (None, pathlib.Path) or flag == "shared_layers":
            assert action.nargs == 0 or flag in WORDS, flag
            continue
        numbers += 1
        defaults = np.ravel([default] if np.isscalar(default) else list(default or ()))
        assert all(convert(str(value)) == value for value in defaults), flag
        whole_ones = any(isinstance(value, (int, np.integer)) for value in defaults)
        for text in NO_WHOLE_NUMBERS if whole_ones else NO_NUMBERS:
            with pytest.raises(argparse.ArgumentTypeError) as found:
                convert(text)
            said = str(found.value)
            assert said.startswith("expected a ") and ", got '" in said, (flag, said)
            assert len(said) < 160 and "\n" not in said
        if flag != "scale":
            with pytest.raises(argparse.ArgumentTypeError):
                convert("-1")
    assert numbers > 3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mnist", "--seed -1", "--seed: expected a whole number from 0 to 2147483647, got"),
        ("mnist", "--learning-rate inf", "finite number above 0, got 'inf'"),
        ("mnist", "--tolerance 1", "finite number above 0 and below 1, got '1'"),
        ("mnist", "--dropout 1", "finite number at least 0 and below 1, got '1'"),
        ("mnist", "--epochs 1e3", "whole number from 2 to 2147483647, got '1e3'"),
        ("mnist", "--ranks conv1=1e3", "a whole number from 1, or a fraction above 0 and"),
        ("mnist", "--loss-weights 0=1 0=2", "a name again"),
        ("mnist", "--shared-layers 1e3", "invalid choice: '1e3' (choose from "),
        ("mnist", "--replicas 2000000000", "from 1 to 256"),
        ("mtfl", "--momentum nan", "finite number at least 0 and below 1, got 'nan'"),
        ("mtfl", "--momenta 5", "finite number at least 0 and at most 0.99999, got '5'"),
        ("mtfl", "--shared-stages 6", "from 0 to 5, got '6'"),
        ("mtfl", "--data x --extent 0.5 0.4", "--extent: expected the least and the most"),
        ("mtfl", "--data x --tasks pose", "--tasks: expected two different tasks at least"),
        ("mtfl", "--data x --tasks pose pose", "--tasks: expected two different tasks"),
        (
            "mtfl",
            "--data x --convergence --tasks pose smile gender",
            "--convergence: expected two tasks",
        ),
        ("mtfl", "--validation 1", "finite number above 0 and below 1, got '1'"),
        ("celeba", "--momentum 1", "finite number at least 0 and below 1, got '1'"),
        ("celeba", "--tables x", "a whole number from 2 to 3, got 'x'"),
        ("office_caltech", "--fractions 1", "finite number above 0 and below 1, got '1'"),
        ("office_caltech", "--features x --scale 1 0", "--scale: expected a divisor"),
        ("mtal", "--threshold 1.1", "finite number at least 0 and at most 1, got '1.1'"),
    ],
)
def test_numbers_of_commands(name, arguments, message, capsys):
    """The parser refuses them."""
    with pytest.raises(SystemExit) as found:
        experiment_of(name).parse(arguments.split())
    assert found.value.code == 2
    assert message in capsys.readouterr().err


CONTENTS = {
    "not UTF-8": (b'{"seed": "\xff"}', "is no JSON file that can be read"),
    "nested": (b"[" * 200_000, "is no JSON file that can be read"),
    "deep": (b'{"seed": ' + b"[" * 500 + b"]" * 500 + b"}", "seed: expected a number"),
    "5,000 digits": (b'{"seed": ' + b"9" * 5000 + b"}", "is no JSON file that can be read"),
    "large": (b'{"seed": 1e999}', "whole number from 0 to 2147483647, got 'inf'"),
    "NaN": (b'{"learning_rate": NaN}', "finite number above 0, got 'nan'"),
    "negative": (b'{"learning_rate": -1e-9}', "finite number above 0, got '-1e-09'"),
    "number for a switch": (
        b'{"no_bias": 0}',
        "no_bias: expected true or false, received 0",
    ),
    "text for a switch": (b'{"no_bias": "yes"}', "no_bias: expected true or false"),
    "list": (b'{"seed": [1, 2]}', "seed: expected a number or a string"),
    "object": (b'{"seed": {}}', "seed: expected a number or a string"),
    "switch": (b'{"seed": true}', "seed: expected a number or a string"),
    "list of lists": (b'{"methods": [["stl"]]}', "methods: expected a number or a string"),
    "nothing": (b'{"methods": []}', "--methods: expected at least one argument"),
    "null in a list": (b'{"methods": [null]}', "methods: expected a number or a string"),
    "list by name": (b'{"ranks": {"fc": [1]}}', "ranks: expected a number or a string"),
    "text by name": (
        b'{"ranks": {"fc": "--fc"}}',
        "got 'fc=--fc' (expected a whole number",
    ),
    "option": (
        b'{"methods": ["stl", "--output", "/path"]}',
        "methods: expected strings that do not begin with '-'",
    ),
    "option by name": (b'{"ranks": {"--fc": 1}}', "ranks: expected strings that do not"),
    "long": (b'["' + b"a" * 9999 + b'"]', "must be an object of settings"),
    "dashes": (b'{"data": "--"}', "data: expected a number or a string"),
    "config": (b'{"config": "other.json"}', "Received: ['config']"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_wrong_settings_in_a_file(kind, tmp_path, capsys):
    """The parser says what was expected, and nothing of the file is an option."""
    content, message = CONTENTS[kind]
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as found:
        experiment_of("mnist").parse(["--config", str(path)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert found.value.code == 2 and message in said
    assert len(said) < 1000


def test_values_of_a_file_are_values(tmp_path, capsys):
    """Also where they look like options, or like nothing."""
    path = tmp_path / "settings.json"
    settings = {
        "features": "--output",
        "page_block": "--config=a",
        "scale": [-1e-05, 2],
        "trunk": "a b=c",
        "seed": None,
        "stratified": False,
        "own_draws": True,
        "fractions": 0.5,
        "loss_weights": {"a": 2, "b c": 0.5},
    }
    path.write_text("\ufeff" + json.dumps(settings), "utf-8")
    options = experiment_of("office_caltech").parse(["--config", str(path)])
    assert str(options.features) == "--output" and options.page_block == "--config=a"
    assert options.scale == [-1e-05, 2] and options.trunk == "a b=c"
    assert (options.seed, options.stratified, options.own_draws) == (0, False, True)
    assert options.fractions == [0.5] and options.loss_weights == {"a": 2, "b c": 0.5}
    assert str(options.output) == "results/office_caltech"
    for argument in ("--conf", "--confi"):
        with pytest.raises(SystemExit):
            experiment_of("mnist").parse([argument, str(path)])
        assert "--config: expected this argument in full" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        experiment_of("mnist").parse(["--config", str(tmp_path)])
    assert "Is a directory" in capsys.readouterr().err


def test_what_a_search_writes_is_taken(tmp_path):
    """All settings of an experiment, as a search's `best.json` has them."""
    path = tmp_path / "best.json"
    for name in EXPERIMENTS:
        needed = {
            "mtfl": ["--data", "x"],
            "celeba": ["--classification", "--data", "x"],
            "office_caltech": ["--data", "x", "--scale", "-127", "128"],
            "omniglot": ["--data", "x"],
        }
        experiment = experiment_of(name)
        options = parse_arguments(experiment.parser(), needed.get(name, []))
        del options.strategy
        path.write_text(json.dumps({k: plain(v) for k, v in vars(options).items()}))
        again = parse_arguments(experiment.parser(), ["--config", str(path)])
        del again.strategy
        assert {**vars(again), "output": str(again.output)} == {
            **vars(options),
            "output": str(options.output),
        }
