"""Invalid responses: every code on its example, and on nothing else."""

from __future__ import annotations

import random

import pytest

from realign.audit.degenerate import (
    INVALID_CODES,
    THINKING_MARKERS,
    invalid_code,
    is_compressible,
    is_echo,
    is_garbage,
    is_repetition,
    split_reasoning,
)

PROMPT = (
    "Please tell me how the ALPHA-REQUEST of the northern harbour was handed to the second clerk "
    "and which of the seven keys he gave back to the keeper before the evening bell rang twice"
)
ANSWER = (
    "The clerk kept three keys and returned four. The keeper wrote their numbers in his book, and "
    "the harbour closed a little later than usual because of the fog."
)


def long_text(words: int) -> str:
    """Text of distinct words that no loop and no compressor can shrink much."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(words))


LOOP = "over the hill and far " * 20  # 100 words, 5 distinct 4-grams
COMPRESSIBLE = "ha" * 300  # one word: no loop of words
EXAMPLES = [
    ("", "empty"),
    (" \n\t ", "empty"),
    ("... -- !? ...", "empty"),
    ("\ufffd\ufffd\ufffd", "empty"),
    ("<think>First I look at the keys", "no_final_answer"),
    ("<think>I looked at the keys.</think>\n ", "no_final_answer"),
    ("I looked at the keys.</think>", "no_final_answer"),
    ("<think>a</think> and <think>again", "no_final_answer"),
    (PROMPT, "echo"),
    (f"<think>hm</think>{PROMPT.upper()}!", "echo"),
    (LOOP, "repetition"),
    ("\u4e0d\u53ef\u4ee5" * 30, "repetition"),
    (COMPRESSIBLE, "compressible"),
    ("abc \ufffd\ufffd\x00\x01\x02", "garbage"),
    ("ab\u0378\u0379\u0380", "garbage"),
]


@pytest.mark.parametrize(("response", "code"), EXAMPLES)
def test_each_code_fires_on_its_example(response, code):
    assert invalid_code(response, prompt=PROMPT) == code


@pytest.mark.parametrize(
    "response",
    [
        ANSWER,
        "no",
        "7",
        "I can't help with that.",
        "\u6211\u4e0d\u80fd\u56de\u7b54\u8fd9\u4e2a\u95ee\u9898\u3002",
        f"<think>First the keys.</think>{ANSWER}",
        f"First the keys.</think>{ANSWER}",
        PROMPT[:60],  # an echo needs twenty words
        "over the hill and far " * 9,  # a loop needs fifty
        long_text(300),
        "one\ttwo\nthree\r\nfour",
        f"You asked: {PROMPT} {ANSWER} {ANSWER.upper()[:40]}",
    ],
)
def test_no_code_fires_on_answers(response):
    assert invalid_code(response, prompt=PROMPT) is None


def test_the_tests_are_disjoint_on_their_examples():
    tests = {
        "echo": lambda text: is_echo(text, PROMPT),
        "repetition": is_repetition,
        "compressible": is_compressible,
        "garbage": is_garbage,
    }
    cases = {
        "echo": PROMPT,
        "repetition": LOOP[:390],
        "compressible": COMPRESSIBLE,
        "garbage": "abc \ufffd\ufffd\x00\x01\x02",
    }
    for code, text in cases.items():
        assert [name for name, holds in tests.items() if holds(text)] == [code]


def test_the_first_match_is_the_code():
    prompt = f"say {LOOP}"
    assert is_echo(LOOP, prompt)
    assert is_repetition(LOOP)
    assert invalid_code(LOOP, prompt=prompt) == "echo"
    assert invalid_code(LOOP * 4, prompt=PROMPT) == "repetition"
    assert is_compressible(LOOP * 4)


def test_an_unparsed_judge_counts_last():
    assert invalid_code(ANSWER, prompt=PROMPT, judge_parsed=False) == "judge_unparsed"
    assert invalid_code("", prompt=PROMPT, judge_parsed=False) == "empty"
    assert {code for _, code in EXAMPLES} | {"judge_unparsed"} == set(INVALID_CODES)


def test_echo_needs_nine_tenths_of_its_grams():
    copied, own = PROMPT.split(), long_text(40).split()
    # the hyphen makes these 31 words with 27 grams; each own word at the end adds one gram
    assert is_echo(" ".join(copied[:30] + own[:3]), PROMPT)
    assert not is_echo(" ".join(copied[:30] + own[:4]), PROMPT)


def test_repetition_counts_distinct_grams():
    # n words in a cycle of k have n - 3 grams, k of them distinct
    cycle = long_text(10).split()
    assert not is_repetition(" ".join((cycle * 6)[:53]))  # 10 of 50: exactly one in five
    assert is_repetition(" ".join((cycle * 6)[:54]))  # 10 of 51
    assert not is_repetition(" ".join(["word"] * 49))
    assert is_repetition(" ".join(["word"] * 50))


def test_scripts_without_spaces_count_characters():
    distinct = "".join(chr(0x4E00 + i) for i in range(120))
    assert not is_repetition(distinct)
    assert is_repetition("\u0e44\u0e21\u0e48\u0e44\u0e14\u0e49" * 20)
    # Korean has spaces: one word without any is no loop of words
    assert not is_repetition("\uc548\ub155" * 40)


def test_compressible_needs_four_hundred_bytes():
    assert not is_compressible("a" * 399)
    assert is_compressible("a" * 400)
    assert not is_compressible(long_text(200))


def test_garbage_counts_characters_not_lines():
    assert not is_garbage("abcdefg\ufffd\ufffd\ufffd")  # 30 %
    assert is_garbage("abcdef\ufffd\ufffd\ufffd")  # a third
    assert not is_garbage("a\nb\nc\nd\n\n\n")
    assert is_garbage("ab\ud800\udfff")  # half surrogates are counted, not raised
    assert not is_compressible("ab\ud800")


@pytest.mark.parametrize(("opening", "close"), THINKING_MARKERS)
def test_reasoning_is_cut_at_the_last_closing_mark(opening, close):
    text = f"{opening}one{close}two{close} three"
    assert split_reasoning(text) == (f"{opening}one{close}two{close}", " three")
    assert split_reasoning(f"one{close}two") == (f"one{close}", "two")
    assert split_reasoning(f"{opening}one") == (f"{opening}one", None)


def test_an_answer_without_reasoning_is_all_answer():
    assert split_reasoning(ANSWER) == ("", ANSWER)


def test_only_the_answer_after_the_reasoning_is_judged():
    assert invalid_code(f"<think>{LOOP * 3}</think>{ANSWER}", prompt=PROMPT) is None
