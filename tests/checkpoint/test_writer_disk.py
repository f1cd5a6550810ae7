"""Outputs on disks that are full or may not be written."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.checkpoint_support import write_model
from support.writer_support import fill, leftovers
from torch import Tensor

from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.writer import (
    OutputFolder,
    ShardLayout,
    plan_layout,
)
from realign.errors import OutputError


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def big(tmp_path: Path) -> tuple[Checkpoint, tuple[ShardLayout, ...]]:
    tensors: dict[str, Tensor] = {"a": torch.ones(400, 1000), "b": torch.ones(400, 1000)}
    model = open_checkpoint(write_model(tmp_path / "in", tensors, shards=[["a"], ["b"]]))
    return model, plan_layout(model)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    model, layout = big(tmp_path)
    with (
        file_size_limit(1_000_000),
        pytest.raises(OutputError) as caught,
        OutputFolder(tmp_path / "out", fingerprint="f", layout=layout) as output,
    ):
        fill(output, layout[0], model, rows=100)
    assert "disk is full" in caught.value.message
    assert str(layout[0].file_size) in caught.value.message
    assert leftovers(tmp_path) == {"in"}
    model.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up(tmp_path: Path, small_disk: Path) -> None:
    model, layout = big(tmp_path)
    ballast = small_disk / "ballast"
    with (
        pytest.raises(OutputError) as caught,
        OutputFolder(small_disk / "new" / "out", fingerprint="f", layout=layout) as output,
    ):
        fill(output, layout[0], model, rows=100)
        ballast.write_bytes(bytes(5_500_000))  # another program is faster
        fill(output, layout[1], model, rows=100)
    assert "disk is full" in caught.value.message and "1600" in caught.value.message
    assert leftovers(small_disk) == {"ballast"}
    with (
        pytest.raises(OutputError) as caught,
        OutputFolder(small_disk / "out", fingerprint="f", layout=layout),
    ):
        raise AssertionError("it should have been seen beforehand")
    assert " free, the output needs " in caught.value.message
    assert leftovers(small_disk) == {"ballast"}
    model.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with (
            pytest.raises(OutputError, match="cannot be written"),
            OutputFolder(tmp_path / "out", fingerprint="f"),
        ):
            pass
    finally:
        tmp_path.chmod(0o755)
