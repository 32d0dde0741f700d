"""`report`: of a comparison or of a network, a page with tables and figures."""

import json

import keras
import numpy as np
import plotly.colors
import plotly.graph_objects as go

from dmtrl_keras.ground.validation import check_path, refusal

from ..oracles import pareto_front
from .compared import Comparison
from .network_report import network_page
from .page import Page, heat_map, height_with_legend, labels


def report(what, path=None):
    """A report of a comparison or of a network; it shows itself in notebooks.

    Args:
        what: a `Comparison`, or a built Keras model.
        path: path of the HTML file to write; None: none.

    Returns:
        A `Page`.
    """
    check_path("path", path, "report")
    if isinstance(what, Comparison):
        page = comparison_page(what)
    elif isinstance(what, keras.Model):
        page = network_page(what)
    else:
        expected = "a Comparison, as `compare` returns, or a Keras model"
        raise refusal("what", what, "report", expected)
    if path is not None:
        page.write(path)
    return page


def methods_page(c):
    """The sentence and the table of methods alone."""
    page = Page("Which method for these tasks")
    page.text(c.sentence, answer=True)
    page.table("methods", *methods_rows(c), chosen=c.recommendation.method)
    page.text(_how(c))
    return page


def comparison_page(c):
    """All that a comparison says."""
    page = methods_page(c)
    if c.left_out:
        page.heading("Left out")
        page.items(f"{name}: {reason}" for name, reason in c.left_out.items())
    if len(c.curve):
        page.heading("Where sharing begins to pay")
        page.figure("curve", curve_figure(c), height_with_legend(len(c.table)))
        page.table("fractions", *curve_rows(c))
    page.heading("Error and size")
    page.figure("size", size_figure(c), height_with_legend(len(c.table) + 1))
    if len(c.table) > 1:
        page.heading("Which tasks gain, and which lose")
        page.text("By how many per cent an error is below the baseline's.")
        page.figure("gains", gain_figure(c))
    page.heading("Errors by task")
    page.table("tasks", *task_rows(c), chosen=c.recommendation.method)
    if c.relations:
        page.heading("What was learned of the tasks")
        for method, (title, matrix) in c.relations.items():
            page.heading(f"{c.table.loc[method].title}: {title}", 3)
            limit = max(1.0, float(np.abs(matrix).max()))
            figure = heat_map(matrix, c.tasks, c.tasks, limit)
            page.figure(f"relations-{method}", figure)
    return page


def methods_rows(c):
    """`(header, rows)` of the table of methods; a cell is `(text, value)`."""
    header = [
        "Method",
        "Mean error",
        "Against " + c.table.loc[c.baseline].title,
        "95%",
        "p",
    ]
    header += ["Weights", "Seconds", *COSTS]
    rows = {}
    for name, row in c.table.iterrows():
        spread = "" if np.isnan(row.spread) else f" ± {row.spread:.4f}"
        base = name == c.baseline
        rows[name] = [
            (row.title, row.title),
            (f"{row.error:.4f}{spread}", row.error),
            ("-" if base else f"{row.delta:+.1f}%", None if base else row.delta),
            (
                "-" if base else f"{row.low:+.1f} to {row.high:+.1f}",
                None if base else row.low,
            ),
            ("-" if base else _p(row.p), None if base else row.p),
            (f"{int(row.weights):,}", int(row.weights)),
            (f"{row.seconds:.1f}", row.seconds),
            *(_cost(row[column], text) for column, text in COSTS.values()),
        ]
    return header, rows


# Columns that only the report has room for.
COSTS = {
    "MFLOP": ("flops", lambda value: f"{value / 1e6:.3g}"),
    "ms a step": ("step_ms", "{:.2f}".format),
    "ms a prediction": ("predict_ms", "{:.2f}".format),
}


def _cost(value, text):
    return ("-", None) if np.isnan(value) else (text(value), value)


def _p(value):
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def curve_rows(c):
    """`(header, rows)` of the learning curve."""
    rows = {}
    for number, row in c.curve.iterrows():
        base = row.method == c.baseline
        title = c.table.loc[row.method].title
        rows[number] = [
            (f"{row.fraction:.0%}", row.fraction),
            (title, title),
            (f"{row.error:.4f}", row.error),
            ("-" if base else f"{row.delta:+.1f}%", None if base else row.delta),
            (
                "-" if base else f"{row.low:+.1f} to {row.high:+.1f}",
                None if base else row.low,
            ),
        ]
    against = "Against " + c.table.loc[c.baseline].title
    return ["Trained on", "Method", "Mean error", against, "95%"], rows


