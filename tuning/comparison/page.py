"""A page of tables that sort and of figures: a file that works offline, or a notebook's."""

import html
import math
import uuid

import plotly.graph_objects as go
import plotly.offline

from .. import application

files = application("files")

# By a class, since a notebook has tables of its own.
_STYLE = """
.dmtrl-report { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; }
.dmtrl-report h1 { font-size: 1.6rem; }
.dmtrl-report h2 { font-size: 1.2rem; margin-top: 2rem; }
.dmtrl-report h3 { font-size: 1rem; margin: 1.5rem 0 0; }
.dmtrl-report h1, .dmtrl-report h2, .dmtrl-report h3, .dmtrl-report p,
.dmtrl-report li { overflow-wrap: anywhere; }
.dmtrl-report .answer { border-left: 4px solid #2e7d32; padding: .5rem 1rem;
                        font-size: 1.1rem; }
.dmtrl-report .scroll { overflow-x: auto; }
.dmtrl-report table { border-collapse: collapse; font-size: 15px;
                      font-variant-numeric: tabular-nums; }
.dmtrl-report th, .dmtrl-report td { padding: .3rem .6rem; text-align: right;
                      border-bottom: 1px solid #8884; white-space: nowrap; }
.dmtrl-report th { white-space: normal; vertical-align: bottom; min-width: 4rem; }
.dmtrl-report th.words, .dmtrl-report td.words { text-align: left; }
.dmtrl-report th:first-child, .dmtrl-report td:first-child { text-align: left; }
.dmtrl-report th button { all: unset; cursor: pointer; }
.dmtrl-report th button:focus-visible { outline: 2px solid; }
.dmtrl-report th[aria-sort=ascending] button::after { content: " \\25b2"; }
.dmtrl-report th[aria-sort=descending] button::after { content: " \\25bc"; }
.dmtrl-report tr.chosen { font-weight: 600; }
/* No wider than a sheet of paper: figures don't shrink for the printer. */
.dmtrl-report figure { margin: 1rem 0; max-width: 700px; overflow-x: auto;
                       overflow-y: hidden; }
@media print {
  .dmtrl-report { max-width: none; }
  .dmtrl-report .scroll, .dmtrl-report figure { overflow: visible; }
  .dmtrl-report table { font-size: 8.5pt; }
  .dmtrl-report th, .dmtrl-report td { white-space: normal; padding: .2rem .3rem;
                                       min-width: 0; }
  .dmtrl-report th[aria-sort] button::after { content: ""; }
  .dmtrl-report .modebar { display: none; }
  .dmtrl-report figure, .dmtrl-report tr { break-inside: avoid; }
  .dmtrl-report h2, .dmtrl-report h3 { break-after: avoid; }
}
"""
_WHOLE_PAGE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; }
@media print { :root { color-scheme: light; } body { max-width: none; padding: 0; } }
"""

_SCRIPT = """
for (const button of document.getElementById("%s").querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const cell = button.parentElement, body = cell.closest("table").tBodies[0];
    const column = cell.cellIndex, up = cell.getAttribute("aria-sort") !== "ascending";
    for (const other of cell.parentElement.cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const raw = row.cells[column].dataset.value;
      return raw === "" || isNaN(raw) ? raw : Number(raw);
    };
    // What has no value comes last, whichever way it is sorted.
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    };
    body.append(...[...body.rows].sort(order));
  });
}
"""

# Longer names are shortened, and of more only some are shown.
_LONGEST_NAME = 14
_LONGEST_ROW = 24
_MOST_NAMED = 22
# Pixels that a name needs beside the next one.
_CELL = 20
# In so many columns there is room for numbers.
_MOST_NUMBERS = 12


class Page:
    """A report: of a file if it is written, of a cell if it is a notebook's last value.

    Args:
        title: str.

    Attributes:
        title: str.
    """

    def __init__(self, title):
        self.title = title
        self._parts = []
        self._draws = False

    def __repr__(self):
        return f"<Page {self.title!r}>"

    def heading(self, text, level=2):
        """Add a heading."""
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text, answer=False):
        """Add a paragraph; `answer`: the one that matters."""
        mark = " class='answer'" if answer else ""
        self._parts.append(f"<p{mark}>{html.escape(text)}</p>")

    def items(self, texts):
        """Add a list of points."""
        own = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
        self._parts.append(f"<ul>{own}</ul>")

    def table(self, identity, header, rows, chosen=None):
        """Add a table, which sorts by a click on a column's head.

        Args:
            identity: str, its `id`.
            header: list of str.
            rows: dict from a name to a list of cells `(text, value)`; it is sorted by the
                values, floats or str, None where there is none.
            chosen: the name of the row that stands out.
        """
        self._parts.append(lambda prefix: _table(prefix + identity, header, rows, chosen))

    def figure(self, identity, figure, height=None):
        """Add a figure of plotly.

        Args:
            identity: str, its `id`.
            figure: a `plotly.graph_objects.Figure`.
            height: str, of CSS; None: that of the layout, else it is about square.

        The layout's width is the least one: on a phone the figure is scrolled.
        """
        self._draws = True
        if height is None:
            own = figure.layout.height
            height = "min(480px, 95vw)" if own is None else f"{own}px"
        self._parts.append(lambda prefix: _figure(prefix + identity, figure, height))

    def _body(self, root, prefix=""):
        own = [part if isinstance(part, str) else part(prefix) for part in self._parts]
        return (
            f"<div class='dmtrl-report' id='{root}'><h1>{html.escape(self.title)}</h1>"
            f"{''.join(own)}</div><script>{_SCRIPT % root}</script>"
        )

    @property
    def html(self):
        """The whole page, a str."""
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(self.title)}</title><style>{_WHOLE_PAGE}{_STYLE}</style>
{self._plotly()}</head><body>{self._body("report")}</body></html>
"""

    def _repr_html_(self):
        # Several reports of one notebook have names of their own.
        root = f"report-{uuid.uuid4().hex}"
        own = self._body(root, f"{root}-")
        return f"<style>{_STYLE}</style>{self._plotly()}{own}"

    def _plotly(self):
        if not self._draws:
            return ""
        return f"<script>{plotly.offline.get_plotlyjs()}</script>"

    def write(self, path):
        """Write the page as a file that needs no network."""
        files.write(path, self.html)


