"""What an audit wants from every model, and what each model said.

Data only: `collect` fills it, `judging` reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from realign.audit.canonical import sha256_json
from realign.audit.outcomes import Response
from realign.audit.schema import Role
from realign.audit.suites import Suite
from realign.model.scoring import (
    AGREEMENTS,
    REFUSALS,
)

if TYPE_CHECKING:
    from realign.checkpoint.reader import Checkpoint

LOGODDS_TOKENS = 5
KL_POSITIONS = 16
KL_ITEMS = 128
"""Prompts per suite that the KL is measured on: its file holds positions x vocabulary numbers."""


def scorer_hash(*, per_byte: bool) -> str:
    """What identifies the refusal log-odds: both sets of openings, their length, the scale."""
    return sha256_json(
        {
            "agreements": list(AGREEMENTS),
            "k": LOGODDS_TOKENS,
            "name": "refusal_logodds",
            "per_byte": per_byte,
            "refusals": list(REFUSALS),
        }
    )


@dataclass(frozen=True)
class OpenedRole:
    """One model of the audit, opened and not loaded."""

    role: Role
    checkpoint: Checkpoint
    digest: str
    """SHA-256 over the hashes of all files that decide what the model says."""
    files: Mapping[str, str]


@dataclass(frozen=True)
class Demand:
    """What is wanted of every model: suites to answer, suites to score."""

    texts: tuple[Suite, ...]
    scored: tuple[Suite, ...]
    per_byte: bool
    """Tokenizers differ between the models, so log-probabilities are taken per byte."""
    kl: tuple[Suite, ...]


@dataclass
class KlRecord:
    """The KL of one model from the reference on one suite."""

    items: dict[str, list[float]]
    clamped: int
    dropped: float


@dataclass
class RoleRecords:
    """Everything one model said."""

    role: Role
    facts: Mapping[str, Any]
    """What settings resolved to: stop ids, template hash, dtype, device, attention."""
    responses: dict[str, tuple[Response, ...]] = field(
        default_factory=dict[str, tuple[Response, ...]]
    )
    """By suite, in item order."""
    again: dict[str, tuple[Response, ...]] = field(default_factory=dict[str, tuple[Response, ...]])
    """The same with batch size 1, where the noise floor is measured."""
    logodds: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """By suite and item id, nats."""
    logodds_reason: str = ""
    kl: dict[str, KlRecord] = field(default_factory=dict[str, KlRecord])
    kl_reason: str = ""
    reused: int = 0
    """Records that an earlier run had made."""


def digest_of(files: Mapping[str, str]) -> str:
    """One digest over file hashes, in the form of `content_digest`."""
    lines = [(name.encode("utf-8"), f"{sha}  {name}\n") for name, sha in files.items()]
    return hashlib.sha256("".join(line for _, line in sorted(lines)).encode("utf-8")).hexdigest()
