"""Diagrams of matrices of relations between tasks."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.ground.types import PathLike
from dmtrl_keras.ground.validation import (
    check_path,
    finite_array,
    is_int,
    is_list,
    is_real,
    refusal,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The rows of larger matrices, such as those of all features, have no names.
MOST_NAMED = 60


def plot_hinton(
    matrices: dict[str, Any] | ArrayLike,
    names: Sequence[str] | None = None,
    path: PathLike | None = None,
) -> "Figure":
    """Hinton diagrams of matrices, as DRN's Figure 2.

    The area of a square is proportional to the absolute value, the largest of its matrix
    nearly filling a cell; green is positive, red negative.

    Args:
        matrices: dict from a title to a symmetric matrix `(T, T)`, such as
            `task_correlation(model)`; or one matrix.
        names: list of T task names. None: their numbers.
        path: where to save the figure; None: don't.

    Returns:
        The `matplotlib` figure (matplotlib is in the extra `applications`).

    Raises:
        ValueError: on what is no finite square matrix, on a wrong number of names.

    Example:

    >>> import numpy as np
    >>> figure = plot_hinton(np.array([[1, -0.5], [-0.5, 1]]), ["amazon", "webcam"])
    """

    def draw(figure: "Figure", axes: "Axes", matrix: np.ndarray) -> None:
        size = len(matrix)
        # A little less than a cell, so that neighbours can be told apart.
        sides = 0.95 * np.sqrt(np.abs(matrix) / (np.abs(matrix).max() or 1))
        for (row, column), side in np.ndenumerate(sides):
            colour = "tab:green" if matrix[row, column] > 0 else "tab:red"
            corner = (column - side / 2, row - side / 2)
            axes.add_patch(Rectangle(corner, side, side, color=colour))
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")

    by_title = _checked(matrices, names, path, "plot_hinton")
    from matplotlib.patches import Rectangle

    return _panels(draw, by_title, names, path)


def plot_heat_map(
    matrices: dict[str, Any] | ArrayLike,
    names: Sequence[str] | None = None,
    path: PathLike | None = None,
    limits: tuple[float, float] | None = (-1, 1),
) -> "Figure":
    """Heat maps of matrices of relations between tasks.

    Args:
        matrices: as for `plot_hinton`.
        names: list of T task names. None: their numbers.
        path: where to save the figure; None: don't.
        limits: the values at the ends of the colours; None: the largest absolute value.

    Returns:
        The `matplotlib` figure.

    Raises:
        ValueError: as `plot_hinton`.

    Example:

    >>> import numpy as np
    >>> figure = plot_heat_map({"fc8": np.eye(2)}, ["amazon", "webcam"])
    """

    def draw(figure: "Figure", axes: "Axes", matrix: np.ndarray) -> None:
        largest = np.abs(matrix).max()
        low, high = (-largest, largest) if limits is None else limits
        colours = "PiYG" if low < 0 else "viridis"
        image = axes.imshow(matrix, cmap=colours, vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(matrix):
            if len(matrix) <= 12:
                # Numbers of many cells would lie on each other.
                size = min(10, 50 / len(matrix))
                text = f"{value:.2f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=size)
        figure.colorbar(image, ax=axes, shrink=0.8)

    owner = "plot_heat_map"
    by_title = _checked(matrices, names, path, owner)
    pair = is_list(limits) and len(limits) == 2 and all(map(is_real, limits))
    if limits is not None and not (pair and -math.inf < limits[0] < limits[1] < math.inf):
        raise refusal("limits", limits, owner, "two rising numbers, or None")
    return _panels(draw, by_title, names, path)


def plot_eigenvectors(
    matrices: dict[str, Any] | ArrayLike,
    names: Sequence[str] | None = None,
    path: PathLike | None = None,
    count: int = 3,
) -> "Figure":
    """Leading eigenvectors of covariances, as heat maps with a column for each.

    A column is an eigenvector of length 1, the sign chosen so that its largest entry is
    positive; below it stands its share of the trace. Features or classes of one sign
    there go together.

    Args:
        matrices: dict from a title to a symmetric matrix `(d, d)`, such as
            `mode_covariance(model, "class")`; or one matrix.
        names: list of d names. None: their numbers.
        path: where to save the figure; None: don't.
        count: int, of eigenvectors, at most d.

    Returns:
        The `matplotlib` figure.

    Raises:
        ValueError: as `plot_hinton`.

    Example:

    >>> import numpy as np
    >>> covariance = np.array([[2.0, 1.9, 0.0], [1.9, 2.0, 0.0], [0.0, 0.0, 1.0]])
    >>> figure = plot_eigenvectors(covariance, ["bike", "bicycle", "mug"], count=2)
    """

    def draw(figure: "Figure", axes: "Axes", matrix: np.ndarray) -> None:
        values, vectors = leading_eigenvectors(matrix, count)
        image = axes.imshow(vectors, cmap="PiYG", vmin=-1, vmax=1, aspect="auto")
        figure.colorbar(image, ax=axes, shrink=0.8)
        shares = values / (np.trace(matrix) or 1)
        ticks = [f"{number}\n{share:.0%}" for number, share in enumerate(shares, 1)]
        axes.set_xticks(range(len(ticks)), ticks)

    owner = "plot_eigenvectors"
    by_title = _checked(matrices, names, path, owner)
    if not is_int(count, 1, min(len(matrix) for matrix in by_title.values())):
        raise refusal("count", count, owner, "an int from 1 to the size of the matrices")
    return _panels(draw, by_title, names, path, square=False)


def leading_eigenvectors(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues `(count,)`, falling, and their vectors `(d, count)`."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    return values, vectors * np.where(largest < 0, -1.0, 1.0)


def _checked(matrices: Any, names: Any, path: Any, owner: str) -> dict[str, np.ndarray]:
    """The matrices by title, all arguments checked."""
    check_path("path", path, owner)
    given = matrices if isinstance(matrices, dict) else {"": matrices}
    by_title = {
        title: finite_array(f"matrices[{title!r}]" if title else "matrices", matrix, owner)
        for title, matrix in given.items()
    }
    shapes = {title: matrix.shape for title, matrix in by_title.items()}
    if not shapes or any(len(s) != 2 or s[0] != s[1] or not s[0] for s in shapes.values()):
        raise ValueError(
            f"{owner}: expected finite square matrices, one for each title. "
            f"Received: {shapes}."
        )
    if names is None:
        return by_title
    fine = is_list(names) and all(isinstance(name, str) for name in names)
    if not fine or {len(names)} != {len(matrix) for matrix in by_title.values()}:
        what = f"None or a list of strings, one for each task of {shapes}"
        raise refusal("names", names, owner, what)
    return by_title


def _panels(
    draw: Callable[..., Any],
    by_title: dict[str, np.ndarray],
    names: Sequence[str] | None,
    path: PathLike | None,
    square: bool = True,
) -> "Figure":
    """One panel for each matrix; `square`: with the names along both axes."""
    from matplotlib.figure import Figure

    most = min(MOST_NAMED, max(len(matrix) for matrix in by_title.values()))
    side = max(4.0, 0.25 * most)
    figure = Figure(figsize=(1.05 * side * len(by_title), side), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(by_title)))
    for axes, (title, matrix) in zip(panels, by_title.items()):
        labels = range(len(matrix)) if names is None else list(names)
        draw(figure, axes, matrix)
        if len(matrix) <= MOST_NAMED:
            ticks = range(len(matrix))
            axes.set_yticks(ticks, map(str, labels))
            if square:
                turned = 90 if len(labels) > 6 else 0
                axes.set_xticks(ticks, map(str, labels), rotation=turned)
        axes.set_title(title)
    if path is not None:
        figure.savefig(path)
    return figure
