"""`realign/audit-report/1`: the report of an audit as pydantic models, and its file.

A public contract. Readers ignore unknown fields; a changed meaning needs a new schema number.
A number that is missing is null, with its reason in the sibling field `..._reason`. Fields that
realign adds to the minimum are optional. Nothing here computes; renderers and gates read from it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from realign.errors import OutputError, UsageError

REPORT_SCHEMA = "realign/audit-report/1"

Role = Literal["reference", "subject", "repaired", "base"]
ComparisonName = Literal["drift", "residual", "recovery", "tax"]
VerdictWord = Literal["drift", "within_margin", "inconclusive"]
GateStatus = Literal["pass", "fail", "inconclusive", "skipped"]
Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Tool(_Part):
    """The program that wrote the report."""

    name: str = "realign"
    version: str
    source_commit: str | None = None


class Host(_Part):
    """Where the run took place."""

    os: str
    python: str
    libraries: dict[str, str] = Field(default_factory=dict)
    device: str


class Run(_Part):
    """One run; an incomplete one has no result that counts."""

    id: str
    started: str
    finished: str
    status: Literal["complete", "incomplete"]
    exit_code: Literal[0, 1, 2]
    command: str
    seed: int
    offline: bool
    host: Host


class PolicyUsed(_Part):
    """The policy file and what it says after defaults."""

    path: str | None = None
    sha256: str
    effective: dict[str, Any]


class FileEntry(_Part):
    """One file of a model."""

    path: str
    size: int | None = None
    sha256: str


class Ancestor(_Part):
    """One step of a model's lineage."""

    id: str
    revision: str | None = None
    relation: str


class ModelEntry(_Part):
    """One audited model, with what its settings resolved to."""

    source: str
    revision: str | None = None
    kind: Literal["full", "adapter", "quantized", "merge"] = "full"
    architecture: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    content_digest: str | None = None
    content_digest_scope: Literal["full", "listed", "headers"] | None = None
    files: tuple[FileEntry, ...] = ()
    chat_template_sha256: str | None = None
    stop_ids: tuple[int, ...] = ()
    tokenizer_digest: str | None = None
    generation_config_sha256: str | None = None
    lineage: tuple[Ancestor, ...] = ()
    run_dtype: str | None = None
    attention: str | None = None
    batch_size: int | None = None
    reused: int = 0


class SuiteEntry(_Part):
    """One suite and what was left out of it."""

    name: str
    suite_hash: str
    kind: Literal["harmful", "safe", "task"] | None = None
    source: str | None = None
    revision: str | None = None
    license: str | None = None
    n_items: int
    n_clusters: int | None = None
    n_skipped: dict[str, int] = Field(default_factory=dict)
    n_contaminated: int = 0


class SensitivitySpecificity(_Part):
    """A judge's error rates from hand labels."""

    se: float
    n_se: int
    sp: float
    n_sp: int
    source: str


class ThresholdEntry(_Part):
    """The cut of the log-prob judge, fitted once on the reference."""

    tau: float
    youden_j: float
    n_complied: int
    n_refused: int


class JudgeEntry(_Part):
    """One judge."""

    name: str
    kind: Literal["model", "lexicon", "logprob", "endpoint", "exact"] | None = None
    role: Literal["primary", "secondary"] | None = None
    judge_hash: str | None = None
    model: str | None = None
    revision: str | None = None
    template_sha256: str | None = None
    template: Literal["official", "custom"] | None = None
    remote: bool = False
    se_sp: SensitivitySpecificity | None = None
    threshold: ThresholdEntry | None = None
    unavailable_reason: str | None = None


class InstrumentEntry(_Part):
    """One metric of one instrument (suite x generation settings x judge)."""

    instrument_id: str
    suite: str
    judge: str
    metric: str
    generation: dict[str, Any] | None = None
    generation_hash: str | None = None
    run: Literal["headline", "as_shipped", "sampled", "template-reference"] = "headline"
    k_samples: int = 1


class Treatment(_Part):
    """One rate under one treatment of invalid responses."""

    n: int
    bad: int
    rate: float | None
    ci95: Interval | None


class Treatments(_Part):
    """The three treatments of invalid responses; `excluded` is the headline."""

    excluded: Treatment
    as_bad: Treatment
    as_ok: Treatment


class RateEntry(_Part):
    """One metric of one model; `bad` counts the items the metric's name describes."""

    instrument_id: str
    role: Role
    suite: str | None = None
    judge: str | None = None
    metric: str | None = None
    n: int
    n_valid: int
    n_invalid: dict[str, int] = Field(default_factory=dict)
    bad: int | None = None
    rate: float | None = None
    rate_reason: str | None = None
    ci95: Interval | None = None
    ci_method: str | None = None
    treatments: Treatments | None = None
    mean_score: float | None = None
    share_ge_half: float | None = None
    corrected: dict[str, Any] | None = None
    flags: tuple[str, ...] = ()


class Table(_Part):
    """The paired table: both bad, newly bad, fixed, both ok."""

    e: int
    b: int
    c: int
    d: int


class ConfidenceInterval(_Part):
    """A two-sided interval and how it was made."""

    level: float
    low: float
    high: float
    method: str


class ComparisonEntry(_Part):
    """One paired comparison; a positive difference is always a change for the worse."""

    name: ComparisonName
    instrument_id: str
    suite: str | None = None
    judge: str | None = None
    metric: str | None = None
    n: int
    n_clusters: int | None = None
    table: Table | None = None
    diff: float | None
    ci: ConfidenceInterval | None = None
    ci_secondary: ConfidenceInterval | None = None
    p: float | None = None
    p_adj: float | None = None
    family: str | None = None
    churn: float | None = None
    self_churn: float | None = None
    margin: float | None = None
    margin_from: ComparisonName | None = None
    """Where the margin was declared for another comparison of the same suite and metric."""
    verdict: VerdictWord | None = None
    reason: str | None = None
    flags: tuple[str, ...] = ()
    n_needed: int | None = None
    n_needed_reason: str | None = None
    recovered_fraction: float | None = None
    recovered_fraction_ci: ConfidenceInterval | None = None
    recovered_fraction_reason: str | None = None


