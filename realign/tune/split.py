"""Which prompts tune and which are held out: never the same entity on both sides.

A cluster (an entity, a behaviour) goes to one side as a whole, in all suites alike. Here: the
division. Not here: what is measured on either side.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from realign.audit.contamination import PromptIndex, overlap
from realign.audit.suites import Item, Suite
from realign.errors import SuiteError

HELD_OUT = "held out"
TUNING = "used for tuning"
SHARED = "also in tuning"


@dataclass(frozen=True)
class Split:
    """Suites of the search and of the final run, item by item disjoint."""

    tuning: tuple[Suite, ...]
    held_out: tuple[Suite, ...]
    shared: int
    """Prompts that left the held-out side because they occur in tuning, too."""


def split_suites(suites: Sequence[Suite], *, share: float, seed: int) -> Split:
    """Divide every suite, cluster by cluster.

    Clusters that occur in the same suites are divided among themselves, so that every suite gets
    its share on both sides; which cluster goes where depends on names and seed alone.

    Args:
        suites: what was given.
        share: of the clusters that are held out, in (0, 1).
        seed: of the division.

    Raises:
        SuiteError: a suite with too few clusters for two sides.
    """
    homes: dict[str, set[str]] = defaultdict(set)
    for suite in suites:
        for item in suite.items:
            homes[_unit(suite, item)].add(suite.name)
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for unit, names in homes.items():
        strata[tuple(sorted(names))].append(unit)
    away: set[str] = set()
    for units in strata.values():
        ordered = sorted(units, key=lambda unit: _draw(unit, seed))
        away.update(ordered[: round(share * len(units))])
    for suite in suites:
        sides = {_unit(suite, item) in away for item in suite.items}
        if len(sides) < 2:
            raise SuiteError(
                f"suite {suite.name} has too few clusters to hold a part of them out",
                "give more prompts, or other suites for the final run with --final-suite",
            )
    tuning = _sides(suites, lambda unit: unit not in away, gone=HELD_OUT)
    held_out = _sides(suites, lambda unit: unit in away, gone=TUNING)
    return _disjoint(tuning, held_out)


def pair_suites(tuning: Sequence[Suite], final: Sequence[Suite]) -> Split:
    """Suites given for either side; what the final ones share with tuning is refused.

    Raises:
        SuiteError: with the count of shared prompts.
    """
    split = _disjoint(tuple(tuning), tuple(final))
    if split.shared:
        raise SuiteError(
            f"{split.shared} prompts of the final suites occur in the tuning suites",
            "a figure on tuned prompts says nothing: give other prompts with --final-suite",
        )
    return split


def _disjoint(tuning: tuple[Suite, ...], held_out: tuple[Suite, ...]) -> Split:
    index = PromptIndex(item.prompt for suite in tuning for item in suite.items)
    kept: list[Suite] = []
    shared = 0
    for suite in held_out:
        found = overlap({item.id: item.prompt for item in suite.items}, index)
        shared += found.n_contaminated
        kept.append(suite.without(found.ids, reason=SHARED))
    return Split(tuning, tuple(kept), shared)


def _sides(
    suites: Sequence[Suite], stays: Callable[[str], bool], *, gone: str
) -> tuple[Suite, ...]:
    return tuple(
        suite.without(
            [item.id for item in suite.items if not stays(_unit(suite, item))], reason=gone
        )
        for suite in suites
    )


def _unit(suite: Suite, item: Item) -> str:
    """What stays together: the cluster, over all suites; else the item."""
    return f"cluster {item.cluster}" if item.cluster else f"item {suite.name} {item.id}"


def _draw(unit: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}|{unit}".encode()).digest()
