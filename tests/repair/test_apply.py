from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.repair_support import assert_output

from realign.repair import apply
from realign.repair.apply import (
    Effect,
    all_finite,
    apply_edit,
    row_chunks,
    unchanged_effect,
)
from realign.repair.edit import Dense, LowRank


def _random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [0.3, 1.0, 1.7])
def test_low_rank_equals_float64_reference(
    dtype: torch.dtype, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "CHUNK_ELEMENTS", 64)
    w = _random(23, 17, seed=1, scale=0.05).to(dtype)
    edit = LowRank(_random(23, 3, seed=2, scale=0.1), _random(3, 17, seed=3, scale=0.1))
    result, effect = apply_edit(w, edit, strength=strength)
    e = strength * edit.left.double() @ edit.right.double()
    assert result.dtype == dtype
    assert_output(result, w, e)
    r = result.double() - w.double()
    assert effect.numel == w.numel()
    assert effect.changed == int((r != 0).sum())
    assert effect.edit_sq == pytest.approx(float(e.square().sum()), rel=1e-5)
    assert effect.max_edit == pytest.approx(float(e.abs().max()), rel=1e-5)
    assert effect.survival == pytest.approx(float((r * e).sum() / e.square().sum()), rel=1e-4)
    norms = float(e.norm() / w.double().norm())
    assert effect.relative_norm == pytest.approx(norms, rel=1e-5)


def test_the_figures_of_task_and_safety_vectors() -> None:
    w, a, b = (_random(8, 5, seed=seed) for seed in (1, 2, 3))
    e = _random(8, 5, seed=4)
    _, effect = apply_edit(w, Dense(e), strength=1.0, aligned=a, other=b)
    task, safety = (w - a).double(), (a - b).double()
    cosine = float((e.double() * task).sum() / e.double().norm() / task.norm())
    assert effect.cos_task == pytest.approx(cosine, rel=1e-5)
    assert effect.safety_share == pytest.approx(float(e.norm() / safety.norm()), rel=1e-5)
    _, alone = apply_edit(w, Dense(e), strength=1.0)
    assert alone.cos_task is None and alone.safety_share is None


def test_a_target_is_taken_unrounded_at_full_strength_only() -> None:
    target = torch.tensor([[0.1, 1e8]])
    w = torch.tensor([[1e8, 0.1]])
    edit = Dense(target - w, target=target)
    assert torch.equal(apply_edit(w, edit, strength=1.0)[0], target)
    assert not torch.equal(apply_edit(w, Dense(edit.delta), strength=1.0)[0], target)
    assert torch.equal(apply_edit(w, edit, strength=0.5)[0], w + 0.5 * (target - w))


def test_rounding_can_eat_an_edit() -> None:
    # Weights of deviation 0.02 in bfloat16: an edit of 1e-5 is mostly lost, one of 1e-3 is not.
    w = _random(256, 256, seed=1, scale=0.02).to(torch.bfloat16)
    e = _random(256, 256, seed=2)
    small, large = (apply_edit(w, Dense(size * e), strength=1.0)[1] for size in (1e-5, 1e-3))
    assert small.changed < 0.2 * w.numel() and large.changed > 0.9 * w.numel()
    assert small.survival is not None and small.survival < 0.6
    assert large.survival == pytest.approx(1.0, abs=0.01)
    _, gone = apply_edit(
        torch.ones(4, 4, dtype=torch.bfloat16), Dense(1e-6 * e[:4, :4]), strength=1.0
    )
    assert gone.survival == 0.0 and gone.changed == 0 and gone.max_edit > 0


def test_survival_without_an_edit_and_below_float32() -> None:
    w = torch.ones(2, 2)
    assert apply_edit(w, Dense(torch.zeros(2, 2)), strength=1.0)[1].survival is None
    assert apply_edit(w, Dense(torch.full((2, 2), 1e-30)), strength=1.0)[1].survival == 0.0


@given(rows=st.integers(1, 40), columns=st.integers(1, 9), chunk=st.integers(1, 100))
def test_chunks_cover_every_row_once(rows: int, columns: int, chunk: int) -> None:
    seen = [row for start, stop in row_chunks((rows, columns), chunk) for row in range(start, stop)]
    assert seen == list(range(rows))


@given(cut=st.integers(1, 11))
def test_effects_add_up(cut: int) -> None:
    w, a, b, e = (_random(12, 3, seed=seed) for seed in (1, 2, 3, 4))

    def effect(rows: slice) -> Effect:
        edit = Dense(e[rows])
        return apply_edit(w[rows], edit, strength=1.0, aligned=a[rows], other=b[rows])[1]

    parts, whole = effect(slice(0, cut)) + effect(slice(cut, 12)), effect(slice(0, 12))
    for name, value in vars(whole).items():
        assert getattr(parts, name) == pytest.approx(value, rel=1e-5), name


def test_unchanged_rows_count_in_the_norms() -> None:
    w, a = _random(4, 3, seed=1), _random(4, 3, seed=2)
    edited = apply_edit(w[:2], Dense(torch.ones(2, 3)), strength=1.0, aligned=a[:2])[1]
    both = edited + unchanged_effect(w[2:], aligned=a[2:])
    assert both.numel == 12 and both.changed == 6
    assert both.task_sq == pytest.approx(float((w - a).square().sum()), rel=1e-6)
    assert both.edit_task == edited.edit_task


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros(5, 7, dtype=dtype)
    assert all_finite(tensor)
    tensor[3, 2] = bad
    assert not all_finite(tensor)
    assert all_finite(torch.zeros(0)) and all_finite(torch.ones(3, dtype=torch.int64))
