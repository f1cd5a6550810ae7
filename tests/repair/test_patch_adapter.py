"""A repaired adapter: the fine-tune's LoRA and the repair in one adapter, against peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_support import load, logits, tune, with_adapter
from support.repair_support import Trio, read_folder

from realign.checkpoint.reader import open_checkpoint
from realign.errors import UsageError
from realign.repair.engine import RepairResult, repair
from realign.repair.plan import plan
from realign.repair.request import RepairRequest

TrioOf = Callable[..., Trio]
SOME = ["q_proj", "down_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 2, "lora_alpha": 5, "target_modules": SOME}),
    "rank-stabilised": (
        "llama",
        {"r": 3, "lora_alpha": 5, "target_modules": SOME, "use_rslora": True},
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*SOME, "v_proj"],
            "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"q_proj": 5, "layers.0.mlp.down_proj": 1},
        },
    ),
    "regex and layers": (
        "llama",
        {"r": 2, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    ),
    "all-linear": ("qwen2", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "bias all": ("qwen2", {"r": 2, "target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("qwen2", {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "modules_to_save": (
        "qwen2",
        {"r": 2, "target_modules": SOME, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "a saved linear": (
        "qwen2",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["o_proj"]},
    ),
    "trained tokens": (
        "qwen2",
        {"r": 2, "target_modules": SOME, "trainable_token_indices": [5, 2]},
    ),
    "embeddings": ("qwen2", {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "conv1d": ("gpt2", {"r": 3, "lora_alpha": 4, "target_modules": ["c_attn", "c_fc"]}),
    "fused": ("phi3", {"r": 3, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}  # fmt: skip


def _repair(trio: Trio, finetuned: Path, output: Path, **options: Any) -> RepairResult:
    roles = {"aligned": trio.aligned, "base": trio.base}
    usual = {"method": "delta_svd", "settings": {"rank": 2}, "device": "cpu"}
    request: dict[str, Any] = {"finetuned": finetuned, "output": output, **roles, **usual}
    return repair(RepairRequest(**{**request, **options}))


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_runs_like_the_repaired_checkpoint(
    trio_of: TrioOf, tmp_path: Path, case: str
) -> None:
    arch, config = CASES[case]
    strength = 0.3 if arch in {"llama", "gpt2"} else 1.0
    trio = trio_of(arch)
    adapter = tune(trio.aligned, tmp_path / "adapter", **config)
    result = _repair(trio, adapter, tmp_path / "new", patch=True, strength=strength)
    _repair(trio, adapter, tmp_path / "whole", strength=strength)
    repaired = logits(load(tmp_path / "whole"))
    running = with_adapter(trio.aligned, tmp_path / "new")
    assert float((logits(with_adapter(trio.aligned, adapter)) - repaired).abs().max()) > 1e-3
    assert torch.allclose(logits(running), repaired, atol=5e-5, rtol=1e-4)
    assert torch.allclose(logits(running.merge_and_unload()), repaired, atol=5e-5, rtol=1e-4)
    whole = read_folder(tmp_path / "whole")
    with open_checkpoint(tmp_path / "new") as merged:
        assert merged.tensors.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.allclose(merged.read(name), tensor, atol=1e-6), name
    assert result.manifest["patch"]["extends_adapter"] is True
    assert result.manifest["patch"]["error"] == 0.0


def test_the_fine_tunes_own_factors_stay_bit_for_bit(trio_of: TrioOf, tmp_path: Path) -> None:
    trio = trio_of("llama")
    adapter = tune(trio.aligned, tmp_path / "adapter", **CASES["plain"][1])
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    _repair(trio, adapter, tmp_path / "new", patch=True)
    old = load_file(adapter / "adapter_model.safetensors")
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for name, tensor in old.items():
        own = new[name][:2] if "lora_A" in name else new[name][:, :2]
        assert torch.equal(own, tensor), name
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trio.aligned.resolve())
    assert set(config["rank_pattern"].values()) == {2, 4}
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_half_precision_factors_stay_exact(trio_of: TrioOf, tmp_path: Path) -> None:
    trio = trio_of("llama")
    adapter = tune(trio.aligned, tmp_path / "adapter", **CASES["plain"][1])
    weights = adapter / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({n: t.bfloat16() for n, t in load_file(weights).items()}, weights)
    _repair(trio, adapter, tmp_path / "new", patch=True)
    _repair(trio, adapter, tmp_path / "whole")
    running = with_adapter(trio.aligned, tmp_path / "new")
    assert torch.allclose(logits(running), logits(load(tmp_path / "whole")), atol=5e-5, rtol=1e-4)


def test_matrices_beside_the_blocks(trio_of: TrioOf, tmp_path: Path) -> None:
    """Embeddings and head are edited too: under LoRA, and where they were trained whole."""
    trio = trio_of("qwen2")
    for case in ("modules_to_save", "embeddings"):
        adapter = tune(trio.aligned, tmp_path / f"adapter {case}", **CASES[case][1])
        options: dict[str, Any] = {"scope": "matrices"}
        _repair(trio, adapter, tmp_path / f"new {case}", patch=True, **options)
        _repair(trio, adapter, tmp_path / f"whole {case}", **options)
        running = with_adapter(trio.aligned, tmp_path / f"new {case}")
        repaired = logits(load(tmp_path / f"whole {case}"))
        assert torch.allclose(logits(running), repaired, atol=5e-5, rtol=1e-4), case
    adapter = tune(trio.aligned, tmp_path / "tokens", **CASES["trained tokens"][1])
    with pytest.raises(UsageError, match="single tokens"):
        _repair(trio, adapter, tmp_path / "no", patch=True, scope="matrices")
    assert not (tmp_path / "no").exists()


def test_lora_bias_needs_a_bias_to_be_merged_into(trio_of: TrioOf, tmp_path: Path) -> None:
    trio = trio_of("qwen2")
    adapter = tune(
        trio.aligned, tmp_path / "adapter", r=2, target_modules=["q_proj"], lora_bias=True
    )
    with pytest.raises(UsageError, match="lora_bias"):
        _repair(trio, adapter, tmp_path / "new", patch=True)
    assert not (tmp_path / "new").exists()


def test_dora_is_refused_before_any_work(trio_of: TrioOf, tmp_path: Path) -> None:
    trio = trio_of("llama")
    adapter = tune(trio.aligned, tmp_path / "adapter", r=2, target_modules=SOME, use_dora=True)
    request: Any = {"finetuned": adapter, "aligned": trio.aligned, "base": trio.base}
    with pytest.raises(UsageError, match="DoRA") as caught:
        plan(RepairRequest(**request, method="delta_svd", patch=True))
    assert "merge the adapter with peft" in caught.value.hint
    plan(RepairRequest(**request, method="delta_svd"))
