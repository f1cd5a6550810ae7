"""Reading ahead: what is asked of the system while files are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from realign.checkpoint import pread
from realign.checkpoint.headers import TensorInfo, read_header
from realign.checkpoint.pread import TensorFiles

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has none")

ROWS, WIDTH = 64, 4096  # 16 KiB a row


@pytest.fixture
def info(tmp_path: Path) -> TensorInfo:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)}, file)
    return read_header(file).tensors["w"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the system is asked to fetch: (start, bytes) in the file; it is asked all the same."""
    found: list[tuple[int, int]] = []
    real: Callable[[int, int, int, int], None] = os.posix_fadvise

    def record(handle: int, start: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        found.append((start, count))
        real(handle, start, count, advice)

    monkeypatch.setattr(os, "posix_fadvise", record)
    monkeypatch.setattr(pread, "_AHEAD", 2**18)
    return found


def _read(files: TensorFiles, info: TensorInfo, start: int, stop: int) -> None:
    found = files.read(info, (start, stop))
    expected = torch.arange(start * WIDTH, stop * WIDTH, dtype=torch.float32)
    assert torch.equal(found.reshape(-1), expected)


def test_a_file_read_in_order_is_asked_for_once_and_ahead(
    info: TensorInfo, asked: list[tuple[int, int]]
) -> None:
    files = TensorFiles()
    for row in range(0, ROWS, 2):
        _read(files, info, row, row + 2)
        if row:
            reached = info.offset + (row + 2) * WIDTH * 4
            assert sum(asked[-1]) >= reached + 2**17  # always half a window in hand
    files.close()
    assert all(count == 2**18 for _, count in asked)
    starts = [start for start, _ in asked]
    assert starts == list(range(starts[0], starts[0] + 2**18 * len(starts), 2**18))


def test_single_pieces_ask_for_nothing(info: TensorInfo, asked: list[tuple[int, int]]) -> None:
    files = TensorFiles()
    for row in (40, 3, 60, 20):
        _read(files, info, row, row + 1)
    files.close()
    assert asked == []