def _table(identity, header, rows, chosen=None):
    words = [
        {type(cells[column][1]) for cells in rows.values()} - {type(None)} == {str}
        for column in range(len(header))
    ]
    kinds = [" class='words'" if each else "" for each in words]
    heads = "".join(
        f"<th scope='col'{kind}><button type='button'>{html.escape(h)}</button></th>"
        for h, kind in zip(header, kinds)
    )
    body = ""
    for name, cells in rows.items():
        mark = " class='chosen'" if name == chosen else ""
        body += f"<tr{mark}>"
        for (text, value), kind in zip(cells, kinds):
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            shown = "" if missing else html.escape(str(value), quote=True)
            body += f'<td{kind} data-value="{shown}">{html.escape(text)}</td>'
        body += "</tr>"
    return (
        f"<div class='scroll'><table id='{identity}'><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(identity, figure, height):
    least = figure.layout.width or 0
    figure = go.Figure(figure).update_layout(
        width=None,
        height=None,
        autosize=True,
        # Above is the bar of buttons.
        margin={"l": 10, "r": 10, "t": 40, "b": 10},
        font={"family": "system-ui, sans-serif", "size": 13},
        template="simple_white",
        # A finger that scrolls the page must not zoom; there are buttons for it.
        dragmode=False,
        # Beside the figure there is no room for it on a phone.
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    config = {
        "responsive": True,
        "displaylogo": False,
        "displayModeBar": True,
        # Among the others is one that sends the figure to a server.
        "modeBarButtons": [["toImage", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    }
    own = figure.to_html(
        config,
        include_plotlyjs=False,
        full_html=False,
        div_id=identity,
        default_height=height,
        default_width=f"max(100%, {least}px)",
    )
    return f"<figure>{own}</figure>"


def height_with_legend(entries):
    """The height of a figure with so many names below it, which a phone has in a column."""
    return f"calc(360px + {entries} * clamp(10px, 700px - 100vw, 25px))"


def heat_map(matrix, rows, columns, limit=None, low=None, unit="", values=".2f"):
    """A heat map with named rows and columns, and with numbers where there is room.

    Args:
        matrix: array `(n, m)`; NaN where there is nothing.
        rows: list of n names.
        columns: list of m names.
        limit: float, the value of the strongest colour; None: the largest of the matrix.
        low: float, that of the weakest colour; None: `-limit`, whose colour is another.
        unit: str, beside the colours.
        values: str, how numbers are formatted.

    Returns:
        A figure of plotly.
    """
    rows, columns = (
        [html.escape(name, quote=False) for name in n] for n in (rows, columns)
    )
    numbers = [[None if math.isnan(v) else float(v) for v in row] for row in matrix]
    if limit is None:
        flat = [abs(v) for row in numbers for v in row if v is not None]
        limit = max(flat, default=0) or 1.0
    few = max(len(rows), len(columns)) <= _MOST_NUMBERS
    figure = go.Figure(
        go.Heatmap(
            z=numbers,
            x=columns,
            y=rows,
            colorscale="PiYG" if low is None else "Greens",
            zmin=-limit if low is None else low,
            zmax=limit,
            texttemplate=f"%{{z:{values}}}" if few else None,
            hovertemplate=f"%{{y}}, %{{x}}: %{{z:{values}}}{unit}<extra></extra>",
            # Numbers say more, and leave room to the cells.
            showscale=not few,
            colorbar={"thickness": 12, "title": {"text": unit}},
        )
    )
    named = _CELL * min(len(columns), _MOST_NAMED)
    figure.update_xaxes(**ticks(columns), tickangle=None if few else 90)
    if rows == columns:
        figure.update_xaxes(constrain="domain", constraintoward="left")
        figure.update_yaxes(constrain="domain", constraintoward="top", scaleanchor="x")
        figure.update_yaxes(**ticks(rows), autorange="reversed")
        side = None if few else 200 + named
        return figure.update_layout(width=side, height=side)
    every = ticks(rows, _LONGEST_ROW, len(rows))
    figure.update_yaxes(**every, autorange="reversed")
    width = None if few else 240 + named
    return figure.update_layout(width=width, height=150 + 28 * len(rows))


def labels(names):
    """Names as plotly takes them, which reads marks of HTML."""
    return [html.escape(name, quote=False) for name in names]


def ticks(names, longest=_LONGEST_NAME, most=_MOST_NAMED):
    """An axis of categories, of which long names are shortened and many left out.

    Args:
        names: as from `labels`.
        longest: int, of characters.
        most: int, of names; of more every second, third, ... is shown.
    """
    step = max(1, -(-len(names) // most))
    shown = names[::step]
    return {
        # Names that look like numbers or dates are none.
        "type": "category",
        "tickmode": "array",
        "tickvals": shown,
        "ticktext": labels(_shortened(html.unescape(name), longest) for name in shown),
        "ticks": "",
        "showline": False,
    }


def _shortened(name, longest):
    if len(name) <= longest:
        return name
    return name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
