"""What holds of a patch over any architecture: peft runs it, we read it, and it can be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapter_support import load, logits, with_adapter
from support.repair_support import Trio, read_folder

from realign.checkpoint.reader import open_checkpoint
from realign.repair.engine import repair
from realign.repair.patch_apply import ApplyRequest, apply_patch
from realign.repair.patch_inspect import inspect_patch
from realign.repair.request import RepairRequest


def repair_to(roles: dict[str, Path], output: Path, **options: Any) -> dict[str, Any]:
    """A low-rank repair; returns its manifest."""
    request: dict[str, Any] = {**roles, "method": "delta_svd", "settings": {"rank": 2}}
    request |= {"device": "cpu", "output": output, **options}
    return dict(repair(RepairRequest(**request)).manifest)


def roles_of(trio: Trio) -> dict[str, Path]:
    return {"base": trio.base, "aligned": trio.aligned, "finetuned": trio.finetuned}


def same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in two.items():
        assert torch.allclose(one[name], tensor, atol=1e-6), name


def check_patch(roles: dict[str, Path], folder: Path, *, strength: float = 1.0) -> None:
    """The same repair as a patch and as a checkpoint: running, merged by peft, read and applied."""
    manifest = repair_to(roles, folder / "patch", patch=True, strength=strength)
    repair_to(roles, folder / "whole", strength=strength)
    repaired = logits(load(folder / "whole"))
    before = logits(load(roles["finetuned"]))
    running = with_adapter(roles["finetuned"], folder / "patch")
    assert float((before - repaired).abs().max()) > 1e-3
    assert torch.allclose(logits(running), repaired, atol=5e-5, rtol=1e-4)
    assert torch.allclose(logits(running.merge_and_unload()), repaired, atol=5e-5, rtol=1e-4)
    whole = read_folder(folder / "whole")
    with open_checkpoint(folder / "patch") as merged:
        same_tensors({name: merged.read(name) for name in merged.tensors}, whole)
    apply_patch(
        ApplyRequest(patch=folder / "patch", model=roles["finetuned"], output=folder / "applied")
    )
    same_tensors(read_folder(folder / "applied"), whole)
    edited = sum((row["edit_norm"] or 0.0) ** 2 for row in manifest["tensors"])
    seen = inspect_patch(folder / "patch")
    assert sum(each.norm**2 for each in seen.modules) == pytest.approx(edited, rel=1e-4)
    assert seen.model_found == "yes"
