"""The command, on two small tasks of a user's own."""

import itertools
import json
import multiprocessing
import os
import pathlib
import re
import socket
import sys
import time
import types

import keras
import numpy as np
import pandas as pd
import pytest
from keras_tuner import Objective

from applications import files
from dmtrl_keras.ground.backend import tensorflow
from tuning import own, search

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="searches run on TensorFlow"
)

USERS = '''
import os
import pathlib
import time

import keras
import numpy as np


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)).astype("float32")
    y = {"a": (x[:, :1] > 0) * 1.0, "b": (x[:, 1:2] + x[:, :1] > 0) * 1.0}
    part = lambda own: (x[own], {task: labels[own] for task, labels in y.items()})
    return {
        "train": part(slice(40)),
        "test": part(slice(40, 60)),
        "losses": {"a": "binary_crossentropy", "b": "binary_crossentropy"},
        "heads": 1,
        "metrics": {"a": ["accuracy"], "b": ["accuracy"]},
    }


def broken():
    raise ZeroDivisionError


def missing():
    found = data()
    for labels in found["train"][1].values():
        labels[:] = np.nan
    return found


def backbone():
    layers = [keras.Input((6,)), keras.layers.Dense(5, "tanh", name="fc")]
    return keras.Sequential(layers)


def limited(hp):
    """Fails with more than two units; slow where a file says so."""
    from dmtrl_keras import multitask

    units = hp.Int("units", 1, 4, default=2)
    if units > 2:
        raise ValueError(f"{units} units are too many")
    layers = [keras.Input((6,)), keras.layers.Dense(units, "tanh", name="fc")]
    model = multitask(keras.Sequential(layers), ["a", "b"], heads=1, verbose=False)
    return model


def slow(hp):
    """Writes down each training, and waits."""
    from dmtrl_keras import multitask

    scale = hp.Float("scale", 0.1, 1.0, default=0.5)
    with open(os.environ["TRAININGS"], "a") as file:
        file.write(f"{os.environ.get('KERASTUNER_TUNER_ID', 'alone')} {scale:.6f}\\n")
    layers = [keras.Input((6,)), keras.layers.Dense(2, name="fc")]
    pause = pathlib.Path(os.environ["TRAININGS"]).with_name("pause")
    while pause.exists() and abs(scale - 0.5) > 1e-6:
        time.sleep(0.1)
    return multitask(keras.Sequential(layers), ["a", "b"], heads=1, verbose=False)
'''


