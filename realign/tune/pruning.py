"""When a point is broken off: optuna's pruner for a search with limits.

Every stage of a point reports one number to optuna, cheap stages first:

| steps | stage | number, smaller is better |
|---|---|---|
| 0 | refusal | log-odds of refusing, negated |
| 1 | KL | distance from the fine-tune |
| 2 to 5 | costs | what safe suites and tasks exceed their limits by, at least |
| 6 to 9 | harm | harm, at least |

Optuna's own pruners compare a trial with the median or the best of all others at the same step.
Under limits that is wrong both ways: the safest points are those that break limits, and a point
that keeps them must not be broken off for refusing less than these. So a trial is compared with the
right others only. The first two rules are rules of thumb; the last two break off only what open
answers, however good, could not save. Here: the rules. Not here: the stages (`search`).
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from realign.tune.measure import COSTS, HARM, ROUNDS

REFUSAL, DISTANCE, ANSWERS = 0, 1, 2
"""Steps of optuna; answers begin at the last one, a step a round."""
CLEARLY = 0.05
"""A limit broken by this much is broken; less may be a few prompts' chance."""
FARTHER = 1.25
"""How much farther from the fine-tune than a point that clearly breaks a limit is too far."""


def stage_of(step: int) -> str:
    """What a step is called."""
    if step in (REFUSAL, DISTANCE):
        return ("refusal", "KL")[step]
    return "costs" if step < ANSWERS + HARM else "harm"


class LimitsPruner(BasePruner):
    """Breaks a trial off by what it has reported, beside the finished trials."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.reason = ""
        """Why the last trial was broken off."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to break off after the last report."""
        finished = (TrialState.COMPLETE, TrialState.PRUNED)
        self.reason = reason_to_stop(study.get_trials(deepcopy=False, states=finished), trial)
        return bool(self.reason)


def reason_to_stop(known: Sequence[FrozenTrial], trial: FrozenTrial) -> str:
    """Why a trial is not worth going on with; empty where it is.

    Args:
        known: finished trials.
        trial: after its last report.
    """
    step = trial.last_step
    if step is None:
        return ""
    value = trial.intermediate_values[step]
    if step == REFUSAL:
        for other in known:
            if _within(other) and value >= other.intermediate_values.get(REFUSAL, float("inf")):
                return f"refuses less than trial {other.number + 1}, which is within the limits"
    elif step == DISTANCE:
        for other in known:
            far = FARTHER * other.intermediate_values.get(DISTANCE, float("inf"))
            if _excess(other) > CLEARLY and value > far:
                return f"farther from the fine-tune than trial {other.number + 1}, beyond a limit"
    elif stage_of(step) == "costs":
        if value > CLEARLY:
            return f"breaks a limit by {100 * value:.1f} points at least"
    else:
        for other in known:
            if _within(other) and value > _harm(other) + 1e-9:
                return f"cannot be safer than trial {other.number + 1}, which is within the limits"
    return ""


def _within(trial: FrozenTrial) -> bool:
    """Whether it was measured whole and keeps every limit, bounds included."""
    return trial.state == TrialState.COMPLETE and all(
        each <= 1e-9 for each in trial.constraints.values()
    )


def _excess(trial: FrozenTrial) -> float:
    return _last(trial, range(ANSWERS + COSTS, ANSWERS + COSTS + ROUNDS), default=-1.0)


def _harm(trial: FrozenTrial) -> float:
    return _last(trial, range(ANSWERS + HARM, ANSWERS + HARM + ROUNDS), default=float("inf"))


def _last(trial: FrozenTrial, steps: range, *, default: float) -> float:
    values = trial.intermediate_values
    reported = [step for step in steps if step in values]
    return values[reported[-1]] if reported else default
