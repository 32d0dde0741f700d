"""How the tasks of a network are related, as it was learned: matrices and diagrams."""

import numpy as np

from dmtrl_keras.regularizers import TensorNormalState


def task_covariance(model):
    """The learned task covariance of each layer with a tensor-normal prior (DRN Eq. 13).

    Args:
        model: a built model.

    Returns:
        A dict from layer name to a NumPy array `(T, T)`, or `(n, T, T)` where the prior
        learns one for each of n classes (`each="class"`).

    Raises:
        ValueError: if no layer learns a task covariance, or a kernel is not finite.

    Example:

    >>> import keras
    >>> from dmtrl_keras import TensorNormalRegularizer, layers, task_covariance
    >>> inputs = keras.Input((8,))
    >>> prior = TensorNormalRegularizer()
    >>> outputs = layers.TaskDense(
    ...     4, tasks=2, shared_input=True, kernel_regularizer=prior, name="fc8"
    ... )(inputs)
    >>> task_covariance(keras.Model(inputs, outputs))["fc8"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    found = {}
    for layer in model._flatten_layers(include_self=False):
        prior = getattr(layer, "prior", None)
        if isinstance(prior, TensorNormalState) and "task" in prior.modes:
            found[layer.name] = prior.covariances["task"]
    if not found:
        raise ValueError(
            f"Model {model.name!r} has no layer that learns a task covariance; see "
            "TensorNormalRegularizer."
        )
    return found


def task_correlation(model):
    """The learned task correlations, `S_ij / sqrt(S_ii S_jj)`, of each layer.

    Args:
        model: a built model.

    Returns:
        A dict like that of `task_covariance`, of values in [-1, 1].

    Raises:
        ValueError: as `task_covariance`.

    Example:

    >>> from dmtrl_keras import relationship_network, task_correlation
    >>> network = relationship_network((16,), ["amazon", "webcam"], classes=3)
    >>> sorted(task_correlation(network))
    ['bottleneck', 'classifier']
    """
    return {name: _correlation(matrix) for name, matrix in task_covariance(model).items()}


def _correlation(matrix):
    deviation = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
    return matrix / deviation[..., :, None] / deviation[..., None, :]


def plot_hinton(matrices, names=None, path=None):
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

    def draw(figure, axes, matrix):
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


def plot_heat_map(matrices, names=None, path=None, limits=(-1, 1)):
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

    def draw(figure, axes, matrix):
        largest = np.abs(matrix).max()
        low, high = (-largest, largest) if limits is None else limits
        colours = "PiYG" if low < 0 else "viridis"
        image = axes.imshow(matrix, cmap=colours, vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(matrix):
            if len(matrix) <= 12:
                axes.text(column, row, f"{value:.2f}", ha="center", va="center")
        figure.colorbar(image, ax=axes, shrink=0.8)

    return _panels(draw, matrices, names, path)


def _panels(draw, matrices, names, path):
    """One panel for each matrix."""
    from matplotlib.figure import Figure

    if not isinstance(matrices, dict):
        matrices = {"": matrices}
    side = max(4.0, 0.25 * max(len(matrix) for matrix in matrices.values()))
    figure = Figure(figsize=(1.05 * side * len(matrices), side), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(matrices)))
    for axes, (title, matrix) in zip(panels, matrices.items()):
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