@pytest.fixture
def users(tmp_path, monkeypatch):
    """The arguments for a user's module, in a folder of its own."""
    (tmp_path / "users_own.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("users_own", None)
    arguments = ["--data", "users_own:data", "--epochs", "2"]
    arguments += ["--directory", str(tmp_path / "search")]
    yield arguments
    sys.modules.pop("users_own", None)


@pytest.fixture(scope="module")
def searched_once(tmp_path_factory):
    """The folder of a search of one trial, and its arguments."""
    folder = tmp_path_factory.mktemp("once")
    module = types.ModuleType("users_once")
    exec(USERS, module.__dict__)
    sys.modules["users_once"] = module
    tensorflow().config.run_functions_eagerly(True)
    arguments = ["--model", "users_once:backbone", "--data", "users_once:data"]
    arguments += ["--method", "tucker", "--tuner", "random", "--epochs", "1"]
    arguments += ["--directory", str(folder / "search")]
    search.main([*arguments, "--max-trials", "1"])
    tensorflow().config.run_functions_eagerly(False)
    yield folder / "search", arguments
    del sys.modules["users_once"]


TUCKER = ["--model", "users_own:backbone", "--method", "tucker", "--tuner", "random"]
LIMITED = ["--model", "users_own:limited", "--method", "own", "--tune", "sharing"]


def test_command(users, tmp_path, monkeypatch, capsys, steps_as_users):
    """Tables, settings, logs, a model; resumed; the test part is used once, at the end."""
    learn, calls = own.Own.learn, []

    def spied(self, options, validation, *rest):
        calls.append(validation)
        return learn(self, options, validation, *rest)

    monkeypatch.setattr(own.Own, "learn", spied)
    page = tmp_path / "page.md"
    block = "search-own-tucker"
    page.write_text(f"<!-- {block}:begin -->\n<!-- {block}:end -->")
    written = ["--page", str(page)]
    found = search.main([*TUCKER, *users, "--max-trials", "3", *written])
    assert calls == [True, True, True, False]
    assert sorted(found["table"].trial) == ["0", "1", "2"]
    assert (found["table"].task_loss.diff()[1:] >= 0).all()
    first = found["table"].set_index("trial").loc["0"]
    assert first.learning_rate == 1e-3 and first.tolerance == 0.1
    assert found["default"] == first.task_loss
    assert found["validation"]["task_loss"] <= found["default"]
    assert {"val_a_accuracy", "parameters", "seconds"} < set(found["table"])
    folder = tmp_path / "search"
    settings = json.loads((folder / "best.json").read_text())
    assert settings["hyperparameters"] == found["best"]
    assert settings["arguments"]["epochs"] == 2
    assert pd.read_csv(folder / "trials.csv").shape[0] == 3
    for trial in "012":
        files = list((folder / "tensorboard" / trial).glob("events.out*"))
        assert files and b"_hparams_" in files[0].read_bytes()
    # The model that was trained on all training data, and tested.
    model = keras.saving.load_model(folder / "best.keras")
    x, y = own.function_of("users_own:data")()["test"]
    again = model.evaluate(x, y, batch_size=20, verbose=0, return_dict=True)
    assert again["a_loss"] == pytest.approx(found["test"]["val_a_loss"], rel=1e-4)
    assert "used here for the first time" in " ".join(capsys.readouterr().out.split())
    text = page.read_text()
    assert (folder / "trials.md").read_text().strip() in text
    assert "on the test part: task_loss" in text
    # The same command: nothing is trained again.
    calls.clear()
    assert search.main([*TUCKER, *users, "--max-trials", "3"])["test"] == found["test"]
    assert calls == []
    # More trials go on from there.
    search.main([*TUCKER, *users, "--max-trials", "4", "--tuner", "random"])
    assert calls in ([True], [True, False])
    with pytest.raises(SystemExit):
        search.main([*TUCKER, *users, "--repeats", "2"])
    assert "other ['repeats']" in capsys.readouterr().err


@pytest.mark.long
def test_all_methods(users, tmp_path, capsys, few_steps):
    """One search of methods and their settings; the file names the method."""
    given = ["--model", "users_own:backbone", "--tuner", "random", "--max-trials", "3"]
    methods = ["--methods", "mrn", "similar", "hard"]
    found = search.main([*given, *methods, *users])
    printed = capsys.readouterr().out
    assert "similar is left out: the network has no convolution." in printed
    assert "Best trial of each method" in printed
    table = found["table"].set_index("trial")
    assert table.method["0"] == "mrn" and table.method["1"] == "hard"
    assert table.strength["0"] == 0.1 and np.isnan(table.strength["1"])
    written = json.loads((tmp_path / "search" / "best.json").read_text())
    assert written["method"] == found["best"]["method"]
    own_names = {"mrn": {"strength", "epsilon"}, "hard": set()}[written["method"]]
    assert set(written["hyperparameters"]) == {"learning_rate", *own_names}
    # Another set of methods is another search.
    with pytest.raises(SystemExit):
        search.main([*given, "--methods", "mrn", "hard", "laf", *users])
    assert "has a search with other ['method']" in capsys.readouterr().err


def test_the_best_model_so_far_is_kept(users, tmp_path, monkeypatch):
    """Always that of the best trial; at the end that of the whole training part."""
    kept, losses = [], iter([3.0, 4.0, 1.0, 2.0, 5.0])

    def learn(self, options, validation, repeat, tick, callbacks):
        self.model = next(losses)
        return {"task_loss": self.model}

    monkeypatch.setattr(own.Own, "learn", learn)
    monkeypatch.setattr(own.Own, "keep", lambda self, folder: kept.append(self.model))
    search.main([*TUCKER, *users, "--max-trials", "4"])
    assert kept == [3.0, 1.0, 5.0]
    # Resumed, one that is worse changes nothing.
    losses = iter([2.5])
    search.main([*TUCKER, *users, "--max-trials", "5"])
    assert kept == [3.0, 1.0, 5.0]


@pytest.mark.long
def test_several_objectives(users, tmp_path, few_steps):
    """The Pareto front, printed, drawn, and each of its settings in a file."""
    arguments = ["--objective", "task_loss", "val_a_accuracy", "parameters", "--repeats"]
    arguments += ["2", "--per-layer", "--patience", "1"]
    found = search.main([*TUCKER, *users, "--max-trials", "2", *arguments])
    table = found["table"]
    best = table.sort_values("task_loss").iloc[0]
    assert table.pareto[0] and best.trial == table.trial[0]
    assert (table.task_loss_spread >= 0).all()
    folder = tmp_path / "search"
    assert (folder / "pareto.png").stat().st_size > 5_000
    written = {path.stem.removeprefix("pareto_") for path in folder.glob("pareto_*.json")}
    assert written == set(table.trial[table.pareto])


def test_failures(users, tmp_path, capsys, few_steps):
    """What can't be trained is recorded with its reason, and the search goes on."""
    found = search.main([*LIMITED, *users, "--max-trials", "4", "--tuner", "grid"])
    assert sorted(found["table"].units) == [1, 2]
    trials = [json.loads(p.read_text()) for p in tmp_path.rglob("trial.json")]
    status = {t["hyperparameters"]["values"]["units"]: t["status"] for t in trials}
    assert status == {1: "COMPLETED", 2: "COMPLETED", 3: "FAILED", 4: "FAILED"}
    printed = capsys.readouterr().out
    assert "failed: ValueError: 3 units are too many" in printed


def test_all_fail(users, capsys, few_steps):
    """Not in silence: an error, with each trial's reason."""
    users[1] = "users_own:missing"
    # What diverged has an accuracy in Keras: NaN is below one half, too.
    arguments = ["--max-trials", "2", "--objective", "val_a_accuracy"]
    with pytest.raises(SystemExit, match="All 2 trials failed"):
        search.main([*TUCKER, *users, *arguments])
    assert "ValueError: task_loss is nan" in capsys.readouterr().out


@pytest.mark.parametrize("tuner", ["hyperband", "bayesian"])
def test_tuners(users, tuner, monkeypatch):
    """Each runs to its end; Hyperband's trials have fewer epochs than the best."""
    epochs = []

    def learn(self, options, validation, repeat, tick, callbacks):
        epochs.append(options.epochs)
        rate = options.values["learning_rate"]
        return {"task_loss": (np.log10(rate) + 2.5) ** 2 + 1 / options.epochs}

    monkeypatch.setattr(own.Own, "learn", learn)
    monkeypatch.setattr(own.Own, "keep", lambda self, folder: None)
    users[3] = "9"
    arguments = ["--model", "users_own:backbone", "--method", "tucker", "--tuner", tuner]
    found = search.main([*arguments, *users, "--max-trials", "8"])
    assert found["default"] == pytest.approx(0.25 + 1 / epochs[0])
    assert found["validation"]["task_loss"] < found["default"]
    assert epochs[-1] == 9
    assert (min(epochs) == 1) == (tuner == "hyperband")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--objective", "niceness"], "say niceness:min or niceness:max"),
        (["--objective", "task_loss", "task_loss"], "expected different ones"),
        (["--tune", "nothing"], "invalid choice"),
        (["--method", "dmtrl"], "expected 'all' or some of"),
        (["--method", "all", "laf"], "expected 'all' or some of"),
        (["--data", "users_own:none"], "users_own:none"),
        (["--data", "users_own"], "expected MODULE:FUNCTION"),
    ],
)
def test_malformed(users, arguments, message, capsys):
    with pytest.raises(SystemExit):
        search.main([*TUCKER, *users, *arguments])
    assert message in capsys.readouterr().err


