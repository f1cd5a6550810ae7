"""Audits that run again: the same numbers, answers taken up, answers that no longer count."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.audit_support import make_suite
from support.run_support import Stopper, request, without_clock

from realign.audit.canonical import canonical_json
from realign.audit.run import run_audit
from realign.audit.schema import Report


def test_the_same_audit_twice_gives_the_same_numbers(
    family: Path, tmp_path: Path, plain: tuple[Report, Path]
) -> None:
    again = run_audit(request(family, tmp_path / "again"))
    assert without_clock(again) == without_clock(plain[0])
    items = (tmp_path / "again" / "items.jsonl").read_bytes()
    assert items == (plain[1] / "items.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("after", "steps"),
    [
        ("reference: 12 answers to harmful", 1),
        ("reference distributions on safe", 0),
        ("subject: 12 answers to safe", 1),
    ],
)
def test_an_interrupted_audit_goes_on_where_it_stopped(
    family: Path, tmp_path: Path, plain: tuple[Report, Path], after: str, steps: int
) -> None:
    out = tmp_path / "audit"
    with pytest.raises(KeyboardInterrupt):
        run_audit(request(family, out), progress=Stopper(after, steps=steps))
    assert not (out / "audit.json").exists()
    report = run_audit(request(family, out))
    assert without_clock(report) == without_clock(plain[0])
    assert sum(entry.reused for entry in report.models.values()) > 0


def test_kept_texts_are_private_and_reused(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    first = run_audit(request(family, out, keep_texts=True))
    files = sorted((out / "responses").iterdir())
    assert files and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert "ALPHA-REQUEST" not in (out / "audit.json").read_text()
    stopper = Stopper()
    second = run_audit(request(family, out, keep_texts=True), progress=stopper)
    assert [note for note in stopper.notes if "reused" in note] == [
        f"{role}: all results reused" for role in ("reference", "subject", "repaired")
    ]
    assert without_clock(second) == without_clock(first)
    # A changed model is a different model, whatever the folder is called.
    moved = tmp_path / "subject"
    shutil.copytree(family / "repaired", moved)
    third = run_audit(request(family, out, subject=moved, keep_texts=True))
    assert third.models["subject"].reused == 0 and third.models["reference"].reused > 0


def asked(family: Path, out: Path, **changes: Any) -> tuple[list[str], Report]:
    stopper = Stopper()
    settings: dict[str, Any] = {"repaired": None, "weights": False, "keep_texts": True}
    settings["suites"] = (make_suite(6, rule=False),)
    report = run_audit(request(family, out, **(settings | changes)), progress=stopper)
    return stopper.notes, report


def everything_again(notes: list[str], report: Report) -> bool:
    return {entry.reused for entry in report.models.values()} == {0} and {
        "reference: 6 answers to harmful",
        "reference distributions on harmful",
        "subject: 6 answers to harmful",
    } <= set(notes)


@pytest.fixture(scope="module")
def answered(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answered") / "audit"
    notes, report = asked(family, out)
    assert everything_again(notes, report) and report.models["subject"].batch_size == 5
    return out


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": torch.float64}, {"batch_size": 2}], ids=["nothing", "dtype", "batch"]
)
def test_changing_a_setting_asks_again(
    family: Path, answered: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shutil.copytree(answered, tmp_path / "audit")
    notes, report = asked(family, tmp_path / "audit", **changes)
    assert everything_again(notes, report) == bool(changes)


@pytest.mark.parametrize(
    "path",
    [
        ("model",),
        ("batch_size",),
        ("device",),
        ("dtype",),
        ("libraries", "torch"),
        ("libraries", "transformers"),
    ],
    ids="-".join,
)
def test_answers_given_under_other_conditions_are_asked_again(
    family: Path, answered: Path, tmp_path: Path, path: tuple[str, ...]
) -> None:
    shutil.copytree(answered, tmp_path / "audit")
    for file in (tmp_path / "audit" / "responses").iterdir():
        header, _, rest = file.read_text().partition("\n")
        plain = json.loads(header)
        holder = plain["key"]
        for step in path[:-1]:
            holder = holder[step]
        assert holder[path[-1]]
        holder[path[-1]] = 99 if path == ("batch_size",) else "other"
        file.write_text(canonical_json(plain) + "\n" + rest)
    assert everything_again(*asked(family, tmp_path / "audit"))


def test_a_changed_prompt_under_the_same_id_is_asked_again(
    family: Path, answered: Path, tmp_path: Path
) -> None:
    shutil.copytree(answered, tmp_path / "audit")
    suite = make_suite(6, rule=False)
    first = replace(suite.items[0], prompt="ALPHA-REQUEST number 39")
    changed = replace(suite, items=(first, *suite.items[1:]))
    notes, report = asked(family, tmp_path / "audit", suites=(changed,))
    assert "reference: 1 answers to harmful" in notes
    assert "reference distributions on harmful" in notes  # of the suite as a whole
    assert report.models["subject"].reused == 2 * 5  # texts and log-odds


def test_audits_can_share_what_the_same_models_said(family: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    task = make_suite(6, name="task", kind="task", rule=False, answer=lambda i: str(i))
    settings: dict[str, Any] = {"suites": (task,), "records": shared, "weights": False}
    first = run_audit(request(family, tmp_path / "a", **settings))
    second = run_audit(request(family, tmp_path / "b", repaired=family / "base", **settings))
    assert all(entry.reused == 0 for entry in first.models.values())
    assert {role: entry.reused for role, entry in second.models.items()} == {
        "reference": 6,
        "subject": 6,
        "repaired": 0,
        "base": 0,
    }
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["audit.json", "items.jsonl"]
    assert (shared / "responses").is_dir()
