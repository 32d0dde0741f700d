"""How many kernels MTAL shares, and the network in which these are stored once.

Feng & Chen, "Learning Twofold Heterogeneous Multi-Task by Sharing Similar Convolution
Kernel Pairs" (2021), section 4.6 and Table 6.
"""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np

from dmtrl_keras.ground.tables import print_table
from dmtrl_keras.ground.validation import check_bool, check_model, check_number, name_of
from dmtrl_keras.kernels.independent import Independent
from dmtrl_keras.mtal import similarity as similar_kernels
from dmtrl_keras.mtal.similar_kernels import SimilarKernels
from dmtrl_keras.mtal.stored_once import StoredOnce
from dmtrl_keras.tasks.rewrite import with_sharing
from dmtrl_keras.tasks.rewrite_models import with_layers
from dmtrl_keras.tasks.task_layer import TaskLayer, task_layers


@dataclasses.dataclass(frozen=True)
class KernelSharing:
    """What the tasks share of one layer, or of all.

    Attributes:
        layer: str, its name, or `"total"`.
        kernels: int, how many there are of all tasks: `T * filters`, and times the input
            channels if they are slices.
        shared: int, how many of them have a similar kernel of another task.
        pairs: int, how many pairs of kernels of different tasks are compared.
        similar: int, how many of these pairs pass the threshold.
        expected: float, how many would pass if all kernels were random.
        distinct: int, how many different kernels there are after aggregation.
        parameters: int, the weights of all these kernels.
        parameters_distinct: int, the weights of the distinct ones.
    """

    layer: str
    kernels: int
    shared: int
    pairs: int
    similar: int
    expected: float
    distinct: int
    parameters: int
    parameters_distinct: int

    @property
    def ratio(self) -> float:
        """The share of kernels that are aggregated with others, a float in [0, 1]."""
        return self.shared / self.kernels

    @property
    def pair_ratio(self) -> float:
        """The share of pairs that pass, a float in [0, 1]."""
        return self.similar / self.pairs if self.pairs else 0.0

    @property
    def chance(self) -> float:
        """The share of pairs of random kernels that would pass, a float in [0, 1]."""
        return self.expected / self.pairs if self.pairs else 0.0

    @property
    def saved(self) -> float:
        """The share of weights that need not be stored, a float in [0, 1)."""
        return 1 - self.parameters_distinct / self.parameters


def kernel_sharing_ratio(
    model: keras.Model, tolerance: float = 1e-5, verbose: bool = True
) -> list[KernelSharing]:
    """How many kernels are shared, by layer and in total (MTAL Table 6).

    The paper calls it the ratio of shared pairs, and the compression of the network. There
    are three numbers: `pair_ratio` is the share of the compared pairs that pass, beside
    which `chance` says how many of random kernels do (`P(cos >= threshold)`, see
    `dmtrl_keras.mtal.similarity.chance_of_similar`); `ratio` counts the kernels that have
    a similar one, more with each further task; `saved` the weights that
    `merge_similar_kernels` saves. The last two differ, since only kernels whose aggregates
    are equal can be stored once: two that are similar to each other and to no other have
    the same aggregate (Eq. 5), while in larger banks each kernel has a mean of its own
    (Eq. 6). Where all tasks start from one draw, all pairs of equal index pass at first.

    Args:
        model: a model with layers of similar kernels, such as `SimilarKernelConv2D`.
        tolerance: float; kernels whose distance is at most this share of their norm are
            equal.
        verbose: bool, whether to print the table.

    Returns:
        A list of `KernelSharing`, in the order of the layers; the last is the total.

    Raises:
        ValueError: if the model has no such layer, or a kernel is not finite.

    Example:

    >>> import keras
    >>> from dmtrl_keras import kernel_sharing_ratio
    >>> from dmtrl_keras.layers import SimilarKernelConv2D
    >>> inputs = keras.Input((8, 8, 3))
    >>> layer = SimilarKernelConv2D(64, 3, tasks=2, threshold=0.1, shared_input=True)
    >>> *_, total = kernel_sharing_ratio(keras.Model(inputs, layer(inputs)), verbose=False)
    >>> total.pairs, round(total.chance, 3), abs(total.pair_ratio - total.chance) < 0.2
    (192, 0.392, True)
    """
    layers = _similar_layers(model, tolerance, verbose, "kernel_sharing_ratio")
    rows = [_sharing_of(layer, tolerance) for layer in layers]
    fields = [field.name for field in dataclasses.fields(KernelSharing)][1:]
    rows.append(
        KernelSharing(
            "total", *(sum(getattr(row, name) for row in rows) for name in fields)
        )
    )
    if verbose:
        _print(model, rows)
    return rows


def merge_similar_kernels(
    model: keras.Model, tolerance: float = 1e-5, verbose: bool = True
) -> keras.Model:
    """The network in which kernels that are equal after aggregation are stored once.

    What is left has no similarities to compute; it trains on with these kernels shared.

    Args:
        model: a functional or Sequential model with layers of similar kernels.
        tolerance: float; kernels whose distance is at most this share of their norm count
            as equal, and the first of them is kept.
        verbose: bool, whether to print the table of `kernel_sharing_ratio`.

    Returns:
        A new model of the same kind and structure, not compiled, whose outputs are those of
        `model`, and whose `count_params()` counts each kernel once.

    Raises:
        ValueError: if the model has no layers of similar kernels, or can't be cloned, or
            a kernel is not finite.

    Example:

    >>> import keras
    >>> from dmtrl_keras import merge_similar_kernels
    >>> from dmtrl_keras.layers import SimilarKernelConv2D
    >>> inputs = keras.Input((8, 8, 3))
    >>> layer = SimilarKernelConv2D(4, 3, tasks=2, shared_input=True, common_draw=True)
    >>> merged = merge_similar_kernels(keras.Model(inputs, layer(inputs)), verbose=False)
    >>> merged.count_params()  # 12 slices of 9 weights, and 8 biases
    116
    """
    owner = "merge_similar_kernels"
    similar = _similar_layers(model, tolerance, verbose, owner)
    merging = {id(layer) for layer in similar}
    new = with_layers(
        model,
        lambda layer: _merged(layer, tolerance) if id(layer) in merging else None,
        owner,
    )
    if verbose:
        kernel_sharing_ratio(model, tolerance)
    return new


