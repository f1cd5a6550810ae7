"""How a terminal shows the library's progress: `realign.progress.Progress`, drawn with rich."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from realign.progress import Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_LONG_ENOUGH_TO_MENTION_S = 5.0


class RichProgress:
    """Bars on a terminal; elsewhere one line for each finished task that took a while."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bars: Bars | None = None
        self._open = 0

    @contextmanager
    def task(self, description: str, *, total: float | None, unit: str = "") -> Generator[Task]:
        """Show one task while the block runs."""
        if self._quiet:
            yield _Counter()
        elif self._console.is_terminal:
            with self._bar(description, total=total, unit=unit) as bar:
                yield bar
        else:
            counter, started = _Counter(), time.monotonic()
            yield counter
            seconds = time.monotonic() - started
            if seconds >= _LONG_ENOUGH_TO_MENTION_S:
                self._print(f"{description}: {seconds:.0f} s")

    def note(self, message: str) -> None:
        """Show one remark above the bars."""
        if not self._quiet:
            self._print(message)

    def _print(self, message: str) -> None:
        console = self._bars.console if self._bars is not None else self._console
        # Unwrapped: a path in it stays in one piece.
        console.print(message, markup=False, highlight=False, style="dim", soft_wrap=True)

    @contextmanager
    def _bar(self, description: str, *, total: float | None, unit: str) -> Generator[Task]:
        # Nested tasks share one live display, which closes with the outermost task: rich allows
        # only one display at a time, and finished inner bars would pile up on the screen.
        if self._bars is None:
            self._bars = _make_bars(self._console)
            self._bars.start()
        bars = self._bars
        self._open += 1
        identity = bars.add_task(description, total=total, count="")
        try:
            yield _Bar(bars, identity, total=total, unit=unit)
        finally:
            self._open -= 1
            bars.remove_task(identity)
            if self._open == 0:
                bars.stop()
                self._bars = None


class _Counter:
    """A task nobody watches."""

    def advance(self, amount: float = 1.0) -> None:
        """Do nothing."""


class _Bar:
    """One bar, with a count in the task's own unit."""

    def __init__(self, bars: Bars, identity: TaskID, *, total: float | None, unit: str) -> None:
        self._bars = bars
        self._identity = identity
        self._total = total
        self._unit = unit
        self._done = 0.0

    def advance(self, amount: float = 1.0) -> None:
        """Move the bar."""
        self._done += amount
        self._bars.update(
            self._identity,
            advance=amount,
            count=count_text(self._done, total=self._total, unit=self._unit),
        )


def count_text(done: float, *, total: float | None, unit: str) -> str:
    """Return "12/40 prompts" or, for unit "B", "1.2/4.0 GB"."""
    if unit == "B":
        biggest = max(done, total or 0.0)
        size, name = next(
            (s, n)
            for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
            if biggest >= s or s == 1.0
        )
        if total is None:
            return f"{done / size:.1f} {name}"
        return f"{done / size:.1f}/{total / size:.1f} {name}"
    numbers = f"{done:.0f}" if total is None else f"{done:.0f}/{total:.0f}"
    return f"{numbers} {unit}".rstrip()


def _make_bars(console: Console) -> Bars:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
