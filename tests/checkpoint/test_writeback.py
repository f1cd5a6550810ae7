from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from realign.checkpoint import writeback
from realign.checkpoint.writeback import start_writing


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(opened, bytes(100_000))
    yield opened
    os.close(opened)


def test_nothing_of_the_file_changes(handle: int) -> None:
    before = os.fstat(handle)
    start_writing(handle, 0, 65_536)
    start_writing(handle, 65_536, 65_536)  # past the end
    after = os.fstat(handle)
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    assert os.pread(handle, 200_000, 0) == bytes(100_000)


def test_where_the_system_has_no_such_call_nothing_happens(
    handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        def __init__(self, _: None) -> None: ...

    writeback._sync_file_range.cache_clear()  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(ctypes, "CDLL", Other)
    try:
        start_writing(handle, 0, 65_536)
    finally:
        writeback._sync_file_range.cache_clear()  # pyright: ignore[reportPrivateUsage]
