"""The examples are short, run as they stand, and do what they say."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs an example in an empty folder and returns its names."""
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_short(path):
    """At most 60 lines, a docstring that says how to run it, a test of its own."""
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"python -m examples.{path.stem}\n" in text.split('"""')[1]
    assert f"test_{path.stem}" in globals()


def test_seven():
    """All that the documentation speaks of."""
    assert len(SCRIPTS) == 7


@pytest.mark.long
def test_balancing(run):
    """The small loss falls further, the large one hardly rises; with some methods."""
    found = run("balancing")["unexplained"]
    assert found["imtl_g"]["share"] < 0.7 * found["equal"]["share"]
    assert found["imtl_g"]["price"] < 0.03
    assert found["upgrad"]["share"] > 0.8 * found["equal"]["share"]


@pytest.mark.long
def test_missing_labels(run):
    """Half of the labels are missing, and all three tasks are learned."""
    names = run("missing_labels")
    missing = np.isnan(np.stack(list(names["partly"].values())))
    assert 0.4 < missing.mean() < 0.6
    results = names["results"]
    assert results["smile_binary_accuracy"] > 0.9
    assert results["glasses_binary_accuracy"] > 0.9
    assert results["turn_mean_absolute_error"] < 0.2


@pytest.mark.long
def test_two_datasets(run):
    """Five times as many examples of one task; both are learned."""
    names = run("two_datasets")
    sizes = {task: len(y) for task, (_, y) in names["training"].items()}
    assert sizes == {"mnist": 1500, "scanned": 300}
    assert names["results"]["mnist_accuracy"] > 0.85
    assert names["results"]["scanned_accuracy"] > 0.85


@pytest.mark.long
def test_any_backbone(run, capsys):
    """The task's own model is saved, and gives what the network of both gives."""
    names = run("any_backbone")
    assert names["model"].get_layer("conv_pw_6").rank is not None
    np.testing.assert_allclose(names["difference"], 0, atol=1e-5)
    assert names["history"]["colour_accuracy"][-1] > 0.9
    assert keras.saving.load_model("shape.keras").output_shape == (None, 2)
    assert "conv_pw_6" in capsys.readouterr().out


@pytest.mark.long
def test_factorise_and_export(run):
    """Fewer parameters, hardly less accuracy, the same outputs from the file."""
    names = run("factorise_and_export")
    assert names["model"].count_params() < 0.7 * names["independent"].count_params()
    assert names["after"]["digit_accuracy"] > names["before"]["digit_accuracy"] - 0.05 > 0.8
    for task, values in names["expected"].items():
        np.testing.assert_allclose(names["served"][task], values, atol=1e-4)


@pytest.mark.long
def test_search(run):
    """Three trials with scores, and the best one's network."""
    names = run("search")
    trials = names["tuner"].oracle.get_best_trials(10)
    assert len(trials) == 3 and all(0 < trial.score <= 1 for trial in trials)
    assert names["best"].task_names == ("digit", "odd")
    assert max(trial.score for trial in trials) > 0.6


@pytest.mark.long
def test_several_devices(tmp_path):
    """Two replicas, which learn that the first two tasks are related."""
    # In a process of its own: devices are divided before TensorFlow starts.
    done = subprocess.run(
        [sys.executable, "-m", "examples.several_devices"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses = re.findall(
        r"^2 replicas, \w+: loss (\S+) to (\S+)$", done.stdout, re.MULTILINE
    )
    assert len(losses) == 3
    assert all(float(after) < 0.1 < float(before) for before, after in losses)
    rows = re.findall(r"^\[.*\]$", done.stdout, re.MULTILINE)
    correlation = np.array([json.loads(row) for row in rows])
    assert correlation.shape == (3, 3)
    assert correlation[0, 1] > 0.9 > 0.7 > correlation[0, 2]
