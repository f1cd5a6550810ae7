"""Parts of the report that say what was audited: the run, its policy, models, suites, judges.

The report itself is in `schema.py`, from which all of these can be imported.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["reference", "subject", "repaired", "base"]
ComparisonName = Literal["drift", "residual", "recovery", "tax"]
VerdictWord = Literal["drift", "within_margin", "inconclusive"]
GateStatus = Literal["pass", "fail", "inconclusive", "skipped"]
Interval = tuple[float, float]


class Part(BaseModel):
    """What all parts of a report have in common: frozen, unknown fields ignored, no NaN."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Tool(Part):
    """The program that wrote the report."""

    name: str = "realign"
    version: str
    source_commit: str | None = None


class Host(Part):
    """Where the run took place."""

    os: str
    python: str
    libraries: dict[str, str] = Field(default_factory=dict)
    device: str


class Run(Part):
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


class PolicyUsed(Part):
    """The policy file and what it says after defaults."""

    path: str | None = None
    sha256: str
    effective: dict[str, Any]


class FileEntry(Part):
    """One file of a model."""

    path: str
    size: int | None = None
    sha256: str


class Ancestor(Part):
    """One step of a model's lineage."""

    id: str
    revision: str | None = None
    relation: str


class ModelEntry(Part):
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


class SuiteEntry(Part):
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


class SensitivitySpecificity(Part):
    """A judge's error rates from hand labels."""

    se: float
    n_se: int
    sp: float
    n_sp: int
    source: str


class ThresholdEntry(Part):
    """The cut of the log-prob judge, fitted once on the reference."""

    tau: float
    youden_j: float
    n_complied: int
    n_refused: int


class JudgeEntry(Part):
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


class InstrumentEntry(Part):
    """One metric of one instrument (suite x generation settings x judge)."""

    instrument_id: str
    suite: str
    judge: str
    metric: str
    generation: dict[str, Any] | None = None
    generation_hash: str | None = None
    run: Literal["headline", "as_shipped", "sampled", "template-reference"] = "headline"
    k_samples: int = 1
