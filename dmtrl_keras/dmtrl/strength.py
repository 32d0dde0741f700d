"""How much the task matrices of a network have in common, and how much by chance.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4.3, Eq. 9.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from numpy.typing import ArrayLike

from dmtrl_keras.dmtrl.chance import (
    SCALINGS,
    Scaling,
    as_svds_leave_it,
    draw_task_matrices,
)
from dmtrl_keras.dmtrl.factorized import FactorizedParameterization
from dmtrl_keras.dmtrl.tucker import Tucker
from dmtrl_keras.ground.types import PathLike
from dmtrl_keras.ground.validation import (
    check_number,
    check_one_of,
    check_path,
    check_positive,
    check_seed,
    finite_array,
    is_real,
    refusal,
)
from dmtrl_keras.tasks.stacked import StackedKernel, stacked_kernels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sharing_strength_of(task_matrix: ArrayLike) -> float:
    """The sharing strength of T tasks, from the task matrix S alone (DMTRL Eq. 9).

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
        latent ones, but for the softmax on that of S. Independent kernels that are
        decomposed are far from 0: see `chance_of_sharing`.

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


def sharing_strength(model: keras.Model, scaling: Scaling = "layer") -> dict[str, float]:
    """The sharing strength of each layer with T kernels (DMTRL Eq. 9).

    It is a property of the task matrix S, which has a high one by chance, too: read it
    beside `chance_of_sharing`, what independent kernels of the same shape and ranks have.

    The softmax depends on the scale of S, which a factorisation can choose: row k of S may
    take any factor from the latent kernel `L[..., k]`, since
    `W[..., t] = sum_k L[..., k] S[k, t]`.

    Args:
        model: a built model.
        scaling: which scale S has in factorised layers (in others it is a matter of their
            definition). `"layer"`: S as the layer has it, whose rows start orthogonal with
            norm `sqrt(T)`. `"svd"`: S as the SVDs leave it, and as the authors' code has
            it. In LAF and TT the singular values are then in S, so that row k is
            `S[k] * ||L[..., k]||_F`; in Tucker they are in the core, and the row is
            `S[k] / sqrt(T)`, of norm 1 at the start.

    Returns:
        A dict from layer name to rho, in the order of the layers; see
        `sharing_strength_of`. `TaskCopies` have one for each kernel of the layer, by
        `layer/kernel`. Independent kernels have 0, hard-shared ones 1, by
        definition. Layers of a single task, which have nobody to share with, are left out.

    Raises:
        ValueError: if the model has no such layer of two tasks or more; on an unknown
            scaling.

    Example:

    >>> import keras
    >>> from dmtrl_keras import layers, sharing_strength
    >>> inputs = keras.Input((8,))
    >>> hidden = layers.TaskDense(16, tasks=4, shared_input=True, name="fc")(inputs)
    >>> sharing_strength(keras.Model(inputs, hidden))
    {'fc': 0.0}
    """
    owner = "sharing_strength"
    check_one_of("scaling", scaling, SCALINGS, owner)
    return {
        one.name: sharing_strength_of(_task_matrix(one, scaling))
        for one in _kernels(model, owner)
    }


def chance_of_sharing(
    model: keras.Model,
    scaling: Scaling = "layer",
    quantile: float | None = None,
    draws: int = 100,
    seed: int | None = 0,
) -> dict[str, float]:
    """The sharing strength that independent kernels would have in each layer.

    Kernels of independent standard normal numbers, of the layer's shape, are decomposed by
    the layer's method with the layer's ranks, and `sharing_strength_of` is taken of the
    task matrix: what a layer scores by its shape alone. In the scaling `"svd"` of LAF and
    TT, S has the norm of the layer's kernels.

    Args:
        model: a built model.
        scaling: as in `sharing_strength`.
        quantile: number in (0, 1), instead of the mean over the draws the value that this
            share of them is below. One layer's strength says something if it is above the
            0.95 quantile, not if it is just above the mean.
        draws: positive int, how many are drawn for each layer. Layers that are alike have
            the same draws.
        seed: int, of the draws; None: others in each call.

    Returns:
        A dict from layer name to a number in [0, 1], with the keys of `sharing_strength`.
        Where the sharing is not learned but assigned, as with independent or hard-shared
        kernels, it is that of the layer.

    Raises:
        ValueError: as `sharing_strength`; on a malformed argument.

    Example:

    >>> import keras
    >>> from dmtrl_keras import chance_of_sharing, layers
    >>> inputs = keras.Input((8,))
    >>> hidden = layers.LAFDense(16, tasks=4, rank=4, shared_input=True, name="fc")(inputs)
    >>> chance = chance_of_sharing(keras.Model(inputs, hidden))
    >>> 0.6 < chance["fc"] < 0.8
    True
    """
    owner = "chance_of_sharing"
    check_one_of("scaling", scaling, SCALINGS, owner)
    if quantile is not None:
        quantile = check_number("quantile", quantile, owner, 1)
    draws = check_positive("draws", draws, owner)
    seed = check_seed("seed", seed, owner)
    known: dict[tuple[Any, ...], list[np.ndarray]] = {}
    chances = {}
    for one in _kernels(model, owner):
        sharing, shape = one.stacked.fixed_sharing, tuple(one.stacked.shape)
        key = (type(sharing), repr(sharing), shape)
        if key not in known:
            rng = np.random.default_rng(seed)
            known[key] = draw_task_matrices(sharing, shape, scaling, draws, rng)
        matrices = known[key]
        if scaling == "svd" and isinstance(sharing, FactorizedParameterization):
            if not isinstance(sharing, Tucker):
                norm = np.linalg.norm(_array(one.kernel))
                matrices = [norm * matrix / np.linalg.norm(matrix) for matrix in matrices]
        found = [sharing_strength_of(matrix) for matrix in matrices]
        middle = np.mean(found) if quantile is None else np.quantile(found, quantile)
        chances[one.name] = float(middle)
    return chances


