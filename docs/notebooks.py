"""The guides that are notebooks, executed and written as pages.

`mkdocs` does it before each build. For another builder:

    python -m docs.notebooks
"""

import os
import pathlib
import tempfile

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

FOLDER = pathlib.Path(__file__).parent / "guides"


def write_pages(folder=FOLDER, force=False):
    """Execute the notebooks of a folder, each into a page of its name beside it.

    Pages that are newer than their notebooks are left as they are.

    Args:
        folder: path of the folder.
        force: bool, whether to execute all.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    for path in sorted(folder.glob("*.ipynb")):
        page = path.with_suffix(".md")
        if force or not page.exists() or page.stat().st_mtime < path.stat().st_mtime:
            page.write_text(executed(path))


def executed(path):
    """The Markdown of an executed notebook; its pictures are files beside it."""
    notebook = nbformat.read(path, as_version=4)
    root = str(FOLDER.parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    with tempfile.TemporaryDirectory() as work:
        client = NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": work}},
        )
        client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Without the start-up messages of TensorFlow.
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    pictures = f"{path.stem}_files"
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, {"output_files_dir": pictures, "unique_key": path.stem}
    )
    for name, content in resources["outputs"].items():
        target = path.parent / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    return f"{text.strip()}\n"


def on_pre_build(config):
    """Called by `mkdocs` before it looks for pages."""
    write_pages()


if __name__ == "__main__":
    write_pages(force=True)
