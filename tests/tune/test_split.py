"""No prompt, and no entity, stands on both sides of the division."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tune_support import tiny_suites

from realign.audit.suites import Item, Suite
from realign.errors import SuiteError
from realign.tune.split import pair_suites, split_suites


def suite(name: str, clusters: list[int | None]) -> Suite:
    items = tuple(
        Item(f"{name}/{i}", f"{name} prompt {i}", cluster=None if c is None else f"c{c}")
        for i, c in enumerate(clusters)
    )
    return Suite(name, "harmful", items)


def units(suites: tuple[Suite, ...]) -> set[str]:
    return {item.cluster or item.id for each in suites for item in each.items}


clusters = st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=12, max_size=40)


@given(first=clusters, second=clusters, share=st.floats(0.3, 0.7), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_clusters_never_cross(
    first: list[int | None], second: list[int | None], share: float, seed: int
) -> None:
    given_suites = (suite("a", first), suite("b", second))
    try:
        split = split_suites(given_suites, share=share, seed=seed)
    except SuiteError:
        return  # too few clusters
    assert not units(split.tuning) & units(split.held_out)
    for each, tuning, held in zip(given_suites, split.tuning, split.held_out, strict=True):
        assert len(tuning.items) + len(held.items) == len(each.items)
    again = split_suites(given_suites, share=share, seed=seed)
    assert [s.suite_hash for s in again.held_out] == [s.suite_hash for s in split.held_out]


def test_sides_have_their_share_and_depend_on_the_seed() -> None:
    suites = tiny_suites(limit=160)
    split = split_suites(suites, share=0.25, seed=0)
    for whole, held in zip(suites, split.held_out, strict=True):
        assert 0.15 <= len(held.items) / len(whole.items) <= 0.35, whole.name
    other = split_suites(suites, share=0.25, seed=1)
    assert units(other.held_out) != units(split.held_out)
    prompts = {item.prompt for each in split.tuning for item in each.items}
    assert not prompts & {item.prompt for each in split.held_out for item in each.items}


def test_a_prompt_that_occurs_twice_is_not_held_out() -> None:
    twice = Suite(
        "a", "safe", tuple(Item(str(i), f"prompt {i % 10}", cluster=f"c{i}") for i in range(20))
    )
    split = split_suites([twice], share=0.5, seed=0)
    tuned = {item.prompt for item in split.tuning[0].items}
    assert split.shared > 0
    assert not tuned & {item.prompt for item in split.held_out[0].items}


def test_one_cluster_cannot_be_divided() -> None:
    with pytest.raises(SuiteError, match="too few clusters"):
        split_suites([suite("a", [1, 1, 1])], share=0.5, seed=0)


def test_final_suites_that_share_prompts_are_refused_with_the_count() -> None:
    a = suite("a", [None] * 6)
    b = Suite("b", "harmful", (*a.items[:2], Item("new", "another prompt")))
    with pytest.raises(SuiteError, match="2 prompts of the final suites"):
        pair_suites([a], [b])
    assert pair_suites([a], [suite("c", [None] * 4)]).shared == 0