def test_nothing_to_tune(users, capsys):
    arguments = ["--model", "users_own:backbone", "--method", "hard", "--tune", "sharing"]
    with pytest.raises(SystemExit):
        search.main([*arguments, *users])
    assert "nothing to search for" in capsys.readouterr().err


def test_unknown_objective(users, few_steps):
    """A result that there isn't ends the search at once: no trial would have it."""
    with pytest.raises(SystemExit, match=r"val_a_accuracy.*Received: 'val_c_accuracy'"):
        search.main([*TUCKER, *users, "--objective", "val_c_accuracy", "--max-trials", "9"])


def test_directions():
    options = search.parser().parse_args(
        ["--model", "m:f", "--method", "laf", "--objective", "val_a_accuracy", "own:max"]
    )
    found = search.make_objectives(search.parser(), options, {"task_loss": "min"})
    assert found == [Objective("val_a_accuracy", "max"), Objective("own", "max")]


def test_a_trial_that_kills_the_process(tmp_path):
    """Killed three times in one trial, the search goes on without it."""
    folder = tmp_path / "trial_0"
    folder.mkdir()
    for _ in range(3):
        search._counted(folder).__enter__()
    with pytest.raises(MemoryError, match="3 tries"):
        search._counted(folder).__enter__()
    with pytest.raises(KeyboardInterrupt), search._counted(tmp_path):
        raise KeyboardInterrupt
    assert not (tmp_path / "starts.txt").exists()


