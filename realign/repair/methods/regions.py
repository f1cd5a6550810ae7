"""Safety regions of NLSR: which entries of a reference weight its answers to harm run through.

arXiv 2412.12497. A region is decided by the reference and its inputs alone, never by the fine-tune.
Here: the region of one matrix, and how alike two changes are inside one. Not here: which modules
are repaired (`nlsr`). Suffixes: o is d_out, i is d_in, r the rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from realign.repair.edit import LoraFactors
from realign.repair.methods.scatter import output_spectrum
from realign.subspace.masks import count_down, count_up, largest
from realign.subspace.vectors import inner, squared_norm

if TYPE_CHECKING:
    from realign.model.moments import Moments


def region_of(weight_oi: Tensor, moments: Moments, q: float, *, overwrite: bool) -> Tensor | None:
    """Return the entries that matter most for the outputs that the weight gives.

    W_hat = Q_r Q_r^T W, Q_r the top r output directions of W X, r = floor(q min(d_out, d_in)); the
    region are the count - ceil(q count) entries of largest |W_hat|, equal ones by column, then row.

    Args:
        weight_oi: W [d_out, d_in].
        moments: of its inputs X.
        q: share of the entries outside the region; also sets r.
        overwrite: give the memory of the moments away.

    Returns:
        A mask [d_out, d_in]; None where W has no outputs, and so no region.
    """
    numel = weight_oi.numel()
    count = numel - count_up(q, numel)
    if count == numel:
        return torch.ones_like(weight_oi, dtype=torch.bool)
    spectrum = output_spectrum(moments, weight_oi, "none", overwrite=overwrite)
    live = int(torch.count_nonzero(spectrum.energies))
    rank = min(count_down(q, min(weight_oi.shape)), live)
    if rank == 0:
        return None
    basis_or = spectrum.basis(rank)
    del spectrum
    w_oi = weight_oi.to(basis_or)
    return largest((basis_or @ (basis_or.T @ w_oi)).abs_(), count).to(weight_oi.device)


@dataclass(frozen=True, eq=False)
class AdapterRegions:
    """The regions of both factors of an adapter.

    Attributes:
        down: [r, d_in] of A.
        up: [d_out, r] of B.
    """

    down: Tensor
    up: Tensor


def adapter_regions(
    lora: LoraFactors, moments: Moments, q: float, *, overwrite: bool
) -> AdapterRegions | None:
    """Return the regions of A, fed by x, and of B, fed by A x; None where either has no outputs."""
    between = moments.through(lora.down.to(moments.s2.device))
    fed_by_a = type(moments)(moments.n, between.s1, between.s2, "input")
    up = region_of(lora.up, fed_by_a, q, overwrite=True)
    down = region_of(lora.down, moments, q, overwrite=overwrite)
    return None if down is None or up is None else AdapterRegions(down, up)


def cosine_inside(mask_oi: Tensor, one_oi: Tensor, two_oi: Tensor) -> float:
    """Return cos(M (.) one, M (.) two); 0 where either is zero there."""
    one, two = one_oi[mask_oi], two_oi[mask_oi]
    scale = (squared_norm(one) * squared_norm(two)) ** 0.5
    return inner(one, two) / scale if scale > 0.0 else 0.0


def cosine_of_products(one: LoraFactors, two: LoraFactors, regions: AdapterRegions) -> float:
    """Return the cosine of (M_B (.) B)(M_A (.) A) of two adapters; 0 where either is zero.

    The products are never formed: <B A, D C> = sum (B^T D) (.) (A C^T).
    """
    a, c = (each.down.double() * regions.down for each in (one, two))
    b, d = (each.up.double() * regions.up for each in (one, two))

    def product(up: Tensor, down: Tensor, up_too: Tensor, down_too: Tensor) -> float:
        return float(((up.T @ up_too) * (down @ down_too.T)).sum())

    scale = (max(product(b, a, b, a), 0.0) * max(product(d, c, d, c), 0.0)) ** 0.5
    return product(b, a, d, c) / scale if scale > 0.0 else 0.0
