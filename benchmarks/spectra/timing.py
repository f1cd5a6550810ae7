"""Times of rival ways to the same result, measured in turns in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds of every repetition of one way."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)


def in_turns(
    ways: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_up: bool = True,
    before: Callable[[], None] | None = None,
) -> dict[str, Times]:
    """Run every way `repeats` times, one after the other, after one turn that does not count.

    `before` runs before every one of them and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + warm_up):
        for name, way in ways.items():
            if before is not None:
                before()
            start = time.perf_counter()
            way()
            taken = time.perf_counter() - start
            if turn >= warm_up:
                seconds[name].append(taken)
    return {name: Times(tuple(each)) for name, each in seconds.items()}


def ratio(slow: Times, fast: Times) -> dict[str, float]:
    """How many times faster: of the medians, and the extremes of single turns."""
    turns = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return {"ratio": slow.median / fast.median, "least": min(turns), "most": max(turns)}


def spoken(found: Mapping[str, float], digits: int = 1) -> str:
    """`4.1x (3.9-4.3)`."""
    value, least, most = (f"{found[key]:.{digits}f}" for key in ("ratio", "least", "most"))
    return f"{value}x ({least}-{most})"
