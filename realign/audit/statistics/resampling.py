"""Continuous and clustered differences: bootstrap intervals, sign-flip test, recovered fraction.

Everything here is deterministic in its seed and independent of the order of the items: units are
sorted before any number is drawn, and every procedure starts its own generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realign.audit.statistics.intervals import ALPHA, Interval, critical_value, level_of
from realign.audit.statistics.paired import clusters_repeat

RESAMPLES = 10_000
EXACT_UNITS = 16  # 2^16 sign patterns are enumerated; beyond that they are drawn
SIGN_DRAWS = 100_000
_CHUNK = 2_000_000  # numbers drawn at a time: bounds memory at a few tens of MB

Clusters = Sequence[Hashable | None]


def comparison_seed(instrument_id: str, comparison: str, run_seed: int) -> int:
    """The PCG64 seed of one comparison, whatever else the run does and in which order.

    The first 8 bytes (big-endian) of SHA-256 over `instrument_id:comparison:run_seed`.
    """
    text = f"{instrument_id}:{comparison}:{run_seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator(seed: int) -> np.random.Generator:
    """A fresh PCG64 generator."""
    return np.random.Generator(np.random.PCG64(seed))


def percentile_limits(values: ArrayLike, *, alpha: float = ALPHA) -> tuple[float, float]:
    """Lower and upper limit by the inverse empirical distribution.

    The smallest value whose cumulative share is at least alpha, and at least 1 - alpha.
    """
    low, high = np.quantile(np.asarray(values), [alpha, 1.0 - alpha], method="inverted_cdf")
    return float(low), float(high)


def cluster_codes(clusters: Clusters) -> NDArray[np.int64]:
    """A number per item, equal where items share a cluster; None is a cluster of its own."""
    codes: dict[Hashable, int] = {}
    keys = [("alone", i) if name is None else ("named", name) for i, name in enumerate(clusters)]
    return np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int64)


def cluster_sums(
    values: ArrayLike, clusters: Clusters | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum [units, columns] and size [units] of every cluster; items alone when clusters is None.

    `values` is [items] or [items, columns]. Units come sorted, so the items' order does not matter.
    """
    items = np.asarray(values, dtype=np.float64)
    items = items[:, None] if items.ndim == 1 else items
    if clusters is None:
        sums, sizes = items, np.ones(len(items))
    else:
        assert len(clusters) == len(items), f"{len(clusters)} clusters for {len(items)} items"
        codes = cluster_codes(clusters)
        # Sorted before they are added: a float sum depends on its order in the last bits.
        order = np.lexsort((*items.T[::-1], codes))
        codes, items = codes[order], items[order]
        sums = np.stack([_grouped(codes, column) for column in items.T], axis=1)
        sizes = np.bincount(codes).astype(np.float64)
    order = np.lexsort((sizes, *sums.T[::-1]))
    return sums[order], sizes[order]


