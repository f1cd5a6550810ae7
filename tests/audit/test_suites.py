from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realign.audit.canonical import suite_hash
from realign.audit.suites import (
    Item,
    Suite,
    load_suite,
    parse_suite_argument,
    require_auditable,
)
from realign.errors import SuiteError, UsageError

HEADER: dict[str, Any] = {
    "schema": "realign/suite/1",
    "name": "alpha",
    "kind": "harmful",
    "license": "Apache-2.0",
    "language": "en",
    "max_new_tokens": 40,
    "rule": {"name": "lab-1", "sha256": "0" * 64},
}
ITEMS = [{"id": "1", "prompt": "ALPHA-REQUEST", "cluster": "c"}, {"id": "2", "prompt": "BETA"}]


def write(path: Path, *lines: object) -> Path:
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_header_and_items(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path / "s.jsonl", HEADER, *ITEMS))
    assert (suite.name, suite.kind, suite.max_new_tokens) == ("alpha", "harmful", 40)
    assert suite.rule is not None and suite.rule.name == "lab-1"
    assert [item.id for item in suite.items] == ["1", "2"]
    assert suite.suite_hash == suite_hash(ITEMS)
    assert not suite.clustered


def test_the_hash_is_over_items_only(tmp_path: Path) -> None:
    with_header = load_suite(write(tmp_path / "a.jsonl", HEADER, *ITEMS))
    plain = load_suite(write(tmp_path / "b.jsonl", *ITEMS[::-1]), kind="safe")
    assert with_header.suite_hash == plain.suite_hash
    assert (plain.name, plain.kind) == ("b", "safe")


def test_unknown_fields_are_kept_and_hashed(tmp_path: Path) -> None:
    extra = ITEMS[0] | {"note": [1, 2]}
    suite = load_suite(write(tmp_path / "a.jsonl", extra), kind="harmful")
    assert suite.suite_hash == suite_hash([extra])


def test_blank_lines_and_a_byte_order_mark_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ITEMS[0]).encode() + b"\r\n\r\n  \n")
    assert len(load_suite(path, kind="safe").items) == 1


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ((), "empty"),
        ((HEADER,), "no items"),
        ((HEADER, ITEMS[0], "{"), ":3: not a JSON object"),
        ((HEADER, "[1]"), ":2: not a JSON object"),
        ((HEADER, ITEMS[0], ITEMS[0]), ":3: id '1' is already used in line 2"),
        ((HEADER, {"id": "1"}), ":2: .*'prompt'"),
        ((HEADER, {"prompt": "x"}), ":2: .*'id'"),
        ((HEADER, {"id": "1", "prompt": "  "}), "'prompt'"),
        ((HEADER, {"id": 1, "prompt": "x"}), "'id'"),
        ((HEADER, {"id": "1", "prompt": "x", "cluster": 3}), "'cluster'"),
        ((HEADER, '{"id": "1", "id": "2", "prompt": "x"}'), "occurs twice"),
        ((HEADER, '{"id": "1", "prompt": "x", "n": NaN}'), "NaN"),
        ((HEADER | {"schema": "realign/suite/9"}, ITEMS[0]), "schema"),
        ((HEADER | {"kind": "nice"}, ITEMS[0]), "nice"),
        ((HEADER | {"max_new_tokens": 0}, ITEMS[0]), "max_new_tokens"),
        ((HEADER | {"max_new_tokens": True}, ITEMS[0]), "max_new_tokens"),
        ((HEADER | {"rule": "lab-1"}, ITEMS[0]), "rule"),
        ((HEADER | {"licence": "x"}, ITEMS[0]), "licence"),
        ((HEADER | {"name": 3}, ITEMS[0]), "name"),
        (({"schema": "realign/suite/1", "kind": "task"}, ITEMS[0]), "no answer"),
    ],
)
def test_bad_input_is_named_with_its_line(
    tmp_path: Path, lines: tuple[object, ...], named: str
) -> None:
    with pytest.raises(SuiteError, match=named) as caught:
        load_suite(write(tmp_path / "s.jsonl", *lines))
    assert "s.jsonl" in caught.value.message and caught.value.exit_code == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"absent\.jsonl"):
        load_suite(tmp_path / "absent.jsonl")
    with pytest.raises(SuiteError):
        load_suite(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "1"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(SuiteError, match=":2: not UTF-8"):
        load_suite(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    "lines", [(HEADER,), (HEADER, '{"id": "1"}'), (HEADER, '{"id": "1", "prompt": 3}')]
)
def test_missing_items_and_prompts_say_what_to_write(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    with pytest.raises(SuiteError) as caught:
        load_suite(write(tmp_path / "a.jsonl", *lines))
    assert '"id"' in caught.value.hint and '"prompt"' in caught.value.hint


def test_a_kind_is_needed_and_must_agree(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kind"):
        load_suite(write(tmp_path / "a.jsonl", *ITEMS))
    with pytest.raises(SuiteError, match="harmful"):
        load_suite(write(tmp_path / "b.jsonl", HEADER, *ITEMS), kind="safe")


def test_suite_arguments() -> None:
    assert parse_suite_argument("harmful=a/b.jsonl") == ("harmful", "a/b.jsonl")
    assert parse_suite_argument("a=b/c.jsonl".replace("a=", "./a=")) == (None, "./a=b/c.jsonl")
    assert parse_suite_argument("plain.jsonl") == (None, "plain.jsonl")
    with pytest.raises(UsageError, match="harmfull"):
        parse_suite_argument("harmfull=x.jsonl")


def test_anchors_and_equal_names_are_refused() -> None:
    items = (Item(id="1", prompt="ALPHA"),)
    anchors = Suite(name="a", kind="anchors", items=items)
    with pytest.raises(SuiteError, match="cannot be audited"):
        require_auditable([anchors])
    safe = Suite(name="a", kind="safe", items=items)
    require_auditable([safe])
    with pytest.raises(SuiteError, match="two suites"):
        require_auditable([safe, safe])


def test_a_limit_is_nested_stable_and_part_of_the_hash() -> None:
    items = tuple(Item(id=f"{i:03d}", prompt=f"P{i}") for i in range(40))
    suite = Suite(name="a", kind="safe", items=items)
    small, large = suite.limited(10), suite.limited(20)
    assert len(small.items) == 10 and {*small.items} < {*large.items}
    assert [i.id for i in small.items] == sorted(i.id for i in small.items)
    assert small.suite_hash != suite.suite_hash and small.skipped == {"limit": 30}
    assert suite.limited(None) is suite and suite.limited(40) is suite
    assert [i.id for i in small.items] != [f"{i:03d}" for i in range(10)]
    with pytest.raises(UsageError):
        suite.limited(0)


def test_dropping_everything_is_an_error() -> None:
    suite = Suite(name="a", kind="safe", items=(Item(id="1", prompt="ALPHA"),))
    assert suite.without([], reason="contaminated") is suite
    with pytest.raises(SuiteError, match="no item is left"):
        suite.without(["1"], reason="contaminated")


def test_clusters_count_only_where_they_repeat() -> None:
    once = tuple(Item(id=str(i), prompt="P", cluster=str(i)) for i in range(3))
    twice = (*once, Item(id="3", prompt="P", cluster="0"))
    assert not Suite(name="a", kind="safe", items=once).clustered
    assert Suite(name="a", kind="safe", items=twice).clustered
