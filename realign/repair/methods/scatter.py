"""The spectrum of a layer's standardised outputs, from moments alone: the first half of LSSF.

    C = Z~ Z~^T  [d_out, d_out],  Z = W X the outputs on the anchors, Z~ standardised

    none     C = sum z z^T, uncentred
    neuron   C = the correlation matrix of the outputs; rows and columns of dead neurons are 0
    token    C = sum z~_t z~_t^T with every token's outputs standardised; accumulated by the hooks,
             since it is no function of the moments

Output moments give C directly. Input moments (x, shared by q, k, v and by gate, up) give it as
W Cov W^T. The eigenproblem is solved on the smallest side there is: [d_in, d_in] where
d_out > d_in, and about [N, N] where the anchors have clearly fewer tokens N than the layer has
outputs. Both write C = M M^T with a tall M, whose other Gram matrix M^T M has the same energies.

Shape suffixes: o is d_out, i is d_in, q the rank of a factor, r the kept directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from realign.subspace.eigen import EPS, Eigenpairs, eigenpairs, require_finite
from realign.subspace.lapack import pivoted_cholesky
from realign.subspace.spectrum import decompose

if TYPE_CHECKING:
    from realign.model.moments import Moments

DEAD = 1e-6
"""A neuron whose deviation is this small against the liveliest one's is dead."""

CANCELLED = 256 * EPS
"""A variance this small against the mean square is rounding left over from their difference."""

FEW_TOKENS = 0.7
"""Tokens per output below which C is factored first: rank and time then follow the tokens."""

LIFT_ROWS = 512
"""Rows of a weight upcast at once."""

STEEP = 1e-7
"""Energies further than this below the largest need a QR to keep their directions orthonormal."""


@dataclass(frozen=True, eq=False)
class OutputSpectrum:
    """Eigenvalues of C, and whatever gives its leading eigenvectors.

    Attributes:
        pairs: of C, or of M^T M where there is a lift.
        lift: M [d_out, q] with C = M M^T, None where C itself was decomposed.
    """

    pairs: Eigenpairs
    lift: Tensor | None

    @property
    def energies(self) -> Tensor:
        """[d_out] or [q], float64, descending; the eigenvalues that are missing are 0."""
        return self.pairs.values

    def basis(self, r: int) -> Tensor:
        """Return U_r [d_out, r], float64, orthonormal columns.

        Signs are free: only U diag(.) U^T is used.
        """
        if self.lift is None or r == 0:
            return self.pairs.top(r)
        image_or = self.lift @ self.pairs.top(r)
        energies = self.energies[:r]
        if float(energies[-1]) <= STEEP * float(energies[0]):
            return torch.linalg.qr(image_or).Q
        # U = M V / sigma is orthonormal up to rounding that grows with sigma_1^2 / sigma_r^2. One
        # Cholesky step takes that away, at a fraction of the time of a QR.
        image_or /= energies.sqrt()
        triangle = torch.linalg.cholesky(image_or.T @ image_or).T
        return torch.linalg.solve_triangular(triangle, image_or, upper=True, left=False)


def output_spectrum(
    moments: Moments, weight: Tensor, standardize: str, *, overwrite: bool = False
) -> OutputSpectrum:
    """Return the spectrum of C for one layer.

    Args:
        moments: of the aligned model on the anchors; kind "token" goes with standardize "token".
        weight: Wa [d_out, d_in], read for input moments only.
        standardize: "neuron", "token" or "none".
        overwrite: give the memory of the moments away.
    """
    assert (moments.kind == "token") == (standardize == "token"), (moments.kind, standardize)
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    n = moments.n
    s1 = moments.s1.to(device, torch.float64)
    centred = standardize == "neuron"
    # Worked on in place: nothing else of this size is made.
    scatter = moments.s2.to(device, torch.float64, copy=not overwrite)
    if centred:
        scatter.div_(n).addr_(s1, s1, alpha=-1.0 / n**2)
    most = n - 1 if centred else n
    if moments.kind == "token":
        return _on_output_side(scatter, most=most)
    if moments.kind == "output":
        assert scatter.shape[0] == weight.shape[0], (tuple(scatter.shape), tuple(weight.shape))
        if centred:
            _scale(scatter, _inverse_deviation(scatter.diagonal(), s1 / n))
        return _on_output_side(scatter, most=most)

    weight = weight.detach().to(device)
    d_out, d_in = weight.shape
    assert scatter.shape[0] == d_in, (tuple(scatter.shape), tuple(weight.shape))
    if d_out <= d_in:
        w_oi = weight.to(torch.float64)
        c_oo = w_oi @ scatter @ w_oi.T
        if centred:
            _scale(c_oo, _inverse_deviation(c_oo.diagonal(), w_oi @ (s1 / n)))
        return _on_output_side(c_oo, most=most)

    factor_iq = _square_factor(scatter, most=most)
    lift_oq = factor_iq.new_empty(d_out, factor_iq.shape[1])
    mean_o = factor_iq.new_empty(d_out)
    for start in range(0, d_out, LIFT_ROWS):  # the weight is never in float64 as a whole
        rows = slice(start, start + LIFT_ROWS)
        w_ri = weight[rows].to(torch.float64)
        torch.matmul(w_ri, factor_iq, out=lift_oq[rows])
        torch.matmul(w_ri, s1 / n, out=mean_o[rows])
    del factor_iq
    if centred:
        variance = torch.linalg.vector_norm(lift_oq, dim=1).square_()
        lift_oq *= _inverse_deviation(variance, mean_o)[:, None]
    return _lifted(lift_oq)


def _square_factor(scatter: Tensor, *, most: int) -> Tensor:
    """Return L [d, q] with scatter = L L^T; the argument's memory is given away.

    Args:
        scatter: [d, d], positive semi-definite.
        most: a rank that it cannot exceed: what lies beyond is rounding.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    if scatter.device.type != "cpu":
        pairs = eigenpairs(scatter, overwrite=True)
        q = min(int(torch.count_nonzero(pairs.values)), most)
        return pairs.top(q) * pairs.values[:q].sqrt()
    require_finite(scatter)  # the factorisation would end at the first NaN, as if the rank did
    factor, pivots, found = pivoted_cholesky(scatter)
    q = min(found, most)
    lower = factor.new_empty(factor.shape[0], q)
    lower[pivots] = factor[:q].triu_().T
    return lower


def _on_output_side(c_oo: Tensor, *, most: int) -> OutputSpectrum:
    if c_oo.device.type == "cpu" and most < FEW_TOKENS * c_oo.shape[0]:
        return _lifted(_square_factor(c_oo, most=most))
    return OutputSpectrum(pairs=eigenpairs(c_oo, overwrite=True), lift=None)


def _lifted(lift_oq: Tensor) -> OutputSpectrum:
    return OutputSpectrum(pairs=decompose(lift_oq).pairs, lift=lift_oq)


def _scale(c_oo: Tensor, inverse: Tensor) -> None:
    c_oo.mul_(inverse[:, None]).mul_(inverse)


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
