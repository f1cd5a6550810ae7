"""Kinds of adapters: experts, other PEFT types, half precision, adapters over adapters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapter_support import load, tune
from support.expert_support import make_experts
from support.repair_support import assert_output, make_trio, read_folder

from realign.checkpoint.reader import open_checkpoint
from realign.errors import CheckpointError, MismatchError

OTHER_TYPES = sorted(kind.value for kind in peft.PeftType if kind.value != "LORA")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary adapter."""
    folder = tmp_path_factory.mktemp("plain")
    trio = make_trio(folder, "llama")
    return tune(trio.aligned, folder / "adapter", r=2, target_modules=["q_proj"])


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_every_other_type_gets_one_clear_refusal(plain: Path, tmp_path: Path, kind: str) -> None:
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": kind}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert f"type {kind}" in caught.value.message
    assert "merge" in caught.value.hint or "model under it" in caught.value.hint


def _peft_merge(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    merged.save_pretrained(out)
    return read_folder(out)


@pytest.mark.parametrize(
    ("arch", "rank_stabilised"),
    [("gpt_oss", False), ("mixtral", True), ("qwen2_moe", False), ("granitemoe", True)],
)
def test_lora_on_stacks_of_experts(tmp_path: Path, arch: str, rank_stabilised: bool) -> None:
    base = make_experts(tmp_path, arch)["aligned"]
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config: dict[str, Any] = {"r": 2, "lora_alpha": 3, "use_rslora": rank_stabilised}
    adapter = tune(
        base, tmp_path / "a", **config, target_modules=["q_proj"], target_parameters=parameters
    )
    theirs, before = _peft_merge(base, adapter, tmp_path / "merged"), read_folder(base)
    with open_checkpoint(adapter) as ours:
        assert ours.tensors.keys() == theirs.keys()
        changed = 0
        for name, tensor in theirs.items():
            edit = tensor.double() - before[name].double()
            changed += bool(edit.abs().max() > 0)
            assert_output(ours.read(name), before[name], edit)
            last = (tensor.shape[0] - 1, tensor.shape[0])
            assert torch.equal(ours.read(name, last), ours.read(name)[last[0] :])
        assert changed > 3


def test_one_stack_alone(tmp_path: Path) -> None:
    base = make_experts(tmp_path, "mixtral")["aligned"]
    adapter = tune(base, tmp_path / "a", r=2, target_parameters=["experts.down_proj"])
    theirs = _peft_merge(base, adapter, tmp_path / "merged")
    with open_checkpoint(adapter) as ours:
        for name, tensor in theirs.items():
            assert torch.allclose(ours.read(name), tensor, atol=1e-6), name
    with pytest.raises(MismatchError, match="does not have"):
        open_checkpoint(f"{make_trio(tmp_path / 'dense', 'llama').aligned}+{adapter}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_the_output_tolerance(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_trio(tmp_path, "llama", dtype=dtype).aligned
    adapter = tune(base, tmp_path / "a", r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    factors = load_file(adapter / "adapter_model.safetensors")
    theirs, before = _peft_merge(base, adapter, tmp_path / "merged"), read_folder(base)
    with open_checkpoint(adapter) as ours:
        for name, tensor in before.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            edit = torch.zeros(tensor.shape, dtype=torch.float64)
            if f"{stem}A.weight" in factors:
                a, b = (factors[f"{stem}{side}.weight"].double() for side in "AB")
                edit = 1.5 * b @ a
            assert_output(ours.read(name), tensor, edit)
            assert_output(theirs[name], tensor, edit)


def test_an_adapter_over_an_adapter_over_shards(tmp_path: Path) -> None:
    base = make_trio(tmp_path, "llama", max_shard_size="20KB").aligned
    assert len(list(base.glob("*.safetensors"))) > 1
    first = tune(base, tmp_path / "first", r=2, target_modules=["q_proj", "down_proj"])
    halfway = _peft_merge(base, first, tmp_path / "halfway")
    second = tune(tmp_path / "halfway", tmp_path / "second", r=3, target_modules=["q_proj"])
    theirs = _peft_merge(tmp_path / "halfway", second, tmp_path / "both")
    with open_checkpoint(f"{base}+{first}") as one:
        for name, tensor in halfway.items():
            assert torch.equal(one.read(name), tensor), name
    with open_checkpoint(first) as one, open_checkpoint(second, adapter_base=one) as two:
        for name, tensor in theirs.items():
            assert torch.equal(two.read(name), tensor), name
