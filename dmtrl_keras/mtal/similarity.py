"""MTAL's maths: which kernels of different tasks are similar, and their aggregation.

Feng & Chen, "Learning Twofold Heterogeneous Multi-Task by Sharing Similar Convolution
Kernel Pairs" (2021), Eq. 3-6, as functions of tensors. What the paper leaves open is
settled in `dmtrl_keras.parameterizations.SimilarKernels`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from dmtrl_keras.ground.backend import assert_true, fused
from dmtrl_keras.ground.types import DType, Tensor
from dmtrl_keras.ground.validation import (
    check_number,
    check_one_of,
    check_positive,
    finite_array,
    is_int,
    is_list,
    real_tensor,
    refusal,
)

# The thresholds that the paper found best, section 4.3.
THRESHOLDS = {"related": 0.4, "unrelated": 0.55}
Pairing: TypeAlias = Literal["all", "index"]
PAIRINGS = ("all", "index")
KernelKind: TypeAlias = Literal["slice", "filter"]
KINDS = ("slice", "filter")

# What weights of tasks are, for the error.
WEIGHTS = "a matrix (T, T) of phi_ij in [0, 1] with phi_ij + phi_ji = 1"
# A cosine this far below the threshold counts as at it: equal kernels miss 1 by rounding.
_ROUNDING = 2e-6


def compared_shape(shape: tuple[int, ...], kernels: KernelKind) -> tuple[int, ...]:
    """The stacked kernel's shape in which each output channel is what is compared.

    Args:
        shape: tuple `(*window, in, out, T)`.
        kernels: `"filter"`, an output channel with all of its input channels: the shape as
            it is. `"slice"`, one input and one output channel: `(*window, 1, in * out, T)`.
            Slices of a window of one entry are numbers, whose cosine is 1 or -1; there the
            filter is taken.

    Returns:
        A tuple like `shape`, of as many entries in the same order.
    """
    *window, inputs, outputs, tasks = shape
    if kernels == "filter" or math.prod(window) == 1:
        return tuple(shape)
    return (*window, 1, inputs * outputs, tasks)


def usual_pairs(kernels: KernelKind) -> Pairing:
    """Which kernels are compared if nothing is said.

    Slices by index: over all pairs a slice has a partner by chance alone.
    """
    return "index" if kernels == "slice" else "all"


def chance_of_similar(threshold: float, size: int) -> float:
    """The chance that two random kernels are similar: `P(cos >= threshold)`.

    For directions that are uniform on the sphere in d dimensions it is

    `1/2 I_{1 - delta^2}((d - 1) / 2, 1/2)` for `delta >= 0`,

    with the regularised incomplete beta function, which is the share of the sphere's area
    in a cap: the integral of `sin^(d - 2)` up to the angle `arccos delta`.

    Args:
        threshold: number in [-1, 1], `delta`.
        size: positive int, d, the entries of a kernel: 9 of a 3 x 3 slice.

    Returns:
        A float in [0, 1].

    Raises:
        ValueError: on a threshold or size out of its range.

    Example:

    >>> from dmtrl_keras.mtal.similarity import chance_of_similar
    >>> round(chance_of_similar(0.4, 9), 3), round(chance_of_similar(0.4, 27), 4)
    (0.126, 0.0175)
    """
    owner = "chance_of_similar"
    threshold = check_number("threshold", threshold, owner, 1, low=-1, closed=True)
    check_positive("size", size, owner)
    if size == 1:
        return 0.5 if threshold > -1 else 1.0
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def area(angle: float) -> float:
        return float(weights @ np.sin(angle * (nodes + 1) / 2) ** (size - 2)) * angle

    # By halves: nearly all of the area is about the equator if d is large.
    share = area(math.acos(abs(threshold))) / area(math.pi / 2) / 2
    return share if threshold >= 0 else 1 - share


def kernel_rows(kernel: Tensor) -> Tensor:
    """Kernels as rows of a matrix.

    Args:
        kernel: tensor `(*window, in, out, T)`, the stacked kernel.

    Returns:
        A tensor `(out * T, d)`; row `a * T + t` is `vec(w)` of kernel `a` of task `t`.
    """
    *shape, outputs, tasks = kernel.shape
    rows = ops.reshape(kernel, (math.prod(shape), outputs * tasks))
    return ops.transpose(rows)


def kernels_by_task(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows as kernels again, the task axis first.

    Args:
        rows: tensor `(out * T, d)`, as from `kernel_rows`.
        shape: tuple `(*window, in, out, T)`.

    Returns:
        A tensor `(T, *window, in, out)`.
    """
    *window, outputs, tasks = shape
    x = ops.reshape(rows, (outputs, tasks, math.prod(window)))
    return ops.reshape(ops.transpose(x, (1, 2, 0)), (tasks, *window, outputs))


