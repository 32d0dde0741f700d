"""Files that earlier versions saved load, and give what they gave."""

import importlib.util
import json
import pathlib

import keras
import numpy as np
import pytest
from keras import ops, tree

# Files are loaded by who has imported the library.
import dmtrl_keras  # noqa: F401

DATA = pathlib.Path(__file__).parent / "data"
FILES = sorted(DATA.glob("v*/*.keras"))


def make_files():
    """The script that wrote them."""
    spec = importlib.util.spec_from_file_location("make_files", DATA / "make_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files():
    """There is a file of every family, and of what is made of trained models."""
    wanted = {*make_files().FAMILIES, "merged", "factorized"}
    assert {path.stem for path in DATA.glob("v0.1/*.keras")} == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_loads(path, tmp_path):
    """Equal outputs, the state of the optimizer with them; saved again it loads again."""
    model = keras.saving.load_model(path, safe_mode=True)
    x = make_files().examples(model, np.random.default_rng(0))
    expected = json.loads(path.with_suffix(".json").read_text())

    def check(model):
        outputs = tree.map_structure(ops.convert_to_numpy, model(x))
        assert set(outputs) == set(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(outputs[name], values, atol=1e-5)

    check(model)
    trained = path.stem in set(make_files().FAMILIES) - {"trl"}
    if trained:
        assert int(model.optimizer.iterations) == 2
        # Slots of a weight have its shape, and moments of a trained one are not zero.
        slots = [v for v in model.optimizer.variables if v.shape]
        assert slots and any(np.any(ops.convert_to_numpy(v)) for v in slots)
    model.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    check(again)
    if trained:
        for a, b in zip(model.optimizer.variables, again.optimizer.variables):
            np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
