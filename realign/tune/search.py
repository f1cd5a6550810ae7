"""The search: which points are looked at, stage by stage, and when it ends.

Here: the loop and the order of stages. Not here: proposing points and keeping them (`study`),
breaking them off (`pruning`), measuring (`measure`), choosing one (`points.best_of`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from realign.progress import Progress
from realign.tune.measure import (
    HARM,
    Meter,
    Proxies,
    Rate,
    cost_of,
    harm_of,
    least_excess,
)
from realign.tune.points import Pruned, Trial
from realign.tune.request import Limits, TuneRequest
from realign.tune.scaled import ScaledModel
from realign.tune.strengths import Group, Point, strengths_at
from realign.tune.study import LiveTrial, StudyFile
from realign.words import counted


def search(
    study: StudyFile,
    scaled: ScaledModel,
    meter: Meter,
    *,
    groups: Sequence[Group],
    request: TuneRequest,
    progress: Progress,
) -> str:
    """Look at points until trials, time or points are used up; every one is kept as it ends.

    Returns:
        Why the search ended.
    """
    deadline = None if request.minutes is None else time.monotonic() + 60 * request.minutes
    finetuned = _finetuned(study, scaled, meter, progress)
    meter.begin()
    while True:
        trials = study.trials()
        if len(trials) >= request.trials:
            return counted(len(trials), "trial")
        if deadline is not None and time.monotonic() >= deadline:
            return f"{request.minutes:g} minutes were over after {counted(len(trials), 'trial')}"
        point = study.propose(seed=request.seed)
        if point is None:
            return f"nothing was left to look at after {counted(len(trials), 'trial')}"
        progress.note(f"trial {len(trials) + 1} of {request.trials}: strength {spelled(point)}")
        scaled.apply(strengths_at(point, groups))
        live = study.begin(point)
        trial = look_at(
            live, meter, finetuned, number=len(trials), point=point, limits=request.limits
        )
        study.add(live, trial)
        progress.note(f"  {outcome(trial, request.limits)}")


def look_at(
    live: LiveTrial,
    meter: Meter,
    finetuned: Mapping[str, Rate],
    *,
    number: int,
    point: Point,
    limits: Limits,
) -> Trial:
    """Measure the model as it stands, cheap stages first, for as long as there is hope.

    Args:
        live: the point, which hears of every stage.
        meter: of the scaled model.
        finetuned: rates of the fine-tune.
        number: of the trial.
        point: its strengths.
        limits: what it is held to.
    """
    from realign.tune.pruning import ANSWERS, DISTANCE, REFUSAL

    proxies = Proxies(meter.refusal(), None)
    trial = Trial(number, point, proxies, None, None)
    if proxies.refusal is not None:
        pruned = live.report(REFUSAL, -proxies.refusal)
        if pruned is not None:
            return replace(trial, pruned=pruned)
    distance = meter.distance()
    trial = replace(trial, proxies=replace(proxies, distance=distance))
    pruned = live.report(DISTANCE, distance)
    if pruned is not None:
        return replace(trial, pruned=pruned)
    rates: dict[str, Rate] = {}
    for turn, rates in meter.ask():
        pruned = _after_round(live, ANSWERS, turn, rates, finetuned, limits)
        if pruned is not None:
            return replace(trial, rates=rates, pruned=pruned)
    cost = cost_of(rates, finetuned, confidence=limits.confidence)
    return replace(trial, rates=rates, cost=cost)


def _after_round(
    live: LiveTrial,
    first: int,
    turn: int,
    rates: Mapping[str, Rate],
    finetuned: Mapping[str, Rate],
    limits: Limits,
) -> Pruned | None:
    value = harm_of(rates) if turn >= HARM else least_excess(rates, finetuned, limits)
    return None if value is None else live.report(first + turn, value)


def _finetuned(
    study: StudyFile, scaled: ScaledModel, meter: Meter, progress: Progress
) -> Mapping[str, Rate]:
    """The fine-tune's own rates, from the study where an earlier run has left them."""
    scaled.restore()
    known = study.finetuned
    if known is None:
        progress.note("the fine-tune itself")
        known = meter.rates()
        study.set_finetuned(known)
    return known


def spelled(point: Point) -> str:
    """A point in words: one strength where all groups have the same."""
    return f"{point[0]:g}" if len(set(point)) == 1 else ", ".join(f"{t:g}" for t in point)


def outcome(trial: Trial, limits: Limits) -> str:
    """One line about a finished point."""
    if trial.cost is None:
        assert trial.pruned is not None
        return f"pruned at {trial.pruned.stage}: {trial.pruned.reason}"
    cost = trial.cost
    parts = [f"harm {cost.harm:.1%}"]
    if cost.utility_drop is not None:
        parts.append(f"accuracy {_change(0.0 - cost.utility_drop, cost.utility_at_most, -1)}")
    if cost.over_refusal_rise is not None:
        parts.append(
            f"over-refusal {_change(cost.over_refusal_rise, cost.over_refusal_at_most, 1)}"
        )
    verdict = "within the limits" if cost.within(limits) else "breaks a limit"
    return f"{', '.join(parts)}: {verdict}"


def _change(value: float, at_most: float | None, sign: int) -> str:
    """A change with its bound, which is a rise of what is bad."""
    if at_most is None or abs(sign * at_most - value) < 1e-9:
        return f"{value + 0.0:+.1%}"
    return f"{value + 0.0:+.1%} (bound {sign * at_most:+.1%})"
