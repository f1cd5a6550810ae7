"""A point of the search is the checkpoint that would be written, and is taken back to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tune_support import FAMILY, tiny_repair

from realign.checkpoint.layouts import original
from realign.checkpoint.reader import open_checkpoint
from realign.model.loading import LoadedModel, load_model
from realign.progress import SILENT
from realign.repair.engine import prepare_statistics, repair
from realign.repair.plan import plan_repair
from realign.repair.request import RepairRequest, open_inputs
from realign.tune.edits import compute_edits
from realign.tune.final import repair_request
from realign.tune.scaled import ScaledModel
from realign.tune.strengths import Strengths, group_layers, strengths_at

SMALL = FAMILY.parent / "small"


@contextmanager
def scaled(request: RepairRequest) -> Iterator[ScaledModel]:
    with open_inputs(request) as inputs:
        plan = plan_repair(request, inputs)
        statistics = prepare_statistics(request, plan, inputs)
        edits = compute_edits(plan, inputs, statistics, progress=SILENT)
        with (
            load_model(original(inputs.finetuned), device="cpu", merge=True) as loaded,
            ScaledModel(loaded, edits) as model,
        ):
            yield model


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


REPAIRS: dict[str, dict[str, Any]] = {
    "low-rank": {},
    "entries": {"method": "resta", "settings": {}},
    "exact target": {"method": "wise_ft", "settings": {}},
    "adapter": {
        "finetuned": SMALL / "lora_p5",
        "aligned": SMALL / "aligned",
        "base": SMALL / "base",
    },
}


@pytest.mark.parametrize("name", REPAIRS)
@pytest.mark.parametrize("strength", [0.35, 1.0])
def test_a_point_is_the_checkpoint_that_is_written(
    name: str, strength: float, tmp_path: Path
) -> None:
    request = tiny_repair(**REPAIRS[name])
    out = tmp_path / "out"
    repair(replace(request, output=out, strength=strength))
    with scaled(request) as model, open_checkpoint(out) as written:
        everywhere = Strengths(dict.fromkeys([*range(8), None], strength))
        before = weights(model.loaded)
        model.apply(everywhere)
        found = model.loaded.model.state_dict()
        for tensor in written.tensors:
            assert torch.equal(found[tensor], written.read(tensor)), tensor
        model.restore()
        after = weights(model.loaded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_layers_have_strengths_of_their_own(tmp_path: Path) -> None:
    request, out = tiny_repair(), tmp_path / "out"
    groups = group_layers([0, 1, 0, 1], 2)
    strengths = strengths_at((0.25, 0.9), groups)
    repair(repair_request(request, strengths, output=out))
    with scaled(request) as model, open_checkpoint(out) as written:
        model.apply(strengths)
        found = model.loaded.model.state_dict()
        for tensor in written.tensors:
            assert torch.equal(found[tensor], written.read(tensor)), tensor


def test_a_point_does_not_depend_on_the_one_before(tmp_path: Path) -> None:
    with scaled(tiny_repair()) as model:
        low, high = (Strengths({0: t, 1: t}) for t in (0.3, 1.4))
        model.apply(low)
        first = weights(model.loaded)
        model.apply(high)
        assert any(not torch.equal(first[k], w) for k, w in weights(model.loaded).items())
        model.apply(low)
        assert all(torch.equal(first[k], w) for k, w in weights(model.loaded).items())
        model.apply(Strengths({0: 0.0, 1: 0.0}))
        zero = weights(model.loaded)
        model.restore()
        assert all(torch.equal(zero[k], w) for k, w in weights(model.loaded).items())


def test_weights_come_back_when_an_error_ends_the_search() -> None:
    with scaled(tiny_repair()) as model:
        before = weights(model.loaded)
        with pytest.raises(ZeroDivisionError), model:
            model.apply(Strengths({0: 1.0, 1: 1.0}))
            raise ZeroDivisionError
        assert all(torch.equal(before[k], w) for k, w in weights(model.loaded).items())


def test_groups_are_neighbours_and_complete() -> None:
    groups = group_layers([3, 0, 1, 2, 4, None, 0], 2)
    assert [g.layers for g in groups] == [(0, 1, 2), (3, 4), (None,)]
    assert [g.layers for g in group_layers([1, 0, None], 1)] == [(0, 1, None)]
