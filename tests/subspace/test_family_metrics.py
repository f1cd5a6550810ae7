from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import matrix
from torch import Tensor

from realign.subspace.drift import matrix_drift
from realign.subspace.family import FamilyMeter, FamilyMetrics, FamilyTerms, merge_family
from realign.subspace.spectrum import Triplets, top_triplets

A = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
T = torch.tensor([[-1.0, 0, 0], [0, -0.2, 0.3], [0, 0.4, 0.5]], dtype=torch.float64)
A2 = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
T2 = torch.tensor([[0.0, -1.5], [0.5, 0.0]], dtype=torch.float64)


def terms_of(a: Tensor, t: Tensor, k: int, *, base: Tensor | None = None) -> FamilyTerms:
    """Exact numbers: everything in float64 around a given base."""
    reference = a.double() + (torch.zeros_like(a) if base is None else base).double()
    meter = FamilyMeter(a.shape[1], top_triplets(a, k))
    meter.add(reference, reference + t.double())
    return meter.terms()


def metrics_of(a: Tensor, t: Tensor, k: int) -> FamilyMetrics:
    return terms_of(a, t, k).metrics()


@pytest.mark.parametrize(
    ("k", "energy", "squared", "excess", "retained"),
    [(1, 0.805823, 0.649351, 1.948052, 0.5), (2, 0.856602, 0.733766, 1.100649, 0.56)],
)
def test_the_numbers_of_a_worked_example(
    k: int, energy: float, squared: float, excess: float, retained: float
) -> None:
    found = metrics_of(A, T, k)
    assert found.energy == pytest.approx(energy, abs=1e-6)
    assert found.energy_squared == pytest.approx(squared, abs=1e-6)
    assert found.excess == pytest.approx(excess, abs=1e-6)
    assert found.retained_k == pytest.approx(retained, abs=1e-12)
    assert found.relative_distance == pytest.approx(1.240967 / math.sqrt(5), abs=1e-6)
    assert (found.k, found.known, found.matrices) == (k, 1, 1)


@pytest.mark.parametrize(("factor", "retained"), [(0.0, 1.0), (-1.0, 0.0), (0.5, 1.5)])
@pytest.mark.parametrize("k", [1, 2])
def test_multiples_of_the_alignment_vector(factor: float, retained: float, k: int) -> None:
    assert metrics_of(A, factor * A, k).retained_k == pytest.approx(retained, abs=1e-12)


def test_totals_are_ratios_of_sums() -> None:
    both = merge_family([terms_of(A, T, 2), terms_of(A2, T2, 2)]).metrics()
    assert both.retained_k == pytest.approx(1 - 3.2 / 7, abs=1e-12)
    assert both.relative_distance == pytest.approx(math.sqrt((1.54 + 2.5) / 7), abs=1e-12)
    assert both.known == 2


def test_without_a_subspace_there_is_the_distance_alone() -> None:
    for triplets in (None, Triplets(torch.zeros(3, 0), torch.zeros(0), torch.zeros(3, 0))):
        meter = FamilyMeter(3, triplets)
        meter.add(A, A + T)
        found = meter.terms().metrics()
        assert found.relative_distance == pytest.approx(1.240967 / math.sqrt(5), abs=1e-6)
        assert found.energy is None and found.excess is None and found.retained_k is None
    assert FamilyMeter(3).terms().metrics().relative_distance is None


def test_a_difference_that_may_be_rounding_is_flagged() -> None:
    reference = torch.ones(4, 4, dtype=torch.bfloat16)
    subject = reference.clone()
    subject[0, 0] = 1 + 2**-7
    meter = FamilyMeter(4)
    meter.add(reference, subject)
    assert meter.terms().below_storage_precision == 0
    large = torch.full((40, 40), 1.0, dtype=torch.bfloat16)
    moved = large.clone()
    moved[0, 0] = 1 + 2**-7
    meter = FamilyMeter(40)
    meter.add(large, moved)
    assert meter.terms().below_storage_precision == 1


