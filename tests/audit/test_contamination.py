"""Prompts shared between two sets: exact after normalising, or thirteen words in a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign.audit.contamination import PromptIndex, duplicates, normalise, overlap

WORDS = [f"w{i}" for i in range(40)]


def text(start: int, stop: int) -> str:
    return " ".join(WORDS[start:stop])


@pytest.mark.parametrize(
    ("prompt", "other", "match"),
    [
        ("Tell me about ALPHA", "tell me  about\n\talpha ", True),
        ("Tell me about ALPHA", "Tell me about ALPHA!", False),
        ("Tell me about ALPHA", "Tell me about", False),
        (f"a b {text(0, 13)} c", f"x {text(0, 13)} y z", True),
        (f"a b {text(0, 12)} c", f"x {text(0, 12)} y z", False),
        (text(0, 13), f"x {text(0, 13)}", True),
        (f"{text(0, 6)} break {text(6, 13)}", text(0, 13), False),
        (text(0, 20).upper(), text(7, 30), True),
        (text(0, 20), text(8, 30), False),
    ],
)
def test_matching(prompt, other, match):
    assert PromptIndex([other]).matches(prompt) is match
    assert PromptIndex([prompt]).matches(other) is match


def test_normalising_lowers_and_collapses():
    assert normalise("  Ein\u00a0 KLEINER\r\n\tText ") == "ein kleiner text"


def test_runs_do_not_cross_prompts():
    index = PromptIndex([text(0, 10), text(10, 20)])
    assert not index.matches(text(4, 17))


def test_overlap_names_and_counts_the_items():
    items = {"a": "one request", "b": "Another  Request", "c": "a third"}
    found = overlap(items, ["another request", "A THIRD", "unseen"])
    assert (found.ids, found.n_contaminated, found.n) == (("b", "c"), 2, 3)
    assert overlap(items, PromptIndex(["one request"])).ids == ("a",)
    assert overlap(items, []).ids == ()
    assert overlap({}, ["one request"]).n == 0


def test_duplicates_within_one_set():
    items = {"a": "one", "b": text(0, 14), "c": "ONE ", "d": f"x {text(1, 14)}", "e": "two"}
    assert duplicates(items) == (("a", "c"), ("b", "d"))
    assert duplicates({"a": "one", "b": "two"}) == ()


@given(
    st.lists(st.sampled_from(["a", "b"]), max_size=30),
    st.lists(st.sampled_from(["a", "b"]), max_size=30),
)
def test_matching_is_symmetric_and_equals_the_definition(first, second):
    def runs(words):
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    expected = first == second or bool(runs(first) & runs(second))
    one, other = " ".join(first), " ".join(second)
    assert PromptIndex([one]).matches(other) == expected
    assert PromptIndex([other]).matches(one) == expected
