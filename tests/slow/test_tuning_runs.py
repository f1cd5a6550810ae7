"""Whole tunings of the tiny family: interrupted ones, and limits that break on held-out prompts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tune_support import FAMILY, SUITES, tiny_repair, tiny_request, tiny_suites

from realign.audit.suites import load_suite
from realign.checkpoint.reader import open_checkpoint
from realign.repair.engine import repair
from realign.report.tune import tune_markdown
from realign.tune.request import Limits
from realign.tune.run import tune


def _command(out: Path) -> list[str]:
    # Full strength breaks a limit, so that there is something to search for.
    start = "from realign_cli.main import main; main()"
    options = [sys.executable, "-c", start, "tune", str(FAMILY / "howto2_p5")]
    options += ["--aligned", str(FAMILY / "aligned"), "--base", str(FAMILY / "base")]
    options += ["--method", "resta", "--set", "gamma=1", "--set", "safety_vector=base"]
    for name in SUITES:
        options += ["--suite", str(FAMILY / "suites" / f"{name}.jsonl")]
    options += ["--limit", "10", "--groups", "2", "--trials", "3", "--batch-size", "64"]
    options += ["--max-utility-drop", "0.05", "--max-over-refusal-rise", "0.05"]
    return [*options, "--confidence", "0.5", "--device", "cpu", "-o", str(out)]


def test_an_interrupted_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = subprocess.run(_command(tmp_path / "a"), capture_output=True, text=True, check=False)
    assert whole.returncode in (0, 1), whole.stderr
    with subprocess.Popen(_command(tmp_path / "b"), stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("trial 3 of 3"):
                run.send_signal(signal.SIGINT)  # what Ctrl-C sends
                break
        rest = run.stderr.read()
    assert run.returncode == 2 and "error: interrupted" in rest and "Traceback" not in rest
    assert not (tmp_path / "b" / "tune.json").exists()
    resumed = subprocess.run(_command(tmp_path / "b"), capture_output=True, text=True, check=False)
    assert resumed.returncode == whole.returncode
    assert "trial 3 of 3" in resumed.stderr and "trial 2 of 3" not in resumed.stderr
    first, second = (
        json.loads((tmp_path / each / "tune.json").read_text("utf-8")) for each in ("a", "b")
    )
    assert len(first["search"]["trials"]) == 3
    assert first | {"command": ""} == second | {"command": ""}


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_patch_is_what_the_search_looked_at(name: str, tmp_path: Path) -> None:
    family = FAMILY.parent / name
    finetuned = family / ("howto2_p5" if name == "tiny" else "lora_p5")  # an adapter
    stands_on = finetuned if name == "tiny" else family / "aligned"
    request = tiny_request(
        tmp_path / "a",
        repair=tiny_repair(
            patch=True, finetuned=finetuned, aligned=family / "aligned", base=family / "base"
        ),
        groups=2,
        trials=2,
        suites=tuple(
            load_suite(family / "suites" / f"{each}.jsonl").limited(20) for each in SUITES
        ),
        limits=Limits(utility_drop=1.0, over_refusal_rise=1.0),
    )
    found = tune(request)
    patch, whole = tmp_path / "a" / "patch", tmp_path / "whole"
    assert found.document["output"] == "patch" and not (tmp_path / "a" / "repaired").exists()
    assert (patch / "adapter_config.json").exists() and (patch / "realign.json").exists()
    strengths = {int(layer): t for layer, t in found.document["chosen"]["strengths"].items()}
    repair(replace(request.repair, patch=False, output=whole, strengths=strengths))
    with open_checkpoint(whole) as written, open_checkpoint(f"{stands_on}+{patch}") as patched:
        for tensor in written.tensors:
            torch.testing.assert_close(patched.read(tensor), written.read(tensor))


def test_limits_broken_on_held_out_prompts_keep_no_checkpoint(tmp_path: Path) -> None:
    # On the final side a "task" whose right answers are harmful recipes: no repair can keep it.
    harmful, safe, task = tiny_suites(limit=160)
    names = sorted({item.cluster or "" for item in harmful.items})
    parts = [
        replace(
            harmful,
            name=f"part{index}",
            kind="task" if index == 2 else "harmful",
            items=tuple(i for i in harmful.items if i.cluster in names[index::3])[:16],
        )
        for index in range(3)
    ]
    request = tiny_request(
        tmp_path / "a",
        trials=1,
        suites=(parts[0], replace(safe, items=safe.items[:10]), task.limited(10)),
        final_suites=(
            parts[1], replace(safe, name="safe2", items=safe.items[10:20]), parts[2],
        ),
    )  # fmt: skip
    found = tune(request)
    assert found.status == "limits broken" and found.exit_code == 1
    rows = {row["suite"]: row for row in found.document["held_out"]["rows"]}
    assert (rows["part1"]["verdict"], rows["part2"]["verdict"]) == ("met", "not met")
    assert rows["part2"]["low"] > rows["part2"]["limit"], "the interval says so as well"
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert "tune.json" in left and not [name for name in left if "repaired" in name]
    assert found.document["output"] is None
    assert "nothing is kept" in tune_markdown(found.document)
