"""The files a person opens: report.html and the pictures, beside audit.json."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.audit.schema import Report, atomic_write
from realign.errors import OutputError
from realign.report.html import render
from realign.report.pictures import heat_map, layer_panels, rate_bars, save
from realign.report.repair import RepairStory, repair_story
from realign.report.view import (
    Column,
    columns_of,
    rate_picture_bars,
    template_grids,
    weight_grid,
)

PICTURES = "pictures"


def write_report_files(
    report: Report,
    folder: Path,
    *,
    columns: Sequence[Column] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Write `report.html` and `pictures/` into the folder of an audit.

    Args:
        report: the audit.
        folder: where `audit.json` is.
        columns: models to show side by side; by default those of the report.
        manifest: `realign.json` of the repaired checkpoint, for the section on the repair.

    Returns:
        The files, `report.html` first.

    Raises:
        OutputError: the folder cannot be written.
    """
    shown = tuple(columns) if columns is not None else columns_of(report)
    story: RepairStory | None = repair_story(manifest) if manifest is not None else None
    page = folder / "report.html"
    atomic_write(page, render(report, columns=shown, repair=story))
    pictures = folder / PICTURES
    written: list[Path] = []
    try:
        # Pictures of an earlier report must not stand beside this one.
        shutil.rmtree(pictures, ignore_errors=True)
        pictures.mkdir(parents=True)
        bars = rate_picture_bars(shown)
        if bars:
            written.append(save(rate_bars(bars), pictures / "rates.png"))
        for grid in template_grids(shown):
            name = re.sub(r"[^a-z0-9]+", "-", grid.title.partition(",")[0].lower()).strip("-")
            written.append(save(heat_map(grid), pictures / f"templates-{name}.png"))
        for group in report.weights.groups if report.weights is not None else ():
            grid = weight_grid(group)
            if grid is not None:
                written.append(save(heat_map(grid), pictures / f"weights-{group.role}.png"))
        if story is not None and story.panels:
            written.append(save(layer_panels(story.panels), pictures / "repair.png"))
    except OSError as error:
        raise OutputError(
            f"{pictures}: cannot be written ({error.strerror})", "check space and permissions"
        ) from error
    return (page, *written)
