"""The look of every table on a terminal: no frame, dim header, reads without colour."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


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
