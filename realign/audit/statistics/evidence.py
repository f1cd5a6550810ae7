"""One comparison of one instrument, brought to a difference, an interval and a p-value.

Three kinds of data come in: independent binary pairs (McNemar, Tango), binary pairs whose items
share clusters, and continuous differences (both: sign-flip, bootstrap). What follows from the
evidence is decided in `verdicts`, after `multiplicity.holm` has seen all p-values of a family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from realign.audit.statistics.intervals import ALPHA, Interval
from realign.audit.statistics.paired import (
    PairedTable,
    clusters_repeat,
    mcnemar_one_sided,
    newcombe10,
    tango_interval,
)
from realign.audit.statistics.resampling import (
    Clusters,
    bootstrap_interval,
    cluster_codes,
    cluster_standard_error,
    sign_flip_p,
)

Treatment = Literal["excluded", "as_bad", "as_ok"]
TREATMENTS: tuple[Treatment, ...] = ("excluded", "as_bad", "as_ok")


@dataclass(frozen=True)
class Evidence:
    """What the data say about a difference, before any margin is put to it."""

    n: int
    """Items valid for both models."""
    diff: float | None
    """Mean of candidate minus comparator; positive is worse. None when n is 0."""
    ci: Interval | None
    """The interval that decides."""
    ci_secondary: Interval | None
    """Newcombe's, shown beside Tango's; None where `ci` is a bootstrap."""
    p: float
    """One-sided p-value for "the candidate is worse", not adjusted."""
    alpha: float
    table: PairedTable | None = None
    """Present for binary data, clustered or not."""
    n_clusters: int | None = None
    """Present where items share clusters."""
    standard_error: float | None = None
    """Of the mean difference, clustered where clusters repeat; None for independent pairs."""

    @property
    def independent_pairs(self) -> bool:
        """Whether Tango's interval and McNemar's test were used."""
        return self.table is not None and self.n_clusters is None

    @property
    def churn(self) -> float | None:
        """Share of flipped items; None for continuous data."""
        return None if self.table is None else self.table.churn


def weigh_table(table: PairedTable, *, alpha: float = ALPHA) -> Evidence:
    """Evidence from independent binary pairs: exact McNemar, Tango's interval, Newcombe's beside.

    The caller answers for independence; `weigh_pairs` checks it.
    """
    return Evidence(
        n=table.n,
        diff=table.diff,
        ci=tango_interval(table.b, table.c, table.n, alpha=alpha),
        ci_secondary=newcombe10(table, alpha=alpha),
        p=mcnemar_one_sided(table.b, table.c),
        alpha=alpha,
        table=table,
    )


def weigh_pairs(
    comparator: Sequence[bool],
    candidate: Sequence[bool],
    *,
    seed: int,
    clusters: Clusters | None = None,
    alpha: float = ALPHA,
) -> Evidence:
    """Evidence from per-item verdicts (True: bad) in the same item order.

    Where items share clusters the pairs are not independent, and the cluster bootstrap and the
    cluster sign-flip test take the place of Tango's interval and McNemar's test.
    """
    table = PairedTable.from_items(comparator, candidate)
    if not clusters_repeat(clusters):
        return weigh_table(table, alpha=alpha)
    differences = np.asarray(candidate, dtype=np.float64) - np.asarray(comparator, dtype=np.float64)
    return _weigh(differences, seed=seed, clusters=clusters, alpha=alpha, table=table)


def weigh_differences(
    differences: ArrayLike,
    *,
    seed: int,
    clusters: Clusters | None = None,
    alpha: float = ALPHA,
) -> Evidence:
    """Evidence from continuous per-item differences, candidate minus comparator [items].

    Several samples of one item are one unit: average them first.
    """
    return _weigh(
        np.asarray(differences, dtype=np.float64),
        seed=seed,
        clusters=clusters,
        alpha=alpha,
        table=None,
    )


def treat_invalid(
    comparator: Sequence[bool | None], candidate: Sequence[bool | None], *, treatment: Treatment
) -> tuple[list[int], list[bool], list[bool]]:
    """Settle invalid responses (None) alike for both models.

    Returns:
        The indices of the items kept, and both models' verdicts on them. `excluded` keeps items
        valid for both; `as_bad` and `as_ok` keep all.
    """
    indices: list[int] = []
    first: list[bool] = []
    second: list[bool] = []
    for i, (a, b) in enumerate(zip(comparator, candidate, strict=True)):
        if treatment == "excluded" and (a is None or b is None):
            continue
        filled = treatment == "as_bad"
        indices.append(i)
        first.append(filled if a is None else a)
        second.append(filled if b is None else b)
    return indices, first, second


def _weigh(
    differences: np.ndarray,
    *,
    seed: int,
    clusters: Clusters | None,
    alpha: float,
    table: PairedTable | None,
) -> Evidence:
    assert np.isfinite(differences).all(), "a difference is not finite: drop invalid items first"
    shared = clusters if clusters_repeat(clusters) else None
    n = len(differences)
    return Evidence(
        n=n,
        # Sorted, so that the last bits do not depend on the items' order.
        diff=float(np.sort(differences).mean()) if n else None,
        ci=bootstrap_interval(differences, seed=seed, clusters=shared, alpha=alpha),
        ci_secondary=None,
        p=sign_flip_p(differences, seed=seed, clusters=shared),
        alpha=alpha,
        table=table,
        n_clusters=None if shared is None else len(set(cluster_codes(shared).tolist())),
        standard_error=cluster_standard_error(differences, clusters=shared),
    )
