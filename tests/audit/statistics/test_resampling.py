"""Bootstrap, sign-flip, cluster error, seeds and the recovered fraction."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from scipy.stats import multinomial, permutation_test, ttest_1samp

from realign.audit.statistics.intervals import Interval
from realign.audit.statistics.paired import mcnemar_one_sided
from realign.audit.statistics.resampling import (
    bootstrap_interval,
    cluster_codes,
    cluster_standard_error,
    comparison_seed,
    percentile_limits,
    recovered_fraction,
    sign_flip_p,
)

# Vector A: 20 items in 5 clusters of 4.
A = [1, 0, 0, 1, 0, 0, 0, 0, 0, -1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
A_CLUSTERS = [f"g{i // 4}" for i in range(20)]
# Vector C: ten continuous differences.
C = [0.12, 0.05, -0.02, 0.30, 0, 0.08, -0.05, 0.15, 0.22, 0.01]


def both(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    return interval.low, interval.high


def exact_resamples(sums: list[float], sizes: list[int]) -> np.ndarray:
    """Every resample of whole units, as means per item."""
    units = len(sums)
    return np.array(
        [
            sum(sums[i] for i in pick) / sum(sizes[i] for i in pick)
            for pick in itertools.product(range(units), repeat=units)
        ]
    )


def test_errors_of_vector_a():
    items = np.array(A, dtype=float)
    assert items.mean() == pytest.approx(0.15)
    assert items.std(ddof=1) / np.sqrt(20) == pytest.approx(0.109424, abs=1e-6)
    error = cluster_standard_error(A, clusters=A_CLUSTERS)
    assert error == pytest.approx(0.134164, abs=1e-6)
    alone = cluster_standard_error(A)
    assert alone == pytest.approx(items.std() / np.sqrt(20), abs=1e-12)


def test_exact_percentiles_of_vector_a():
    sums = [sum(A[4 * g : 4 * g + 4]) for g in range(5)]
    means = exact_resamples(sums, [4] * 5)
    assert len(means) == 3125
    assert percentile_limits(means) == pytest.approx((-0.10, 0.40))
    assert np.mean(means <= 0) == pytest.approx(0.18336)
    assert both(bootstrap_interval(A, seed=1, clusters=A_CLUSTERS)) == pytest.approx((-0.10, 0.40))
    assert both(bootstrap_interval(A, seed=1)) == pytest.approx((-0.05, 0.35))


def test_exact_item_percentiles_of_vector_a():
    # a resample of 20 items is a trinomial draw of +1 (4/20), -1 (1/20) and 0 (15/20)
    up, down = (grid.ravel() for grid in np.meshgrid(np.arange(21), np.arange(21)))
    up, down = up[up + down <= 20], down[up + down <= 20]
    weight = multinomial.pmf(np.stack([up, down, 20 - up - down], axis=1), 20, [0.2, 0.05, 0.75])
    sums = np.arange(-20, 21)
    share = np.cumsum([weight[up - down == k].sum() for k in sums])
    exact = [sums[np.searchsorted(share, q)] / 20 for q in (0.025, 0.975)]
    assert exact == pytest.approx([-0.05, 0.35])


def test_ignoring_clusters_is_optimistic():
    assert mcnemar_one_sided(4, 1) == 0.1875
    assert sign_flip_p(A, seed=1) == 0.1875  # the same test, on items
    assert sign_flip_p(A, seed=1, clusters=A_CLUSTERS) == 0.25


@pytest.mark.parametrize(("alpha", "limits"), [(0.025, (-1, 3)), (0.05, (-0.333333, 2.333333))])
def test_inverse_empirical_percentiles_of_vector_b(alpha, limits):
    means = exact_resamples([3, 1, -1], [1, 1, 1])
    assert len(means) == 27
    assert percentile_limits(means, alpha=alpha) == pytest.approx(limits, abs=1e-6)


def test_sign_flip_and_t_interval_of_vector_c():
    assert np.mean(C) == pytest.approx(0.086)
    assert sign_flip_p(C, seed=0) == 20 / 1024
    t = ttest_1samp(C, 0).confidence_interval(0.90)
    assert (t.low, t.high) == pytest.approx((0.020977, 0.151023), abs=1e-6)
    ours = both(bootstrap_interval(C, seed=0, alpha=0.05))
    assert ours == pytest.approx((t.low, t.high), abs=0.02)


def test_sign_flip_agrees_with_scipy_when_enumerated():
    rng = np.random.default_rng(2)
    for n in (3, 6, 9):
        deltas = rng.normal(0.2, 1, size=n).round(2)
        theirs = permutation_test(
            (deltas,),
            np.mean,
            permutation_type="samples",
            alternative="greater",
            n_resamples=np.inf,
        )
        assert sign_flip_p(deltas, seed=0) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_sign_flip_switches_from_enumeration_to_draws():
    # 16 non-zero units are enumerated whatever the seed; zeros do not count as units
    sixteen = [0.1 * (i + 1) for i in range(16)] + [0.0] * 100
    assert sign_flip_p(sixteen, seed=1) == sign_flip_p(sixteen, seed=2) == 2**-16
    rng = np.random.default_rng(4)
    many = rng.normal(0.15, 1, size=60)
    first, second = sign_flip_p(many, seed=1), sign_flip_p(many, seed=2)
    assert first != second
    assert first == pytest.approx(second, abs=4 * np.sqrt(first * (1 - first) / 100_000) * 1.5)
    assert first == sign_flip_p(many, seed=1)
    assert sign_flip_p(np.full(40, 1.0), seed=3) == 1 / 100_001


def test_drawn_signs_approach_mcnemar_on_flips():
    deltas = [1] * 26 + [-1] * 14 + [0] * 160
    exact = mcnemar_one_sided(26, 14)
    drawn = sign_flip_p(deltas, seed=7)
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 100_000))


def test_nothing_changed_gives_no_evidence():
    assert sign_flip_p([0.0] * 30, seed=0) == 1.0
    assert both(bootstrap_interval([0.0] * 30, seed=0)) == (0.0, 0.0)


def test_no_item_gives_no_interval():
    assert bootstrap_interval([], seed=0) is None
    assert cluster_standard_error([]) is None


def test_unequal_clusters_weigh_by_items():
    # one cluster of three, one of one: the mean of a resample is over items, not over clusters
    values, clusters = [1.0, 1.0, 1.0, -1.0], ["a", "a", "a", "b"]
    means = exact_resamples([3, -1], [3, 1])
    assert sorted(set(means)) == [-1.0, 0.5, 1.0]
    interval = bootstrap_interval(values, seed=0, clusters=clusters, alpha=0.3)
    assert both(interval) == percentile_limits(means, alpha=0.3) == (0.5, 0.5)
    assert interval is not None
    assert interval.method == "cluster_bootstrap"


def test_unnamed_items_are_clusters_of_their_own():
    assert cluster_codes(["a", None, "a", None, "b"]).tolist() == [0, 1, 0, 2, 3]


def test_seed_is_the_hash_of_instrument_comparison_and_run():
    digest = hashlib.sha256(b"9a3c51d07e2b84f6:drift:0").digest()
    assert comparison_seed("9a3c51d07e2b84f6", "drift", 0) == int(digest[:8].hex(), 16)
    others = {
        comparison_seed("9a3c51d07e2b84f6", name, run)
        for name in ("drift", "residual")
        for run in (0, 1)
    }
    assert len(others) == 4


def test_same_seed_same_bytes_whatever_ran_before():
    rng = np.random.default_rng(8)
    x, y = rng.normal(0.1, 1, size=150), rng.normal(0, 1, size=90)
    clusters = [f"k{i // 3}" for i in range(150)]

    def run_x():
        return (
            bootstrap_interval(x, seed=11),
            bootstrap_interval(x, seed=11, clusters=clusters),
            sign_flip_p(x, seed=11),
            sign_flip_p(x, seed=11, clusters=clusters),
        )

    before = run_x()
    bootstrap_interval(y, seed=12)
    sign_flip_p(y, seed=12)
    assert run_x() == before
    assert bootstrap_interval(x, seed=13) != before[0]


def test_item_order_does_not_matter():
    rng = np.random.default_rng(9)
    x = rng.normal(0.1, 1, size=120)
    names = [f"k{i % 17}" for i in range(120)]
    order = rng.permutation(120)
    shuffled, renamed = x[order], [names[i] for i in order]
    assert bootstrap_interval(x, seed=5) == bootstrap_interval(shuffled, seed=5)
    assert sign_flip_p(x, seed=5) == sign_flip_p(shuffled, seed=5)
    assert cluster_standard_error(x) == cluster_standard_error(shuffled)
    assert bootstrap_interval(x, seed=5, clusters=names) == bootstrap_interval(
        shuffled, seed=5, clusters=renamed
    )
    assert sign_flip_p(x, seed=5, clusters=names) == sign_flip_p(shuffled, seed=5, clusters=renamed)
    assert cluster_standard_error(x, clusters=names) == cluster_standard_error(
        shuffled, clusters=renamed
    )


def three_models(n: int = 200):
    """Rates 7.5 %, 13 %, 7 %: drift +5.5 points, residual -0.5."""
    reference, subject, repaired = (np.zeros(n) for _ in range(3))
    reference[:15] = 1
    subject[3:29] = 1  # 12 both bad, 14 newly bad, 3 fixed
    repaired[3:15] = 1  # against the reference: 12 both bad, 2 newly bad, 3 fixed
    repaired[27:29] = 1
    return reference, subject, repaired


def test_recovered_fraction_is_not_clipped():
    reference, subject, repaired = three_models()
    result = recovered_fraction(reference=reference, subject=subject, repaired=repaired, seed=0)
    assert (subject - reference).mean() == pytest.approx(0.055)
    assert (repaired - reference).mean() == pytest.approx(-0.005)
    assert result.value == pytest.approx(1.090909, abs=1e-6)
    low, high = both(result.interval)
    assert low < 1.0 < result.value < high
    assert (result.n, result.reason) == (200, None)


def test_recovered_fraction_is_exact_when_every_item_moves_alike():
    reference = np.zeros(60)
    result = recovered_fraction(
        reference=reference, subject=reference + 1.0, repaired=reference + 0.25, seed=0
    )
    assert result.value == 0.75
    assert both(result.interval) == (0.75, 0.75)


def test_recovered_fraction_pairs_items_of_all_three_models():
    reference, subject, repaired = three_models()
    order = np.random.default_rng(1).permutation(200)
    whole = recovered_fraction(reference=reference, subject=subject, repaired=repaired, seed=3)
    moved = recovered_fraction(
        reference=reference[order], subject=subject[order], repaired=repaired[order], seed=3
    )
    assert whole == moved
    broken = recovered_fraction(
        reference=reference, subject=subject, repaired=repaired[order], seed=3
    )
    assert broken.value == whole.value
    assert broken.interval != whole.interval  # the same rates, another pairing


def test_recovered_fraction_needs_drift():
    reference, subject, repaired = three_models()
    nothing = recovered_fraction(reference=subject, subject=reference, repaired=repaired, seed=0)
    assert (nothing.value, nothing.interval, nothing.reason) == (None, None, "no drift to recover")
    faint = np.zeros(100)
    faint[:6], against = 1, np.zeros(100)
    against[6:10] = 1
    result = recovered_fraction(reference=against, subject=faint, repaired=against, seed=0)
    assert result.value == 1.0
    assert result.interval is None
    assert result.reason is not None


def test_recovered_fraction_resamples_whole_clusters():
    reference, subject, repaired = three_models()
    clusters = [f"k{i % 40}" for i in range(200)]
    result = recovered_fraction(
        reference=reference, subject=subject, repaired=repaired, seed=0, clusters=clusters
    )
    alone = recovered_fraction(reference=reference, subject=subject, repaired=repaired, seed=0)
    assert result.value == alone.value
    assert result.interval is not None
    assert result.interval.method == "cluster_bootstrap"
    assert result.interval != alone.interval
