"""`report.html`: one file that works offline, with tables that sort and figures."""

import html
import json

import numpy as np
import plotly.graph_objects as go
import plotly.offline

from .. import application
from ..oracles import pareto_front

files = application("files")

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 64rem;
       padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.answer { border-left: 4px solid #2e7d32; padding: .5rem 1rem; font-size: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8884;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
tr.chosen { font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; }
@media print { th button::after { content: ""; } body { max-width: none; } }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const cell = button.parentElement, body = cell.closest("table").tBodies[0];
    const column = cell.cellIndex, up = cell.getAttribute("aria-sort") !== "ascending";
    for (const other of cell.parentElement.cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const raw = row.cells[column].dataset.value;
      return raw === undefined || raw === "" ? -Infinity : isNaN(raw) ? raw : Number(raw);
    };
    const order = (a, b) => { const x = value(a), y = value(b);
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); };
    body.append(...[...body.rows].sort(order));
  });
}
"""


def write_report(comparison, path):
    """Write the report of a comparison.

    Args:
        comparison: `Comparison`.
        path: path of the HTML file.
    """
    c = comparison
    parts = [
        f"<p class='answer'>{html.escape(c.sentence)}</p>",
        "<h2>Methods</h2>",
        _table("methods", *methods_rows(c), chosen=c.recommendation.method),
        f"<p>{html.escape(_how(c))}</p>",
    ]
    if c.left_out:
        items = "".join(
            f"<li>{html.escape(f'{name}: {reason}')}</li>"
            for name, reason in c.left_out.items()
        )
        parts.append(f"<h2>Left out</h2><ul>{items}</ul>")
    if len(c.curve):
        parts += [
            "<h2>Where sharing begins to pay</h2>",
            _figure(curve_figure(c), "curve"),
            _table("fractions", *curve_rows(c)),
        ]
    parts += [
        "<h2>Error and size</h2>",
        _figure(size_figure(c), "size"),
        "<h2>Which tasks gain, and which lose</h2>",
        _figure(gain_figure(c), "gains"),
        "<h2>Errors by task</h2>",
        _table("tasks", *task_rows(c), chosen=c.recommendation.method),
    ]
    if c.relations:
        parts.append("<h2>What was learned of the tasks</h2>")
        for method, (title, _) in c.relations.items():
            heading = html.escape(f"{c.table.loc[method].title}: {title}")
            figure = _figure(relation_figure(c, method), f"relations-{method}")
            parts += [f"<h3>{heading}</h3>", figure]
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which method for these tasks</title><style>{_STYLE}</style>
<script>{plotly.offline.get_plotlyjs()}</script></head><body>
<h1>Which method for these tasks</h1>
{"".join(parts)}
<script>{_SCRIPT}</script></body></html>
"""
    files.write(path, text)


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


def _table(identity, header, rows, chosen=None):
    heads = "".join(
        f"<th scope='col'><button type='button'>{html.escape(h)}</button></th>"
        for h in header
    )
    body = ""
    for name, cells in rows.items():
        mark = " class='chosen'" if name == chosen else ""
        body += f"<tr{mark}>"
        for text, value in cells:
            shown = "" if value is None else html.escape(str(value), quote=True)
            body += f'<td data-value="{shown}">{html.escape(text)}</td>'
        body += "</tr>"
    return (
        f"<div class='scroll'><table id='{identity}'><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(figure, identity):
    figure.update_layout(
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        autosize=True,
        # Beside the figure there is no room for it on a phone.
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    options = {"include_plotlyjs": False, "full_html": False, "div_id": identity}
    own = figure.to_html(config={"responsive": True, "displaylogo": False}, **options)
    return f"<figure>{own}</figure>"


def size_figure(c):
    """Mean error against the number of weights, with the Pareto front."""
    values = np.array([c.table.weights, c.table.error], float).T
    front = pareto_front(values)
    figure = go.Figure()
    order = np.argsort(values[front][:, 0])
    figure.add_scatter(
        x=values[front][order, 0],
        y=values[front][order, 1],
        mode="lines",
        name="Pareto front",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=values[:, 0],
        y=values[:, 1],
        mode="markers+text",
        text=c.table.title,
        textposition="top center",
        name="methods",
        cliponaxis=False,
        error_y={"array": c.table.spread.fillna(0)},
    )
    figure.update_xaxes(type="log", title="weights")
    figure.update_yaxes(title="mean error")
    return figure


def curve_figure(c):
    """Mean error by the share of the training examples."""
    figure = go.Figure()
    for method, own in c.curve.groupby("method", sort=False):
        figure.add_scatter(
            x=100 * own.fraction,
            y=own.error,
            error_y={"array": own.spread.fillna(0)},
            mode="lines+markers",
            name=c.table.loc[method].title,
        )
    figure.update_xaxes(title="training examples, %")
    figure.update_yaxes(title="mean error")
    return figure


def gain_figure(c):
    """By how much each task's error is below the baseline's, a heat map."""
    base = c.by_task.loc[c.baseline]
    others = [m for m in c.by_task.index if m != c.baseline]
    gains = 100 * (base - c.by_task.loc[others]) / base.replace(0, np.nan)
    figure = go.Figure(
        go.Heatmap(
            z=gains.to_numpy(),
            x=c.tasks,
            y=[c.table.loc[m].title for m in others],
            colorscale="PiYG",
            zmid=0,
            colorbar={"title": "%"},
        )
    )
    return figure


def relation_figure(c, method):
    """What a method learned of the tasks, a heat map; the mean over the draws."""
    figure = go.Figure(
        go.Heatmap(
            z=c.relations[method][1],
            x=c.tasks,
            y=c.tasks,
            colorscale="PiYG",
            zmid=0,
            zmin=-1,
            zmax=1,
        )
    )
    figure.update_yaxes(autorange="reversed", scaleanchor="x")
    return figure


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
