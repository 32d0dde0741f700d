"""The drawings of the site and the README.

    python -m docs.pictures

writes them into `docs/figures`. Of the experiments it draws what their pages' tables have;
curves that are in no table are written by the experiments' commands.
"""

import itertools
import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

DOCS = pathlib.Path(__file__).parent
FIGURES = DOCS / "figures"
TASKS = ("tab:blue", "tab:orange", "tab:green")
SHARED = "0.55"
# Text stays text, and a picture drawn again is the same file.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dmtrl",
    "font.size": 9,
    "font.family": "sans-serif",
}


def canvas(width, height):
    """A figure, and axes of its size in units of 1/10 inch, without a frame."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.set_axis_off()
    return figure, axes


def save(figure, name, *formats):
    """Write a figure in each format."""
    for suffix in formats or ("svg",):
        # Without a date, and at twice the usual resolution.
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(FIGURES / f"{name}.{suffix}", metadata=metadata, dpi=200)


def box(axes, x, y, width, height, colour, text="", alpha=0.35, **options):
    """A filled rectangle with text in it."""
    axes.add_patch(
        Rectangle((x, y), width, height, facecolor=colour, alpha=alpha, edgecolor="none")
    )
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, lw=1))
    centre = (x + width / 2, y + height / 2)
    axes.text(*centre, text, ha="center", va="center", **options)


def arrow(axes, start, end, colour="0.3", **options):
    """An arrow from one point to another."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, **options})


