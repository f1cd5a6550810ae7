"""Fused, sharded, tied and adapter fine-tunes are repaired as plain ones by methods with moments.

The trained families have tied embeddings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.adapter_support import with_adapter
from support.repair_support import read_folder
from torch import Tensor

from realign.repair.engine import repair
from realign.repair.request import RepairRequest

SMALL = Path(__file__).resolve().parents[3] / "fixtures" / "small"
PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Llama as Phi-3 stores it."""
    found: dict[str, Tensor] = {}
    whole = {part: (name, parts) for name, parts in PARTS.items() for part in parts}
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        target, parts = whole.get(module, ("", ()))
        if not parts:
            found[name] = tensor
        elif module == parts[0]:
            rows = [tensors[name.replace(module, part)] for part in parts]
            found[name.replace(module, target)] = torch.cat(rows).contiguous()
    return found


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("safe_delta", {"s": 0.4, "budget": "relative"}),
        ("nlsr", {"fraction": 1.0, "reference": "aligned"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fused_projections_are_repaired_as_their_parts(
    tmp_path: Path, method: str, settings: Mapping[str, Any]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((SMALL / "howto" / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}), "utf-8")
    save_file(fused(read_folder(SMALL / "howto")), other / "model.safetensors", {"format": "pt"})
    for name, finetuned in {"plain": SMALL / "howto", "fused": other}.items():
        repair(
            RepairRequest(
                finetuned=finetuned,
                aligned=SMALL / "aligned",
                output=tmp_path / name / "out",
                method=method,
                settings=settings,
                anchors=SMALL / "suites" / "anchors.jsonl",
                cache_dir=tmp_path / "cache",
                device="cpu",
            )
        )
    expected = fused(read_folder(tmp_path / "plain" / "out"))
    found = read_folder(tmp_path / "fused" / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


DATA: Mapping[str, Any] = {
    "irr": {"base": SMALL / "base", "task_data": SMALL / "suites" / "howto.jsonl"},
    "antidote": {"harmful_data": SMALL / "suites" / "howto.jsonl"},
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "irr": {"safety_vector": "base", "nsamples": 12, "targets": "all"},
    "antidote": {"alpha": 0.1, "space": "merged", "samples": 12},
}


def run(out: Path, method: str, finetuned: Path) -> dict[str, Tensor]:
    repair(
        RepairRequest(
            finetuned=finetuned,
            aligned=SMALL / "aligned",
            output=out,
            method=method,
            settings=SETTINGS[method],
            cache_dir=out.parent / "cache",
            device="cpu",
            **DATA[method],
        )
    )
    return read_folder(out)


def copied(source: Path, target: Path, **files: Mapping[str, Tensor]) -> Path:
    """A model with other weight files."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    for name, tensors in files.items():
        save_file(dict(tensors), target / f"{name}.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("method", ["irr", "antidote"])
def test_what_runs_itself_is_repaired_alike_in_every_layout(tmp_path: Path, method: str) -> None:
    """The fine-tune itself is run here, in its own layout: fused products are rounded otherwise."""
    plain = read_folder(SMALL / "howto")
    assert "lm_head.weight" not in plain, "tied"
    expected = run(tmp_path / "plain", method, SMALL / "howto")
    other = copied(SMALL / "howto", tmp_path / "fused-in", model=fused(plain))
    config = json.loads((other / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}), "utf-8")
    found = run(tmp_path / "fused", method, other)
    assert found.keys() == fused(expected).keys()
    for name, tensor in fused(expected).items():
        moved = tensor - fused(plain)[name]
        apart = (found[name] - tensor).abs() > 1e-4 * moved.abs().max()
        assert int(apart.sum()) <= 1e-4 * apart.numel(), name

    transformers.AutoModelForCausalLM.from_pretrained(SMALL / "howto").save_pretrained(
        shards := copied(SMALL / "howto", tmp_path / "sharded-in"), max_shard_size="300KB"
    )
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    found = run(tmp_path / "sharded", method, shards)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("method", ["irr", "antidote"])
def test_an_adapter_is_repaired_as_the_model_that_peft_merges(tmp_path: Path, method: str) -> None:
    adapter, merged = SMALL / "lora_p5", tmp_path / "merged"
    shutil.copytree(SMALL / "aligned", merged)
    with_adapter(SMALL / "aligned", adapter).merge_and_unload().save_pretrained(merged)
    found, expected = (run(tmp_path / n, method, f) for n, f in {"a": adapter, "m": merged}.items())
    before = read_folder(merged)
    assert found.keys() == expected.keys()
    edited = [name for name in found if not torch.equal(expected[name], before[name])]
    assert len(edited) >= 9
    for name in found:
        moved = (expected[name] - before[name]).abs().max()
        apart = (found[name] - expected[name]).abs() > 1e-4 * moved + 2e-7
        assert int(apart.sum()) <= 1e-3 * apart.numel(), name
