"""The report of one network: what its layers share, and what it learned of its tasks."""

import numpy as np
import plotly.graph_objects as go

from dmtrl_keras import (
    chance_of_sharing,
    kernel_sharing_ratio,
    sharing_strength,
    task_layers,
    task_summary,
)
from dmtrl_keras.conversion.summary import short_number, short_shape
from dmtrl_keras.ground.validation import refusal
from dmtrl_keras.monitoring.relations import learned_of
from dmtrl_keras.parameterizations import FactorizedParameterization, SimilarKernels

from .page import Page, heat_map, labels, ticks

# Larger matrices, such as those of all features, are no figures any more.
MOST_DRAWN = 128
# Of so many the variances are in a line of text.
_MOST_LISTED = 30


def network_page(model):
    """The report of a network.

    Args:
        model: a built Keras model.

    Returns:
        A `Page`.

    Raises:
        ValueError: if the model is not built.
    """
    if not model.built:
        raise refusal("what", model, "report", "a model that is built")
    page = Page(f"What the tasks of {model.name} share")
    parts = [_layers, _strengths, _similar_kernels, _learned]
    # All of them, each adds its own.
    if not any([part(page, model) for part in parts]):
        page.text(
            "There is nothing to report: no layer of this network has kernels of several "
            "tasks, and none says how tasks are related."
        )
    return page


def _layers(page, model):
    """The layers: what they share and cost."""
    try:
        summary = task_summary(model, verbose=False)
    except ValueError as error:
        # Such as a subclassed model, whose calls are not known.
        page.text(f"There is no table of its layers. {error}")
        return False
    rows = {
        number: [
            (row.layer, row.layer),
            (row.kind, row.kind),
            _plain(short_shape(row.output_shape)),
            _plain(row.sharing),
            _plain("-" if row.rank is None else " ".join(map(str, row.rank))),
            (f"{row.parameters:,}", row.parameters),
            (f"{row.parameters_if_independent:,}", row.parameters_if_independent),
            (short_number(row.flops), row.flops),
        ]
        for number, row in enumerate(summary)
    }
    own = sum(row.parameters for row in summary)
    separate = sum(row.parameters_if_independent for row in summary)
    names = getattr(model, "task_names", None)
    text = f"{own:,} weights, where a network for each task would have {separate:,} in all."
    if names:
        text = f"{len(names)} tasks: {', '.join(names)}. {text}"
    page.text(text, answer=True)
    page.heading("Layers")
    header = "Layer,Kind,Output,Sharing,Rank,Weights,If separate,FLOPs".split(",")
    page.table("layers", header, rows)
    page.text(
        "Sharing: how the kernels of the tasks come to be; hard: one for all tasks; "
        "independent: one for each; in parentheses the only task that has the layer."
    )
    return bool(rows)


def _plain(text):
    return text, text


def _strengths(page, model):
    """Sharing strength by layer, with what independent kernels have."""
    layers = {layer.name: layer for layer in task_layers(model) if layer.tasks > 1}
    if not layers:
        return False
    strengths = sharing_strength(model)
    factorized = {
        name
        for name, layer in layers.items()
        if isinstance(layer.sharing, FactorizedParameterization)
    }
    # What is assigned by definition has no chance; there may be nothing to be drawn.
    chance = [{}, {}]
    if factorized:
        chance = [chance_of_sharing(model), chance_of_sharing(model, quantile=0.95)]
    rows = {}
    for name, strength in strengths.items():
        by_chance = [own[name] if name in factorized else None for own in chance]
        rows[name] = [
            _plain(name),
            _plain(layers[name].sharing.name),
            (f"{strength:.3f}", strength),
            *(("-" if v is None else f"{v:.3f}", v) for v in by_chance),
        ]
    page.heading("Sharing strength")
    page.table("strengths", ["Layer", "Sharing", "Strength", "Chance", "95%"], rows)
    page.text(
        "The mean cosine of the tasks' columns of the task matrix (DMTRL Eq. 9): 0 of "
        "independent kernels, 1 of one kernel for all. Chance is what independent kernels "
        "have when they are factorised with these ranks; 95% of them are below the last "
        "column: only what is above it says that tasks share."
    )
    if factorized:
        page.figure("strength", strength_figure(rows))
    return True


def strength_figure(rows):
    """Sharing strength by layer, and the range that chance explains."""
    figure, names = go.Figure(), labels(rows)
    columns = ((2, "strength"), (3, "chance, mean"), (4, "95% of chance"))
    for column, name in columns:
        figure.add_scatter(
            x=names,
            y=[cells[column][1] for cells in rows.values()],
            name=name,
            mode="lines+markers" if column == 2 else "markers",
            marker={
                "size": 9 if column == 2 else 16,
                "symbol": "circle" if column == 2 else "line-ew-open",
                "line": {"width": 2},
            },
        )
    figure.update_xaxes(**ticks(names))
    figure.update_yaxes(title="sharing strength", range=[-0.03, 1.03])
    return figure.update_layout(height=360)


def _similar_kernels(page, model):
    """How many kernels are similar, by layer."""
    if not any(isinstance(one.sharing, SimilarKernels) for one in task_layers(model)):
        return False
    rows = {
        number: [
            _plain(row.layer),
            (f"{row.pairs:,}", row.pairs),
            *((f"{v:.1%}", v) for v in (row.pair_ratio, row.chance)),
            (f"{row.kernels:,}", row.kernels),
            *((f"{v:.1%}", v) for v in (row.ratio, row.saved)),
        ]
        for number, row in enumerate(kernel_sharing_ratio(model, verbose=False))
    }
    page.heading("Similar kernels")
    header = ["Layer", "Pairs", "Similar", "Chance", "Kernels", "Shared", "Saved"]
    page.table("similar", header, rows)
    page.text(
        "Similar: the share of the compared pairs of kernels that are aggregated (MTAL Eq. "
        "3, 4), beside that of random kernels; shared: the share of kernels that have a "
        "similar one; saved: the weights that merge_similar_kernels needs not store."
    )
    return True


def _learned(page, model):
    """A heat map of each matrix that was learned."""
    found = learned_of(model)
    if found:
        page.heading("What was learned of the tasks")
    for number, one in enumerate(found):
        page.heading(one.title, 3)
        size = len(one.names)
        if size > MOST_DRAWN:
            page.text(f"{size} x {size} numbers, too many to draw.")
            continue
        limit = max(1.0, float(np.nanmax(np.abs(one.matrix))))
        low = 0.0 if one.shares else None
        page.figure(
            f"learned-{number}", heat_map(one.matrix, one.names, one.names, limit, low)
        )
        if one.variances is not None and size <= _MOST_LISTED:
            own = (f"{n} {v:.3g}" for n, v in zip(one.names, one.variances))
            page.text(f"Variances: {', '.join(own)}.")
    return bool(found)