def task_rows(c):
    """`(header, rows)` of the table of tasks."""
    rows = {}
    for name, row in c.by_task.iterrows():
        title = c.table.loc[name].title
        rows[name] = [(title, title), *((f"{v:.4f}", v) for v in row)]
    return ["Method", *c.tasks], rows


def _how(c):
    draws = len(next(iter(c.errors.values())))
    return (
        f"{len(c.tasks)} tasks, {draws} draws, the same for all methods. Against the "
        "baseline: how far the error is below it, the mean over tasks; the interval is a "
        "bootstrap over the draws, p is Wilcoxon's over tasks and draws, corrected for the "
        "number of methods by Holm. Seconds are those of one training; MFLOP are a million "
        "operations with floats, for one example of every task; a prediction is one among "
        "as many as the test part has."
    )


# Of methods in the same order, the same in all figures; colours repeat after ten.
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star")


def _markers(c):
    colours = plotly.colors.qualitative.D3
    return {
        method: {
            "color": colours[number % len(colours)],
            "symbol": _SYMBOLS[number % len(_SYMBOLS)],
            "size": 9,
        }
        for number, method in enumerate(c.table.index)
    }


def _bars(deviation):
    """Error bars, thin enough for what is below them; of one draw there are none."""
    shown = [None if np.isnan(value) else float(value) for value in np.ravel(deviation)]
    return {"array": shown, "thickness": 1, "width": 3}


def size_figure(c):
    """Mean error against the number of weights, with the Pareto front."""
    values = np.array([c.table.weights, c.table.error], float).T
    front = values[pareto_front(values)]
    front = front[np.argsort(front[:, 0])]
    figure = go.Figure()
    figure.add_scatter(
        x=front[:, 0].tolist(),
        y=front[:, 1].tolist(),
        mode="lines",
        line={"color": "#888", "dash": "dot", "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )
    markers = _markers(c)
    for method, row in c.table.iterrows():
        figure.add_scatter(
            x=[int(row.weights)],
            y=[float(row.error)],
            error_y=_bars(row.spread),
            mode="markers",
            marker=markers[method],
            name=labels([row.title])[0],
            cliponaxis=False,
        )
    # The digits between powers of ten lie on each other where there are many.
    wide = values[:, 0].max() > 30 * values[:, 0].min()
    figure.update_xaxes(type="log", title="weights", dtick=1 if wide else None, nticks=8)
    figure.update_yaxes(title="mean error")
    return figure


def curve_figure(c):
    """Mean error by the share of the training examples."""
    figure = go.Figure()
    markers = _markers(c)
    for method, own in c.curve.groupby("method", sort=False):
        figure.add_scatter(
            x=(100 * own.fraction).tolist(),
            y=own.error.tolist(),
            error_y=_bars(own.spread),
            mode="lines+markers",
            marker=markers[method],
            name=labels([c.table.loc[method].title])[0],
        )
    figure.update_xaxes(title="training examples, %")
    figure.update_yaxes(title="mean error")
    return figure


def gain_figure(c):
    """By how much each task's error is below the baseline's, a heat map."""
    base = c.by_task.loc[c.baseline]
    others = [m for m in c.by_task.index if m != c.baseline]
    gains = 100 * (base - c.by_task.loc[others]) / base.replace(0, np.nan)
    titles = [c.table.loc[m].title for m in others]
    return heat_map(gains.to_numpy(), titles, c.tasks, unit="%", values="+.0f")


def to_json(c):
    """What a comparison found, as JSON."""
    table = json.loads(c.table.to_json(orient="index"))
    return {
        "sentence": c.sentence,
        "recommended": c.recommendation.method,
        "baseline": c.baseline,
        "tasks": c.tasks,
        "methods": table,
        "errors": {m: values.tolist() for m, values in c.errors.items()},
        "curve": json.loads(c.curve.to_json(orient="records")),
        "relations": {
            method: {"title": title, "matrix": matrix.tolist()}
            for method, (title, matrix) in c.relations.items()
        },
        "chosen": c.chosen,
        "left_out": c.left_out,
    }
