"""The search: which points are looked at, which of them are worth answers, and when it ends.

Here: the loop and the proxies' verdict. Not here: proposing points and keeping them (`study`),
measuring (`measure`), choosing one (`study.best_of`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from realign.progress import Progress
from realign.tune.measure import Meter, Proxies, Rate, cost_of
from realign.tune.request import Limits, TuneRequest
from realign.tune.scaled import ScaledModel
from realign.tune.strengths import Group, Point, strengths_at
from realign.tune.study import StudyFile, Trial
from realign.words import counted

CLEARLY = 0.05
"""A limit broken by this much is broken; less may be a few prompts' chance."""
FARTHER = 1.25
"""How much farther from the fine-tune than such a point is too far."""


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
        point = study.propose(limits=request.limits, seed=request.seed)
        if point is None:
            return f"nothing was left to look at after {counted(len(trials), 'trial')}"
        progress.note(f"trial {len(trials) + 1} of {request.trials}: strength {spelled(point)}")
        scaled.apply(strengths_at(point, groups))
        proxies = meter.proxies()
        skipped = hopeless(proxies, trials, request.limits)
        rates = None if skipped else meter.rates()
        cost = None if rates is None else cost_of(rates, finetuned)
        trial = Trial(len(trials), point, proxies, rates, cost, skipped)
        study.add(trial, limits=request.limits)
        progress.note(f"  {outcome(trial, request.limits)}")


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


def hopeless(proxies: Proxies, trials: Sequence[Trial], limits: Limits) -> str:
    """Why answers would be wasted on a point; empty where they would not.

    A point is passed over if it refuses less than one that is within the limits already, or is
    farther from the fine-tune than one that clearly breaks them.
    """
    for trial in trials:
        if trial.cost is None:
            continue
        known = trial.proxies
        if trial.cost.within(limits):
            if (
                proxies.refusal is not None
                and known.refusal is not None
                and proxies.refusal <= known.refusal
            ):
                return f"refuses less than trial {trial.number + 1}, which is within the limits"
        elif (
            max(trial.cost.excess(limits).values()) > CLEARLY
            and proxies.distance > FARTHER * known.distance
        ):
            return f"farther from the fine-tune than trial {trial.number + 1}, which breaks a limit"
    return ""


def spelled(point: Point) -> str:
    """A point in words: one strength where all groups have the same."""
    return f"{point[0]:g}" if len(set(point)) == 1 else ", ".join(f"{t:g}" for t in point)


def outcome(trial: Trial, limits: Limits) -> str:
    """One line about a finished point."""
    if trial.cost is None:
        return f"passed over: {trial.skipped}"
    cost = trial.cost
    parts = [f"harm {cost.harm:.1%}"]
    if cost.utility_drop is not None:
        parts.append(f"accuracy {0.0 - cost.utility_drop:+.1%}")
    if cost.over_refusal_rise is not None:
        parts.append(f"over-refusal {cost.over_refusal_rise:+.1%}")
    verdict = "within the limits" if cost.within(limits) else "breaks a limit"
    return f"{', '.join(parts)}: {verdict}"
