from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from realign.checkpoint import shards, writeback
from realign.checkpoint.shards import ShardLayout, ShardWriter, TensorSpec
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


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's own")
def test_the_system_takes_the_call(handle: int) -> None:
    call = writeback._sync_file_range()  # pyright: ignore[reportPrivateUsage]
    assert call is not None and call(handle, 0, 65_536, 2) == 0


def test_a_weight_file_is_sent_to_the_disk_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(shards, "_SEND", 4096)
    monkeypatch.setattr(shards, "start_writing", lambda _, *part: sent.append(part))
    layout = ShardLayout("x.safetensors", (TensorSpec("w", "F32", (8, 1024)),))
    writer = ShardWriter(tmp_path / "x.safetensors", layout)
    for _ in range(8):
        writer.write("w", torch.zeros(1, 1024))
    writer.finish()
    ends = [start + count for start, count in sent]
    assert [start for start, _ in sent] == [0, *ends[:-1]]  # without gap
    assert layout.file_size - ends[-1] < 4096


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
