"""Tables are readable in a narrow terminal: no digit and no name is lost."""

import io
import re

import keras
import pytest
from rich.console import Console

from dmtrl_keras import (
    factorization_report,
    factorize,
    kernel_sharing_ratio,
    layers,
    task_summary,
)
from dmtrl_keras.ground.tables import make_console, print_table

COLUMNS = ["Method", "Fraction", "Runs", "Weights", "Binary %", "Multi-class %", "Seconds"]
ROWS = [
    ["STL", "0.01", 5, "4,351,040", "1.21 ± 0.09", "4.46 ± 0.42", "111 ± 26"],
    ["UD-MTL (N = 3)", "0.01", 5, "436,256", "1.18 ± 0.07", "14.97 ± 0.36", "18 ± 1"],
    ["DMTRL-Tucker", "0.01", 5, "4,224,391", "1.20 ± 0.10", "4.28 ± 0.49", "101 ± 14"],
]


def printed(width, *arguments, **options):
    """The lines of a table in a terminal of some width."""
    file = io.StringIO()
    console = Console(width=width, file=file)
    print_table("A title", *arguments, **options, console=console)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in file.getvalue()
    return lines


@pytest.mark.parametrize("width", [140, 80, 60, 40])
def test_numbers_are_whole(width):
    """Each stands in one line, in as many tables as it takes."""
    lines = printed(width, COLUMNS, ROWS)
    text = "\n".join(lines)
    for row in ROWS:
        for value in row[1:]:
            assert re.search(rf"(^|\s){re.escape(str(value))}(\s|$)", text), value
        for word in row[0].split():
            assert word in text
    for column in COLUMNS:
        for word in column.split():
            assert word in text
    # One row for each, where the width is enough.
    assert (len(lines) == 3 + len(ROWS)) == (width >= 80)


def test_rows_are_named_in_each_part():
    """Columns that have no place stand below, after those that name the rows."""
    lines = printed(40, COLUMNS, ROWS, keys=2)
    text = "\n".join(lines)
    parts = text.count("Fraction")
    assert parts > 1 == text.count("Weights") == text.count("A title")
    for title in ("STL", "Tucker"):
        assert sum(title in line for line in lines) == parts
    assert text.count("0.01") == 3 * parts


def test_long_names_are_folded():
    """A name is broken where nothing else helps, and all of it is there."""
    name = "task_0_conv2_block1_0_convolution_with_a_long_name"
    lines = printed(40, ["Layer", "Kernels"], [[name, "1,234,567"], ["Total", "7"]])
    cells = [line[:-9].strip() for line in lines[3:-1]]
    assert "".join(cells) == name and lines[3].endswith("1,234,567")


def test_totals_and_captions():
    """Totals are set apart; a caption stands below."""
    lines = printed(80, ["a", "b"], [["x", 1], ["all", 2]], totals=1, caption="a caption")
    assert [line.split() for line in lines[3:]] == [
        ["x", "1"],
        [],
        ["all", "2"],
        ["a", "caption"],
    ]
    assert printed(80, ["a", "b"], [])


def test_width_where_there_is_no_terminal(monkeypatch, capsys):
    """Files are wide, unless the environment says how wide."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 140
    monkeypatch.setenv("COLUMNS", "60")
    assert make_console().width == 60


@pytest.mark.parametrize("width", [80, 60])
def test_tables_of_models(width, monkeypatch, capsys):
    """The library's own: what `factorize`, `task_summary` and MTAL's ratio print."""
    monkeypatch.setenv("COLUMNS", str(width))
    inputs = keras.Input((8, 8, 3))
    x = layers.SimilarKernelConv2D(4, 3, tasks=10, shared_input=True, name="similar")(
        inputs
    )
    x = layers.TaskFlatten(10)(x)
    x = layers.TaskDense(1000, tasks=10, name="the_name_of_a_layer_with_weights")(x)
    model = keras.Model(inputs, x)
    *_, total = kernel_sharing_ratio(model)
    rows = task_summary(model)
    (report,) = factorization_report(factorize(model, "laf", rank=2))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    numbers = [f"{total.kernels:,}", f"{total.saved:.1%}", f"{report.error:.4f}"]
    numbers += [f"{report.parameters_before:,}", f"{report.parameters_after:,}"]
    numbers += [str(report.shape), str(report.rank), "6x6x40", "10000"]
    for name in ("parameters", "parameters_if_independent"):
        values = [getattr(row, name) for row in rows]
        numbers += [f"{value:,}" for value in (*values, sum(values))]
    for number in numbers:
        assert number in text, number
    for word in ("similar", "SimilarKernelConv2D", "Output", "FLOPs", "Chance", "Error"):
        assert word in text, word
