from __future__ import annotations

import pytest
import torch
from support.subspace_support import edit_of, layer_of

from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.methods.null_control import DeltaSvdNull, ReplaceNull
from realign.repair.methods.replace import Replace
from realign.repair.registry import METHODS


def test_controls_are_not_offered() -> None:
    assert not {"replace_null", "delta_svd_null"} & set(METHODS)


@pytest.mark.parametrize("shape", [(20, 20), (12, 30), (30, 12)])
def test_delta_svd_control_has_the_same_singular_values(shape: tuple[int, int]) -> None:
    layer = layer_of(shape)
    real = edit_of(DeltaSvd(rank=4, alpha1=2.0, safety_vector="base"), layer)
    null = edit_of(DeltaSvdNull(rank=4, alpha1=2.0, safety_vector="base"), layer)
    assert torch.allclose(torch.linalg.svdvals(null)[:4], torch.linalg.svdvals(real)[:4], rtol=1e-9)
    assert abs(float((null * real).sum() / null.norm() / real.norm())) < 0.3


@pytest.mark.parametrize("side", ["both", "left", "right"])
def test_replace_control_restores_a_random_subspace_of_the_same_size(side: str) -> None:
    layer = layer_of((20, 30))
    assert layer.aligned is not None
    real = edit_of(Replace(side=side, rank=3), layer)
    null = edit_of(ReplaceNull(side=side, rank=3), layer)
    assert torch.linalg.matrix_rank(null) == torch.linalg.matrix_rank(real)
    assert not torch.allclose(null, real)
    # It is still a projection of the drift: E and what is left of it are orthogonal.
    rest = (layer.aligned - layer.finetuned) - null
    assert abs(float((rest * null).sum())) < 1e-9


def test_controls_are_seeded_and_differ_between_layers() -> None:
    layer = layer_of((10, 10))
    one, again = (edit_of(ReplaceNull(rank=2), layer) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, edit_of(ReplaceNull(rank=2, null_seed=1), layer))
