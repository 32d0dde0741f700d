"""How much the layers of a network share.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4.3, Eq. 9.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.ground.types import PathLike
from dmtrl_keras.ground.validation import (
    check_model,
    check_path,
    finite_array,
    is_real,
    refusal,
)
from dmtrl_keras.tasks.task_layer import task_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sharing_strength_of(task_matrix: ArrayLike) -> float:
    """How much T tasks share, from the task matrix S alone (DMTRL Eq. 9).

    `rho = 2 / (T (T - 1)) * sum over i < j of cos(s_i, s_j)`, where the columns of S are
    normalised first: absolute values, then a softmax over each column. Columns
    that are not negative and sum to one already are taken as they are: that is the
    range that the paper normalises to, and how it assigns the identity to independent
    tasks (rho = 0) and one row of ones to hard sharing (rho = 1); their softmax would
    not give these values.

    Args:
        task_matrix: array `(K, T)`.

    Returns:
        A float in [0, 1]. It does not depend on the scale of the kernels, which is in the
        latent ones, but for the softmax on that of S.

    Raises:
        ValueError: if it is not a finite matrix; on a single task, which has no pair to
            compare.

    Example:

    >>> import numpy as np
    >>> sharing_strength_of(np.eye(3)), round(sharing_strength_of(np.ones((2, 3))), 6)
    (0.0, 1.0)
    """
    owner = "sharing_strength_of"
    matrix = finite_array("task_matrix", task_matrix, owner)
    if matrix.ndim != 2 or matrix.size == 0 or matrix.shape[1] < 2:
        raise ValueError(
            f"{owner}: the task matrix must be a finite matrix (K, T) of two tasks or "
            f"more, whose sharing is compared. Received: shape={matrix.shape}."
        )
    tasks = matrix.shape[1]
    stochastic = np.all(matrix >= 0) and np.allclose(matrix.sum(axis=0), 1)
    if not stochastic:
        matrix = np.abs(matrix)
        matrix = np.exp(matrix - matrix.max(axis=0))
        matrix = matrix / matrix.sum(axis=0)
    unit = matrix / np.linalg.norm(matrix, axis=0)
    cosine = unit.T @ unit
    pairs = np.triu_indices(tasks, 1)
    return float(np.clip(cosine[pairs].mean(), 0, 1))


def sharing_strength(model: keras.Model) -> dict[str, float]:
    """The sharing strength of each layer with T kernels (DMTRL Eq. 9).

    Args:
        model: a built model.

    Returns:
        A dict from layer name to rho, in the order of the layers; see
        `sharing_strength_of`. Independent kernels have 0, hard-shared ones 1. Layers of a
        single task, which have nobody to share with, are left out.

    Raises:
        ValueError: if the model has no such layer of two tasks or more.

    Example:

    >>> import keras
    >>> from dmtrl_keras import layers, sharing_strength
    >>> inputs = keras.Input((8,))
    >>> hidden = layers.TaskDense(16, tasks=4, shared_input=True, name="fc")(inputs)
    >>> sharing_strength(keras.Model(inputs, hidden))
    {'fc': 0.0}
    """
    owner = "sharing_strength"
    found = [layer for layer in task_layers(check_model(model, owner)) if layer.tasks > 1]
    if not found:
        raise ValueError(
            f"{owner}: model {model.name!r} has no layer with a kernel for each of two "
            "tasks or more, such as TaskConv2D or TuckerDense."
        )
    return {
        layer.name: sharing_strength_of(keras.ops.convert_to_numpy(layer.task_matrix))
        for layer in found
    }


def plot_sharing_strength(
    strengths: Mapping[str, float] | Mapping[str, dict[str, float]],
    path: PathLike | None = None,
) -> "Figure":
    """Plot the sharing strength over depth, one line for each network.

    Args:
        strengths: dict from a label to what `sharing_strength` returned, the layers in
            their order from input to output; or one such dict by itself.
        path: where to save the figure; None: don't.

    Returns:
        The `matplotlib` figure (matplotlib is in the extra `applications`).

    Raises:
        ValueError: on what is no dict of numbers, or of such dicts.

    Example:

    >>> figure = plot_sharing_strength({"conv1": 0.9, "fc": 0.3})
    """
    owner = "plot_sharing_strength"
    check_path("path", path, owner)
    _check_strengths(strengths, owner)
    from matplotlib.figure import Figure

    lines: Any = strengths
    if not all(isinstance(value, dict) for value in strengths.values()):
        lines = {"": strengths}
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, values in lines.items():
        axes.plot(list(values), list(values.values()), marker="o", label=label)
    axes.set(ylim=(-0.05, 1.05), xlabel="layer", ylabel="sharing strength")
    if any(lines):
        axes.legend()
    if path is not None:
        figure.savefig(path)
    return figure


def _check_strengths(strengths: Any, owner: str) -> None:
    """Raise unless it is a dict of numbers by name, or a dict of such dicts."""
    given = list(strengths.values()) if isinstance(strengths, Mapping) else []
    nested = bool(given) and all(isinstance(value, Mapping) for value in given)
    lines = given if nested else [strengths]
    if not given or not all(map(is_real, (v for line in lines for v in line.values()))):
        what = "a dict from layer to number, or a dict of such dicts"
        raise refusal("strengths", strengths, owner, what)
