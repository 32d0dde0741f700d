"""From independent kernels to shared factors.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4: train the tasks independently, decompose each stacked
kernel, and train on from its factors.
"""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from dmtrl_keras.dmtrl import decomposition
from dmtrl_keras.dmtrl.decomposition import Rank, TaskRank, Threshold
from dmtrl_keras.dmtrl.factorized import FactorizedParameterization, Implementation
from dmtrl_keras.ground.validation import (
    check_bool,
    check_model,
    check_number,
    is_for,
    is_list,
    refusal,
    shown,
)
from dmtrl_keras.kernels import parameterization as parameterizations
from dmtrl_keras.kernels.factorization import Factorization, described
from dmtrl_keras.kernels.parameterization import Parameterization, warn_of_concerns
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.rewrite import started_layer, with_sharing
from dmtrl_keras.tasks.rewrite_models import print_report, with_layers
from dmtrl_keras.tasks.stacked import StackedKernel, kernels_in, stacked_kernels
from dmtrl_keras.tasks.task_layer import TaskLayer


def factorize(
    model: keras.Model,
    method: str,
    tolerance: float | None = None,
    rank: Rank | dict[str, Rank] | None = None,
    layers: Sequence[str] | Callable[[TaskLayer], bool] | None = None,
    implementation: Implementation = "auto",
    threshold: Threshold = "frobenius",
    verbose: bool = True,
    task_rank: TaskRank = None,
    keep_larger: bool = False,
    weights: float | None = None,
) -> keras.Model:
    """The same network with factorised kernels, started from trained ones.

    The stacked kernel of each layer is decomposed (LAF: Eq. 2, Tucker: Eq. 3-5, TT:
    Eq. 6-8 of DMTRL); its factors become the variables of a new layer. Biases, heads
    and all other layers are carried over with their weights. The given model is left as
    it was, and the new one is not compiled.

    A layer whose factors would have more weights than its kernels, as small layers may,
    keeps its kernels, whether a tolerance or a rank asked for them; the report says so.

    Args:
        model: a built functional or Sequential Keras model with layers of independent
            kernels, such as `TaskConv2D`; nested ones are factorised too.
        method: `"laf"`, `"tucker"`, `"tt"`, or a factorised parameterization's name.
        tolerance: number in (0, 1), the error that each kernel may have relative to its
            Frobenius norm. Without `tolerance` and `rank`: 0.1, as in the paper.
        rank: instead of the tolerance, int, float or tuple as in `TuckerDense`; or a
            dict of them by layer name, pattern, or the Keras class that one task would
            have, such as `"Conv2D"`, of which the first that fits holds (layers that none
            fits stay as they are). 0.25: each layer's factors have at most a quarter of
            its weights.
        layers: which layers, by name; or a function of a layer that returns a bool.
            None: every layer with independent kernels and more than one task.
        implementation: `"auto"`, `"compose"` or `"contract"`, as in `TuckerDense`.
        threshold: `"frobenius"` or `"singular_value"`, as in `TuckerDense`.
        verbose: bool, whether to print the table of `factorization_report`.
        task_rank: int or fraction of the tasks, the rank of their axis. None: full with
            `rank`, else the tolerance's.
        keep_larger: bool, whether layers get their factors also where these have more
            weights than the kernels.
        weights: instead of `rank` and `tolerance`: number in (0, 1], the share of the
            weights of all chosen kernels that the factors may have together. All layers
            have the same tolerance, the smallest that meets it, so that each is
            approximated as well as the others, whatever its size.

    Returns:
        A new model of the same kind, layer names and input and output structure. Where no
        layer is left to have factors, it is an equal copy, with a `UserWarning`.

    Raises:
        ValueError: if the method is not a factorisation, a named layer is missing or
            has no independent kernels, nothing is left to factorise, or rank or
            tolerance are impossible.

    Example:

    >>> import keras
    >>> from dmtrl_keras import factorize, layers
    >>> inputs = keras.Input((8,))
    >>> hidden = layers.TaskDense(16, tasks=4, shared_input=True, name="fc")(inputs)
    >>> model = keras.Model(inputs, hidden)
    >>> factorize(model, "tucker", rank=2, verbose=False).get_layer("fc").rank
    (2, 2, 4)
    """
    owner = "factorize"
    check_model(model, owner)
    check_bool("verbose", verbose, owner)
    check_bool("keep_larger", keep_larger, owner)
    if layers is not None and not (callable(layers) or is_list(layers)):
        what = "a list of names of layers, a function of a layer, or None"
        raise refusal("layers", layers, owner, what)
    if is_list(layers) and not all(isinstance(name, str) for name in layers):
        raise refusal("layers", layers, owner, "names of layers")
    ranks = rank if isinstance(rank, dict) else None
    known = isinstance(method, str) and method.lower() in parameterizations.names()
    kind = type(parameterizations.get(method)) if known else None
    if kind is None or not issubclass(kind, FactorizedParameterization):
        what = "a factorisation such as 'laf', 'tucker' or 'tt'"
        raise refusal("method", method, owner, what)
    if ranks is not None and layers is None:
        layers = _those_of(ranks, model)
    chosen = _chosen(model, layers)
    declined: dict[int, list[Factorization]] = {}
    budgeted: dict[int, Rank] = {}
    if weights is not None:
        if rank is not None or tolerance is not None or keep_larger:
            raise ValueError(
                "factorize: give one of `weights`, `rank` and `tolerance`; a budget leaves "
                f"no room for larger factors. Received: weights={shown(weights)}, "
                f"rank={shown(rank)}, tolerance={tolerance}, keep_larger={keep_larger}."
            )
        budgeted = _budgeted(kind, model, chosen, weights, threshold, task_rank)

    def made_of_factors(one: StackedKernel) -> _Factors:
        own: Any = rank if ranks is None else _of_layer(ranks, one)
        if weights is not None:
            own = budgeted[id(one.stacked)]
        if ranks is not None and own is None:
            raise ValueError(
                f"factorize: `rank` has nothing for layer {one.layer.name!r}, which "
                f"`layers` names. Received: rank={ranks!r}."
            )
        options = {"implementation": implementation, "threshold": threshold}
        # The ranks of a budget have that of the tasks.
        last = None if weights is not None else task_rank
        sharing = kind.of_trained(own, tolerance, last, **options)
        kernel, factors = _decomposed(one, sharing)
        size = sum(value.size for value in factors.values())
        if size > kernel.size and not keep_larger:
            report = _kept(one, kernel, size)
            declined.setdefault(id(one.layer), []).append(report)
            return _Factors(one.sharing, kernel, {"kernel": kernel}, report)
        return _Factors(sharing, kernel, factors)

    def factorized(layer: TaskLayer | TaskCopies) -> TaskLayer | TaskCopies | None:
        if id(layer) not in chosen:
            return None
        found = [made_of_factors(one) for one in kernels_in(layer)]
        if all(one.declined is not None for one in found):
            return None
        if isinstance(layer, TaskCopies):
            return _copies(layer, found)
        sharing, kernel, factors, _ = found[0]
        return started_layer(
            lambda other: with_sharing(layer, other), sharing, kernel, factors
        )

    new = with_layers(model, factorized, "factorize", declined)
    kept = [entry for entries in declined.values() for entry in entries]
    if len(kept) == sum(len(kernels_in(layer)) for layer in chosen.values()):
        sizes = "; ".join(
            f"{entry.layer} {entry.declined} instead of {entry.parameters_before}"
            for entry in kept
        )
        warnings.warn(
            f"{owner}: the model {model.name!r} is returned as it was, since the factors "
            f"of each layer would have more weights than its kernels: {sizes}. Received: "
            f"rank={rank!r}, tolerance={tolerance!r}, task_rank={task_rank!r}, "
            f"weights={weights!r}. Expected: a smaller rank, a larger tolerance, or "
            "keep_larger=True for larger factors.",
            stacklevel=2,
        )
    if verbose:
        print_report(new)
    return new


