"""What a repair is asked to do, in plain values, and the checkpoints it opens.

Here: the request as the command line and the Python API write it, and opening every checkpoint it
names. Not here: whether the request makes sense (`plan`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.checkpoint.layouts import conform
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.progress import SILENT, Progress
from realign.repair.method import Method

ROLES = ("aligned", "base", "unaligned")


@dataclass(frozen=True, kw_only=True)
class RepairRequest:
    """One repair, as a user words it."""

    finetuned: str | Path
    """The checkpoint to repair: a folder, a Hub id, or BASE+ADAPTER."""

    output: str | Path | None = None
    """The folder to write. Needed by `repair`, not by `plan`."""

    method: str | Method = "lssf"
    """Name of the method, or a method that is not registered, settings and all."""

    settings: Sequence[str] | Mapping[str, Any] = ()
    """Its hyper-parameters: ["eta=0.9", ...] or {"eta": 0.9}."""

    aligned: str | Path | None = None
    """The aligned model, the parent of the fine-tune."""

    base: str | Path | None = None
    """The model before alignment."""

    unaligned: str | Path | None = None
    """The aligned model after a deliberate un-alignment."""

    scope: str | None = None
    """block_linear, matrices or all; None takes the method's default."""

    strength: float = 1.0
    """The dial t of W(t) = W_f + t (W' - W_f)."""

    anchors: str | Path | None = None
    """Prompts on which activations are measured; None takes `core-anchors`."""

    suites: Sequence[str | Path] = ()
    """Suites audited in the same run: the anchors must share no prompt with them."""

    patch: bool = False
    """Write a LoRA adapter over the fine-tune instead of a checkpoint."""

    max_patch_rank: int | None = None
    """Largest rank of the patch; larger edits are truncated and the error is reported."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    seed: int = 0
    """For randomised methods."""

    force: bool = False
    """Repair even what a manifest shows to be repaired already."""

    offline: bool = False
    """Resolve Hub ids from the local cache only."""

    cache_dir: str | Path | None = None
    """Where activation statistics are kept; None takes REALIGN_CACHE or the user's cache."""

    command: Sequence[str] = ()
    """The command line, for the manifest."""

    @property
    def named(self) -> dict[str, str]:
        """The checkpoints that were given beside the fine-tune, by role."""
        given = {role: getattr(self, role) for role in ROLES}
        return {role: str(source) for role, source in given.items() if source is not None}


@dataclass(frozen=True)
class Inputs:
    """The open checkpoints of one repair; their headers are read, their tensors are not."""

    finetuned: Checkpoint
    others: Mapping[str, Checkpoint]
    """By role: aligned, base, unaligned; those that were given."""

    def all(self) -> dict[str, Checkpoint]:
        """Every checkpoint by role, the fine-tune first."""
        return {"finetuned": self.finetuned, **self.others}


@contextmanager
def open_inputs(request: RepairRequest, *, progress: Progress = SILENT) -> Generator[Inputs]:
    """Open every checkpoint the request names, and close them at the end.

    An adapter given as the fine-tune stands on the aligned model, unless it is written
    BASE+ADAPTER. The others are shown in the fine-tune's layout (see `layouts.conform`).

    Raises:
        NotFoundError, HeaderError: a checkpoint that is not there or cannot be read.
    """
    with ExitStack() as stack:
        others: dict[str, Checkpoint] = {}
        for role, source in request.named.items():
            others[role] = stack.enter_context(
                open_checkpoint(source, offline=request.offline, progress=progress)
            )
        finetuned = stack.enter_context(
            open_checkpoint(
                str(request.finetuned),
                adapter_base=others.get("aligned"),
                offline=request.offline,
                progress=progress,
            )
        )
        yield Inputs(finetuned, {role: conform(each, finetuned) for role, each in others.items()})
