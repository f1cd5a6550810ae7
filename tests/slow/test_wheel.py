"""The wheel works outside of the repository: built, installed into an empty environment, run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, timeout: int = 900) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
        # Nothing of this repository may be found by accident.
        env={k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_what_it_must(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "realign/py.typed",
        "realign/report/templates/report.html.j2",
        "realign_cli/data/demo-policy.toml",
        "realign/_demo/small/family.json",
        "realign/_demo/small/both_p5/model.safetensors",
        "realign/_demo/small/suites/harmful.jsonl",
    ):
        assert needed in names, f"{needed} is missing"
    data = {name for name in names if name.startswith("realign/audit/") and ".py" not in name}
    assert data, "rules, lexicons and anchors travel with the package"
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"realign", "realign_cli", next(t for t in tops if t.endswith(".dist-info"))}


def test_it_installs_and_tells_the_whole_story(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    constraints = ("-c", ROOT / "constraints.txt")
    # As in the Makefile: torch first and alone, so that a CPU build at hand is taken.
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:6] == "torch="
    )
    run(*pip, *constraints, torch, cwd=tmp_path)
    run(*pip, *constraints, wheel, cwd=tmp_path)

    command = environment / "bin" / "realign"
    assert run(command, "--version", cwd=tmp_path).strip()
    listed = json.loads(run(command, "methods", "--json", cwd=tmp_path))
    assert {"lssf", "replace"} <= {method["name"] for method in listed}
    assert "realign demo" in run(command, "--help", cwd=tmp_path)

    summary = json.loads(run(command, "demo", "--json", "--quiet", cwd=tmp_path))
    rates = {title: model["harmful/asr"]["rate"] for title, model in summary["models"].items()}
    assert rates["aligned"] <= 0.05
    assert rates["fine-tuned"] >= 0.8
    assert min(rate for title, rate in rates.items() if "repaired" in title) <= 0.2
    for name in ("audit.json", "report.html", "pictures", "policy.toml", "repaired"):
        assert (tmp_path / "realign-demo" / name).exists()
