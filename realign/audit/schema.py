"""`realign/audit-report/1`: the report of an audit as pydantic models, and its file.

A public contract. Readers ignore unknown fields; a changed meaning needs a new schema number.
A number that is missing is null, with its reason in the sibling field `..._reason`. Fields that
realign adds to the minimum are optional. Nothing here computes; renderers and gates read from it.

The parts are in `schema_inputs` (what was audited) and `schema_results` (what came out); all of
them can be imported from here.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from realign.audit.schema_inputs import (
    Ancestor,
    ComparisonName,
    FileEntry,
    GateStatus,
    Host,
    InstrumentEntry,
    Interval,
    JudgeEntry,
    ModelEntry,
    Part,
    PolicyUsed,
    Role,
    Run,
    SensitivitySpecificity,
    SuiteEntry,
    ThresholdEntry,
    Tool,
    VerdictWord,
)
from realign.audit.schema_results import (
    AgreementEntry,
    ComparisonEntry,
    ConfidenceInterval,
    FamilyEntry,
    FirstToken,
    FisherTest,
    HazardEntry,
    KlEntry,
    Logits,
    MaxDrop,
    MeanEntry,
    PrefillEntry,
    RateEntry,
    Table,
    TemplateEntry,
    Treatment,
    Treatments,
    WeightGroup,
    WeightRow,
    Weights,
    finite,
)
from realign.errors import OutputError, UsageError

__all__ = [
    "REPORT_SCHEMA",
    "AgreementEntry",
    "Ancestor",
    "ComparisonEntry",
    "ComparisonName",
    "ConfidenceInterval",
    "FamilyEntry",
    "FileEntry",
    "FindingCounts",
    "FirstToken",
    "FisherTest",
    "GateCounts",
    "GateEntry",
    "GateStatus",
    "HazardEntry",
    "Host",
    "InstrumentEntry",
    "Interval",
    "ItemsFile",
    "JudgeEntry",
    "KlEntry",
    "Logits",
    "MaxDrop",
    "MeanEntry",
    "ModelEntry",
    "PolicyUsed",
    "PrefillEntry",
    "RateEntry",
    "Report",
    "Role",
    "Run",
    "SensitivitySpecificity",
    "SuiteEntry",
    "Summary",
    "Table",
    "TemplateEntry",
    "ThresholdEntry",
    "Tool",
    "Treatment",
    "Treatments",
    "VerdictWord",
    "WeightGroup",
    "WeightRow",
    "Weights",
    "atomic_write",
    "finite",
    "parse_report",
    "read_report",
    "write_report",
]

REPORT_SCHEMA = "realign/audit-report/1"


class GateEntry(Part):
    """One gate of the policy and how it came out."""

    id: str
    kind: str
    required: bool = True
    status: GateStatus
    observed: float | None = None
    threshold: float | None = None
    message: str
    comparison: ComparisonName | None = None
    suite: str | None = None
    metric: str | None = None
    instrument_id: str | None = None


class GateCounts(Part):
    """Gates by status."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=True
    )

    passed: int = Field(default=0, alias="pass")
    fail: int = 0
    inconclusive: int = 0
    skipped: int = 0


class FindingCounts(Part):
    """Artefact findings by severity."""

    critical: int = 0
    error: int = 0
    warning: int = 0
    note: int = 0


class Summary(Part):
    """What a person reads first: at most five plain sentences."""

    gates: GateCounts = GateCounts()
    findings: FindingCounts = FindingCounts()
    headline: tuple[str, ...] = Field(default=(), max_length=5)
    verdicts: str | None = None


class ItemsFile(Part):
    """The per-item file: hashes and verdicts, no texts."""

    path: str
    sha256: str


class Report(Part):
    """One audit. See the fields' own classes."""

    schema_: Literal["realign/audit-report/1"] = Field(default=REPORT_SCHEMA, alias="schema")
    kind: Literal["audit", "scan", "publish-check"] = "audit"
    tool: Tool
    run: Run
    policy: PolicyUsed | None = None
    models: dict[Role, ModelEntry]
    suites: tuple[SuiteEntry, ...] = ()
    judges: tuple[JudgeEntry, ...] = ()
    instruments: tuple[InstrumentEntry, ...] = ()
    rates: tuple[RateEntry, ...] = ()
    comparisons: tuple[ComparisonEntry, ...] = ()
    families: tuple[FamilyEntry, ...] = ()
    agreement: tuple[AgreementEntry, ...] = ()
    logits: Logits | None = None
    prefill: tuple[PrefillEntry, ...] = ()
    prefill_reason: str | None = None
    hazards: tuple[HazardEntry, ...] = ()
    templates: tuple[TemplateEntry, ...] = ()
    weights: Weights | None = None
    weights_reason: str | None = None
    landscape: dict[str, Any] | None = None
    landscape_reason: str | None = None
    artefacts: dict[str, Any] | None = None
    artefacts_reason: str | None = None
    gates: tuple[GateEntry, ...] = ()
    summary: Summary = Summary()
    limits: tuple[str, ...] = Field(min_length=1)
    items: ItemsFile | None = None

    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=True
    )

    @property
    def exit_code(self) -> int:
        """0 within policy or no policy, 1 a gate failed or is inconclusive, 2 incomplete."""
        return self.run.exit_code

    def rate(self, *, role: Role, suite: str, metric: str, judge: str | None = None) -> RateEntry:
        """The one rate of a role, suite and metric; of the first judge that has it.

        Raises:
            KeyError: if there is none.
        """
        for entry in self.rates:
            wanted = (entry.role, entry.suite, entry.metric) == (role, suite, metric)
            if wanted and judge in (None, entry.judge):
                return entry
        raise KeyError(f"no rate {metric} of {role} on {suite}")

    def to_json(self) -> str:
        """The file's text: sorted keys, no NaN, one newline at the end."""
        plain = self.model_dump(mode="json", by_alias=True)
        return (
            json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )


def write_report(report: Report, path: Path) -> None:
    """Write `audit.json` atomically: temporary file, flush, rename.

    Raises:
        OutputError: if the folder cannot be written.
    """
    atomic_write(path, report.to_json())


def atomic_write(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace a text file in one step; readers see the old one or the new one.

    Raises:
        OutputError: if the folder cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror})", "check space and permissions"
        ) from error


def read_report(path: Path) -> Report:
    """Read `audit.json`.

    Raises:
        UsageError: a missing file, or one that is no audit report of this schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the report cannot be read ({error})") from error
    return parse_report(text, name=str(path))


def parse_report(text: str | Mapping[str, Any], *, name: str = "report") -> Report:
    """A report from its JSON text or the parsed object.

    Raises:
        UsageError: naming the first field that does not fit.
    """
    try:
        if isinstance(text, str):
            return Report.model_validate_json(text)
        return Report.model_validate(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise UsageError(
            f"{name}: no {REPORT_SCHEMA} report ({where}: {first['msg']})",
            "give the audit.json that realign audit wrote",
        ) from error
