"""Weight drift between checkpoints of different layouts: the figures of one layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.layouts_support import Respell, make_family, respelled, split_phi3, stack_experts

from realign.audit.weights import measure_weights
from realign.checkpoint.reader import open_checkpoint


@pytest.mark.parametrize(("arch", "respell"), [("phi3", split_phi3), ("qwen3_moe", stack_experts)])
def test_drift_is_measured_across_layouts(tmp_path: Path, arch: str, respell: Respell) -> None:
    saved = make_family(tmp_path / "saved", arch)
    other = respelled(saved, tmp_path / "other", respell)
    with open_checkpoint(saved.finetuned) as subject:
        found = [
            measure_weights(
                reference=open_checkpoint(trio.aligned),
                subjects={"subject": subject},
                base=open_checkpoint(trio.base),
            )
            for trio in (saved, other)
        ]
    assert found[0] == found[1]
    assert found[1].global_ and not found[1].unmatched
