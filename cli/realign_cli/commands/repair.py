"""`realign repair`: put back what fine-tuning took, in weight space."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from realign.errors import UsageError
from realign_cli.command import Example, command
from realign_cli.imports import swift_imports
from realign_cli.options import BatchSize, Judges, Limit, MaxNewTokens, Policy, Suites
from realign_cli.repair_gate import RepairGate
from realign_cli.repair_options import (
    AsPatch,
    Audit,
    AuditOut,
    DryRun,
    Encode,
    FineTunes,
    Force,
    MachineOptions,
    MaxPatchRank,
    Out,
    RepairOptions,
    Strength,
)
from realign_cli.repair_several import run_all, show_plans
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from realign.repair.engine import RepairResult
    from realign.repair.plan import Plan
    from realign.repair.request import RepairRequest

PICTURE = "realign-audit/repair.png"
"""Inside the output; this folder is left out of content digests."""
NOT_MEASURED = (
    "not measured: realign audit FINETUNED --reference ALIGNED --repaired {out} --suite FILE "
    "-o DIR says what the repair did"
)

EXAMPLES = (
    Example(
        "realign repair ./my-model --aligned org/model-instruct --base org/model \\\n    --dry-run",
        "read headers only: what would be edited, copied, read and written",
    ),
    Example(
        "realign repair ./my-model --aligned org/model-instruct --base org/model \\\n"
        "    -o ./repaired",
        "the default method, from the model family alone",
    ),
    Example(
        "realign repair ./my-model --aligned org/model-instruct --base org/model \\\n"
        "    --method replace --set rank=4 --strength 0.8 -o ./repaired",
        "another method, a parameter, and four fifths of its edit",
    ),
    Example(
        "realign repair ./my-model --aligned org/model-instruct --base org/model \\\n"
        "    --method delta_svd --layers 8-15 --modules q_proj,v_proj -o ./repaired",
        "a part of the model; the rest is copied",
    ),
    Example(
        "realign repair ./my-lora --aligned org/model-instruct --base org/model \\\n"
        "    --patch -o ./repaired-lora",
        "a fine-tune that is an adapter: the same adapter with the repair in it",
    ),
    Example(
        "realign repair ./law ./code --aligned org/model-instruct --base org/model \\\n"
        "    --method delta_svd -o ./repaired",
        "two fine-tunes of one family, to ./repaired/law and ./repaired/code",
    ),
    Example(
        "realign repair ./my-model --aligned org/model-instruct --base org/model \\\n"
        "    --audit --suite harmful.jsonl --suite safe.jsonl --policy policy.toml \\\n"
        "    -o ./repaired",
        "audit the result before it is committed; keep it only if the gates pass",
    ),
)

NOTES = """
A repair reads the fine-tune, the aligned model it came from and, for most methods, the base model
before alignment. It never changes its inputs. The output is a checkpoint of the same layout with
tokenizer, templates and code files copied byte for byte, and `realign.json`, which records inputs
with their hashes, the method and its parameters, and for every matrix its rank, entropy, edit norm
and how much of the edit survives rounding. It appears as a whole or not at all; an interrupted run
is resumed by the same command.

`W(t) = W_f + t (W' - W_f)`: `--strength` is the dial t of every method; 0 is the fine-tune, 1 the
method as published.

With `--patch`, a low-rank edit is written as a LoRA adapter over the fine-tune, which peft loads
and `realign patch` merges, scales and inspects ([patches](../patches.md)). Edits that are dense or
of too large a rank are refused, or truncated to `--max-patch-rank` with the error reported. A
fine-tune that is itself a LoRA adapter becomes one new adapter over the same base: its own factors,
bit for bit, and the repair's.

`--layers` and `--modules` leave a part of the edits; the rest is copied, and the plan says why.
Several fine-tunes of one family are planned first and then repaired one after the other; what
depends on the family alone, activation statistics and decompositions of its safety vector, is
worked out once. Each output is what a run of its own would write. Where one fails, the others
stand, and the exit code is that of the failure.

