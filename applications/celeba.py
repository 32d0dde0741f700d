"""The attributes of CelebA as tasks: how similar their labels are.

Li et al., "Task Relation Networks" (WACV 2019), Figure 3 and section 4.2.1: the largest
canonical correlation of the labels of each pair of the 40 attributes, which for binary
labels is the absolute correlation. It needs the labels only, `list_attr_celeba.txt`.

    python -m applications.celeba --similarity --data FOLDER
"""

import argparse
import pathlib
import zipfile

import numpy as np
import pandas as pd
from rich.console import Console

from dmtrl_keras import plot_heat_map, task_similarity_matrix

from .experiment import in_range, markdown_table, rich_table

LABELS = "list_attr_celeba.txt"


def load_attributes(path):
    """The labels of CelebA's attributes.

    Args:
        path: the file `list_attr_celeba.txt`, a folder that has it somewhere, or a zip file
            that has it.

    Returns:
        A data frame of int8 zeros and ones, one column for each attribute, the file names
        of the images as index.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not in the form of CelebA's.
    """
    path = pathlib.Path(path)
    if path.suffix == ".zip" and path.is_file():
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(LABELS)]
            if not names:
                raise FileNotFoundError(f"{path} has no {LABELS}.")
            with archive.open(names[0]) as file:
                return _read(file, path)
    if path.is_dir():
        files = sorted(path.rglob(LABELS))
        if not files:
            raise FileNotFoundError(f"The folder {path} has no {LABELS}.")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        return _read(file, path)


def _read(file, path):
    try:
        count = int(file.readline())
        frame = pd.read_csv(file, sep=r"\s+")
        labels = frame.to_numpy("int8")
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a number of images, a line of attribute names, and a line "
            f"of a file name and 1 or -1 for each attribute ({error})."
        ) from error
    if len(frame) != count or not np.all(np.abs(labels) == 1):
        raise ValueError(
            f"{path}: expected {count} lines of 1 and -1, as its first line says. "
            f"Received: {len(frame)} lines, values {np.unique(labels)[:5].tolist()}."
        )
    return (frame > 0).astype("int8")


def similarity_table(matrix, names, count):
    """The most and the least similar pairs.

    Args:
        matrix: array `(T, T)`.
        names: list of T strings.
        count: int, how many pairs of each kind.

    Returns:
        A data frame, the most similar pair first.
    """
    first, second = np.triu_indices(len(names), 1)
    pairs = pd.DataFrame(
        {
            "Attribute": np.take(names, first),
            "Other attribute": np.take(names, second),
            "Similarity": matrix[first, second],
        }
    ).sort_values("Similarity", ascending=False, kind="stable")
    if len(pairs) > 2 * count:
        pairs = pd.concat([pairs.head(count), pairs.tail(count)])
    return pairs.assign(Similarity=pairs["Similarity"].map("{:.4f}".format))


def parser():
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m applications.celeba",
        description="Similarity of CelebA's attributes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--similarity",
        action="store_true",
        required=True,
        help="of the labels of all pairs of attributes: the paper's Figure 3",
    )
    p.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        help=f"{LABELS}, or a folder or zip file that has it",
    )
    p.add_argument("--attributes", nargs="+", help="those to compare; all by default")
    p.add_argument("--pairs", type=in_range(int, 0), default=10, help="to print")
    p.add_argument("--output", type=pathlib.Path, default="results/celeba")
    return p


def main(arguments=None):
    """Compare the attributes; returns the similarities as a data frame."""
    options = parser().parse_args(arguments)
    console = Console()
    labels = load_attributes(options.data)
    if options.attributes is not None:
        unknown = sorted(set(options.attributes) - set(labels))
        if unknown or len(options.attributes) < 2:
            raise ValueError(
                f"--attributes: expected two at least of {list(labels)}. "
                f"Received: {options.attributes}."
            )
        labels = labels[options.attributes]
    names = list(labels)
    matrix = task_similarity_matrix(labels.to_numpy())
    table = similarity_table(matrix, names, options.pairs)
    title = f"Similarity of attributes over {len(labels):,} images"
    console.print(rich_table(table, title))
    options.output.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(matrix, names, names)
    frame.to_csv(options.output / "similarity.csv")
    options.output.joinpath("pairs.md").write_text(markdown_table(table))
    plot_heat_map(matrix, names, options.output / "similarity.png", limits=(0, 1))
    console.print(f"Matrix, pairs and heat map are in {options.output}.")
    return frame


if __name__ == "__main__":
    main()
