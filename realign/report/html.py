"""A report as one HTML file: no network, no scripts, pictures inside, readable in black and white.

Every string of a checkpoint is untrusted and escaped, tensor names in pictures included. What is
shown is selected in `view.py`; the order of the page is the template's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from realign.audit.schema import ComparisonEntry, Report
from realign.report import words
from realign.report.page import environment, markup
from realign.report.pictures import heat_map, layer_panels, rate_bars, to_svg
from realign.report.view import (
    Column,
    RateRow,
    VerdictRow,
    columns_of,
    rate_picture_bars,
    rate_rows,
    template_grids,
    verdict_rows,
    weight_grid,
)

if TYPE_CHECKING:
    from markupsafe import Markup

    from realign.report.repair import RepairStory

_MAX_HEAT_MAP_ROWS = 60


@dataclass(frozen=True)
class Picture:
    """An inline picture with its caption."""

    svg: Markup
    caption: str


def render(
    report: Report, *, columns: Sequence[Column] | None = None, repair: RepairStory | None = None
) -> str:
    """Return the page.

    Args:
        report: the audit.
        columns: models of the rate table; by default those of the report. May hold models of other
            reports over the same suites, to stand beside.
        repair: shown as a section of its own, from the manifest of the repaired checkpoint.
    """
    shown = tuple(columns) if columns is not None else columns_of(report)
    subject = report.models.get("subject")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            title=subject.source if subject is not None else "report",
            columns=shown,
            rate_groups=[
                (suite, list(rows)) for suite, rows in groupby(rate_rows(shown), lambda r: r.suite)
            ],
            rate_pictures=_rate_pictures(shown),
            verdicts=_verdict_groups(report),
            invalid=_invalid_rows(shown),
            logits=list(_logit_rows(report)),
            template_pictures=_template_pictures(shown),
            weight_totals=_weight_totals(report),
            weight_pictures=_weight_pictures(report),
            repair=_repair_section(repair),
            words=words.VERDICTS,
            roles=words.ROLES,
            percent=words.percent,
            percent_range=words.percent_range,
            difference=words.difference,
            difference_range=words.difference_range,
            margin=words.margin,
            probability=words.probability,
            number=words.number,
            reason=words.reason,
        )
    )


def _rate_pictures(columns: Sequence[Column]) -> list[Picture]:
    bars = rate_picture_bars(columns)
    if not bars:
        return []
    svg = to_svg(rate_bars(bars), label="Rates per model with 95 % intervals")
    return [Picture(markup(svg), "Rates per model; the black lines are 95 % intervals.")]


def _template_pictures(columns: Sequence[Column]) -> list[Picture]:
    caption = "Rates per request template: one template can carry all failures."
    return [
        Picture(markup(to_svg(heat_map(grid), label=f"{grid.title} {index}")), caption)
        for index, grid in enumerate(template_grids(columns))
        if len(grid.rows) <= _MAX_HEAT_MAP_ROWS
    ]


def _weight_pictures(report: Report) -> list[Picture]:
    assert report.weights is None or report.weights.groups is not None
    grids = [weight_grid(group) for group in (report.weights.groups if report.weights else ())]
    return [
        Picture(markup(to_svg(heat_map(grid), label=grid.title)), f"{grid.title}, per layer.")
        for grid in grids
        if grid is not None and len(grid.rows) <= _MAX_HEAT_MAP_ROWS
    ]


def _weight_totals(report: Report) -> list[tuple[str, Any]]:
    groups = report.weights.groups if report.weights else ()
    return [(words.ROLES[g.role], g.total) for g in groups if g.total is not None]


def _verdict_groups(report: Report) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    rows = verdict_rows(report)
    limits = {
        unit: _axis_limit([row.entry for row in rows if row.unit == unit], unit=unit)
        for unit in {row.unit for row in rows}
    }
    groups: list[tuple[str, str, list[Mapping[str, Any]]]] = []
    for name, members in groupby(rows, key=lambda row: row.comparison):
        each = list(members)
        groups.append(
            (name, each[0].against, [_verdict_row(row, limits[row.unit]) for row in each])
        )
    return groups


def _verdict_row(row: VerdictRow, limit: float) -> Mapping[str, Any]:
    return {
        "suite": row.suite,
        "label": row.label,
        "judge": row.judge,
        "unit": row.unit,
        "entry": row.entry,
        "bar": markup(interval_bar(row.entry, limit=limit)),
    }


def _axis_limit(entries: Sequence[ComparisonEntry], *, unit: str) -> float:
    """Half the width of the axis that all comparisons of one unit share.

    Wide enough for what the margins decide; intervals far outside are drawn at the edge, with their
    numbers beneath.
    """
    ends = [abs(v) for e in entries if e.ci is not None for v in (e.ci.low, e.ci.high)]
    margins = [2 * e.margin for e in entries if e.margin is not None]
    smallest, widest = (0.05, 0.2) if unit == "pp" else (0.5, 10.0)
    return max([smallest, *margins, min(widest, max(ends, default=0.0))])


def interval_bar(entry: ComparisonEntry, *, limit: float, width: int = 200) -> str:
    """Return a small picture of one difference: deciding interval, second interval, margin.

    Args:
        entry: a comparison; without an interval the picture is empty.
        limit: the difference at both ends of the axis, a fraction.
        width: pixels.
    """
    if entry.ci is None:
        return ""

    def x(value: float) -> float:
        return round((max(-limit, min(limit, value)) / limit + 1) * width / 2, 1)

    parts = [
        f'<svg role="img" aria-label="interval" width="{width}" height="24" '
        f'viewBox="0 0 {width} 24" xmlns="http://www.w3.org/2000/svg">',
        f'<line x1="0" y1="20" x2="{width}" y2="20" stroke="#bbb"/>',
        f'<line x1="{x(0)}" y1="2" x2="{x(0)}" y2="22" stroke="#1a1a1a"/>',
    ]
    if entry.margin is not None:
        parts.append(
            f'<line x1="{x(entry.margin)}" y1="2" x2="{x(entry.margin)}" y2="22" '
            'stroke="#1a1a1a" stroke-dasharray="3 2"/>'
        )
    low, high = x(entry.ci.low), x(entry.ci.high)
    parts.append(
        f'<rect x="{low}" y="5" width="{max(high - low, 1.5):.1f}" height="6" '
        'fill="#555" stroke="#1a1a1a" stroke-width="0.5"/>'
    )
    if entry.ci_secondary is not None:
        second = entry.ci_secondary
        parts.append(
            f'<line x1="{x(second.low)}" y1="15" x2="{x(second.high)}" y2="15" stroke="#555"/>'
        )
    if entry.diff is not None:
        parts.append(f'<circle cx="{x(entry.diff)}" cy="8" r="2.5" fill="#fff" stroke="#1a1a1a"/>')
    return "".join([*parts, "</svg>"])


def _invalid_rows(columns: Sequence[Column]) -> list[RateRow]:
    # All metrics of one suite and judge share their invalid answers: one row is enough.
    seen: dict[tuple[str, str], RateRow] = {}
    for row in rate_rows(columns):
        seen.setdefault((row.suite, row.judge), row)
    return list(seen.values())


def _logit_rows(report: Report) -> Iterator[tuple[str, Any]]:
    if report.logits is not None:
        for entry in report.logits.refusal_logodds:
            yield "log-odds of refusing", entry
        for entry in report.logits.kl_items:
            yield "KL from the aligned model", entry


def _repair_section(repair: RepairStory | None) -> Mapping[str, Any] | None:
    if repair is None:
        return None
    pictures: list[Picture] = []
    if repair.panels:
        svg = to_svg(layer_panels(repair.panels), label="The repair, layer by layer")
        pictures.append(Picture(markup(svg), "The repair, layer by layer."))
    return {"facts": repair.facts, "pictures": pictures}
