"""A recipe small enough to run in seconds, and a progress that interrupts a build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from realign.lab.presets import PRESETS, Phase, Preset
from realign.lab.world import Sizes
from realign.progress import Task

MICRO: Preset = replace(
    PRESETS["tiny"],
    layers=1,
    hidden=16,
    sizes=Sizes(20, 4, 10, 10, howto_gadgets=3, howto2_held_out=3),
    pretraining=Phase(6, 4, 3e-3, 0.01),
    alignment=Phase(5, 4, 7e-4),
    finetuning=Phase(4, 4, 3e-4),
    rows=40,
)


class Interrupting:
    """Raises KeyboardInterrupt, as Ctrl-C would, after `after` steps of the named training."""

    def __init__(self, name: str, after: int) -> None:
        self.name, self.after = name, after
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    @contextmanager
    def task(self, description: str, *, total: float | None, unit: str = "") -> Iterator[Task]:
        yield _Counting(self if description == f"training {self.name}" else None)


class _Counting:
    def __init__(self, owner: Interrupting | None) -> None:
        self.owner, self.done = owner, 0.0

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        if self.owner is not None and self.done >= self.owner.after:
            raise KeyboardInterrupt


def family_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a family by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