def test_at_full_rank_it_is_what_the_base_would_have_told() -> None:
    base, a, t = (matrix(9, 14, seed=i) for i in range(3))
    found = terms_of(a, t, 9, base=base).metrics()
    expected = matrix_drift(
        key="", module="", layer=0, reference=base + a, subject=base + a + t, base=base
    ).terms.metrics()
    assert found.retained_k == pytest.approx(expected.alignment_retained, rel=1e-10)
    assert found.energy == pytest.approx(1.0)
    assert found.relative_distance == pytest.approx(expected.relative_distance, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    k=st.integers(1, 12),
    rows=st.lists(st.integers(0, 12), max_size=3),
    columns=st.lists(st.integers(0, 12), max_size=3),
    seed=st.integers(0, 10**6),
)
def test_any_partition_into_blocks_gives_what_dense_projectors_give(
    shape: tuple[int, int], k: int, rows: list[int], columns: list[int], seed: int
) -> None:
    a, t, base = (matrix(*shape, seed=seed + i) for i in range(3))
    reference, subject = base + a, base + a + t
    triplets = top_triplets(a, k)
    meter = FamilyMeter(shape[1], triplets)
    edges = [sorted({0, size, *(min(at, size) for at in cut)})
             for size, cut in zip(shape, (rows, columns), strict=True)]  # fmt: skip
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            part = (slice(top, bottom), slice(left, right))
            meter.add(reference[part], subject[part], row=top, column=left)
    found = meter.terms()
    p = triplets.u @ triplets.u.T
    kept = p @ a
    t = subject - reference
    assert found.task == pytest.approx(float(t.square().sum()), rel=1e-12)
    assert found.reference == pytest.approx(float(reference.square().sum()), rel=1e-12)
    assert found.projected == pytest.approx(float((p @ t).square().sum()), rel=1e-9)
    assert found.alignment == pytest.approx(float(kept.square().sum()), rel=1e-9)
    scale = float(t.norm() * kept.norm())
    assert found.cross == pytest.approx(float((t * kept).sum()), abs=1e-10 * scale)
    assert found.chance == pytest.approx(min(k, *shape) / shape[0] * found.task, rel=1e-12)


def tiles(shape: tuple[int, int], step: tuple[int, int]) -> list[tuple[slice, slice]]:
    return [
        (slice(row, min(row + step[0], shape[0])), slice(column, min(column + step[1], shape[1])))
        for row in range(0, shape[0], step[0])
        for column in range(0, shape[1], step[1])
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("step", [(300, 500), (7, 500), (300, 11), (100, 64)])
def test_the_order_in_memory_and_the_pieces_of_a_run_do_not_matter(
    dtype: torch.dtype, step: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realign.subspace.family.BLOCK", 2000)
    shape = (300, 500)
    reference, a, t = (matrix(*shape, seed=i) for i in range(3))
    reference, subject = reference.to(dtype), (reference + 0.05 * t).to(dtype)
    triplets = top_triplets(a, 20)
    delta = subject.double() - reference.double()
    image = triplets.u.T @ delta
    for one, two in ((reference, subject), (reference.T.clone().T, subject.T.clone().T)):
        meter = FamilyMeter(shape[1], triplets)
        block = meter.block()
        for part in tiles(shape, step):
            block.add(one[part], two[part], row=part[0].start, column=part[1].start)
        meter.take(block)
        found = meter.terms()
        assert found.task == pytest.approx(float(delta.square().sum()), rel=1e-6)
        assert found.reference == pytest.approx(float(reference.double().square().sum()), rel=1e-6)
        assert found.projected == pytest.approx(float(image.square().sum()), rel=1e-6)
        expected = float((image * (triplets.s[:, None] * triplets.v.T)).sum())
        scale = math.sqrt(found.task * found.alignment)
        assert found.cross == pytest.approx(expected, abs=1e-7 * scale)


def test_sums_beyond_float32_are_infinite_and_nothing_warns() -> None:
    reference = torch.full((6, 8), 1e25, dtype=torch.bfloat16)
    meter = FamilyMeter(8, top_triplets(A.new_ones(6, 8), 1))
    meter.add(reference, -reference)
    assert meter.terms().task == meter.terms().reference == math.inf


def test_an_entry_that_is_not_finite_shows_also_where_nothing_else_changed() -> None:
    reference = torch.ones(6, 8, dtype=torch.bfloat16)
    for bad in (math.nan, math.inf):
        for whose in (0, 1):
            both = [reference.clone(), reference.clone()]
            both[whose][2, 3] = bad
            meter = FamilyMeter(8, top_triplets(A.new_ones(6, 8), 1))
            meter.add(*both)
            assert not math.isfinite(meter.terms().task)
            assert math.isfinite(meter.terms().reference) == (whose == 1)
