"""What is installed: the files of wheel and source distribution, metadata, commands."""

import email
import importlib
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from applications import commands
from dmtrl_keras.version import __version__

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("dmtrl_keras", "applications", "tuning")
COMMANDS = [
    path.stem
    for path in sorted((ROOT / "applications").glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]
COMMANDS += ["compare", "search"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution and a wheel: the files of both, metadata, console scripts."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    # A copy, so that nothing is left in the checkout.
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "results")
    shutil.copytree(ROOT, source, ignore=skip)
    # What an older build left is no part of a new one.
    (source / "build/lib/dmtrl_keras").mkdir(parents=True)
    (source / "build/lib/dmtrl_keras/moved.py").touch()
    build = "from setuptools import build_meta as b; print(b.build_{}({!r}))"

    def run(kind, where):
        call = [sys.executable, "-c", build.format(kind, str(folder))]
        done = subprocess.run(call, cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return folder / done.stdout.splitlines()[-1]

    with tarfile.open(run("sdist", source)) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(run("wheel", source)) as wheel:
        names = set(wheel.namelist())
        info = f"dmtrl_keras-{__version__}.dist-info"
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    return files, names, metadata, scripts


def modules(package):
    """The modules of a folder of the checkout, as paths in it."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}


def test_wheel(built):
    """All modules under one name, the mark of typed packages, the licence, nothing else."""
    _, names, _, _ = built
    expected = modules("dmtrl_keras")
    for package in PACKAGES[1:]:
        expected |= {f"dmtrl_keras/{path}" for path in modules(package)}
    info = f"dmtrl_keras-{__version__}.dist-info/"
    rest = {name for name in names if not name.startswith(info)}
    assert rest == expected | {"dmtrl_keras/py.typed"}
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names)


def test_source(built):
    """The tests, their data, the examples, and what they read."""
    files, _, _, _ = built
    for package in (*PACKAGES, "tests", "examples"):
        assert modules(package) <= files
    beside = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"}
    assert beside <= files
    assert {"setup.cfg", "setup.py", "ruff.toml"} <= files
    assert not [name for name in files if name.endswith(".pyc")]


def test_metadata(built):
    """Who, where, which versions of Python; a description that stands by itself."""
    _, _, metadata, scripts = built
    assert metadata["Author"]
    assert metadata["Requires-Python"] == ">=3.11"
    addresses = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert addresses["Source"] == "https://github.com/dmtrl-keras/dmtrl_keras"
    assert addresses["Documentation"] == "https://dmtrl-keras.github.io/dmtrl_keras/"
    for minor in (11, 12, 13):
        classifier = f"Programming Language :: Python :: 3.{minor}"
        assert classifier in metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert description.startswith("# dmtrl_keras")
    text = re.sub(r"^```.*?^```", "", description, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r'(?:\]\(|src="|href=")([^)"\s]+)', text)
    assert all(re.match(r"https://|#", target) for target in targets), targets
    expected = {
        f"dmtrl-{name.replace('_', '-')} = dmtrl_keras.applications.commands:{name}"
        for name in COMMANDS
    }
    assert set(scripts.split("\n")[1:]) - {""} == expected


def test_absolute_addresses():
    """Pictures, also as labels of links and in HTML; code and whole addresses stay."""
    absolute = runpy.run_path(str(ROOT / "setup.py"))["absolute"]
    base = "https://github.com/dmtrl-keras/dmtrl_keras"
    text = """
[![Sharing](docs/a.png)](./docs/a.md) <img src="docs/b.svg"> [c](https://c.org/d.png) [](#e)

```python
f[0](x)
```
"""
    expected = f"""
[![Sharing]({base}/raw/main/docs/a.png)]({base}/blob/main/docs/a.md) \
<img src="{base}/raw/main/docs/b.svg"> [c](https://c.org/d.png) [](#e)

```python
f[0](x)
```
"""
    assert absolute(text) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, monkeypatch, capsys):
    """Each console script is there and shows its arguments."""
    monkeypatch.setattr("sys.argv", [f"dmtrl-{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(commands, name)()
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out or name == "search"


def test_exit_status(monkeypatch):
    """The table that a command returns is no exit status; what is missing is named."""
    monkeypatch.setattr("applications.mnist.main", lambda: "a table")
    assert commands.mnist() is None

    def without(name):
        def find(module):
            raise ModuleNotFoundError(name=name)

        monkeypatch.setattr(importlib, "import_module", find)

    without("rich.table")
    with pytest.raises(SystemExit, match=r"pip install 'dmtrl_keras\[tuning\]'"):
        commands.search()
    # A module of ours that is missing is no matter of installing extras.
    without("tuning.spaces")
    with pytest.raises(ModuleNotFoundError):
        commands.search()
    with pytest.raises(AttributeError):
        commands._mnist  # noqa: B018


def test_lower_bounds(tmp_path):
    """One lower bound of each requirement, and none without."""
    lower_bounds = runpy.run_path(str(ROOT / "tests" / "lower_bounds.py"))["lower_bounds"]
    bounds = lower_bounds(ROOT / "setup.cfg")
    assert bounds["keras"] == "3.13" and bounds["tensorflow"] == "2.20"
    assert "dmtrl_keras" not in bounds and len(bounds) > 15
    text = (ROOT / "setup.cfg").read_text()
    other = tmp_path / "setup.cfg"
    other.write_text(text.replace("numpy>=2.0", "numpy"))
    with pytest.raises(ValueError, match="'numpy'"):
        lower_bounds(other)