def _kernels(model: keras.Model, owner: str) -> list[StackedKernel]:
    """The stacked kernels of a model, of two tasks or more."""
    found = [one for one in stacked_kernels(model, owner) if one.tasks > 1]
    if not found:
        raise ValueError(
            f"{owner}: model {model.name!r} has no layer with a kernel for each of two "
            "tasks or more, such as TaskConv2D or TuckerDense."
        )
    return found


def _task_matrix(one: StackedKernel, scaling: Scaling) -> np.ndarray:
    """S of a stacked kernel, `(K, T)`."""
    matrix, kernel = _array(one.stacked.task_matrix()), None
    if scaling == "svd" and isinstance(one.sharing, FactorizedParameterization):
        if not isinstance(one.sharing, Tucker):
            kernel = _array(one.kernel)
        return as_svds_leave_it(matrix, kernel)
    return matrix


def _array(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(tensor).astype("float64")


def plot_sharing_strength(
    strengths: Mapping[str, float] | Mapping[str, dict[str, float]],
    path: PathLike | None = None,
    chance: Mapping[str, float] | Mapping[str, dict[str, float]] | None = None,
) -> "Figure":
    """Plot the sharing strength over depth, one line for each network.

    Args:
        strengths: dict from a label to what `sharing_strength` returned, the layers in
            their order from input to output; or one such dict by itself.
        path: where to save the figure; None: don't.
        chance: what `chance_of_sharing` returned for the same networks, in a dict by the
            same labels or by itself, as `strengths`; drawn as dashed lines. A network may
            lack it. None: no lines, and the numbers can't be told from chance.

    Returns:
        The `matplotlib` figure (matplotlib is in the extra `applications`).

    Raises:
        ValueError: on what is no dict of numbers, or of such dicts; on a chance with other
            labels.

    Example:

    >>> strengths, chance = {"conv1": 0.9, "fc": 0.7}, {"conv1": 0.7, "fc": 0.7}
    >>> figure = plot_sharing_strength(strengths, chance=chance)
    """
    owner = "plot_sharing_strength"
    check_path("path", path, owner)
    lines = _by_label("strengths", strengths, owner)
    dashed = {} if chance is None else _by_label("chance", chance, owner)
    if not set(dashed) <= set(lines):
        what = f"labels of those that `strengths` has: {list(lines)}"
        raise refusal("chance", chance, owner, what)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, values in lines.items():
        (line,) = axes.plot(list(values), list(values.values()), marker="o", label=label)
        if label in dashed:
            by_chance = dashed[label]
            axes.plot(
                list(by_chance),
                list(by_chance.values()),
                linestyle="--",
                color=line.get_color(),
                label=f"{label}, by chance" if label else "by chance",
            )
    axes.set(ylim=(-0.05, 1.05), xlabel="layer", ylabel="sharing strength")
    if any(lines) or dashed:
        axes.legend()
    if path is not None:
        figure.savefig(path)
    return figure


def _by_label(name: str, given: Any, owner: str) -> Mapping[str, Mapping[str, float]]:
    """Numbers by layer, by label: `""` of a dict of numbers by itself."""
    values = list(given.values()) if isinstance(given, Mapping) else []
    nested = bool(values) and all(isinstance(value, Mapping) for value in values)
    lines = given if nested else {"": given}
    numbers = [v for line in lines.values() for v in line.values()] if values else []
    if not values or not all(map(is_real, numbers)):
        raise refusal(name, given, owner, "a dict from layer to number, or of such dicts")
    return lines
