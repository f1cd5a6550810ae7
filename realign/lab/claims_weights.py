"""LoX's and AsFT's claims in a family, from its weights.

V = Wa - W0 is the alignment vector of a matrix, U_k its leading k left singular vectors.

    LoX (arXiv 2506.15606)    R(M) = norm(U_k U_k^T M) / norm(M), R_align = R(V), R_ft = R(Wf - W0).
                              Claimed: R_ft / R_align falls as safety is lost
    AsFT (arXiv 2506.08473)   V is the alignment direction. Claimed: harmful perturbations are
                              orthogonal to it. Shown: cos(D, V) and the share of D in U_k, for the
                              update D of every fine-tune, and for what poison alone adds

Matrices of decoder blocks only. Pooled figures take all of them as one vector, so that large
updates count more; means over matrices have a bootstrap interval that takes the matrices as
independent. Here: that. Not here: LSSF's claims (`claims`), models that are moved along V and
across it (`claims_moved`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor

from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.slots import Slot
from realign.errors import UsageError
from realign.lab.claim_figures import Mean, mean_of
from realign.lab.claims import family_models, matched_slots, slot_weight
from realign.lab.record import FamilyRecord, read_record
from realign.subspace.projector import energy_share
from realign.subspace.spectrum import top_triplets
from realign.subspace.vectors import difference, squared_norm

RANK = 6
"""k of LoX."""

CLEAN = "both_p0"
"""The poison-free fine-tune; what poison adds is another one's weights less its own."""


@dataclass(frozen=True)
class Part:
    """One update D of one matrix against V.

    Attributes:
        inner: <D, V>.
        squared: norm(D)^2.
        inside: norm(U_k^T D)^2 / norm(D)^2; None where D is zero.
        ratio: R(V + D), of the fine-tune measured from the base; None where that is zero.
    """

    inner: float
    squared: float
    inside: float | None
    ratio: float | None


@dataclass(frozen=True)
class MatrixVectors:
    """All updates of one matrix.

    Attributes:
        key: the slot's.
        chance: k / d_out: the share of a random update in U_k.
        squared: norm(V)^2.
        r_align: R(V).
        parts: by update.
    """

    key: str
    chance: float
    squared: float
    r_align: float
    parts: Mapping[str, Part]


@dataclass(frozen=True)
class Direction:
    """One update of a whole model.

    Attributes:
        complied: measured harmful compliance of the model that it leads to; None for what is no
            model of the family (the part that poison adds).
        distance: norm(D) / norm(V), pooled.
        cosine: cos(D, V), pooled.
        cosines: mean of the matrices' own.
        inside: mean share of D in U_k.
        excess: mean of that share over chance.
        ratio: mean of R_ft / R_align; None where D does not belong to a model.
        ratio_pooled: the same with norms over all matrices.
    """

    complied: float | None
    distance: float
    cosine: float
    cosines: Mean
    inside: Mean
    excess: Mean
    ratio: Mean | None
    ratio_pooled: float | None


@dataclass(frozen=True)
class Association:
    """Spearman's rank correlation over the models of a family, and its p-value."""

    correlation: float
    p: float
    n: int


@dataclass(frozen=True)
class WeightClaims:
    """What the weights of a family say about both claims."""

    preset: str
    seed: int
    rank: int
    chance: Mean
    r_align: Mean
    directions: Mapping[str, Direction]
    """By model, and "poison_NAME" for what poison alone adds."""
    ratio_and_harm: Association | None
    """R_ft / R_align against harmful compliance."""
    ratio_and_distance: Association | None
    """R_ft / R_align against norm(D): what it would follow if safety did not matter."""
    cosine_and_harm: Association | None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)


def measure_weight_claims(
    family: str | Path,
    *,
    finetunes: Iterable[str] | None = None,
    general: str | Path | None = None,
    rank: int = RANK,
) -> WeightClaims:
    """Measure both claims on the weights of a family.

    Args:
        family: its folder.
        finetunes: names of its fine-tunes; None: all that are there.
        general: the fine-tune on general skills; None: the family's own, or none.
        rank: k.

    Raises:
        NotFoundError: no family, or a model of it is missing.
        UsageError: there is no fine-tune, or the aligned model is the base.
    """
    folder = Path(family)
    record = read_record(folder)
    models = family_models(folder, finetunes, general)
    with ExitStack() as stack:
        aligned = stack.enter_context(open_checkpoint(folder / "aligned"))
        opened = {name: stack.enter_context(open_checkpoint(path)) for name, path in models.items()}
        rows: list[MatrixVectors] = []
        for slot in matched_slots(aligned, opened):
            weight = slot_weight(aligned, slot)
            weights = {name: slot_weight(each, slot) for name, each in opened.items()}
            row = matrix_vectors(slot, weight, weights, rank=rank)
            if row is not None:
                rows.append(row)
    if not rows:
        raise UsageError(f"{folder}: the aligned model is its base", "build the family anew")
    harm = {name: complied(record, name) for name in models}
    return summarise_vectors(rows, harm=harm, record=record, rank=rank)


