"""The look of every table on a terminal: no frame, dim header, reads without colour.

Here: the empty table, and what of a table with long names fits a width. Not here: any content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_GAP = 3
"""Columns of a terminal between two columns of a table."""
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
