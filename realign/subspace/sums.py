"""Terms that add up over matrices, and the ratios that are taken at the very end.

A metric over many matrices is the ratio of summed terms, never a mean of ratios. Here: adding and
dividing. Not here: which terms there are (`drift`, `family`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True)
class Sums:
    """Numbers of one matrix, or their sums over several; every field of a subclass is one."""

    def __add__(self, other: Self) -> Self:
        return type(self)(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def ratio(numerator: float, denominator: float) -> float | None:
    """Return the quotient, None where the denominator is 0 or not a number."""
    return numerator / denominator if denominator > 0.0 else None
