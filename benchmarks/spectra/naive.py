"""What a research script would do: whole activations, full singular value decompositions, float32.

Written as such scripts usually are, without mistakes and without tricks. Projectors are formed, as
the equations have them; nothing is reused between matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.spectra.synthetic import Weights


def lssf(outputs: Tensor, weights: Weights, *, eta: float) -> tuple[Tensor, int]:
    """LSSF (arXiv 2602.00038) on one layer from its recorded outputs [tokens, d_out]."""
    z = (outputs - outputs.mean(dim=0)) / outputs.std(dim=0, correction=0)
    u, s, _ = torch.linalg.svd(z.T, full_matrices=False)
    rank = entropy_rank(s, eta)
    projector = u[:, :rank] @ u[:, :rank].T
    safety = weights.aligned.float() - weights.unaligned.float()
    edited = weights.finetuned.float() + projector @ safety
    return edited.to(weights.finetuned.dtype), rank


def entropy_rank(s: Tensor, eta: float) -> int:
    """Smallest rank whose entropy exceeds the share eta of the whole."""
    p = s.square() / s.square().sum()
    terms = -torch.special.xlogy(p, p)
    cumulative = terms.cumsum(0) / terms.sum()
    return int((cumulative <= eta).sum()) + 1


def drift(base: Tensor, reference: Tensor, subject: Tensor, *, k: int) -> dict[str, float]:
    """The weight drift of one matrix from the full decompositions of both differences."""
    a = reference.float() - base.float()
    t = subject.float() - reference.float()
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    ut, st, _ = torch.linalg.svd(t, full_matrices=False)
    size = min(k, int((s.square().cumsum(0) < 0.5 * s.square().sum()).sum()) + 1)
    p = st.square() / st.square().sum()
    entropy = float(-torch.special.xlogy(p, p).sum())
    kept = u[:, :size]
    cosines = torch.linalg.svdvals(kept.T @ ut[:, :size])
    return {
        "relative_distance": float(t.norm() / reference.float().norm()),
        "alignment_retained": float(1 + (t * a).sum() / a.square().sum()),
        "subspace_share": float((kept.T @ t).norm() / t.norm()),
        "r_align": float((kept.T @ a).norm() / a.norm()),
        "r_ft": float((kept.T @ (a + t)).norm() / (a + t).norm()),
        "entropy": entropy,
        "stable_rank": float(st.square().sum() / st[0] ** 2),
        "overlap": float(cosines.square().mean()),
    }
