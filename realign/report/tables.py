"""The look of every table on a terminal: no frame, dim header, reads without colour.

Here: the empty table, what of a table with long names fits a width, and tables of figures of which
nothing may be cut. Not here: any content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_GAP = 3
"""Columns of a terminal between two columns of a table."""
_SHORT = 8
"""Titles up to this long are not worth a second line."""
_LEAST = 12
"""Names are not cut shorter than this."""
_NUMBER = re.compile(r"(?<![^.])\d+\.")


def plain_table(
    title: str | None = None, *, left: Iterable[str] = (), right: Iterable[str] = ()
) -> Table:
    """Return an empty table with a bold title on the left.

    Args:
        title: None for a table that needs none.
        left: the first columns, of words.
        right: the columns after them, of numbers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="dim",
    )
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def fit(
    names: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    *,
    droppable: Sequence[str],
    width: int,
) -> tuple[list[str], int]:
    """Return which columns stand beside names that must not wrap, and the room for the names.

    Args:
        names: the first column, with its title.
        columns: cells by title, the title among them where it is printed.
        droppable: titles that may be left out, the first one first; the others stay, and names
            that do not fit beside them have to be elided.
        width: of the terminal.
    """
    longest = max(map(len, names), default=0)
    kept = list(columns)
    left = list(droppable)
    while True:
        taken = sum(_GAP + max(map(len, columns[title]), default=0) for title in kept)
        if longest + taken <= width or not left:
            return kept, min(longest, max(_LEAST, width - taken))
        gone = left.pop(0)
        kept = [title for title in kept if title != gone]


def figures_table(
    title: str | None,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    words: Iterable[str] = (),
) -> RenderableType:
    """Return a table of which every name and every number is shown whole, in `width` columns.

    Where it is too wide, intervals move under their figures and titles are stacked; where that is
    not enough, every row becomes lines of "title value", broken between them and never inside.

    Args:
        title: over the table; None for none.
        titles: of the columns; the first holds names.
        rows: cells, as many as titles; an interval follows its figure as " (..." or ", ...".
        width: of the terminal.
        words: titles of further columns that hold words and stand on the left.
    """
    for heads, cells in (
        (titles, rows),
        (
            [titles[0], *(_lines(each) for each in titles[1:])],
            [[row[0], *(_under(cell) for cell in row[1:])] for row in rows],
        ),
    ):
        columns = [[head, *(row[i] for row in cells)] for i, head in enumerate(heads)]
        if sum(_width(column) for column in columns) + _GAP * (len(columns) - 1) <= width:
            table = plain_table(title)
            left = {0, *(titles.index(each) for each in words if each in titles)}
            for index, head in enumerate(heads):
                justify = "left" if index in left else "right"
                table.add_column(_plain(head), justify=justify, no_wrap=True)
            for row in cells:
                table.add_row(*map(_plain, row))
            return table
    return _stacked(title, titles, rows, width=width)


def _stacked(
    title: str | None, titles: Sequence[str], rows: Sequence[Sequence[str]], *, width: int
) -> RenderableType:
    """Every row as its name and indented lines of "title value"."""
    from rich.console import Group
    from rich.text import Text

    lines = [] if title is None else [_whole(title, style="bold")]
    for row in rows:
        lines.append(_whole(f"{titles[0]} {row[0]}"))
        line = ""
        for phrase in (f"{head} {cell}" for head, cell in zip(titles[1:], row[1:], strict=True)):
            if line and len(line) + _GAP + len(phrase) > width:
                lines.append(_whole(line))
                line = ""
            line = f"{line}{' ' * _GAP}{phrase}" if line else f"  {phrase}"
        lines += [_whole(line)] if line else []
    return Group(*lines) if lines else Text("")


def _whole(text: str, *, style: str = "") -> Text:
    """A line that is never cut; a name longer than the terminal is left to the terminal."""
    from rich.text import Text

    return Text(text, style=style, overflow="ignore", no_wrap=True)


def _plain(text: str) -> Text:
    """Text without markup: names may hold brackets."""
    from rich.text import Text

    return Text(text)


def _width(column: Iterable[str]) -> int:
    return max((len(line) for cell in column for line in cell.split("\n")), default=0)


def _lines(title: str) -> str:
    """A title with a line per word; what is shorter than a figure stays together."""
    return title if len(title) <= _SHORT else re.sub(r" (?!%)", "\n", title)


def _under(cell: str) -> str:
    """A cell with its interval, or what qualifies it, in a line below."""
    return cell.replace(" (", "\n(").replace(", ", ",\n")


def elide(name: str, width: int) -> str:
    """Shorten the name of a tensor in the middle; the layer's number and the end stay."""
    if len(name) <= width:
        return name
    number = _NUMBER.search(name)
    if number is None:
        head = name[: width // 3]
    elif len(name) - number.start() < width:
        rest = name[number.start() :]
        return f"{name[: width - len(rest) - 1]}\N{HORIZONTAL ELLIPSIS}{rest}"
    else:
        head = f"\N{HORIZONTAL ELLIPSIS}{number.group()}"
    room = max(1, width - len(head) - 1)
    return f"{head}\N{HORIZONTAL ELLIPSIS}{name[-room:]}"
