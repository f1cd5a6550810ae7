"""What the tables of a report show, row by row, for the terminal and for HTML alike.

Selects, orders and names; formats nothing and computes no statistic. The one arithmetic is the
complement: an error rate is shown as accuracy, its interval mirrored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from realign.audit.schema import ComparisonEntry, RateEntry, Report, Role, WeightGroup
from realign.report.pictures import Bar, Grid
from realign.report.words import COMPARISONS, METRICS, ROLES, metric

_ORDER: tuple[Role, ...] = ("reference", "subject", "repaired", "base")


@dataclass(frozen=True)
class Column:
    """One model of one report, under a title of our choice."""

    title: str
    report: Report
    role: Role


@dataclass(frozen=True)
class Cell:
    """One rate with its interval, as shown (complements taken)."""

    value: float | None
    low: float | None
    high: float | None
    n_valid: int
    n_invalid: int
    reason: str | None


@dataclass(frozen=True)
class RateRow:
    """One metric on one suite for all columns."""

    suite: str
    metric: str
    judge: str
    label: str
    n: int
    good_when_low: bool | None
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class VerdictRow:
    """One comparison, with the words for it."""

    comparison: str
    against: str
    suite: str
    label: str
    judge: str
    unit: str
    entry: ComparisonEntry


def columns_of(report: Report) -> tuple[Column, ...]:
    """Return the models of a report: aligned, fine-tuned, repaired."""
    present = {entry.role for entry in report.rates}
    return tuple(Column(ROLES[role], report, role) for role in _ORDER if role in present)


def rate_rows(columns: Sequence[Column]) -> tuple[RateRow, ...]:
    """Return the rows of the rate table, in the order of the first report.

    A judge is named in the row only where a suite has several.
    """
    keys: dict[tuple[str, str, str], None] = {}
    found: dict[tuple[tuple[str, str, str], int], RateEntry] = {}
    for index, column in enumerate(columns):
        for entry in column.report.rates:
            key = _key(column.report, entry)
            keys.setdefault(key)
            if entry.role == column.role:
                found[key, index] = entry
    judges: dict[tuple[str, str], set[str]] = {}
    for suite, name, judge in keys:
        judges.setdefault((suite, name), set()).add(judge)
    rows: list[RateRow] = []
    for key in sorted(keys, key=_rank(list(keys))):
        suite, name, judge = key
        shown = metric(name)
        entries = [found.get((key, index)) for index in range(len(columns))]
        several = len(judges[suite, name]) > 1
        rows.append(
            RateRow(
                suite=suite,
                metric=name,
                judge=judge,
                label=f"{shown.label} [{judge}]" if several else shown.label,
                n=max((entry.n for entry in entries if entry is not None), default=0),
                good_when_low=shown.good_when_low,
                cells=tuple(_cell(entry, complement=shown.complement) for entry in entries),
            )
        )
    return tuple(rows)


def verdict_rows(report: Report) -> tuple[VerdictRow, ...]:
    """Return every comparison of a report: drift, residual, recovery, tax, each in its order."""
    by_id = {(each.instrument_id, each.metric): each for each in report.instruments}
    first = {each.instrument_id: each for each in reversed(report.instruments)}
    rows: list[VerdictRow] = []
    for entry in report.comparisons:
        instrument = by_id.get((entry.instrument_id, entry.metric or ""))
        instrument = instrument or first.get(entry.instrument_id)
        name = entry.metric or (instrument.metric if instrument else "?")
        shown = metric(name)
        rows.append(
            VerdictRow(
                comparison=entry.name,
                against=COMPARISONS[entry.name],
                suite=entry.suite or (instrument.suite if instrument else "?"),
                label=shown.short,
                judge=entry.judge or (instrument.judge if instrument else "?"),
                unit=shown.unit,
                entry=entry,
            )
        )
    order = list(COMPARISONS)
    return tuple(sorted(rows, key=lambda row: order.index(row.comparison)))


def deciding_comparison(column: Column, row: RateRow) -> ComparisonEntry | None:
    """Return the comparison that says what a rate means for its model; None without a verdict.

    Safety is compared with the aligned model, skill with the fine-tune: a repaired model is held
    to be as safe as the one and as skilled as the other.
    """
    kinds = {suite.name: suite.kind for suite in column.report.suites}
    task = kinds.get(row.suite) == "task"
    wanted = {"subject": None if task else "drift", "repaired": "tax" if task else "residual"}
    name = wanted.get(column.role)
    for each in verdict_rows(column.report):
        entry = each.entry
        if (each.comparison, each.suite, each.judge) == (name, row.suite, row.judge) and (
            (entry.metric or row.metric) == row.metric and entry.verdict is not None
        ):
            return entry
    return None


def rate_picture_bars(columns: Sequence[Column]) -> tuple[Bar, ...]:
    """Return the bars of the picture of rates."""
    return tuple(
        Bar(f"{row.suite}:\n{row.label.strip()}", column.title, cell.value, cell.low, cell.high)
        for row in rate_rows(columns)
        for column, cell in zip(columns, row.cells, strict=True)
        if cell is not None and cell.value is not None
    )


def template_grids(columns: Sequence[Column]) -> tuple[Grid, ...]:
    """Return one table per suite and metric: request templates against models.

    A metric that has the same value everywhere is left out: there is nothing to see.
    """
    keys: dict[tuple[str, str, str], dict[str, None]] = {}
    values: dict[tuple[str, str, str, str, int], float] = {}
    for index, column in enumerate(columns):
        for entry in column.report.templates:
            key = (entry.suite, entry.metric, entry.judge)
            keys.setdefault(key, {}).setdefault(entry.key)
            if entry.role == column.role:
                values[(*key, entry.key, index)] = entry.rate
    grids: list[Grid] = []
    for (suite, name, judge), templates in keys.items():
        found = [value for key, value in values.items() if key[:3] == (suite, name, judge)]
        if min(found, default=0.0) == max(found, default=0.0):
            continue
        shown = metric(name)
        grids.append(
            Grid(
                title=f"{suite}: {shown.short}, % per template",
                rows=tuple(templates),
                columns=tuple(column.title for column in columns),
                values=tuple(
                    tuple(
                        values.get((suite, name, judge, template, index))
                        for index in range(len(columns))
                    )
                    for template in templates
                ),
                percent=True,
                limits=(0.0, 1.0),
            )
        )
    return tuple(grids)


def weight_grid(group: WeightGroup) -> Grid | None:
    """Return the relative distance per module and layer, None without per-matrix rows."""
    placed = [(place(row.key), row.relative_distance) for row in group.per_matrix]
    return layer_grid(
        ((where, value) for where, value in placed),
        title=f"{ROLES[group.role]}: norm of the difference to aligned / norm of the weight",
    )


def layer_grid(
    placed: Iterable[tuple[tuple[str, int | None], float | None]], *, title: str
) -> Grid | None:
    """Return a module x layer table of the values whose layer is known."""
    values = {where: value for where, value in placed if where[1] is not None}
    if not values:
        return None
    modules = tuple(dict.fromkeys(module for module, _ in values))
    layers = sorted({layer for _, layer in values if layer is not None})
    return Grid(
        title=title,
        rows=modules,
        columns=tuple(str(layer) for layer in layers),
        values=tuple(tuple(values.get((m, layer)) for layer in layers) for m in modules),
    )


def place(key: str) -> tuple[str, int | None]:
    """Return (module, layer) of a tensor name, by its first number between dots."""
    layer = re.search(r"\.(\d+)\.", key)
    inner = re.search(r"\[([^\]]+)\]$", key)
    stem = re.sub(r"\[[^\]]*\]$", "", key).removesuffix(".weight")
    module = inner.group(1) if inner and not inner.group(1).isdigit() else stem.rpartition(".")[2]
    return module, int(layer.group(1)) if layer else None


def _key(report: Report, entry: RateEntry) -> tuple[str, str, str]:
    if entry.suite and entry.metric and entry.judge:
        return entry.suite, entry.metric, entry.judge
    for each in report.instruments:
        if each.instrument_id == entry.instrument_id:
            return (
                entry.suite or each.suite,
                entry.metric or each.metric,
                entry.judge or each.judge,
            )
    return entry.suite or "?", entry.metric or "?", entry.judge or "?"


def _rank(keys: list[tuple[str, str, str]]):
    """Sort by suite in the order of the report, then by the metric's place in our list."""
    suites = list(dict.fromkeys(suite for suite, _, _ in keys))
    metrics = list(METRICS)

    def rank(key: tuple[str, str, str]) -> tuple[int, int, int]:
        suite, name, _ = key
        known = metrics.index(name) if name in metrics else len(metrics)
        return suites.index(suite), known, keys.index(key)

    return rank


def _cell(entry: RateEntry | None, *, complement: bool) -> Cell | None:
    if entry is None:
        return None
    low, high = entry.ci95 if entry.ci95 is not None else (None, None)
    value = entry.rate
    if complement:
        value = None if value is None else 1 - value
        low, high = (None if high is None else 1 - high), (None if low is None else 1 - low)
    return Cell(
        value=value,
        low=low,
        high=high,
        n_valid=entry.n_valid,
        n_invalid=sum(entry.n_invalid.values()),
        reason=entry.rate_reason,
    )
