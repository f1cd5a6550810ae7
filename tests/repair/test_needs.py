"""What the list, the JSON and the pages say a method needs is what the plan asks for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from support.cli_support import realign

from realign.errors import UsageError
from realign.repair.cards import render_card
from realign.repair.method import Method
from realign.repair.needs import ANCHORS, in_words, needs_of, option_of
from realign.repair.plan import plan
from realign.repair.registry import METHODS
from realign.repair.request import ROLES, RepairRequest
from realign.repair.texts import OPTIONS

SMALL = Path(__file__).resolve().parents[2] / "fixtures" / "small"

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file or folder for every word of a need."""
    folder = tmp_path_factory.mktemp("texts")
    row: dict[str, str] = {"prompt": "a question", "response": "an answer"}
    pair = {"prompt": "a question", "chosen": "good", "rejected": "bad"}
    found = {role: SMALL / role for role in ("aligned", "base", "unaligned")}
    found[ANCHORS] = SMALL / "suites" / "anchors.jsonl"
    for kind in OPTIONS:
        found[kind] = folder / f"{kind}.jsonl"
        found[kind].write_text(f"{json.dumps(pair if kind == 'pairs' else row)}\n")
    return found


def _plan(method: type[Method], words: Collection[str], sources: dict[str, Path]) -> None:
    fields: dict[str, Any] = {
        word if word in (*ROLES, ANCHORS, "pairs") else f"{word}_data": sources[word]
        for word in words
    }
    plan(RepairRequest(finetuned=SMALL / "howto", method=method.name, **fields))


@every_method
def test_what_is_named_is_enough_and_nothing_of_it_can_be_left_out(
    method: type[Method], sources: dict[str, Path]
) -> None:
    needs = needs_of(method)
    usual = [need[0] for need in needs]
    _plan(method, usual, sources)
    for need in needs:
        rest = [each for each in usual if each != need[0]]
        for other in need[1:]:
            _plan(method, [*rest, other], sources)
        if ANCHORS not in need:  # core-anchors are at hand
            with pytest.raises(UsageError, match="needs"):
                _plan(method, rest, sources)


@every_method
def test_a_page_names_the_needs_and_its_example_plans(
    method: type[Method], sources: dict[str, Path], tmp_path: Path
) -> None:
    page = render_card(method)
    named = ", ".join(map(in_words, needs_of(method))) or "nothing beside the fine-tune"
    assert f"| needs at its defaults | {named} |" in page
    line = re.search(r"^realign (repair FINETUNED .*)$", page, re.MULTILINE)
    assert line is not None
    given = {option_of(word): str(source) for word, source in sources.items()}
    words = shlex.split(line[1])
    for at, word in enumerate(words[:-1]):
        words[at + 1] = given.get(word, words[at + 1])
    words = [{"FINETUNED": str(SMALL / "howto")}.get(each, each) for each in words]
    words[-1] = str(tmp_path / "out")
    done = realign(*words, "--dry-run")
    assert done.exit_code == 0, done.stderr


def test_the_list_and_its_json_say_what_is_needed() -> None:
    listed = {each["name"]: each for each in json.loads(realign("methods", "--json").stdout)}
    assert listed.keys() == METHODS.keys()
    for name, method in METHODS.items():
        assert listed[name]["needs"] == [list(need) for need in needs_of(method)]
        assert method().required_data() <= method.data
    assert listed["lox"]["needs"] == [["aligned"], ["base"]]
    assert listed["irr"]["needs"] == [["aligned"], ["unaligned", "base"], ["task"]]
    assert listed["nlsr"]["needs"] == [["aligned"], ["anchors", "safe"]]
    shown = " ".join(realign("methods").stdout.split())
    assert "needs aligned, base, anchors (or safe data), task data" in shown
    assert "needs aligned, anchors (or safe data, or pairs), keep data (or pairs)" in shown


@pytest.mark.parametrize("name", ["lox", "safe_lora", "safemerge"])
def test_the_hint_for_a_missing_vector_plans(name: str) -> None:
    given: dict[str, Any] = {"finetuned": SMALL / "howto", "method": name}
    with pytest.raises(UsageError, match="needs the base model") as alone:
        plan(RepairRequest(**given, aligned=SMALL / "aligned"))
    assert alone.value.hint == "give it with --base"
    given |= {"aligned": SMALL / "aligned", "unaligned": SMALL / "unaligned"}
    with pytest.raises(UsageError, match="needs the base model") as other:
        plan(RepairRequest(**given))
    hint = other.value.hint
    assert hint is not None
    setting = hint.rpartition("--set ")[2]
    assert plan(RepairRequest(**given, settings=[setting])).method.vector_kind == "unaligned"
