"""Directions in weight space: lengths, right angles, keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realign.errors import UsageError
from realign.subspace.directions import (
    across,
    aligned_direction,
    grid,
    orthogonal_direction,
    random_direction,
    rescaled,
    second_random_direction,
    seeded_normal,
)


def test_the_part_across_a_direction() -> None:
    along = torch.tensor([3.0, 4.0])
    rest = across(torch.tensor([1.0, 2.0]), along)
    assert rescaled(rest, 5.0).tolist() == pytest.approx([-4.0, 3.0], abs=1e-6)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 12), columns=st.integers(2, 12))
def test_orthogonal_directions_are_orthogonal_and_equally_long(
    seed: int, rows: int, columns: int
) -> None:
    along = seeded_normal("along", (rows, columns), seed=seed) * 1e-3
    found = orthogonal_direction("w", along, seed=seed)
    cosine = torch.nn.functional.cosine_similarity(
        found.double().flatten(), along.double().flatten(), dim=0
    )
    assert abs(float(cosine)) < 1e-6
    assert float(found.norm()) == pytest.approx(float(along.norm()), rel=1e-5)


def test_nothing_is_across_nothing_or_a_single_entry() -> None:
    assert orthogonal_direction("w", torch.zeros(3, 4), seed=0).abs().sum() == 0
    assert orthogonal_direction("w", torch.tensor([2.0]), seed=0).abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_direction_is_as_long_as_its_tensor(dtype: torch.dtype) -> None:
    tensor = (seeded_normal("t", (16, 9), seed=3) * 0.02).to(dtype)
    found = random_direction("model.layers.0.mlp.up_proj.weight", tensor, seed=0)
    assert found.dtype == torch.float32
    assert float(found.norm()) == pytest.approx(float(tensor.float().norm()), rel=1e-5)


@pytest.mark.parametrize("name", ["model.norm.weight", "layers.0.input_layernorm.weight", "q_Norm"])
def test_norms_are_not_perturbed(name: str) -> None:
    assert random_direction(name, torch.ones(8), seed=0).abs().sum() == 0


def test_the_second_direction_is_across_the_first() -> None:
    tensor = seeded_normal("t", (10, 10), seed=1)
    first = random_direction("w", tensor, seed=0)
    second = second_random_direction("w", tensor, first=first, seed=0)
    assert abs(float((first.double() * second.double()).sum())) < 1e-6 * float(tensor.norm()) ** 2
    assert float(second.norm()) == pytest.approx(float(tensor.norm()), rel=1e-5)


def test_a_draw_depends_on_name_seed_and_role_and_on_nothing_else() -> None:
    first = seeded_normal("a", (4, 4), seed=0)
    seeded_normal("b", (100,), seed=0)
    torch.manual_seed(5)
    assert torch.equal(seeded_normal("a", (4, 4), seed=0), first)
    assert not torch.equal(seeded_normal("b", (4, 4), seed=0), first)
    assert not torch.equal(seeded_normal("a", (4, 4), seed=1), first)
    assert not torch.equal(seeded_normal("a", (4, 4), seed=0, role="second"), first)
    # Pinned: a number that changes here makes every published landscape another one.
    assert first[0].tolist() == pytest.approx(PINNED, abs=1e-6)
    many = seeded_normal("many", (200_000,), seed=0)
    assert abs(float(many.mean())) < 0.01 and float(many.std()) == pytest.approx(1.0, abs=0.01)


def test_the_alignment_direction_is_a_difference_in_float32() -> None:
    reference = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    base = torch.tensor([0.5, 2.0078125], dtype=torch.bfloat16)
    assert aligned_direction(reference, base).dtype == torch.float32
    assert aligned_direction(reference, base).tolist() == [0.5, 2.0 - float(base[1])]


def test_grids_hold_their_decimals() -> None:
    assert grid(-0.5, 1.5, 21)[5] == 0.0 and grid(-0.5, 1.5, 21)[15] == 1.0
    assert grid(-1.0, 1.0, 21)[7] == -0.3
    assert str(grid(-0.5, 0.5, 21)[10]) == "0.0"
    with pytest.raises(UsageError, match="do not include 0"):
        grid(-0.5, 0.5, 20)
    with pytest.raises(UsageError, match="1 points"):
        grid(0.0, 1.0, 1)


PINNED = [-0.1274152, 0.0197272, -0.6284184, 0.4843041]