def test_a_wrong_first_call(users, tmp_path, capsys, few_steps):
    """What never found anything doesn't hold its folder for other settings."""
    folder = tmp_path / "search"
    with pytest.raises(ZeroDivisionError):
        search.main([*TUCKER, *users, "--max-trials", "1", "--data", "users_own:broken"])
    with pytest.raises(SystemExit):
        search.main([*TUCKER, *users, "--method", "hard", "--tune", "sharing"])
    assert not (folder / "search.json").exists()
    with pytest.raises(SystemExit, match=r"All 1 trials failed.*Delete"):
        search.main([*TUCKER, *users, "--max-trials", "1", "--data", "users_own:missing"])
    assert len(search.main([*TUCKER, *users, "--max-trials", "1"])["table"]) == 1
    with pytest.raises(SystemExit):
        search.main([*TUCKER, *users, "--objective", "val_a_loss"])
    assert "has a search with other ['objectives']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        *itertools.product(
            ["search.json"],
            ["", '{"experiment": "own', "[]"],
            [r"cut off.*delete the file, and it goes on"],
        ),
        *itertools.product(
            ["oracle.json", "trial_0/trial.json"],
            ["", '{"seed"', "[]", "{}"],
            [r"cut off.*Put back a copy of it, or delete the folder"],
        ),
        ("trial_1/starts.txt", "", "Received: ''. Delete the file"),
        ("test.jsonl", "{}", r"line 1: .*Delete the line"),
    ],
)
def test_cut_files(searched_once, name, message, content, capsys):
    """The error has the file's name, and says how to go on; the search is as it was."""
    folder, arguments = searched_once
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    whole = path.read_bytes() if path.exists() else None
    path.write_text(content and f"{content}\n")
    try:
        with pytest.raises(SystemExit) as ended:
            search.main([*arguments, "--max-trials", "2"])
        assert re.search(f"{re.escape(str(path))}.*{message}", str(ended.value), re.DOTALL)
    finally:
        path.unlink()
        if whole is not None:
            path.write_bytes(whole)


