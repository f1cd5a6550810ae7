"""Passes side by side against passes one after the other, and how they end when one fails."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.block_support import CONFIGS, block_model
from support.model_support import loaded

from realign.errors import OutputError
from realign.model.accumulate import Moments
from realign.model.lockstep import decoder_blocks, run_in_lockstep
from realign.model.moments import MomentRequest, TokenSequence, collect_moments
from realign.model.moments_file import MomentsWriter, StoredMoments
from realign.subspace.threads import torch_threads

TEXTS = [
    TokenSequence(tuple(4 + (5 * i + 3 * j) % 40 for j in range(length)), (True,) * length)
    for i, length in enumerate([9, 5, 12, 7, 7, 3])
]


def _passes_alive() -> int:
    return sum(each.name == "realign-pass" for each in threading.enumerate())


def _paths(model: Any) -> list[str]:
    kinds = ("Linear", "Conv1D")
    return [n for n, m in model.named_modules() if type(m).__name__ in kinds and "head" not in n]


class _Order:
    """Takes moments and remembers in which order they came."""

    def __init__(self) -> None:
        self.puts: list[tuple[str, ...]] = []
        self.moments: dict[str, Moments] = {}

    def put(self, keys: Any, moments: Moments) -> None:
        self.puts.append(tuple(keys))
        for key in keys:
            self.moments[key] = self.moments[key].merge(moments) if key in self.moments else moments


@pytest.mark.parametrize("arch", CONFIGS)
def test_lockstep_gives_the_bits_of_one_pass_after_the_other(arch: str) -> None:
    """Every linear layer's inputs, batch by batch, by hooks of the test's own."""
    model: Any = block_model(arch)
    subject = loaded(model)
    paths = _paths(model)
    requests = {path: MomentRequest("input", path) for path in paths}
    order = _Order()
    found = collect_moments(subject, TEXTS, requests=requests, batch_size=1, sink=order)
    sums: dict[str, torch.Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def see(module: Any, args: Any) -> None:
            v = args[0][torch.ones(args[0].shape[:-1], dtype=torch.bool)].double()
            if path not in sums:
                sums[path] = torch.zeros(v.shape[1], v.shape[1], dtype=torch.float64)
            sums[path].addmm_(v.T, v)

        return see

    handles = [model.get_submodule(p).register_forward_pre_hook(hook(p)) for p in paths]
    with torch.no_grad():
        for text in sorted(TEXTS, key=lambda each: -len(each.ids)):
            model.base_model(torch.tensor([text.ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    assert set(order.moments) | set(found.missing) == set(paths)
    assert len(order.moments) >= 4
    for path, moments in order.moments.items():
        assert torch.equal(moments.s2, (sums[path] + sums[path].T) / 2), path
    layers = [
        int(keys[0].split(".layers.")[-1].split(".")[0])
        for keys in order.puts
        if ".layers." in keys[0]
    ]
    assert layers == sorted(layers), "one block is handed on before the next is touched"
    assert _passes_alive() == 0


def test_all_pass_one_block_before_any_enters_the_next() -> None:
    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    seen: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for at, block in enumerate(blocks):
            block(torch.zeros(1, 2))
            seen.append((at, number))

    stages: list[int] = []
    run_in_lockstep(
        [lambda n=n: work(n) for n in range(3)],
        blocks=blocks,
        stage_done=lambda: stages.append(len(seen)),
    )
    assert seen == [(at, number) for at in range(3) for number in range(3)]
    assert stages == [0, 3, 6, 9]


def test_passes_have_the_threads_of_the_caller() -> None:
    seen: list[int] = []
    for count in (3, 1):
        with torch_threads(count):
            run_in_lockstep([lambda: seen.append(torch.get_num_threads())] * 2, blocks=[])
            assert torch.get_num_threads() == count
    assert seen == [3, 3, 1, 1]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_failing_pass_unwinds_all_others(kind: type[BaseException]) -> None:
    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    unwound: list[int] = []

    def work(number: int) -> None:
        try:
            for at, block in enumerate(blocks):
                block(torch.zeros(1, 2))
                if (number, at) == (1, 1):
                    raise kind("broken")
        except Exception as error:  # as a model's own code might
            raise kind("seen") from error
        finally:
            unwound.append(number)

    with pytest.raises(kind):
        run_in_lockstep([lambda n=n: work(n) for n in range(3)], blocks=blocks)
    assert sorted(unwound) == [0, 1, 2]
    assert _passes_alive() == 0
    assert not any(block._forward_pre_hooks for block in blocks)


def test_an_interruption_leaves_no_thread_and_no_file(tmp_path: Path) -> None:
    model: Any = block_model("llama")
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    requests = {path: MomentRequest("input", path) for path in _paths(model)}
    path = tmp_path / "moments.safetensors"
    with pytest.raises(KeyboardInterrupt), MomentsWriter(path, about={}) as writer:
        collect_moments(loaded(model), TEXTS, requests=requests, batch_size=1, sink=writer)
    assert _passes_alive() == 0
    assert list(tmp_path.iterdir()) == []


def test_waves_merge_to_the_whole(tmp_path: Path) -> None:
    subject = loaded(block_model("qwen2_moe"))
    requests = {path: MomentRequest("input", path) for path in _paths(subject.model)}
    whole = collect_moments(subject, TEXTS, requests=requests, batch_size=2)
    path = tmp_path / "moments.safetensors"
    with MomentsWriter(path, about={"a": "b"}) as writer:
        collect_moments(subject, TEXTS, requests=requests, batch_size=2, held_bytes=1, sink=writer)
        writer.finish({})
    stored = StoredMoments(path)
    assert set(stored) == set(whole)
    for key, moments in whole.items():
        assert stored[key].n == moments.n
        assert torch.allclose(stored[key].s2, moments.s2, rtol=1e-12, atol=1e-12)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_diagonal_is_that_of_the_whole() -> None:
    subject = loaded(block_model("mixtral"))
    requests = {path: MomentRequest("input", path) for path in _paths(subject.model)}
    whole = collect_moments(subject, TEXTS, requests=requests)
    for precision in ("float64", "float32"):
        found: Any = collect_moments(
            subject, TEXTS, requests=requests, diagonal=True, precision=precision
        )
        assert set(found) == set(whole)
        for key, moments in whole.items():
            assert found[key].s2.shape == moments.s1.shape
            scale = float(moments.diagonal.max())
            assert (found[key].s2 - moments.diagonal).abs().max() <= 1e-5 * scale


def test_a_disk_that_refuses_is_an_error_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        MomentsWriter(tmp_path / "nowhere" / "moments.safetensors", about={})


def test_blocks_are_found_without_their_inner_lists() -> None:
    model: Any = block_model("mixtral")
    assert decoder_blocks(model) == list(model.model.layers)
