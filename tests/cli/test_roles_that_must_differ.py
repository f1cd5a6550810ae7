"""A reference that is the aligned model leaves nothing to do, which the plan sees: exit code 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.cli_support import model
from support.refusal_support import nothing_left, refused
from support.refusal_support import repair_at_work as repair


@pytest.mark.parametrize("role", ["reference", "unaligned"])
@pytest.mark.parametrize("case", ["same folder", "copy"])
def test_nlsr_without_a_direction_to_go(tmp_path: Path, role: str, case: str) -> None:
    other = model("aligned")
    if case == "copy":
        other = tmp_path / "copy"
        shutil.copytree(model("aligned"), other)
        (other / "tokenizer.json").unlink()  # whoever ran it would stumble here
    with nothing_left(tmp_path / "work"):
        result = repair(tmp_path, None, "--method", "nlsr", base=None, **{role: other})
    refused(result, other, "hold the same weights", f"the {role} model", f"--{role}")


def test_an_unaligned_model_that_is_not_used_may_be_any(tmp_path: Path) -> None:
    options = ("--method", "nlsr", "--set", "b=0", "--dry-run")
    result = repair(tmp_path, None, *options, base=None, unaligned=model("aligned"))
    assert result.exit_code == 0, result.stderr
