"""The bound that a limit is held to: never below the figure, honest about small numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from support.tune_support import tiny_suites

from realign.audit.statistics.intervals import wilson
from realign.audit.statistics.paired import tango_interval
from realign.errors import UsageError
from realign.tune.bounds import prompts_needed, smallest_limit, upper_bound
from realign.tune.request import Limits, check_sizes


def marks(bad: int, n: int) -> str:
    return "/".join("1" * bad + "0" * (n - bad))


def test_of_independent_answers_it_is_tangos_and_wilsons() -> None:
    before, after = marks(2, 80), "/".join("0" * 77 + "111")
    found = upper_bound(before, after, confidence=0.975)
    tango = tango_interval(3, 2, 80)
    assert tango is not None and found == pytest.approx(tango.high)
    one = wilson(0, 80, alpha=0.1)
    assert one is not None
    assert upper_bound(before, before, confidence=0.9) == pytest.approx(one.high)
    assert upper_bound(before, after, confidence=0.5) == pytest.approx(1 / 80)


def test_answers_that_go_together_count_for_fewer() -> None:
    apart = upper_bound(marks(0, 80), marks(4, 80), confidence=0.9)
    alone, whole = "/".join(["0" * 4] * 20), "/".join(["1111", *["0" * 4] * 19])
    together = upper_bound(alone, whole, confidence=0.9)
    assert together > apart + 0.03
    spread = "/".join(["1000"] * 4 + ["0000"] * 16)
    assert upper_bound(alone, spread, confidence=0.9) == pytest.approx(apart)


@given(st.lists(st.tuples(st.sampled_from("01"), st.sampled_from("01")), min_size=4, max_size=60))
@settings(max_examples=60, deadline=None)
def test_it_is_never_below_the_figure_and_grows_with_confidence(
    pairs: list[tuple[str, str]],
) -> None:
    before, after = ("/".join(side) for side in zip(*pairs, strict=True))
    found = [upper_bound(before, after, confidence=c) for c in (0.5, 0.8, 0.9, 0.99)]
    assert found == sorted(found) and found[-1] <= 1.0


def test_it_covers() -> None:
    # 3 % newly bad, 1 % repaired, in clusters of 4 that half go together.
    rng, missed, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        clusters = []
        for _ in range(30):
            common = rng.random() < 0.5
            draws = rng.random(1).repeat(4) if common else rng.random(4)
            clusters.append([(u < 0.01, 0.01 <= u < 0.04) for u in draws])
        before = "/".join("".join("1" if c else "0" for c, _ in each) for each in clusters)
        after = "/".join("".join("1" if b else "0" for _, b in each) for each in clusters)
        missed += upper_bound(before, after, confidence=0.9) < 0.02
    assert missed / runs <= 0.14


def test_a_suite_too_small_for_its_limit_is_refused_with_the_number() -> None:
    suites = tiny_suites(limit=20)
    z2 = norm.isf(0.1) ** 2
    needed = prompts_needed(0.01, 0.9)
    assert needed == 163 and z2 / (163 + z2) <= 0.01 < z2 / (162 + z2)
    with pytest.raises(UsageError, match="20 tuning prompts cannot show --max-") as caught:
        check_sizes(suites, Limits(), side="tuning")
    assert "have at least 81" in (caught.value.hint or "")
    least = smallest_limit(20, 0.9)
    check_sizes(suites, Limits(utility_drop=least, over_refusal_rise=least), side="tuning")
    check_sizes(suites, Limits(confidence=0.5), side="tuning")
    with pytest.raises(UsageError) as caught:
        check_sizes(suites[2:], Limits(utility_drop=0.0), side="tuning")
    assert "have at least" not in (caught.value.hint or "")