def comparable(rows: Tensor, tasks: int, pairs: Pairing) -> Tensor:
    """Rows in groups within which they are compared.

    Args:
        rows: tensor `(out * T, d)`.
        tasks: int, T.
        pairs: `"all"`, one group of all kernels; `"index"`, one for each kernel index.

    Returns:
        A tensor `(groups, size, d)`; member `i` of a group is of task `i % T`.
    """
    count, length = rows.shape
    size = tasks if pairs == "index" else count
    return ops.reshape(rows, (count // size, size, length))


def cosine_similarity(kernels: Tensor) -> Tensor:
    """The cosines of all kernels of a group (Eq. 3), as one Gram matrix.

    Args:
        kernels: float tensor `(groups, size, d)`.

    Returns:
        A tensor `(groups, size, size)`; 0 where a kernel is zero.
    """
    unit = _unit(kernels, axis=-1)
    return ops.matmul(unit, ops.swapaxes(unit, -1, -2))


def _unit(kernels: Tensor, axis: int) -> Tensor:
    """Kernels of length 1, and those that are zero."""
    # The squares of kernels as they are may overflow, or vanish.
    largest = ops.max(ops.abs(kernels), axis=axis, keepdims=True)
    unit = kernels / ops.where(largest > 0, largest, ops.ones_like(largest))
    norm = ops.sqrt(ops.sum(ops.square(unit), axis=axis, keepdims=True))
    return unit / ops.where(norm > 0, norm, ops.ones_like(norm))


def similar_pairs(kernels: Tensor, threshold: Tensor, related: Tensor) -> Tensor:
    """The pairs of kernels of different tasks that are similar enough (Eq. 4).

    Args:
        kernels: float tensor `(groups, size, d)`.
        threshold: number or scalar tensor; above 1, no pair passes.
        related: bool array `(T, T)`, symmetric: which tasks may share.

    Returns:
        A bool tensor `(groups, size, size)`, symmetric, false on the diagonal.
    """
    related = np.asarray(related) & ~np.eye(len(related), dtype=bool)
    repeats = kernels.shape[1] // len(related)
    allowed = ops.tile(ops.convert_to_tensor(related), (repeats, repeats))
    threshold = ops.cast(threshold, kernels.dtype) - _ROUNDING
    return ops.logical_and(cosine_similarity(kernels) >= threshold, allowed)


def similar_by_task(kernels: Tensor, threshold: Tensor, related: Tensor) -> Tensor:
    """`similar_pairs` of kernels of equal index, as they lie in the stacked kernel.

    Args:
        kernels: float tensor `(d, groups, T)`.
        threshold: number or scalar tensor.
        related: bool array `(T, T)`, symmetric, false on the diagonal.

    Returns:
        A bool tensor `(groups, T, T)`.
    """
    threshold = ops.cast(threshold, kernels.dtype) - _ROUNDING
    return _similar_by_task(kernels, threshold, ops.convert_to_tensor(related))


@fused
def _similar_by_task(kernels: Tensor, least: Tensor, allowed: Tensor) -> Tensor:
    unit = _unit(kernels, axis=0)
    cosines = ops.sum(unit[..., :, None] * unit[..., None, :], axis=0)
    return ops.logical_and(cosines >= least, allowed)


def coefficients(selection: Tensor, weights: Tensor) -> Tensor:
    """What the similar kernels of others contribute to each aggregated kernel.

    By Eq. 5 and 6, `w_i = 1 / |M_i| sum over j in M_i of (phi_ij w_i + phi_ji w_j)`: the
    coefficient of `w_j` is `phi_ji / |M_i|`, and what is left to 1 is that of `w_i`.

    Args:
        selection: tensor `(groups, size, size)`, 1 or true for the pairs of Eq. 4.
        weights: tensor `(T, T)`, `phi_ij`, in full precision: banks are counted in it.

    Returns:
        A tensor `(groups, size, size)` of the dtype of the weights.
    """
    selection = ops.cast(selection, weights.dtype)
    repeats = selection.shape[1] // weights.shape[0]
    weights = ops.tile(ops.transpose(weights), (repeats, repeats))
    sizes = ops.sum(selection, axis=-1, keepdims=True)
    return selection * weights / ops.maximum(sizes, 1)


def aggregate(kernels: Tensor, selection: Tensor, weights: Tensor) -> Tensor:
    """Aggregated kernels (Eq. 5, 6) by one matrix product; those without similar ones stay.

    Args:
        kernels: tensor `(groups, size, d)`.
        selection: as from `similar_pairs`.
        weights: tensor `(T, T)`.

    Returns:
        A tensor `(groups, size, d)`.
    """
    others = coefficients(selection, weights)
    own = ops.cast(1 - ops.sum(others, axis=-1, keepdims=True), kernels.dtype)
    return own * kernels + ops.matmul(ops.cast(others, kernels.dtype), kernels)


def aggregated(
    rows: Tensor, shape: tuple[int, ...], selection: Tensor, weights: Tensor
) -> Tensor:
    """`aggregate`, of kernels that are rows, as a stacked kernel again.

    Args:
        rows: tensor `(out * T, d)`, as from `kernel_rows`.
        shape: tuple `(*window, in, out, T)`.
        selection: as from `similar_pairs`.
        weights: tensor `(T, T)`.

    Returns:
        A tensor `(*window, in, out, T)`.
    """
    groups, size, _ = selection.shape
    compared = ops.reshape(rows, (groups, size, rows.shape[1]))
    mixed = aggregate(compared, selection, weights)
    return ops.reshape(ops.transpose(ops.reshape(mixed, rows.shape)), shape)


def task_coefficients(selection: Tensor, weights: Tensor) -> Tensor:
    """`coefficients` of kernels of equal index, those of the kernels themselves too.

    Args:
        selection: bool tensor `(groups, T, T)`, as from `similar_pairs`.
        weights: tensor `(T, T)`, `phi_ij`, in full precision: sums to 1 are sums in it.

    Returns:
        A tensor `(T, T, groups)` of the dtype of the weights: in `[t, u]` what the kernels
        of task u contribute to those of task t.
    """
    others = ops.transpose(coefficients(selection, weights), (1, 2, 0))
    own = 1 - ops.sum(others, axis=1, keepdims=True)
    diagonal = ops.eye(weights.shape[0], dtype=weights.dtype)[..., None]
    return others + own * diagonal


_fixed_task_coefficients = fused(task_coefficients)


def aggregate_by_task(
    kernels: Tensor, selection: Tensor, weights: Tensor, learned: bool = False
) -> Tensor:
    """`aggregate` of kernels of equal index, by one product, the task axis first.

    In the one pass over the kernels that bringing the task axis to the front takes anyway;
    so does the gradient on its way back.

    Args:
        kernels: tensor `(d, groups, T)`.
        selection: bool tensor `(groups, T, T)`, as from `similar_pairs`.
        weights: tensor `(T, T)`, `phi_ij`, in full precision.
        learned: bool, whether they need a gradient.

    Returns:
        A tensor `(T, d, groups)`.
    """

    @ops.custom_gradient
    def mix(kernels: Tensor, factors: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        def gradient(
            *arguments: Tensor, upstream: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            upstream = arguments[0] if upstream is None else upstream
            to_factors = ops.zeros_like(factors)
            if learned:
                to_factors = _task_products(upstream, kernels)
            return _from_tasks(upstream, factors), to_factors

        return _to_tasks(kernels, factors), gradient

    found = task_coefficients if learned else _fixed_task_coefficients
    factors = ops.cast(found(selection, weights), kernels.dtype)
    return mix(kernels, factors if learned else ops.stop_gradient(factors))


@fused
def _to_tasks(kernels: Tensor, factors: Tensor) -> Tensor:
    """`out[t, d, a] = sum over u of factors[t, u, a] kernels[d, a, u]`."""
    factors = ops.transpose(factors, (0, 2, 1))
    return ops.sum(factors[:, None] * kernels[None], axis=-1)


@fused
def _from_tasks(upstream: Tensor, factors: Tensor) -> Tensor:
    """The way back: `out[d, a, u] = sum over t of factors[t, u, a] upstream[t, d, a]`."""
    factors = ops.transpose(factors, (0, 2, 1))
    return ops.sum(factors[:, None] * upstream[..., None], axis=0)


@fused
def _task_products(upstream: Tensor, kernels: Tensor) -> Tensor:
    """The gradient of the factors, `(T, T, groups)`."""
    kernels = ops.transpose(kernels, (0, 2, 1))
    return ops.sum(upstream[:, :, None] * kernels[None], axis=1)


def partners_of(selection: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """For each kernel, the similar ones of other tasks, in a list of fixed length.

    Args:
        selection: bool tensor `(groups, size, size)`, as from `similar_pairs`.
        capacity: int, the length of the lists.

    Returns:
        `(partners, counts)`, int32 tensors: `(groups * size, capacity)`, numbers of rows,
        those of the partners first; and `(groups * size,)`, how many partners each
        kernel has, which may be more than the list holds.
    """
    groups, size, _ = selection.shape
    ones = ops.cast(selection, "int32")
    # Of equal values the first come first.
    _, members = ops.top_k(ops.cast(selection, "float32"), capacity)
    start = size * ops.arange(groups, dtype="int32")[:, None, None]
    partners = ops.reshape(ops.cast(members, "int32") + start, (groups * size, capacity))
    return partners, ops.reshape(ops.sum(ones, axis=-1), (groups * size,))


def partner_coefficients(
    partners: Tensor, counts: Tensor, weights: Tensor, dtype: DType
) -> tuple[Tensor, ...]:
    """`coefficients`, of listed partners only.

    Args:
        partners: int tensor `(size, capacity)`, as from `partners_of`.
        counts: int tensor `(size,)`.
        weights: tensor `(T, T)`, `phi_ij`, in full precision.
        dtype: str, that of the kernels.

    Returns:
        `(own, to_own, to_theirs, partners)`: the coefficients of the kernels themselves,
        `(size,)`; two tensors like `partners`, 0 beyond the last of them, those with which
        the partners of a kernel contribute to it, and with which it contributes to them;
        and the partners as float32 numbers.
    """
    capacity, tasks = partners.shape[1], weights.shape[0]
    own_task = ops.arange(partners.shape[0], dtype="int32")[:, None] % tasks
    their_task = partners % tasks
    flat = ops.reshape(weights, (-1,))
    banks = ops.cast(ops.maximum(counts, 1), flat.dtype)
    to_own = ops.take(flat, their_task * tasks + own_task) / banks[:, None]
    to_theirs = ops.take(flat, own_task * tasks + their_task) / ops.take(banks, partners)
    listed = ops.arange(capacity, dtype="int32") < counts[:, None]
    to_own = ops.where(listed, to_own, ops.zeros_like(to_own))
    to_theirs = ops.where(listed, to_theirs, ops.zeros_like(to_theirs))
    # The gradient of the two others is in that of `to_own`.
    own = ops.stop_gradient(1 - ops.sum(to_own, axis=1))
    to_theirs = ops.stop_gradient(to_theirs)
    parts = (ops.cast(x, dtype) for x in (own, to_own, to_theirs))
    # Functions with gradients of their own take no ints on JAX.
    return (*parts, ops.cast(partners, "float32"))


def aggregate_partners(
    kernels: Tensor, coefficients: Sequence[Tensor], learned: bool = False
) -> Tensor:
    """`aggregate` by the lists of partners: no kernel meets any but these.

    The gradient, too, gathers: pairs are symmetric, so that the transposed matrix of
    coefficients has the same lists. Adding to scattered columns would be far slower.

    Args:
        kernels: tensor `(d, size)`, a kernel in each column. In a branch of a condition all
            tensors must come from outside of it, since the gradient needs them.
        coefficients: as from `partner_coefficients`, of the kernels' dtype.
        learned: bool, whether they need a gradient.

    Returns:
        A tensor `(d, size)`.
    """

    @ops.custom_gradient
    def mix(
        kernels: Tensor, own: Tensor, to_own: Tensor, to_theirs: Tensor, partners: Tensor
    ) -> tuple[Tensor, Callable[..., Any]]:
        def gradient(
            *arguments: Tensor, upstream: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            upstream = arguments[0] if upstream is None else upstream
            weights = ops.zeros_like(to_own)
            if learned:
                weights = _inner_products(upstream, kernels, partners)
            none = map(ops.zeros_like, (to_theirs, partners))
            to_kernels = _combine(upstream, own, to_theirs, partners)
            return (to_kernels, ops.zeros_like(own), weights, *none)

        return _combine(kernels, own, to_own, partners), gradient

    return mix(kernels, *coefficients)


@fused
def _combine(kernels: Tensor, own: Tensor, others: Tensor, partners: Tensor) -> Tensor:
    """`own` times each column plus `others` times those of its partners."""
    taken = ops.take(kernels, ops.cast(partners, "int32"), axis=1)
    return own * kernels + ops.sum(taken * others, axis=-1)


@fused
def _inner_products(upstream: Tensor, kernels: Tensor, partners: Tensor) -> Tensor:
    """The gradient of `others`: each adds a partner and takes away the column itself."""
    taken = ops.take(kernels, ops.cast(partners, "int32"), axis=1)
    return ops.sum(upstream[..., None] * (taken - kernels[..., None]), axis=0)


def related_tasks(tasks: int, groups: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """Which tasks may share, from groups of related ones.

    Args:
        tasks: int, T.
        groups: list of lists of task numbers; None: all tasks are one group.

    Returns:
        A bool array `(T, T)`, symmetric, false on the diagonal.

    Raises:
        ValueError: if the groups are no lists of task numbers.
    """
    if groups is not None and not (
        is_list(groups)
        and all(is_list(g) and all(is_int(t, 0, tasks - 1) for t in g) for g in groups)
    ):
        what = f"None or lists of task numbers from 0 to {tasks - 1}"
        raise refusal("related", groups, "aggregate_similar_kernels", what)
    related = np.zeros((tasks, tasks), bool)
    for group in [range(tasks)] if groups is None else groups:
        related[np.ix_(list(group), list(group))] = True
    np.fill_diagonal(related, False)
    return related


def checked_weights(weights: Any, owner: str, alternative: str = "") -> np.ndarray:
    """The weights of tasks, one number or a matrix.

    Args:
        weights: what was given.
        owner: str, the class or function to name in the error.
        alternative: str, what else is allowed, for the error.

    Returns:
        A float64 array, `()` or `(T, T)`.

    Raises:
        ValueError: on numbers out of [0, 1], on `phi_ij + phi_ji` that is not 1.
    """
    expected = alternative + WEIGHTS
    try:
        matrix = finite_array("weights", weights, owner, (0, 2))
    except ValueError as error:
        raise refusal("weights", weights, owner, expected) from error
    in_range = bool(np.all((matrix >= 0) & (matrix <= 1)))
    if matrix.ndim == 2:
        square = matrix.shape[0] == matrix.shape[1]
        other = ~np.eye(len(matrix), dtype=bool)
        in_range &= square and np.allclose((matrix + matrix.T)[other], 1)
    if not in_range or not matrix.size or isinstance(weights, (bool, np.bool_)):
        raise refusal("weights", weights, owner, expected)
    return matrix


def stacked(kernels: Tensor) -> Tensor:
    """The kernels of T tasks as one array `(*window, in, out, T)`.

    Args:
        kernels: list of T arrays `(*window, in, out)`, or the stacked kernel itself.

    Raises:
        ValueError: if their shapes differ, so that they can't be compared; on values that
            are no real numbers, or not finite.
    """
    owner = "aggregate_similar_kernels"
    several = list(kernels) if isinstance(kernels, (list, tuple)) else [kernels]
    tensors = [real_tensor("kernels", kernel, owner) for kernel in several]
    shapes = [tuple(kernel.shape) for kernel in tensors]
    axes = 2 if isinstance(kernels, (list, tuple)) else 3
    if len(set(shapes)) != 1 or len(shapes[0]) < axes or 0 in shapes[0]:
        raise ValueError(
            f"{owner}: kernels can be compared only if they have one shape "
            "(*window, in, out), or are stacked to (*window, in, out, T). "
            f"Received: {shapes}."
        )
    if not isinstance(kernels, (list, tuple)):
        return tensors[0]
    return ops.stack(tensors, axis=-1)


def aggregate_similar_kernels(
    kernels: Tensor,
    threshold: float,
    weights: float | ArrayLike = 0.5,
    pairs: Pairing | None = None,
    related: Sequence[Sequence[int]] | None = None,
    kind: KernelKind = "slice",
) -> Tensor:
    """MTAL's aggregation of the kernels of T tasks (Eq. 3-6), once.

    `SimilarKernelConv2D` does the same in a network.

    Args:
        kernels: tensor `(*window, in, out, T)`; or list of T tensors `(*window, in, out)`.
        threshold: number; cosines from here on are similar. Above 1, none is.
        weights: number, `phi_ij` for all tasks, or array `(T, T)` with
            `phi_ij + phi_ji = 1`.
        pairs: `"all"`, every kernel of one task with every kernel of another; or `"index"`,
            kernels of equal index only. None: `"index"` for slices, `"all"` for filters.
        related: list of groups of task numbers, those that may share; None: all.
        kind: what a kernel is: `"slice"`, one input and one output channel; or `"filter"`,
            one output channel.

    Returns:
        A tensor `(*window, in, out, T)`.

    Raises:
        ValueError: on kernels of different shapes, on malformed arguments.

    Example:

    >>> import numpy as np
    >>> kernels = np.array([[1.0, 0.0], [0.8, 0.6]])[:, None, None]  # T = 2, two wide
    >>> kernels = [kernel.reshape(2, 1, 1) for kernel in kernels]
    >>> stacked = aggregate_similar_kernels(kernels, threshold=0.7)
    >>> np.round(np.asarray(stacked)[:, 0, 0, :], 2).tolist()
    [[0.9, 0.9], [0.3, 0.3]]
    """
    owner = "aggregate_similar_kernels"
    kernel = stacked(kernels)
    assert_true(
        ops.all(ops.isfinite(kernel)),
        f"{owner}: `kernels` must be finite. Received: NaN or infinite values.",
    )
    tasks = kernel.shape[-1]
    # Beyond all cosines any number is as good as another.
    threshold = check_number("threshold", threshold, owner, low=-math.inf)
    threshold = min(max(threshold, -2.0), 2.0)
    weights = checked_weights(weights, owner, "a number in [0, 1], or ")
    check_one_of("kind", kind, KINDS, owner)
    pairs = usual_pairs(kind) if pairs is None else pairs
    check_one_of("pairs", pairs, PAIRINGS, owner)
    if weights.ndim and len(weights) != tasks:
        what = f"a matrix for {tasks} tasks"
        raise refusal("weights", weights, owner, what)
    shape = compared_shape(tuple(kernel.shape), kind)
    rows = kernel_rows(ops.reshape(kernel, shape))
    compared = comparable(rows, tasks, pairs)
    selection = similar_pairs(compared, threshold, related_tasks(tasks, related))
    weights = ops.broadcast_to(ops.cast(weights, kernel.dtype), (tasks, tasks))
    return ops.reshape(aggregated(rows, shape, selection, weights), kernel.shape)
