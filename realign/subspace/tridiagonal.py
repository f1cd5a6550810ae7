"""Eigenvectors of a tridiagonal matrix T, also where many of its eigenvalues are equal.

Weights that moved by single units in the last place, or a projector, have singular values of which
hundreds are the same. The fast routine (multiple relatively robust representations) makes each
vector on its own: there it may give up, or make vectors that are not orthogonal. Divide and conquer
does neither, but makes all n of them. So the fast one goes first, and what it makes is checked.

Here: that choice. Not here: the routines (`lapack`), what the vectors are for (`eigen`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from realign.subspace.lapack import all_vectors, leading_vectors

TRUSTED = 1e-10
"""How far vectors may be from orthonormal, and T z from its multiple of z, against T."""

PROBES = 4


def tridiagonal_vectors(diagonal: Tensor, beside: Tensor, k: int) -> Tensor:
    """Return the eigenvectors of the k smallest eigenvalues of T, ascending, as rows [k, n].

    Args:
        diagonal: of T [n], float64.
        beside: the one beside it [n]; its last entry is not used.
        k: how many, at least 1.

    Raises:
        torch.linalg.LinAlgError: no routine converges.
    """
    found = trusted_vectors(diagonal, beside, k)
    if found is not None:
        return found[1]
    return all_vectors(diagonal, beside)[:k].clone()


def trusted_vectors(diagonal: Tensor, beside: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Return the k smallest eigenvalues too [k], by the fast routine; None where it fails.

    The arguments are those of `tridiagonal_vectors`.
    """
    found = leading_vectors(diagonal, beside, k)
    if found is not None and are_eigenvectors(found[1], found[0], diagonal, beside):
        return found
    return None


def are_eigenvectors(rows_kn: Tensor, values: Tensor, diagonal: Tensor, beside: Tensor) -> bool:
    """Tell whether rows Z are orthonormal eigenvectors of T, in O(n k) instead of O(n k^2).

    Random signs x are sent through Z Z^T x = x and T Z^T x = Z^T diag(values) x. A single pair that
    is not orthogonal shows whatever the signs, and more of them hardly cancel in all probes.
    """
    generator = torch.Generator().manual_seed(0)
    signs_kp = torch.randint(2, (rows_kn.shape[0], PROBES), generator=generator) * 2.0 - 1.0
    signs_kp = signs_kp.to(torch.float64)
    image_np = rows_kn.T @ signs_kp
    if not float((rows_kn @ image_np - signs_kp).abs().max()) <= TRUSTED:  # nor is NaN
        return False
    residual_np = diagonal[:, None] * image_np - rows_kn.T @ (values[:, None] * signs_kp)
    residual_np[:-1] += beside[:-1, None] * image_np[1:]
    residual_np[1:] += beside[:-1, None] * image_np[:-1]
    scale = float((diagonal.abs() + 2.0 * beside.abs()).max())
    return float(residual_np.abs().max()) <= TRUSTED * scale
