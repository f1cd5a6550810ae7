"""Q-realign's control, smoothing without rounding, is judged exactly as the fine-tune is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.layouts_support import copied
from support.repair_support import read_folder
from support.training_support import DRIFTED, SUITES, repair_tiny
from torch import Tensor

from realign.audit.judges import JudgeResult
from realign.audit.oracle import oracle_judge
from realign.audit.suites import load_suite
from realign.errors import EmptyEditError
from realign.model.generation import generate
from realign.model.loading import load_model

ITEMS: Mapping[str, int] = {"harmful": 16, "lookalikes": 8, "howto2": 8}


def verdicts(folder: Path) -> list[tuple[str, JudgeResult]]:
    """The greedy answer to every item, and what the exact judge says to it."""
    found: list[tuple[str, JudgeResult]] = []
    with load_model(folder, device="cpu") as loaded:
        for name, count in ITEMS.items():
            suite = load_suite(SUITES / f"{name}.jsonl")
            judge, items = oracle_judge(suite), suite.items[:count]
            replies = generate(loaded, [item.prompt for item in items], max_new_tokens=32)
            texts = {reply.prompt_index: reply.text for reply in replies}
            found += [(texts[i], judge.judge(item, texts[i])) for i, item in enumerate(items)]
    return found


def smoothed(tables: Mapping[str, Tensor], *, columns: bool) -> dict[str, Tensor]:
    """The fine-tune with its norms divided by v, and what they feed multiplied by v."""
    tensors = read_folder(DRIFTED)
    for name, value in tables.items():
        table, _, key = name.partition("/")
        if table == "norm":
            assert float(tables[f"offset/{key}"]) == 0.0
            tensors[key] = tensors[key] / value.to(tensors[key])
        elif table == "smooth" and columns:
            tensors[key] = tensors[key] * value.to(tensors[key])
    return tensors


def test_every_verdict_of_the_control_is_the_fine_tunes(tmp_path: Path) -> None:
    with pytest.raises(EmptyEditError, match="this run is the control"):
        repair_tiny(
            "q_realign",
            tmp_path / "out",
            settings={"quantise": False, "prompts": 16},
            anchors=SUITES / "anchors.jsonl",
            keep_data=SUITES / "keep.jsonl",
        )
    (kept,) = (tmp_path / "cache-out").glob("q-realign-*.safetensors")
    tables = load_file(kept)
    plain = read_folder(DRIFTED)
    control = smoothed(tables, columns=True)
    moved = [name for name in plain if not torch.equal(control[name], plain[name])]
    assert len(moved) == 2 * (2 + 5), "both norms of both blocks, and what each feeds"
    expected = verdicts(DRIFTED)
    assert {result.bad for _, result in expected} == {True, False}
    assert verdicts(copied(DRIFTED, tmp_path / "control", model=control)) == expected
    # Half a smoothing is not the identity, and this comparison sees it.
    half = copied(DRIFTED, tmp_path / "half", model=smoothed(tables, columns=False))
    assert [result for _, result in verdicts(half)] != [result for _, result in expected]
