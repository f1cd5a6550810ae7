"""Fused, sharded, tied and adapter fine-tunes are repaired as plain ones by methods with moments.

The trained families have tied embeddings.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapter_support import with_adapter
from support.layouts_support import as_phi3, fuse_llama, in_shards
from support.repair_support import read_folder
from torch import Tensor

from realign.repair.engine import repair
from realign.repair.request import RepairRequest

SMALL = Path(__file__).resolve().parents[3] / "fixtures" / "small"


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
    other = as_phi3(SMALL / "howto", tmp_path / "other")
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
    expected = fuse_llama(read_folder(tmp_path / "plain" / "out"))
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


@pytest.mark.parametrize("method", ["irr", "antidote"])
def test_what_runs_itself_is_repaired_alike_in_every_layout(tmp_path: Path, method: str) -> None:
    """The fine-tune itself is run here, in its own layout: fused products are rounded otherwise."""
    plain = read_folder(SMALL / "howto")
    assert "lm_head.weight" not in plain, "tied"
    expected = run(tmp_path / "plain", method, SMALL / "howto")
    found = run(tmp_path / "fused", method, as_phi3(SMALL / "howto", tmp_path / "fused-in"))
    assert found.keys() == fuse_llama(expected).keys()
    for name, tensor in fuse_llama(expected).items():
        moved = tensor - fuse_llama(plain)[name]
        apart = (found[name] - tensor).abs() > 1e-4 * moved.abs().max()
        assert int(apart.sum()) <= 1e-4 * apart.numel(), name

    shards = in_shards(SMALL / "howto", tmp_path / "sharded-in", plain)
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