class _Factors(NamedTuple):
    """What a stacked kernel is to become.

    Attributes:
        sharing: the parameterization.
        kernel: float64 array, the stacked kernel.
        factors: dict of arrays.
        declined: the report of one that keeps its kernels; None of the others.
    """

    sharing: Parameterization
    kernel: np.ndarray
    factors: dict[str, np.ndarray]
    declined: Factorization | None = None


def _copies(layer: TaskCopies, found: Sequence[_Factors]) -> TaskCopies:
    """Copies of which some kernels are made of factors."""
    sharings, reports = [], []
    for one, given in zip(kernels_in(layer), found):
        sharing, report = given.sharing, given.declined
        if report is None:
            sharing, report = described(given.sharing, given.kernel, given.factors)
            warn_of_concerns(given.sharing, given.factors, given.kernel.shape, one.name)
            assert report is not None
            report = dataclasses.replace(report, layer=one.name)
        sharings.append(sharing)
        reports.append(report)
    return layer.with_sharing(sharings, [one.factors for one in found], reports)


def _budgeted(
    kind: type[FactorizedParameterization],
    model: keras.Model,
    chosen: Collection[int],
    weights: float,
    threshold: Threshold,
    task_rank: TaskRank,
) -> dict[int, Rank]:
    """By the ids of stacked kernels, the ranks with which all factors meet a budget."""
    check_number("weights", weights, "factorize", 1, closed=True)
    kind(tolerance=0.5, threshold=threshold, task_rank=task_rank)
    rule = kind._rule
    if rule is None:
        what = "one of LAF, Tucker and TT, with `weights`"
        raise refusal("method", kind.name, "factorize", what)
    every = stacked_kernels(model, "factorize")
    mine = [one for one in every if id(one.layer) in chosen]
    _, ranks = decomposition.common_tolerance(
        rule, list(map(_kernel, mine)), weights, threshold, task_rank, "factorize"
    )
    return dict(zip((id(one.stacked) for one in mine), ranks))


