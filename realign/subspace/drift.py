"""Weight-space drift: how a fine-tune moved against the direction of alignment.

A screening signal, not a safety verdict. With a = W_ref - W_base (alignment) and t = W_sub - W_ref
(task), everything here is a ratio of sums over entries. `DriftTerms` keeps the sums, so that the
value over many matrices is the ratio of the summed terms, that is the value of the one large
block-diagonal matrix, and never a mean of ratios. Norms are summed as squares and the root is taken
last.

Here: terms of one matrix, their sum, the metrics, tables per module and per layer. Not here: which
tensors are included, and what the numbers mean for a gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from realign.subspace.entropy import energy_rank, total_entropy
from realign.subspace.projector import basis_overlap, degenerate_cut
from realign.subspace.spectrum import decompose, numerical_rank
from realign.subspace.sums import Sums, ratio
from realign.subspace.vectors import difference, inner, squared_norm

DEFAULT_SIZE = 32
"""Largest default size of the safety subspace."""

DEFAULT_SHARE = 0.5
"""Share of the energy of a that the default subspace holds, where that takes fewer directions."""

PUBLISHED_SIZE = 100
"""Subspace size of the published LoX ratio (arXiv 2506.15606, code)."""

STORAGE_PRECISION = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Relative distance below which a difference of stored weights may be rounding."""


@dataclass(frozen=True)
class DriftTerms(Sums):
    """Numerators and denominators of one matrix, or their sums over several.

    P is the projector on the k leading left singular vectors of a. Terms that need a base are 0
    without one, and terms that need spectra are 0 without them; a ratio over 0 is None.

    Attributes:
        matrices: number of matrices.
        task: <t, t>.
        reference: <W_ref, W_ref>.
        alignment: <a, a>.
        cross: <t, a>.
        task_aligned: <t, t> of the matrices that have a base.
        projected_task: norm(P t)^2.
        chance: (k / d_out) <t, t>.
        projected_alignment: norm(P a)^2.
        projected_total: norm(P (a + t))^2.
        total: norm(a + t)^2.
        k: size of the safety subspace.
        cosines: sum of the squared principal cosines between the subspaces of a and of t.
        compared: number of principal angles behind `cosines`.
        expected_cosines: their expected sum for random subspaces, k^2 / d_out.
        published_alignment: norm(P a) / norm(a) at k = 100.
        published_total: norm(P (a + t)) / norm(a + t) at k = 100.
        published: number of matrices behind the two published ratios.
        task_spectral: <t, t> of the matrices whose spectrum was taken.
        top_energy: sigma_1(t)^2.
        entropy: H(t) <t, t>, the entropy weighted by energy.
        below_storage_precision: matrices whose t may be rounding of the stored weights.
    """

    matrices: int = 0
    task: float = 0.0
    reference: float = 0.0
    alignment: float = 0.0
    cross: float = 0.0
    task_aligned: float = 0.0
    projected_task: float = 0.0
    chance: float = 0.0
    projected_alignment: float = 0.0
    projected_total: float = 0.0
    total: float = 0.0
    k: int = 0
    cosines: float = 0.0
    compared: int = 0
    expected_cosines: float = 0.0
    published_alignment: float = 0.0
    published_total: float = 0.0
    published: int = 0
    task_spectral: float = 0.0
    top_energy: float = 0.0
    entropy: float = 0.0
    below_storage_precision: int = 0

    def metrics(self) -> DriftMetrics:
        """Return the ratios; None where the denominator is 0."""
        r_align = _root(ratio(self.projected_alignment, self.alignment))
        r_ft = _root(ratio(self.projected_total, self.total))
        published_align = ratio(self.published_alignment, self.published)
        published_ft = ratio(self.published_total, self.published)
        entropy = ratio(self.entropy, self.task_spectral)
        retained = ratio(self.cross, self.alignment)
        return DriftMetrics(
            matrices=self.matrices,
            relative_distance=_root(ratio(self.task, self.reference)),
            alignment_retained=None if retained is None else 1.0 + retained,
            cosine=ratio(self.cross, math.sqrt(self.task_aligned) * math.sqrt(self.alignment)),
            subspace_share=_root(ratio(self.projected_task, self.task_aligned)),
            subspace_energy=ratio(self.projected_task, self.task_aligned),
            excess=ratio(self.projected_task, self.chance),
            r_align=r_align,
            r_ft=r_ft,
            lox_ratio=_quotient(r_ft, r_align),
            lox_published=_quotient(published_ft, published_align),
            entropy=entropy,
            effective_rank=None if entropy is None else math.exp(entropy),
            stable_rank=ratio(self.task_spectral, self.top_energy),
            overlap=ratio(self.cosines, self.compared),
            overlap_chance=ratio(self.expected_cosines, self.compared),
            below_storage_precision=self.below_storage_precision,
        )


