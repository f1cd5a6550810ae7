"""What methods with input moments hold beside a matrix, said to the plan and kept."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from support.subspace_support import KEY

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.slots import Slot
from realign.model.accumulate import Moments
from realign.model.moments import MomentSet
from realign.model.moments_file import StoredMoments, save_moments
from realign.repair.edit import Layer
from realign.repair.estimate import block_bytes
from realign.repair.method import Method
from realign.repair.methods.antidote import Antidote
from realign.repair.methods.irr import Irr
from realign.repair.methods.nlsr import Nlsr
from realign.repair.methods.safe_delta import SafeDelta
from realign.repair.preparation import Statistics

METHODS: tuple[Method, ...] = (
    SafeDelta(s=0.5, budget="relative"),
    Irr(safety_vector="unaligned"),
    Antidote(space="merged"),
    Nlsr(reference="unaligned", space="merged"),
)


def resident() -> int:
    status = Path("/proc/self/status").read_text("ascii")
    line = next(each for each in status.splitlines() if each.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def layer_and_statistics(folder: Path, d_out: int, d_in: int) -> tuple[Layer, Statistics]:
    x = torch.randn(64, d_in, generator=torch.Generator().manual_seed(1)).double()
    path = folder / f"{d_in}.safetensors"
    moments = Moments(64, x.sum(0), x.T @ x + torch.eye(d_in).double(), "input")
    save_moments(path, MomentSet({KEY: moments}), about={})
    aligned = torch.randn(d_out, d_in)
    layer = Layer(
        key=KEY,
        module="q_proj",
        layer=0,
        aligned=aligned,
        finetuned=aligned + 0.1 * torch.randn(d_out, d_in),
        unaligned=aligned + 0.1 * torch.randn(d_out, d_in),
    )
    return layer, Statistics(StoredMoments(path), disposable=True)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(512, 1536), (1536, 512)])
def test_an_edit_holds_no_more_than_it_says(
    method: Method, shape: tuple[int, int], tmp_path: Path
) -> None:
    method.edit(*layer_and_statistics(tmp_path, 16, 24))  # loads what has to be loaded
    layer, statistics = layer_and_statistics(tmp_path, *shape)
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    method.edit(layer, statistics)
    done.set()
    watcher.join()
    told = method.edit_bytes(*shape)
    assert told is not None
    # Freed memory that the allocator keeps, and BLAS's buffers, come on top.
    assert highest - before <= 1.1 * told + 24 * 2**20


def test_the_plan_takes_the_methods_own_word() -> None:
    info = TensorInfo(KEY, "F32", (8, 100), Path("model.safetensors"), 0, 3200)
    slot = Slot(KEY, KEY, "q_proj", 0)
    plain = block_bytes(info, (0, 8), (slot,), inputs=2)
    own = block_bytes(info, (0, 8), (slot,), inputs=2, own=METHODS[0].edit_bytes)
    assert own > plain + 8 * 100**2  # moments of 100 inputs, where a spectrum has 8 directions
    assert block_bytes(info, (0, 8), (slot,), inputs=2, own=lambda _, __: None) == plain
