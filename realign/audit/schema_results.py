"""Parts of the report that hold results: rates, comparisons, agreement, logits, weights.

The report itself is in `schema.py`, from which all of these can be imported.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import AliasChoices, ConfigDict, Field

from realign.audit.schema_inputs import ComparisonName, Interval, Part, Role, VerdictWord


class Treatment(Part):
    """One rate under one treatment of invalid responses."""

    n: int
    bad: int
    rate: float | None
    ci95: Interval | None


class Treatments(Part):
    """The three treatments of invalid responses; `excluded` is the headline."""

    excluded: Treatment
    as_bad: Treatment
    as_ok: Treatment


class RateEntry(Part):
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


class Table(Part):
    """The paired table: both bad, newly bad, fixed, both ok."""

    e: int
    b: int
    c: int
    d: int


class ConfidenceInterval(Part):
    """A two-sided interval and how it was made."""

    level: float
    low: float
    high: float
    method: str


class ComparisonEntry(Part):
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


class MaxDrop(Part):
    """The largest standardised worsening over several suites."""

    T: float
    p: float


class FisherTest(Part):
    """Fisher's combination of the suites' p-values."""

    X: float
    p: float


class FamilyEntry(Part):
    """One decision over several suites."""

    name: str
    comparison: ComparisonName | None = None
    members: tuple[str, ...]
    pooled_p: float | None = None
    max_drop: MaxDrop | None = None
    fisher: FisherTest | None = None
    flagged: bool | None = None
    reason: str | None = None


class AgreementEntry(Part):
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


class MeanEntry(Part):
    """A mean over one suite's items, with its bootstrap interval."""

    suite: str
    role: Role
    n: int
    mean: float | None
    ci95: Interval | None = None
    reason: str | None = None


class FirstToken(Part):
    """First-token refusal log-odds over a derived token set."""

    ids: tuple[int, ...] = ()
    mean: dict[str, float] = Field(default_factory=dict)


class KlEntry(Part):
    """Per-token KL of one model from the reference, position 1 first, nats."""

    harmful: tuple[float, ...] = ()
    benign: tuple[float, ...] = ()
    harmful_mean_1_5: float | None = None
    benign_first: float | None = None
    dropped_mass: float | None = None
    clamped: int = 0


class Logits(Part):
    """Metrics that need no generation by the audited model and no judge."""

    refusal_logodds: tuple[MeanEntry, ...] = ()
    refusal_logodds_reason: str | None = None
    first_token: FirstToken | None = None
    first_token_reason: str | None = None
    kl: dict[str, KlEntry] = Field(default_factory=dict)
    kl_items: tuple[MeanEntry, ...] = ()
    kl_reason: str | None = None


class PrefillEntry(Part):
    """Compliance after a given opening."""

    tokens: int
    role: Role
    rate: float | None
    ci95: Interval | None = None
    table: Table | None = None


class HazardEntry(Part):
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


class TemplateEntry(Part):
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


class WeightRow(Part):
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


class WeightGroup(Part):
    """Weight drift of one checkpoint against the reference."""

    role: Role
    total: WeightRow | None = None
    total_reason: str | None = None
    per_module: tuple[WeightRow, ...] = ()
    per_layer: tuple[WeightRow, ...] = ()
    per_matrix: tuple[WeightRow, ...] = ()
    skipped: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


class Weights(Part):
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


def finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(value)