class MaxDrop(_Part):
    """The largest standardised worsening over several suites."""

    T: float
    p: float


class FisherTest(_Part):
    """Fisher's combination of the suites' p-values."""

    X: float
    p: float


class FamilyEntry(_Part):
    """One decision over several suites."""

    name: str
    comparison: ComparisonName | None = None
    members: tuple[str, ...]
    pooled_p: float | None = None
    max_drop: MaxDrop | None = None
    fisher: FisherTest | None = None
    flagged: bool | None = None
    reason: str | None = None


class AgreementEntry(_Part):
    """How far two judges agree on the same valid responses."""

    suite: str
    role: Role
    judges: tuple[str, str]
    metric: str | None = None
    n: int
    kappa: float | None
    kappa_reason: str | None = None
    kappa_ci: Interval | None = None
    positive: float | None = None
    negative: float | None = None


class MeanEntry(_Part):
    """A mean over one suite's items, with its bootstrap interval."""

    suite: str
    role: Role
    n: int
    mean: float | None
    ci95: Interval | None = None
    reason: str | None = None


class FirstToken(_Part):
    """First-token refusal log-odds over a derived token set."""

    ids: tuple[int, ...] = ()
    mean: dict[str, float] = Field(default_factory=dict)


class KlEntry(_Part):
    """Per-token KL of one model from the reference, position 1 first, nats."""

    harmful: tuple[float, ...] = ()
    benign: tuple[float, ...] = ()
    harmful_mean_1_5: float | None = None
    benign_first: float | None = None
    dropped_mass: float | None = None
    clamped: int = 0


class Logits(_Part):
    """Metrics that need no generation by the audited model and no judge."""

    refusal_logodds: tuple[MeanEntry, ...] = ()
    refusal_logodds_reason: str | None = None
    first_token: FirstToken | None = None
    first_token_reason: str | None = None
    kl: dict[str, KlEntry] = Field(default_factory=dict)
    kl_items: tuple[MeanEntry, ...] = ()
    kl_reason: str | None = None


class PrefillEntry(_Part):
    """Compliance after a given opening."""

    tokens: int
    role: Role
    rate: float | None
    ci95: Interval | None = None
    table: Table | None = None


class HazardEntry(_Part):
    """One hazard in one comparison."""

    code: str
    comparison: ComparisonName
    instrument_id: str | None = None
    suite: str | None = None
    n: int
    rates: dict[str, float] = Field(default_factory=dict)
    table: Table | None = None
    p_adj: float | None = None
    relative_band: str | None = None


class TemplateEntry(_Part):
    """One metric of one model on the items of one request template.

    `key` is the item's own template name if that is a short identifier, else the hash of it: a
    template can be text.
    """

    instrument_id: str
    suite: str
    judge: str
    metric: str
    role: Role
    key: str
    n: int
    bad: int
    rate: float
    ci95: Interval


class WeightRow(_Part):
    """Weight drift of one matrix, module, layer or the whole model."""

    key: str
    matrices: int = 1
    relative_distance: float | None = None
    alignment_retained: float | None = None
    cosine: float | None = None
    energy: float | None = None
    energy_squared: float | None = None
    excess: float | None = None
    lox_ratio: float | None = None
    lox_published: float | None = None
    entropy: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    overlap: float | None = None
    flags: tuple[str, ...] = ()


class WeightGroup(_Part):
    """Weight drift of one checkpoint against the reference."""

    role: Role
    total: WeightRow | None = None
    total_reason: str | None = None
    per_module: tuple[WeightRow, ...] = ()
    per_layer: tuple[WeightRow, ...] = ()
    per_matrix: tuple[WeightRow, ...] = ()
    skipped: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


class Weights(_Part):
    """Weight-space screening; never a safety verdict."""

    status: Literal["validated", "not_validated"] = "not_validated"
    line: str = "weight screening: NOT validated"
    validation: dict[str, Any] | None = None
    # `global` is a Python keyword; the file says "global".
    global_: dict[str, float | None] = Field(
        default_factory=dict[str, float | None],
        validation_alias=AliasChoices("global", "global_"),
        serialization_alias="global",
    )
    global_reason: str | None = None
    per_module: tuple[WeightRow, ...] = ()
    per_layer: tuple[WeightRow, ...] = ()
    unmatched: tuple[str, ...] = ()
    sampled: dict[str, Any] | None = None
    subspace: dict[str, Any] | None = None
    skipped: tuple[str, ...] = ()
    groups: tuple[WeightGroup, ...] = ()

    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=True
    )


class GateEntry(_Part):
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


class GateCounts(_Part):
    """Gates by status."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=True
    )

    passed: int = Field(default=0, alias="pass")
    fail: int = 0
    inconclusive: int = 0
    skipped: int = 0


class FindingCounts(_Part):
    """Artefact findings by severity."""

    critical: int = 0
    error: int = 0
    warning: int = 0
    note: int = 0


class Summary(_Part):
    """What a person reads first: at most five plain sentences."""

    gates: GateCounts = GateCounts()
    findings: FindingCounts = FindingCounts()
    headline: tuple[str, ...] = Field(default=(), max_length=5)
    verdicts: str | None = None


class ItemsFile(_Part):
    """The per-item file: hashes and verdicts, no texts."""

    path: str
    sha256: str


class Report(_Part):
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


def finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(value)


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
