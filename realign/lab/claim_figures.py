"""The figures of LSSF's two claims: per matrix, and as means over matrices with intervals.

Where they come from, and what the claims are, is in `claims`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from realign.audit.statistics.resampling import bootstrap_interval
from realign.repair.methods.scatter import OutputSpectrum
from realign.subspace.projector import Isolation, Overlap, basis_overlap, degenerate_cut
from realign.subspace.spectrum import numerical_rank

GENERAL = "general"
"""The variant that is trained on general skills alone; its delta is delta_gen."""

TAIL = 0.025
"""Error on each side of an interval: 95 % intervals."""


@dataclass(frozen=True)
class Mean:
    """A mean over n matrices with its bootstrap interval, which takes them as independent."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class MatrixClaims:
    """Both claims on one matrix.

    Attributes:
        key: the slot's.
        module: as "q_proj".
        layer: of the decoder.
        d_out: rows.
        rank: r, chosen on the aligned model.
        tokens: counted positions.
        same_text: by model; None where a basis has fewer than r directions.
        other_half: the same with disjoint texts; "aligned" is the noise ceiling.
        isolation: by delta: "general", "safe_unaligned", "safe_base", "task_NAME".
    """

    key: str
    module: str
    layer: int | None
    d_out: int
    rank: int
    tokens: int
    same_text: Mapping[str, Overlap | None]
    other_half: Mapping[str, Overlap | None]
    isolation: Mapping[str, Isolation]


@dataclass(frozen=True)
class Summary:
    """Means over matrices, by model or by delta; a name without any value is left out."""

    chance: Mean
    """r / d_out: the overlap of random spaces, the share of a delta that ignores the basis."""
    same_text: Mapping[str, Mean]
    other_half: Mapping[str, Mean]
    share: Mapping[str, Mean]
    excess: Mapping[str, Mean]
    over_general: Mapping[str, Mean]
    """Excess divided by that of "general", matrix by matrix; 1: no more in the subspace than it."""


@dataclass(frozen=True)
class Claims:
    """What a family says about both claims."""

    preset: str
    seed: int
    anchors_asked: int
    anchors_refused: int
    settings: Mapping[str, Any]
    """LSSF's parameters, its defaults."""
    whole: Summary
    layers: Mapping[str, Summary]
    matrices: tuple[MatrixClaims, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return {"schema": "realign/lab-claims/1", **asdict(self)}


def compare(a: OutputSpectrum, b: OutputSpectrum, r: int) -> Overlap | None:
    """Overlap of the leading r directions of both; None where one has fewer than r."""
    if r == 0 or min(numerical_rank(each.energies) for each in (a, b)) < r:
        return None
    blurred = degenerate_cut(a.energies, r) or degenerate_cut(b.energies, r)
    return basis_overlap(a.basis(r), b.basis(r), degenerate=blurred)


def summarise(rows: Sequence[MatrixClaims]) -> Summary:
    """Means over matrices with their intervals."""

    def means(value_of: Callable[[MatrixClaims], Mapping[str, float | None]]) -> dict[str, Mean]:
        found: dict[str, list[float]] = {}
        for row in rows:
            for name, value in value_of(row).items():
                if value is not None:
                    found.setdefault(name, []).append(value)
        return {name: mean_of(values) for name, values in found.items()}

    def overlaps(of: Mapping[str, Overlap | None]) -> dict[str, float | None]:
        return {name: None if each is None else each.overlap for name, each in of.items()}

    return Summary(
        chance=mean_of([row.rank / row.d_out for row in rows]),
        same_text=means(lambda row: overlaps(row.same_text)),
        other_half=means(lambda row: overlaps(row.other_half)),
        share=means(lambda row: {name: each.share for name, each in row.isolation.items()}),
        excess=means(lambda row: {name: each.excess for name, each in row.isolation.items()}),
        over_general=means(_over_general),
    )


def mean_of(values: Sequence[float]) -> Mean:
    """Mean of at least one value with its 95 % bootstrap interval."""
    interval = bootstrap_interval(values, seed=0, alpha=TAIL)
    assert interval is not None, "a mean of nothing"
    return Mean(sum(values) / len(values), interval.low, interval.high, len(values))


def _over_general(row: MatrixClaims) -> dict[str, float | None]:
    general = row.isolation.get(GENERAL)
    if general is None or not general.excess:
        return {}
    return {
        name: None if each.excess is None else each.excess / general.excess
        for name, each in row.isolation.items()
        if name != GENERAL
    }
