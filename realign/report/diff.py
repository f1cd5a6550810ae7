"""A comparison of two checkpoints on a terminal: headline, tensors, layers, modules, small files.

Returns renderables and prints nothing. Tables fit 80 columns; wider terminals see more of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from realign.diff.compare import SMALL
from realign.diff.files import FileChange, KeyChange
from realign.diff.result import Difference, Group, Row
from realign.report.diff_sides import one_sided_lines
from realign.report.tables import elide, fit, plain_table
from realign.report.words import MISSING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Order = Literal["relative", "norm", "max", "changed", "cosine", "file"]
ORDERS: tuple[Order, ...] = get_args(Order)

_WIDE = 110
_BAR = 12
_BARS = ""
"""The title over bars."""
_DROP = ("top share", "stable", "norm(A)", "max", "norm(B-A)", _BARS, "rank")
"""Columns that give way to long names, the first one first."""
_MOST_FILE_LINES = 24
_STATUS = {
    "identical": "identical",
    "changed": "changed",
    "dtype_differs": "of another dtype",
    "shape_differs": "of another shape",
    "only_a": "only in A",
    "only_b": "only in B",
}


def diff_tables(
    found: Difference, *, top: int, order: Order, width: int = 80
) -> tuple[RenderableType, ...]:
    """Return the whole comparison, top to bottom, for a terminal of `width` columns.

    Args:
        found: the comparison.
        top: rows of the table of tensors.
        order: what puts a tensor first; "file" keeps the order of the checkpoint.
        width: of the terminal.
    """
    from rich.text import Text

    parts: list[RenderableType] = [Text(line) for line in _sides(found)]
    parts += [Text(line, style="bold") for line in headline(found)]
    shown = [row for row in ranked(found.rows, order=order) if not row.one_sided]
    parts += [Text(line) for line in one_sided_lines(found.rows)]
    if shown and top > 0:
        parts += ["", tensors_table(shown[:top], total=len(shown), order=order, width=width)]
    if not found.same_weights:
        layers, modules = compared(found.layers), by_change(found.modules)
        if layers:
            parts += ["", groups_table(layers, "layer", found, width=width)]
        if modules:
            parts += ["", groups_table(modules, "module", found, width=width)]
    if found.files:
        parts += ["", files_table(found.files)]
    notes = [Text(line, style="dim") for line in (*found.remarks, *_footnotes(found))]
    return (*parts, *([""] if notes else []), *notes)


def headline(found: Difference) -> Iterator[str]:
    """Say the result in one or two sentences."""
    if found.identical:
        what = "every tensor named like --only" if found.only else "every tensor"
        yield f"identical: {what}, config and tokenizer file"
        return
    if found.same_weights:
        yield "the weights are identical, bit by bit"
    else:
        counts = ", ".join(
            f"{count} {_STATUS[status]}" for status, count in sorted(found.counts.items())
        )
        yield f"{len(found.rows)} tensor{'' if len(found.rows) == 1 else 's'}: {counts}"
        figures = found.total.figures
        if figures.relative is not None:
            yield (
                f"relative change {percent(figures.relative)}, cosine {decimal(figures.cosine)}; "
                f"{share(figures.changed, figures.entries)} of all numbers changed"
            )
        if figures.cosine_reference is not None:
            yield f"cos(B - A, A - R) {figures.cosine_reference:+.4f}"
    if found.files:
        count = len(found.files)
        yield f"{count} small file{' differs' if count == 1 else 's differ'}"
    else:
        yield "config and tokenizer files are identical"


def ranked(rows: Sequence[Row], *, order: Order) -> list[Row]:
    """Return the rows that are not identical, the most changed first, one-sided ones last."""
    changed = [row for row in rows if row.status != "identical"]
    if order == "file":
        return changed

    def key(row: Row) -> float:
        figures = row.figures
        if figures is None:  # another shape is the largest change that a tensor can show
            return float("-inf") if row.one_sided else float("inf")
        value = {
            "relative": figures.relative,
            "norm": figures.norm_delta,
            "max": figures.largest,
            "changed": float(figures.changed),
            "cosine": None if figures.cosine is None else -figures.cosine,
        }[order]
        return float("inf") if value is None else value

    return sorted(changed, key=key, reverse=True)


def compared(groups: Sequence[Group]) -> list[Group]:
    """Return the groups in which there was something to compare."""
    return [group for group in groups if group.tensors]


def by_change(groups: Sequence[Group]) -> list[Group]:
    """Return the groups in which there was something to compare, the most changed first."""
    return sorted(compared(groups), key=lambda each: -(each.figures.relative or 0.0))


def summary(found: Difference) -> str:
    """Return the result in one line, for logs."""
    return "; ".join(headline(found))


def tensors_table(rows: Sequence[Row], *, total: int, order: Order, width: int) -> Table:
    """Return one row per tensor: what happened, how far it moved, in how many directions."""
    from rich.text import Text

    wide = width >= _WIDE
    spectra = any(row.spectra for row in rows)
    title = "Tensors that differ" if order == "file" else f"Tensors that differ, by {order}"
    cells = [_cells(row, wide=wide) for row in rows]
    titles = ["relative", "cosine"]
    titles += ["norm(B-A)", "max"] if wide else []
    titles += ["changed"]
    titles += ["rank"] if spectra else []
    titles += ["stable", "top share"] if spectra and wide else []
    columns = {each: [each, *(row.get(each, "") for row in cells)] for each in titles}
    kept, room = fit(
        ["tensor", *(row.name for row in rows)],
        columns,
        droppable=[each for each in _DROP if each in columns],
        width=width,
    )
    table = plain_table(title if total == len(rows) else f"{title}: {len(rows)} of {total}")
    table.add_column("tensor", no_wrap=True)
    for each in kept:
        table.add_column(each, justify="right", no_wrap=True)
    for row, figures in zip(rows, cells, strict=True):
        table.add_row(Text(elide(row.name, room)), *(figures.get(each, "") for each in kept))
    return table


def _cells(row: Row, *, wide: bool) -> dict[str, str]:
    """The cells of a tensor by title."""
    figures = row.figures
    if figures is None:
        return {"relative": status_text(row) if wide else "of another shape"}
    one = row.spectra[0] if len(row.spectra) == 1 else None
    several = f"{len(row.spectra)} parts" if row.spectra else ""
    return {
        "relative": percent(figures.relative),
        "cosine": decimal(figures.cosine),
        "norm(B-A)": short(figures.norm_delta),
        "max": short(figures.largest),
        "changed": share(figures.changed, figures.entries),
        "rank": f"{one.effective_rank:.1f}" if one else several,
        "stable": f"{one.stable_rank:.1f}" if one else "",
        "top share": percent(one.top_share) if one else "",
    }


def status_text(row: Row) -> str:
    """Return the status of a row in words, with both shapes where they differ."""
    if row.status == "shape_differs":
        return f"{list(row.shape_a or ())} / {list(row.shape_b or ())}"
    if row.status == "dtype_differs":
        return f"{row.dtype_a} / {row.dtype_b}"
    return _STATUS[row.status]


def groups_table(
    groups: Sequence[Group], what: Literal["layer", "module"], found: Difference, *, width: int
) -> Table:
    """Return one row per layer or per kind of module."""
    from rich.text import Text

    wide = width >= _WIDE
    bar = _BAR if wide else _BAR // 2
    ranks = effective_ranks(found, what)
    titles = ["differ", "relative", *([_BARS] if wide or what == "layer" else []), "cosine"]
    titles += ["norm(A)", "norm(B-A)", "max"] if wide else []
    titles += ["changed"]
    titles += ["rank"] if ranks else []
    largest = max((group.figures.relative or 0.0 for group in groups), default=0.0)
    cells: list[dict[str, str]] = []
    for group in groups:
        figures = group.figures
        length = round(bar * (figures.relative or 0.0) / largest) if largest else 0
        cells.append(
            {
                "differ": f"{group.changed} of {group.tensors}",
                "relative": percent(figures.relative),
                _BARS: "#" * length,
                "cosine": decimal(figures.cosine),
                "norm(A)": short(figures.norm_a),
                "norm(B-A)": short(figures.norm_delta),
                "max": short(figures.largest),
                "changed": share(figures.changed, figures.entries),
                "rank": ranks.get(group.key, ""),
            }
        )
    columns = {each: [each, *(row[each] for row in cells)] for each in titles}
    kept, room = fit(
        [what, *(group.key for group in groups)],
        columns,
        droppable=[each for each in _DROP if each in columns],
        width=width,
    )
    table = plain_table(f"By {what}")
    table.add_column(what, justify="right" if what == "layer" else "left", no_wrap=True)
    for each in kept:
        table.add_column(each, justify="left" if each == _BARS else "right", no_wrap=True)
    for group, row in zip(groups, cells, strict=True):
        shown = (Text(row[each], style="dim" if each == _BARS else "") for each in kept)
        table.add_row(Text(elide(group.key, room)), *shown)
    return table


def effective_ranks(found: Difference, what: Literal["layer", "module"]) -> dict[str, str]:
    """Return the mean effective rank of the matrices of every layer or kind of module."""
    values: dict[str, list[float]] = {}
    for row in found.rows:
        for each in row.spectra:
            key = str(row.layer) if what == "layer" else row.module
            values.setdefault(key, []).append(each.effective_rank)
    return {key: f"{sum(found) / len(found):.1f}" for key, found in values.items()}


def files_table(files: Sequence[FileChange]) -> Table:
    """Return the small files that differ, key by key where they are JSON."""
    from rich.text import Text

    table = plain_table("Files that differ")
    table.add_column("file", no_wrap=True)
    table.add_column("what", overflow="fold", ratio=1)
    left = _MOST_FILE_LINES
    for each in files:
        lines = [key_text(key) for key in each.keys] or [
            {"changed": "changed", "only_a": "only in A", "only_b": "only in B"}[each.status]
        ]
        shown = lines[: max(1, left)]
        left -= len(shown)
        if len(shown) < len(lines):
            shown.append(f"and {len(lines) - len(shown)} more (--json has them)")
        table.add_row(Text(each.name), Text("\n".join(shown)))
    return table


def key_text(key: KeyChange) -> str:
    """Return one changed key as "path: a -> b"."""
    if key.count > 1:
        return f"{key.path}: {key.count} entries differ"
    return f"{key.path}: {_value(key.a)} -> {_value(key.b)}"


def _value(text: str | None) -> str:
    return "(absent)" if text is None else text if len(text) <= 60 else f"{text[:57]}..."


def _sides(found: Difference) -> Iterator[str]:
    for label, side in (("A", found.a), ("B", found.b), ("R", found.reference)):
        if side is not None:
            pinned = f" @ {side.commit[:12]}" if side.commit else ""
            merged = ", adapter merged" if side.kind == "adapter" else ""
            yield (
                f"{label}  {side.source}{pinned} ({side.parameters:,} parameters, "
                f"{side.tensors} tensors{merged})"
            )


def _footnotes(found: Difference) -> Iterator[str]:
    if found.same_weights:
        return
    yield "relative: norm(B - A) / norm(A); changed: entries whose stored bits differ"
    if any(row.spectra for row in found.rows):
        yield "rank: effective rank of B - A (exp of its entropy); of layers and modules, the mean"
    if found.spectra == "small" and any(_left_out(row) for row in found.rows):
        yield f"ranks are given for matrices up to {SMALL} wide: --spectra takes all of them"


def _left_out(row: Row) -> bool:
    """Whether a matrix that changed was not decomposed."""
    matrix = len(row.shape_a or ()) > 1 and row.shape_a == row.shape_b
    return matrix and row.status != "identical" and not row.spectra


def percent(value: float | None) -> str:
    """Return a fraction with three digits that count: "4.69 %", "0.0123 %"."""
    if value is None:
        return MISSING
    return f"{100 * value:.3g} %" if value < 10.0 else f"{100 * value:.0f} %"


def decimal(value: float | None) -> str:
    """Return a cosine: six decimals, for most are close to one."""
    return MISSING if value is None else f"{value:.6f}"


def short(value: float | None) -> str:
    """Return a number with three digits that count."""
    return MISSING if value is None else f"{value:.3g}"


def share(part: int, whole: int) -> str:
    """Return a share of entries; only all of them are "100 %"."""
    if not whole:
        return MISSING
    if part == whole or part == 0:
        return f"{100 * part // whole} %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"