def test_missing_trial(searched_once):
    folder, arguments = searched_once
    path = folder / "trial_0" / "trial.json"
    whole = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(
            SystemExit, match=r"trial_0/trial\.json is not there\. Put back"
        ):
            search.main(arguments)
    finally:
        path.write_bytes(whole)


def test_in_use(searched_once, capsys):
    """A search is one process's; Ctrl-C says how it goes on."""
    folder, arguments = searched_once
    with files.working_in(folder), pytest.raises(SystemExit, match="in use by process"):
        search.main(arguments)


def test_interrupted(users, capsys, monkeypatch):
    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(own.Own, "learn", interrupted)
    with pytest.raises(SystemExit) as ended:
        search.main([*TUCKER, *users])
    assert ended.value.code == 130
    assert "has what is done. The same command goes on" in capsys.readouterr().err


def test_the_model_is_kept_before_its_result(users, tmp_path, monkeypatch, few_steps):
    """Ended in between, the model is there after the next call."""
    arguments = [*TUCKER, *users, "--max-trials", "1"]
    keep = own.Own.keep
    monkeypatch.setattr(own.Own, "keep", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search.main(arguments)
    monkeypatch.setattr(own.Own, "keep", keep)
    search.main(arguments)
    assert (tmp_path / "search" / "best.keras").exists()


@pytest.mark.parametrize(
    "address, refused",
    [
        ("0.0.0.0", True),
        ("0", True),
        ("::", True),
        ("[::]", True),
        ("", True),
        ("::ffff:0.0.0.0", True),
        ("127.0.0.1", False),
        ("[::1]", False),
        ("ipv4:0.0.0.0", None),
    ],
)
def test_address_of_the_chief(address, refused, monkeypatch, capsys):
    """Not every interface, unless that is asked for."""
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", address)
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "chief")
    p = search.parser()
    given = ["--model", "m:f", "--method", "laf"]
    if refused is False:
        search.check_address(p, p.parse_args(given))
        return
    with pytest.raises(SystemExit):
        search.check_address(p, p.parse_args(given))
    said = capsys.readouterr().err
    wanted = "asks nobody who they are" if refused else "as its workers reach it"
    assert wanted in said and repr(address) in said
    search.check_address(p, p.parse_args([*given, "--insecure-bind"]))
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker1")
    search.check_address(p, p.parse_args(given))


# Processes are forked from one that has imported all, and has run nothing of TensorFlow.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tuning.search", "tensorboard.plugins.hparams.api"])

SCRIPT = """
import os, sys
os.environ.update({variables!r})
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1), os.dup2(log, 2)
sys.stdout = sys.stderr = open(1, "w", buffering=1)
sys.path[:0] = {path!r}
"""


def process(script, tmp_path, **variables):
    """A script in a process of its own."""
    # The process that is forked from must not look for GPUs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    name = variables.get("KERASTUNER_TUNER_ID", "alone")
    start = SCRIPT.format(
        variables={"TRAININGS": str(tmp_path / "trainings"), **variables},
        log=str(tmp_path / f"log_{name}"),
        path=[str(pathlib.Path(search.__file__).parents[1]), str(tmp_path)],
    )
    started = processes.Process(target=exec, args=(start + script, {}))
    started.start()
    return started


def ended(started, tmp_path):
    """Wait for a process, which must end well."""
    started.join(180)
    logs = {path.name: path.read_text() for path in tmp_path.glob("log_*")}
    assert started.exitcode == 0, logs


