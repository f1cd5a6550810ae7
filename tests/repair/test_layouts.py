"""Checkpoints of one family in different layouts: the repair is the same, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.layouts_support import (
    Respell,
    granite_in_memory,
    make_family,
    nested,
    respelled,
    split_phi3,
    stack_experts,
    stack_experts_transposed,
    under,
)
from support.repair_support import Trio, read_folder
from torch import Tensor

from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest

METHODS: Mapping[str, Mapping[str, object]] = {
    "replace": {"rank": 2},
    "delta_svd": {"rank": 2},
    "resta": {},
    "wise_ft": {"a": 0.4},
}
NEEDS_BASE = {"replace", "delta_svd", "resta"}

LAYOUTS: Mapping[str, tuple[str, Respell]] = {
    "phi3-split": ("phi3", split_phi3),
    "mixtral-stacked": ("mixtral", stack_experts),
    "qwen2-moe-stacked": ("qwen2_moe", stack_experts),
    "qwen3-moe-stacked": ("qwen3_moe", stack_experts),
    "qwen3-moe-transposed": ("qwen3_moe", stack_experts_transposed),
    "granite-in-memory": ("granitemoe", granite_in_memory),
    "phi3-bare": ("phi3", under("")),
    "phi3-wrapped": ("phi3", under("language_model.")),
    "phi3-nested": ("phi3", nested),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trio]:
    """By layout: "phi3", ... as saved by transformers, and every layout of `LAYOUTS`."""
    root = tmp_path_factory.mktemp("layouts")
    made = {arch: make_family(root / arch, arch) for arch in {a for a, _ in LAYOUTS.values()}}
    for name, (arch, respell) in LAYOUTS.items():
        made[name] = respelled(made[arch], root / name, respell)
    return made


def run(finetuned: Path, others: Trio, out: Path, method: str, **rest: object) -> RepairResult:
    return repair(
        RepairRequest(
            finetuned=finetuned,
            aligned=others.aligned,
            base=others.base if method in NEEDS_BASE else None,
            output=out,
            method=method,
            settings=METHODS[method],
            **rest,  # type: ignore[arg-type]
        )
    )


def assert_same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


MAIN = ("phi3-split", "mixtral-stacked", "qwen3-moe-stacked")
CASES = [
    (method, layout)
    for layout in LAYOUTS
    for method in (METHODS if layout in MAIN else ("replace", "wise_ft"))
]


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_a_mixed_family_is_repaired_as_one_in_one_layout(
    families: dict[str, Trio], tmp_path: Path, method: str, layout: str
) -> None:
    arch, respell = LAYOUTS[layout]
    saved, other = families[arch], families[layout]
    whole = run(saved.finetuned, saved, tmp_path / "whole", method)
    mixed = run(saved.finetuned, other, tmp_path / "mixed", method)
    expected = read_folder(tmp_path / "whole")
    assert_same(read_folder(tmp_path / "mixed"), expected)
    assert [row.key for row in mixed.rows] == [row.key for row in whole.rows]
    assert any(row.changed for row in mixed.rows)
    run(other.finetuned, saved, tmp_path / "reverse", method)
    reverse = read_folder(tmp_path / "reverse")
    if layout == "qwen3-moe-transposed":  # products of transposed matrices round differently
        run(other.finetuned, other, tmp_path / "other", method)
        assert_same(reverse, read_folder(tmp_path / "other"))
    else:
        assert_same(reverse, respell(expected))


@pytest.mark.parametrize("layout", ["phi3-split", "mixtral-stacked", "phi3-nested"])
def test_the_plan_says_which_checkpoint_is_stored_differently(
    families: dict[str, Trio], tmp_path: Path, layout: str
) -> None:
    saved, other = families[LAYOUTS[layout][0]], families[layout]
    done = run(saved.finetuned, other, tmp_path / "out", "wise_ft")
    said = [note for note in done.plan.notes if str(other.aligned) in note]
    assert said and all("differently" in note for note in said)


@pytest.mark.parametrize("scope", ["matrices", "all"])
def test_wider_scopes_pair_biases_norms_and_vocabulary_too(
    families: dict[str, Trio], tmp_path: Path, scope: str
) -> None:
    saved, other = families["phi3"], families["phi3-split"]
    run(saved.finetuned, saved, tmp_path / "whole", "wise_ft", scope=scope)
    run(saved.finetuned, other, tmp_path / "mixed", "wise_ft", scope=scope)
    assert_same(read_folder(tmp_path / "whole"), read_folder(tmp_path / "mixed"))
