"""The Python blocks of the README and the documentation run; what is promised is there."""

import contextlib
import importlib
import io
import os
import pathlib
import re
import shlex
import sys

import keras
import numpy as np
import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from dmtrl_keras import task_covariance

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
# Pages that are written from notebooks run when the site is built.
PAGES = [
    README,
    *sorted(
        page
        for page in ROOT.joinpath("docs").rglob("*.md")
        if not page.with_suffix(".ipynb").exists()
    ),
]


class Page:
    """A page's blocks, which run in order, in one folder and one namespace.

    Args:
        path: path of the page.
    """

    def __init__(self, path):
        self.name = str(path.relative_to(ROOT))
        document = Document.parse(str(path), PythonCodeBlockParser())
        self._examples = sorted(document.examples(), key=lambda example: example.line)
        self.lines = [example.line for example in self._examples]
        self.namespace = document.namespace
        self._done = 0

    def run(self, folder, line=None):
        """Run what has not run yet, up to the block at a line; None: all."""
        folder.mkdir(exist_ok=True, parents=True)
        with contextlib.chdir(folder):
            while self._done < len(self._examples):
                example = self._examples[self._done]
                if line is not None and example.line > line:
                    return
                # Whatever becomes of it, it is not run twice.
                self._done += 1
                name = re.match(r"# (\w+\.py)\n", str(example.parsed))
                if name:
                    pathlib.Path(name[1]).write_text(str(example.parsed))
                else:
                    example.evaluate()


