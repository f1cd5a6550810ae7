"""Opening the checkpoints of an audit, before any of them is loaded.

Whatever can be wrong with a model folder shows here: a missing file, a damaged header, no chat
template, another reference than the policy names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from realign.audit.canonical import sha256_json
from realign.audit.prepare import check_opened
from realign.audit.records import (
    KL_ITEMS,
    Demand,
    OpenedRole,
    RoleRecords,
    digest_of,
)
from realign.audit.request import AuditRequest
from realign.audit.schema import (
    FileEntry,
    ModelEntry,
    Role,
)
from realign.audit.state import AuditState
from realign.checkpoint.finite import check_finite
from realign.checkpoint.matching import check_architecture
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.model.chat import chat_template
from realign.model.loading import load_tokenizer
from realign.progress import Progress


def open_all(
    state: AuditState, stack: ExitStack, *, progress: Progress
) -> tuple[list[OpenedRole], Checkpoint | None]:
    """Open every checkpoint and check that it can be asked, before the first model is loaded."""
    request = state.prepared.request
    opened: list[OpenedRole] = []
    reference: Checkpoint | None = None
    found: dict[Role, Checkpoint] = {
        role: _open(source, stack, request=request, progress=progress)
        for role, source in request.sources().items()
    }
    for role, checkpoint in found.items():
        check_architecture(found["subject"], role, checkpoint)
        if role == "reference":
            reference = checkpoint
            check_opened(request, reference)
        chat_template(load_tokenizer(checkpoint))  # a missing template is an error here, not later
        check_finite(checkpoint.weight_files, progress=progress)
        files = checkpoint.file_hashes(progress)
        opened.append(OpenedRole(role, checkpoint, digest_of(files), files))
        state.models[role] = _model_entry(checkpoint, files)
    if reference is None:
        check_opened(request, None)
    base = None
    if request.base is not None:
        base = _open(request.base, stack, request=request, progress=progress)
        check_architecture(found["subject"], "base", base)
        state.models["base"] = _model_entry(base, base.file_hashes(progress))
    return opened, base


def _open(
    source: str | Path | Checkpoint,
    stack: ExitStack,
    *,
    request: AuditRequest,
    progress: Progress,
) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source  # the caller's, and his to close
    return stack.enter_context(open_checkpoint(source, offline=request.offline, progress=progress))


def demand_of(state: AuditState, opened: Sequence[OpenedRole]) -> Demand:
    """What is wanted of every model, given the suites, the judges and the tokenizers."""
    prepared = state.prepared
    request = prepared.request
    prompts = tuple(suite for suite in prepared.suites if suite.kind != "task")
    response_judges = {"oracle", "keyword", "exact-match"}
    wants_labels = any("logprob" in judges for judges in prepared.judges.values())
    texts = tuple(
        suite
        for suite in prepared.suites
        # The log-odds threshold is fitted on generated answers, so those suites are answered too.
        if response_judges & set(prepared.judges[suite.name]) or (wants_labels and suite in prompts)
    )
    digests = {sha256_json(load_tokenizer(each.checkpoint).get_vocab()) for each in opened}
    paired = len(opened) > 1 and any(each.role == "reference" for each in opened)
    return Demand(
        texts=texts,
        scored=prompts,
        per_byte=len(digests) > 1,
        kl=tuple(suite.limited(KL_ITEMS) for suite in prompts) if request.kl and paired else (),
    )


def _model_entry(checkpoint: Checkpoint, files: Mapping[str, str]) -> ModelEntry:
    config = checkpoint.config
    architectures: Any = config.get("architectures")
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    sizes = {path.name: path.stat().st_size for path in checkpoint.weight_files if path.is_file()}
    return ModelEntry(
        source=str(checkpoint.source),
        revision=checkpoint.commit,
        kind=checkpoint.kind,
        architecture=architectures[0] if architectures else config.get("model_type"),
        parameters=sum(info.numel for info in checkpoint.tensors.values()),
        dtype="/".join(sorted(dtypes)),
        content_digest=digest_of(files),
        content_digest_scope="listed",
        files=tuple(
            FileEntry(path=name, size=sizes.get(Path(name).name), sha256=sha)
            for name, sha in sorted(files.items())
        ),
        generation_config_sha256=files.get("generation_config.json"),
    )


def with_facts(entry: ModelEntry, records: RoleRecords) -> ModelEntry:
    """The report's entry with what the settings resolved to once the model ran."""
    facts = records.facts
    return entry.model_copy(
        update={
            "chat_template_sha256": facts["chat_template_sha256"],
            "stop_ids": tuple(facts["stop_ids"]),
            "tokenizer_digest": facts["tokenizer_digest"],
            "run_dtype": facts["dtype"],
            "attention": facts["attention"],
            "batch_size": facts["batch_size"],
            "reused": records.reused,
        }
    )
