"""What goes wrong in the middle: bad numbers, empty edits, interruptions, vetoes."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.repair_support import Trio, folder_bytes, read_folder

from realign.errors import EmptyEditError, GateFailedError, NonFiniteError
from realign.progress import SilentProgress
from realign.repair.engine import repair
from realign.repair.request import RepairRequest

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def _request(trio: Trio, output: Path, **options: object) -> RepairRequest:
    usual = {"aligned": trio.aligned, "base": trio.base, "method": "replace", "output": output}
    return RepairRequest(**{"finetuned": trio.finetuned, **usual, **options})


def _changed(folder: Path, source: Path, name: str, change) -> Path:
    """A copy of a checkpoint with one tensor changed."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _with(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return change


def _nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if "out" in path.name]


@pytest.mark.parametrize("role", ["finetuned", "aligned", "base"])
@pytest.mark.parametrize("method", ["replace", "resta"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_numbers_are_named_with_their_checkpoint(
    trio_of, tmp_path: Path, role: str, method: str, value: float
) -> None:
    trio = trio_of("llama", torch.bfloat16)
    bad = _changed(tmp_path / "bad", getattr(trio, role), UP, _with(value))
    with pytest.raises(NonFiniteError) as caught:
        repair(_request(trio, tmp_path / "out", method=method, **{role: bad}))
    assert UP in str(caught.value) and str(bad) in str(caught.value) and role in str(caught.value)
    assert _nothing_left(tmp_path)


def test_bad_numbers_in_a_copied_tensor_are_found_too(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16)
    bad = _changed(tmp_path / "bad", trio.finetuned, NORM, _with(math.nan))
    with pytest.raises(NonFiniteError, match=NORM):
        repair(_request(trio, tmp_path / "out", finetuned=bad))
    assert _nothing_left(tmp_path)


def test_a_stored_mask_may_hold_infinity(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16)
    shutil.copytree(trio.finetuned, tmp_path / "masked")
    file = tmp_path / "masked" / "model.safetensors"
    mask = {"model.layers.0.self_attn.bias": torch.full((1, 4, 4), -math.inf)}
    save_file(load_file(file) | mask, file, metadata={"format": "pt"})
    repair(_request(trio, tmp_path / "out", finetuned=tmp_path / "masked"))
    assert torch.equal(read_folder(tmp_path / "out")[next(iter(mask))], next(iter(mask.values())))


def test_an_edit_that_overflows_is_refused(trio_of, tmp_path: Path) -> None:
    trio = trio_of("qwen2", torch.float16)
    with pytest.raises(NonFiniteError, match=r"overflows .*float16"):
        repair(_request(trio, tmp_path / "out", method="resta", settings={"gamma": 1e8}))
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"settings": {"rank": 0}}, "rank is 0"),
        ({"method": "resta", "settings": {"gamma": 0.0}}, "gamma is 0"),
        ({"method": "resta", "strength": 1e-12}, "smaller than what"),
    ],
)
def test_a_repair_that_changes_nothing_fails(
    trio_of, tmp_path: Path, options: dict, words: str
) -> None:
    trio = trio_of("llama", torch.bfloat16)
    with pytest.raises(EmptyEditError, match=words) as caught:
        repair(_request(trio, tmp_path / "out", **options))
    assert caught.value.exit_code == 1
    assert _nothing_left(tmp_path)