def trainings(tmp_path, count=None, seconds=180):
    """What was trained: `(worker, scale)`. Waits until it is so many."""
    path = tmp_path / "trainings"
    until = time.monotonic() + seconds
    while True:
        found = (
            [line.split() for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )
        if count is None or len(found) >= count:
            return found
        assert time.monotonic() < until, found
        time.sleep(0.2)


# What is trained is of no interest here.
SEARCH = """
import tensorflow as tf
from tuning import search

tf.config.run_functions_eagerly(True)
search.main("""
SLOW = ["--model", "users_own:slow", "--method", "own", "--tune", "sharing"]


@pytest.mark.long
def test_killed_and_resumed(users, tmp_path, monkeypatch, few_steps):
    """The trial that was running is run again; finished ones are not."""
    arguments = [*SLOW, *users, "--tuner", "random", "--max-trials", "3"]
    (tmp_path / "pause").touch()
    running = process(f"{SEARCH}{arguments!r})", tmp_path)
    # The declaration of the space, the first trial, and the second, which waits.
    begun = trainings(tmp_path, 3)
    running.kill()
    running.join()
    (tmp_path / "pause").unlink()
    monkeypatch.setenv("TRAININGS", str(tmp_path / "trainings"))
    found = search.main(arguments)
    assert len(found["table"]) == 3
    after = [scale for _, scale in trainings(tmp_path)[3:]]
    # The declaration, what was killed, the last, and the best on all training data.
    assert len(after) == 4 and after[1] == begun[2][1] != after[2]


@pytest.mark.long
def test_chief_and_workers(users, tmp_path):
    """Three processes: each trial runs once, and a killed worker's is not lost."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [*SLOW, *users, "--tuner", "random", "--max-trials", "5"]
    arguments += ["--worker-timeout", "8"]
    cluster = {"KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": port}
    (tmp_path / "pause").touch()

    def start(name):
        script = f"{SEARCH}{arguments!r})"
        return process(script, tmp_path, KERASTUNER_TUNER_ID=name, **cluster)

    chief = start("chief")
    workers = {name: start(name) for name in ("worker1", "worker2")}
    # Three declarations, the default trial, and one for each worker, where they wait.
    begun = trainings(tmp_path, 6)
    waiting = {who: scale for who, scale in begun if scale != "0.500000"}
    assert set(waiting) == set(workers)
    workers["worker1"].kill()
    (tmp_path / "pause").unlink()
    ended(workers["worker2"], tmp_path)
    ended(chief, tmp_path)
    log = (tmp_path / "log_chief").read_text()
    table = pd.read_csv(tmp_path / "search" / "trials.csv")
    assert len(table) == 5, log
    # Each once, but for the killed one, which the other worker ran too.
    ran = [(who, f"{scale}") for who, scale in trainings(tmp_path) if who in workers]
    scales = [scale for who, scale in ran if scale != "0.500000"]
    assert sorted(scales) == sorted([*set(scales), waiting["worker1"]])
    assert ("worker2", waiting["worker1"]) in ran
    assert "Test: " in log


TWO = """
import tensorflow as tf
from applications import mnist
from tuning import search

two = ["--strategy", "cpu", "--replicas", "2"]
small = ["--epochs", "2", "--fraction", "0.0011", "--batch-size", "32", "--fc", "4"]
command = [*two, *small, "--padding", "valid", "--methods", "ud-mtl"]
table = mnist.main([*command, "--output", OUTPUT])["mnist"]
assert list(table.Method) == ["UD-MTL (N = 3)"], table
found = search.main([*ARGUMENTS, "--max-trials", "1", *two, "--batch-size", "6"])
assert len(found["table"]) == 1
assert tf.config.list_logical_devices("CPU")[1:], "one device"
"""


@pytest.mark.long
def test_replicas(users, tmp_path):
    """An experiment and a search on two devices; 66 and 30 examples, uneven batches."""
    given = {"ARGUMENTS": [*TUCKER, *users], "OUTPUT": str(tmp_path / "mnist")}
    script = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    ended(process(script + TWO, tmp_path), tmp_path)
