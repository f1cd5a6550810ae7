"""A report on a terminal: headline, rates, verdicts, gates, limits, as rich renderables.

Returns renderables and prints nothing; the command line's sink does. Every table fits 80 columns
and reads without colour.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from realign.audit.schema import GateEntry, Report
from realign.report.tables import plain_table
from realign.report.view import (
    Cell,
    Column,
    VerdictRow,
    columns_of,
    deciding_comparison,
    rate_rows,
    verdict_rows,
)
from realign.report.words import (
    VERDICTS,
    difference,
    difference_range,
    margin,
    percent,
    percent_range,
    reason,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_VERDICT_STYLES = {"drift": "bold red", "within_margin": "green", "inconclusive": "yellow"}
_QUIET_FLAGS = frozenset({"equivalent", "detectable"})
"""Refinements of a verdict that the page explains and a terminal leaves out."""
_GATE_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "skipped": "dim"}
_WIDE_ENOUGH_FOR_ONE_LINE = 30
"""Columns a table needs for each model to show a rate and its interval on one line."""


def render(report: Report, *, width: int = 80) -> tuple[RenderableType, ...]:
    """Return the whole report, top to bottom, for a terminal of `width` columns."""
    from rich.text import Text

    parts: list[RenderableType] = []
    if report.run.status != "complete":
        parts.append(Text("INCOMPLETE: this run has no result that counts", style="bold red"))
    parts += [Text(sentence, style="bold") for sentence in report.summary.headline]
    parts += ["", rates_table(columns_of(report), width=width)]
    if verdict_rows(report):
        parts += ["", verdicts_table(report)]
    if report.gates:
        parts += ["", gates_table(report.gates)]
    parts += ["", *(Text(line, style="dim") for line in _closing_lines(report))]
    return tuple(parts)


def rates_table(
    columns: Sequence[Column],
    *,
    title: str = "",
    width: int = 80,
    metrics: Collection[tuple[str, str]] | None = None,
    verdicts: bool = False,
) -> Table:
    """Return rates with intervals: one row per metric, one column per model.

    Args:
        columns: the models.
        title: over the table.
        width: of the terminal.
        metrics: only these (suite, metric) pairs.
        verdicts: write the verdict under each rate that has one.
    """
    from rich.text import Text

    rows = [r for r in rate_rows(columns) if metrics is None or (r.suite, r.metric) in metrics]
    one_line = width >= 26 + _WIDE_ENOUGH_FOR_ONE_LINE * 2 / 3 * len(columns) and not verdicts
    table = plain_table(title or "Rates, with 95 % intervals")
    table.add_column("suite (items)", no_wrap=verdicts)
    for column in columns:
        table.add_column(column.title, justify="right")
    for suite, group in groupby(rows, key=lambda row: row.suite):
        members = list(group)
        table.add_row(Text(f"{suite} ({members[0].n})", style="bold"))
        for row in members:
            cells: list[Text] = []
            for column, cell in zip(columns, row.cells, strict=True):
                text = _rate_text(cell, one_line=one_line)
                entry = deciding_comparison(column, row) if verdicts else None
                if entry is not None and entry.verdict is not None:
                    words = VERDICTS[entry.verdict]
                    text.append(f"\n{words}", style=_VERDICT_STYLES[entry.verdict])
                cells.append(text)
            table.add_row(Text(f"  {row.label}"), *cells)
        table.add_section()
    return table


def verdicts_table(report: Report, *, title: str = "") -> Table:
    """Return the comparisons: difference, deciding interval, margin, and the verdict in words.

    A terminal shows what each model is held to: safety against the aligned model, skill of a
    repaired model against the fine-tune. The page and the file have all comparisons.
    """
    from rich.text import Text

    rows = [row for row in verdict_rows(report) if _worth_a_row(row, report)]
    judges = {(row.suite, row.label): set[str]() for row in rows}
    for row in rows:
        judges[row.suite, row.label].add(row.judge)
    table = plain_table(title or "Differences (larger is worse), with the interval that decides")
    table.add_column("comparison", no_wrap=True, max_width=40)
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("verdict (margin)")
    for name, group in groupby(rows, key=lambda row: row.comparison):
        members = list(group)
        table.add_row(Text(f"{name}: {members[0].against}", style="bold"))
        for row in members:
            several = len(judges[row.suite, row.label]) > 1
            judge = f" [{row.judge}]" if several else ""
            entry = row.entry
            table.add_row(
                Text(f"  {row.suite}: {row.label}{judge}"),
                difference(entry.diff, unit=row.unit),
                _interval(row),
                verdict_text(row),
            )
        table.add_section()
    return table


def gates_table(gates: Sequence[GateEntry]) -> Table:
    """Return the gates of the policy."""
    from rich.text import Text

    table = plain_table("Gates")
    table.add_column("gate")
    table.add_column("status", no_wrap=True)
    table.add_column("why", ratio=1)
    for gate in gates:
        name = gate.id if gate.required else f"{gate.id} (optional)"
        style = _GATE_STYLES.get(gate.status, "")
        table.add_row(Text(name), Text(gate.status.upper(), style=style), Text(gate.message))
    return table


def verdict_text(row: VerdictRow) -> Text:
    """Return the verdict in words, with its reason."""
    from rich.text import Text

    entry = row.entry
    if entry.verdict is None:
        return Text("")
    text = Text(VERDICTS[entry.verdict], style=_VERDICT_STYLES[entry.verdict])
    if entry.margin is not None:
        text.append(f" ({margin(entry.margin, unit=row.unit)})", style="dim")
    details = [reason(entry.reason)] if entry.reason else []
    if entry.n_needed is not None and entry.verdict == "inconclusive":
        details.append(f"about {entry.n_needed} items needed")
    details += [flag.replace("_", " ") for flag in entry.flags if flag not in _QUIET_FLAGS]
    if details:
        text.append(f": {'; '.join(details)}", style="dim")
    return text


def _worth_a_row(row: VerdictRow, report: Report) -> bool:
    kinds = {suite.name: suite.kind for suite in report.suites}
    if kinds.get(row.suite) == "task":
        return row.comparison == ("tax" if "repaired" in report.models else "drift")
    return row.comparison in ("drift", "residual")


def _interval(row: VerdictRow) -> str:
    interval = row.entry.ci
    return difference_range(interval.low, interval.high, unit=row.unit) if interval else ""


def _closing_lines(report: Report) -> Iterator[str]:
    if report.summary.verdicts:
        yield report.summary.verdicts
    elif report.policy is None:
        yield "no verdicts: no policy"
    if report.weights is not None:
        yield report.weights.line
    for limit in report.limits:
        yield f"limit: {limit}"


def _rate_text(cell: Cell | None, *, one_line: bool) -> Text:
    from rich.text import Text

    if cell is None or cell.value is None:
        return Text("-", style="dim")
    text = Text(percent(cell.value))
    # A hyphen, not " to ": with four models a wider cell would break on 80 columns.
    interval = percent_range(cell.low, cell.high).replace(" to ", "-")
    if interval:
        text.append(f"  {interval}" if one_line else f"\n{interval}", style="dim")
    if cell.n_invalid:
        text.append(f"\n{cell.n_invalid} invalid", style="yellow")
    return text