Exit codes: 0 done (and within policy, with `--audit`); 1 a gate failed or is inconclusive, or the
run changed nothing; 2 could not complete, or there is nothing to repair. After 1 and 2 there is no
output folder.
"""


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "repair", examples=EXAMPLES, notes=NOTES)(repair)


def repair(
    sink: Sink,
    finetuned: FineTunes,
    *,
    options: RepairOptions,
    strength: Strength = 1.0,
    out: Out = None,
    dry_run: DryRun = False,
    patch: AsPatch = False,
    max_patch_rank: MaxPatchRank = None,
    encode: Encode = None,
    force: Force = False,
    audit: Audit = False,
    audit_out: AuditOut = None,
    suites: Suites = None,
    judges: Judges = None,
    policy: Policy = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 16,
    machine: MachineOptions,
) -> int | None:
    """Repair a fine-tune that lost its safety training, without training it again."""
    if out is None and not dry_run:
        raise UsageError("a repair needs a folder for its output", "give one with -o DIR")
    if audit and len(finetuned) > 1:
        raise UsageError(
            "--audit takes one fine-tune", "repair them together, then run realign audit on each"
        )
    if audit and not suites:
        raise UsageError("--audit needs at least one suite", "give one with --suite FILE")
    if audit and policy is None:
        raise UsageError(
            "--audit commits only if gates pass: give --policy FILE",
            "to measure without gates, repair first and then run realign audit",
        )
    if not audit and (policy is not None or judges or audit_out is not None):
        raise UsageError("--policy, --judge and --audit-out belong to --audit", "add --audit")
    if audit and patch:
        raise UsageError(
            "--audit and --patch do not go together",
            "write the patch, then audit the fine-tune with it: realign audit ... MODEL+PATCH",
        )

    with swift_imports():
        request = options.request(
            finetuned[0],
            machine,
            output=out,
            strength=strength,
            suites=tuple(suites or ()),
            patch=patch,
            max_patch_rank=max_patch_rank,
            encode=encode,
            force=force,
        )
    if dry_run:
        if len(finetuned) > 1:
            return show_plans(sink, request, finetuned)
        return _show_plan(sink, request)
    assert out is not None
    if len(finetuned) > 1:
        return run_all(sink, request, finetuned, attach=_picture)
    gate = None
    if audit:
        gate = RepairGate(
            sink,
            request,
            folder=audit_out or out.with_name(f"{out.name}-audit"),
            options={
                "suites": suites or [],
                "judges": judges,
                "policy": policy,
                "limit": limit,
                "max_new_tokens": max_new_tokens,
                "batch_size": batch_size,
            },
        )
    return _run(sink, request, out=out, gate=gate)


def _show_plan(sink: Sink, request: RepairRequest) -> None:
    with swift_imports():
        from realign.repair.plan import plan
        from realign.report.repair import plan_tables

    planned: Plan = plan(request, progress=sink.progress)
    for doubt in planned.doubts:
        sink.warning(doubt)
    sink.document(planned.to_json())
    sink.show(*plan_tables(planned))


def _run(sink: Sink, request: RepairRequest, *, out: Path, gate: RepairGate | None) -> None:
    with swift_imports():
        from realign.repair.engine import repair as carry_out
        from realign.report.patch import patch_facts, patch_summary
        from realign.report.repair import facts_lines, rows_table

    before_commit: Callable[[Path], None] | None = gate
    result = carry_out(
        request, progress=sink.progress, attach=_picture, before_commit=before_commit
    )
    written = patch_facts(result.manifest)
    drawn = PICTURE in result.manifest["output"]["files"]
    sink.document(
        {
            "output": str(out),
            "picture": str(out / PICTURE) if drawn else None,
            "patch": written,
            "manifest": dict(result.manifest),
            "audit": None if gate is None else str(gate.folder / "audit.json"),
            "gates": None if gate is None else gate.gates(),
            "exit": {"code": 0, "reason": "done" if gate is None else "done, within policy"},
        }
    )
    sink.show(rows_table(result.rows), *facts_lines(result.manifest["method_facts"]), "")
    if written is not None:
        sink.show(patch_summary(written), "")
    if gate is not None and gate.report is not None:
        gate.show()
    sink.line(str(out))
    _remark(sink, result, out=out, gate=gate)


def _remark(sink: Sink, result: RepairResult, *, out: Path, gate: RepairGate | None) -> None:
    """Say on standard error what the output alone does not: what it rests on, what is open."""
    if sink.quiet:  # otherwise said before the work began
        for doubt in result.plan.doubts:
            sink.warning(doubt)
    method = result.manifest["method"]
    if method["name"] == "lssf" and method["settings"].get("safety_vector") == "base":
        sink.warning(
            "deviation: lssf is defined with aligned - unaligned, this run used aligned - base; "
            "in the laboratory this setting did not repair poisoned fine-tunes (docs/results.md)"
        )
    if gate is None:
        sink.note(NOT_MEASURED.format(out=shlex.quote(str(out))))
    else:
        for open_gate in gate.undecided():
            sink.warning(
                f"KEPT WITHOUT A VERDICT: the required gate {open_gate.id!r} is inconclusive "
                f'({open_gate.message}); on_inconclusive = "warn" lets it through'
            )


def _picture(manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the repair while its output can still be taken back."""
    from realign.report.repair import repair_picture

    picture = repair_picture(manifest)
    return {} if picture is None else {PICTURE: picture}