def resample(
    sums: NDArray[np.float64],
    sizes: NDArray[np.float64],
    *,
    seed: int,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    resamples: int = RESAMPLES,
) -> NDArray[np.float64]:
    """Resample whole units with replacement.

    `statistic` maps the column means [draws, columns] (sampled sums over sampled items) to [draws].
    """
    rng, units = generator(seed), len(sizes)
    step = max(1, _CHUNK // units)
    results: list[NDArray[np.float64]] = []
    for start in range(0, resamples, step):
        picked = rng.integers(0, units, size=(min(step, resamples - start), units))
        counts = sizes[picked].sum(axis=1)
        totals = np.stack([column[picked].sum(axis=1) for column in sums.T], axis=1)
        results.append(statistic(totals / counts[:, None]))
    return np.concatenate(results)


def bootstrap_interval(
    differences: ArrayLike,
    *,
    seed: int,
    clusters: Clusters | None = None,
    alpha: float = ALPHA,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Percentile bootstrap of the mean difference; whole clusters are resampled where they repeat.

    Args:
        differences: [items], candidate minus comparator, larger is worse.
        seed: see `comparison_seed`.
        clusters: one per item, or None.
        alpha: one-sided error.
        resamples: number of resamples.

    Returns:
        The interval, or None when there is no item.
    """
    critical_value(alpha)
    clustered = clusters_repeat(clusters)
    sums, sizes = cluster_sums(differences, clusters if clustered else None)
    if len(sizes) == 0:
        return None
    means = resample(sums, sizes, seed=seed, statistic=_first_column, resamples=resamples)
    low, high = percentile_limits(means, alpha=alpha)
    method = "cluster_bootstrap" if clustered else "bootstrap"
    return Interval(low=low, high=high, level=level_of(alpha), method=method)


def sign_flip_p(
    differences: ArrayLike,
    *,
    seed: int,
    clusters: Clusters | None = None,
    draws: int = SIGN_DRAWS,
) -> float:
    """One-sided sign-flip test: P(mean of s_i delta_i >= observed), signs independent.

    Signs are flipped per cluster where clusters repeat. Exact by enumeration when at most 16 units
    are non-zero, else (1 + hits)/(1 + draws).
    """
    sums, _ = cluster_sums(differences, clusters if clusters_repeat(clusters) else None)
    units = sums[:, 0][sums[:, 0] != 0.0]
    # A flipped pattern that equals the observed sum must count however it was rounded.
    threshold = units.sum() - 1e-12 * np.abs(units).sum()
    if len(units) <= EXACT_UNITS:
        totals = np.zeros(1)
        for unit in units:
            totals = np.concatenate([totals + unit, totals - unit])
        return float(np.mean(totals >= threshold))
    rng, hits = generator(seed), 0
    step = max(1, _CHUNK // len(units))
    for start in range(0, draws, step):
        kept = rng.integers(0, 2, size=(min(step, draws - start), len(units)), dtype=np.int8)
        hits += int(np.count_nonzero((2.0 * kept - 1.0) @ units >= threshold))
    return (1 + hits) / (1 + draws)


def cluster_standard_error(
    differences: ArrayLike, *, clusters: Clusters | None = None
) -> float | None:
    """Standard error of the mean difference, clustered (arXiv 2411.00640); None without items.

    sqrt(sum over clusters of (sum over its items of (delta_i - mean))^2) / n.
    """
    items = np.asarray(differences, dtype=np.float64)
    if len(items) == 0:
        return None
    mean = np.sort(items).mean()  # sorted: the same bytes in any order of the items
    sums, _ = cluster_sums(items - mean, clusters)
    return float(np.sqrt(np.sum(sums[:, 0] ** 2)) / len(items))


@dataclass(frozen=True)
class RecoveredFraction:
    """How much of the drift a repair took back: 1 is all of it, above 1 is safer than before."""

    value: float | None
    """1 - residual/drift, not clipped; None when there was no drift to take back."""
    interval: Interval | None
    reason: str | None
    """Why the value or the interval is missing."""
    n: int
    """Items valid for all three models."""


def recovered_fraction(
    *,
    reference: ArrayLike,
    subject: ArrayLike,
    repaired: ArrayLike,
    seed: int,
    clusters: Clusters | None = None,
    alpha: float = ALPHA,
    resamples: int = RESAMPLES,
) -> RecoveredFraction:
    """1 - d(residual)/d(drift) with a paired bootstrap interval; report it only after drift.

    All three arrays hold the metric of the same items, those valid for all three models. A resample
    in which there is no drift has no fraction: it counts against both limits, so that the interval
    can only be too wide, and a limit that it makes infinite is reported as missing.
    """
    critical_value(alpha)
    columns = [np.asarray(x, dtype=np.float64) for x in (reference, subject, repaired)]
    changes = np.stack([columns[1] - columns[0], columns[2] - columns[0]], axis=1)
    n = len(changes)
    sums, sizes = cluster_sums(changes, clusters if clusters_repeat(clusters) else None)
    drift, residual = sums.sum(axis=0).tolist() if n else (0.0, 0.0)
    if drift <= 0.0:
        return RecoveredFraction(value=None, interval=None, reason="no drift to recover", n=n)
    ratios = resample(sums, sizes, seed=seed, statistic=_recovered, resamples=resamples)
    undefined = np.isnan(ratios)
    low, _ = percentile_limits(np.where(undefined, -np.inf, ratios), alpha=alpha)
    _, high = percentile_limits(np.where(undefined, np.inf, ratios), alpha=alpha)
    bounded = bool(np.isfinite([low, high]).all())
    method = "cluster_bootstrap" if clusters_repeat(clusters) else "bootstrap"
    return RecoveredFraction(
        value=1.0 - residual / drift,
        interval=Interval(low=low, high=high, level=level_of(alpha), method=method)
        if bounded
        else None,
        reason=None if bounded else "the drift is too small for an interval of its share",
        n=n,
    )


def _grouped(codes: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.bincount(codes, weights=values), dtype=np.float64)


def _first_column(means: NDArray[np.float64]) -> NDArray[np.float64]:
    return means[:, 0]


def _recovered(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 - residual/drift per resample, NaN where the resample shows no drift."""
    drift, residual = means[:, 0], means[:, 1]
    drifted = drift > 0.0
    return np.where(drifted, 1.0 - residual / np.where(drifted, drift, 1.0), np.nan)
