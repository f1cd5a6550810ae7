"""McNemar, Tango and Newcombe: printed values, identities, likelihood and enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest

from realign.audit.statistics.intervals import critical_value, wilson
from realign.audit.statistics.paired import (
    PairedTable,
    clusters_repeat,
    mcnemar_one_sided,
    newcombe10,
    newcombe_phi,
    tango_interval,
    tango_q,
    tango_statistic,
    tango_upper,
    tango_within,
)
from realign.errors import UsageError

Z = critical_value(0.025)

MCNEMAR = [
    (0, 0, 1, 0.5),
    (4, 1, 0.18750000, 0.10937500),
    (6, 0, 0.01562500, 0.00781250),
    (8, 1, 0.01953125, 0.01074219),
    (9, 2, 0.03271484, 0.01928711),
    (14, 3, 0.00636292, 0.00376892),
    (18, 6, 0.01132792, 0.00731665),
    (3, 7, 0.94531250, 0.88671875),
]

# e, b, c, d; n; D; q(0.03); T(0.03); 95 %; 90 %
TANGO = [
    ((36, 12, 2, 0), 50, 0.2, 0.117935, 2.335262, (0.061112, 0.344709), (0.085474, 0.320413)),
    ((12, 14, 3, 171), 200, 0.055, 0.022869, 1.292397, (0.016511, 0.101306), (0.023052, 0.092828)),
    (
        (12, 2, 3, 183),
        200,
        -0.005,
        0.008402,
        -2.310256,
        (-0.034476, 0.022574),
        (-0.028253, 0.016686),
    ),
    ((0, 6, 0, 194), 200, 0.03, 0, 0, (0.010589, 0.063894), (0.015591, 0.056955)),
    ((0, 3, 0, 197), 200, 0.015, 0, -1.243540, (-0.004128, 0.043166), (0.001453, 0.036937)),
    ((0, 0, 0, 80), 80, 0, 0, -1.572968, (-0.045818, 0.045818), (-0.032713, 0.032713)),
    ((0, 0, 0, 200), 200, 0, 0, -2.487080, (-0.018845, 0.018845), (-0.013347, 0.013347)),
    (
        (0, 0, 3, 197),
        200,
        -0.015,
        0.007275,
        -3.046038,
        (-0.043166, 0.004128),
        (-0.036937, -0.001453),
    ),
    ((5, 4, 4, 387), 400, 0, 0.005668, -2.983750, (-0.016701, 0.016701), (-0.013364, 0.013364)),
    (
        (20, 2, 3, 225),
        250,
        -0.004,
        0.006559,
        -2.616364,
        (-0.027690, 0.018124),
        (-0.022667, 0.013382),
    ),
    (
        (6, 3, 2, 939),
        950,
        0.001053,
        0.001077,
        -5.046753,
        (-0.004821, 0.007373),
        (-0.003548, 0.006016),
    ),
    (
        (50, 30, 12, 1908),
        2000,
        0.009,
        0.003773,
        -4.905925,
        (0.002779, 0.015936),
        (0.003796, 0.014719),
    ),
]

# e, b, c, d; phi; 95 %; 90 %
NEWCOMBE = [
    ((36, 12, 2, 0), -0.114708, (0.056930, 0.340428), (0.081665, 0.317123)),
    ((12, 14, 3, 171), 0.539064, (0.014041, 0.100199), (0.020920, 0.092178)),
    ((12, 2, 3, 183), 0.777489, (-0.034222, 0.023195), None),
    ((0, 6, 0, 194), 0, (0.005162, 0.063894), (0.010359, 0.056955)),
    ((0, 3, 0, 197), 0, (-0.006281, 0.043166), (-0.001092, 0.036937)),
    ((0, 0, 0, 200), 0, (-0.018845, 0.018845), (-0.013347, 0.013347)),
    ((5, 4, 4, 387), 0.488491, (-0.017221, 0.017221), (-0.013868, 0.013868)),
    ((6, 3, 2, 939), 0.645021, (-0.005188, 0.007625), (-0.003890, 0.006247)),
    ((50, 30, 12, 1908), 0.692220, (0.002570, 0.015863), None),
]


def random_tables(count: int, seed: int) -> list[PairedTable]:
    """Tables of 1 to 1000 items, flips rare in half of them, ends included now and then."""
    rng = np.random.default_rng(seed)
    tables: list[PairedTable] = []
    for i in range(count):
        n = int(rng.integers(1, 1001))
        weights = rng.dirichlet([1, 0.1, 0.1, 3] if i % 2 else [1, 1, 1, 1])
        e, b, c, d = rng.multinomial(n, weights).tolist()
        tables.append(PairedTable(e, b, c, d))
    return tables


def columns(tables: list[PairedTable]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.array([getattr(t, name) for t in tables]) for name in ("b", "c", "n"))


def both(interval) -> tuple[float, float]:
    assert interval is not None
    return interval.low, interval.high


def test_table_counts_items_by_who_is_bad():
    comparator = [True, True, False, False, False, True]
    candidate = [True, False, True, True, False, True]
    table = PairedTable.from_items(comparator, candidate)
    assert table == PairedTable(e=2, b=2, c=1, d=1)
    assert (table.n, table.diff, table.churn) == (6, 1 / 6, 3 / 6)
    assert (table.comparator_rate, table.candidate_rate) == (3 / 6, 4 / 6)


def test_an_empty_table_has_no_rates_and_no_intervals():
    table = PairedTable(0, 0, 0, 0)
    assert table.diff is None
    assert table.churn is None
    assert tango_interval(0, 0, 0) is None
    assert newcombe10(table) is None


@pytest.mark.parametrize(("b", "c", "p", "mid"), MCNEMAR)
def test_mcnemar_printed_values(b, c, p, mid):
    assert mcnemar_one_sided(b, c) == pytest.approx(p, abs=1e-8)
    assert mcnemar_one_sided(b, c, mid_p=True) == pytest.approx(mid, abs=1e-8)


@pytest.mark.parametrize(
    ("alpha", "smallest"),
    [(0.025, [6, 8, 10, 12, 15, 20, 23]), (0.025 / 3, [7, 10, 12, 14, 18, 22, 26])],
)
def test_smallest_rejecting_count(alpha, smallest):
    found = [
        next(b for b in range(60) if mcnemar_one_sided(b, c) <= alpha)
        for c in (0, 1, 2, 3, 5, 8, 10)
    ]
    assert found == smallest


def test_mcnemar_agrees_with_scipy_on_random_tables():
    for table in random_tables(1000, seed=3):
        if table.b + table.c:
            theirs = binomtest(table.b, table.b + table.c, 0.5, alternative="greater").pvalue
            assert mcnemar_one_sided(table.b, table.c) == pytest.approx(theirs, abs=1e-9)


def test_mcnemar_refuses_items_that_share_clusters():
    with pytest.raises(UsageError, match="share clusters"):
        mcnemar_one_sided(4, 1, clusters=["a", "a", "b", "c", "d"])
    assert mcnemar_one_sided(4, 1, clusters=["a", "b", None, None, "d"]) == 0.1875


def test_unnamed_clusters_stand_alone():
    assert not clusters_repeat(None)
    assert not clusters_repeat([None, None, "a"])
    assert clusters_repeat([None, "a", "a"])


@pytest.mark.parametrize(("counts", "n", "diff", "q", "statistic", "wide", "narrow"), TANGO)
def test_tango_printed_values(counts, n, diff, q, statistic, wide, narrow):
    table = PairedTable(*counts)
    b, c = table.b, table.c
    assert table.n == n
    assert table.diff == pytest.approx(diff, abs=1e-6)
    assert tango_q(b, c, n, 0.03).item() == pytest.approx(q, abs=1e-6)
    assert tango_statistic(b, c, n, 0.03).item() == pytest.approx(statistic, abs=1e-6)
    assert both(tango_interval(b, c, n)) == pytest.approx(wide, abs=1e-6)
    assert both(tango_interval(b, c, n, alpha=0.05)) == pytest.approx(narrow, abs=1e-6)


def test_constrained_estimate_maximises_the_likelihood():
    rng = np.random.default_rng(5)
    for table in random_tables(200, seed=4):
        b, c, n = table.b, table.c, table.n
        h = float(rng.uniform(-0.95, 0.95))
        low, high = max(0.0, -h), (1.0 - h) / 2.0

        def loss(q, b=b, c=c, n=n, h=h):
            # counts of zero contribute nothing, also where their probability is zero
            terms = [(c, q), (b, q + h), (n - b - c, 1.0 - 2.0 * q - h)]
            return -sum(k * np.log(max(p, 1e-300)) for k, p in terms if k)

        numeric = minimize_scalar(
            loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
        )
        ours = tango_q(b, c, n, h).item()
        assert low <= ours <= high
        assert loss(ours) <= loss(numeric.x) + 1e-9 * (1.0 + abs(loss(ours)))
        assert ours == pytest.approx(numeric.x, abs=1e-5)


def test_statistic_is_z_at_both_limits():
    b, c, n = columns(random_tables(1000, seed=6))
    low, high = -tango_upper(c, b, n), tango_upper(b, c, n)
    below, above = c < n, b < n
    assert tango_statistic(b, c, n, high)[above] == pytest.approx(-Z, abs=1e-9)
    assert tango_statistic(b, c, n, low)[below] == pytest.approx(Z, abs=1e-9)
    assert np.all(high[~above] == 1.0)
    assert np.all(low[~below] == -1.0)


def test_statistic_decreases_strictly():
    h = np.linspace(-0.999, 0.999, 401)
    for table in random_tables(200, seed=7):
        values = tango_statistic(table.b, table.c, table.n, h)
        assert np.all(np.diff(values) < 0.0)


def test_swapping_the_models_mirrors_the_interval():
    for table in random_tables(50, seed=8):
        low, high = both(tango_interval(table.b, table.c, table.n))
        assert both(tango_interval(table.c, table.b, table.n)) == (-high, -low)


@pytest.mark.parametrize("n", [1, 5, 80, 200, 950])
@pytest.mark.parametrize("alpha", [0.025, 0.05])
def test_zero_flips_give_wilsons_limit_for_zero(n, alpha):
    z = critical_value(alpha)
    low, high = both(tango_interval(0, 0, n, alpha=alpha))
    assert high == pytest.approx(z * z / (n + z * z), abs=1e-12)
    assert low == -high
    assert high == pytest.approx(both(wilson(0, n, alpha=alpha))[1], abs=1e-12)


@pytest.mark.parametrize(("flips", "n"), [(1, 20), (3, 200), (6, 200), (50, 313), (19, 20)])
def test_one_sided_flips_give_wilsons_upper_limit(flips, n):
    upper = both(wilson(flips, n))[1]
    assert both(tango_interval(flips, 0, n))[1] == pytest.approx(upper, abs=1e-12)
    assert both(tango_interval(0, flips, n))[0] == pytest.approx(-upper, abs=1e-12)


@pytest.mark.parametrize("n", [1, 7, 200, 2000])
def test_limits_are_exact_when_everything_flips(n):
    low, high = both(tango_interval(n, 0, n))
    assert high == 1.0
    assert low == pytest.approx((n - Z * Z) / (n + Z * Z), abs=1e-9)
    assert both(tango_interval(0, n, n))[0] == -1.0
    if n == 200:
        assert low == pytest.approx(0.962309, abs=1e-6)


def test_the_decision_needs_no_root():
    b, c, n = columns(random_tables(1000, seed=10))
    high = tango_upper(b, c, n)
    drawn = np.random.default_rng(9).uniform(0.001, 0.5, size=len(b))
    for margin in (0.01, 0.02, 0.03, 0.05, drawn, np.minimum(high, 0.999)):
        decided = tango_within(b, c, n, margin=margin)
        assert np.array_equal(decided, high <= margin)
    assert 0 < np.count_nonzero(high <= 0.03) < len(b)


def test_another_solver_agrees():
    for table in random_tables(100, seed=12):
        b, c, n = table.b, table.c, table.n
        if 0 < b < n:
            root = brentq(
                lambda h, b=b, c=c, n=n: tango_statistic(b, c, n, h).item() + Z,
                (b - c) / n,
                1.0 - 1e-12,
                xtol=1e-14,
                rtol=1e-14,
            )
            assert both(tango_interval(b, c, n))[1] == pytest.approx(root, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "b_rate", "c_rate", "tango_percent"),
    [(200, 0.05, 0.01, 94.8), (320, 0.02, 0.02, 95.5), (100, 0.10, 0.02, 94.7)],
)
def test_exact_coverage_of_tango(n, b_rate, c_rate, tango_percent):
    b, c = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    probability = binom.pmf(c, n, c_rate) * binom.pmf(b, n - c, b_rate / (1 - c_rate))
    likely = (b + c <= n) & (probability > 1e-12)
    b, c, probability = b[likely], c[likely], probability[likely]
    high, low = tango_upper(b, c, n), -tango_upper(c, b, n)
    true = b_rate - c_rate
    covered = float(np.sum(probability[(low <= true) & (true <= high)]))
    assert 100 * covered == pytest.approx(tango_percent, abs=0.06)


@pytest.mark.parametrize(("counts", "phi", "wide", "narrow"), NEWCOMBE)
def test_newcombe_printed_values(counts, phi, wide, narrow):
    table = PairedTable(*counts)
    assert newcombe_phi(table) == pytest.approx(phi, abs=1e-6)
    assert both(newcombe10(table)) == pytest.approx(wide, abs=1e-6)
    if narrow is not None:
        assert both(newcombe10(table, alpha=0.05)) == pytest.approx(narrow, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "b_rate", "c_rate", "percent"),
    [(200, 0.05, 0.01, 96.7), (320, 0.02, 0.02, 96.5), (100, 0.10, 0.02, 96.2)],
)
def test_simulated_coverage_of_newcombe(n, b_rate, c_rate, percent):
    draws = 3000
    rng = np.random.default_rng(20)
    rest = 1.0 - b_rate - c_rate
    tables = rng.multinomial(n, [0.1 * rest, b_rate, c_rate, 0.9 * rest], size=draws)
    true, covered = b_rate - c_rate, 0
    for counts in tables.tolist():
        low, high = both(newcombe10(PairedTable(*counts)))
        covered += low <= true <= high
    assert 94.5 <= 100 * covered / draws <= 98.0
    assert 100 * covered / draws == pytest.approx(percent, abs=1.2)


def test_intervals_stay_in_range_and_hold_the_estimate():
    for table in random_tables(150, seed=13):
        assert table.diff is not None
        for low, high in (
            both(tango_interval(table.b, table.c, table.n)),
            both(newcombe10(table)),
        ):
            assert -1.0 <= low <= table.diff + 1e-12
            assert table.diff - 1e-12 <= high <= 1.0
