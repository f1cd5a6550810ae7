"""`realign repair F1 F2 ...`: several fine-tunes of one family, shown together.

Here: plans and outcomes as documents and tables. Not here: the repairs (`realign.repair.several`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from realign_cli.imports import swift_imports
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from realign.repair.request import RepairRequest
    from realign.repair.several import Outcome


def show_plans(sink: Sink, request: RepairRequest, finetunes: Sequence[str]) -> None:
    """Print the plan of every repair."""
    with swift_imports():
        from rich.text import Text

        from realign.repair.several import plan_several
        from realign.report.repair import plan_tables

    plans = plan_several(request, finetunes, progress=sink.progress)
    sink.document({"plans": {name: each.to_json() for name, each in plans.items()}})
    for name, each in plans.items():
        for doubt in each.doubts:
            sink.warning(f"{name}: {doubt}")
        sink.show(Text(name, style="bold"), "", *plan_tables(each), "")


def run_all(
    sink: Sink,
    request: RepairRequest,
    finetunes: Sequence[str],
    *,
    attach: Callable[[Mapping[str, Any]], Mapping[str, bytes]],
) -> int | None:
    """Repair them one after the other; the exit code is that of the worst outcome."""
    with swift_imports():
        from realign.repair.several import repair_several

    outcomes = repair_several(request, finetunes, progress=sink.progress, attach=attach)
    failed = [each for each in outcomes if each.error is not None]
    code = max((each.error.exit_code for each in failed if each.error), default=0)
    reason = f"{len(failed)} of {len(outcomes)} failed" if failed else "done"
    sink.document(
        {
            "outputs": {each.name: _document(each) for each in outcomes},
            "exit": {"code": code, "reason": reason},
        }
    )
    _show(sink, outcomes)
    for each in failed:
        assert each.error is not None
        sink.fail(f"error: {each.source} was not repaired: {each.error.message}")
        if each.error.hint:
            sink.fail(f"  {each.error.hint}")
    return code or None


def _document(outcome: Outcome) -> dict[str, Any]:
    if outcome.result is None:
        assert outcome.error is not None
        error = {"message": outcome.error.message, "hint": outcome.error.hint}
        return {"source": outcome.source, "output": None, "error": error}
    return {
        "source": outcome.source,
        "output": str(outcome.result.output),
        "error": None,
        "manifest": dict(outcome.result.manifest),
    }


def _show(sink: Sink, outcomes: Sequence[Outcome]) -> None:
    from realign.report.tables import figures_table
    from realign.report.words import number

    rows: list[tuple[str, ...]] = []
    for each in outcomes:
        if each.result is None:
            rows.append((f"{each.name} (failed)", "-", "-", "-", "-"))
            continue
        totals = each.result.totals
        figures = number(totals.mean_rank, digits=1), number(totals.edit_norm)
        rows.append((each.name, str(totals.edited), str(totals.unchanged), *figures))
    titles = ("fine-tune", "edited", "unchanged", "mean rank", "edit norm")
    sink.show(figures_table(None, titles, rows, width=sink.out.width), "")
    for each in outcomes:
        if each.result is not None:
            sink.line(str(each.result.output))
