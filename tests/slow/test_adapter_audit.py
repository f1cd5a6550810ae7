"""An audit of adapters: the fine-tune is one, and so is its repair."""

from __future__ import annotations

from pathlib import Path

from support.adapter_support import tune
from support.cli_support import family_options, model, realign, suite


def test_an_audit_runs_adapters(tmp_path: Path) -> None:
    adapter = tune(
        model("aligned"), tmp_path / "lora", r=4, size=0.02, target_modules=["q_proj", "down_proj"]
    )
    options = ["--method", "replace", "--set", "rank=2", "--device", "cpu", "--patch"]
    repaired = realign("repair", adapter, *family_options(), *options, "-o", tmp_path / "new")
    assert repaired.exit_code == 0, repaired.stderr
    found = realign(
        "audit", adapter, "--reference", model("aligned"), "--repaired", tmp_path / "new",
        "--suite", suite("harmful"), "--limit", "4", "--max-new-tokens", "4", "-o",
        tmp_path / "audit",
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    assert (tmp_path / "audit" / "audit.json").is_file()
