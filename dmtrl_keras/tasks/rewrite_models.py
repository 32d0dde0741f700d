"""Models in which some layers with T kernels are others."""

import dataclasses

import keras
import numpy as np

from dmtrl_keras.ground.backend import sharing_scope
from dmtrl_keras.ground.tables import print_table
from dmtrl_keras.tasks.rewrite import with_sharing
from dmtrl_keras.tasks.task_layer import task_layers


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
    report = factorization_report(model)
    before = sum(entry.parameters_before for entry in report)
    after = sum(entry.parameters_after for entry in report)
    rows = [
        [
            entry.layer,
            entry.method,
            entry.shape,
            entry.rank,
            f"{entry.parameters_before:,}",
            f"{entry.parameters_after:,}",
            f"{entry.parameters_after / entry.parameters_before:.3f}",
            f"{entry.error:.4f}",
        ]
        for entry in report
    ]
    ratio = f"{after / before:.3f}" if before else "-"
    rows.append(["Total", "", "", "", f"{before:,}", f"{after:,}", ratio, ""])
    columns = ["Layer", "Method", "Kernel", "Rank", "Before", "After", "Ratio", "Error"]
    print_table(f"Factorised: {model.name}", columns, rows, texts=4, totals=1)
