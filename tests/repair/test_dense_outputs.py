"""What every method from weights alone writes, against dense float64, in three output types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.repair_support import assert_output, dense_replace, read_folder
from support.subspace_support import dense_svd_edit
from torch import Tensor

from realign.repair.engine import repair
from realign.repair.request import RepairRequest
from realign.subspace.dare import kept_entries

Weights = Mapping[str, Tensor]
"""One tensor in float64, by role; and its name's draw."""
Reference = Callable[[str, Weights], Tensor]


def alignment(w: Weights) -> Tensor:
    return w["aligned"] - w["base"]


def task(w: Weights) -> Tensor:
    return w["finetuned"] - w["aligned"]


def thinned(name: str, delta: Tensor, rate: float, role: str) -> Tensor:
    kept = kept_entries(delta, rate, seed=5, method="resta", key=name, role=role)
    return torch.where(kept, delta / (1 - rate), 0.0)


def filtered(w: Weights, *, unit: bool = False) -> Tensor:
    v = alignment(w)
    gram = v @ v.T
    c = gram / (torch.linalg.matrix_norm(v, 2) ** 2 if unit else v.norm())
    return c @ task(w) - task(w)


CASES: Mapping[str, tuple[str, Mapping[str, Any], Reference]] = {
    "lox": ("lox", {"k": 2, "alpha": 1.25}, lambda _, w: 1.25 * dense_svd_edit(alignment(w), 2)),
    "lox-randomised": (
        "lox",
        {"k": 2, "svd": "randomised"},
        lambda _, w: dense_svd_edit(alignment(w), 2),
    ),
    "delta_svd": ("delta_svd", {"rank": 2}, lambda _, w: dense_svd_edit(alignment(w), 2)),
    "replace": (
        "replace",
        {"rank": 2},
        lambda _, w: dense_replace(w["base"], w["aligned"], w["finetuned"], rank=2),
    ),
    "resta": ("resta", {"gamma": 0.4, "safety_vector": "base"}, lambda _, w: 0.4 * alignment(w)),
    "resta-task": (
        "resta",
        {"gamma": 0.4, "dare": "task", "drop_rate": 0.5, "safety_vector": "base"},
        lambda n, w: thinned(n, task(w), 0.5, "task") - task(w) + 0.4 * alignment(w),
    ),
    "resta-safety": (
        "resta",
        {"gamma": 0.4, "dare": "safety", "drop_rate": 0.5, "safety_vector": "base"},
        lambda n, w: 0.4 * thinned(n, alignment(w), 0.5, "safety"),
    ),
    "wise_ft": ("wise_ft", {"a": 0.3}, lambda _, w: -0.3 * task(w)),
    "safe_lora": ("safe_lora", {"tau": 2.0}, lambda _, w: filtered(w)),
    "safe_lora-unit": (
        "safe_lora",
        {"tau": 2.0, "projector": "unit"},
        lambda _, w: filtered(w, unit=True),
    ),
    "safemerge": (
        "safemerge",
        {"tau": 2.0, "w": 0.7},
        lambda _, w: 0.3 * (w["safety"] - w["finetuned"]),
    ),
}


RUNS = [
    *((case, dtype) for case in CASES for dtype in (torch.bfloat16, torch.float32)),
    *((case, torch.float16) for case in ("lox", "resta-task", "safe_lora", "replace")),
]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_the_file_is_within_one_ulp_of_the_dense_reference(
    trio_of, tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    method, settings, reference = CASES[case]
    trio = trio_of("llama", dtype)
    folders = {
        "finetuned": trio.finetuned,
        "aligned": trio.aligned,
        "base": trio.base,
        "safety": trio.unaligned,  # any weights will do
    }
    if method != "safemerge":
        del folders["safety"]
    result = repair(
        RepairRequest(
            **folders,
            output=tmp_path / "out",
            method=method,
            settings=settings,
            scope="block_linear",
            strength=0.7,
            seed=5,
            device="cpu",
        )
    )
    weights = {role: read_folder(folder) for role, folder in folders.items()}
    out = read_folder(tmp_path / "out")
    edited = 0
    for name, tensor in weights["finetuned"].items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(out[name], tensor), name
            continue
        double = {role: each[name].double() for role, each in weights.items()}
        assert_output(out[name], tensor, 0.7 * reference(name, double))
        edited += 1
    assert edited == result.totals.edited == 14
