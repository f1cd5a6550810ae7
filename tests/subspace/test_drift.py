from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import matrix
from torch import Tensor

from realign.subspace.drift import (
    DriftMetrics,
    MatrixDrift,
    distance_terms,
    drift_table,
    matrix_drift,
    merge,
    subspace_size,
)

A = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
T = torch.tensor([[-1, 0, 0], [0, -0.2, 0.3], [0, 0.4, 0.5]], dtype=torch.float64)
A2 = torch.tensor([[0, 1], [1, 0]], dtype=torch.float64)
T2 = torch.tensor([[0, -1.5], [0.5, 0]], dtype=torch.float64)


def drift(
    a: Tensor,
    t: Tensor,
    *,
    k: int | None = None,
    module: str = "q_proj",
    layer: int | None = 0,
    reference: Tensor | None = None,
) -> MatrixDrift:
    ref = matrix(*a.shape, seed=0) if reference is None else reference
    return matrix_drift(
        key=f"{layer}.{module}",
        module=module,
        layer=layer,
        reference=ref,
        subject=ref + t,
        base=ref - a,
        k=k,
    )


def test_first_vector_without_subspace() -> None:
    found = drift(A, T).terms
    metrics = found.metrics()
    assert found.alignment == pytest.approx(5)
    assert found.cross == pytest.approx(-2.2)
    assert math.sqrt(found.task) == pytest.approx(1.240967, abs=1e-6)
    assert metrics.alignment_retained == pytest.approx(0.56)
    assert metrics.cosine == pytest.approx(-0.792825, abs=1e-6)
    assert metrics.entropy == pytest.approx(0.828131, abs=1e-6)
    assert metrics.effective_rank == pytest.approx(2.289036, abs=1e-6)
    assert metrics.stable_rank == pytest.approx(1.54)


@pytest.mark.parametrize(
    ("k", "share", "energy", "excess", "r_align", "r_ft", "ratio", "cosines", "overlap"),
    [
        (1, 0.805823, 0.649351, 1.948052, 0.894427, 0.683586, 0.764272, (1.0,), 1.0),
        (2, 0.856602, 0.733766, 1.100649, 1.0, 0.899117, 0.899117, (1.0, 0.229753), 0.526393),
    ],
)
def test_first_vector_with_subspace(
    k: int,
    share: float,
    energy: float,
    excess: float,
    r_align: float,
    r_ft: float,
    ratio: float,
    cosines: tuple[float, ...],
    overlap: float,
) -> None:
    row = drift(A, T, k=k)
    metrics = row.terms.metrics()
    assert metrics.subspace_share == pytest.approx(share, abs=1e-6)
    assert metrics.subspace_energy == pytest.approx(energy, abs=1e-6)
    assert metrics.excess == pytest.approx(excess, abs=1e-6)
    assert metrics.r_align == pytest.approx(r_align, abs=1e-6)
    assert metrics.r_ft == pytest.approx(r_ft, abs=1e-6)
    assert metrics.lox_ratio == pytest.approx(ratio, abs=1e-6)
    assert row.cosines == pytest.approx(cosines, abs=1e-6)
    assert metrics.overlap == pytest.approx(overlap, abs=1e-6)
    assert metrics.overlap_chance == pytest.approx(k / 3)


def test_global_is_the_ratio_of_sums_and_not_the_mean_of_ratios() -> None:
    rows = [drift(A, T, layer=0), drift(A2, T2, layer=1, module="up_proj")]
    assert rows[1].terms.metrics().alignment_retained == pytest.approx(0.5)
    table = drift_table(rows)
    assert table.overall.alignment_retained == pytest.approx(0.542857, abs=1e-6)
    assert table.by_module["up_proj"].alignment_retained == pytest.approx(0.5)
    assert table.by_layer[0].alignment_retained == pytest.approx(0.56)
    assert table.overall.matrices == 2


def test_task_vector_that_undoes_alignment_and_one_that_is_zero() -> None:
    undone = drift(A, -A).terms.metrics()
    assert undone.alignment_retained == pytest.approx(0, abs=1e-12)
    assert undone.cosine == pytest.approx(-1)
    still = drift(A, 0 * A).terms.metrics()
    assert still.alignment_retained == 1
    assert still.cosine is None
    assert still.relative_distance == 0
    assert still.lox_ratio == pytest.approx(1)
    assert (still.entropy, still.overlap, still.subspace_share) == (None, None, None)


def test_global_values_are_those_of_the_block_diagonal_matrix() -> None:
    shapes = [(6, 9), (8, 4)]
    refs = [matrix(*s, seed=i) for i, s in enumerate(shapes)]
    a = [matrix(*s, seed=i + 10) for i, s in enumerate(shapes)]
    t = [matrix(*s, seed=i + 20) for i, s in enumerate(shapes)]
    rows = [drift(x, y, reference=r) for x, y, r in zip(a, t, refs, strict=True)]
    found = drift_table(rows).overall
    whole_a, whole_t, whole_r = (torch.block_diag(*x) for x in (a, t, refs))
    assert found.relative_distance == pytest.approx(float(whole_t.norm() / whole_r.norm()))
    cos = float((whole_a * whole_t).sum() / whole_a.norm() / whole_t.norm())
    assert found.cosine == pytest.approx(cos)
    inside = []
    for x, y in zip(a, t, strict=True):
        u = torch.linalg.svd(x).U[:, : subspace_size(torch.linalg.svdvals(x).square())]
        inside.append(u @ (u.T @ y))
    share = float(torch.block_diag(*inside).norm() / whole_t.norm())
    assert found.subspace_share == pytest.approx(share)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([(5, 5), (4, 9), (9, 4)]))
