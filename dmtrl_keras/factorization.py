"""From independent kernels to shared factors.

Yang & Hospedales, "Deep Multi-task Representation Learning: A Tensor Factorisation
Approach" (ICLR 2017), section 4: train the tasks independently, decompose each stacked
kernel, and train on from its factors.
"""

import dataclasses

import keras
import numpy as np

from dmtrl_keras import parameterizations
from dmtrl_keras.backend import sharing_scope
from dmtrl_keras.layers.base import task_layers
from dmtrl_keras.layers.named import with_sharing
from dmtrl_keras.parameterizations import FactorizedParameterization


@dataclasses.dataclass(frozen=True)
class Factorization:
    """What became of one layer's stacked kernel.

    Attributes:
        layer: str, name of the layer.
        method: str, name of the parameterization.
        shape: tuple, the stacked kernel's shape.
        rank: tuple of ints.
        parameters_before: int, entries of the stacked kernel.
        parameters_after: int, entries of the factors.
        error: float, `||W - W'||_F / ||W||_F`.
    """

    layer: str
    method: str
    shape: tuple
    rank: tuple
    parameters_before: int
    parameters_after: int
    error: float


def factorize(
    model,
    method,
    tolerance=None,
    rank=None,
    layers=None,
    implementation="auto",
    threshold="frobenius",
    verbose=True,
):
    """The same network with factorised kernels, started from trained ones.

    The stacked kernel of each layer is decomposed (LAF: Eq. 2, Tucker: Eq. 3-5, TT:
    Eq. 6-8 of DMTRL); its factors become the variables of a new layer. Biases, heads
    and all other layers are carried over with their weights. The given model is left as
    it was, and the new one is not compiled.

    Args:
        model: a built functional or Sequential Keras model with layers of independent
            kernels, such as `TaskConv2D`; nested ones are factorised too.
        method: `"laf"`, `"tucker"`, `"tt"`, or a factorised parameterization's name.
        tolerance: number in (0, 1), the error that each kernel may have relative to its
            Frobenius norm. Without `tolerance` and `rank`: 0.1, as in the paper.
        rank: instead of the tolerance, int, float or tuple as in `TuckerDense`; or a
            dict of them by layer name (layers that it lacks stay as they are).
        layers: which layers, by name; or a function of a layer that returns a bool.
            None: every layer with independent kernels and more than one task.
        implementation: `"auto"`, `"compose"` or `"contract"`, as in `TuckerDense`.
        threshold: `"frobenius"` or `"singular_value"`, as in `TuckerDense`.
        verbose: bool, whether to print the table of `factorization_report`.

    Returns:
        A new model of the same kind, layer names and input and output structure.

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
    (2, 2, 2)
    """
    if tolerance is None and rank is None:
        tolerance = 0.1
    ranks = rank if isinstance(rank, dict) else None
    kind = type(parameterizations.get(method))
    if not issubclass(kind, FactorizedParameterization):
        raise ValueError(
            "`method` must be a factorisation such as 'laf', 'tucker' or 'tt'. "
            f"Received: method={method!r}."
        )
    if ranks is not None and layers is None:
        layers = list(ranks)
    chosen = _chosen(model, layers)

    def factorized(layer):
        if id(layer) not in chosen:
            return None
        own = rank if ranks is None else ranks[layer.name]
        return _factorized(layer, kind(own, tolerance, implementation, threshold))

    new = with_layers(model, factorized, "factorize")
    if verbose:
        print_report(new)
    return new


def with_layers(model, replace, owner):
    """A copy of a model in which some layers with T kernels are others.

    Args:
        model: a built functional or Sequential model.
        replace: function of a layer that returns another one with T kernels, unbuilt, which
            has a start of its own for them; or None, for an equal copy.
        owner: str, the function to name in the error.

    Returns:
        The new model. Layers that aren't replaced have their weights, the others their
        biases and the state of their priors.

    Raises:
        ValueError: if the layers of such a model can't be replaced.
    """
    if not isinstance(model, keras.Sequential) and not hasattr(model, "operations"):
        raise ValueError(
            f"`{owner}` needs a functional or Sequential model, whose layers can be "
            f"replaced. Received: {type(model).__name__} {model.name!r}."
        )
    copies = []

    def clone(layer):
        copy = replace(layer)
        replaced = copy is not None
        copy = copy if replaced else type(layer).from_config(layer.get_config())
        copies.append((copy, layer, replaced))
        return copy

    with sharing_scope():
        new = keras.models.clone_model(model, clone_function=clone, recursive=True)
    for copy, layer, replaced in copies:
        if not replaced:
            copy.set_weights(layer.get_weights())
            continue
        if layer.use_bias:
            copy.bias.assign(layer.bias)
        if layer.prior is not None:
            copy.prior.set_weights(layer.prior.get_weights())
    return new


