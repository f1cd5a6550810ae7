"""Two teachers: the edit stays in its subspace, both teachers are listened to, no labels needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tune_support import two_teachers_request

from realign.repair.edit import Layer, LowRank, Unchanged
from realign.repair.engine import prepare_statistics
from realign.repair.layers import read_layers
from realign.repair.methods.two_teachers import TwoTeachers
from realign.repair.methods.two_teachers_texts import exchanged
from realign.repair.plan import plan_repair
from realign.repair.preparation import Statistics
from realign.repair.request import RepairRequest, open_inputs
from realign.subspace.spectrum import top_triplets


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> RepairRequest:
    return two_teachers_request(tmp_path_factory.mktemp("two-teachers"))


@pytest.fixture(scope="module")
def learnt(request_: RepairRequest) -> Statistics:
    with open_inputs(request_) as inputs:
        return prepare_statistics(request_, plan_repair(request_, inputs), inputs)


def test_the_edit_stays_in_the_subspace(request_: RepairRequest, learnt: Statistics) -> None:
    with open_inputs(request_) as inputs:
        plan = plan_repair(request_, inputs)
        for slot, layer in read_layers(plan, inputs):
            edit = plan.method.edit(layer, learnt)
            assert isinstance(edit, LowRank) and edit.rank == 6, slot.key
            top = top_triplets(layer.safety_vector("base"), 3)
            u, r, e = top.u.double(), top.v.double(), edit.dense().double()
            outside = e - u @ (u.T @ e)
            outside = outside - (outside @ r) @ r.T
            assert float(e.norm()) > 0
            assert float(outside.norm()) <= 1e-5 * float(e.norm()), slot.key


def test_both_teachers_are_followed(learnt: Statistics) -> None:
    facts = {name: float(value or 0.0) for name, value in learnt.facts.items()}
    assert facts["anchor_kl_before"] > 0.1
    assert facts["anchor_kl_after"] < 0.5 * facts["anchor_kl_before"]
    # The fine-tune is its own student at first, and is hardly left.
    assert abs(facts["keep_kl_before"]) < 1e-5
    assert facts["keep_kl_after"] < 0.2 * facts["anchor_kl_before"]


def test_without_the_second_teacher_the_fine_tune_is_left_farther(
    request_: RepairRequest, learnt: Statistics
) -> None:
    settings = {**dict(request_.settings), "keep_weight": 0.0}
    alone = replace(request_, settings=settings)
    with open_inputs(alone) as inputs:
        found = prepare_statistics(alone, plan_repair(alone, inputs), inputs)
    assert float(found.facts["keep_kl_after"] or 0) > float(learnt.facts["keep_kl_after"] or 0)


def test_each_teacher_has_prompts_of_its_own(request_: RepairRequest, learnt: Statistics) -> None:
    # 32 prompts of the task, as many with a token exchanged, and what was written and not refused.
    assert 64 < float(learnt.facts["keep_texts"] or 0) <= 64 + 24
    alone = replace(request_, settings={**dict(request_.settings), "self_prompts": 0, "steps": 1})
    with open_inputs(alone) as inputs:
        found = prepare_statistics(alone, plan_repair(alone, inputs), inputs)
    assert float(found.facts["keep_texts"] or 0) == 64
    written = float(learnt.facts["keep_texts"] or 0) - 64
    told = float(learnt.facts["anchor_texts"] or 0) - float(found.facts["anchor_texts"] or 0)
    assert told + written == 24


def test_an_exchanged_prompt_differs_in_one_token_of_the_users_text() -> None:
    prompts = [(1, 5, 6, 7, 2, 3), (1, 8, 2, 3), (1, 2, 3)]
    pool = [(1, 40, 41, 2, 3)]
    mixed = exchanged(prompts, pool, frame=(1, 2), drawn=np.random.default_rng(0))
    assert len(mixed) == 2  # the third has no text to exchange
    for before, after in zip(prompts, mixed, strict=False):
        changed = [
            at for at, pair in enumerate(zip(before, after, strict=True)) if len({*pair}) > 1
        ]
        assert len(changed) == 1 and after[changed[0]] in {40, 41}
        assert 1 <= changed[0] < before.index(2)


def test_a_matrix_that_alignment_left_alone_is_left_alone() -> None:
    layer = Layer(key="x", module="q_proj", layer=0, finetuned=torch.ones(4, 4))
    assert isinstance(TwoTeachers().edit(layer, Statistics()), Unchanged)


def test_factors_give_their_product() -> None:
    left, right = torch.randn(8, 2), torch.randn(2, 8)
    layer = Layer(key="x", module="q_proj", layer=0, finetuned=torch.ones(8, 8))
    found = TwoTeachers().edit(
        layer, Statistics(tables={"left": {"x": left}, "right": {"x": right}})
    )
    assert isinstance(found, LowRank)
    torch.testing.assert_close(found.dense(), left @ right)
