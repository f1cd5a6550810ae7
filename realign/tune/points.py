"""Finished points: which of them is best, and which strengths are worth a look.

Pure functions of what is known. Here: the grid, the bracket, the neighbours, the choice. Not here:
what optuna makes of the same (`study`), when a point is broken off (`pruning`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from realign.errors import UsageError
from realign.tune.measure import Cost, Proxies, Rate, harm_of
from realign.tune.request import MAX_STRENGTH, STEP, Limits
from realign.tune.strengths import Point

GRID = (1.0, 0.5, 0.25, 0.75, 1.25, 1.5)
"""Strengths common to all groups that every study looks at first."""
MOVES = (0.2, 0.1)
"""By how much single groups are turned up or down around the best point."""


@dataclass(frozen=True)
class Pruned:
    """Why a point was broken off."""

    stage: str
    """refusal, KL, costs or harm."""
    reason: str


@dataclass(frozen=True)
class Trial:
    """One finished point."""

    number: int
    point: Point
    proxies: Proxies
    rates: Mapping[str, Rate] | None
    """None where nothing was generated; with open answers where the point was broken off later."""
    cost: Cost | None
    """None where it was broken off."""
    pruned: Pruned | None = None


def rounded(value: float) -> float:
    """The nearest multiple of the step, free of the noise of adding steps up."""
    return round(round(value / STEP) * STEP, 6)


def grid_of(top: float) -> tuple[float, ...]:
    """The global strengths that every study looks at first."""
    known = [t for t in GRID if t <= top]
    return tuple(known) if top in known else (*known, top)


def next_common(trials: Sequence[Trial], limits: Limits, *, top: float) -> float | None:
    """The next strength common to all groups.

    Sought is the strongest one within the limits: nothing below such a one is looked at, nor above
    the first one beyond it that is not. In between the grid goes first, then the middle.

    Args:
        trials: what is known.
        limits: what decides.
        top: largest strength.

    Returns:
        None where the border is known to a step.
    """
    common = {trial.point[0]: trial for trial in trials if len(set(trial.point)) == 1}
    kept = [t for t, each in common.items() if each.cost is not None and each.cost.within(limits)]
    low = max(kept, default=0.0)
    high = min((t for t in common if t > low), default=None)
    for t in grid_of(top):
        if t > low and (high is None or t < high):
            return t
    if high is None:
        return None
    middle = rounded((low + high) / 2)
    return middle if low < middle < high else None


def around(best: Point, top: float) -> Iterator[Point]:
    """The best point with one group turned up; then with another one turned down for it."""
    indices = range(len(best))
    for size in MOVES:
        for up in indices:
            for down in (None, *indices):
                moved = list(best)
                moved[up] = min(top, moved[up] + size)
                if down is not None:
                    moved[down] = max(0.0, moved[down] - size)
                point = tuple(map(rounded, moved))
                if down != up and any(point):
                    yield point


def top_strength(asked: float | None, *, bound: float) -> float:
    """The largest strength looked at, a multiple of the step.

    Args:
        asked: by the user.
        bound: of the method.

    Raises:
        UsageError: more than the method's bound was asked for.
    """
    if asked is not None and asked > bound:
        raise UsageError(f"--max-strength is {asked:g}", f"the method allows at most {bound:g}")
    wanted = min(MAX_STRENGTH, bound) if asked is None else asked
    return round(int(wanted / STEP + 1e-9) * STEP, 6)


def best_of(trials: Sequence[Trial], finetuned: Mapping[str, Rate], limits: Limits) -> Trial | None:
    """The safest point within the limits: then the cheapest, then the weakest.

    Returns:
        None where no point is within the limits and safer than the fine-tune.
    """
    start = harm_of(finetuned)
    allowed = [
        trial
        for trial in trials
        if trial.cost is not None and trial.cost.within(limits) and trial.cost.harm < start
    ]

    def rank(trial: Trial) -> tuple[float, float, float, int]:
        assert trial.cost is not None
        return trial.cost.harm, trial.cost.total, sum(trial.point), trial.number

    return min(allowed, key=rank, default=None)
