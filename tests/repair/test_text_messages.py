"""What commands say of texts and anchors: the option that was typed, counts, ids that are not."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from support.cli_support import model, realign
from support.training_support import TINY, rows

from realign.errors import SuiteError
from realign.model.loading import load_model
from realign.repair.kept_tensors import as_tensors, tables_of
from realign.repair.plan_anchors import load_anchors
from realign_cli.main import app

SMALL = Path(__file__).resolve().parents[2] / "fixtures" / "small"


@pytest.mark.parametrize("exists", [True, False])
def test_unalign_names_its_own_option(tmp_path: Path, exists: bool) -> None:
    data = tmp_path / "data.jsonl"
    if exists:
        data.touch()
    done = realign("unalign", model("aligned"), "--data", data, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "--data" in done.words and "--harmful-data" not in done.words


def test_unalign_looks_at_its_target_first(tmp_path: Path) -> None:
    done = realign("unalign", model("aligned"), "--data", tmp_path / "none", "-o", tmp_path)
    assert done.exit_code == 2
    assert "exists already" in done.words


def test_unalign_counts_in_words(tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps(rows("harmful", 1)[0]) + "\n")
    options = ["--steps", "1", "--device", "cpu", "-o", tmp_path / "out"]
    done = realign("unalign", TINY / "aligned", "--data", data, *options)
    assert done.exit_code == 0, done.stderr
    assert "has 1 row;" in done.words
    assert "1 step on 1 pair" in done.words + done.stdout


def test_anchors_need_no_ids(tmp_path: Path) -> None:
    file = tmp_path / "anchors.jsonl"
    prompts = [f"how do i number {i}" for i in range(20)]
    file.write_text("\n" + "\n".join(json.dumps({"prompt": each}) for each in prompts))
    suite = load_anchors(file)
    assert [item.id for item in suite.items] == [str(line) for line in range(2, 22)]
    assert [item.prompt for item in suite.items] == prompts
    options = ["--aligned", model("aligned"), "--base", model("base")]
    done = realign("repair", model(), *options, "--anchors", file, "--dry-run")
    assert done.exit_code == 0, done.stderr
    file.write_text('{"id": " ", "prompt": "x"}\n')
    with pytest.raises(SuiteError, match="'id'"):
        load_anchors(file)


def test_counts_stay_whole_numbers() -> None:
    _, facts = tables_of(as_tensors({"steps": 2, "loss": 2.0}))
    assert facts == {"steps": 2, "loss": 2.0}
    assert [type(each) for each in facts.values()] == [int, float]


def test_attaching_an_adapter_logs_no_old_names(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with load_model(f"{SMALL / 'aligned'}+{SMALL / 'lora_p5'}", device="cpu"):
        pass
    assert "is_gradient_checkpointing" not in caplog.text


def test_the_pages_take_no_option_for_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "realign_cli.pages", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:")
    assert not list(tmp_path.iterdir())


def test_switches_have_no_word_for_a_value() -> None:
    queue: list[Any] = [typer.main.get_command(app)]
    for command in queue:
        queue += getattr(command, "commands", {}).values()
        for option in command.params:
            if getattr(option, "is_flag", False):
                assert not option.metavar and option.metavar is not None, option.name


def test_another_fine_tune_that_does_not_fit_is_called_by_its_option() -> None:
    done = realign(
        "repair", SMALL / "howto", "--aligned", SMALL / "aligned", "--method", "somf", "--dry-run",
        "--also", model(), "--keep-data", SMALL / "suites" / "keep.jsonl",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "the --also (number 1) model" in done.words


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_doubt_is_said_once(tmp_path: Path, quiet: tuple[str, ...]) -> None:
    swapped = ["--aligned", model("base"), "--base", model("aligned")]
    options = [*swapped, "--method", "replace", "-o", tmp_path / "out", *quiet]
    done = realign("repair", model(), *options)
    assert done.exit_code == 0, done.stderr
    assert done.words.count("nearer to the base model") == 1