@dataclass(frozen=True)
class DriftMetrics:
    """The ratios of `DriftTerms`; None where they are undefined or were not computed.

    Attributes:
        matrices: number of matrices behind the values.
        relative_distance: norm(t) / norm(W_ref).
        alignment_retained: 1 + <t, a> / <a, a>; 1 kept, 0 undone, above 1 amplified.
        cosine: <t, a> / (norm(t) norm(a)).
        subspace_share: norm(P t) / norm(t).
        subspace_energy: its square.
        excess: the square over its chance level k / d_out.
        r_align: norm(P a) / norm(a).
        r_ft: norm(P (a + t)) / norm(a + t).
        lox_ratio: r_ft / r_align; below 1 safety energy is diluted; not bounded by 1.
        lox_published: the ratio of the plain means over matrices of r_ft and r_align at k = 100.
        entropy: of p_i = s_i^2 / sum s^2 of t, nats; over matrices weighted by energy.
        effective_rank: exp(entropy).
        stable_rank: sum s^2 / s_1^2 of t.
        overlap: mean squared cosine of the principal angles between the subspaces of a and t.
        overlap_chance: its value for random subspaces.
        below_storage_precision: number of matrices whose t may be rounding.
    """

    matrices: int
    relative_distance: float | None
    alignment_retained: float | None
    cosine: float | None
    subspace_share: float | None
    subspace_energy: float | None
    excess: float | None
    r_align: float | None
    r_ft: float | None
    lox_ratio: float | None
    lox_published: float | None
    entropy: float | None
    effective_rank: float | None
    stable_rank: float | None
    overlap: float | None
    overlap_chance: float | None
    below_storage_precision: int


@dataclass(frozen=True)
class MatrixDrift:
    """The drift of one matrix.

    Attributes:
        key: the slot's key.
        module: last module name.
        layer: index of the decoder block, None outside blocks.
        terms: its sums.
        cosines: of the principal angles, descending; None where not computed or meaningless.
    """

    key: str
    module: str
    layer: int | None
    terms: DriftTerms
    cosines: tuple[float, ...] | None = None


@dataclass(frozen=True)
class DriftTable:
    """Metrics of all matrices together, per module and per layer."""

    overall: DriftMetrics
    by_module: Mapping[str, DriftMetrics]
    by_layer: Mapping[int, DriftMetrics]


def subspace_size(energies: Tensor, *, total: float | None = None) -> int:
    """Return the default k: 32, or the fewest directions with half the energy of a if smaller.

    Args:
        energies: of a, descending; with the total, 32 are enough.
        total: the sum of all of them.
    """
    return min(DEFAULT_SIZE, energy_rank(energies, DEFAULT_SHARE, total=total))