DOCUMENTS = {page.name: page for page in map(Page, PAGES)}
BLOCKS = [(name, line) for name, page in DOCUMENTS.items() for line in page.lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the pages' blocks write."""
    return tmp_path_factory.mktemp("docs")


@pytest.fixture
def page(folder, monkeypatch):
    """A function that runs a page and returns its `(folder, namespace)`."""

    def run(name, line=None):
        own = folder / name
        # A page's own modules, `# faces.py`.
        monkeypatch.syspath_prepend(own)
        DOCUMENTS[name].run(own, line)
        return own, DOCUMENTS[name].namespace

    yield run
    sys.modules.pop("faces", None)


def test_there_are_blocks():
    """Blocks are found at all, in all places."""
    pages = {name for name, _ in BLOCKS}
    assert len(BLOCKS) >= 40
    assert {"README.md", "docs/start.md", "docs/choosing.md"} <= pages
    assert sum(name.startswith("docs/guides") for name in pages) >= 8
    assert sum(name.startswith("docs/papers") for name in pages) == 6


@pytest.mark.parametrize("name, line", BLOCKS, ids=[f"{n}:{line}" for n, line in BLOCKS])
def test_block(name, line, page):
    """The block at a line runs, after those before it on its page."""
    page(name, line)


def test_readme():
    """A landing page: short, with a tour of at most 25 lines."""
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    tour = re.search(r"\n## A short tour\n(.*?)\n## ", text, re.DOTALL)[1]
    blocks = re.findall(r"```\w*\n(.*?)```", tour, re.DOTALL)
    assert blocks and sum(len(block.splitlines()) for block in blocks) <= 25
    # Where the README is shown elsewhere, only absolute addresses lead anywhere.
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(target.startswith("https://") for target in targets)


def test_tour(page):
    """The README's tour saves a model."""
    folder, _ = page("README.md")
    model = keras.saving.load_model(folder / "two_tasks.keras")
    assert set(model.output) == {"parity", "size"}


def test_backbone(page):
    """The guide on backbones saves the ordinary model of one task."""
    folder, _ = page("docs/guides/backbones.md")
    alone = keras.saving.load_model(folder / "age.keras")
    assert alone.output_shape == (None, 8)


def test_relations(page):
    """The page on DRN leaves a diagram, and a model with its covariances."""
    folder, _ = page("docs/papers/drn.md")
    assert (folder / "relations.png").stat().st_size > 1000
    covariances = task_covariance(keras.saving.load_model(folder / "domains.keras"))
    assert {matrix.shape for matrix in covariances.values()} == {(3, 3)}


def test_task_relations(page):
    """The page on TRN trains, saves and exports."""
    folder, _ = page("docs/papers/trn.md")
    model = keras.saving.load_model(folder / "related.keras")
    assert set(model.similarities()) == {"output", "hidden", "label"}
    assert (folder / "related" / "saved_model.pb").exists()


def test_similar_kernels(page):
    """The page on MTAL trains, saves, merges and exports."""
    folder, _ = page("docs/papers/mtal.md")
    model = keras.saving.load_model(folder / "similar.keras")
    assert model.get_layer("conv2").sharing.update_every == 20
    assert (folder / "merged" / "saved_model.pb").exists()


def test_devices(page):
    """The loop for several machines has the history of its epochs."""
    _, namespace = page("docs/guides/devices.md")
    assert len(namespace["history"]["loss"]) == 2


def test_searches(page, monkeypatch):
    """The user's module is searched by the command, and in a script of one's own."""
    from tuning import search

    folder, namespace = page("docs/guides/tuning.md")
    assert namespace["model"].task_names == ("age", "gender")
    monkeypatch.chdir(folder)
    text = ROOT.joinpath("docs/guides/tuning.md").read_text()
    command = re.search(r"python -m tuning.search (--model .*)", text)
    arguments = [*command[1].split(), "--max-trials", "1", "--epochs", "1"]
    found = search.main([*arguments, "--directory", "found"])
    assert np.isfinite(found["test"]["val_gender_accuracy"])
    assert pathlib.Path("found", "best.keras").exists()


def commands():
    """`(page, module, arguments)` of every `python -m` of this project in a bash block."""
    found = []
    for path in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                call = re.search(r"python -m ((?:applications|tuning)\.\w+)(.*)", line)
                if call:
                    arguments = shlex.split(call[2], comments=True)
                    found.append((str(path.relative_to(ROOT)), call[1], arguments))
    return found


_options = {}


def options(module):
    """The options that a command's help has."""
    if module not in _options:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            importlib.import_module(module).main(["--help"])
        _options[module] = set(re.findall(r"--[a-z][a-z-]*", text.getvalue()))
    return _options[module]


COMMANDS = commands()


@pytest.mark.parametrize(
    "page, module, arguments",
    COMMANDS,
    ids=[f"{page}:{module}:{n}" for n, (page, module, _) in enumerate(COMMANDS)],
)
def test_command(page, module, arguments):
    """The command has the options that a page gives it, and pages to write are there."""
    known = set(options(module))
    if "--experiment" in arguments:
        experiment = arguments[arguments.index("--experiment") + 1]
        known |= options(f"applications.{experiment}")
    given = {argument for argument in arguments if argument.startswith("--")}
    assert given <= known
    if "--page" in arguments:
        target = arguments[arguments.index("--page") + 1]
        assert ":begin -->" in ROOT.joinpath(target).read_text()


TABLES = [
    (str(page.relative_to(ROOT)), name)
    for page in PAGES
    for name in re.findall(r"^<!-- ([\w-]+):begin -->$", page.read_text(), re.MULTILINE)
]
# Their page says why.
NOT_MEASURED = {"celeba-table-2", "celeba-table-3"}


def test_there_are_tables():
    """Tables are found at all, and each experiment's page has one."""
    assert len(TABLES) >= 20
    experiments = set(ROOT.joinpath("docs", "experiments").glob("*.md"))
    # These are about all of them.
    for name in ("index.md", "relations.md"):
        experiments.remove(ROOT / "docs" / "experiments" / name)
    pages = {str(path.relative_to(ROOT)) for path in experiments}
    assert pages | {"docs/performance.md"} <= {page for page, _ in TABLES}
    assert {name for _, name in TABLES} >= NOT_MEASURED


@pytest.mark.parametrize("page, name", TABLES)
def test_tables(page, name):
    """Measured tables, not empty marks."""
    text = ROOT.joinpath(page).read_text()
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert text.count(begin) == text.count(end) == 1
    block = text.split(begin)[1].split(end)[0]
    if name in NOT_MEASURED:
        assert block.strip().startswith("Not measured")
        return
    assert block.count("|") >= 20
    # As Markdown, a table wants a line of its own before and behind the marks.
    assert block.lstrip().startswith(
        (
            "|",
            "A ",
            "Δm",
            "Faces",
            "LeNet",
            "Omniglot",
            "Res",
            "Kernel",
            "T =",
            "Two",
            "VGG",
        )
    )


# Files that a recipe or an example makes.
TO_BE_MADE = {
    "applications/two_circles.py",
    "dmtrl_keras/dmtrl/cp.py",
    "dmtrl_keras/fusion/mean.py",
}


def paths(text):
    """Paths of the repository in a page's backticks and blocks of code."""
    blocks = re.findall(r"```.*?```", text, re.DOTALL)
    words = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    # Not in the middle of another path, such as an address.
    folders = r"\.ci|tests|applications|dmtrl_keras|docs|examples|tuning"
    path = rf"(?<![\w/.-])((?:{folders})/[\w./-]*)"
    found = re.findall(path, "\n".join([*blocks, *words]))
    return {name.rstrip(".") for name in found}


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *PAGES[1:]], ids=lambda p: p.name
)
def test_paths(page):
    """What a page names is there."""
    absent = {name for name in paths(page.read_text()) if not ROOT.joinpath(name).exists()}
    assert absent <= TO_BE_MADE


def test_paths_are_found():
    """In backticks and in blocks; not within other paths."""
    text = (
        "`tests/a.py` tests/b.py https://c/docs/d\n```bash\npytest tests/e f/docs/g\n```\n"
    )
    assert paths(text) == {"tests/a.py", "tests/e"}
    made = {name for file in ROOT.glob("*.md") for name in paths(file.read_text())}
    assert made >= TO_BE_MADE


MODULES = [page.stem for page in sorted(ROOT.joinpath("docs", "api").glob("*.md"))]


@pytest.mark.parametrize("module", sorted({*MODULES} - {"index", "commands"}))
def test_index(module):
    """Each public name has a line in the index."""
    name = "dmtrl_keras" if module == "top" else f"dmtrl_keras.{module}"
    public = importlib.import_module(name)
    text = ROOT.joinpath("docs", "api", "index.md").read_text()
    names = {*getattr(public, "__all__", ["check_layer"])} - {"__version__"}
    modules = {other for other in names if f"[{other}]({other}.md)" in text}
    listed = {*re.findall(r"\[`(\w+)`\]", text.split("## What there is")[1])}
    assert names - modules - listed == set()


def test_pictures():
    """Every picture of the pages is there."""
    for path in PAGES[1:]:
        for target in re.findall(r"!\[[^]]*\]\(([^)]*)\)", path.read_text()):
            assert os.path.exists(path.parent / target), (path, target)
