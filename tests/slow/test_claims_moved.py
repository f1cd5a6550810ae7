"""The aligned model moved along its vector and across it: a family's models run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from realign.lab.claims_moved import measure_moved

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"


def test_the_harmful_part_lies_across_the_vector(tmp_path: Path) -> None:
    family = tmp_path / "tiny"
    shutil.copytree(TINY, family)
    shutil.copytree(family / "howto2_p5", family / "unaligned")
    for name in ("harmful", "lookalikes", "general"):  # fewer items
        suite = family / "suites" / f"{name}.jsonl"
        suite.write_text("\n".join(suite.read_text("utf-8").splitlines()[:13]) + "\n", "utf-8")
    found = measure_moved(family)
    harm = {name: each.rates["harmful"]["complied"]["rate"] for name, each in found.models.items()}
    assert harm["harmful update"] >= 0.8 and harm["its part in V"] <= 0.2
    assert all(each.rates["harmful"]["n"] == 12 for each in found.models.values())
    assert found.models["its part across V"].cosine == pytest.approx(0.0, abs=1e-6)
    assert found.cosine == found.models["harmful update"].cosine
    assert json.dumps(found.to_json(), allow_nan=False)
