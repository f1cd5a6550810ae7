"""Repairs by the methods that train, of the tiny family in one layout and another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.adapter_support import tune, with_adapter
from support.layouts_support import copied
from support.repair_support import read_folder
from support.training_support import DRIFTED, TINY, refusals, repair_tiny, rows, write_rows
from torch import Tensor

from realign.repair.engine import RepairResult

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "one_shot": {"rounds": 2, "example": "safe"},
    "safe_patching": {"lr": 3e-4, "steps": 2, "batch": 4, "p": 1.0},  # p < 1 draws by name
    "somf": {"epochs": 2, "lr": 0.3, "space": "merged"},
    "q_realign": {"prompts": 16, "epochs_first": 1, "epochs_rest": 1, "bits": 4},
}
TEXTS: Mapping[str, tuple[str, ...]] = {
    "one_shot": ("safe_data",),
    "safe_patching": ("harmful_data",),
    "somf": ("safe_data", "keep_data"),
    "q_realign": ("anchors", "keep_data"),
}


@dataclass(frozen=True)
class Bench:
    """One repair per method of the plain layout, and repairs of others."""

    texts: Mapping[str, Path]
    folder: Path

    def repair(self, method: str, out: Path, **options: Any) -> RepairResult:
        given = {name: self.texts[name] for name in TEXTS[method]}
        settings = {**SETTINGS[method], **options.pop("settings", {})}
        return repair_tiny(method, out, settings=settings, **{**given, **options})

    def plain(self, method: str) -> Path:
        out = self.folder / method
        if not out.exists():
            self.repair(method, out)
        return out


def make_bench(folder: Path) -> Bench:
    """Texts for every method, few of each."""
    texts = {
        "safe_data": write_rows(folder / "safe.jsonl", refusals(8)),
        "keep_data": write_rows(folder / "keep.jsonl", rows("keep", 8)),
        "harmful_data": write_rows(folder / "harmful.jsonl", rows("harmful", 8)),
        "anchors": write_rows(folder / "anchors.jsonl", rows("anchors", 20)),
    }
    return Bench(texts, folder)


def near(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> None:
    """Equal up to what rounding elsewhere does to a training; few entries may fall otherwise."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        moved = (tensor - before[name]).abs().max()
        apart = (found[name] - tensor).abs() > 1e-3 * moved + 2e-7
        assert int(apart.sum()) <= 2e-3 * apart.numel(), (name, int(apart.sum()), apart.numel())


def check_adapter(bench: Bench, folder: Path, method: str) -> None:
    """An adapter is repaired as the model that peft makes of it."""
    aligned = TINY / "aligned"
    adapter = tune(
        aligned, folder / "adapter", r=3, size=0.05, target_modules=["q_proj", "down_proj"]
    )
    merged = copied(DRIFTED, folder / "merged")
    with_adapter(aligned, adapter).merge_and_unload().save_pretrained(merged)
    for name, finetuned in {"one": adapter, "two": merged}.items():
        bench.repair(method, folder / name, finetuned=finetuned)
    before, expected = read_folder(merged), read_folder(folder / "two")
    near(read_folder(folder / "one"), expected, before)
    edited = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert len(edited) >= 4
