"""What an audit is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from realign.audit.instruments import DEFAULT_MAX_NEW_TOKENS, Generation
from realign.audit.policy import Policy
from realign.audit.schema import Role
from realign.audit.suites import Suite
from realign.audit.training_data import TrainingData

if TYPE_CHECKING:
    import torch

    from realign.checkpoint.reader import Checkpoint


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """One audit: the models, the suites, the judges, the policy, and where results go."""

    subject: str | Path | Checkpoint
    """The fine-tuned checkpoint under audit: a path, a Hub id, or an opened checkpoint."""
    suites: tuple[Suite, ...]
    """Of kind harmful, safe or task; at least one."""
    out: Path
    """The folder for `audit.json` and `items.jsonl`; made if missing, resumed if interrupted."""
    reference: str | Path | Checkpoint | None = None
    """The aligned model the subject was tuned from; without it nothing is compared."""
    repaired: str | Path | Checkpoint | None = None
    """The output of a repair of the subject."""
    base: str | Path | Checkpoint | None = None
    """The pretrained ancestor of the reference; only the weight metrics need it."""
    judges: tuple[str, ...] = ()
    """Judge names; empty: those of the policy, else the exact rule where a suite carries one, else
    keyword and log-odds, and exact match on tasks."""
    policy: Policy | None = None
    """Margins and gates; None gives rates and intervals and no verdicts."""
    seed: int = 0
    """Of the resampling. Generation is greedy and has none."""
    device: str = "auto"
    dtype: torch.dtype | None = None
    """None: the dtype on disk."""
    batch_size: int = 16
    """Prompts at a time."""
    limit: int | None = None
    """Items per suite, at most; chosen by the hash of their ids."""
    max_new_tokens: int | None = None
    """None: what the suite asks for, else 512."""
    keep_texts: bool = False
    """Keep prompts' responses in `out/responses` (mode 0600); else they are deleted at the end."""
    records: Path | None = None
    """Keep answers here instead, for several audits of the same models to share; then they are not
    deleted at the end. They hold texts."""
    shared_out: bool = False
    """`out` may hold other things of the caller's; else a folder with others' files is refused."""
    weights: bool = True
    """Also measure weight-space drift."""
    kl: bool = True
    """Also measure the per-token KL from the reference."""
    noise_floor: bool = False
    """Run the reference twice, with batch size 1, and report its churn against itself."""
    calibration: tuple[Suite, ...] = ()
    """What the repair was calibrated on: items that occur there are dropped and counted."""
    training: tuple[TrainingData, ...] = ()
    """What the subject was trained on, as declared: items that occur there are dropped as well."""
    command: str = ""
    """As typed, for the report."""
    offline: bool = False
    """Open no socket; Hub ids resolve from the local cache."""

    def generation_of(self, suite: Suite) -> Generation:
        """The generation settings of one suite."""
        length = self.max_new_tokens or suite.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        return Generation(mode="greedy", max_new_tokens=length)

    def sources(self) -> dict[Role, str | Path | Checkpoint]:
        """The models that run, in the order they run in."""
        every: dict[Role, str | Path | Checkpoint | None] = {
            "reference": self.reference,
            "subject": self.subject,
            "repaired": self.repaired,
        }
        return {role: source for role, source in every.items() if source is not None}