def overview():
    """A network of two tasks, and what a layer can do with their kernels."""
    figure, axes = canvas(84, 43)
    y = 31
    axes.text(1, 40.5, "one network, T = 2 tasks", weight="bold", va="center")
    box(axes, 1, y - 3, 7, 7, SHARED, "image")
    x = 8
    for title, size in (("conv", 4), ("pool", 4), ("dense", 4)):
        arrow(axes, (x, y + 0.5), (x + 4, y + 0.5))
        for n in range(2 * size):
            colour = TASKS[n // size]
            place = (x + 4 + n * 1.25, y - 3)
            axes.add_patch(
                Rectangle(place, 1.05, 7, facecolor=colour, alpha=0.55, edgecolor="none")
            )
        axes.text(x + 9, y - 5, title, ha="center", va="center")
        x += 14
    for row, (colour, name) in enumerate(zip(TASKS, ("age", "gender"))):
        middle = y + 3.2 - 5.4 * row
        arrow(axes, (x, y + 0.5), (x + 7, middle))
        box(axes, x + 7, middle - 2, 12, 4, colour, f"head: {name}")
    axes.text(x + 3.3, y - 5, "split", ha="center", va="center")
    axes.text(
        1, 21, "each layer: how are its T kernels related?", weight="bold", va="center"
    )
    panels = ("independent", "one for all", "shared factors", "a prior", "similar kernels")
    for number, title in enumerate(panels):
        left = 1 + number * 16.8
        axes.add_patch(
            FancyBboxPatch(
                (left, 1),
                14.8,
                16.4,
                boxstyle="round,pad=0,rounding_size=0.8",
                facecolor="none",
                edgecolor="0.8",
            )
        )
        axes.text(left + 7.4, 3.2, title, ha="center", va="center")
        _panel(axes, number, left)
    save(figure, "overview", "svg", "png")


def _panel(axes, number, left):
    """One way in which two kernels are related."""
    kernels = [(left + 1.8, 8), (left + 8.2, 8)]
    if number == 1:
        box(axes, left + 5, 8, 4.8, 4.8, SHARED, "W")
        return
    if number == 2:
        box(axes, left + 1.2, 7, 3, 6.6, SHARED, "L")
        axes.text(left + 5.4, 10.3, "·", ha="center", va="center")
        for column, colour in enumerate(TASKS[:2]):
            box(axes, left + 6.6 + 2.2 * column, 8.8, 2.2, 3, colour, "")
        axes.text(left + 8.8, 13.2, "S", ha="center", va="center")
        return
    for place, colour, name in zip(kernels, TASKS, "12"):
        box(axes, *place, 4.8, 4.8, colour, "" if number == 4 else f"$W_{name}$")
        if number == 4:
            axes.text(place[0] + 2.4, 14.6, f"$W_{name}$", ha="center", va="center")
    middle = (left + 6.6, 10.4), (left + 8.2, 10.4)
    if number == 3:
        arrow(axes, *middle, arrowstyle="-", linestyle=":", lw=2)
        axes.text(left + 7.4, 14.6, r"$\Sigma$", ha="center", va="center")
    if number == 4:
        for row in (0.8, 2.6):
            for (x, y), own in zip(kernels, TASKS):
                shared = SHARED if row == 0.8 else own
                axes.add_patch(Rectangle((x + 0.5, y + row - 0.5), 3.8, 1, color=shared))
        arrow(axes, (left + 6.1, 8.8), (left + 8.7, 8.8), arrowstyle="<|-|>")


def layout():
    """The grouped layout, and what a layer of T kernels does on it."""
    figure, axes = canvas(66, 34)
    tasks, channels, width = 3, 4, 3.6
    axes.text(10, 32, "features (batch, ..., T · C), here T = 3, C = 4", va="center")
    for row, (bottom, name) in enumerate(((23, "input"), (9, "output"))):
        axes.text(9, bottom + 2, name, ha="right", va="center")
        for n in range(tasks * channels):
            task, channel = divmod(n, channels)
            x = 10 + n * width + task * 1.2
            box(axes, x, bottom, width, 4, TASKS[task], "" if row else str(n))
            if not row:
                axes.text(x + width / 2, 28.4, f"c = {channel}", ha="center", fontsize=6.5)
        for task, colour in enumerate(TASKS):
            x = 10 + task * (channels * width + 1.2) + channels * width / 2
            if row:
                axes.text(x, 6.8, f"task {task}", ha="center", va="center")
                arrow(axes, (x, 17), (x, 13.4))
            else:
                arrow(axes, (x, 22.6), (x, 21))
                text = f"kernel {task}: W[..., {task}]"
                box(axes, x - 7, 17, 14, 4, colour, text, fontsize=7.5)
    axes.text(
        10,
        3,
        "channel t · C + c is channel c of task t; kernels have the task axis last",
        va="center",
        fontsize=7.5,
    )
    save(figure, "layout")


def decompositions():
    """Which factors each decomposition makes of a stacked kernel."""
    figure, axes = canvas(84, 46)
    names, colours = ("3", "3", "C", "M", "T"), [SHARED] * 4 + ["tab:orange"]

    def node(x, y, text, colour, radius=2.1):
        axes.add_patch(
            matplotlib.patches.Circle((x, y), radius, facecolor=colour, alpha=0.4)
        )
        axes.add_patch(
            matplotlib.patches.Circle((x, y), radius, fill=False, edgecolor=colour)
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=8)

    def line(start, end, text=""):
        axes.plot(*zip(start, end), color="0.3", lw=1, zorder=0)
        if text:
            x, y = np.mean([start, end], axis=0)
            axes.text(x + 0.3, y + 1.0, text, ha="center", va="center", fontsize=7)

    def legs(places, bottom):
        for (x, y), name in zip(places, names):
            line((x, y), (x, bottom))
            axes.text(x, bottom - 1.2, name, ha="center", va="center", fontsize=8)

    axes.text(2, 43.5, "stacked kernel W", weight="bold")
    axes.add_patch(
        FancyBboxPatch(
            (4, 35.6),
            20,
            4,
            boxstyle="round,pad=0,rounding_size=1",
            facecolor="0.55",
            alpha=0.4,
        )
    )
    axes.text(14, 37.6, "W", ha="center", va="center")
    legs([(6 + 4 * n, 35.6) for n in range(5)], 31)

    axes.text(46, 43.5, "LAF: W = L · S", weight="bold")
    axes.add_patch(
        FancyBboxPatch(
            (48, 35.6),
            15,
            4,
            boxstyle="round,pad=0,rounding_size=1",
            facecolor="0.55",
            alpha=0.4,
        )
    )
    axes.text(55.5, 37.6, "L", ha="center", va="center")
    node(74, 37.6, "S", "tab:orange")
    line((63, 37.6), (71.9, 37.6), "K")
    legs([(50 + 3.7 * n, 35.6) for n in range(4)] + [(74, 35.5)], 31)

    axes.text(2, 25, "Tucker: a core, a matrix for each axis", weight="bold")
    places = [(5 + 7 * n, 9) for n in range(5)]
    node(19, 20, "C", SHARED, 2.4)
    for n, (place, colour) in enumerate(zip(places, colours), start=1):
        line((19, 17.6) if n == 3 else (19 + 0.7 * (n - 3), 17.9), (place[0], 11.1))
        x = (19 + 2 * place[0]) / 3 + (-1.6 if n < 3 else 1.4)
        axes.text(x, 13.9, f"$K_{n}$", ha="center", fontsize=7)
        node(*place, f"$U_{n}$", colour)
    legs([(x, y - 2.1) for x, y in places], 4)

    axes.text(46, 25, "TT: a chain of cores", weight="bold")
    places = [(49 + 8 * n, 15) for n in range(5)]
    for n, (place, colour) in enumerate(zip(places, colours), start=1):
        node(*place, f"$G_{n}$", colour)
        if n < 5:
            line((place[0] + 2.1, 15), (place[0] + 5.9, 15), f"$K_{n}$")
    legs([(x, y - 2.1) for x, y in places], 8)
    axes.text(
        46,
        2.2,
        "orange: of the tasks; grey: common to all tasks\n"
        "axes: window 3 x 3, C in, M out, T tasks; K: ranks",
        fontsize=7.5,
        va="center",
    )
    save(figure, "decompositions")


def hinton():
    """What the notebook on relations learns, by two starts of a prior."""
    import keras

    from dmtrl_keras import (
        TensorNormalRegularizer,
        plot_hinton,
        relationship_network,
        task_correlation,
    )

    rng = np.random.default_rng(0)
    tasks = ["north", "south", "east", "west"]
    common = rng.normal(size=(3, 20))
    means = {task: common + 0.2 * rng.normal(size=(3, 20)) for task in tasks}
    means["west"] = -means["west"]
    classes = np.arange(30) % 3
    x = {t: means[t][classes] + 2.5 * rng.normal(size=(30, 20)) for t in tasks}
    panels = {}
    prior = TensorNormalRegularizer(0.3, epsilon=0.001)
    for title, arguments in (
        ("from zeros", {}),
        ("from a common draw", {"prior": prior, "kernel_initializer": "glorot_uniform"}),
    ):
        keras.utils.set_random_seed(0)
        model = relationship_network(
            (20,),
            tasks,
            classes=3,
            bottleneck=None,
            layers=("classifier",),
            **arguments,
        )
        model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
        model.fit(x, dict.fromkeys(tasks, classes), batch_size=10, epochs=60, verbose=0)
        panels[title] = task_correlation(model)["classifier"]
    save(plot_hinton(panels, tasks), "hinton")


def table(page, mark):
    """The first table between a page's marks: its header, and rows of cells, strings."""
    text = (DOCS / "experiments" / f"{page}.md").read_text()
    rows = text.split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0]
    header, _, *body = (
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in itertools.takewhile(str.strip, rows.strip().splitlines())
    )
    return header, body


