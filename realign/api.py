"""The public functions: repair, repair_several, plan, audit, diff, open_checkpoint.

Each wraps one entry point of a room and takes plain values: paths, names, numbers. Everything heavy
is imported inside the functions, so that `import realign` costs nothing and `realign --help` is
fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realign.progress import SILENT, Progress

if TYPE_CHECKING:
    from realign.audit.policy import Policy
    from realign.audit.schema import Report
    from realign.audit.suites import Suite
    from realign.checkpoint.reader import Checkpoint
    from realign.diff.result import Difference
    from realign.repair.engine import RepairResult
    from realign.repair.plan import Plan
    from realign.repair.several import Outcome


def repair(
    finetuned: str | Path,
    *,
    out: str | Path,
    aligned: str | Path | None = None,
    base: str | Path | None = None,
    unaligned: str | Path | None = None,
    safety: str | Path | None = None,
    reference: str | Path | None = None,
    also: Sequence[str | Path] = (),
    method: str = "lssf",
    settings: Mapping[str, Any] | None = None,
    strength: float = 1.0,
    strengths: Mapping[int, float] | None = None,
    scope: str | None = None,
    layers: str | None = None,
    modules: str | None = None,
    anchors: str | Path | None = None,
    safe_data: str | Path | None = None,
    harmful_data: str | Path | None = None,
    task_data: str | Path | None = None,
    keep_data: str | Path | None = None,
    pairs: str | Path | None = None,
    patch: bool = False,
    max_patch_rank: int | None = None,
    encode: str | None = None,
    device: str = "auto",
    offload: bool = False,
    seed: int = 0,
    force: bool = False,
    offline: bool = False,
    progress: Progress = SILENT,
) -> RepairResult:
    """Repair a fine-tune in weight space and write the result.

    Args:
        finetuned: the checkpoint to repair: a folder, "org/name", "org/name@revision" or
            "MODEL+ADAPTER". Never changed.
        out: the folder to write; must not exist. It appears as a whole or not at all.
        aligned: the aligned model the fine-tune was tuned from; nearly every method needs it.
        base: the model before alignment.
        unaligned: the aligned model after a deliberate un-alignment.
        safety: the aligned model after a fine-tune on safe data.
        reference: a model whose safety is stronger than the aligned one's.
        also: other fine-tunes of the aligned model, for methods that fuse several.
        method: a name that `realign methods` lists, as "lssf" or "replace".
        settings: the method's parameters, as {"eta": 0.85}.
        strength: the dial t of W(t) = W_f + t (W' - W_f).
        strengths: dials of single decoder blocks, as {0: 0.5}; the others have `strength`.
        scope: "block_linear", "matrices" or "all"; None takes the method's default.
        layers: decoder blocks to edit, as "0-5,8"; None: all.
        modules: kinds of modules to edit, as "q_proj,v_proj"; None takes the method's own.
        anchors: prompts that the aligned model refuses; None takes those that realign ships.
        safe_data: a file of prompts with refusals; where a method needs them and none are given,
            the aligned model answers the anchors.
        harmful_data: a file of harmful prompts with compliant answers.
        task_data: a file of rows of the downstream task.
        keep_data: a file of benign prompts whose answers must stay.
        pairs: a file of prompts with a chosen and a rejected answer.
        patch: write a LoRA adapter over the fine-tune instead of a checkpoint.
        max_patch_rank: truncate the patch to this rank, and report the error.
        encode: "compressed-tensors" stores the repaired matrices as int8; None: as they were.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        offload: read a model that is measured block by block instead of holding it.
        seed: of randomised methods.
        force: repair what a manifest shows to be repaired already.
        offline: resolve Hub ids from the local cache only.
        progress: shows what is being done.

    Returns:
        The folder, one row per edited matrix, and the manifest.

    Raises:
        RealignError: anything the caller can cause; see `realign.errors`. Nothing is left behind.
    """
    from realign.repair.engine import repair as carry_out

    request = _repair_request(
        finetuned,
        output=out,
        aligned=aligned,
        base=base,
        unaligned=unaligned,
        safety=safety,
        reference=reference,
        also=tuple(also),
        method=method,
        settings=settings or {},
        strength=strength,
        strengths=strengths,
        scope=scope,
        layers=layers,
        modules=modules,
        anchors=anchors,
        safe_data=safe_data,
        harmful_data=harmful_data,
        task_data=task_data,
        keep_data=keep_data,
        pairs=pairs,
        patch=patch,
        max_patch_rank=max_patch_rank,
        encode=encode,
        device=device,
        offload=offload,
        seed=seed,
        force=force,
        offline=offline,
    )
    return carry_out(request, progress=progress)


def repair_several(
    finetuned: Sequence[str | Path],
    *,
    out: str | Path,
    method: str = "lssf",
    settings: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> tuple[Outcome, ...]:
    """Repair several fine-tunes of one family; what depends on the family is worked out once.

    Args:
        finetuned: the checkpoints to repair, as for `repair`.
        out: the folder that gets one folder for each, of the last part of its path or Hub id.
        method: as for `repair`.
        settings: as for `repair`.
        progress: shows what is being done.
        **options: any other option of `repair`.

    Returns:
        For each fine-tune its result, or the error that it ended with; the others are whole.

    Raises:
        RealignError: one of them cannot be repaired for reasons that headers show, or two would get
            the same folder; nothing is written then.
    """
    from realign.repair.several import repair_several as carry_out

    request = _repair_request("", output=out, method=method, settings=settings or {}, **options)
    return carry_out(request, list(finetuned), progress=progress)


def plan(
    finetuned: str | Path,
    *,
    aligned: str | Path | None = None,
    out: str | Path | None = None,
    base: str | Path | None = None,
    unaligned: str | Path | None = None,
    method: str = "lssf",
    settings: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> Plan:
    """Say what `repair` would do, from headers and JSON alone.

    Args:
        finetuned: as for `repair`.
        aligned: as for `repair`.
        out: as for `repair`; None leaves the target unchecked.
        base: as for `repair`.
        unaligned: as for `repair`.
        method: as for `repair`.
        settings: as for `repair`.
        progress: shows what is being done.
        **options: any other option of `repair`.

    Returns:
        Every tensor with what would happen to it and why, and estimates of bytes and memory.

    Raises:
        RealignError: as `repair`, for every reason that headers show.
    """
    from realign.repair.plan import plan as decide

    request = _repair_request(
        finetuned,
        output=out,
        aligned=aligned,
        base=base,
        unaligned=unaligned,
        method=method,
        settings=settings or {},
        **options,
    )
    return decide(request, progress=progress)


def audit(
    subject: str | Path,
    *,
    suites: Sequence[str | Path | Suite],
    out: str | Path,
    reference: str | Path | None = None,
    repaired: str | Path | None = None,
    base: str | Path | None = None,
    judges: Sequence[str] = (),
    policy: str | Path | Policy | None = None,
    device: str = "auto",
    seed: int = 0,
    offline: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> Report:
    """Measure a fine-tune against its aligned reference, before and after a repair.

    Args:
        subject: the fine-tuned checkpoint, as for `repair`.
        suites: files or suites of kind harmful, safe or task; "kind=path" for a file without a
            header.
        out: the folder for `audit.json`, `items.jsonl`, `report.html` and `pictures/`.
        reference: the aligned model; nothing is compared without it.
        repaired: the output of a repair of `subject`.
        base: the model before alignment, for the comparison of weights.
        judges: names, the primary first; empty takes those of the policy, or fitting ones.
        policy: declared margins and gates; without one there are no verdicts.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        seed: of the resampling.
        offline: resolve Hub ids from the local cache only.
        progress: shows what is being done.
        **options: any other field of `realign.audit.request.AuditRequest`, as `limit` or
            `batch_size`.

    Returns:
        The report; its `exit_code` is 1 if a required gate did not pass.

    Raises:
        RealignError: anything the caller can cause; see `realign.errors`.
    """
    from realign.audit.policy import Policy, load_policy
    from realign.audit.request import AuditRequest
    from realign.audit.run import run_audit
    from realign.audit.suite_sources import read_suites
    from realign.audit.suites import Suite
    from realign.checkpoint.manifest import read_manifest
    from realign.report.files import write_report_files

    def read(source: str | Path | Suite) -> tuple[Suite, ...]:
        return (source,) if isinstance(source, Suite) else read_suites(source, offline=offline)

    request = AuditRequest(
        subject=subject,
        suites=tuple(suite for source in suites for suite in read(source)),
        out=Path(out),
        reference=reference,
        repaired=repaired,
        base=base,
        judges=tuple(judges),
        policy=policy if policy is None or isinstance(policy, Policy) else load_policy(policy),
        device=device,
        seed=seed,
        offline=offline,
        **options,
    )
    report = run_audit(request, progress=progress)
    manifest = None
    if repaired is not None and Path(repaired).is_dir():
        manifest = read_manifest(Path(repaired))
    write_report_files(report, request.out, manifest=manifest)
    return report


def diff(
    a: str | Path,
    b: str | Path,
    *,
    reference: str | Path | None = None,
    spectra: bool | None = None,
    directions: int = 8,
    only: Sequence[str] = (),
    offline: bool = False,
    progress: Progress = SILENT,
) -> Difference:
    """Show what changed between two checkpoints, tensor by tensor, streamed.

    Args:
        a: the first checkpoint, as for `repair`; relative change is relative to it.
        b: the second.
        reference: a third one R, usually an ancestor of A: also give cos(B - A, A - R).
        spectra: decompose the change of every matrix (True), of none (False), or of those whose
            smaller side is at most 256 (None).
        directions: singular values to keep of each matrix.
        only: patterns of tensor names with * and ?; empty takes all.
        offline: resolve Hub ids from the local cache only.
        progress: shows bytes compared.

    Returns:
        One row per tensor, sums per layer and module, and the small files that differ.

    Raises:
        RealignError: a checkpoint cannot be read, or the architectures differ.
    """
    from contextlib import ExitStack

    from realign.checkpoint.reader import open_checkpoint as open_by_headers
    from realign.diff.compare import compare

    with ExitStack() as stack:
        one, two, third = (
            None
            if each is None
            else stack.enter_context(open_by_headers(each, offline=offline, progress=progress))
            for each in (a, b, reference)
        )
        assert one is not None and two is not None
        return compare(
            one,
            two,
            reference=third,
            spectra="small" if spectra is None else "all" if spectra else "none",
            directions=directions,
            only=only,
            progress=progress,
        )


def open_checkpoint(
    source: str | Path, *, offline: bool = False, progress: Progress = SILENT
) -> Checkpoint:
    """Open a checkpoint: headers are read, tensors when asked for.

    Args:
        source: a folder, "org/name", "org/name@revision" or "MODEL+ADAPTER".
        offline: resolve Hub ids from the local cache only.
        progress: shows a download.

    Returns:
        The checkpoint; use it as a context manager.

    Raises:
        RealignError: it is not there, cannot be read, or is no model.
    """
    from realign.checkpoint.reader import open_checkpoint as open_by_headers

    return open_by_headers(source, offline=offline, progress=progress)


def _repair_request(finetuned: str | Path, **values: Any) -> Any:
    from realign.errors import UsageError
    from realign.repair.request import RepairRequest

    unknown = sorted(set(values) - set(RepairRequest.__dataclass_fields__))
    if unknown:
        raise UsageError(f"there is no option {unknown[0]!r}", "see help(realign.repair)")
    return RepairRequest(finetuned=finetuned, **values)
