from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from realign.checkpoint.headers import read_header
from realign.checkpoint.identity import InputGuard
from realign.errors import InputChangedError


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "a file.safetensors"
    save_file({"w": torch.ones(4, 4)}, path)
    return path


def test_a_file_left_alone_passes_also_through_a_link(weights: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(weights)
    guard = InputGuard([weights, link])
    guard.compare(read_header(weights).tensors.values())
    guard.check()


def _rewrite(path: Path) -> None:
    """Other numbers, the same size, the same time of change."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def _cut(path: Path) -> None:
    os.truncate(path, 40)


@pytest.mark.parametrize("change", [_rewrite, _replace, _cut, Path.unlink])
def test_every_change_is_found_and_the_file_is_named(weights: Path, change) -> None:
    guard = InputGuard([weights])
    change(weights)
    with pytest.raises(InputChangedError, match=r"a file\.safetensors changed"):
        guard.check()


def test_a_header_that_changed_before_the_guard_was_made(weights: Path) -> None:
    known = read_header(weights).tensors.values()
    save_file({"w": torch.ones(2, 8)}, weights)
    guard = InputGuard([weights])
    with pytest.raises(InputChangedError, match="a file"):
        guard.compare(known)
