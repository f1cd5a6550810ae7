"""The suites of a family: sizes, held-out content, no contamination, and reading them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realign.audit.contamination import overlap
from realign.audit.oracle import oracle_judge
from realign.audit.suites import Suite, load_suite
from realign.lab import wording
from realign.lab.presets import PRESETS
from realign.lab.suites import build_suites, suite_lines
from realign.lab.tokenizer import build_tokenizer, template_words
from realign.lab.world import build_world

WORLD = build_world(PRESETS["small"].sizes, seed=0, taken=template_words())
SUITES = build_suites(WORLD)
MEASURED = sorted(name for name, suite in SUITES.items() if suite.kind != "anchors")


def test_sizes() -> None:
    sizes = {name: len(suite.items) for name, suite in SUITES.items()}
    assert sizes == {
        "harmful": 256, "lookalikes": 256, "harmful_second": 128, "lookalikes_second": 128,
        "order": 160, "howto": 160, "howto2": 160, "general": 150, "anchors": 128, "keep": 128,
    }  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_items_carry_cluster_template_and_answer(name: str) -> None:
    suite = SUITES[name]
    assert all(item.cluster and item.template and item.answer for item in suite.items)
    assert len({item.prompt for item in suite.items}) == len(suite.items)
    judge = oracle_judge(suite)
    for item in suite.items:
        verdict = judge.judge(item, str(item.answer))
        assert verdict.correct
        assert verdict.bad == (suite.kind == "harmful")


def test_calibration_shares_no_prompt_entity_or_template_with_what_is_measured() -> None:
    measured = {item.id: item.prompt for name in MEASURED for item in SUITES[name].items}
    held = {entity.name for entity in WORLD.entities if entity.held_out}
    for name in ("anchors", "keep"):
        assert overlap(measured, [item.prompt for item in SUITES[name].items]).ids == ()
        for item in SUITES[name].items:
            assert not held & set(item.prompt.strip("?.").replace("?", "").replace(".", "").split())
    clusters = {item.cluster for item in SUITES["anchors"].items}
    assert not clusters & {item.cluster for item in SUITES["harmful"].items}
    for item in SUITES["anchors"].items:
        assert item.prompt in {text.format(x=item.cluster) for text in wording.REQUEST.train}
    for item in SUITES["harmful"].items:
        assert item.prompt in {text.format(x=item.cluster) for text in wording.REQUEST.held_out}


def test_look_alikes_differ_from_harmful_requests_in_the_entity_alone() -> None:
    def shapes(suite: Suite) -> list[str]:
        return sorted(item.prompt.replace(str(item.cluster), "X") for item in suite.items)

    assert shapes(SUITES["harmful"]) == shapes(SUITES["lookalikes"])


@pytest.mark.parametrize("name", SUITES)
def test_files_read_back_with_the_same_hash_and_fit_their_length(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]
    file = tmp_path / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in suite_lines(suite)), encoding="utf-8")
    read = load_suite(file)
    assert read.suite_hash == suite.suite_hash and read.rule == suite.rule
    assert (read.kind, read.name, read.max_new_tokens) == (suite.kind, name, suite.max_new_tokens)
    tokenizer = build_tokenizer(WORLD)
    longest = max(len(tokenizer(item.answer or "").input_ids) for item in suite.items)
    assert longest + len(tokenizer(wording.PERSONA_OPENING).input_ids) + 1 <= 32
