"""The library without TensorFlow."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

import dmtrl_keras

ROOT = pathlib.Path(dmtrl_keras.__file__).parent
SCRIPT = pathlib.Path(__file__).with_name("without_tensorflow.py")


def run_at_import(node):
    """The parts of a module that run when it is imported."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        arguments = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        inner = [*getattr(node, "decorator_list", ()), *arguments]
    else:
        yield node
        inner = ast.iter_child_nodes(node)
    for child in inner:
        yield from run_at_import(child)


def needs_tensorflow(node):
    """Whether a part of a module imports TensorFlow, or calls `backend.tensorflow`."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "tensorflow" for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == "tensorflow"
    return (
        isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "tensorflow"
    )


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imported_when_called(path):
    """No module needs TensorFlow for being imported."""
    found = [n for n in run_at_import(ast.parse(path.read_text())) if needs_tensorflow(n)]
    assert not [f"{path}:{node.lineno}" for node in found]


def test_finds_imports():
    """The check above sees what it looks for, and only that."""
    source = """
import tensorflow as tf
from tensorflow import nn
value = backend.tensorflow().Variable
def function(x=tensorflow()):
    import tensorflow
    return tensorflow()
class A:
    strategy = tensorflow()
    def method(self):
        return backend.tensorflow()
from dmtrl_keras.ground.backend import tensorflow
"""
    found = [
        node.lineno for node in run_at_import(ast.parse(source)) if needs_tensorflow(node)
    ]
    assert found == [2, 3, 4, 5, 9]


# As if it was not installed: nothing finds it, and importing it is an error.
HIDDEN = f"""
import importlib.abc
import runpy
import sys


class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hidden())
sys.path.insert(0, {str(ROOT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""

# JAX is no requirement of the tests; CI has it in an environment of its own.
if importlib.util.find_spec("jax") is not None:

    def test_without_tensorflow():
        """Training, saving and loading on JAX, where TensorFlow can't be imported."""
        done = subprocess.run(
            [sys.executable, "-c", HIDDEN],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "KERAS_BACKEND": "jax"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "On JAX, without TensorFlow: independent similar tucker" in done.stdout
