"""The recipes of CONTRIBUTING.md run as they stand."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def scripts():
    """The Python code of each recipe, by its heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    recipes = text.split("## Four recipes")[1].split("\n## ")[0].split("\n### ")[1:]
    return {
        recipe.splitlines()[0]: "".join(re.findall(r"```python\n(.*?)```", recipe, re.S))
        for recipe in recipes
    }


def run(script, folder, *arguments):
    """Run a script in a process of its own: what it registers is no matter of others."""
    path = folder / "recipe.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_four():
    """A parameterization, a fusion unit, a rule, an experiment; each with code."""
    kinds = [heading.split(":")[0] for heading in scripts()]
    assert kinds == [
        "A parameterization",
        "A fusion unit",
        "A conversion rule",
        "An experiment",
    ]
    assert all(scripts().values())


CHECKS = """
tensor = np.random.default_rng(0).normal(size=(3, 4, 5, 2))
composed = CP(40).compose(CP(40).decompose(tensor), 2)
assert np.allclose(np.moveaxis(np.asarray(composed), 0, -1), tensor, atol=1e-4)
of_all = model(np.ones((2, 4)))["gender"]
assert np.allclose(alone(np.ones((2, 4))), of_all, atol=1e-5)
"""


@pytest.mark.long
def test_library(tmp_path):
    """CP, a fusion unit and a rule do what is said of them."""
    *library, _ = scripts().values()
    run("\n".join([*library, CHECKS]), tmp_path)


SEARCH = """
import sys
import keras_tuner
from tuning import studies
from tuning.hypermodels import TUNABLE

sys.modules["applications.two_circles"] = sys.modules["__main__"]
given = ["--epochs", "3", "--loss-weights", "left=2"]
study = studies.ExperimentStudy("two_circles", "tucker", given, TUNABLE, False, 0.25)
settings = study.settings(keras_tuner.HyperParameters())
assert set(settings["loss_weights"]) == set(TASKS)
options, ticks, seen = study.with_settings(settings), [], []
watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda n, logs: seen.append(logs))
found = study.learn(options, True, 0, lambda: ticks.append(1), [watch])
assert set(study.objectives) <= set(found) and 0 < found["error"] < 1
assert set(study.model.task_names) == set(TASKS)
assert len(ticks) == study.ticks(options) == 3 and "val_loss" in seen[0]
part = EXPERIMENT.draw(options, study.data, 0)
train, valid, _ = EXPERIMENT.hold_out(part, options, 0.25, 0)
assert sorted([*train, *valid]) == sorted(part[0]) and len(valid) == 100

del TwoCircles.hold_out
try:
    studies.ExperimentStudy("two_circles", "tucker", given, TUNABLE, False, 0.25)
except NotImplementedError as error:
    assert "'two_circles' (TwoCircles) does not define `hold_out`" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.long
def test_experiment(tmp_path):
    """The experiment prints its table, and is searched."""
    *_, script = scripts().values()
    output = run(script + SEARCH, tmp_path, "--epochs", "1", "--repeats", "1")
    assert re.search(r"DMTRL-Tucker +0\.\d+ +0\.\d+", output)
