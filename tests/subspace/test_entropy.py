from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.subspace_support import energy_rank_by_loop, entropy_rank_by_loop
from torch import Tensor

from realign.subspace.entropy import (
    certified_entropy_rank,
    effective_rank,
    energy_rank,
    entropy_rank,
    entropy_terms,
    kept_energy,
    stable_rank,
    total_entropy,
    whole_stable_rank,
)

energies_lists = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)
etas = st.floats(0.0, 0.999)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "eta", "entropy", "energy"),
    [
        (0.25, 0.8, 2763, 2637),
        (0.5, 0.8, 1386, 692),
        (0.5, 0.9, 2419, 1683),
        (1, 0.8, 14, 3),
        (1, 0.9, 35, 6),
        (2, 0.9, 4, 1),
    ],
)
def test_rank_table_of_power_laws(a: float, eta: float, entropy: int, energy: int) -> None:
    energies = torch.arange(1, 4097, dtype=torch.float64) ** (-2 * a)
    assert entropy_rank(energies, eta) == entropy
    assert energy_rank(energies, eta) == energy


@settings(max_examples=200, deadline=None)
@given(energies_lists, etas)
def test_ranks_follow_their_definitions(values: list[float], eta: float) -> None:
    energies = tensor(values)
    cumulative = torch.cumsum(entropy_terms(energies), 0)
    whole = float(cumulative[-1])
    # At an exact tie rounding decides; everywhere else the definition does.
    assume(whole == 0 or float((cumulative / whole - eta).abs().min()) > 1e-12)
    share = torch.cumsum(energies, 0) / energies.sum()
    assume(float((share - eta).abs().min()) > 1e-12)
    assert entropy_rank(energies, eta) == entropy_rank_by_loop(energies.tolist(), eta)
    assert energy_rank(energies, eta) == energy_rank_by_loop(energies.tolist(), eta)


@settings(max_examples=200, deadline=None)
@given(energies_lists, etas, etas)
def test_entropy_keeps_at_least_as_much_and_both_grow_with_eta(
    values: list[float], one: float, two: float
) -> None:
    energies, low, high = tensor(values), min(one, two), max(one, two)
    assert entropy_rank(energies, low) >= energy_rank(energies, low)
    assert entropy_rank(energies, low) <= entropy_rank(energies, high)
    assert energy_rank(energies, low) <= energy_rank(energies, high)
    assert bool((entropy_terms(energies) >= 0).all())  # so H_rho never decreases


@settings(max_examples=100, deadline=None)
@given(energies_lists, etas, st.integers(-40, 40), st.integers(0, 8))
def test_scale_and_zeros_do_not_matter(
    values: list[float], eta: float, exponent: int, zeros: int
) -> None:
    energies = tensor(values)
    scaled = torch.cat([energies * 2.0**exponent, torch.zeros(zeros, dtype=torch.float64)])
    assert entropy_rank(scaled, eta) == entropy_rank(energies, eta)
    assert energy_rank(scaled, eta) == energy_rank(energies, eta)
    assert effective_rank(scaled) == pytest.approx(effective_rank(energies), rel=1e-12)


@settings(max_examples=300, deadline=None)
@given(energies_lists, etas, st.integers(1, 30))
def test_certified_rank_is_the_rank_of_the_full_spectrum(
    values: list[float], eta: float, q: int
) -> None:
    energies = tensor(values)
    q = min(q, len(values))
    cumulative = torch.cumsum(entropy_terms(energies), 0)
    whole = float(cumulative[-1])
    assume(whole == 0 or float((cumulative / whole - eta).abs().min()) > 1e-9)
    found = certified_entropy_rank(
        energies[:q], trace=float(energies.sum()), n=len(values), eta=eta
    )
    if q == len(values):
        assert found is not None
    assert found in (None, entropy_rank(energies, eta))


def test_certification_succeeds_on_steep_and_declines_on_flat_spectra() -> None:
    i = torch.arange(1, 4097, dtype=torch.float64)
    steep, flat = i**-4.0, i**-0.5
    found = certified_entropy_rank(steep[:64], trace=float(steep.sum()), n=4096, eta=0.9)
    assert found == entropy_rank(steep, 0.9) == 4
    assert certified_entropy_rank(flat[:64], trace=float(flat.sum()), n=4096, eta=0.9) is None
    assert certified_entropy_rank(steep[:64], trace=float(steep.sum()), n=4096, eta=1.0) is None


def test_a_truncated_spectrum_alone_underestimates_the_rank() -> None:
    energies = torch.arange(1, 4097, dtype=torch.float64) ** -1.0
    assert entropy_rank(energies[:64], 0.8) < entropy_rank(energies, 0.8)


@pytest.mark.parametrize(
    ("values", "eta", "expected"),
    [
        ([4.0, 0.0, 0.0], 0.8, 1),  # H_n = 0, one direction holds everything
        ([1e300, 1e-300, 0.0], 0.8, 1),  # a second direction whose p underflows
        ([1.0, 1e-30, 0.0], 0.8, 2),  # a weak one holds nearly all of the (tiny) entropy
        ([0.0, 0.0], 0.8, 0),
        ([3.0, 2.0, 1.0, 0.0], 1.0, 3),  # no rho exceeds 1: everything that has energy
        ([3.0, 2.0, 1.0, 0.0], 0.0, 1),
        ([2.0, 2.0, 2.0, 2.0], 0.5, 3),  # strict: H_2 / H_4 = 0.5 is not enough
    ],
)
def test_edge_cases_of_the_entropy_rule(values: list[float], eta: float, expected: int) -> None:
    assert entropy_rank(torch.tensor(values, dtype=torch.float64), eta) == expected


def test_energy_rule_reaches_its_threshold_inclusively() -> None:
    energies = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    assert energy_rank(energies, 0.5) == 1
    assert energy_rank(energies, 0.51) == 2
    assert energy_rank(energies, 1.0) == 3
    assert energy_rank(energies * 0, 0.5) == 0
    weak = torch.tensor([1.0, 1e-20, 0.0], dtype=torch.float64)  # lost in the running sum
    assert energy_rank(weak, 1.0) == 2


def test_hand_values() -> None:
    energies = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    assert total_entropy(energies) == pytest.approx(0.500402, abs=1e-6)
    assert effective_rank(energies) == pytest.approx(1.649385, abs=1e-6)
    assert stable_rank(energies) == 1.25
    assert kept_energy(energies, 1) == 0.8
    assert stable_rank(torch.tensor([9.0, 4.0, 1.0])) == pytest.approx(1.555556, abs=1e-6)
    assert whole_stable_rank(torch.tensor([9.0, 4.0, 1.0])) == 2
    zero = torch.zeros(3, dtype=torch.float64)
    assert (total_entropy(zero), effective_rank(zero), stable_rank(zero)) == (0, 0, 0)
    assert kept_energy(zero, 2) == 0


def test_whole_stable_rank_forgives_rounding() -> None:
    energies = torch.full((8,), 0.1, dtype=torch.float64)
    energies[7] = 1e-13  # seven equal directions and a trace of an eighth
    assert stable_rank(energies) > 7
    assert whole_stable_rank(energies) == 7


@settings(max_examples=100, deadline=None)
@given(energies_lists, etas, st.integers(1, 30))
def test_leading_energies_and_the_total_are_enough(values: list[float], eta: float, q: int) -> None:
    energies = tensor(values)
    found = energy_rank(energies[:q], eta, total=float(energies.cumsum(0)[-1]))
    assert found == min(energy_rank(energies, eta), q)