def number(cell):
    """The mean and the spread that a cell has."""
    mean, _, spread = cell.partition("±")
    return float(mean.strip(" %")), float(spread or 0)


def sharing_by_layer():
    """The table of MTAL's shared pairs of related tasks, as bars, and what chance gives."""
    header, body = table("mtal", "mtal-sharing-related")
    rows = {row[0]: row for row in body}
    names = ("MTAL", "MTAL of filters", "MTAL, common start")
    layers = [row for row in body if row[0].startswith("block")]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(names)
    for number_of, (name, colour) in enumerate(zip(names, TASKS)):
        column = header.index(name)
        values = [number(row[column])[0] for row in layers]
        places = np.arange(len(layers)) + (number_of - 1) * height
        axes.bar(places, values, height, label=name, color=colour)
    chance, _ = number(rows["chance, total"][header.index("MTAL")])
    axes.axhline(chance, color="black", linestyle="--", linewidth=1, label="chance, slices")
    labels = [row[0].replace("_conv", "\nconv") for row in layers]
    axes.set_xticks(range(len(layers)), labels, fontsize=7)
    axes.set(ylabel="pairs that are similar, %", ylim=(0, 118))
    axes.legend(ncols=4, loc="upper center", fontsize=8, frameon=False)
    save(figure, "sharing-by-layer")


def errors_of(header, body, draws=3):
    """What `applications.mtal.error_table` has, of the page's table instead of runs.

    Spreads of the error are not in the table. Its mean is: over the draws, the mean square
    is the square of the mean and what the draws differ.
    """
    import pandas as pd

    from applications.mtal import TITLES, TOLD

    told, last = [TITLES[method] for method in TOLD], header.index("mean")
    rows = []
    for title, *cells in (row[: last + 1] for row in body):
        *tasks, (mean, spread) = map(number, cells)
        squares = [(100 - m) ** 2 + s**2 * (draws - 1) / draws for m, s in tasks]
        rows.append((title, title in told, mean, spread, np.mean(squares), np.nan))
    names = ("title", "told", "accuracy", "accuracy_spread", "error", "error_spread")
    return pd.DataFrame(rows, columns=names)


