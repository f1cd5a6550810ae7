"""Declared training data: what a row asks, and that nothing of it is measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_support import request

from realign.audit.assembly import suite_entry
from realign.audit.contamination import ItemIndex, overlap
from realign.audit.prepare import plan_audit, prepare
from realign.audit.training_data import TrainingData, declared_training
from realign.errors import SuiteError, UsageError

WORDS = [f"w{i}" for i in range(30)]


def data(folder: Path, *rows: object, name: str = "train.jsonl") -> TrainingData:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return declared_training(path)


@pytest.mark.parametrize(
    ("row", "prompts"),
    [
        ({"prompt": "a", "response": "b"}, ["a"]),
        ({"instruction": "a", "input": "", "output": "b"}, ["a"]),
        ({"instruction": "a", "input": "b", "output": "c"}, ["a", "b", "a\nb"]),
        ({"question": "a", "answer": "b"}, ["a"]),
        ({"text": "a b"}, ["a b"]),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image"}]},
                ]
            },
            ["a", "c"],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ["a"],
        ),
        ({"prompt": [{"role": "user", "content": "a"}], "chosen": []}, ["a"]),
    ],
)
def test_what_a_row_asks(tmp_path: Path, row: object, prompts: list[str]) -> None:
    assert list(data(tmp_path, row).prompts()) == prompts


@pytest.mark.parametrize("row", [{"completion": "a"}, {"text": None}, {"messages": ["a"]}])
def test_rows_without_a_prompt_are_refused(tmp_path: Path, row: object) -> None:
    with pytest.raises(SuiteError, match=r"train\.jsonl:2"):
        list(data(tmp_path, {"prompt": "fine"}, row).prompts())


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no such training data"):
        declared_training(tmp_path / "none.csv")
    with pytest.raises(SuiteError, match="rows are read from"):
        declared_training(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no dataset"):
        declared_training("hf://org/model/a.csv")


def test_trained_items_are_dropped_and_counted(tmp_path: Path) -> None:
    wanted = request(tmp_path, tmp_path / "out")
    harmful, safe, _ = wanted.suites  # which ask the same, so each loses both
    first, second = harmful.items[0].prompt, safe.items[3].prompt
    chat = {"messages": [{"role": "user", "content": f" {second.upper()}\n"}]}
    training = data(tmp_path, {"prompt": first}, chat, {"prompt": "something else"})
    prepared = prepare(request(tmp_path, tmp_path / "out", training=(training,)))
    kept = {suite.name: suite for suite in prepared.suites}
    assert first not in {item.prompt for item in kept[harmful.name].items}
    assert second not in {item.prompt for item in kept["safe"].items}
    assert [suite.skipped.get("in_training_data", 0) for suite in prepared.suites] == [2, 2, 2]
    entries = [suite_entry(suite) for suite in prepared.suites]
    assert [entry.n_contaminated for entry in entries] == [2, 2, 2]
    planned = plan_audit(prepared.request)
    assert [suite.n_items for suite in planned.suites] == [10, 10, 4]


def test_both_kinds_of_contamination_are_counted_once(tmp_path: Path) -> None:
    wanted = request(tmp_path, tmp_path / "out")
    harmful = wanted.suites[0]
    prompts = [item.prompt for item in harmful.items]
    training = data(tmp_path, {"prompt": prompts[0]}, {"prompt": prompts[1]})
    calibration = harmful.without([item.id for item in harmful.items[1:]], reason="cut")
    prepared = prepare(
        request(tmp_path, tmp_path / "out", training=(training,), calibration=(calibration,))
    )
    entry = suite_entry(prepared.suites[0])
    assert (entry.n_contaminated, entry.n_skipped) == (2, {})
    assert entry.n_items == len(prompts) - 2


def test_a_model_trained_on_the_whole_suite_cannot_be_audited_on_it(tmp_path: Path) -> None:
    prompts = [item.prompt for item in request(tmp_path, tmp_path).suites[0].items]
    training = data(tmp_path, *({"prompt": prompt} for prompt in prompts))
    with pytest.raises(SuiteError, match="no item is left"):
        prepare(request(tmp_path, tmp_path / "out", training=(training,)))


TEXTS = st.lists(st.sampled_from(WORDS[:2]), min_size=1, max_size=18).map(" ".join)


@given(st.lists(TEXTS, max_size=6), st.lists(TEXTS, max_size=6))
def test_streaming_names_what_overlap_names(items: list[str], texts: Iterable[str]) -> None:
    named = {str(i): text for i, text in enumerate(items)}
    assert ItemIndex(named).found_in(iter(texts)) == set(overlap(named, texts).ids)
