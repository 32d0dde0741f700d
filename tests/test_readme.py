"""The README's tour runs as it stands, and its tables are there."""

import pathlib
import re
import sys

import keras
import numpy as np
import pytest

from dmtrl_keras import task_covariance
from tuning import search

README = pathlib.Path(__file__).parent.parent / "README.md"


def scripts():
    """The Python scripts of the README, in order."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run_without_weights(script, folder, monkeypatch):
    """Run a script in a folder, its backbone not pretrained."""
    assert script.count("include_top=False") == 1
    script = script.replace("include_top=False", "include_top=False, weights=None")
    monkeypatch.chdir(folder)
    exec(compile(script, "README.md", "exec"), {})


def test_relations(tmp_path, monkeypatch):
    """The scripts on relations run and leave a model with its covariances."""
    run_without_weights(scripts()[2], tmp_path, monkeypatch)
    assert pathlib.Path("relations.png").stat().st_size > 1000
    model = keras.saving.load_model("domains.keras")
    covariances = task_covariance(model)
    assert {matrix.shape for matrix in covariances.values()} == {(3, 3)}
    exec(compile(scripts()[3], "README.md", "exec"), {})
    assert len(scripts()) == 10


def test_task_relations(tmp_path, monkeypatch):
    """The script on TRN trains, saves and exports."""
    monkeypatch.chdir(tmp_path)
    exec(compile(scripts()[4], "README.md", "exec"), {})
    model = keras.saving.load_model("related.keras")
    assert set(model.similarities()) == {"output", "hidden", "label"}
    assert pathlib.Path("related/saved_model.pb").exists()


def test_searches(tmp_path, monkeypatch):
    """The user's module is searched by the command, and in a script of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    faces, script = scripts()[6:8]
    pathlib.Path("faces.py").write_text(faces)
    command = re.search(r"python -m tuning.search (--model .*)", README.read_text())
    arguments = [*command[1].split(), "--max-trials", "1", "--epochs", "1"]
    found = search.main([*arguments, "--directory", "found"])
    assert np.isfinite(found["test"]["val_gender_accuracy"])
    assert pathlib.Path("found", "best.keras").exists()
    space = {}
    exec(compile(script, "README.md", "exec"), space)
    assert space["model"].task_names == ("age", "gender")
    sys.modules.pop("faces")


def test_distribution(capsys):
    """The scripts on several GPUs and machines run, here on one device."""
    for script in scripts()[8:10]:
        space = {}
        exec(compile(script, "README.md", "exec"), space)
    assert len(space["history"]["loss"]) == 2


def test_similar_kernels(tmp_path, monkeypatch, capsys):
    """The script on MTAL trains, saves, merges and exports."""
    monkeypatch.chdir(tmp_path)
    exec(compile(scripts()[5], "README.md", "exec"), {})
    model = keras.saving.load_model("similar.keras")
    assert model.get_layer("conv3").sharing.update_every == 20
    assert "Weights saved" in capsys.readouterr().out
    assert pathlib.Path("merged/saved_model.pb").exists()


def test_backbone(tmp_path, monkeypatch, capsys):
    """The script on backbones runs, here without the pretrained weights."""
    script = scripts()[1]
    run_without_weights(script, tmp_path, monkeypatch)
    alone = keras.saving.load_model("age.keras")
    assert alone.output_shape == (None, 8)
    assert "conv5_block3_3_conv" in capsys.readouterr().out


def test_tour(tmp_path, monkeypatch):
    """The script of the tour, of at most 25 lines, trains and saves a model."""
    script = scripts()[0]
    assert len(script.splitlines()) < 25
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    model = keras.saving.load_model("two_tasks.keras")
    assert set(model.output) == {"parity", "size"}


TABLES = ["mnist", "office", "office-images", "mtfl", "mtfl-convergence", "benchmark"]


TABLES += [
    f"mtal-{kind}{group}"
    for kind in ("", "sharing-", "sweep-")
    for group in ("related", "unrelated")
]


@pytest.mark.parametrize("name", [*TABLES, "backbone", "prior", "relation", "similar"])
def test_tables(name):
    """Measured tables, not empty marks."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    block = README.read_text().split(begin)[1].split(end)[0]
    assert block.count("|") > 20