def errors_by_method():
    """MTAL's tables as Figure 8 of the paper: mean accuracy and mean square error."""
    from applications.mtal import draw_errors

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row")
    for axes, group in zip(grid, ("related", "unrelated")):
        draw_errors(errors_of(*table("mtal", f"mtal-{group}")), axes)
        axes[0].set_title(f"{group} tasks", fontsize=9)
    grid[0, 0].legend(fontsize=8, loc="lower left")
    save(figure, "errors-by-method")


def accuracy_by_fraction():
    """Office-Caltech's tables, as curves over the share of examples for training."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    marks = {"on features": "office", "on images": "office-images"}
    for axes, (title, mark) in zip(both, marks.items()):
        header, body = table("office-caltech", mark)
        share, name, average = map(header.index, ("Training", "Method", "Average"))
        methods = list(dict.fromkeys(row[name] for row in body))
        for place, method in enumerate(methods):
            rows = [row for row in body if row[name] == method]
            # Side by side, so that the spreads can be seen.
            offset = 0.16 * (place - (len(methods) - 1) / 2)
            fractions = [number(row[share])[0] + offset for row in rows]
            means, spreads = zip(*(number(row[average]) for row in rows))
            axes.errorbar(fractions, means, spreads, label=method, lw=1, capsize=2)
        axes.set(title=title, xticks=(5, 10, 20), xlabel="examples for training, %")
        axes.title.set_fontsize(9)
    both[0].set_ylabel("average accuracy, %")
    both[0].legend(loc="lower right", fontsize=7, frameon=False)
    save(figure, "accuracy-by-fraction")


def error_by_fraction():
    """MNIST's table of the recipe, as curves over the fractions that it has."""
    header, body = table("mnist", "mnist-recipe")
    fraction, name = map(header.index, ("Fraction", "Method"))
    # N of UD-MTL may be another one at each fraction.
    titles = [row[name].partition(" (")[0] for row in body]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("Binary %", "Multi-class %")):
        for method in dict.fromkeys(titles):
            rows = [row for row, title in zip(body, titles) if title == method]
            places = [100 * number(row[fraction])[0] for row in rows]
            means, spreads = zip(*(number(row[header.index(column)]) for row in rows))
            axes.errorbar(places, means, spreads, label=method, lw=1, marker=".", capsize=2)
        axes.set(xscale="log", xlabel="training images, % of 60,000")
        axes.set_ylabel(column.replace("%", "error, %").lower())
    figure.axes[1].legend(fontsize=7, frameon=False)
    save(figure, "error-by-fraction")


def online_and_offline():
    """MTFL's table of the online similarity, over the examples that are remembered."""
    header, body = table("mtfl", "mtfl-convergence")
    features, online, count, same, every = map(
        header.index,
        (
            "Features",
            "Online",
            "Examples remembered",
            "Offline on as many",
            "Offline on all",
        ),
    )
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    names = list(dict.fromkeys(row[features] for row in body))
    for axes, name in zip(figure.subplots(1, len(names)), names):
        rows = [row for row in body if row[features] == name]
        rows.sort(key=lambda row: int(row[count]))
        examples = [int(row[count]) for row in rows]
        for column, label in ((online, "online"), (same, "offline, on as many")):
            means, spreads = zip(*(number(row[column]) for row in rows))
            axes.errorbar(examples, means, spreads, label=label, lw=1, capsize=2)
        axes.axhline(number(rows[0][every])[0], color="0.6", lw=1, label="offline, on all")
        axes.set(title=name, xscale="log", xlabel="examples remembered")
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("τ")
    figure.axes[0].legend(fontsize=7, frameon=False)
    save(figure, "online-and-offline")


DRAWINGS = (
    overview,
    layout,
    decompositions,
    hinton,
    sharing_by_layer,
    errors_by_method,
    accuracy_by_fraction,
    error_by_fraction,
    online_and_offline,
)


def main():
    """Draw all of them."""
    FIGURES.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for draw in DRAWINGS:
            draw()


if __name__ == "__main__":
    main()
