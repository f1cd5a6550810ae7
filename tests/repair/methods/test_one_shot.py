"""Safety at One Shot: hand example, numerical rank, line search, plain AdamW, and real repairs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training_support import (
    DRIFTED,
    TINY,
    encoded,
    live,
    refusals,
    repair_tiny,
    weights_of,
    write_rows,
)

from realign.errors import EmptyEditError, NonFiniteError, UsageError
from realign.model.chat import EncodedReply
from realign.repair.edit import Dense, Layer, LowRank, Unchanged
from realign.repair.method import Given
from realign.repair.methods.one_shot import OneShot
from realign.repair.methods.one_shot_steps import leading_part, line_search
from realign.repair.methods.short_runs import reply_loss
from realign.repair.preparation import NO_STATISTICS, Statistics
from realign.repair.running import LiveModel


@pytest.fixture(scope="module")
def running() -> Iterator[LiveModel]:
    with live(DRIFTED) as model:
        yield model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "safe.jsonl", refusals(4))


def test_hand_example() -> None:
    left, right = leading_part(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    step = 0.1 * (left @ right)
    assert torch.allclose(step, torch.diag(torch.tensor([0.3, 0.2, 0.0])), atol=1e-7)


def test_a_large_k_is_plain_gradient_descent() -> None:
    gradient = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    left, right = leading_part(gradient, 100)
    assert left.shape == (7, 7)
    assert torch.allclose(left @ right, gradient, atol=1e-5)


def test_k_is_cut_at_the_numerical_rank() -> None:
    draw = torch.Generator().manual_seed(1)
    gradient = torch.randn(64, 2, generator=draw) @ torch.randn(2, 96, generator=draw)
    gradient += 1e-7 * torch.randn(64, 96, generator=draw)  # rounding of float32 sums
    left, right = leading_part(gradient, 20)
    assert left.shape[1] == right.shape[0] == 2


def test_prompt_tokens_carry_no_loss(running: LiveModel) -> None:
    (reply,) = encoded(running, refusals(1))
    ids = torch.tensor([reply.ids])
    with torch.no_grad():
        logprobs = running.loaded.model(input_ids=ids).logits[0].log_softmax(-1)
        wanted = [-float(logprobs[at - 1, reply.ids[at]]) for at in range(reply.start, len(ids[0]))]
        found = float(reply_loss(running, [reply]))
    assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    longer = EncodedReply((*reply.prompt_ids, *reply.ids), reply.start + len(reply.prompt_ids))
    with torch.no_grad():  # the same reply after more prompt: as many terms
        both = float(reply_loss(running, [reply, longer]))
        second = float(reply_loss(running, [longer]))
    assert both == pytest.approx((found + second) / 2, rel=1e-4)


def test_the_line_search_falls_or_leaves_the_weights(running: LiveModel) -> None:
    (example,) = encoded(running, refusals(1))
    key = running.keys[0]
    before = running.weight(key).clone()
    with torch.no_grad():
        loss = float(reply_loss(running, [example]))
    running.clear_gradients()
    reply_loss(running, [example]).backward()
    gradient = running.gradient(key)
    assert gradient is not None
    left, right = leading_part(gradient, 5)
    running.clear_gradients()
    for never in (-float("inf"), loss - 1e3):  # no step can fall below
        assert line_search(running, {key: (left, right)}, example, loss=never) == (0.0, never)
        assert torch.equal(running.weight(key), before)
    eta, after = line_search(running, {key: (left, right)}, example, loss=loss)
    assert after < loss and eta > 0
    assert torch.allclose(running.weight(key), before - eta * (left @ right), atol=1e-6)
    running.weight(key).copy_(before)


def test_a_fall_within_rounding_is_none(running: LiveModel) -> None:
    (example,) = encoded(running, refusals(1))
    key = running.keys[0]
    before = running.weight(key).clone()
    nowhere = {key: (torch.zeros(before.shape[0], 1), torch.zeros(1, before.shape[1]))}
    with torch.no_grad():
        loss = float(reply_loss(running, [example]))
    above = loss + 0.5e-6 * max(1.0, loss)
    assert line_search(running, nowhere, example, loss=above) == (0.0, above)
    above = loss + 4e-6 * max(1.0, loss)
    assert line_search(running, nowhere, example, loss=above) == (1.0, pytest.approx(loss))


def broken(folder: Path) -> Path:
    """The drifted model with a norm, which no repair edits, that is not a number."""
    shutil.copytree(DRIFTED, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("mode", ["projected", "sft"])
def test_a_loss_that_is_no_number_is_told(tmp_path: Path, data: Path, mode: str) -> None:
    options = {"finetuned": broken(tmp_path / "broken"), "safe_data": data, "aligned": None}
    with pytest.raises(NonFiniteError, match="the loss on the refusal is nan"):
        repair_tiny("one_shot", tmp_path / "out", settings={"mode": mode}, **options)
    assert not (tmp_path / "out").exists()


def test_edit_reads_what_was_prepared() -> None:
    left, right = torch.ones(8, 1), torch.full((1, 9), 2.0)
    tables = {"left": {"w": left, "z": torch.zeros(8, 0)}, "right": {"w": right}}
    statistics = Statistics(tables=tables)
    layer = Layer(key="w", module="q_proj", layer=0, finetuned=torch.zeros(8, 9))
    edit = OneShot().edit(layer, statistics)
    assert isinstance(edit, LowRank) and torch.equal(edit.dense(), left @ right)
    assert isinstance(OneShot().edit(layer, NO_STATISTICS), Unchanged)
    dense = Statistics(tables={"delta": {"w": torch.ones(8, 9)}})
    assert isinstance(OneShot(mode="sft").edit(layer, dense), Dense)


def test_where_the_example_comes_from() -> None:
    def chosen(*data: str) -> OneShot:
        method = OneShot().settled(Given(frozenset(), data=frozenset(data))).method
        assert isinstance(method, OneShot)
        return method

    assert chosen().example == "generic" and chosen().required_data() == frozenset()
    assert chosen("safe").example == "safe" and chosen("safe").required_data() == {"safe"}


def test_a_vocabulary_that_lacks_the_example_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not know the words") as raised:
        repair_tiny("one_shot", tmp_path / "out", settings={}, aligned=None)
    assert "--safe-data" in raised.value.hint
    assert not (tmp_path / "out").exists()


def test_repairs_the_drifted_model_and_its_bytes_repeat(tmp_path: Path, data: Path) -> None:
    outputs = [tmp_path / name for name in ("one", "two")]
    results = [
        repair_tiny("one_shot", out, settings={"rounds": 3}, safe_data=data, aligned=None)
        for out in outputs
    ]
    assert weights_of(outputs[0]) == weights_of(outputs[1])
    facts = results[0].manifest["method_facts"]
    assert facts["loss_after"] < facts["loss_before"] and 1 <= facts["rounds"] <= 3
    with live(outputs[0]) as repaired, torch.no_grad():
        (example,) = encoded(repaired, refusals(1))
        assert float(reply_loss(repaired, [example])) == pytest.approx(
            facts["loss_after"], rel=1e-3
        )


def test_no_steps_are_no_repair(tmp_path: Path, data: Path) -> None:
    for settings in ({"rounds": 0}, {"mode": "sft", "epochs": 0}):
        with pytest.raises(EmptyEditError):
            repair_tiny("one_shot", tmp_path / "out", settings=settings, safe_data=data)
        assert not (tmp_path / "out").exists()


def test_sft_is_adamw_on_one_example(tmp_path: Path, data: Path) -> None:
    settings = {"mode": "sft", "epochs": 2, "lr": 1e-3}
    repair_tiny("one_shot", tmp_path / "out", settings=settings, safe_data=data)
    with live(DRIFTED) as plain, live(tmp_path / "out") as repaired:
        (example,) = encoded(plain, refusals(1))
        ids = torch.tensor([example.ids])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < example.start, -100)
        weights = plain.parameters()
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            plain.loaded.model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        for key in plain.keys:
            assert torch.allclose(plain.weight(key), repaired.weight(key), atol=2e-6)


def test_the_anchors_with_the_aligned_models_refusals(tmp_path: Path) -> None:
    settings = {"example": "safe", "rounds": 1}
    anchors = TINY / "suites" / "anchors.jsonl"
    result = repair_tiny("one_shot", tmp_path / "out", settings=settings, anchors=anchors)
    assert result.manifest["method_facts"]["rounds"] == 1
