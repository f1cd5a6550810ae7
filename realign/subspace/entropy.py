"""How many directions to keep: entropy, energy and stable ranks of a spectrum.

Everything takes `energies`, the squared singular values in descending order, float64, with zeros
for what does not count. With p_i = sigma_i^2 / sum sigma_j^2 and 0 log 0 = 0:

    H_rho = - sum_{i <= rho} p_i log p_i      safety singular value entropy, arXiv 2602.00038 eq. 6
    entropy rank = smallest rho with H_rho / H_n > eta                                        eq. 7
    energy rank  = smallest rho with sum_{i <= rho} p_i >= eta

Since -log p_i grows with i, H_rho / H_n <= sum_{i <= rho} p_i: the entropy rule keeps at least as
many directions as the energy rule at the same threshold. The base of the logarithm cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INTEGER_GUARD = 1e-9
"""A stable rank this close (relatively) above a whole number is that number."""


def entropy_terms(energies: Tensor) -> Tensor:
    """Return -p_i log p_i [n] (nats); zeros for a spectrum without energy."""
    total = energies.sum()
    if float(total) == 0.0:
        return torch.zeros_like(energies)
    p = energies / total
    return -torch.special.xlogy(p, p)


def total_entropy(energies: Tensor) -> float:
    """Return H_n in nats, 0 for a spectrum without energy."""
    return max(float(entropy_terms(energies).sum()), 0.0)


def entropy_rank(energies: Tensor, eta: float) -> int:
    """Return the smallest rho with H_rho / H_n > eta (arXiv 2602.00038, eq. 7; strict).

    Edge cases: no energy gives 0; all energy in one direction (H_n = 0) gives 1; eta >= 1, which
    no rho exceeds, gives the number of directions with energy.
    """
    positive = int(torch.count_nonzero(energies))
    if positive <= 1:
        return positive
    cumulative = torch.cumsum(entropy_terms(energies), 0)
    if float(cumulative[-1]) <= 0.0:  # every p but p_1 underflows
        return 1
    not_enough = int(torch.count_nonzero(cumulative <= eta * cumulative[-1]))
    return min(not_enough + 1, positive)  # the cap decides for eta >= 1


def energy_rank(energies: Tensor, eta: float, *, total: float | None = None) -> int:
    """Return the smallest rho >= 1 whose cumulative energy reaches the share eta, 0 if none.

    Args:
        energies: descending.
        eta: the share.
        total: of all energies, where only the leading ones are given; if they do not reach the
            share, the answer is their number.
    """
    positive = int(torch.count_nonzero(energies))
    if positive <= 1 or eta >= 1.0:
        return positive
    cumulative = torch.cumsum(energies, 0)
    whole = cumulative[-1] if total is None else total
    return min(int(torch.count_nonzero(cumulative < eta * whole)) + 1, positive)


def effective_rank(energies: Tensor) -> float:
    """Return exp(H_n), the number of equal directions with the same entropy; 0 if no energy."""
    return math.exp(total_entropy(energies)) if bool(energies.any()) else 0.0


def stable_rank(energies: Tensor) -> float:
    """Return sum sigma_i^2 / sigma_1^2; 0 if no energy."""
    return float(energies.sum() / energies[0]) if bool(energies.any()) else 0.0


def whole_stable_rank(energies: Tensor) -> int:
    """Return the stable rank rounded up, forgiving the rounding of its own sum."""
    return math.ceil(stable_rank(energies) * (1.0 - INTEGER_GUARD))


def kept_energy(energies: Tensor, r: int) -> float:
    """Return the share of the energy in the first r directions, 0 for a spectrum without energy."""
    total = float(energies.sum())
    return float(energies[:r].sum()) / total if total > 0.0 else 0.0


def certified_entropy_rank(top_energies: Tensor, *, trace: float, n: int, eta: float) -> int | None:
    """Return the entropy rank from the leading energies alone, if they determine it.

    With tail energy e = 1 - sum_{i <= q} p_i spread over n - q directions, none above p_q, the
    tail's entropy lies in [-e log p_q, -e log(e / (n - q))]. If both ends give the same rank within
    the q known directions, that is the rank of the full spectrum.

    Args:
        top_energies: [q], the q largest energies, descending.
        trace: the sum of all n energies.
        n: the number of all energies.
        eta: threshold of the entropy rule, below 1.

    Returns:
        The rank, or None if the q energies do not settle it.
    """
    q = top_energies.numel()
    assert 0 < q <= n, f"{q} of {n} energies"
    if trace <= 0.0 or float(top_energies[-1]) <= 0.0 or q == n:
        return entropy_rank(top_energies, eta)
    if eta >= 1.0:
        return None
    p = top_energies.to(torch.float64) / trace
    terms = -torch.special.xlogy(p, p)
    cumulative = torch.cumsum(terms, 0)
    # Allow for the rounding of e itself: the interval may only become wider.
    rounding = n * torch.finfo(torch.float64).eps
    tail = 1.0 - float(p.sum())
    least, most = max(tail - rounding, 0.0), max(tail, 0.0) + rounding
    low = -least * math.log(float(p[-1]))
    high = -most * math.log(min(most / (n - q), 1.0))
    known = float(cumulative[-1])
    ranks = [int(torch.count_nonzero(cumulative <= eta * (known + end))) + 1 for end in (low, high)]
    return ranks[0] if ranks[0] == ranks[1] <= q else None
