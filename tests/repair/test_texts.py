"""Reading of the users' texts: the three shapes, what is refused and where, overlap, the hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realign.audit.contamination import words_of
from realign.errors import SuiteError
from realign.repair.preparation import Data
from realign.repair.texts import Pair, Text, load_texts, missing_data, plan_texts, withheld_words

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "tiny" / "suites"


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role}'s words"} for role in roles]}


def test_the_three_shapes(tmp_path: Path) -> None:
    rows = ({"prompt": "p", "response": "r", "id": 7}, turns("user", "assistant"))
    found = load_texts(write(tmp_path, *rows), "safe")
    assert found.texts == (Text("p", "r"), Text("user's words", "assistant's words"))
    pairs = write(tmp_path, {"prompt": "p", "chosen": "c", "rejected": "r"}, name="pairs.jsonl")
    assert load_texts(pairs, "pairs").pairs == (Pair("p", "c", "r"),)


@pytest.mark.parametrize("data", ["task", "keep"])
def test_a_reply_may_be_missing_where_the_model_can_give_it(tmp_path: Path, data: Data) -> None:
    path = write(tmp_path, {"prompt": "p"}, turns("user"), {"prompt": "q", "response": "r"})
    assert [row.reply for row in load_texts(path, data).texts] == [None, None, "r"]
    assert plan_texts({data: path})[data].unanswered == 2


def test_a_suite_serves_as_data() -> None:
    keep = load_texts(FIXTURES / "keep.jsonl", "keep")
    assert len(keep.rows) == 128 and all(row.reply is None for row in keep.texts)
    task = load_texts(FIXTURES / "order.jsonl", "task")
    assert len(task.rows) == 160
    assert all((row.reply or "").startswith("order(item:") for row in task.texts)


@pytest.mark.parametrize(
    ("row", "data", "says"),
    [
        ("{", "safe", "not a JSON object"),
        ("[1]", "safe", "not a JSON object"),
        ({"prompt": "p"}, "safe", "the reply is missing"),
        (turns("user"), "harmful", "the reply is missing"),
        ({"response": "r"}, "keep", 'no text in "prompt"'),
        ({"prompt": " ", "response": "r"}, "keep", 'no text in "prompt"'),
        ({"prompt": "p", "response": 3}, "task", 'no text in "response"'),
        ({"prompt": "p", "response": "r", "answer": "a"}, "task", 'both "response" and "answer"'),
        ({"prompt": "p", "response": "\ud800"}, "task", "surrogates not allowed"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "safe", "a preference pair"),
        ({"prompt": "p", "response": "r"}, "pairs", 'no text in "chosen"'),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "pairs", "are the same"),
        (turns("user", "assistant", "user"), "task", "user, assistant, user"),
        (turns("assistant"), "task", "assistant"),
        ({"messages": []}, "task", "not a list of turns"),
        ({"messages": ["hello"]}, "task", "not an object"),
    ],
)
def test_wrong_shapes_name_file_and_line_and_what_is_expected(
    tmp_path: Path, row: Any, data: Data, says: str
) -> None:
    good: Any = {"prompt": "p", "chosen": "c", "rejected": "r"}
    good = good if data == "pairs" else turns("user", "assistant")
    path = write(tmp_path, good, "", row)
    with pytest.raises(SuiteError) as raised:
        load_texts(path, data)
    assert raised.value.message.startswith(f"{path}:3: ")
    assert says in raised.value.message
    assert ("rejected" if data == "pairs" else "response") in raised.value.hint


def test_no_file_no_text_and_no_utf8(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"--keep-data cannot be read"):
        load_texts(tmp_path / "absent", "keep")
    with pytest.raises(SuiteError, match=r"--task-data cannot be read"):
        load_texts(tmp_path, "task")
    empty = write(tmp_path, "", "  ")
    with pytest.raises(SuiteError, match="no text for --safe-data"):
        load_texts(empty, "safe")
    header = write(tmp_path, {"schema": "realign/suite/1"})
    with pytest.raises(SuiteError, match="no text for --safe-data"):
        load_texts(header, "safe")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(SuiteError, match=r"latin\.jsonl:1: not UTF-8"):
        load_texts(latin, "keep")


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    plain = write(tmp_path, {"prompt": "p", "response": "r"}, name="a")
    turned = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}
    other_shape = write(tmp_path, "", turned, name="b")
    longer = write(tmp_path, turned, turned, name="c")
    first, second, third = (
        load_texts(path, "task").sha256 for path in (plain, other_shape, longer)
    )
    assert first == second != third


def test_data_that_is_audited_is_refused_with_the_count(tmp_path: Path) -> None:
    suite = FIXTURES / "order.jsonl"
    with pytest.raises(SuiteError, match=r"--task-data\) shares 160 prompts with the suite order"):
        plan_texts({"task": suite}, suites=[suite])
    planned = plan_texts({"task": suite}, suites=[f"harmful={FIXTURES / 'harmful.jsonl'}"])
    assert planned["task"].count == 160
    items = [json.loads(line) for line in suite.read_text().splitlines()[1:3]]
    pairs = [{"prompt": "new", "chosen": "c", "rejected": "r"}]
    pairs += [{"prompt": each["prompt"].upper(), "chosen": "c", "rejected": "r"} for each in items]
    with pytest.raises(SuiteError, match=r"shares 2 prompts .* the first is row 2"):
        plan_texts({"pairs": write(tmp_path, *pairs)}, suites=[suite])


def test_what_is_measured_is_withheld_from_prompts_that_models_write() -> None:
    """The words that harmful and safe suites ask about, but for those that were given."""
    suites = [FIXTURES / "harmful.jsonl", FIXTURES / "order.jsonl"]
    rows = [json.loads(line) for line in (FIXTURES / "harmful.jsonl").read_text().splitlines()[1:]]
    first = rows[0]["prompt"]
    withheld = withheld_words(suites, [first])
    assert not withheld & words_of(first)
    asked = frozenset(word for row in rows for word in words_of(row["prompt"]))
    assert withheld == asked - words_of(first)
    assert withheld_words([FIXTURES / "order.jsonl"], []) == frozenset()
    assert words_of("Give me: a RECIPE!") == {"give", "me", "a", "recipe"}


def test_what_is_missing_is_asked_for_by_its_option() -> None:
    error = missing_data("pairs", method="somf")
    assert error.message == "somf needs prompts with a chosen and a rejected answer"
    assert error.hint.startswith("give them with --pairs FILE: {")
