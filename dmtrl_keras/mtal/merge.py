"""How many kernels MTAL shares, and the network in which these are stored once.

Feng & Chen, "Learning Twofold Heterogeneous Multi-Task by Sharing Similar Convolution
Kernel Pairs" (2021), section 4.6 and Table 6.
"""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np

from dmtrl_keras.ground.tables import print_table
from dmtrl_keras.ground.validation import check_bool, check_model, check_number
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
        kernels: int, `T * filters`.
        shared: int, how many of them have a similar kernel of another task.
        distinct: int, how many different kernels there are after aggregation.
        parameters: int, the weights of all these kernels.
        parameters_distinct: int, the weights of the distinct ones.
    """

    layer: str
    kernels: int
    shared: int
    distinct: int
    parameters: int
    parameters_distinct: int

    @property
    def ratio(self) -> float:
        """The share of kernels that are aggregated with others, a float in [0, 1]."""
        return self.shared / self.kernels

    @property
    def saved(self) -> float:
        """The share of weights that need not be stored, a float in [0, 1)."""
        return 1 - self.parameters_distinct / self.parameters


def kernel_sharing_ratio(
    model: keras.Model, tolerance: float = 1e-5, verbose: bool = True
) -> list[KernelSharing]:
    """How many kernels are shared, by layer and in total (MTAL Table 6).

    The paper's ratio is given as the compression, too. Both are here: `ratio` counts the
    kernels that have a similar one; `saved` the weights that `merge_similar_kernels`
    saves. They differ, since only kernels whose aggregates are equal can be stored once:
    two that are similar to each other and to no other have the same aggregate
    (Eq. 5), while in larger banks each kernel has a mean of its own (Eq. 6).

    Args:
        model: a model with layers of similar kernels, such as `SimilarKernelConv2D`.
        tolerance: float; kernels whose distance is at most this share of their norm are
            equal.
        verbose: bool, whether to print the table.

    Returns:
        A list of `KernelSharing`, in the order of the layers; the last is the total.

    Raises:
        ValueError: if the model has no such layer.

    Example:

    >>> import keras
    >>> from dmtrl_keras import kernel_sharing_ratio
    >>> from dmtrl_keras.layers import SimilarKernelConv2D
    >>> inputs = keras.Input((8, 8, 3))
    >>> layer = SimilarKernelConv2D(4, 3, tasks=2, shared_input=True, pairs="index")
    >>> *_, total = kernel_sharing_ratio(keras.Model(inputs, layer(inputs)), verbose=False)
    >>> total.ratio, total.saved  # Both tasks start from equal kernels.
    (1.0, 0.5)
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
        ValueError: if the model has no layers of similar kernels, or can't be cloned.

    Example:

    >>> import keras
    >>> from dmtrl_keras import merge_similar_kernels
    >>> from dmtrl_keras.layers import SimilarKernelConv2D
    >>> inputs = keras.Input((8, 8, 3))
    >>> layer = SimilarKernelConv2D(4, 3, tasks=2, shared_input=True, pairs="index")
    >>> merged = merge_similar_kernels(keras.Model(inputs, layer(inputs)), verbose=False)
    >>> merged.count_params()  # 4 kernels of 27 weights, and 8 biases
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
    return found


def _distinct(layer: TaskLayer, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Which of the aggregated kernels are equal.

    Returns:
        `(rows, first)`: the aggregated kernels `(out * T, d)`, in the order of
        `similar_kernels.kernel_rows`, and for each the number of the first that it equals.
    """
    # In float64 the squares of all that float32 holds are finite.
    rows = similar_kernels.kernel_rows(keras.ops.convert_to_tensor(layer.kernel))
    rows = keras.ops.convert_to_numpy(rows).astype("float64")
    first = np.arange(len(rows))
    if layer.selection is not None:
        one, other = _pairs(layer)
        distance = np.linalg.norm(rows[one] - rows[other], axis=1)
        equal = distance <= tolerance * np.linalg.norm(rows[one], axis=1)
        np.minimum.at(first, one[equal], other[equal])
    return rows, first[first]


def _pairs(layer: TaskLayer) -> tuple[np.ndarray, np.ndarray]:
    """The similar pairs, as two arrays of numbers of rows."""
    assert layer.selection is not None
    selection = keras.ops.convert_to_numpy(layer.selection.tensors()["selection"])
    group, one, other = np.nonzero(selection)
    size = selection.shape[1]
    return group * size + one, group * size + other


def _sharing_of(layer: TaskLayer, tolerance: float) -> KernelSharing:
    rows, first = _distinct(layer, tolerance)
    shared = 0 if layer.selection is None else len(np.unique(_pairs(layer)[0]))
    distinct = len(np.unique(first))
    return KernelSharing(
        layer=layer.name,
        kernels=len(rows),
        shared=shared,
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
    numbers = numbers.reshape(-1, layer.tasks)
    new = with_sharing(layer, StoredOnce(numbers.tolist()))
    new.start_from({"kernel": rows[kept].T.reshape(*kernel.shape[:-2], len(kept))})
    return new


def _print(model: keras.Model, rows: Sequence[KernelSharing]) -> None:
    columns = ["Layer", "Kernels", "Shared", "Ratio", "Distinct", "Weights saved"]
    cells = [
        [
            row.layer,
            f"{row.kernels:,}",
            f"{row.shared:,}",
            f"{row.ratio:.1%}",
            f"{row.distinct:,}",
            f"{row.saved:.1%}",
        ]
        for row in rows
    ]
    print_table(f"Shared kernels: {model.name}", columns, cells, totals=1)
