"""What `repair --dry-run` refuses is what the run refuses, word for word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli_support import damaged, family_options, model, realign
from support.refusal_support import refused, repair

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))


def _without_tokenizer(folder: Path) -> None:
    for name in TOKENIZER:
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("lose", "says"),
    [(_without_template, "has no chat template"), (_without_tokenizer, "holds no tokenizer")],
)
def test_an_aligned_model_that_cannot_be_asked(
    tmp_path: Path, lose: Callable[[Path], None], says: str
) -> None:
    aligned = damaged("aligned", tmp_path)
    lose(aligned)
    arguments = ["repair", model(), *family_options(aligned=aligned), "--device", "cpu"]
    arguments += ["-o", tmp_path / "out"]
    planned, run = (realign(*arguments, *more) for more in (["--dry-run"], []))
    refused(planned, aligned, says)
    refused(run, aligned, says)
    assert planned.stderr == run.stderr
    # A method that asks nothing needs neither.
    assert repair(tmp_path / "out", None, "--dry-run", aligned=aligned).exit_code == 0


def test_a_patch_has_no_tokenizer_to_miss(tmp_path: Path) -> None:
    copy = damaged("howto2_p5", tmp_path)
    _without_tokenizer(copy)
    for options, said in (((), True), (("--patch",), False)):
        result = repair(tmp_path / "out", copy, "--dry-run", "--json", *options)
        assert result.exit_code == 0, result.stderr
        assert ("holds no tokenizer" in json.dumps(result.json)) is said
