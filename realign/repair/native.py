"""Settings of the native libraries under a run: threads of SciPy's BLAS, and malloc's habits.

Both are of the whole process and have no place in torch's own interface. Where a library is another
one, nothing is set and nothing is lost but speed or memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3  # glibc's mallopt
_MAPPED_FROM = 4 * 2**20


@contextmanager
def blas_threads(count: int) -> Generator[None]:
    """Let SciPy's OpenBLAS use so many threads per call; the decompositions run in it.

    Its threads wait by spinning: beside working threads of ours they only take the processor away.
    """
    library = _openblas()
    if library is None:
        yield
        return
    before = int(library.scipy_openblas_get_num_threads())
    library.scipy_openblas_set_num_threads(count)
    try:
        yield
    finally:
        library.scipy_openblas_set_num_threads(before)


def return_freed_memory() -> None:
    """Have malloc give large blocks back to the system as soon as they are freed.

    By default glibc raises its threshold to the largest block that was freed, and every thread then
    keeps a heap of its own with holes as large as matrices.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
    except (AttributeError, OSError, TypeError):  # pragma: no cover (not glibc)
        return


def trim_memory() -> None:
    """Give back what malloc keeps of freed memory, for what comes after the stream."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # pragma: no cover (not glibc)
        return


def _openblas() -> Any | None:
    found = importlib.util.find_spec("scipy")
    if found is None or found.origin is None:  # pragma: no cover (scipy is a dependency)
        return None
    folder = Path(found.origin).parent
    for place in (folder.with_name("scipy.libs"), folder / ".dylibs"):
        for file in sorted(place.glob("libscipy_openblas*")):
            try:
                library = ctypes.CDLL(str(file))
                library.scipy_openblas_get_num_threads.restype = ctypes.c_int
                return library
            except (AttributeError, OSError):  # pragma: no cover (another build of it)
                continue
    return None
