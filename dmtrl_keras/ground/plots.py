"""Diagrams of matrices of relations between tasks."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.ground.types import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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

    from matplotlib.patches import Rectangle

    return _panels(draw, matrices, names, path)


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
                axes.text(column, row, f"{value:.2f}", ha="center", va="center")
        figure.colorbar(image, ax=axes, shrink=0.8)

    return _panels(draw, matrices, names, path)


def _panels(
    draw: Callable[..., Any],
    matrices: dict[str, Any] | ArrayLike,
    names: Sequence[str] | None,
    path: PathLike | None,
) -> "Figure":
    """One panel for each matrix."""
    from matplotlib.figure import Figure

    by_title: dict[str, Any] = matrices if isinstance(matrices, dict) else {"": matrices}
    side = max(4.0, 0.25 * max(len(matrix) for matrix in by_title.values()))
    figure = Figure(figsize=(1.05 * side * len(by_title), side), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(by_title)))
    for axes, (title, matrix) in zip(panels, by_title.items()):
        matrix = np.asarray(matrix, "float64")
        square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
        if not square or not np.all(np.isfinite(matrix)):
            raise ValueError(
                "Expected finite square matrices, one for each title. "
                f"Received: shape={matrix.shape} for {title!r}."
            )
        labels = range(len(matrix)) if names is None else list(names)
        if len(labels) != len(matrix):
            raise ValueError(
                f"Expected {len(matrix)} names, one for each task. Received: {labels}."
            )
        draw(figure, axes, matrix)
        ticks = range(len(matrix))
        axes.set_xticks(ticks, map(str, labels), rotation=90 if len(labels) > 6 else 0)
        axes.set_yticks(ticks, map(str, labels))
        axes.set_title(title)
    if path is not None:
        figure.savefig(path)
    return figure
