"""Tensors that only one of two checkpoints has, in a line per side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from realign.diff.result import Row

_MOST = 4
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def one_sided_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one line for each side that has tensors of its own; --json names them all."""
    sides: tuple[tuple[str, Literal["only_a", "only_b"]], ...] = (("A", "only_a"), ("B", "only_b"))
    for side, status in sides:
        names = [row.name for row in rows if row.status == status]
        if names:
            count = len(names)
            yield f"{count} tensor{'' if count == 1 else 's'} only in {side}: {folded(names)}"


def folded(names: Sequence[str]) -> str:
    """Return names in few words: themselves, without their numbers, or the modules they are in."""
    found = list(names)
    if len(found) > _MOST:
        found = _counted([_NUMBER.sub("*", name) for name in names])
    if len(found) > _MOST:
        found = _counted([f"{_top(name)}.*" for name in names])
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return f"{', '.join(found[:_MOST])}{more}"


def _counted(names: Sequence[str]) -> list[str]:
    """Distinct names in order, those that stand for several with their count."""
    return [f"{name} ({n})" if n > 1 else name for name, n in Counter(names).items()]


def _top(name: str) -> str:
    """The part of the model that a tensor is in: "vision_tower", "model.vision_tower"."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "model" else first