def matrix_drift(
    *,
    key: str,
    module: str,
    layer: int | None,
    reference: Tensor,
    subject: Tensor,
    base: Tensor | None = None,
    k: int | None = None,
    spectra: bool = True,
) -> MatrixDrift:
    """Measure one matrix [d_out, d_in] in the dtype it has on disk.

    Args:
        key: the slot's key.
        module: last module name.
        layer: index of the decoder block.
        reference: W_ref, the aligned weight.
        subject: W_sub, the fine-tuned or repaired weight.
        base: W_base; without it only the metrics of t alone are there.
        k: size of the safety subspace; the default is `subspace_size`.
        spectra: whether to decompose t as well (entropy, ranks, principal angles).

    Raises:
        NonFiniteError: a tensor holds NaN or infinity.
        torch.linalg.LinAlgError: a decomposition does not converge.
    """
    t_oi = difference(subject, reference)
    terms = _distance_terms(t_oi, reference=reference, subject=subject)
    task_parts = decompose(t_oi) if spectra and terms.task > 0.0 else None
    if task_parts is not None:
        energies = task_parts.energies
        terms += DriftTerms(
            task_spectral=terms.task,
            top_energy=float(energies[0]),
            entropy=total_entropy(energies) * terms.task,
        )
    if base is None:
        return MatrixDrift(key, module, layer, terms)

    a_oi = difference(reference, base)
    alignment = squared_norm(a_oi)
    if alignment == 0.0:  # no subspace here, but its t counts in the sums over matrices
        terms += DriftTerms(task_aligned=terms.task, total=terms.task)
        return MatrixDrift(key, module, layer, terms)
    total_oi = a_oi + t_oi
    total = squared_norm(total_oi)
    parts = decompose(a_oi, all_energies=False)
    d_out = a_oi.shape[0]
    # One more than are used tells whether the cut is degenerate.
    align_r = parts.leading(max(PUBLISHED_SIZE, k or 0) + 1)
    available = numerical_rank(align_r)
    size = min(subspace_size(align_r, total=alignment) if k is None else k, available)
    reach = max(size, min(PUBLISHED_SIZE, available))
    u_or = parts.left(reach)
    task_r, total_r = _row_energies(u_or[:, :size], t_oi), _row_energies(u_or, total_oi)
    terms += DriftTerms(
        alignment=alignment,
        cross=inner(t_oi, a_oi),
        task_aligned=terms.task,
        projected_task=float(task_r.sum()),
        chance=size / d_out * terms.task,
        projected_alignment=float(align_r[:size].sum()),
        projected_total=float(total_r[:size].sum()),
        total=total,
        k=size,
        published_alignment=math.sqrt(float(align_r[:PUBLISHED_SIZE].sum()) / alignment),
        published_total=math.sqrt(float(total_r[:PUBLISHED_SIZE].sum()) / total) if total else 0.0,
        published=1,
    )
    cosines = None
    if task_parts is not None and numerical_rank(task_parts.energies) >= size:
        cut = degenerate_cut(align_r, size) or degenerate_cut(task_parts.energies, size)
        found = basis_overlap(u_or[:, :size], task_parts.left(size), degenerate=cut)
        terms += DriftTerms(
            cosines=found.overlap * size, compared=size, expected_cosines=size * found.chance
        )
        cosines = found.cosines
    return MatrixDrift(key, module, layer, terms, cosines)


def distance_terms(*, reference: Tensor, subject: Tensor) -> DriftTerms:
    """Return the terms of the relative distance alone, for any shape (norms, biases)."""
    t = difference(subject, reference)
    return _distance_terms(t, reference=reference, subject=subject)


def _distance_terms(t: Tensor, *, reference: Tensor, subject: Tensor) -> DriftTerms:
    task, size = squared_norm(t), squared_norm(reference)
    floor = max(STORAGE_PRECISION.get(x.dtype, 0.0) for x in (reference, subject))
    below = 0.0 < task < floor**2 * size
    return DriftTerms(matrices=1, task=task, reference=size, below_storage_precision=int(below))


def merge(terms: Iterable[DriftTerms]) -> DriftTerms:
    """Return the sum of the terms of several matrices."""
    return sum(terms, start=DriftTerms())


def drift_table(rows: Sequence[MatrixDrift]) -> DriftTable:
    """Return the metrics over all rows, per module and per layer (rows outside blocks excepted)."""
    modules = dict.fromkeys(row.module for row in rows)
    layers = sorted({row.layer for row in rows if row.layer is not None})
    return DriftTable(
        overall=merge(row.terms for row in rows).metrics(),
        by_module={
            name: merge(row.terms for row in rows if row.module == name).metrics()
            for name in modules
        },
        by_layer={
            index: merge(row.terms for row in rows if row.layer == index).metrics()
            for index in layers
        },
    )


def _row_energies(u_or: Tensor, m_oi: Tensor) -> Tensor:
    """Return norm(u_i^T M)^2 for every direction [r], float64."""
    return (u_or.to(m_oi).T @ m_oi).to(torch.float64).square().sum(dim=1)


def _quotient(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or denominator is None:
        return None
    return ratio(numerator, denominator)


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)
