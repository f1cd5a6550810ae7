"""The spectrum of a layer's standardised outputs, from moments alone: the first half of LSSF.

    C = Z~ Z~^T  [d_out, d_out],  Z = W X the outputs on the anchors, Z~ standardised

    none     C = sum z z^T, uncentred
    neuron   C = the correlation matrix of the outputs; rows and columns of dead neurons are 0
    token    C = sum z~_t z~_t^T with every token's outputs standardised; accumulated by the hooks,
             since it is no function of the moments

Output moments give C directly. Input moments (x, shared by q, k, v and by gate, up) give it as
W Cov W^T; where d_out > d_in the eigenproblem is solved on the input side, in [d_in, d_in].

Shape suffixes: o is d_out, i is d_in, q the rank of the input scatter, r the kept directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from realign.subspace.spectrum import EPS, symmetric_eigenpairs

if TYPE_CHECKING:
    from realign.model.moments import Moments

DEAD = 1e-6
"""A neuron whose deviation is this small against the liveliest one's is dead."""

CANCELLED = 256 * EPS
"""A variance this small against the mean square is rounding left over from their difference."""


@dataclass(frozen=True, eq=False)
class OutputSpectrum:
    """Eigenvalues of C, and whatever gives its leading eigenvectors.

    Attributes:
        energies: [d_out] or [d_in], float64, descending; the eigenvalues that are missing are 0.
        vectors: eigenvectors as columns: of C on the output side, of M^T M on the input side.
        lift: M [d_out, q] with C = M M^T on the input side, None on the output side.
    """

    energies: Tensor
    vectors: Tensor
    lift: Tensor | None

    def basis(self, r: int) -> Tensor:
        """Return U_r [d_out, r], float64, orthonormal columns."""
        if self.lift is None:
            return self.vectors[:, :r]
        # U = M V / sigma; the QR keeps the columns orthonormal where sigma is small.
        # Signs are free: only U diag(.) U^T is used.
        return torch.linalg.qr(self.lift @ self.vectors[:, :r]).Q


def output_spectrum(moments: Moments, weight: Tensor, standardize: str) -> OutputSpectrum:
    """Return the spectrum of C for one layer.

    Args:
        moments: of the aligned model on the anchors; kind "token" goes with standardize "token".
        weight: Wa [d_out, d_in], read for input moments only.
        standardize: "neuron", "token" or "none".
    """
    assert (moments.kind == "token") == (standardize == "token"), (moments.kind, standardize)
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    n = moments.n
    s1 = moments.s1.to(device, torch.float64)
    s2 = moments.s2.to(device, torch.float64)
    if moments.kind == "token":
        return _on_output_side(s2)
    centred = standardize == "neuron"
    scatter = s2 / n - torch.outer(s1, s1) / n**2 if centred else s2
    if moments.kind == "output":
        assert s2.shape[0] == weight.shape[0], (tuple(s2.shape), tuple(weight.shape))
        if centred:
            inverse = _inverse_deviation(scatter.diagonal(), s1 / n)
            scatter = inverse[:, None] * scatter * inverse
        return _on_output_side(scatter)

    w_oi = weight.detach().to(device, torch.float64)
    d_out, d_in = w_oi.shape
    assert s2.shape[0] == d_in, (tuple(s2.shape), tuple(weight.shape))
    if d_out <= d_in:
        c_oo = w_oi @ scatter @ w_oi.T
        if centred:
            inverse = _inverse_deviation(c_oo.diagonal(), w_oi @ (s1 / n))
            c_oo = inverse[:, None] * c_oo * inverse
        return _on_output_side(c_oo)

    values, axes_ii = symmetric_eigenpairs(scatter)
    live = values > 0
    factor_iq = axes_ii[:, live] * values[live].sqrt()  # scatter = L L^T
    lift_oq = w_oi @ factor_iq
    if centred:
        variance = lift_oq.square().sum(dim=1)
        lift_oq = _inverse_deviation(variance, w_oi @ (s1 / n))[:, None] * lift_oq
    energies, vectors = symmetric_eigenpairs(lift_oq.T @ lift_oq)
    return OutputSpectrum(energies=energies, vectors=vectors, lift=lift_oq)


def _on_output_side(c_oo: Tensor) -> OutputSpectrum:
    energies, vectors = symmetric_eigenpairs(c_oo)
    return OutputSpectrum(energies=energies, vectors=vectors, lift=None)


def _inverse_deviation(variance: Tensor, mean: Tensor) -> Tensor:
    """Return 1 / s_i [d_out], 0 for dead neurons.

    Dead is s_i <= 1e-6 max s_k, and also a variance that is only what rounding left of the
    difference of two large numbers: a constant neuron must not enter as unit-variance noise.
    """
    variance = variance.clamp(min=0.0)
    deviation = variance.sqrt()
    floor = DEAD * deviation.max() if deviation.numel() else deviation.new_zeros(())
    live = (deviation > floor) & (variance > CANCELLED * (variance + mean.square()))
    return torch.where(live, 1.0 / torch.where(live, deviation, 1.0), 0.0)
