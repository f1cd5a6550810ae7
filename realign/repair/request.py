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
from realign.repair.method import Method, Role
from realign.repair.preparation import Data

ROLES: tuple[Role, ...] = ("aligned", "base", "unaligned", "safety", "reference")
"""Checkpoints beside the fine-tune, each given once."""

ROLE_OPTIONS = {role: f"--{role}" for role in ROLES} | {"safety": "--safety-model"}

ALSO = "also"
"""Other fine-tunes have the roles also1, also2, ... in the order in which they were given."""


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

    safety: str | Path | None = None
    """The aligned model after a fine-tune on safe data."""

    reference: str | Path | None = None
    """A model whose safety is stronger than the aligned one's."""

    also: Sequence[str | Path] = ()
    """Other fine-tunes of the aligned model, for methods that fuse several."""

    safe_data: str | Path | None = None
    """Prompts with refusals; see `realign.repair.texts` for the shapes of all texts."""

    harmful_data: str | Path | None = None
    """Harmful prompts with compliant answers."""

    task_data: str | Path | None = None
    """Rows of the downstream task."""

    keep_data: str | Path | None = None
    """Benign prompts whose answers must stay."""

    pairs: str | Path | None = None
    """Prompts with a chosen and a rejected answer."""

    layers: str | None = None
    """Decoder blocks to edit, as "0-5,8"; None: all."""

    modules: str | None = None
    """Kinds of modules to edit, as "q_proj,v_proj"; None: those of the method."""

    scope: str | None = None
    """block_linear, matrices or all; None takes the method's default."""

    strength: float = 1.0
    """The dial t of W(t) = W_f + t (W' - W_f)."""

    strengths: Mapping[int, float] | None = None
    """Dials of single decoder blocks; those not named, and what stands outside, get `strength`."""

    anchors: str | Path | None = None
    """Prompts on which activations are measured; None takes `core-anchors`."""

    suites: Sequence[str | Path] = ()
    """Suites audited in the same run: the anchors must share no prompt with them."""

    patch: bool = False
    """Write a LoRA adapter over the fine-tune instead of a checkpoint."""

    max_patch_rank: int | None = None
    """Largest rank of the patch; larger edits are truncated and the error is reported."""

    encode: str | None = None
    """How the output's weights are stored: None as the fine-tune's, or "compressed-tensors"."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    offload: bool = False
    """Read the weights of a model that is run block by block instead of holding it."""

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
        found = {role: str(source) for role, source in given.items() if source is not None}
        others = enumerate(self.also, start=1)
        return found | {f"{ALSO}{number}": str(source) for number, source in others}

    @property
    def texts(self) -> dict[Data, str | Path]:
        """The files of texts that were given, by what they are for."""
        given: dict[Data, str | Path | None] = {
            "safe": self.safe_data,
            "harmful": self.harmful_data,
            "task": self.task_data,
            "keep": self.keep_data,
            "pairs": self.pairs,
        }
        return {data: source for data, source in given.items() if source is not None}


@dataclass(frozen=True)
class Inputs:
    """The open checkpoints of one repair; their headers are read, their tensors are not."""

    finetuned: Checkpoint
    others: Mapping[str, Checkpoint]
    """By role, as `RepairRequest.named`."""

    def all(self) -> dict[str, Checkpoint]:
        """Every checkpoint by role, the fine-tune first."""
        return {"finetuned": self.finetuned, **self.others}


@contextmanager
def open_inputs(request: RepairRequest, *, progress: Progress = SILENT) -> Generator[Inputs]:
    """Open every checkpoint the request names, and close them at the end.

    An adapter stands on the aligned model, unless it is written BASE+ADAPTER or is the base. The
    others are shown in the fine-tune's layout (see `layouts.conform`).

    Raises:
        NotFoundError, HeaderError: a checkpoint that is not there or cannot be read.
    """
    with ExitStack() as stack:
        others: dict[str, Checkpoint] = {}
        for role, source in request.named.items():
            others[role] = stack.enter_context(
                open_checkpoint(
                    source,
                    adapter_base=None if role in {"aligned", "base"} else others.get("aligned"),
                    offline=request.offline,
                    progress=progress,
                )
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
