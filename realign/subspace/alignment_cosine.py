"""The filter C = V V^T / norm(V) of Safe LoRA, and how far it turns an update (arXiv 2405.16833).

With V = W_aligned - W_base and an update dW,

    c  = cos(C dW, dW) = norm(V^T dW)^2 / (norm(V V^T dW) norm(dW)),   0 <= c <= 1
    c0 = norm(V)^2 / (sqrt(d_out) norm(V V^T))     what an update unrelated to V gives, about

c is free of the scales of V and dW; C is not, and it is no projector: its eigenvalues are
S_i^2 / norm(S). For an update in factors dW = s B A everything follows from M = V (V^T B) and small
Gram matrices, so that no [d_out, d_in] product is formed.

Here: these quantities. Not here: what is selected by them (`repair/methods/cosine.py`).
Shape suffixes: o is d_out, i is d_in, r the rank of factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from realign.subspace.spectrum import decompose
from realign.subspace.vectors import inner, squared_norm


@dataclass(frozen=True, eq=False)
class AlignmentFilter:
    """V [d_out, d_in], not zero, with what its filter needs; computed when asked for."""

    v_oi: Tensor

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of V."""
        return math.sqrt(squared_norm(self.v_oi))

    @cached_property
    def largest_energy(self) -> float:
        """S_1^2, the largest eigenvalue of V V^T."""
        return float(decompose(self.v_oi, all_energies=False).leading(1)[0])

    @cached_property
    def chance(self) -> float:
        """c0 = sqrt(PR / d_out), PR the participation ratio of the spectrum S^2."""
        gram_norm = math.sqrt(squared_norm(self._gram))
        return self.norm**2 / (math.sqrt(self.v_oi.shape[0]) * gram_norm)

    def gain(self, projector: str) -> float:
        """Return the factor of V V^T: 1 / norm(V) for "paper", 1 / S_1^2 for "unit"."""
        assert projector in ("paper", "unit"), projector
        return 1.0 / (self.norm if projector == "paper" else self.largest_energy)

    def push(self, m: Tensor) -> Tensor:
        """Return V (V^T M) for M [d_out, columns], by way of the smallest intermediate."""
        m = m.to(self.v_oi)
        if self._by_rows and m.shape[1] >= self.v_oi.shape[0]:
            return self._gram @ m
        return self.v_oi @ (self.v_oi.T @ m)

    def cosine(self, update_oi: Tensor) -> float | None:
        """Return c of a whole update, None where it is zero."""
        update = update_oi.to(self.v_oi)
        own = squared_norm(update)
        if own == 0.0:
            return None
        if self._by_rows:
            pushed = self._gram @ update
            along = inner(update, pushed)
        else:
            seen_ii = self.v_oi.T @ update
            along = squared_norm(seen_ii)
            pushed = self.v_oi @ seen_ii
        return _quotient(along, squared_norm(pushed), own)

    def factored_cosine(self, up_or: Tensor, down_ri: Tensor) -> float | None:
        """Return c of dW = B A from its factors, None where the product is zero.

        Args:
            up_or: B.
            down_ri: A.
        """
        m_or = self.push(up_or).to(torch.float64)
        b_or, a_ri = up_or.to(m_or), down_ri.to(m_or)
        gram_rr = a_ri @ a_ri.T
        own = float(((b_or.T @ b_or) * gram_rr).sum())
        if own <= 0.0:
            return None
        along = float(((b_or.T @ m_or) * gram_rr).sum())
        return _quotient(along, float(((m_or.T @ m_or) * gram_rr).sum()), own)

    @property
    def _by_rows(self) -> bool:
        """Whether V V^T is the smaller of the two Gram matrices."""
        return self.v_oi.shape[0] <= self.v_oi.shape[1]

    @cached_property
    def _gram(self) -> Tensor:
        """V V^T or V^T V, whichever is smaller, in the dtype of V; their norms are the same."""
        v = self.v_oi
        return v @ v.T if self._by_rows else v.T @ v


def _quotient(along: float, pushed_sq: float, own_sq: float) -> float:
    """Return c within its bounds, which rounding may leave; 0 where V does not see the update."""
    if pushed_sq <= 0.0:
        return 0.0
    return min(max(along / math.sqrt(pushed_sq * own_sq), 0.0), 1.0)
