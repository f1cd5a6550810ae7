"""Patches over every way of storing linear layers and experts: peft runs them, we read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.adapter_support import load, logits, with_adapter
from support.expert_support import make_experts
from support.patch_support import check_patch, repair_to, roles_of, same_tensors
from support.repair_support import Trio, read_folder

from realign.checkpoint.reader import open_checkpoint
from realign.errors import UsageError
from realign.repair.patch_apply import ApplyRequest, apply_patch

TrioOf = Callable[..., Trio]


@pytest.mark.parametrize("arch", ["mixtral", "granitemoe", "gpt_oss"])
def test_patches_reach_experts(tmp_path: Path, arch: str) -> None:
    """Also where files hold single experts and the running model a stack of them."""
    check_patch(make_experts(tmp_path, arch), tmp_path, strength=0.7)


@pytest.mark.parametrize("arch", ["gpt2", "phi3"])
def test_shards_do_not_matter(trio_of: TrioOf, tmp_path: Path, arch: str) -> None:
    trio = trio_of(arch, max_shard_size="20KB")
    assert len(list(trio.finetuned.glob("*.safetensors"))) > 1
    check_patch(roles_of(trio), tmp_path)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A vision-language family whose files and modules have different names; ties its head."""
    folder = tmp_path_factory.mktemp("gemma")
    text: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(2)
    model = transformers.Gemma3ForConditionalGeneration(config)
    found: dict[str, Path] = {}
    for role in ("base", "aligned", "finetuned"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape))
        found[role] = folder / role
        model.save_pretrained(found[role])
    return found


def test_a_patch_finds_modules_that_files_name_otherwise(
    gemma: dict[str, Path], tmp_path: Path
) -> None:
    import peft

    repair_to(gemma, tmp_path / "patch", patch=True)
    repair_to(gemma, tmp_path / "whole")
    kind = transformers.Gemma3ForConditionalGeneration
    plain = kind.from_pretrained(gemma["finetuned"]).eval()
    running = peft.PeftModel.from_pretrained(plain, tmp_path / "patch").eval()
    repaired = kind.from_pretrained(tmp_path / "whole").eval()
    assert torch.allclose(logits(running), logits(repaired), atol=5e-5, rtol=1e-4)
    with open_checkpoint(tmp_path / "patch") as merged:
        whole = read_folder(tmp_path / "whole")
        same_tensors({name: merged.read(name) for name in merged.tensors}, whole)


def test_tied_embeddings_are_no_patch(gemma: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="embeddings and output head"):
        repair_to(gemma, tmp_path / "patch", patch=True, scope="matrices")
    assert not (tmp_path / "patch").exists()


def test_embeddings_and_head_of_their_own(trio_of: TrioOf, tmp_path: Path) -> None:
    trio = trio_of("qwen2")
    for name, options in (("patch", {"patch": True}), ("whole", {})):
        repair_to(roles_of(trio), tmp_path / name, scope="matrices", **options)
    running = with_adapter(trio.finetuned, tmp_path / "patch")
    assert torch.allclose(logits(running), logits(load(tmp_path / "whole")), atol=2e-5, rtol=1e-4)
    apply_patch(
        ApplyRequest(patch=tmp_path / "patch", model=trio.finetuned, output=tmp_path / "applied")
    )
    same_tensors(read_folder(tmp_path / "applied"), read_folder(tmp_path / "whole"))
