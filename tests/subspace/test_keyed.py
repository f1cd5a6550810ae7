"""Draws that belong to entries: chunks, order and roles."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from realign.subspace.keyed import generator, uniforms

KEY: dict[str, Any] = {
    "seed": 3,
    "method": "resta",
    "key": "model.layers.0.mlp.up_proj.weight",
    "role": "dare",
}


@given(start=st.integers(0, 60), count=st.integers(0, 60))
def test_any_chunk_is_a_part_of_the_whole(start: int, count: int) -> None:
    whole = uniforms(120, **KEY)
    assert torch.equal(uniforms(count, start=start, **KEY), whole[start : start + count])


def test_every_part_of_the_key_matters() -> None:
    first = uniforms(16, **KEY)
    for name, other in (("seed", 4), ("method", "x"), ("key", "y"), ("role", "z")):
        changed: dict[str, Any] = {**KEY, name: other}
        assert not torch.equal(uniforms(16, **changed), first), name


def test_draws_are_uniform() -> None:
    drawn = uniforms(100_000, **KEY)
    assert float(drawn.min()) >= 0.0
    assert float(drawn.max()) < 1.0
    # Five standard errors of the mean of U(0, 1).
    assert abs(float(drawn.mean()) - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert torch.equal(torch.from_numpy(generator(**KEY).random(8)), drawn[:8])
