"""Have the system write a file's pages to the disk while more of it is being made.

Not a promise of anything: `fsync` still says when the file is safe, it only finds little left to
do. Where the call does not exist (it is Linux's own), nothing happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

_WRITE = 2  # SYNC_FILE_RANGE_WRITE


def start_writing(handle: int, start: int, count: int) -> None:
    """Begin to write `count` bytes from `start` of an open file; does not wait."""
    call = _sync_file_range()
    if call is not None:
        call(handle, start, count, _WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):  # pragma: no cover (not Linux)
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call
