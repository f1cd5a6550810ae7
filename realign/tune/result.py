"""`realign/tune/1`: what a tuning found, as JSON; the report is drawn from nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from realign._version import __version__
from realign.audit.schema import Report, atomic_write
from realign.audit.suites import Suite
from realign.repair.plan import Plan
from realign.repair.record import versions
from realign.tune.bounds import AS_IT_IS
from realign.tune.final import AUDIT, Final, Verdict, output_of
from realign.tune.measure import Cost, Rate, cost_of
from realign.tune.points import Trial
from realign.tune.request import STEP, TuneRequest
from realign.tune.split import Split
from realign.tune.strengths import Group, Strengths

SCHEMA = "realign/tune/1"
RESULT_NAME = "tune.json"
Status = Literal["done", "not confirmed", "limits broken", "infeasible"]
_STATUS: dict[Verdict, Status] = {
    "met": "done",
    "not confirmed": "not confirmed",
    "not met": "limits broken",
}


@dataclass(frozen=True)
class TuneResult:
    """A tuning that came to its end."""

    status: Status
    document: Mapping[str, Any]
    """The content of tune.json."""
    audit: Report | None
    """Of the held-out prompts; None where no point was within the limits."""

    @property
    def exit_code(self) -> int:
        """0 where held-out prompts confirm every limit, else 1."""
        return 0 if self.status == "done" else 1

    def write(self, folder: Path) -> None:
        """Write tune.json.

        Raises:
            OutputError: the folder cannot be written.
        """
        text = json.dumps(self.document, indent=1, ensure_ascii=False, allow_nan=False)
        atomic_write(folder / RESULT_NAME, text + "\n")


def build_result(
    request: TuneRequest,
    plan: Plan,
    split: Split,
    *,
    judges: Mapping[str, str],
    groups: Sequence[Group],
    top: float,
    trials: Sequence[Trial],
    finetuned: Mapping[str, Rate],
    ended: str,
    chosen: tuple[Trial, Strengths] | None,
    final: Final | None,
    final_runs: int,
    notes: Sequence[str],
) -> TuneResult:
    """Put everything together."""
    status: Status = "infeasible"
    if final is not None:
        status = _STATUS[final.verdict]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "status": status,
        "version": __version__,
        "versions": {**versions(), "optuna": _optuna_version()},
        "command": request.command,
        "method": {"name": plan.method.name, "settings": plan.method.settings()},
        "inputs": {role: each.source for role, each in plan.inputs.items()},
        "seed": request.seed,
        "limits": {
            "utility_drop": request.limits.utility_drop,
            "over_refusal_rise": request.limits.over_refusal_rise,
            "confidence": request.limits.confidence,
        },
        "groups": [{"name": each.name, "layers": list(each.layers)} for each in groups],
        "max_strength": top,
        "step": STEP,
        "suites": {
            "tuning": [_suite(suite, judges) for suite in split.tuning],
            "held_out": [_suite(suite, judges) for suite in split.held_out],
            "shared": split.shared,
        },
        "search": {
            "ended": ended,
            "finetuned": {
                "rates": _rates(finetuned),
                "cost": vars(cost_of(finetuned, finetuned, confidence=AS_IT_IS)),
            },
            "answers": _answers(trials, split),
            "trials": [_trial(trial, request) for trial in trials],
        },
        "chosen": None
        if chosen is None
        else {
            "trial": chosen[0].number + 1,
            "strength": chosen[1].single,
            "strengths": {str(layer): t for layer, t in chosen[1].by_layer.items()},
            "cost": _cost(chosen[0].cost),
        },
        "held_out": None
        if final is None
        else {
            "rows": [row.to_json() for row in final.rows],
            "verdict": final.verdict,
            "runs": final_runs,
            "audit": f"{AUDIT}/audit.json",
        },
        "output": None if final is None or final.result is None else output_of(request).name,
        "notes": list(notes),
    }
    return TuneResult(status, document, None if final is None else final.audit)


def _suite(suite: Suite, judges: Mapping[str, str]) -> dict[str, Any]:
    clusters = {item.cluster for item in suite.items if item.cluster is not None}
    return {
        "name": suite.name,
        "kind": suite.kind,
        "n": len(suite.items),
        "clusters": len(clusters) or None,
        "judge": judges[suite.name],
        "sha256": suite.suite_hash,
        "skipped": dict(suite.skipped),
    }


def _rates(rates: Mapping[str, Rate]) -> dict[str, Any]:
    return {name: rate.to_json() for name, rate in rates.items()}


def _answers(trials: Sequence[Trial], split: Split) -> dict[str, int]:
    """How many answers pruning has saved."""
    every = sum(len(suite.items) for suite in split.tuning) * len(trials)
    given = sum(rate.answered for each in trials for rate in (each.rates or {}).values())
    return {"generated": given, "without_pruning": every}


def _trial(trial: Trial, request: TuneRequest) -> dict[str, Any]:
    return {
        "number": trial.number + 1,
        "point": list(trial.point),
        "proxies": vars(trial.proxies),
        "rates": None if trial.rates is None else _rates(trial.rates),
        "cost": _cost(trial.cost),
        "within": None if trial.cost is None else trial.cost.within(request.limits),
        "pruned": None if trial.pruned is None else vars(trial.pruned),
    }


def _cost(cost: Cost | None) -> dict[str, Any] | None:
    return None if cost is None else dict(vars(cost))


def _optuna_version() -> str:
    from importlib.metadata import version

    return version("optuna")
