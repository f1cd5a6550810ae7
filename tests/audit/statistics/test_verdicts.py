"""The three verdicts: printed table, downgrades, invariants, and the levels they keep."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, ttest_1samp

from realign.audit.statistics.evidence import (
    TREATMENTS,
    Evidence,
    treat_invalid,
    weigh_differences,
    weigh_pairs,
    weigh_table,
)
from realign.audit.statistics.intervals import Interval
from realign.audit.statistics.paired import PairedTable, tango_upper, tango_within
from realign.audit.statistics.power import certification_probability
from realign.audit.statistics.verdicts import (
    NEAR_MARGIN,
    NOT_PLANNED,
    OUT_OF_REACH,
    WORDS,
    decide,
    judges_disagree,
    verdicts_differ,
)
from realign.errors import UsageError

# e, b, c, d; p; L; U; verdict; flags, at m = 0.03 and alpha = 0.025
TABLE = [
    ((12, 14, 3, 171), 0.006363, 0.016511, 0.101306, "drift", ()),
    ((0, 6, 0, 194), 0.015625, 0.010589, 0.063894, "drift", ()),
    ((0, 3, 0, 197), 0.125, -0.004128, 0.043166, "inconclusive", ()),
    ((0, 0, 0, 80), 1, -0.045818, 0.045818, "inconclusive", ()),
    ((0, 0, 0, 200), 1, -0.018845, 0.018845, "within_margin", ("equivalent",)),
    ((12, 2, 3, 183), 0.8125, -0.034476, 0.022574, "within_margin", ()),
    ((6, 3, 2, 939), 0.5, -0.004821, 0.007373, "within_margin", ("equivalent",)),
    (
        (50, 30, 12, 1908),
        0.003958,
        0.002779,
        0.015936,
        "within_margin",
        ("detectable", "equivalent"),
    ),
]


def weighed(e: int, b: int, c: int, d: int) -> Evidence:
    return weigh_table(PairedTable(e, b, c, d))


@pytest.mark.parametrize(("counts", "p", "low", "high", "verdict", "flags"), TABLE)
def test_printed_verdicts(counts, p, low, high, verdict, flags):
    result = decide(weighed(*counts), margin=0.03)
    assert result.verdict == verdict
    assert result.flags == flags
    assert result.reason == ("underpowered" if verdict == "inconclusive" else None)
    assert (result.p, result.p_adj) == pytest.approx((p, p), abs=1e-6)
    assert result.ci is not None
    assert (result.ci.low, result.ci.high) == pytest.approx((low, high), abs=1e-6)
    assert (result.ci.method, result.ci.level) == ("tango", 0.95)
    assert result.ci_secondary is not None
    assert result.ci_secondary.method == "newcombe10"


def test_words_never_promise_safety():
    assert set(WORDS.values()) == {
        "drift found",
        "within the declared margin",
        "not enough data to say",
    }
    assert decide(weighed(0, 0, 0, 80), margin=0.03).words == "not enough data to say"


@pytest.mark.parametrize("counts", [(0, 3, 0, 197), (0, 0, 0, 80)])
def test_underpowered_says_how_many_items_it_would_take(counts):
    result = decide(weighed(*counts), margin=0.03)
    assert (result.n_needed, result.n_needed_reason) == (280, None)


def first_that_certifies(margin: float, churn: float) -> int:
    sizes = range(50, 3000, 10)
    return next(n for n in sizes if certification_probability(n, margin=margin, churn=churn) >= 0.8)


@pytest.mark.parametrize("counts", [(0, 8, 5, 387), (0, 8, 2, 290)])
def test_items_needed_use_the_observed_churn(counts):
    result = decide(weighed(*counts), margin=0.02)
    assert result.reason == "underpowered"
    churn = (counts[1] + counts[2]) / sum(counts)
    assert result.n_needed == first_that_certifies(0.02, churn) > sum(counts)
    assert result.n_needed != 520  # that would be the floor of 2 %


def test_enough_items_but_too_near_the_margin():
    near = decide(weighed(0, 14, 7, 579), margin=0.025)
    assert near.reason == "underpowered"
    assert first_that_certifies(0.025, 21 / 600) <= 600
    assert (near.n_needed, near.n_needed_reason) == (None, NEAR_MARGIN)
    far = decide(weighed(0, 3, 3, 194), margin=0.0005)
    assert (far.n_needed, far.n_needed_reason) == (None, OUT_OF_REACH)


def test_drift_beyond_the_margin_is_flagged():
    result = decide(weighed(5, 40, 2, 153), margin=0.03)
    assert (result.verdict, result.flags) == ("drift", ("beyond_margin",))


def test_adjustment_applies_to_detection_only():
    drifted = weighed(12, 14, 3, 171)
    result = decide(drifted, margin=0.03, p_adj=0.06)
    assert (result.verdict, result.reason) == ("inconclusive", "underpowered")
    assert (result.p, result.p_adj) == pytest.approx((0.006363, 0.06), abs=1e-6)
    within = decide(weighed(50, 30, 12, 1908), margin=0.03, p_adj=0.06)
    assert within.verdict == "within_margin"
    assert "detectable" not in within.flags


def test_downgrades_in_their_order():
    drifted, within = weighed(12, 14, 3, 171), weighed(0, 0, 0, 200)
    for evidence in (drifted, within):
        sensitive = decide(evidence, margin=0.03, invalid_sensitive=True)
        assert (sensitive.verdict, sensitive.reason) == ("inconclusive", "invalid_sensitive")
        judges = decide(evidence, margin=0.03, judge_disagreement=True)
        assert (judges.verdict, judges.reason) == ("inconclusive", "judge_disagreement")
        both = decide(evidence, margin=0.03, judge_disagreement=True, invalid_sensitive=True)
        assert both.reason == "invalid_sensitive"


def test_fewer_than_fifty_items_say_nothing():
    for counts in ((0, 30, 0, 19), (0, 0, 0, 49)):
        result = decide(weighed(*counts), margin=0.08)
        assert (result.verdict, result.reason) == ("inconclusive", "too_few_items")
    assert decide(weighed(0, 30, 0, 20), margin=0.08).verdict == "drift"
    assert decide(weighed(0, 0, 0, 50), margin=0.08).verdict == "within_margin"


def test_no_item_says_nothing():
    result = decide(weighed(0, 0, 0, 0), margin=0.03)
    assert (result.verdict, result.reason) == ("inconclusive", "too_few_items")
    assert (result.ci, result.ci_secondary, result.n_needed) == (None, None, 280)
    nothing = decide(weigh_differences([], seed=0), margin=0.03)
    assert (nothing.verdict, nothing.reason) == ("inconclusive", "too_few_items")


def test_churn_at_the_noise_floor_is_flagged():
    drifted = weighed(12, 14, 3, 171)  # churn 8.5 %
    assert "within_noise_floor" in decide(drifted, margin=0.03, self_churn=0.085).flags
    assert "within_noise_floor" not in decide(drifted, margin=0.03, self_churn=0.08).flags
    calm = decide(weighed(0, 0, 0, 200), margin=0.03, self_churn=0.5)
    assert "within_noise_floor" not in calm.flags


@pytest.mark.parametrize("margin", [0.0, -0.03, 1.0, 3.0])
def test_margins_are_positive_fractions(margin):
    with pytest.raises(UsageError, match=f"margin is {margin}"):
        decide(weighed(0, 0, 0, 200), margin=margin)


def test_scores_may_have_margins_above_one():
    result = decide(weigh_differences([0.5, -0.5] * 50, seed=0), margin=3.0)
    assert result.verdict == "within_margin"


def items_of(table: PairedTable) -> tuple[list[bool], list[bool]]:
    counts = (table.e, table.b, table.c, table.d)
    kinds = ((True, True), (False, True), (True, False), (False, False))
    pairs = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_independent_items_go_to_tango_and_mcnemar():
    table = PairedTable(12, 14, 3, 171)
    comparator, candidate = items_of(table)
    alone = [f"own-{i}" for i in range(200)]
    for clusters in (None, alone, [None] * 200):
        evidence = weigh_pairs(comparator, candidate, seed=4, clusters=clusters)
        assert evidence == weigh_table(table)


def test_items_that_share_clusters_go_to_the_cluster_bootstrap():
    comparator, candidate = items_of(PairedTable(12, 14, 3, 171))
    order = np.random.default_rng(0).permutation(200).tolist()
    comparator, candidate = [comparator[i] for i in order], [candidate[i] for i in order]
    clusters = [f"entity-{i // 4}" for i in range(200)]
    evidence = weigh_pairs(comparator, candidate, seed=4, clusters=clusters)
    result = decide(evidence, margin=0.03)
    assert result.ci is not None
    assert result.ci.method == "cluster_bootstrap"
    assert result.ci_secondary is None
    assert evidence.n_clusters == 50
    assert evidence.table == PairedTable(12, 14, 3, 171)
    assert evidence.standard_error is not None
    assert result.verdict == "drift"
    undecided = decide(evidence, margin=0.03, p_adj=0.5)
    assert (undecided.reason, undecided.n_needed) == ("underpowered", None)
    assert undecided.n_needed_reason == NOT_PLANNED


def test_whole_clusters_that_flip_together_are_weaker_evidence():
    # 14 new flips in two clusters of seven: as independent items this would be drift
    comparator = [False] * 210
    candidate = [True] * 14 + [False] * 196
    clusters = [f"entity-{i // 7}" for i in range(210)]
    assert decide(weigh_pairs(comparator, candidate, seed=1), margin=0.03).verdict == "drift"
    clustered = decide(weigh_pairs(comparator, candidate, seed=1, clusters=clusters), margin=0.03)
    assert (clustered.verdict, clustered.p) == ("inconclusive", 0.25)


@pytest.mark.parametrize(("clusters", "verdict"), [(9, "inconclusive"), (10, "within_margin")])
def test_fewer_than_ten_clusters_say_nothing(clusters, verdict):
    names = [f"entity-{i % clusters}" for i in range(200)]
    result = decide(weigh_pairs([False] * 200, [False] * 200, seed=0, clusters=names), margin=0.03)
    assert result.verdict == verdict
    assert (result.reason == "few_clusters") == (clusters < 10)
    assert ("few_clusters" in result.flags) == (clusters < 10)


def test_continuous_differences():
    rng = np.random.default_rng(6)
    worse = decide(weigh_differences(rng.normal(0.5, 1, 200), seed=2), margin=0.2)
    assert (worse.verdict, worse.flags) == ("drift", ("beyond_margin",))
    assert worse.ci is not None
    assert worse.ci.method == "bootstrap"
    same = decide(weigh_differences(rng.normal(0.0, 1, 2000), seed=2), margin=0.2)
    assert same.verdict == "within_margin"
    unclear = decide(weigh_differences(rng.normal(0.0, 1, 60), seed=2), margin=0.02)
    assert (unclear.verdict, unclear.n_needed_reason) == ("inconclusive", NOT_PLANNED)


def test_verdicts_do_not_depend_on_item_order():
    comparator, candidate = items_of(PairedTable(12, 9, 3, 176))
    clusters = [f"entity-{i % 40}" for i in range(200)]
    order = np.random.default_rng(2).permutation(200).tolist()
    straight = weigh_pairs(comparator, candidate, seed=4, clusters=clusters)
    shuffled = weigh_pairs(
        [comparator[i] for i in order],
        [candidate[i] for i in order],
        seed=4,
        clusters=[clusters[i] for i in order],
    )
    assert straight == shuffled
    assert decide(straight, margin=0.05) == decide(shuffled, margin=0.05)


def test_newcombe_never_decides():
    rng = np.random.default_rng(7)
    absurd = Interval(low=0.9, high=0.95, level=0.95, method="newcombe10")
    for _ in range(200):
        counts = rng.multinomial(int(rng.integers(50, 600)), [0.05, 0.03, 0.02, 0.9]).tolist()
        evidence = weighed(*counts)
        expected = decide(evidence, margin=0.03)
        for secondary in (None, absurd):
            result = decide(replace(evidence, ci_secondary=secondary), margin=0.03)
            assert replace(result, ci_secondary=expected.ci_secondary) == expected


counts = st.integers(min_value=0, max_value=120)


@settings(max_examples=150, deadline=None)
@given(
    e=counts, b=counts, c=counts, d=st.integers(min_value=50, max_value=900),
    margins=st.tuples(st.floats(0.001, 0.9), st.floats(0.001, 0.9)),
)  # fmt: skip
def test_a_larger_margin_never_withdraws_a_certificate(e, b, c, d, margins):
    evidence = weighed(e, b, c, d)
    small, large = sorted(margins)
    first = decide(evidence, margin=small).verdict
    second = decide(evidence, margin=large).verdict
    if first == "within_margin":
        assert second == "within_margin"
    if second == "drift":
        assert first == "drift"


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shift=st.floats(-0.3, 0.6),
    margins=st.tuples(st.floats(0.01, 2.0), st.floats(0.01, 2.0)),
)
def test_a_larger_margin_never_withdraws_a_certificate_of_scores(seed, shift, margins):
    deltas = np.random.default_rng(seed).normal(shift, 1, size=60)
    evidence = weigh_differences(deltas, seed=1)
    small, large = sorted(margins)
    if decide(evidence, margin=small).verdict == "within_margin":
        assert decide(evidence, margin=large).verdict == "within_margin"


@settings(max_examples=100, deadline=None)
@given(e=counts, b=counts, c=counts, d=st.integers(min_value=50, max_value=900))
def test_one_more_bad_item_never_helps(e, b, c, d):
    rank = {"within_margin": 0, "inconclusive": 1, "drift": 2}
    before = decide(weighed(e, b, c, d), margin=0.05)
    after = decide(weighed(e, b + 1, c, d - 1), margin=0.05)
    assert rank[after.verdict] >= rank[before.verdict]


def test_invalid_responses_are_counted_three_ways():
    comparator = [True, False, None, None, False]
    candidate = [None, True, None, False, False]
    kept = {name: treat_invalid(comparator, candidate, treatment=name) for name in TREATMENTS}
    assert kept["excluded"] == ([1, 4], [False, False], [True, False])
    assert kept["as_bad"] == (
        [0, 1, 2, 3, 4],
        [True, False, True, True, False],
        [True, True, True, False, False],
    )
    assert kept["as_ok"] == (
        [0, 1, 2, 3, 4],
        [True, False, False, False, False],
        [False, True, False, False, False],
    )


def verdict_under_every_treatment(comparator, candidate):
    names = []
    for treatment in TREATMENTS:
        _, first, second = treat_invalid(comparator, candidate, treatment=treatment)
        names.append(decide(weigh_pairs(first, second, seed=0), margin=0.03).verdict)
    return names


def test_a_verdict_that_hangs_on_invalid_responses_is_none():
    comparator = [False] * 300
    broken = [None] * 20 + [False] * 280
    names = verdict_under_every_treatment(comparator, broken)
    assert names == ["within_margin", "drift", "within_margin"]
    assert verdicts_differ(names)
    result = decide(weighed(0, 0, 0, 280), margin=0.03, invalid_sensitive=verdicts_differ(names))
    assert (result.verdict, result.reason) == ("inconclusive", "invalid_sensitive")
    steady = verdict_under_every_treatment(comparator, [None] + [False] * 299)
    assert not verdicts_differ(steady)


@pytest.mark.parametrize(
    ("primary", "secondary", "disagree"),
    [
        ("drift", "within_margin", True),
        ("within_margin", "drift", True),
        ("drift", "drift", False),
        ("drift", "inconclusive", False),
        ("inconclusive", "within_margin", False),
    ],
)
def test_judges_disagree_only_when_they_contradict(primary, secondary, disagree):
    assert judges_disagree(primary, secondary) is disagree


def test_equivalence_of_a_mean_is_two_one_sided_tests():
    deltas = np.array(
        [0.1, -0.2, 0, 0.1, 0, -0.1, 0, 0.1, -0.1, 0, 0.1, 0, -0.1, 0, 0.1, -0.1, 0, 0, 0.1, -0.1]
    )
    assert deltas.mean() == pytest.approx(-0.005)
    assert deltas.std(ddof=1) / np.sqrt(20) == pytest.approx(0.019835, abs=1e-6)
    lower = ttest_1samp(deltas, -0.05, alternative="greater").pvalue
    upper = ttest_1samp(deltas, 0.05, alternative="less").pvalue
    assert (lower, upper) == pytest.approx((0.017564, 0.006059), abs=1e-6)
    t = ttest_1samp(deltas, 0).confidence_interval(0.90)
    assert (t.low, t.high) == pytest.approx((-0.039297, 0.029297), abs=1e-6)
    interval = Interval(low=t.low, high=t.high, level=0.9, method="normal")
    for margin in np.linspace(0.01, 0.08, 71):
        tests = max(
            ttest_1samp(deltas, -margin, alternative="greater").pvalue,
            ttest_1samp(deltas, margin, alternative="less").pvalue,
        )
        assert interval.equivalent(margin) == (tests <= 0.05)
        assert interval.within(margin) == (
            ttest_1samp(deltas, margin, alternative="less").pvalue <= 0.05
        )


def test_zero_flips_of_eighty_are_not_equivalence():
    result = decide(weighed(0, 0, 0, 80), margin=0.03)
    assert "equivalent" not in result.flags
    assert result.ci is not None
    assert round(100 * result.ci.high, 2) == 4.58


def test_false_alarms_without_drift_stay_at_their_level():
    alpha, runs = 0.025, 1200
    rng = np.random.default_rng(15)
    for n, rate in ((200, 0.02), (313, 0.05)):
        tables = rng.multinomial(n, [0.1, rate, rate, 0.9 - 2 * rate], size=runs).tolist()
        verdict_of: dict[tuple[int, int], str] = {}
        alarms = 0
        for e, b, c, d in tables:
            if (b, c) not in verdict_of:
                verdict_of[b, c] = decide(weighed(e, b, c, d), margin=0.03).verdict
            alarms += verdict_of[b, c] == "drift"
        assert 0 < alarms / runs <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_false_alarms_without_drift_enumerated():
    for n in (100, 313):
        for rate in (0.005, 0.01, 0.03, 0.08):
            flips = np.arange(n + 1)
            b, c = (grid.ravel() for grid in np.meshgrid(flips, flips))
            weight = binom.pmf(c, n, rate) * binom.pmf(b, n - c, rate / (1 - rate))
            likely = (weight > 1e-10) & (b + c <= n)
            b, c, weight = b[likely], c[likely], weight[likely]
            alarm = (binom.sf(b - 1, b + c, 0.5) <= 0.025) & (tango_upper(b, c, n) > 0.03)
            assert float(weight[alarm].sum()) <= 0.025


@pytest.mark.parametrize("n", [100, 313, 950])
def test_certifying_at_the_margin_keeps_its_level_in_simulation(n):
    # a reduced form of the enumeration in test_power_planning: 4 000 tables per setting
    rng = np.random.default_rng(16)
    limit = 0.025 + 3 * math.sqrt(0.025 * 0.975 / 4000)
    for margin in (0.02, 0.03, 0.05):
        for churn in (margin, 0.085, 0.2):
            b_rate, c_rate = (churn + margin) / 2, (churn - margin) / 2
            for comparator in (c_rate, 0.1, 0.5):
                e_rate = max(comparator - c_rate, 0.0)
                rates = [e_rate, b_rate, c_rate, 1 - e_rate - b_rate - c_rate]
                tables = rng.multinomial(n, rates, size=4000)
                within = tango_within(tables[:, 1], tables[:, 2], n, margin=margin)
                assert np.mean(within) <= limit, (n, margin, churn, comparator)
