"""A command that a hint proposes can be pasted into a shell, whatever the folders are called."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from support.cli_support import model, realign
from support.refusal_support import repair

from realign.audit.suites import load_suite
from realign.checkpoint.reader import open_checkpoint
from realign.errors import CheckpointError, UsageError

ODD = "it's my model; (2)"


def _after(text: str, option: str) -> str:
    """What a shell would pass after an option, on the line that proposes it."""
    (line,) = [line for line in text.splitlines() if f"{option} " in line]
    return shlex.split(line[line.index(f"{option} ") :])[1]


def test_how_to_audit_a_repair(tmp_path: Path) -> None:
    out = tmp_path / ODD / ("long " * 30).strip()
    result = realign(
        *("repair", model(), "--aligned", model("aligned"), "--base", model("base")),
        *("--method", "replace", "--set", "rank=4", "--device", "cpu", "-o", out),
    )
    assert result.exit_code == 0, result.stderr
    assert Path(_after(result.stderr, "--repaired")) == out


def test_which_model_was_meant(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    shutil.copytree(model(), folder / "tuned")
    card = f"---\nbase_model: {json.dumps(str(folder / 'aligned'))}\n---\n"
    (folder / "tuned" / "README.md").write_text(card)
    shutil.copytree(model("aligned"), folder / "aligned")
    result = repair(tmp_path / "out", folder / "tuned", aligned=None)
    assert result.exit_code == 2
    assert Path(_after(result.stderr, "--aligned")) == folder / "aligned"


def test_a_suite_of_a_kind(tmp_path: Path) -> None:
    file = tmp_path / f"{ODD}.jsonl"
    file.write_text('{"id": "a", "prompt": "b"}\n')
    with pytest.raises(UsageError) as caught:
        load_suite(file)
    assert _after(caught.value.hint or "", "--suite") == f"KIND={file}"


def test_an_adapter_without_a_base(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}'
    )
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert shlex.split(caught.value.hint or "")[-1] == f"BASE+{folder}"
