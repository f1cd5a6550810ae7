"""A fine-tune that is stored fused is repaired by the moments of a plain aligned model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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
