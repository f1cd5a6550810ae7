"""Imports of large libraries without the garbage collector's share.

Torch brings some hundred thousand objects that live as long as the process. The collector looks
through them again and again, while they are made, whenever a few more were made, and once more at
the end, and finds nothing to collect: together that is a third of a short command's time.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def swift_imports() -> Generator[None]:
    """Import inside of this; what exists at its end is left out of every later collection."""
    was_enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if was_enabled:
            gc.enable()


def leave_the_rest() -> None:
    """Say that the process ends: the system takes its memory back faster than Python does."""
    gc.freeze()
