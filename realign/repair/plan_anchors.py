"""The anchors of a plan: which prompts they are, and whether their model can be asked.

Files decide; no model is loaded. Not here: asking it, which the workbench does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from realign.audit.anchors import CORE_ANCHORS, core_anchors
from realign.audit.contamination import overlap
from realign.audit.suite_sources import read_suites
from realign.audit.suites import Suite, load_suite
from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.chat_files import require_template, tokenizer_folder
from realign.checkpoint.layouts import original
from realign.checkpoint.reader import Checkpoint
from realign.errors import SuiteError, UsageError
from realign.repair.request import RepairRequest

MIN_ANCHORS = 16
"""Fewer refused anchors say too little about where refusal lives."""


@dataclass(frozen=True)
class PlannedAnchors:
    """The prompts on which the method measures activations."""

    name: str
    source: str
    suite_hash: str
    count: int


def load_anchors(source: str | Path | None) -> Suite:
    """The anchors: `core-anchors`, or a user's suite of any kind or plain JSONL.

    Raises:
        SuiteError: the file is missing or malformed.
    """
    if source is None or str(source) == CORE_ANCHORS:
        return core_anchors()
    try:
        return load_suite(source, numbered=True)
    except UsageError:  # no header: the items speak for themselves
        return load_suite(source, kind="anchors", numbered=True)


def plan_anchors(request: RepairRequest, aligned: Checkpoint) -> PlannedAnchors:
    """Check the anchors, and that the model which is to answer them can be asked.

    Raises:
        SuiteError: they are malformed, too few, or shared with a suite of this run.
        ModelError: the model has no tokenizer or no chat template.
    """
    suite = load_anchors(request.anchors)
    if len(suite.items) < MIN_ANCHORS:
        raise SuiteError(
            f"{suite.source}: {len(suite.items)} anchors are too few",
            f"give at least {MIN_ANCHORS} prompts that the aligned model refuses",
        )
    items = {item.id: item.prompt for item in suite.items}
    for audited in (
        suite for source in request.suites for suite in read_suites(source, offline=request.offline)
    ):
        shared = overlap(items, [item.prompt for item in audited.items])
        if shared.ids:
            raise SuiteError(
                f"the anchors share {shared.n_contaminated} prompts with the suite "
                f"{audited.name}, the first is {shared.ids[0]!r}",
                "calibrate on prompts that are not measured: take other anchors or another suite",
            )
    _require_answers(original(aligned))
    return PlannedAnchors(suite.name, suite.source, suite.suite_hash, len(suite.items))


def _require_answers(model: Checkpoint) -> None:
    if isinstance(model, AdapterCheckpoint):
        require_template(tokenizer_folder(model.base.folder, model.adapter_folder))
    else:
        require_template(tokenizer_folder(model.folder))
