"""From independent kernels to shared factors.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4: train the tasks independently, decompose each stacked
kernel, and train on from its factors.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

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
from dmtrl_keras.kernels.factorization import Factorization
from dmtrl_keras.kernels.parameterization import Parameterization
from dmtrl_keras.tasks.rewrite import started_layer, with_sharing
from dmtrl_keras.tasks.rewrite_models import print_report, with_layers
from dmtrl_keras.tasks.task_layer import TaskLayer, task_layers


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
    declined: dict[int, Factorization] = {}
    budgeted: dict[int, Rank] = {}
    if weights is not None:
        if rank is not None or tolerance is not None or keep_larger:
            raise ValueError(
                "factorize: give one of `weights`, `rank` and `tolerance`; a budget leaves "
                f"no room for larger factors. Received: weights={shown(weights)}, "
                f"rank={shown(rank)}, tolerance={tolerance}, keep_larger={keep_larger}."
            )
        budgeted = _budgeted(kind, model, chosen, weights, threshold, task_rank)

    def factorized(layer: TaskLayer) -> TaskLayer | None:
        if id(layer) not in chosen:
            return None
        own: Any = rank if ranks is None else _of_layer(ranks, layer)
        if weights is not None:
            own = budgeted[id(layer)]
        if ranks is not None and own is None:
            raise ValueError(
                f"factorize: `rank` has nothing for layer {layer.name!r}, which `layers` "
                f"names. Received: rank={ranks!r}."
            )
        options = {"implementation": implementation, "threshold": threshold}
        # The ranks of a budget have that of the tasks.
        last = None if weights is not None else task_rank
        sharing = kind.of_trained(own, tolerance, last, **options)
        kernel, factors = _decomposed(layer, sharing)
        size = sum(value.size for value in factors.values())
        if size > kernel.size and not keep_larger:
            declined[id(layer)] = _kept(layer, kernel, size)
            return None
        return started_layer(
            lambda other: with_sharing(layer, other), sharing, kernel, factors
        )

    new = with_layers(model, factorized, "factorize", declined)
    if len(declined) == len(chosen):
        sizes = "; ".join(
            f"{entry.layer} {entry.declined} instead of {entry.parameters_before}"
            for entry in declined.values()
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


def _budgeted(
    kind: type[FactorizedParameterization],
    model: keras.Model,
    chosen: Collection[int],
    weights: float,
    threshold: Threshold,
    task_rank: TaskRank,
) -> dict[int, Rank]:
    """By the ids of layers, the ranks with which all factors meet a budget."""
    check_number("weights", weights, "factorize", 1, closed=True)
    kind(tolerance=0.5, threshold=threshold, task_rank=task_rank)
    rule = kind._rule
    if rule is None:
        what = "one of LAF, Tucker and TT, with `weights`"
        raise refusal("method", kind.name, "factorize", what)
    layers = [layer for layer in task_layers(model) if id(layer) in chosen]
    kernels = [_kernel(layer) for layer in layers]
    _, ranks = decomposition.common_tolerance(
        rule, kernels, weights, threshold, task_rank, "factorize"
    )
    return dict(zip(map(id, layers), ranks))


def _kernel(layer: TaskLayer) -> np.ndarray:
    return keras.ops.convert_to_numpy(layer.kernel).astype("float64")


def _of_layer(ranks: dict[str, Rank], layer: TaskLayer) -> Rank | None:
    """What a dict has for a layer, or None."""
    name, kind = layer.name, _kind(layer)
    return next((own for key, own in ranks.items() if is_for(key, name, kind)), None)


def _kind(layer: TaskLayer) -> str:
    return type(layer.task_twin()).__name__


def _those_of(ranks: dict[str, Rank], model: keras.Model) -> list[str]:
    """Names of the layers that the keys of a dict are for; unknown keys as they are."""
    candidates = [layer for layer in task_layers(model) if layer.sharing.is_stacked_kernel]
    fitting = {
        key: [layer.name for layer in candidates if is_for(key, layer.name, _kind(layer))]
        for key in ranks
    }
    return [name for key, names in fitting.items() for name in names or [key]]


def _chosen(
    model: keras.Model, layers: Sequence[str] | Callable[[TaskLayer], bool] | None
) -> set[int]:
    """Ids of the layers to factorise."""
    candidates = [
        layer
        for layer in task_layers(model)
        if layer.sharing.is_stacked_kernel and layer.built
    ]
    if layers is None:
        wanted: Callable[[TaskLayer], bool] = _has_several_tasks
    elif callable(layers):
        wanted = layers
    else:
        names = {layer.name for layer in candidates}
        unknown = [name for name in layers if name not in names]
        if unknown:
            raise ValueError(
                f"factorize: received the names {unknown}, expected those of built layers "
                f"with independent kernels of model {model.name!r}: {sorted(names)}."
            )
        wanted = _named(set(layers))
    chosen = {id(layer) for layer in candidates if wanted(layer)}
    if not chosen:
        raise ValueError(
            f"factorize: model {model.name!r} has no layer to factorise: expected some of "
            f"{[layer.name for layer in candidates]}, the built layers with independent "
            f"kernels. Received: layers={shown(layers)}."
        )
    return chosen


def _has_several_tasks(layer: TaskLayer) -> bool:
    return layer.tasks > 1


def _named(names: Collection[str]) -> Callable[[TaskLayer], bool]:
    return lambda layer: layer.name in names


def _decomposed(
    layer: TaskLayer, sharing: Parameterization
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The stacked kernel of a layer in float64, and its factors."""
    kernel = _kernel(layer)
    try:
        return kernel, sharing.decompose(kernel)
    except ValueError as error:
        raise ValueError(
            f"{type(layer).__name__} {layer.name!r}, stacked kernel {kernel.shape}: {error}"
        ) from error


def _kept(layer: TaskLayer, kernel: np.ndarray, size: int) -> Factorization:
    """The report of a layer that keeps its kernels, whose factors have `size` entries."""
    return Factorization(
        layer=layer.name,
        method=layer.sharing.name,
        shape=tuple(kernel.shape),
        rank=(),
        parameters_before=int(kernel.size),
        parameters_after=int(kernel.size),
        error=0.0,
        declined=int(size),
    )