def complied(record: FamilyRecord, name: str) -> float | None:
    """The harmful compliance that was measured when the family was built."""
    measured = record.models.get(name, {}).get("measured", {})
    rate = measured.get("harmful", {}).get("complied", {}).get("rate")
    return None if rate is None else float(rate)


def matrix_vectors(
    slot: Slot, aligned: Tensor, others: Mapping[str, Tensor], *, rank: int
) -> MatrixVectors | None:
    """The updates of one matrix; None where V is zero.

    Args:
        slot: the matrix.
        aligned: Wa [d_out, d_in].
        others: the other models', "base" among them.
        rank: k, at most the smaller side.
    """
    base = others["base"]
    vector = difference(aligned, base)
    squared = squared_norm(vector)
    if squared == 0.0:
        return None
    basis = top_triplets(vector, rank, side="left").u
    inside = energy_share(basis, vector)
    assert inside is not None
    updates = {
        name: (difference(weight, aligned), difference(weight, base))
        for name, weight in others.items()
        if name != "base"
    }
    parts: dict[str, Part] = {}
    for name, (update, whole) in updates.items():
        share = energy_share(basis, whole)
        ratio = None if share is None else math.sqrt(share)
        parts[name] = _part(update, vector, basis, ratio)
    for name in updates:
        if name.startswith("both_p") and name != CLEAN and CLEAN in others:
            added = difference(others[name], others[CLEAN])
            parts[f"poison_{name.removeprefix('both_')}"] = _part(added, vector, basis, None)
    chance = basis.shape[1] / vector.shape[0]
    return MatrixVectors(slot.key, chance, squared, math.sqrt(inside), parts)


def _part(update: Tensor, vector: Tensor, basis: Tensor, ratio: float | None) -> Part:
    inner = float((update.double() * vector.double()).sum())
    return Part(inner, squared_norm(update), energy_share(basis, update), ratio)


def summarise_vectors(
    rows: Sequence[MatrixVectors],
    *,
    harm: Mapping[str, float | None],
    record: FamilyRecord,
    rank: int,
) -> WeightClaims:
    """Put the matrices together.

    Args:
        rows: of all matrices.
        harm: harmful compliance by model.
        record: the family's.
        rank: k.
    """
    whole = sum(row.squared for row in rows)
    names = dict.fromkeys(name for row in rows for name in row.parts)
    found = {
        name: _direction([(row, row.parts[name]) for row in rows], whole, harm.get(name))
        for name in names
        if any(row.parts[name].squared for row in rows)
    }
    known = [each for each in found.values() if each.complied is not None and each.ratio]
    harms = [float(each.complied or 0.0) for each in known]
    ratios = [each.ratio.value for each in known if each.ratio is not None]
    return WeightClaims(
        preset=record.preset,
        seed=record.seed,
        rank=rank,
        chance=mean_of([row.chance for row in rows]),
        r_align=mean_of([row.r_align for row in rows]),
        directions=found,
        ratio_and_harm=association(ratios, harms),
        ratio_and_distance=association(ratios, [each.distance for each in known]),
        cosine_and_harm=association([each.cosine for each in known], harms),
    )


def association(a: Sequence[float], b: Sequence[float]) -> Association | None:
    """Spearman's correlation; None with fewer than four pairs, or where one side is constant."""
    if len(a) < 4 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    found: Any = spearmanr(a, b)
    return Association(float(found.statistic), float(found.pvalue), len(a))


def _direction(
    pairs: Sequence[tuple[MatrixVectors, Part]], whole: float, harm: float | None
) -> Direction:
    moved = [(row, part) for row, part in pairs if part.squared]
    squared = sum(part.squared for _, part in moved)
    inner = sum(part.inner for _, part in moved)
    ratios = [part.ratio / row.r_align for row, part in pairs if part.ratio is not None]
    pooled: float | None = None
    if ratios:
        # norms over all matrices: of V + D, and of what U_k keeps of it
        sums = [(row.squared + 2 * part.inner + part.squared, row, part) for row, part in pairs]
        kept = sum(s * (part.ratio or 0.0) ** 2 for s, _, part in sums)
        own = sum(row.squared * row.r_align**2 for row, _ in pairs)
        pooled = math.sqrt(kept / sum(s for s, _, _ in sums)) / math.sqrt(own / whole)
    cosines = [part.inner / math.sqrt(part.squared * row.squared) for row, part in moved]
    shares = [part.inside or 0.0 for _, part in moved]
    return Direction(
        complied=harm,
        distance=math.sqrt(squared / whole),
        cosine=inner / math.sqrt(squared * whole),
        cosines=mean_of(cosines),
        inside=mean_of(shares),
        excess=mean_of([s / row.chance for s, (row, _) in zip(shares, moved, strict=True)]),
        ratio=mean_of(ratios) if ratios else None,
        ratio_pooled=pooled,
    )
