from __future__ import annotations

import hashlib
import locale

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.audit_support import instrument, make_suite

from realign.audit.canonical import (
    canonical_json,
    instrument_id,
    prompt_hash,
    response_hash,
    suite_hash,
)
from realign.audit.instruments import Generation, check_comparable
from realign.errors import UsageError

ITEMS = [
    {"id": "b", "prompt": "Second prompt", "category": "ncr"},
    {"id": "a", "prompt": "First prompt", "category": "vcr"},
]
VECTOR = "1321bf2480b31716811f30812f07d5b7be0538e00b042c44293e5e44ff47ba82"


def test_the_suite_vector() -> None:
    assert suite_hash(ITEMS) == VECTOR
    assert suite_hash(ITEMS[::-1]) == VECTOR
    assert suite_hash([dict(reversed(item.items())) for item in ITEMS]) == VECTOR


def test_one_changed_byte_changes_the_suite() -> None:
    assert suite_hash([ITEMS[0], ITEMS[1] | {"prompt": "First prompt "}]) != VECTOR
    assert suite_hash(ITEMS[:1]) != VECTOR


def test_the_locale_does_not_matter() -> None:
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "C")
        assert suite_hash(ITEMS) == VECTOR
    finally:
        locale.setlocale(locale.LC_ALL, before)


def test_canonical_json_is_utf8_without_blanks_or_escapes() -> None:
    assert canonical_json({"b": "\u00e9", "a": [1, None]}) == '{"a":[1,null],"b":"\u00e9"}'
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


@given(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=5))
def test_key_order_never_matters(value: dict[str, object]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


def test_prompt_and_response_hashes() -> None:
    ids = b"\x01\x00\x00\x00\x00\x01\x00\x00"
    assert prompt_hash([1, 256]) == hashlib.sha256(ids).hexdigest()
    assert response_hash("\u00e9") == hashlib.sha256("\u00e9".encode()).hexdigest()
    assert response_hash("\ud800") != response_hash("?")  # a lone surrogate has a hash


def test_instrument_ids_are_16_digits_of_the_three_hashes() -> None:
    whole = canonical_json({"generation": "g", "judge": "j", "suite": "s"})
    expected = hashlib.sha256(whole.encode()).hexdigest()[:16]
    assert instrument_id(suite="s", judge="j", generation="g") == expected


def test_results_of_different_instruments_cannot_be_compared() -> None:
    suite = make_suite(3)
    oracle, keyword = instrument(suite, "oracle"), instrument(suite, "keyword")
    check_comparable(oracle, instrument(suite, "oracle"))
    with pytest.raises(UsageError, match="judge") as caught:
        check_comparable(oracle, keyword)
    assert oracle.instrument_id in str(caught.value) and keyword.instrument_id in str(caught.value)
    with pytest.raises(UsageError, match="differ in suite"):
        check_comparable(keyword, instrument(make_suite(4), "keyword"))


def test_generation_hash_covers_what_is_requested() -> None:
    base = Generation(mode="greedy", max_new_tokens=16)
    assert base.generation_hash == Generation(mode="greedy", max_new_tokens=16).generation_hash
    assert base.generation_hash != Generation(mode="greedy", max_new_tokens=17).generation_hash
