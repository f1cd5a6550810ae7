"""Places in a page that are filled from data; which cells count. Light: no model is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with every `<!-- NAME:begin -->` ... `<!-- NAME:end -->` filled anew."""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        assert pattern.search(page), f"the page has no place for {name}"
        content = f"\n{table}\n\n" if table else "\nNothing.\n\n"
        page = pattern.sub(lambda found, text=content: found[1] + text + found[2], page)
    return page


def whole(cells: Sequence[Mapping[str, Any]], but: Sequence[str]) -> list[Mapping[str, Any]]:
    """The cells of those fine-tunes that every method has repaired: means over the same ones."""
    wanted = {str(cell["arm"]) for cell in cells} - set(but)
    had: dict[tuple[str, str, int], set[str]] = {}
    for cell in cells:
        had.setdefault((cell["family"], cell["scenario"], cell["seed"]), set()).add(cell["arm"])
    full = {place for place, arms in had.items() if wanted <= arms}
    return [cell for cell in cells if (cell["family"], cell["scenario"], cell["seed"]) in full]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