def test_untouched_tensors_say_why(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    base = _changed(
        tmp_path / "base", trio.base, name, lambda _: read_folder(trio.aligned)[name].clone()
    )
    result = repair(_request(trio, tmp_path / "out", base=base))
    (row,) = [row for row in result.rows if row.outcome == "unchanged"]
    assert (row.key, row.reason) == (name, "alignment did not touch this tensor")
    assert result.totals.unchanged == 1 and result.totals.edited == 13
    assert torch.equal(read_folder(tmp_path / "out")[name], read_folder(trio.finetuned)[name])


# --- interruptions -------------------------------------------------------------------------------


class _Interrupt(SilentProgress):
    """Ctrl-C after so many bytes of output."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, *, total: float | None, unit: str = "") -> Iterator[object]:
        with super().task(description, total=total, unit=unit) as silent:
            yield self if description == "repairing" else silent

    def advance(self, amount: float = 1.0) -> None:
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize("method", ["replace", "resta"])
def test_an_interrupted_run_is_resumed_with_the_same_bytes(
    trio_of, tmp_path: Path, method: str
) -> None:
    trio = trio_of("llama", torch.bfloat16, "20KB")
    repair(_request(trio, tmp_path / "whole", method=method))
    stop = _Interrupt(after=22_000)
    with pytest.raises(KeyboardInterrupt):
        repair(_request(trio, tmp_path / "out", method=method), progress=stop)
    assert not (tmp_path / "out").exists()
    finished = _finished(tmp_path / ".out.realign-partial")
    assert finished
    resume = _Interrupt(after=10**9)
    result = repair(_request(trio, tmp_path / "out", method=method), progress=resume)
    assert any("resuming" in note for note in resume.notes)
    written = 10**9 - resume.left
    assert 0 < written < 25_000  # the finished file was not written again
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert len(result.rows) == (14 if method == "replace" else 20)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


class _LateInterrupt(_Interrupt):
    """Ctrl-C in the caller's thread while another writes, on a slow disk."""

    def advance(self, amount: float = 1.0) -> None:
        self.left -= amount
        main = threading.main_thread().ident
        assert main is not None and threading.get_ident() != main
        if self.left < 0 <= self.left + amount:
            time.sleep(0.1)  # the caller waits by now
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.1)


@pytest.mark.parametrize("method", ["replace", "resta"])
def test_ctrl_c_while_a_thread_writes(trio_of, tmp_path: Path, method: str) -> None:
    trio = trio_of("llama", torch.bfloat16, "20KB")
    repair(_request(trio, tmp_path / "whole", method=method))
    stop = _LateInterrupt(after=22_000)
    with pytest.raises(KeyboardInterrupt):
        repair(_request(trio, tmp_path / "out", method=method), progress=stop)
    threads = [thread.name for thread in threading.enumerate()]
    assert not [name for name in threads if name.startswith("realign-")]
    partial = tmp_path / ".out.realign-partial"
    left, files = stop.left, folder_bytes(partial)
    result = repair(_request(trio, tmp_path / "out", method=method))  # at once: nobody interferes
    assert stop.left == left and {"journal.json"} < set(files)
    assert folder_bytes(result.output) == folder_bytes(tmp_path / "whole")
    assert not partial.exists()


def test_another_repair_does_not_take_up_what_is_left(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16, "20KB")
    with pytest.raises(KeyboardInterrupt):
        repair(_request(trio, tmp_path / "out"), progress=_Interrupt(after=22_000))
    assert _finished(tmp_path / ".out.realign-partial")
    repair(_request(trio, tmp_path / "out", strength=0.5))
    repair(_request(trio, tmp_path / "whole", strength=0.5))
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def _finished(partial: Path) -> list[str]:
    import json

    return list(json.loads((partial / "journal.json").read_text())["shards"])


# --- the veto before the commit ------------------------------------------------------------------


def test_before_commit_sees_a_whole_model_and_may_refuse_it(trio_of, tmp_path: Path) -> None:
    import transformers

    trio = trio_of("llama", torch.bfloat16, "20KB")
    seen: list[Path] = []

    def veto(folder: Path) -> None:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert (folder / "realign.json").is_file()
        assert not (tmp_path / "out").exists()
        seen.append(folder)
        raise GateFailedError("too harmful")

    with pytest.raises(GateFailedError):
        repair(_request(trio, tmp_path / "out"), before_commit=veto)
    assert seen and _nothing_left(tmp_path)
    repair(_request(trio, tmp_path / "out"), before_commit=seen.append)
    assert (tmp_path / "out" / "realign.json").is_file()


def test_inputs_are_never_touched(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16, "20KB")
    before = [folder_bytes(folder) for folder in (trio.base, trio.aligned, trio.finetuned)]
    repair(_request(trio, tmp_path / "out"))
    assert before == [folder_bytes(folder) for folder in (trio.base, trio.aligned, trio.finetuned)]
