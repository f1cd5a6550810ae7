"""Words that messages share."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return "1 row", "2 rows": the count with its noun, which forms its plural with an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