def _chosen(model, layers):
    """Ids of the layers to factorise."""
    candidates = [
        layer
        for layer in task_layers(model)
        if layer.sharing.is_stacked_kernel and layer.built
    ]
    if layers is None:
        chosen = [layer for layer in candidates if layer.tasks > 1]
    elif callable(layers):
        chosen = [layer for layer in candidates if layers(layer)]
    else:
        by_name = {layer.name: layer for layer in candidates}
        unknown = [name for name in layers if name not in by_name]
        if unknown:
            raise ValueError(
                f"Model {model.name!r} has no built layers with independent kernels "
                f"named {unknown}. It has: {sorted(by_name)}."
            )
        chosen = [by_name[name] for name in layers]
    if not chosen:
        raise ValueError(
            f"Model {model.name!r} has no layer to factorise. Layers with independent "
            f"kernels: {[layer.name for layer in candidates]}."
        )
    return {id(layer) for layer in chosen}


def _factorized(layer, sharing):
    """An unbuilt factorised copy of a layer."""
    kernel = keras.ops.convert_to_numpy(layer.kernel).astype("float64")
    try:
        values = sharing.decompose(kernel)
    except ValueError as error:
        raise ValueError(
            f"{type(layer).__name__} {layer.name!r}, stacked kernel {kernel.shape}: {error}"
        ) from error
    return with_factors(layer, sharing, kernel, values)


def with_factors(layer, sharing, kernel, factors):
    """An unbuilt copy of a layer that starts from factors.

    Args:
        layer: a layer with T kernels.
        sharing: the parameterization that made the factors.
        kernel: float64 array, the stacked kernel that they stand for.
        factors: dict of arrays.

    Returns:
        The layer; its `factorization` says what became of the kernel, None without ranks.
    """
    rank = sharing.rank({name: value.shape for name, value in factors.items()})
    report = None
    if rank is not None:
        sharing = sharing.with_rank(rank)
        tensors = {n: keras.ops.convert_to_tensor(v) for n, v in factors.items()}
        composed = keras.ops.convert_to_numpy(sharing.compose(tensors, layer.tasks))
        norm = np.linalg.norm(kernel)
        error = np.linalg.norm(np.moveaxis(composed, 0, -1) - kernel)
        report = Factorization(
            layer=layer.name,
            method=sharing.name,
            shape=kernel.shape,
            rank=rank,
            parameters_before=kernel.size,
            parameters_after=sum(value.size for value in factors.values()),
            error=float(error / norm) if norm else 0.0,
        )
    new = with_sharing(layer, sharing)
    new.start_from(factors)
    new.factorization = report
    return new


def factorization_report(model):
    """What `factorize` did to each layer of a model.

    Args:
        model: a model that `factorize` returned. A model that was saved and loaded again
            has factorised layers, but no longer knows their errors.

    Returns:
        A list of `Factorization`, in the order of the layers.
    """
    return [
        layer.factorization
        for layer in task_layers(model)
        if getattr(layer, "factorization", None) is not None
    ]


def print_report(model):
    """Print the report of `factorize` as a table, with the totals."""
    # Keras itself depends on rich, for `model.summary()`.
    from rich.table import Table

    report = factorization_report(model)
    table = Table(title=f"Factorised: {model.name}")
    table.add_column("Layer", overflow="fold", min_width=30)
    for column in ("Method", "Kernel", "Rank"):
        table.add_column(column)
    for column in ("Before", "After", "Ratio", "Error"):
        table.add_column(column, justify="right")
    before = sum(entry.parameters_before for entry in report)
    after = sum(entry.parameters_after for entry in report)
    for entry in report:
        table.add_row(
            entry.layer,
            entry.method,
            str(entry.shape),
            str(entry.rank),
            f"{entry.parameters_before:,}",
            f"{entry.parameters_after:,}",
            f"{entry.parameters_after / entry.parameters_before:.3f}",
            f"{entry.error:.4f}",
        )
    ratio = f"{after / before:.3f}" if before else "-"
    table.add_row("Total", "", "", "", f"{before:,}", f"{after:,}", ratio, "")
    print_table(table)


def print_table(table):
    """Print a table of `rich`, in full where the output is no terminal."""
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
