"""Audits that cannot be: refused before anything is loaded or written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.audit_support import make_suite
from support.model_support import SPECIALS, llama, save, word_tokenizer
from support.run_support import WORDS, Stopper, request

from realign.audit.anchors import core_anchors
from realign.audit.policy import parse_policy
from realign.audit.run import run_audit
from realign.errors import (
    ModelError,
    NotFoundError,
    OutputError,
    PolicyError,
    SuiteError,
    UsageError,
)


def test_bad_requests_write_nothing(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    anchors = replace(core_anchors(), kind="harmful")
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"suites": ()}, UsageError, "at least one suite"),
        ({"suites": (core_anchors(),)}, SuiteError, "anchors"),
        ({"suites": (anchors,)}, SuiteError, "core anchors"),
        ({"judges": ("magic",)}, UsageError, "magic"),
        ({"judges": ("oracle",)}, UsageError, "no rule"),
        ({"batch_size": 0}, UsageError, "--batch-size"),
        ({"limit": 0}, UsageError, "--limit"),
        ({"max_new_tokens": 0}, UsageError, "--max-new-tokens"),
    ]
    for changes, kind, named in bad:
        with pytest.raises(kind, match=named):
            run_audit(request(family, out, **changes))
    assert not out.exists()


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        ('metric = "asrr", margin = 0.1', "no metric 'asrr'"),
        ('metric = "error_rate", margin = 0.1', "not measured on harmful"),
        ('metric = "asr", margin = 3.0', "fractions"),
        ('metric = "kl", margin = 3.0', "max_value"),
    ],
)
def test_policies_that_do_not_fit(family: Path, tmp_path: Path, gate: str, named: str) -> None:
    policy = parse_policy(
        'schema = "realign/policy/1"\n[[gate]]\nid = "g"\nkind = "margin"\n'
        f'comparison = "drift"\nsuite = "harmful"\n{gate.replace(", ", chr(10))}'
    )
    with pytest.raises(PolicyError, match=named):
        run_audit(request(family, tmp_path / "a", policy=policy))


def test_a_judge_of_a_later_version_is_a_bad_policy(family: Path, tmp_path: Path) -> None:
    policy = parse_policy('schema = "realign/policy/1"\njudges = { primary = "wildguard" }')
    with pytest.raises(PolicyError, match=r"wildguard.*not available"):
        run_audit(request(family, tmp_path / "a", policy=policy))


def test_the_policy_names_its_reference(family: Path, tmp_path: Path) -> None:
    text = 'schema = "realign/policy/1"\nmodels = {{ reference = "{}" }}'
    other = parse_policy(text.format("org/other"))
    with pytest.raises(PolicyError, match="written for the reference"):
        run_audit(request(family, tmp_path / "a", policy=other))
    task = make_suite(2, name="task", kind="task", rule=False, answer=lambda i: str(i))
    ours = parse_policy(text.format(family / "reference"))
    run_audit(request(family, tmp_path / "b", policy=ours, suites=(task,), weights=False))


def test_a_missing_model_leaves_no_folder(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    with pytest.raises(NotFoundError):
        run_audit(request(family, out, repaired=family / "absent"))
    assert not out.exists()


def test_a_missing_chat_template_fails_before_anything_is_loaded(
    family: Path, tmp_path: Path
) -> None:
    mute = save(
        tmp_path / "mute",
        llama(vocabulary=len(SPECIALS) + len(WORDS)),
        word_tokenizer(words=WORDS, template=None),
    )
    stopper = Stopper()
    with pytest.raises(ModelError, match="chat template"):
        run_audit(request(family, tmp_path / "a", repaired=mute), progress=stopper)
    assert not any("loading" in note for note in stopper.notes)


def test_an_output_that_is_a_file(family: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputError, match="no folder"):
        run_audit(request(family, tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "mine"