def _kernel(one: StackedKernel) -> np.ndarray:
    return keras.ops.convert_to_numpy(one.kernel).astype("float64")


def _of_layer(ranks: dict[str, Rank], one: StackedKernel) -> Rank | None:
    """What a dict has for the layer of a kernel, or None."""
    name, kind = one.layer.name, one.kind
    return next((own for key, own in ranks.items() if is_for(key, name, kind)), None)


def _those_of(ranks: dict[str, Rank], model: keras.Model) -> list[str]:
    """Names of the layers that the keys of a dict are for; unknown keys as they are."""
    kinds = {one.layer.name: one.kind for one in _candidates(model)}
    fitting = {
        key: [name for name, kind in kinds.items() if is_for(key, name, kind)]
        for key in ranks
    }
    return [name for key, names in fitting.items() for name in names or [key]]


def _candidates(model: keras.Model) -> list[StackedKernel]:
    """The independent kernels of a model, of layers in which all are."""
    found = stacked_kernels(model, "factorize")
    others = {id(one.layer) for one in found if not one.sharing.is_stacked_kernel}
    return [one for one in found if id(one.layer) not in others]


def _chosen(
    model: keras.Model, layers: Sequence[str] | Callable[[Any], bool] | None
) -> dict[int, Any]:
    """The layers to factorise, by their ids."""
    candidates = {id(one.layer): one.layer for one in _candidates(model)}
    names = {layer.name for layer in candidates.values()}
    if layers is None:
        wanted: Callable[[Any], bool] = _has_several_tasks
    elif callable(layers):
        wanted = layers
    else:
        unknown = [name for name in layers if name not in names]
        if unknown:
            raise ValueError(
                f"factorize: received the names {unknown}, expected those of built layers "
                f"with independent kernels of model {model.name!r}: {sorted(names)}."
            )
        wanted = _named(set(layers))
    chosen = {key: layer for key, layer in candidates.items() if wanted(layer)}
    if not chosen:
        raise ValueError(
            f"factorize: model {model.name!r} has no layer to factorise: expected some of "
            f"{[layer.name for layer in candidates.values()]}, the built layers with "
            f"independent kernels. Received: layers={shown(layers)}."
        )
    return chosen


def _has_several_tasks(layer: Any) -> bool:
    return layer.tasks > 1


def _named(names: Collection[str]) -> Callable[[Any], bool]:
    return lambda layer: layer.name in names


def _decomposed(
    one: StackedKernel, sharing: Parameterization
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A stacked kernel in float64, and its factors."""
    kernel = _kernel(one)
    try:
        return kernel, sharing.decompose(kernel)
    except ValueError as error:
        kind = type(one.layer).__name__
        raise ValueError(
            f"{kind} {one.name!r}, stacked kernel {kernel.shape}: {error}"
        ) from error


def _kept(one: StackedKernel, kernel: np.ndarray, size: int) -> Factorization:
    """The report of a kernel that stays, whose factors have `size` entries."""
    return Factorization(
        layer=one.name,
        method=one.sharing.name,
        shape=tuple(kernel.shape),
        rank=(),
        parameters_before=int(kernel.size),
        parameters_after=int(kernel.size),
        error=0.0,
        declined=int(size),
    )
