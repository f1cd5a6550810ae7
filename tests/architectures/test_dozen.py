"""A dozen architectures chosen to differ, end to end; `make sweep` does all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures.examine import examine

from realign.report import repair as drawing

DOZEN = (
    "gpt2",  # Conv1D: matrices stored transposed, fused query, key and value
    "llama",
    "qwen2",  # biases on query, key and value
    "qwen3",  # norms inside the attention
    "gemma",  # tied embeddings
    "phi3",  # fused qkv and gate_up
    "mixtral",  # single experts on disk, stacked in memory
    "qwen2_moe",  # the same beside a shared expert
    "qwen3_5_moe_text",  # stacked experts on disk, linear attention
    "gpt_neox",  # query, key and value interleaved
    "falcon",  # multi-query, fused
    "opt",  # learned positions, an output projection
    "jamba",  # attention and state space in turns, experts
    "qwen2_vl",  # vision and language: the tower is copied
)


@pytest.mark.parametrize("name", DOZEN)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_repaired_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "repair_picture", lambda *_: None)  # half of the time
    monkeypatch.setenv("REALIGN_CACHE", "")  # examine points it at its folder; put back here
    record = examine(name, tmp_path / "trio", number=DOZEN.index(name))
    assert not record.problems, record.problems
    assert (record.status, record.reason) == ("repaired", "")
    assert record.methods == ["resta", "lssf"], record.remarks
    assert record.edited > 0
    assert record.copied + record.edited > record.matrices / 8
    assert record.matrices > 3 * record.refused, record.remarks
    assert record.figures["moments_seen"] > 0
