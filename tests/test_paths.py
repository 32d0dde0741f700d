"""Modules that have moved are imported and named where they are now."""

import ast
import importlib.util
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Of version 0.1, below `dmtrl_keras`; what users import (`layers`, `losses`, ...) stayed.
MOVED = (
    "backend",
    "data",
    "export",
    "factorization",
    "kernel_sharing",
    "layers.base",
    "layers.conv",
    "layers.dense",
    "layers.depthwise",
    "layers.factorized",
    "layers.fusion",
    "layers.layout",
    "layers.named",
    "layers.normalization",
    "layers.prior",
    "layers.relation",
    "layers.similar",
    "missing",
    "model",
    "networks",
    "parameterizations.base",
    "parameterizations.independent",
    "parameterizations.laf",
    "parameterizations.similar",
    "parameterizations.stages",
    "parameterizations.tt",
    "parameterizations.tucker",
    "relations",
    "sharing",
    "similar_kernels",
    "state",
    "summary",
    "task_relation",
    "validation",
)
# What a release changed is told with the old names.
HISTORY = ("CHANGELOG.md",)
SUFFIXES = (".cfg", ".ini", ".ipynb", ".md", ".py", ".toml", ".yaml", ".yml")


def files():
    """The tracked files with text; where there is no repository, those of the sources."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\0")
    paths = [ROOT / name for name in listed if name]
    if not paths:
        folders = ("applications", "dmtrl_keras", "docs", "examples", "tests", "tuning")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
        paths += ROOT.glob("*")
    return [
        path
        for path in paths
        if path.suffix in SUFFIXES and path.name not in HISTORY and path.is_file()
    ]


def imported(tree, package):
    """The full names of all that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def old_paths(path, text):
    """The moved modules that a file imports or names."""
    dotted = "|".join(map(re.escape, sorted(MOVED, key=len, reverse=True)))
    slashed = "|".join(name.replace(".", "/") for name in MOVED)
    # `dmtrl_keras.summary`, but not `dmtrl_keras.summary_of`; a file as such.
    found = re.findall(rf"\bdmtrl_keras\.(?:{dotted})\b(?!\()", text)
    found += re.findall(rf"\bdmtrl_keras/(?:{slashed})\.py\b", text)
    if path.suffix == ".py":
        package = path.relative_to(ROOT).parent.parts
        names = {f"dmtrl_keras.{name}" for name in MOVED}
        found += sorted(names & set(imported(ast.parse(text), package)))
    return found


def test_no_old_paths():
    """In no file of the repository."""
    found = {}
    for path in files():
        if path != pathlib.Path(__file__):
            old = old_paths(path, path.read_text(encoding="utf-8"))
            found |= {str(path.relative_to(ROOT)): old} if old else {}
    assert ROOT / "dmtrl_keras" / "__init__.py" in files()
    assert not found


def test_no_old_modules():
    """Nor is any of them there to be imported."""
    left = []
    for name in MOVED:
        place, _, module = name.rpartition(".")
        parent = importlib.util.find_spec(f"dmtrl_keras.{place}".rstrip("."))
        if parent.submodule_search_locations:
            full = f"{parent.name}.{module}"
            left += [full] if importlib.util.find_spec(full) else []
    assert not left


@pytest.mark.parametrize(
    "text",
    [
        "import dmtrl_keras.backend",
        "from dmtrl_keras.layers.base import TaskLayer",
        "from dmtrl_keras import (\n    multitask,\n    similar_kernels,\n)",
        "from dmtrl_keras.layers import base",
        "from . import state",
        "from .layers.base import TaskLayer",
        "# See `dmtrl_keras.parameterizations.stages`.",
        "# In dmtrl_keras/layers/named.py.",
    ],
)
def test_old_paths_are_found(text):
    """Whatever the form."""
    assert old_paths(ROOT / "dmtrl_keras" / "some.py", text)


@pytest.mark.parametrize(
    "text",
    [
        "from dmtrl_keras.layers import TaskDense",
        "from dmtrl_keras.training.model import MultiTaskModel",
        "import dmtrl_keras\ndmtrl_keras.factorize()",
        "from dmtrl_keras import losses, metrics",
        "from . import multitask",
    ],
)
def test_other_paths_are_not(text):
    """Public names, and modules where they are now."""
    assert not old_paths(ROOT / "dmtrl_keras" / "some.py", text)
