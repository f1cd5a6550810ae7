"""One thread for every library, so that a ratio of times is a ratio of work. No torch here."""

from __future__ import annotations

import os
import sys

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment() -> dict[str, str]:
    """The environment of a measurement."""
    return {**os.environ, **dict.fromkeys(THREADS, "1")}


def one_thread() -> None:
    """Start this program again with one thread per library, unless it has that already."""
    if any(os.environ.get(name) != "1" for name in THREADS):
        os.execve(sys.executable, sys.orig_argv, environment())
