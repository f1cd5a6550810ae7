"""The choice of a rank by rule, and the facts of a spectrum, as the low-rank methods share them."""

from __future__ import annotations

from torch import Tensor

from realign.errors import UsageError
from realign.subspace.entropy import (
    effective_rank,
    energy_rank,
    entropy_rank,
    kept_energy,
    stable_rank,
    total_entropy,
    whole_stable_rank,
)
from realign.subspace.projector import degenerate_cut
from realign.subspace.spectrum import numerical_rank


def check_eta(rule: int | str, eta: float) -> None:
    """Refuse thresholds at which a rule chooses nothing; they are defined, and always a mistake.

    Args:
        rule: as for `choose_rank`; "stable" and numbers do not read eta.
        eta: its threshold.

    Raises:
        UsageError: eta is 0 or 1.
    """
    if rule in {"entropy", "energy"} and eta in {0.0, 1.0}:
        kept = "one direction, whatever the spectrum" if eta == 0.0 else "every direction"
        raise UsageError(
            f"eta = {eta:g} keeps {kept}: the {rule} rule does not choose",
            "eta must lie between 0 and 1; 0.8 to 0.9 is usual, or fix the rank by a number",
        )


def choose_rank(energies: Tensor, rule: int | str, *, eta: float) -> int:
    """Return the number of directions to keep.

    Args:
        energies: [n] float64, descending, zeros below the rounding tail.
        rule: a whole number, or "entropy", "energy" or "stable".
        eta: threshold of the first two rules.

    Returns:
        The rule's rank, capped at the numerical rank: directions below it are arbitrary.
    """
    if isinstance(rule, int):
        rank = rule
    elif rule == "entropy":
        rank = entropy_rank(energies, eta)
    elif rule == "energy":
        rank = energy_rank(energies, eta)
    else:
        assert rule == "stable", f"rank rule {rule}"
        rank = whole_stable_rank(energies)
    return min(rank, numerical_rank(energies))


def spectrum_facts(energies: Tensor, rank: int) -> dict[str, float | int | str | None]:
    """Return what the report says about a spectrum cut at `rank`."""
    return {
        "rank": rank,
        "available_rank": numerical_rank(energies),
        "entropy": total_entropy(energies),
        "effective_rank": effective_rank(energies),
        "stable_rank": stable_rank(energies),
        "kept_energy": kept_energy(energies, rank),
        "degenerate_cut": degenerate_cut(energies, rank),
    }
