"""Tensors without entries pass through every kind of repair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.repair_support import Trio, read_folder

from realign.checkpoint.verification import verify_output
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


@pytest.mark.parametrize("shape", [(4, 0), (0, 4)])
@pytest.mark.parametrize("method", ["resta", "replace"])
def test_they_may_stand_last_in_a_file(
    trio_of, tmp_path: Path, shape: tuple[int, int], method: str
) -> None:
    """Where a file ends with its last byte, something may still belong to it."""
    trio = trio_of("llama", torch.bfloat16, "20KB")
    added: set[str] = set()
    for role in ("base", "aligned", "finetuned"):
        folder = shutil.copytree(getattr(trio, role), tmp_path / role)
        index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
        for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
            name = f"model.zz{number}.weight"
            tensors = load_file(file) | {name: torch.empty(shape, dtype=torch.bfloat16)}
            save_file(tensors, file, metadata={"format": "pt"})
            index["weight_map"][name] = file.name
            added.add(name)
            with safe_open(file, "pt") as opened:
                assert opened.offset_keys()[-1] == name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert len(added) == 2
    result = repair(
        RepairRequest(
            finetuned=tmp_path / "finetuned",
            aligned=tmp_path / "aligned",
            base=tmp_path / "base",
            method=method,
            output=tmp_path / "out",
        )
    )
    assert verify_output(result.output).problems == ()
    written = read_folder(result.output)
    assert {name: tuple(written[name].shape) for name in added} == dict.fromkeys(added, shape)


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
