"""How long work reports its progress: a protocol, and the silent implementation.

The library never prints. Callers that want a progress bar pass an object with this shape; the
command line's one draws it with rich.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: float = 1.0) -> None:
        """Say that `amount` more units are done."""
        ...


class Progress(Protocol):
    """Where tasks and passing remarks are shown."""

    def task(
        self, description: str, *, total: float | None, unit: str = ""
    ) -> AbstractContextManager[Task]:
        """Open a task of `total` units (None: unknown); `unit` may be "B" for bytes."""
        ...

    def note(self, message: str) -> None:
        """Show one line that is worth reading now (a warning, a deviation, a resumed step)."""
        ...


class _SilentTask:
    def advance(self, amount: float = 1.0) -> None:
        """Do nothing."""


class SilentProgress:
    """Shows nothing: the default of every library function."""

    @contextmanager
    def task(self, description: str, *, total: float | None, unit: str = "") -> Generator[Task]:
        """Open a task that nobody watches."""
        yield _SilentTask()

    def note(self, message: str) -> None:
        """Drop the remark."""


SILENT = SilentProgress()
