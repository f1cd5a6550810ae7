"""Leading singular triples by random projection (Halko, Martinsson and Tropp, arXiv 0909.4061).

A few passes over the matrix with k + 10 columns, where the exact way (`spectrum`) forms and reduces
a Gram matrix. Good where the spectrum has a gap at k; where it is flat the subspace is blurred. The
random test matrix comes from the caller's keyed generator, so that results do not depend on order.

Shape suffixes: o is d_out, i is d_in, q the number of test directions, k of those kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from realign.subspace.spectrum import Triplets

OVERSAMPLES = 10
POWER_ITERATIONS = 4


def randomised_triplets(
    m_oi: Tensor,
    k: int,
    *,
    generator: np.random.Generator,
    oversamples: int = OVERSAMPLES,
    power: int = POWER_ITERATIONS,
) -> Triplets:
    """Return about the first k singular triples of M [d_out, d_in].

    Args:
        m_oi: the matrix.
        k: how many triples, at most min(d_out, d_in).
        generator: of the test matrix, drawn on the CPU.
        oversamples: directions beyond k that are followed, too.
        power: passes by M M^T, each with an orthonormalisation on both sides.
    """
    d_out, d_in = m_oi.shape
    k = min(k, d_out, d_in)
    q = min(k + oversamples, d_out, d_in)
    test_iq = torch.from_numpy(generator.standard_normal((d_in, q))).to(m_oi)
    basis_oq = _orthonormal(m_oi @ test_iq)
    for _ in range(power):
        basis_iq = _orthonormal(m_oi.T @ basis_oq)
        basis_oq = _orthonormal(m_oi @ basis_iq)
    small_qi = (basis_oq.T @ m_oi).to(torch.float64)
    u_qq, s_q, vh_qi = torch.linalg.svd(small_qi, full_matrices=False)
    return Triplets(
        u=basis_oq.to(torch.float64) @ u_qq[:, :k], s=s_q[:k].clone(), v=vh_qi[:k].T.contiguous()
    )


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, worked out in float64, in their dtype."""
    basis, _ = torch.linalg.qr(columns.to(torch.float64))
    return basis.to(columns)
