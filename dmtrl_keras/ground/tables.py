"""Tables for the terminal, readable in a narrow one: nothing of a number is left out."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Where the output is a file or a pipe, unless `COLUMNS` says something else.
_WIDE = 140
# Longer texts, such as names of layers, may be broken.
_LONGEST_TEXT = 24
_GAP = 2


def make_console() -> "Console":
    """A console of `rich`, wide where the output is no terminal."""
    # Keras itself depends on rich, for `model.summary()`.
    from rich.console import Console

    console = Console()
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=_WIDE)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    texts: int = 1,
    keys: int = 1,
    totals: int = 0,
    caption: str | None = None,
    console: "Console | None" = None,
) -> None:
    """Print a table that is readable at any width.

    Numbers are never broken. Texts and headers are folded where it is narrow; and columns
    for which there is no place then stand below the others, after those that name the rows.

    Args:
        title: str.
        columns: list of str, the headers.
        rows: list of lists, whose values are printed as `str` gives them.
        texts: int, how many columns from the left are texts; the others are numbers.
        keys: int, how many columns from the left name the rows.
        totals: int, how many of the last rows are set apart.
        caption: str or None, to stand below.
        console: `rich.console.Console`; None: a new one for the standard output.
    """
    console = make_console() if console is None else console
    cells = [[str(value) for value in row] for row in rows]
    contents: list[tuple[str, ...]] = list(zip(*cells)) if cells else [()] * len(columns)
    least, most = [], []
    for number, (header, values) in enumerate(zip(columns, contents)):
        whole = max(map(len, (header, *values)))
        needed = [_longest_word(header)]
        # Names of rows may take several lines, other texts where they are long.
        needed += [len(v) if number else _longest_word(v) for v in values]
        longest = max(needed)
        least.append(min(longest, _LONGEST_TEXT) if number < texts else longest)
        most.append(whole)
    from rich.text import Text

    console.print(Text(title, "bold"))
    # rich before 14.3 makes the last column wider by one.
    width = console.width - 1
    for index, band in enumerate(_bands(least, keys, width)):
        if index:
            console.print()
        widths = _widths(band, least, most, width)
        console.print(_table(columns, cells, band, widths, texts, totals))
    if caption is not None:
        console.print(Text(caption, "dim"))


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _bands(least: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """Which columns stand side by side: lists of numbers, each of them with the keys."""
    first = list(range(keys))
    bands = [first.copy()]
    for number in range(keys, len(least)):
        used = sum(least[other] + _GAP for other in bands[-1])
        if used + least[number] > width and len(bands[-1]) > keys:
            bands.append(first.copy())
        bands[-1].append(number)
    return bands


def _widths(
    band: Sequence[int], least: Sequence[int], most: Sequence[int], width: int
) -> list[int]:
    """A width for each column of a band: what is left goes to those that need more."""
    left = max(0, width - sum(least[number] + _GAP for number in band) + _GAP)
    found = []
    for number in band:
        more = min(left, most[number] - least[number])
        found.append(least[number] + more)
        left -= more
    return found


def _table(
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    band: Sequence[int],
    widths: Sequence[int],
    texts: int,
    totals: int,
) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for number, width in zip(band, widths):
        table.add_column(
            Text(columns[number]),
            justify="left" if number < texts else "right",
            overflow="fold",
            width=width,
        )
    for index, row in enumerate(cells):
        if totals and index == len(cells) - totals:
            table.add_section()
        table.add_row(*(Text(row[number]) for number in band))
    return table
