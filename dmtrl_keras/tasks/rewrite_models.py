"""Models in which some layers with T kernels are others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from dmtrl_keras.ground.copying import copy_of, load_weights
from dmtrl_keras.ground.keras_private import sharing_scope
from dmtrl_keras.ground.tables import print_table
from dmtrl_keras.kernels.factorization import Factorization
from dmtrl_keras.tasks.copies import TaskCopies
from dmtrl_keras.tasks.stacked import factorizations_of
from dmtrl_keras.tasks.task_layer import TaskLayer


def with_layers(
    model: keras.Model,
    replace: Callable[[Any], TaskLayer | TaskCopies | None],
    owner: str,
    reports: Mapping[int, Sequence[Factorization]] | None = None,
) -> keras.Model:
    """A copy of a model in which some layers with T kernels are others.

    Args:
        model: a built functional or Sequential model.
        replace: function of a layer that returns another one with T kernels, unbuilt, which
            has a start of its own for them; or None, for an equal copy.
        owner: str, the function to name in the error.
        reports: dict from the id of a layer that is not replaced to what became of its
            kernels. It is read after all calls of `replace`.

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
    copies: list[tuple[Any, Any, bool]] = []

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        copy = replace(layer)
        replaced = copy is not None
        copy = copy if replaced else copy_of(layer)
        copies.append((copy, layer, replaced))
        return copy

    # A model of T tasks brings along what is not in its layers.
    like = getattr(model, "like", None)
    network = model if like is None else model.inference_network()
    with sharing_scope():
        new = keras.models.clone_model(network, clone_function=clone, recursive=True)
    for copy, layer, replaced in copies:
        if not isinstance(layer, keras.layers.Layer):
            continue
        if not replaced:
            load_weights(copy, layer.get_weights())
            if reports and id(layer) in reports:
                if isinstance(copy, TaskCopies):
                    copy.factorizations = list(reports[id(layer)])
                else:
                    (copy.factorization,) = reports[id(layer)]
            continue
        if isinstance(layer, TaskCopies):
            copy.take_from(layer)
            continue
        if layer.use_bias:
            copy.bias.assign(layer.bias)
        if layer.prior is not None:
            copy.prior.set_weights(layer.prior.get_weights())
    return new if like is None else like(new)


def factorization_report(model: keras.Model) -> list[Factorization]:
    """What `factorize` did to each layer of a model.

    Args:
        model: a model that `factorize` or `multitask` returned, also after it was saved
            and loaded.

    Returns:
        A list of `Factorization`, in the order of the layers. Those that `factorize` left
        with their kernels are in it; `declined` says how large their factors would be.

    Raises:
        ValueError: on what is no Keras model.
    """
    return factorizations_of(model, "factorization_report")


def print_report(model: keras.Model) -> None:
    """Print the report of `factorize` as a table, with the totals."""
    report = factorization_report(model)
    before = sum(entry.parameters_before for entry in report)
    after = sum(entry.parameters_after for entry in report)
    rows = [
        [
            entry.layer,
            entry.method,
            entry.shape,
            entry.rank or "-",
            f"{entry.parameters_before:,}",
            f"{entry.parameters_after:,}",
            times(entry.parameters_after, entry),
            f"{entry.error:.4f}",
        ]
        for entry in report
    ]
    ratio = f"{after / before:.3f}" if before else "-"
    rows.append(["Total", "", "", "", f"{before:,}", f"{after:,}", ratio, ""])
    columns = ["Layer", "Method", "Kernel", "Rank", "Before", "After", "Ratio", "Error"]
    kept = [
        f"{entry.layer} ({entry.declined:,}, {times(entry.declined, entry)} times as many)"
        for entry in report
        if entry.declined is not None
    ]
    note = f"Kept their kernels, since factors would have more weights: {', '.join(kept)}."
    print_table(
        f"Factorised: {model.name}",
        columns,
        rows,
        texts=4,
        totals=1,
        caption=note if kept else None,
    )


def times(parameters: int, entry: Factorization) -> str:
    """A number of parameters relative to the stacked kernel's, to three digits."""
    return f"{parameters / entry.parameters_before:.3f}"
