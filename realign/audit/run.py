"""The audit from request to report: prepare, collect, judge, compare, gate, write.

Prompts go in, `audit.json` and `items.jsonl` come out. The models run one at a time; what they say
is stored as it comes, so that an interrupted audit goes on where it stopped.
"""

from __future__ import annotations

from contextlib import ExitStack

from realign.audit.assembly import complete_report, incomplete_report
from realign.audit.collect import Collector
from realign.audit.opening import demand_of, open_all, with_facts
from realign.audit.prepare import prepare, prepare_folder
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
        OutputError: the folder cannot be written, or another audit is using it.
    """
    state = AuditState(prepared=prepare(request), started=timestamp())
    prepare_folder(request.out)
    store = RecordStore(request.records or request.out)
    with ExitStack() as stack:
        stack.enter_context(store.locked())
        try:
            _collect(state, store, stack, progress=progress)
            report = complete_report(state, progress=progress)
        except Exception as error:
            write_report(incomplete_report(state, error), request.out / REPORT_NAME)
            raise
        write_report(report, request.out / REPORT_NAME)
        if not request.keep_texts and request.records is None:
            store.remove()
    return report


def _collect(
    state: AuditState, store: RecordStore, stack: ExitStack, *, progress: Progress
) -> None:
    request = state.prepared.request
    opened, base = open_all(state, stack, progress=progress)
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
