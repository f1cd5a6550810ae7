"""Whether an output fits on its disk, and how sizes are said."""

from __future__ import annotations

import shutil
from pathlib import Path

from realign.errors import OutputError


def size_text(count: int) -> str:
    """Bytes in words: "2.7 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def require_space(place: Path, needed: int) -> None:
    """Check that a disk has room.

    Args:
        place: an existing folder on it.
        needed: bytes.

    Raises:
        OutputError: says how much there is and how much is needed.
    """
    free = shutil.disk_usage(place).free
    if free >= needed:
        return
    there, wanted = size_text(free), size_text(needed)
    if there == wanted:  # too close for one decimal
        there, wanted = f"{free:,} bytes", f"{needed:,} bytes"
    raise OutputError(
        f"{place} has {there} free, the output needs {wanted}",
        "free some space, or choose a folder on another disk",
    )
