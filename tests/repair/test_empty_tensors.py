"""Tensors without entries pass through every kind of repair."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.repair_support import Trio, read_folder

from realign.repair.engine import repair
from realign.repair.plan import plan
from realign.repair.request import RepairRequest

EMPTY = {
    "model.layers.1.mlp.none_proj.weight": torch.empty(0, 32),
    "model.layers.1.mlp.void_proj.weight": torch.empty(32, 0),
    "model.layers.1.mlp.none_proj.bias": torch.empty(0),
}


def _with_empty(trio: Trio, folder: Path) -> Trio:
    for role in ("base", "aligned", "finetuned"):
        shutil.copytree(getattr(trio, role), folder / role)
        file = folder / role / "model.safetensors"
        save_file(load_file(file) | EMPTY, file, metadata={"format": "pt"})
    return Trio(folder / "base", folder / "aligned", folder / "unaligned", folder / "finetuned")


@pytest.mark.parametrize(
    ("method", "scope"),
    [
        *((method, "block_linear") for method in ("resta", "wise_ft", "delta_svd", "replace")),
        *((method, "all") for method in ("resta", "wise_ft")),
    ],
)
def test_they_are_copied(trio_of, tmp_path: Path, method: str, scope: str) -> None:
    trio = _with_empty(trio_of("llama"), tmp_path)
    request = RepairRequest(
        finetuned=trio.finetuned,
        aligned=trio.aligned,
        base=trio.base,
        method=method,
        scope=scope,
        output=tmp_path / "out",
    )
    reasons = {pair.role.name: pair.reason for pair in plan(request).copies}
    copied = [name for name in EMPTY if scope == "all" or name.endswith("weight")]
    assert {reasons[name] for name in copied} == {"it has no entries"}
    result = repair(request)
    assert result.rows and not {row.tensor for row in result.rows} & set(EMPTY)
    written = read_folder(result.output)
    assert {name: written[name].shape for name in EMPTY} == {n: t.shape for n, t in EMPTY.items()}


def test_a_patch_leaves_them_out(trio_of, tmp_path: Path) -> None:
    trio = _with_empty(trio_of("llama"), tmp_path)
    result = repair(
        RepairRequest(
            finetuned=trio.finetuned,
            aligned=trio.aligned,
            base=trio.base,
            method="delta_svd",
            settings={"rank": 2},
            patch=True,
            output=tmp_path / "out",
        )
    )
    written = load_file(result.output / "adapter_model.safetensors")
    assert written and not [name for name in written if "none_proj" in name or "void" in name]
