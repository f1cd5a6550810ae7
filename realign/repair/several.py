"""Several fine-tunes of one family repaired in one run, each to a folder of its own.

All are planned before the first is repaired. What depends on the family alone is worked out once:
activation statistics through the cache, decompositions of safety vectors through a folder that
lives as long as the run. Every output is what a run of its own would have written, bit for bit.
Here: names, order, and what becomes of a failure. Not here: one repair (`engine`).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from realign.checkpoint.reference import parse_reference
from realign.errors import OutputError, RealignError, UsageError
from realign.progress import SILENT, Progress
from realign.repair.cache import cache_folder
from realign.repair.decompositions import Decompositions
from realign.repair.engine import Attach, RepairResult, repair
from realign.repair.plan import Plan, plan
from realign.repair.request import RepairRequest


@dataclass(frozen=True)
class Outcome:
    """What became of one fine-tune."""

    name: str
    """Of its folder in the output."""
    source: str
    result: RepairResult | None
    error: RealignError | None
    """Why there is no result."""


def output_names(sources: Sequence[str | Path]) -> list[str]:
    """The folder that each fine-tune gets: the last part of its path or Hub id.

    Raises:
        UsageError: two of them would get the same; names both.
    """
    names = [_name_of(str(source)) for source in sources]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        both = [str(s) for s, name in zip(sources, names, strict=True) if name == twice[0]]
        raise UsageError(
            f"{both[0]} and {both[1]} would both be written to the folder {twice[0]}",
            "give them different names, or repair them one after the other",
        )
    return names


def several_requests(
    request: RepairRequest, finetunes: Sequence[str | Path]
) -> dict[str, RepairRequest]:
    """One request per fine-tune, by the name of its folder.

    Args:
        request: what all have in common; its fine-tune is not read, its output is the folder that
            holds all.
        finetunes: the checkpoints to repair.

    Raises:
        UsageError: two would get the same name.
    """
    out = request.output
    return {
        name: replace(request, finetuned=source, output=None if out is None else Path(out) / name)
        for name, source in zip(output_names(finetunes), finetunes, strict=True)
    }


def plan_several(
    request: RepairRequest, finetunes: Sequence[str | Path], *, progress: Progress = SILENT
) -> dict[str, Plan]:
    """Plan every repair; the plans by name.

    Raises:
        RealignError: as `plan`, for the first fine-tune that cannot be repaired; names it.
    """
    plans: dict[str, Plan] = {}
    for name, each in several_requests(request, finetunes).items():
        try:
            plans[name] = plan(each, progress=progress)
        except RealignError as error:
            raise type(error)(f"{each.finetuned}: {error.message}", error.hint) from error
    return plans


def repair_several(
    request: RepairRequest,
    finetunes: Sequence[str | Path],
    *,
    progress: Progress = SILENT,
    attach: Attach | None = None,
) -> tuple[Outcome, ...]:
    """Repair every fine-tune; a failure of one leaves the others' outputs whole.

    Args:
        request: see `several_requests`.
        finetunes: the checkpoints to repair.
        progress: shows what is being done.
        attach: see `engine.repair`.

    Raises:
        RealignError: one of them cannot be repaired for reasons that headers show; nothing is
            written then.
    """
    if request.output is None:
        raise UsageError("the repairs have no output folder", "give one: -o FOLDER")
    plan_several(request, finetunes, progress=progress)
    out = Path(request.output).expanduser()
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be made ({error.strerror})", "choose another -o"
        ) from error
    outcomes: list[Outcome] = []
    try:
        cache = cache_folder(request.cache_dir)
        with tempfile.TemporaryDirectory(prefix="family-", dir=cache) as folder:
            shared = Decompositions(Path(folder))
            for name, each in several_requests(request, finetunes).items():
                progress.note(f"{name}: {each.finetuned}")
                found: RepairResult | RealignError
                try:
                    found = repair(each, progress=progress, attach=attach, decompositions=shared)
                except RealignError as error:
                    found = error
                outcomes.append(_outcome(name, each, found))
    finally:
        if made:
            with suppress(OSError):  # it holds a repair
                out.rmdir()
    return tuple(outcomes)


def _outcome(name: str, request: RepairRequest, found: RepairResult | RealignError) -> Outcome:
    failed = isinstance(found, RealignError)
    return Outcome(
        name,
        str(request.finetuned),
        result=None if failed else found,
        error=found if failed else None,
    )


def _name_of(source: str) -> str:
    reference = parse_reference(source)
    text = reference.adapter or reference.text
    name = Path(text.rstrip("/")).name.partition("@")[0]
    return name if name not in {"", ".", ".."} else Path(text).resolve().name
