"""The final run: the chosen strengths written by the engine, and audited on held-out prompts.

The very checkpoint that is to be kept is audited before it gets its name; where a limit does not
hold on prompts that chose nothing, it is not kept. Here: that run and its figures. Not here: how
strengths were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from realign.audit.instruments import METRICS
from realign.audit.request import AuditRequest
from realign.audit.run import run_audit
from realign.audit.schema import Report, Role
from realign.audit.suites import Suite
from realign.progress import Progress
from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest
from realign.tune.request import Limits, TuneRequest
from realign.tune.strengths import Strengths

REPAIRED = "repaired"
AUDIT = "held-out"


@dataclass(frozen=True)
class HeldOutRow:
    """One suite's primary metric on held-out prompts; shares of bad answers."""

    suite: str
    kind: str
    judge: str
    metric: str
    n: int
    rates: Mapping[str, Mapping[str, Any]]
    """By role (reference, subject, repaired): the rate with its 95 % interval."""
    difference: float
    """Repaired minus fine-tune, pair by pair; an answer that cannot be judged counts as bad."""
    low: float | None
    high: float | None
    limit: float | None
    """What the difference is held to; None where nothing was declared."""

    @property
    def holds(self) -> bool:
        """Harm has fallen; a cost is at most its limit."""
        if self.kind == "harmful":
            return self.difference < 0
        return self.limit is None or self.difference <= self.limit + 1e-9

    @property
    def certain(self) -> bool:
        """Whether the interval says the same as the figure."""
        if self.low is None or self.high is None:
            return False
        limit = 0.0 if self.kind == "harmful" else self.limit
        if limit is None:
            return True
        return self.high <= limit if self.holds else self.low > limit

    def to_json(self) -> dict[str, Any]:
        """With both verdicts."""
        return asdict(self) | {"holds": self.holds, "certain": self.certain}


@dataclass(frozen=True)
class Final:
    """What came of the chosen strengths."""

    rows: tuple[HeldOutRow, ...]
    audit: Report
    result: RepairResult | None
    """None where the checkpoint was not kept."""

    @property
    def holds(self) -> bool:
        """Whether harm fell on every harmful suite and no limit was broken."""
        return all(row.holds for row in self.rows)


class _NotKept(Exception):
    """A limit does not hold; the engine takes its output back."""


def run_final(
    request: TuneRequest,
    strengths: Strengths,
    *,
    suites: Sequence[Suite],
    judges: Mapping[str, str],
    progress: Progress,
) -> Final:
    """Write the repaired checkpoint and audit it; it is kept only if every limit holds.

    Args:
        request: the tuning.
        strengths: the chosen ones.
        suites: held out.
        judges: the primary judge of each suite, by name.
        progress: of the engine and the audit.

    Raises:
        RealignError: whatever a repair or an audit may raise.
    """
    found: list[tuple[Report, tuple[HeldOutRow, ...]]] = []

    def examine(folder: Path) -> None:
        report = run_audit(
            AuditRequest(
                subject=str(request.repair.finetuned),
                reference=request.repair.aligned,
                repaired=folder,
                suites=tuple(suites),
                judges=request.judges,
                out=request.out / AUDIT,
                seed=request.seed,
                device=request.repair.device,
                batch_size=request.batch_size,
                max_new_tokens=request.max_new_tokens,
                weights=False,
                kl=False,
                command=request.command,
                offline=request.repair.offline,
            ),
            progress=progress,
        )
        rows = tuple(_row(report, suite, judges[suite.name], request.limits) for suite in suites)
        found.append((report, rows))
        if not all(row.holds for row in rows):
            raise _NotKept("a limit does not hold on held-out prompts")

    result = None
    with suppress(_NotKept):
        result = repair(
            repair_request(request.repair, strengths, output=request.out / REPAIRED),
            progress=progress,
            before_commit=examine,
        )
    ((report, rows),) = found
    return Final(rows, report, result)


def repair_request(
    request: RepairRequest, strengths: Strengths, *, output: Path | None
) -> RepairRequest:
    """The repair with these strengths, as the engine takes it."""
    single = strengths.single
    if single is not None:
        return replace(request, output=output, strength=single, strengths=None)
    outside = strengths.by_layer.get(None)
    layers = {layer: t for layer, t in strengths.by_layer.items() if layer is not None}
    # Every layer is named; the general strength is left for what stands outside of them.
    return replace(
        request,
        output=output,
        strength=max(layers.values()) if outside is None else outside,
        strengths=layers,
    )


def _row(report: Report, suite: Suite, judge: str, limits: Limits) -> HeldOutRow:
    metric = METRICS[judge, suite.kind][0].name
    roles: tuple[Role, ...] = ("reference", "subject", "repaired")
    rates: dict[str, Mapping[str, Any]] = {}
    shares: dict[str, float] = {}
    n = 0
    for role in roles:
        if role not in report.models:
            continue
        entry = report.rate(role=role, suite=suite.name, metric=metric, judge=judge)
        treatments = entry.treatments
        invalid = sum(entry.n_invalid.values())
        worst = None if treatments is None or not invalid else treatments.as_bad
        share, ci = (entry.rate, entry.ci95) if worst is None else (worst.rate, worst.ci95)
        assert share is not None, (suite.name, role)
        n, shares[role] = entry.n, share
        rates[role] = {
            "rate": share,
            "ci95": None if ci is None else list(ci),
            "invalid": invalid,
        }
    name = "recovery" if suite.kind == "harmful" else "tax"
    interval = next(
        (
            each.ci
            for each in report.comparisons
            if (each.name, each.suite, each.judge, each.metric) == (name, suite.name, judge, metric)
        ),
        None,
    )
    return HeldOutRow(
        suite=suite.name,
        kind=suite.kind,
        judge=judge,
        metric=metric,
        n=n,
        rates=rates,
        difference=shares["repaired"] - shares["subject"],
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        limit=_declared(limits.of(suite.kind)),
    )


def _declared(limit: float | None) -> float | None:
    return None if limit is None or limit >= 1 else limit
