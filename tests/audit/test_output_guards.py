from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.audit_support import make_suite
from support.model_support import llama, save, word_tokenizer

from realign.audit.request import AuditRequest
from realign.audit.run import run_audit
from realign.audit.store import is_audit_folder
from realign.errors import OutputError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model", llama(), word_tokenizer())


def request(model: Path, out: Path) -> AuditRequest:
    return AuditRequest(
        subject=model, suites=(make_suite(2, rule=False),), out=out, device="cpu", max_new_tokens=2
    )


@pytest.mark.parametrize("inside", ["", "audit", "deep/er"])
def test_an_output_inside_an_input_is_refused(model: Path, inside: str) -> None:
    before = sorted(model.iterdir())
    with pytest.raises(OutputError, match="inside"):
        run_audit(request(model, model / inside))
    assert sorted(model.iterdir()) == before


def test_a_link_to_an_input_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(OutputError, match="inside"):
        run_audit(request(model, tmp_path / "link" / "audit"))


def test_others_files_are_left_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "theirs"
    out.mkdir()
    (out / "report.html").write_text("theirs")
    (out / "audit.json").write_text(json.dumps({"schema": "other/1"}))
    with pytest.raises(OutputError, match="no audit's"):
        run_audit(request(model, out))
    assert (out / "report.html").read_text() == "theirs"
    assert len(list(out.iterdir())) == 2


def test_an_audit_goes_on_in_its_own_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    run_audit(request(model, out))
    (out / "report.html").write_text("ours")
    assert is_audit_folder(out)
    run_audit(request(model, out))
