"""All spectral benchmarks at toy size through the one command that runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )


def test_what_is_measured_is_recorded_with_a_verdict_and_the_rest_is_not(tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    options = ["--small", "--work", "work", "--into", "into"]
    first = run("benchmarks.spectra", *options, cwd=tmp_path)
    assert "Rank decisions identical to float64 SVD: 96 of 96 matrices" in first.stdout
    data: Any = json.loads((tmp_path / "into" / "bench-spectra.json").read_text())
    assert [target["met"] is None for target in data["targets"]] == [True, False, False, False]
    assert {"ranks.json", "scan.json", "family.json", "edit_pass.json"} == {
        each.name for each in (tmp_path / "work").iterdir()
    }
    again = run("benchmarks.spectra", *options, cwd=tmp_path)
    assert again.stdout == first.stdout and "..." not in again.stderr
    assert "### Rank decisions" in data["section"]["markdown"]