def test_against_dense_formulas(seed: int, k: int, shape: tuple[int, int]) -> None:
    k = min(k, *shape)
    a, t = matrix(*shape, seed=seed), matrix(*shape, seed=seed + 1)
    metrics = drift(a, t, k=k).terms.metrics()
    u = torch.linalg.svd(a).U[:, :k]
    p = u @ u.T
    assert metrics.r_align == pytest.approx(float((p @ a).norm() / a.norm()), rel=1e-9)
    r_ft = float((p @ (a + t)).norm() / (a + t).norm())
    assert metrics.r_ft == pytest.approx(r_ft, rel=1e-9)
    excess = float((p @ t).norm() / t.norm()) ** 2 / (k / shape[0])
    assert metrics.excess == pytest.approx(excess, rel=1e-9)
    ut = torch.linalg.svd(t).U[:, :k]
    overlap = float((u.T @ ut).square().sum()) / k
    assert metrics.overlap == pytest.approx(overlap, rel=1e-7)
    # Below size 100 the published ratio uses every direction there is, hence P a = a.
    full = torch.linalg.svd(a, full_matrices=False).U
    published = float((full @ full.T @ (a + t)).norm() / (a + t).norm())
    assert metrics.lox_published == pytest.approx(published, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(-20, 20))
def test_ratios_do_not_depend_on_a_common_scale(seed: int, exponent: int) -> None:
    a, t, r = (matrix(5, 7, seed=seed + i) for i in range(3))
    factor = 2.0**exponent
    one = drift(a, t, reference=r).terms.metrics()
    two = drift(a * factor, t * factor, reference=r * factor).terms.metrics()
    for name in DriftMetrics.__dataclass_fields__:
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-9), name


def test_without_base_only_the_metrics_of_the_task_vector() -> None:
    ref = matrix(3, 3, seed=1)
    row = matrix_drift(key="q", module="q_proj", layer=0, reference=ref, subject=ref + T)
    found = row.terms.metrics()
    assert found.effective_rank == pytest.approx(2.289036, abs=1e-6)
    assert found.relative_distance == pytest.approx(1.240967 / float(ref.norm()), abs=1e-6)
    assert (found.alignment_retained, found.cosine, found.lox_ratio, found.excess) == (None,) * 4


def test_untouched_by_alignment_has_no_ratio_of_its_own_but_counts_in_the_sums() -> None:
    alone = drift(0 * A, T)
    assert alone.terms.metrics().alignment_retained is None
    assert alone.terms.metrics().cosine is None
    both = merge([alone.terms, drift(A, T).terms]).metrics()
    assert both.alignment_retained == pytest.approx(0.56)
    assert both.cosine == pytest.approx(-0.792825 / math.sqrt(2), abs=1e-6)


def test_spectra_can_be_left_out() -> None:
    ref = matrix(3, 3, seed=1)
    row = matrix_drift(
        key="q",
        module="q_proj",
        layer=0,
        reference=ref,
        subject=ref + T,
        base=ref - A,
        spectra=False,
    )
    found = row.terms.metrics()
    assert (found.entropy, found.stable_rank, found.overlap, row.cosines) == (None,) * 4
    assert found.alignment_retained == pytest.approx(0.56)


def test_degenerate_subspace_has_no_angles_but_an_overlap() -> None:
    row = drift(torch.eye(3, dtype=torch.float64), T, k=1)
    assert row.cosines is None
    assert row.terms.metrics().overlap is not None


def test_default_size_is_half_the_energy_or_32() -> None:
    assert subspace_size(torch.tensor([9.0, 4.0, 1.0])) == 1
    assert subspace_size(torch.ones(40)) == 20
    assert subspace_size(torch.ones(4096)) == 32


@pytest.mark.parametrize(
    ("dtype", "relative", "flagged"),
    [
        (torch.bfloat16, 2.0**-10, 1),
        (torch.bfloat16, 2.0**-7, 0),
        (torch.float16, 2.0**-11, 0),
        (torch.float32, 2.0**-10, 0),
    ],
)
def test_differences_below_storage_precision_are_flagged(
    dtype: torch.dtype, relative: float, flagged: int
) -> None:
    reference = torch.full((64, 64), 1.0)
    subject = reference.clone()
    subject[0, 0] += 64 * relative  # norm(reference) = 64
    terms = distance_terms(reference=reference.to(dtype), subject=subject.to(dtype))
    assert terms.metrics().relative_distance == pytest.approx(relative, rel=0.01)
    assert terms.below_storage_precision == flagged


def test_storage_dtype_is_upcast_before_subtracting() -> None:
    reference = torch.tensor([[256.0]], dtype=torch.bfloat16)
    subject = torch.tensor([[1.0078125]], dtype=torch.bfloat16)
    terms = distance_terms(reference=reference, subject=subject)
    assert terms.task == (256.0 - 1.0078125) ** 2
