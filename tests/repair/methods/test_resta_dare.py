"""RESTA with DARE on the task or on the safety vector, and what public code gets wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from support.subspace_support import KEY, edit_of, error, layer_of, matrix, repaired
from torch import Tensor

from realign.errors import UsageError
from realign.repair.edit import Layer, Unchanged
from realign.repair.methods.resta import Resta
from realign.repair.preparation import NO_STATISTICS
from realign.subspace.dare import kept_entries


def mask(layer: Layer, rate: float, role: str) -> Tensor:
    return kept_entries(
        layer.finetuned, rate, seed=layer.seed, method="resta", key=layer.key, role=role
    )


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_dare_on_the_task_vector(dtype: torch.dtype, bound: float) -> None:
    """W' = Wa + DARE(delta_task) + gamma delta_safe: the safety vector loses no entry."""
    layer = layer_of((8, 9), seed=1, dtype=dtype)
    method = Resta(gamma=0.4, dare="task", drop_rate=0.3, safety_vector="unaligned")
    f, a, u = (
        t.double() for t in (layer.finetuned, layer.require("aligned"), layer.require("unaligned"))
    )
    kept = mask(layer, 0.3, "task")
    expected = a + torch.where(kept, (f - a) / 0.7, 0.0) + 0.4 * (a - u)
    assert error(edit_of(method, layer), expected - f) <= bound
    assert 0 < int(kept.sum()) < kept.numel()


def test_dare_on_the_safety_vector_leaves_the_task_vector_alone() -> None:
    layer = layer_of((8, 9), seed=1)
    found = edit_of(Resta(gamma=0.4, dare="safety", drop_rate=0.9, safety_vector="base"), layer)
    kept = mask(layer, 0.9, "safety")
    delta = layer.safety_vector("base")
    assert torch.equal(found, torch.where(kept, delta / (1 - 0.9), 0.0) * 0.4)
    assert not torch.equal(kept, mask(layer, 0.9, "task"))


@pytest.mark.parametrize("dare", ["task", "safety"])
def test_a_rate_of_zero_is_plain_resta(dare: str) -> None:
    layer = layer_of((5, 6))
    plain = Resta(gamma=0.4, safety_vector="base")
    none = Resta(gamma=0.4, dare=dare, drop_rate=0.0, safety_vector="base")
    assert torch.equal(edit_of(none, layer), edit_of(plain, layer))
    assert none.linear_edit() == plain.linear_edit() is not None
    assert Resta(dare=dare, safety_vector="base").linear_edit() is None


@pytest.mark.parametrize("dare", ["task", "safety"])
@pytest.mark.parametrize("cuts", [[13], [1, 2, 40], [31, 32, 33]])
def test_chunks_do_not_matter(dare: str, cuts: list[int]) -> None:
    weights = [matrix(71, seed=seed) for seed in range(3)]

    def layer(start: int, stop: int) -> Layer:
        f, a, b = (w[start:stop] for w in weights)
        return Layer(
            key=KEY, module="q_proj", layer=0, finetuned=f, aligned=a, base=b, seed=3, start=start
        )

    method = Resta(dare=dare, drop_rate=0.5, safety_vector="base")
    ends = [0, *cuts, 71]
    parts = [edit_of(method, layer(a, b)) for a, b in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(parts), edit_of(method, layer(0, 71)))


@pytest.mark.parametrize("dare", ["task", "safety"])
def test_the_draw_belongs_to_seed_and_name(dare: str) -> None:
    layer = layer_of((6, 7))
    method = Resta(dare=dare, drop_rate=0.5, safety_vector="base")
    one = edit_of(method, layer)
    assert torch.equal(one, edit_of(method, layer))
    for changed in ({"seed": 1}, {"key": "model.layers.1.self_attn.q_proj.weight"}):
        assert not torch.equal(one, edit_of(method, dataclasses.replace(layer, **changed)))


def test_the_mean_over_many_seeds_is_plain_resta() -> None:
    layer, seeds, rate = layer_of((4, 5)), 600, 0.3
    plain = repaired(Resta(gamma=0.5, safety_vector="base"), layer)
    for dare, vector in (
        ("task", layer.task_vector()),
        ("safety", 0.5 * layer.safety_vector("base")),
    ):
        method = Resta(gamma=0.5, dare=dare, drop_rate=rate, safety_vector="base")
        total = torch.zeros_like(plain)
        for seed in range(seeds):
            total += repaired(method, dataclasses.replace(layer, seed=seed))
        spread = vector.abs() * math.sqrt(rate / (1 - rate) / seeds)
        assert bool(((total / seeds - plain).abs() <= 5 * spread + 1e-12).all())


def test_what_is_no_edit() -> None:
    layer = layer_of((4, 4))
    assert Resta(gamma=0.0, dare="safety", safety_vector="base").edit(
        layer, NO_STATISTICS
    ) == Unchanged("gamma is 0")
    thinned = Resta(gamma=0.0, dare="task", safety_vector="base")
    assert bool(edit_of(thinned, layer).any())  # dropping entries of the task is an edit by itself
    same = dataclasses.replace(layer, finetuned=layer.aligned, base=layer.aligned)
    assert isinstance(Resta(dare="task", safety_vector="base").edit(same, NO_STATISTICS), Unchanged)
    without = dataclasses.replace(layer, base=layer.aligned)
    assert isinstance(
        Resta(dare="safety", safety_vector="base").edit(without, NO_STATISTICS), Unchanged
    )


@pytest.mark.parametrize("rate", [1.0, -0.1, 1.5])
def test_a_rate_that_keeps_nothing_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="drop_rate"):
        Resta(dare="task", drop_rate=rate)


def test_the_vector_is_a_difference_and_by_default_the_papers() -> None:
    """Not gamma times the weights of a safe model, and not aligned - base under its name."""
    assert Resta.paper_vector == "unaligned"
    assert Resta().dare == "none"
    layer = layer_of((4, 4))
    shifted = dataclasses.replace(
        layer,
        **{
            role: layer.require(role) + 5.0  # type: ignore[arg-type]
            for role in ("aligned", "unaligned")
        },
    )
    method = Resta(safety_vector="unaligned")
    assert torch.allclose(edit_of(method, shifted), edit_of(method, layer), atol=1e-12)
