"""What a piece of work cost: wall time, processor time, and memory above what was held before.

The peak is the kernel's own (`VmHWM`), reset before the work; where a system has none it is None.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Filled in when the work ends, however it ends."""

    wall: float = 0.0
    """Seconds."""
    processor: float = 0.0
    """Seconds of this process on all cores."""
    peak_mib: float | None = None
    """Highest resident memory minus the resident memory before, MiB."""


@contextmanager
def measured() -> Generator[Cost]:
    """Measure the work inside."""
    cost = Cost()
    before = _reset_peak()
    wall, processor = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        cost.wall = time.perf_counter() - wall
        cost.processor = time.process_time() - processor
        peak = _kib("VmHWM")
        if before is not None and peak is not None:
            cost.peak_mib = max(0.0, (peak - before) / 1024)


def _reset_peak() -> int | None:
    try:
        RESET.write_text("5", encoding="ascii")  # 5: the peak becomes what is resident now
    except OSError:
        return None
    return _kib("VmRSS")


def _kib(field: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) if found else None
