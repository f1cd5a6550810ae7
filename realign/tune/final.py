"""The final run: the chosen strengths written by the engine, and audited on held-out prompts.

The very checkpoint or patch that is to be kept is audited before it gets its name; where a limit is
broken on prompts that chose nothing, it is not kept. Here: that run and its figures. Not here: how
strengths were chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from realign.audit.assembly import ITEMS_NAME
from realign.audit.instruments import METRICS
from realign.audit.request import AuditRequest
from realign.audit.run import run_audit
from realign.audit.schema import Report, Role
from realign.audit.suites import Suite
from realign.progress import Progress
from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest
from realign.tune.bounds import BAD, GOOD, upper_bound
from realign.tune.measure import marks_of
from realign.tune.request import Limits, TuneRequest
from realign.tune.strengths import Strengths

REPAIRED, PATCH = "repaired", "patch"
AUDIT = "held-out"
Verdict = Literal["met", "not confirmed", "not met", "no limit"]


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

    at_most: float
    """What the difference is at most, with the confidence that was asked for."""

    @property
    def verdict(self) -> Verdict:
        """Harm must fall, a cost be at most its limit: by its bound, by its figure, or not at all.

        "met" is what the bound confirms; where only the figure agrees it is "not confirmed".
        """
        if self.kind != "harmful" and self.limit is None:
            return "no limit"
        if self.kind == "harmful":
            kept, sure = self.difference < 0, self.at_most < 0
        else:
            assert self.limit is not None
            kept, sure = (x <= self.limit + 1e-9 for x in (self.difference, self.at_most))
        return "met" if kept and sure else "not confirmed" if kept else "not met"

    def to_json(self) -> dict[str, Any]:
        """With the verdict."""
        return asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Final:
    """What came of the chosen strengths."""

    rows: tuple[HeldOutRow, ...]
    audit: Report
    result: RepairResult | None
    """None where it was not kept."""

    @property
    def verdict(self) -> Verdict:
        """The worst one of all suites."""
        found = {row.verdict for row in self.rows}
        if "not met" in found:
            return "not met"
        return "not confirmed" if "not confirmed" in found else "met"


class _NotKept(Exception):
    """A limit does not hold; the engine takes its output back."""


def run_final(
    request: TuneRequest,
    strengths: Strengths,
    *,
    suites: Sequence[Suite],
    judges: Mapping[str, str],
    adapter: bool,
    progress: Progress,
) -> Final:
    """Write the repaired checkpoint or patch and audit it; it is kept unless a limit is broken.

    Args:
        request: the tuning.
        strengths: the chosen ones.
        suites: held out.
        judges: the primary judge of each suite, by name.
        adapter: whether the fine-tune is one.
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
                repaired=_repaired(request, folder, finetuned_adapter=adapter),
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
        items = _items(request.out / AUDIT / ITEMS_NAME)
        rows = tuple(
            _row(report, items, suite, judges[suite.name], request.limits) for suite in suites
        )
        found.append((report, rows))
        if any(row.verdict == "not met" for row in rows):
            raise _NotKept("a limit does not hold on held-out prompts")

    result = None
    with suppress(_NotKept):
        result = repair(
            repair_request(request.repair, strengths, output=output_of(request)),
            progress=progress,
            before_commit=examine,
        )
    ((report, rows),) = found
    return Final(rows, report, result)


def output_of(request: TuneRequest) -> Path:
    """Where the result goes."""
    return request.out / (PATCH if request.repair.patch else REPAIRED)


def _repaired(request: TuneRequest, folder: Path, *, finetuned_adapter: bool) -> str | Path:
    """What an audit opens: a patch stands on the fine-tune, or on the base of one that is a LoRA.

    Such a patch is the fine-tune's adapter and the repair in one.
    """
    if not request.repair.patch:
        return folder
    if not finetuned_adapter:
        return f"{request.repair.finetuned}+{folder}"
    base, plus, _ = str(request.repair.finetuned).partition("+")
    return f"{base if plus else request.repair.aligned}+{folder}"


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


def _items(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _row(
    report: Report, items: Sequence[Mapping[str, Any]], suite: Suite, judge: str, limits: Limits
) -> HeldOutRow:
    metric = METRICS[judge, suite.kind][0].name
    roles: tuple[Role, ...] = ("reference", "subject", "repaired")
    rates: dict[str, Mapping[str, Any]] = {}
    shares: dict[str, float] = {}
    n = 0
    marks: dict[str, str] = {}
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
        verdicts = {
            each["item_id"]: each["verdict"]
            for each in items
            if (each["instrument_id"], each["metric"], each["role"])
            == (entry.instrument_id, metric, role)
        }
        marks[role] = marks_of(
            suite, [GOOD if verdicts[item.id] == "ok" else BAD for item in suite.items]
        )
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
        at_most=upper_bound(marks["subject"], marks["repaired"], confidence=limits.confidence),
    )


def _declared(limit: float | None) -> float | None:
    return None if limit is None or limit >= 1 else limit
