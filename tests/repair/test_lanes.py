"""Transfers to a device that works on its own: one simulated by a thread, a real one if any."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.repair_support import read_folder
from torch import Tensor

from realign.repair.editor import Editor
from realign.repair.engine import repair
from realign.repair.lanes import Lane, Lanes, Staging
from realign.repair.request import RepairRequest

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class _Copied(threading.Event):
    def synchronize(self) -> None:
        assert self.wait(10)


class SlowDevice:
    """A device whose copies are carried out in order, later, by a thread of its own."""

    def __init__(self) -> None:
        self._todo: queue.Queue[tuple[Tensor, Tensor, _Copied] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.buffers = 0
        self.most_waiting = 0

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers += 1
        return torch.empty(nbytes, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy(self, source: Tensor, target: Tensor) -> _Copied:
        done = _Copied()
        self._todo.put((source, target, done))
        self.most_waiting = max(self.most_waiting, self._todo.qsize())
        return done

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            source, target, done = job
            time.sleep(0.0002)
            target.copy_(source)
            done.set()

    def finish(self) -> None:
        self._todo.put(None)
        self._thread.join(10)


@pytest.fixture
def device() -> Iterator[SlowDevice]:
    made = SlowDevice()
    yield made
    made.finish()


VIEWS = {
    "rows": lambda t: t,
    "transposed": lambda t: t.T,
    "block": lambda t: t[1:4],
    "columns": lambda t: t[:, 1:4],
    "transposed block": lambda t: t.T[1:3],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("buffer_bytes", [8, 24, 1 << 20])
def test_what_goes_up_comes_down(device: SlowDevice, view: str, buffer_bytes: int) -> None:
    staging = Staging(device, buffer_bytes=buffer_bytes)
    for seed in range(4):
        host = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).bfloat16()
        source = VIEWS[view](host)
        target = VIEWS[view](torch.zeros_like(host))
        there = staging.up(source)
        staging.down(there, target)  # waits for what is under way before it
        assert torch.equal(target, source)
    assert device.buffers == 2


def test_the_copy_into_one_buffer_overlaps_the_transfer_of_the_other(device: SlowDevice) -> None:
    staging = Staging(device, buffer_bytes=64)
    host = torch.arange(4096, dtype=torch.int32)
    back = torch.empty_like(host)
    staging.down(staging.up(host), back)
    assert torch.equal(back, host)
    assert device.most_waiting >= 1


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5))
def test_any_sizes_one_after_the_other(sizes: list[int]) -> None:
    device = SlowDevice()
    staging = Staging(device, buffer_bytes=32)
    sent = [torch.arange(size, dtype=torch.float32) for size in sizes]
    there = [staging.up(each) for each in sent]
    for device_copy, each in zip(there, sent, strict=True):
        back = torch.full_like(each, -1.0)
        staging.down(device_copy, back)
        assert torch.equal(back, each)
    device.finish()


def test_lanes_of_several_threads_do_not_mix(device: SlowDevice) -> None:
    lanes = Lanes(torch.device("cpu"), port=device)
    results: dict[int, Tensor] = {}

    def work(number: int) -> None:
        def double(lane: Lane) -> Tensor:
            there = lane.up({"w": torch.full((50, 3), float(number))})["w"]
            back = torch.empty(50, 3)
            lane.down(there, back)
            return back

        results[number] = lanes.run(double)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bool((results[number] == number).all()) for number in range(5))
    assert device.buffers == 10


def test_too_little_memory_beside_others_is_tried_again_alone() -> None:
    lanes = Lanes(torch.device("cpu"))
    inside, most, lock = 0, 0, threading.Lock()
    meet = threading.Barrier(3, timeout=10)

    def work(lane: Lane) -> int:
        nonlocal inside, most
        with lock:
            inside += 1
            alone = inside == 1 and tried.get(threading.get_ident(), 0) > 0
        tried[threading.get_ident()] = tried.get(threading.get_ident(), 0) + 1
        try:
            if not alone:
                meet.wait()
                raise torch.OutOfMemoryError("full")
            with lock:
                most = max(most, inside)
            time.sleep(0.005)
            return 1
        finally:
            with lock:
                inside -= 1

    tried: dict[int, int] = {}
    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(lanes.run(work))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [1, 1, 1] and most == 1


def test_too_little_memory_alone_is_an_error() -> None:
    def work(lane: Lane) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        Lanes(torch.device("cpu")).run(work)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_oss", "phi3"])
@pytest.mark.parametrize("method", ["replace", "delta_svd"])
def test_matrices_in_batches_give_what_they_give_one_by_one(
    trio_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, method: str
) -> None:
    from realign.repair import flow

    trio = trio_of(arch, torch.bfloat16)
    request = {
        "finetuned": trio.finetuned,
        "aligned": trio.aligned,
        "base": trio.base,
        "method": method,
        "device": "cpu",
    }
    one = repair(RepairRequest(output=tmp_path / "one", **request))
    sizes: list[int] = []
    groups = Editor._groups

    def counted(self: Editor, *args: object) -> Iterator[list[object]]:
        for group in groups(self, *args):
            sizes.append(len(group))
            yield group

    monkeypatch.setattr(Editor, "_groups", counted)
    monkeypatch.setattr(flow, "batch_size", lambda device: 3)
    many = repair(RepairRequest(output=tmp_path / "many", **request))
    assert max(sizes) > 1 and sum(sizes) == len(one.rows)
    left, right = read_folder(tmp_path / "one"), read_folder(tmp_path / "many")
    assert all(torch.equal(left[name], right[name]) for name in left)
    for row, other in zip(one.rows, many.rows, strict=True):  # figures round with the layout
        assert (row.key, row.outcome, row.facts["rank"]) == (
            other.key,
            other.outcome,
            other.facts["rank"],
        )
        assert other.edit_norm == pytest.approx(row.edit_norm, rel=1e-6)


# --- with a CUDA device --------------------------------------------------------------------------


@cuda
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_oss", "phi3"])
@pytest.mark.parametrize("method", ["replace", "delta_svd"])
@pytest.mark.parametrize("in_flight", [None, 1, 4])
def test_on_cuda_the_output_is_the_cpu_s_within_tolerance(
    trio_of, tmp_path: Path, arch: str, method: str, in_flight: int | None
) -> None:
    trio = trio_of(arch, torch.bfloat16)
    request = {
        "finetuned": trio.finetuned,
        "aligned": trio.aligned,
        "base": trio.base,
        "method": method,
    }
    for device in ("cpu", "cuda"):
        made = RepairRequest(output=tmp_path / device, device=device, **request)
        repair(made, in_flight=in_flight)
    here, there = read_folder(tmp_path / "cpu"), read_folder(tmp_path / "cuda")
    original = read_folder(trio.finetuned)
    for name, tensor in here.items():
        edit = (tensor.double() - original[name].double()).abs().max()
        ulp = torch.finfo(tensor.dtype).eps * tensor.double().abs()
        assert bool(((there[name].double() - tensor.double()).abs() <= ulp + 1e-6 * edit).all())


@cuda
def test_pinned_transfers_are_bit_exact() -> None:
    lanes = Lanes(torch.device("cuda"))
    host = torch.randn(3000, 5000).bfloat16()
    back = torch.empty_like(host.T)
    lanes.run(lambda lane: lane.down(lane.up({"w": host.T})["w"], back))
    torch.cuda.synchronize()
    assert torch.equal(back, host.T)
