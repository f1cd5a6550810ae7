"""LoRA patches: exact, truncated, refused; and what peft makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.repair_support import Trio, read_folder

from realign.checkpoint.matching import Slot
from realign.checkpoint.reader import open_checkpoint
from realign.errors import EmptyEditError, UsageError
from realign.repair.edit import Dense, LowRank
from realign.repair.engine import RepairResult, repair
from realign.repair.patch import factor
from realign.repair.plan import plan
from realign.repair.request import RepairRequest

SLOT = Slot("w.weight", "w.weight", "w", 0)


def _repair(trio: Trio, output: Path, **options: Any) -> RepairResult:
    roles = {"aligned": trio.aligned, "base": trio.base}
    usual = {"method": "delta_svd", "settings": {"rank": 3}}
    request = {"finetuned": trio.finetuned, "output": output, **roles, **usual, **options}
    return repair(RepairRequest(**request))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 9, 4, 1, 5, 22]])).logits


def _load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(("arch", "strength"), [("llama", 1.0), ("gpt2", 0.3), ("phi3", 1.0)])
def test_a_patched_model_gives_the_repaired_logits(
    trio_of, tmp_path: Path, arch: str, strength: float
) -> None:
    trio = trio_of(arch)
    result = _repair(trio, tmp_path / "patch", patch=True, strength=strength)
    _repair(trio, tmp_path / "whole", strength=strength)
    plain = _load(trio.finetuned)
    before = _logits(plain)
    patched = _logits(peft.PeftModel.from_pretrained(plain, tmp_path / "patch").eval())
    repaired = _logits(_load(tmp_path / "whole"))
    assert float((repaired - before).abs().max()) > 1e-2
    assert torch.allclose(patched, repaired, atol=2e-5)
    with open_checkpoint(tmp_path / "patch") as merged:
        for name, tensor in read_folder(tmp_path / "whole").items():
            assert torch.allclose(merged.read(name), tensor, atol=1e-6), name
    config = json.loads((tmp_path / "patch" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trio.finetuned.resolve())
    assert all(row.patch_rank == 3 and row.patch_error == 0.0 for row in result.rows)
    assert sorted(path.name for path in (tmp_path / "patch").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "realign.json",
    ]


def test_the_strength_is_a_dial_in_the_config(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    for t in (1.0, 0.5):
        _repair(trio, tmp_path / f"t{t}", patch=True, strength=t)
    full, half = (tmp_path / f"t{t}" for t in (1.0, 0.5))
    weights = "adapter_model.safetensors"
    assert (full / weights).read_bytes() == (half / weights).read_bytes()
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (full, half)]
    assert set(configs[0]["alpha_pattern"].values()) == {3}
    assert set(configs[1]["alpha_pattern"].values()) == {1.5}
    assert configs[0].keys() == configs[1].keys()


def test_ranks_may_differ_between_matrices(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    settings = {"rank": "energy", "eta": 0.4}
    result = _repair(trio, tmp_path / "patch", patch=True, settings=settings)
    config = json.loads((tmp_path / "patch" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"]) == set(config["target_modules"])
    tensors = load_file(tmp_path / "patch" / "adapter_model.safetensors")
    for row in result.rows:
        module = row.key.removesuffix(".weight")
        assert config["rank_pattern"][module] == row.facts["rank"] == row.patch_rank
        assert tensors[f"base_model.model.{module}.lora_A.weight"].shape[0] == row.patch_rank


def test_large_ranks_are_refused_or_truncated_with_their_error(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    full = {"method": "delta_svd", "settings": {"rank": 32}}
    with pytest.raises(UsageError, match="--max-patch-rank"):
        _repair(trio, tmp_path / "patch", patch=True, **full)
    assert list(tmp_path.iterdir()) == []
    result = _repair(trio, tmp_path / "patch", patch=True, max_patch_rank=2, **full)
    base, aligned = read_folder(trio.base), read_folder(trio.aligned)
    for row in result.rows:
        s2 = torch.linalg.svdvals((aligned[row.key] - base[row.key]).double()).square()
        expected = math.sqrt(float(s2[2:].sum() / s2.sum()))
        assert row.patch_error == pytest.approx(expected, rel=1e-4)
        assert row.patch_rank == 2
    assert any("truncated" in warning for warning in result.warnings)


def test_an_empty_patch_is_no_patch(trio_of, tmp_path: Path) -> None:
    with pytest.raises(EmptyEditError):
        _repair(
            trio_of("llama"), tmp_path / "p", patch=True, method="replace", settings={"rank": 0}
        )
    assert list(tmp_path.iterdir()) == []


def test_rounding_does_not_touch_a_patch(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16)
    tiny = {"patch": True, "strength": 1e-9}
    result = _repair(trio, tmp_path / "patch", **tiny)
    assert all(row.survival is None for row in result.rows)
    with pytest.raises(EmptyEditError, match="--patch"):
        _repair(trio, tmp_path / "whole", strength=1e-9)


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_truncation_is_the_best_approximation(as_dense: bool, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(shape[0], 4, generator=generator)
    right = torch.randn(4, shape[1], generator=generator)
    edit = Dense(left @ right) if as_dense else LowRank(left, right)
    found = factor(SLOT, edit, max_rank=2)
    u, s, vt = torch.linalg.svd((left @ right).double(), full_matrices=False)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    got = found.left_or.double() @ found.right_ri.double()
    assert torch.allclose(got, best, atol=1e-5)
    expected = float((best - u * s @ vt).norm() / s.norm())
    assert found.error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "word"),
    [(torch.float32, None), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")],
)
def test_the_plan_says_that_an_adapter_is_rounded_when_merged(
    trio_of, tmp_path: Path, dtype: torch.dtype, word: str | None
) -> None:
    trio = trio_of("llama", dtype)
    usual: Any = {"aligned": trio.aligned, "base": trio.base, "method": "replace"}
    notes = plan(RepairRequest(finetuned=make_adapter(trio, tmp_path / "adapter"), **usual)).notes
    found = [note for note in notes if "as peft merges it" in note]
    assert len(found) == (word is not None)
    assert all(f"merged in {word} as" in note for note in found)
    full = plan(RepairRequest(finetuned=trio.finetuned, **usual)).notes
    assert not any("as peft merges it" in note for note in full)


def test_an_adapter_is_repaired_merged(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16)
    adapter = make_adapter(trio, tmp_path / "adapter")
    settings = {"rank": 2}
    _repair(trio, tmp_path / "out", finetuned=adapter, method="replace", settings=settings)
    merged = peft.PeftModel.from_pretrained(_load(trio.aligned), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = tmp_path / "whole"
    _repair(trio, whole, finetuned=tmp_path / "merged", method="replace", settings=settings)
    one, two = read_folder(tmp_path / "out"), read_folder(whole)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # peft merges in bfloat16: one rounding apart.
        assert torch.allclose(tensor.float(), two[name].float(), atol=2e-2, rtol=1e-2), name
    assert float(_logits(_load(tmp_path / "out")).abs().max()) < 1e3


def make_adapter(trio: Trio, folder: Path) -> Path:
    """A LoRA fine-tune of the aligned model."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(_load(trio.aligned), config).save_pretrained(folder)
    return folder
