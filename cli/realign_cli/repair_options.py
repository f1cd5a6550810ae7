"""The options of a repair: of `realign repair`, and of `realign tune`, which looks for one.

Here: names, help texts and panels, and the request that they make. Not here: what it does
(`commands/repair`), options that other commands share (`options`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realign_cli.command import FLAG
from realign_cli.options import (
    AUDIT_PANEL,
    TEXTS_PANEL,
    Aligned,
    Also,
    Base,
    Device,
    HarmfulData,
    KeepData,
    Offline,
    Offload,
    Pairs,
    Reference,
    SafeData,
    SafetyModel,
    Seed,
    TaskData,
    Unaligned,
)

if TYPE_CHECKING:
    from realign.repair.request import RepairRequest

METHOD_PANEL = "Method (realign methods NAME shows its parameters)"

FineTunes = Annotated[
    list[str],
    typer.Argument(
        metavar="FINETUNED...",
        help="The checkpoint to repair; of several, each gets a folder of its name in DIR.",
    ),
]
MethodName = Annotated[
    str,
    typer.Option("--method", "-m", metavar="NAME", help="How.", rich_help_panel=METHOD_PANEL),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A parameter of the method. May be repeated.",
        rich_help_panel=METHOD_PANEL,
    ),
]
Strength = Annotated[
    float,
    typer.Option(
        "--strength",
        "-t",
        metavar="T",
        help="How much of the edit is applied; 1 is the method as published.",
        rich_help_panel=METHOD_PANEL,
    ),
]
SafetyVector = Annotated[
    str | None,
    typer.Option(
        "--safety-vector",
        metavar="KIND",
        help="auto, unaligned (aligned - unaligned) or base (aligned - base).",
        rich_help_panel=METHOD_PANEL,
    ),
]
ScopeName = Annotated[
    str | None,
    typer.Option(
        "--scope",
        metavar="SCOPE",
        help="block_linear, matrices or all. (default: the method's)",
        rich_help_panel=METHOD_PANEL,
    ),
]
LayerList = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="LIST",
        help="Edit these decoder blocks only, as 0-5,8.",
        rich_help_panel=METHOD_PANEL,
    ),
]
ModuleList = Annotated[
    str | None,
    typer.Option(
        "--modules",
        metavar="LIST",
        help="Edit these kinds of modules only, as q_proj,v_proj; names of the Llama family "
        "stand for the same thing everywhere. (default: the method's)",
        rich_help_panel=METHOD_PANEL,
    ),
]
Anchors = Annotated[
    str | None,
    typer.Option(
        "--anchors",
        metavar="FILE",
        help="Prompts the aligned model refuses (JSONL). (default: core-anchors)",
        rich_help_panel=TEXTS_PANEL,
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", metavar=FLAG, help="Read headers only; print the plan."),
]
AsPatch = Annotated[
    bool,
    typer.Option(
        "--patch",
        metavar=FLAG,
        help="Write a LoRA adapter over the fine-tune, not a checkpoint; a fine-tune that is "
        "itself an adapter becomes one with the repair in it.",
    ),
]
MaxPatchRank = Annotated[
    int | None,
    typer.Option(
        "--max-patch-rank",
        metavar="R",
        help="Truncate edits of larger rank, also dense ones, and report the error. A bound of a "
        "matrix's full rank truncates nothing.",
    ),
]
Encode = Annotated[
    str | None,
    typer.Option(
        "--encode",
        metavar="KIND",
        help="compressed-tensors: store the repaired matrices as int8. (default: as FINETUNED)",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        metavar=FLAG,
        help="Repair again with the method that has repaired FINETUNED already. Another method "
        "before it is only remarked on.",
    ),
]
Audit = Annotated[
    bool,
    typer.Option(
        "--audit",
        metavar=FLAG,
        help="Audit the result first; write it only if the gates pass.",
        rich_help_panel=AUDIT_PANEL,
    ),
]
AuditOut = Annotated[
    Path | None,
    typer.Option(
        "--audit-out",
        metavar="DIR",
        help="Where the audit goes, also if gates fail. (default: OUT-audit)",
        rich_help_panel=AUDIT_PANEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Where a repair runs: a group, see `option_groups`."""

    device: Device = "auto"
    offload: Offload = False
    seed: Seed = 0
    offline: Offline = False


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """Every option that says what a repair computes: a group, see `option_groups`."""

    aligned: Aligned = None
    base: Base = None
    unaligned: Unaligned = None
    safety_model: SafetyModel = None
    reference: Reference = None
    also: Also = None
    method: MethodName = "lssf"
    settings: Settings = None
    safety_vector: SafetyVector = None
    scope: ScopeName = None
    layers: LayerList = None
    modules: ModuleList = None
    anchors: Anchors = None
    safe_data: SafeData = None
    harmful_data: HarmfulData = None
    task_data: TaskData = None
    keep_data: KeepData = None
    pairs: Pairs = None

    def request(self, finetuned: str, machine: MachineOptions, **more: Any) -> RepairRequest:
        """The request.

        Args:
            finetuned: the checkpoint to repair.
            machine: where it runs.
            more: further fields of the request.
        """
        from realign.repair.request import RepairRequest

        settings = list(self.settings or [])
        if self.safety_vector is not None:
            settings.append(f"safety_vector={self.safety_vector}")
        return RepairRequest(
            finetuned=finetuned,
            method=self.method,
            settings=settings,
            aligned=self.aligned,
            base=self.base,
            unaligned=self.unaligned,
            safety=self.safety_model,
            reference=self.reference,
            also=tuple(self.also or ()),
            safe_data=self.safe_data,
            harmful_data=self.harmful_data,
            task_data=self.task_data,
            keep_data=self.keep_data,
            pairs=self.pairs,
            layers=self.layers,
            modules=self.modules,
            scope=self.scope,
            anchors=self.anchors,
            device=machine.device,
            offload=machine.offload,
            seed=machine.seed,
            offline=machine.offline,
            command=("realign", *sys.argv[1:]),
            **more,
        )
