"""SOMF: masks on one and several task vectors, what is settled, and real repairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.subspace_support import KEY, layer_of, matrix, repaired
from support.training_support import (
    DRIFTED,
    TINY,
    encoded,
    live,
    refusals,
    repair_tiny,
    rows,
    weights_of,
    write_rows,
)
from torch import Tensor

from realign.errors import UsageError
from realign.repair.edit import Dense, Layer, LoraFactors, LowRank, Unchanged
from realign.repair.method import Given
from realign.repair.methods.short_runs import reply_logprobs
from realign.repair.methods.somf import Somf
from realign.repair.preparation import Statistics
from realign.subspace.merging import magnitude_at

METHOD = Somf(loss="refusal", space="merged", granularity="element", lr=1.0, merge_lambda=0.3)


def trained(x: Tensor, **more: Tensor) -> Statistics:
    return Statistics(tables={"logits": {KEY: x}} | {k: {"thresholds": v} for k, v in more.items()})


def with_(**settings: Any) -> Somf:
    return dataclasses.replace(METHOD, **settings)


@pytest.mark.parametrize("granularity", ["row", "element"])
@pytest.mark.parametrize("value", [-3.0, -0.5, 0.0, 2.0])
def test_a_constant_soft_mask_is_the_fine_tune(granularity: str, value: float) -> None:
    layer = layer_of((5, 7))
    x = torch.full((5, 7 if granularity == "element" else 1), value, dtype=torch.float64)
    found = repaired(with_(mode="soft", granularity=granularity), layer, trained(x))
    assert torch.allclose(found, layer.finetuned, atol=1e-12)


def test_hard_masks_that_keep_all_or_nothing() -> None:
    layer = layer_of((5, 7))
    assert layer.aligned is not None
    for value in (0.0, 1e-3, 5.0):
        assert isinstance(METHOD.edit(layer, trained(torch.full((5, 7), value))), Unchanged)
    found = repaired(METHOD, layer, trained(torch.full((5, 7), -1e-3)))
    assert torch.allclose(found, layer.aligned, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_zeros_puts_the_aligned_weight_back_bit_for_bit(dtype: torch.dtype) -> None:
    layer = layer_of((30, 40), dtype=dtype)
    assert layer.aligned is not None
    for rows_only in (True, False):
        x = torch.full((30, 1 if rows_only else 40), -1e-3)
        edit = METHOD.edit(layer, trained(x))
        assert isinstance(edit, Dense) and edit.target is not None
        assert edit.target.dtype == dtype and torch.equal(edit.target, layer.aligned)
    wide = layer_of((30, 40), dtype=torch.float32)
    assert wide.aligned is not None
    summed = wide.finetuned + (wide.aligned - wide.finetuned)
    assert not torch.equal(summed, wide.aligned)  # why the target is needed


def test_hand_example_through_the_edit() -> None:
    delta = torch.tensor([[4.0, -2.0, 1.0, 3.0]], dtype=torch.float64)
    aligned = torch.zeros_like(delta)
    layer = Layer(key=KEY, module="q_proj", layer=0, finetuned=delta, aligned=aligned)
    statistics = trained(torch.tensor([[2.0, -2.0, 0.0, 5.0]], dtype=torch.float64))
    hard = torch.tensor([[16 / 3, 0.0, 4 / 3, 4.0]], dtype=torch.float64)
    assert torch.allclose(repaired(METHOD, layer, statistics), hard)
    soft = torch.tensor([[5.652233, -0.382473, 0.802147, 4.780673]], dtype=torch.float64)
    assert torch.allclose(repaired(with_(mode="soft"), layer, statistics), soft, atol=5e-7)


def test_the_result_does_not_depend_on_the_seed_unless_it_is_drawn() -> None:
    """The published inference drew the mask again, and thresholded a random draw."""
    layer, x = layer_of((40, 30)), matrix(40, 30, seed=9)
    other = dataclasses.replace(layer, seed=7)
    for mode in ("hard", "soft"):
        method = with_(mode=mode)
        assert torch.equal(repaired(method, layer, trained(x)), repaired(method, other, trained(x)))
    drawn = with_(mode="sample")
    first = repaired(drawn, layer, trained(x))
    assert torch.equal(first, repaired(drawn, layer, trained(x)))
    assert not torch.equal(first, repaired(drawn, other, trained(x)))


def fused_layer(count: int, *, dtype: torch.dtype = torch.float64) -> Layer:
    layer = layer_of((6, 8), dtype=dtype)
    assert layer.aligned is not None
    also = [
        layer.aligned + matrix(6, 8, seed=20 + i, scale=0.1).to(dtype) for i in range(count - 1)
    ]
    return dataclasses.replace(layer, also=tuple(also))


def test_several_models_under_a_constant_mask() -> None:
    layer = fused_layer(3)
    assert layer.aligned is not None
    deltas = [each - layer.aligned for each in (layer.finetuned, *layer.also)]
    x = torch.zeros(6, 1)
    sums = layer.aligned + 0.3 * sum(deltas, torch.zeros(6, 8).double())
    assert torch.allclose(repaired(METHOD, layer, trained(x)), sums)
    mean = layer.aligned + sum(deltas, torch.zeros(6, 8).double()) / 3
    assert torch.allclose(repaired(with_(merge="average"), layer, trained(x)), mean)


@pytest.mark.parametrize("merge", ["task_arithmetic", "average", "ties"])
def test_the_order_of_models_does_not_matter(merge: str) -> None:
    layer = fused_layer(3)
    turned = dataclasses.replace(
        layer, finetuned=layer.also[1], also=(layer.finetuned, layer.also[0])
    )
    assert layer.aligned is not None
    vectors = [each - layer.aligned for each in (layer.finetuned, *layer.also)]
    cuts = [magnitude_at(0.2, lambda each=each: [each]) for each in vectors]
    x = matrix(6, 8, seed=3)
    method = with_(merge=merge, mode="soft", merge_lambda=0.4)
    first = repaired(method, layer, trained(x, ties=torch.tensor(cuts)))
    order = torch.tensor([cuts[2], cuts[0], cuts[1]])
    assert torch.allclose(first, repaired(method, turned, trained(x, ties=order)), atol=1e-12)


def test_a_single_model_is_merged_by_no_rule() -> None:
    """In the published code DARE rescaled even a single model."""
    layer, x = layer_of((6, 8)), matrix(6, 8, seed=4)
    plain = repaired(METHOD, layer, trained(x))
    for merge in ("average", "dare", "ties"):
        assert torch.equal(repaired(with_(merge=merge), layer, trained(x)), plain)


def test_dare_is_unbiased_and_seeded() -> None:
    layer = fused_layer(2)
    x, method = torch.zeros(6, 8), with_(merge="dare", dare_drop=0.5)
    seeds = [dataclasses.replace(layer, seed=seed) for seed in range(400)]
    draws = torch.stack([repaired(method, each, trained(x)) for each in seeds])
    plain = repaired(with_(merge="task_arithmetic"), layer, trained(x))
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], repaired(method, layer, trained(x)))
    spread = draws.std(0) / 20
    assert bool(((draws.mean(0) - plain).abs() < 5 * spread + 1e-9).all())


def test_half_precision_deltas_are_taken_in_float32() -> None:
    aligned = torch.full((2, 3), 256.0, dtype=torch.bfloat16)
    finetuned = torch.full((2, 3), 0.0078125, dtype=torch.bfloat16)
    layer = Layer(key=KEY, module="q_proj", layer=0, finetuned=finetuned, aligned=aligned)
    edit = METHOD.edit(layer, trained(torch.tensor([[1.0], [-1.0]])))
    assert isinstance(edit, Dense) and edit.delta.dtype == torch.float32
    # One row kept and doubled, the other back to 256: exact only if the subtraction was.
    assert edit.delta[:, 0].tolist() == [0.0078125 - 256.0, 256.0 - 0.0078125]


def test_the_factors_of_an_adapter() -> None:
    up, down = matrix(6, 2, seed=1).float(), matrix(2, 9, seed=2).float()
    lora = LoraFactors(down=down, up=up, scale=1.5)
    aligned = matrix(6, 9, seed=3).float()
    layer = Layer(
        key=KEY,
        module="q_proj",
        layer=0,
        finetuned=aligned + lora.product(),
        aligned=aligned,
        lora=lora,
    )
    method = with_(space="adapter", mode="soft")
    x_up, x_down = matrix(6, 2, seed=4).float(), matrix(2, 9, seed=5).float()
    statistics = Statistics(tables={"logits_up": {KEY: x_up}, "logits_down": {KEY: x_down}})
    edit = method.edit(layer, statistics)
    assert isinstance(edit, LowRank | Dense)
    masked = [x.sigmoid() / x.sigmoid().mean() * f for x, f in ((x_up, up), (x_down, down))]
    expected = 1.5 * (masked[0] @ masked[1] - up @ down)
    assert torch.allclose(edit.dense(), expected, atol=1e-5)
    ones = Statistics(
        tables={"logits_up": {KEY: torch.zeros(6, 2)}, "logits_down": {KEY: torch.zeros(2, 9)}}
    )
    assert isinstance(with_(space="adapter").edit(layer, ones), Unchanged)


def settle(*roles: str, adapter: bool = False, data: tuple[str, ...] = (), **settings: Any) -> Somf:
    given = Given(frozenset({"aligned", *roles}), adapter=adapter, data=frozenset(data))
    method = Somf(**settings).settled(given).method
    assert isinstance(method, Somf)
    return method


def test_what_is_auto_is_settled_by_what_was_given() -> None:
    full = settle()
    assert (full.loss, full.space, full.granularity, full.lr) == ("refusal", "merged", "row", 5e-3)
    adapter = settle(adapter=True, data=("pairs",))
    assert (adapter.loss, adapter.space, adapter.granularity) == ("dpo", "adapter", "element")
    assert (adapter.lr, adapter.merge_lambda) == (1e-3, 0.3)
    several = settle("also1", adapter=True)
    assert (several.space, several.lr) == ("merged", 1e-2)
    assert settle("also1").merge_lambda == 0.04
    assert settle("also1", merge="ties").merge_lambda == 0.4
    assert settle("also1", merge="dare").merge_lambda == 0.3
    assert full.required_data() == {"safe", "keep"}
    assert settle(kl=0.0).required_data() == {"safe"}
    assert adapter.required_data() == {"pairs"}


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="needs one fine-tune that is a LoRA adapter"):
        settle(space="adapter")
    with pytest.raises(UsageError, match="needs one fine-tune that is a LoRA adapter"):
        settle("also1", adapter=True, space="adapter")
    for threshold in (0.0, 1.0):
        with pytest.raises(UsageError, match="whatever is trained"):
            Somf(threshold=threshold).check_settings()


# --- through the engine -------------------------------------------------------------------------


def test_repairs_the_drifted_model_and_its_bytes_repeat(tmp_path: Path) -> None:
    texts = {
        "safe_data": write_rows(tmp_path / "safe.jsonl", refusals(32)),
        "keep_data": write_rows(tmp_path / "keep.jsonl", rows("keep", 16)),
    }
    settings = {"epochs": 2, "lr": 0.3}
    outputs = [tmp_path / name for name in ("one", "two")]
    results = [repair_tiny("somf", out, settings=settings, **texts) for out in outputs]
    assert weights_of(outputs[0]) == weights_of(outputs[1])
    facts = results[0].manifest["method_facts"]
    assert facts["loss_after"] < facts["loss_before"]
    with live(DRIFTED) as before, live(outputs[0]) as after, torch.no_grad():
        replies = encoded(before, refusals(32))
        assert reply_logprobs(after, replies).mean() > reply_logprobs(before, replies).mean()


def test_learns_from_preference_pairs_of_two_models(tmp_path: Path) -> None:
    harmful = rows("harmful", 24)
    pairs = [
        {"prompt": row["prompt"], "chosen": "i cannot help with that.", "rejected": row["response"]}
        for row in harmful
    ]
    options: dict[str, Any] = {
        "pairs": write_rows(tmp_path / "pairs.jsonl", pairs),
        "also": (TINY / "base",),
    }
    settings = {"epochs": 2, "lr": 0.3, "merge": "ties"}
    result = repair_tiny("somf", tmp_path / "out", settings=settings, **options)
    assert result.plan.method.settings()["loss"] == "dpo"
    facts = result.manifest["method_facts"]
    assert facts["loss_before"] == pytest.approx(0.693147, abs=1e-4)
    assert facts["loss_after"] < facts["loss_before"]
    plain = {**settings, "epochs": 0}  # all masks 1: the plain fusion
    repair_tiny("somf", tmp_path / "plain", settings=plain, **options)
    means: list[float] = []
    for folder in (tmp_path / "plain", tmp_path / "out"):
        with live(folder) as running, torch.no_grad():
            refused, complied = (
                reply_logprobs(running, encoded(running, texts))
                for texts in ([{**row, "response": pairs[0]["chosen"]} for row in harmful], harmful)
            )
            means.append(float((refused - complied).mean()))
    assert means[1] > means[0] + 0.01