def _similar_layers(
    model: keras.Model, tolerance: float, verbose: bool, owner: str
) -> list[TaskLayer]:
    """The layers of similar kernels, all arguments checked."""
    check_model(model, owner)
    check_number("tolerance", tolerance, owner)
    check_bool("verbose", verbose, owner)
    found = [
        layer
        for layer in task_layers(model)
        if isinstance(layer.sharing, SimilarKernels) and layer.built
    ]
    if not found:
        raise ValueError(
            f"{owner}: model {model.name!r} has no built layer of similar kernels, such as "
            "SimilarKernelConv2D."
        )
    for layer in found:
        kernel = keras.ops.convert_to_numpy(layer.factors["kernel"])
        if not np.all(np.isfinite(kernel)):
            raise ValueError(
                f"{owner}: {name_of(layer)}: the kernel has "
                f"{np.count_nonzero(~np.isfinite(kernel))} values that are not finite; "
                "which kernels are similar means nothing."
            )
    return found


def _distinct(layer: TaskLayer, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Which of the aggregated kernels are equal.

    Returns:
        `(rows, first)`: the aggregated kernels `(out * T, d)`, in the order of
        `similar_kernels.kernel_rows`, and for each the number of the first that it equals.
    """
    # In float64 the squares of all that float32 holds are finite.
    kernel = keras.ops.reshape(layer.kernel, _compared(layer))
    rows = keras.ops.convert_to_numpy(similar_kernels.kernel_rows(kernel))
    rows = rows.astype("float64")
    first = np.arange(len(rows))
    one, other = _pairs(layer)
    distance = np.linalg.norm(rows[one] - rows[other], axis=1)
    equal = distance <= tolerance * np.linalg.norm(rows[one], axis=1)
    np.minimum.at(first, one[equal], other[equal])
    return rows, first[first]


def _compared(layer: TaskLayer) -> tuple[int, ...]:
    """The shape of the stacked kernel in which an output channel is what is compared."""
    assert isinstance(layer.sharing, SimilarKernels)
    return similar_kernels.compared_shape(layer.stacked.shape, layer.sharing.kernels)


def _pairs(layer: TaskLayer) -> tuple[np.ndarray, np.ndarray]:
    """The similar pairs, each in both orders, as two arrays of numbers of rows."""
    assert isinstance(layer.sharing, SimilarKernels)
    if layer.tasks == 1:
        return np.zeros(0, int), np.zeros(0, int)
    selection = layer.sharing.selected(layer.stacked.tensors())
    group, one, other = np.nonzero(keras.ops.convert_to_numpy(selection))
    size = selection.shape[1]
    return group * size + one, group * size + other


def _sharing_of(layer: TaskLayer, tolerance: float) -> KernelSharing:
    sharing, shape = layer.sharing, _compared(layer)
    assert isinstance(sharing, SimilarKernels)
    rows, first = _distinct(layer, tolerance)
    one, _ = _pairs(layer)
    distinct = len(np.unique(first))
    pairs = sharing.compared_pairs(shape)
    step = keras.ops.convert_to_numpy(getattr(layer.selection, "step", 0))
    threshold = float(sharing.threshold_at(step))
    # A schedule may go beyond, so that none or all pass.
    chance = similar_kernels.chance_of_similar(min(max(threshold, -1), 1), rows.shape[1])
    return KernelSharing(
        layer=layer.name,
        kernels=len(rows),
        shared=len(np.unique(one)),
        pairs=pairs,
        similar=len(one) // 2,
        expected=chance * pairs,
        distinct=distinct,
        parameters=rows.size,
        parameters_distinct=distinct * rows.shape[1],
    )


def _merged(layer: TaskLayer, tolerance: float) -> TaskLayer:
    """An unbuilt layer that stores equal kernels once."""
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    rows, first = _distinct(layer, tolerance)
    kept, numbers = np.unique(first, return_inverse=True)
    if len(kept) == len(rows):
        new = with_sharing(layer, Independent())
        new.start_from({"kernel": kernel})
        return new
    shape = _compared(layer)
    numbers = numbers.reshape(-1, layer.tasks)
    inputs = kernel.shape[-3] if shape != kernel.shape else None
    new = with_sharing(layer, StoredOnce(numbers.tolist(), inputs))
    new.start_from({"kernel": rows[kept].T.reshape(*shape[:-2], len(kept))})
    return new


def _print(model: keras.Model, rows: Sequence[KernelSharing]) -> None:
    columns = ["Layer", "Pairs", "Similar", "Chance", "Kernels", "Shared", "Saved"]
    cells = [
        [
            row.layer,
            f"{row.pairs:,}",
            f"{row.pair_ratio:.1%}",
            f"{row.chance:.1%}",
            f"{row.kernels:,}",
            f"{row.ratio:.1%}",
            f"{row.saved:.1%}",
        ]
        for row in rows
    ]
    print_table(f"Shared kernels: {model.name}", columns, cells, totals=1)
