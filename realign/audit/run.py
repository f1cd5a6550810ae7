"""The audit from request to report: prepare, collect, judge, compare, gate, write.

Prompts go in, `audit.json` and `items.jsonl` come out. The models run one at a time; what they say
is stored as it comes, so that an interrupted audit goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress

from realign.audit.assembly import complete_report, incomplete_report
from realign.audit.collect import Collector
from realign.audit.opening import demand_of, open_all, with_facts
from realign.audit.prepare import check_folder, prepare, prepare_folder
from realign.audit.records import OpenedRole
from realign.audit.request import AuditRequest
from realign.audit.schema import (
    Report,
    Role,
    write_report,
)
from realign.audit.state import AuditState, timestamp
from realign.audit.store import RecordStore
from realign.audit.weights import measure_weights
from realign.checkpoint.reader import Checkpoint
from realign.errors import OutputError
from realign.progress import SILENT, Progress

__all__ = ["REPORT_NAME", "AuditRequest", "run_audit"]

REPORT_NAME = "audit.json"


def run_audit(request: AuditRequest, *, progress: Progress = SILENT) -> Report:
    """Run an audit and write `audit.json` and `items.jsonl` into `request.out`.

    The report's `exit_code` is 0 within policy (or without one) and 1 if a required gate failed or
    is inconclusive. An error is raised, after a report with status `incomplete` and exit code 2 was
    written, if anything could run at all.

    Raises:
        UsageError, SuiteError, PolicyError: the request does not fit together; nothing was written.
        CheckpointError, ModelError: a model cannot be read or asked.
        OutputError: the folder cannot be written, is not an audit's, or another audit is using it.
    """
    state = AuditState(prepared=prepare(request), started=timestamp())
    check_folder(request)
    with ExitStack() as stack:
        opened, base = open_all(state, stack, progress=progress)
        is_new = not request.out.exists()
        prepare_folder(request.out)
        store = RecordStore(request.records or request.out)
        try:
            with store.locked():
                report = _run(state, store, opened, base=base, progress=progress)
        except BaseException:
            if is_new:
                with suppress(OSError):  # only an empty folder goes
                    request.out.rmdir()
            raise
    return report


def _run(
    state: AuditState,
    store: RecordStore,
    opened: Sequence[OpenedRole],
    *,
    base: Checkpoint | None,
    progress: Progress,
) -> Report:
    """The audit of opened models, in a folder that is locked."""
    request = state.prepared.request
    try:
        _collect(state, store, opened, base=base, progress=progress)
        report = complete_report(state, progress=progress)
    except BaseException as error:
        if not store.has_answers():
            if request.records is None:
                store.remove()
            raise
        error.add_note(
            f"answers so far are kept in {store.folder}, readable by you only; the same "
            "command goes on from there"
        )
        if isinstance(error, Exception):
            with suppress(OutputError):  # on a full disk the first error is the one to show
                write_report(incomplete_report(state, error), request.out / REPORT_NAME)
        raise
    write_report(report, request.out / REPORT_NAME)
    if not request.keep_texts and request.records is None:
        store.remove()
    return report


def _collect(
    state: AuditState,
    store: RecordStore,
    opened: Sequence[OpenedRole],
    *,
    base: Checkpoint | None,
    progress: Progress,
) -> None:
    request = state.prepared.request
    demand = demand_of(state, opened)
    with Collector(request, demand, store, progress=progress) as collector:
        for index, role in enumerate(opened):
            later = opened[index + 1 :]
            records = collector.collect(role, followers=later if demand.kl else ())
            state.records[role.role] = records
            state.models[role.role] = with_facts(state.models[role.role], records)
            state.device = str(records.facts["device"])
    by_role: dict[Role, Checkpoint] = {role.role: role.checkpoint for role in opened}
    subjects: dict[Role, Checkpoint] = {
        role: found for role, found in by_role.items() if role != "reference"
    }
    if not request.weights:
        return
    if "reference" not in by_role:
        state.weights = "there is no reference"
        return
    state.weights = measure_weights(
        reference=by_role["reference"],
        subjects=subjects,
        base=base,
        progress=progress,
    )
