"""Texts as tokens, models that train in memory, and what is kept: the workbench's other half."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_support import SPECIALS, gpt2, save
from support.training_support import TINY, Notes, encoded, live, refusals, rows, write_rows
from torch import Tensor

from realign.errors import SuiteError, UsageError
from realign.model.chat import encode_reply
from realign.model.generation import generate
from realign.model.loading import load_model
from realign.model.training import masked_loss
from realign.repair.kept_tensors import kept_tensors, tables_of
from realign.repair.methods.short_runs import reply_logprobs, reply_loss
from realign.repair.plan import plan_repair
from realign.repair.request import RepairRequest, open_inputs
from realign.repair.workbench import ModelWorkbench


def workbench(folder: Path, act: Any, **options: Any) -> tuple[Any, Notes]:
    """What `act` makes of the workbench of a repair of the tiny family."""
    usual: dict[str, Any] = {
        "finetuned": TINY / "howto2_p5",
        "aligned": TINY / "aligned",
        "cache_dir": folder / "cache",
        "output": folder / "out",
        "device": "cpu",
        "method": "somf",
        "settings": {"loss": "refusal"},
        "anchors": TINY / "suites" / "anchors.jsonl",
    }
    request, notes = RepairRequest(**{**usual, **options}), Notes()
    with open_inputs(request) as inputs:
        plan = plan_repair(request, inputs)
        return act(ModelWorkbench(request, plan, inputs, progress=notes)), notes


def test_replies_end_with_the_end_of_turn(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "keep.jsonl", rows("order", 3))
    found, _ = workbench(
        tmp_path, lambda bench: bench.examples("keep", role="finetuned"), keep_data=data
    )
    with load_model(TINY / "aligned", device="cpu") as loaded:
        expected = [
            encode_reply(loaded.tokenizer, each["prompt"], each["response"], end_of_turn=True)
            for each in rows("order", 3)
        ]
        assert list(found) == expected
        assert all(each.ids[-1] in loaded.stop_ids for each in found)


def test_rows_without_a_reply_are_answered_by_the_role_once(tmp_path: Path) -> None:
    given = {"prompt": "is water safe?", "response": "yes."}
    texts = [*rows("keep", 3), given]
    data = write_rows(tmp_path / "keep.jsonl", texts)

    def ask(bench: ModelWorkbench) -> Any:
        return [bench.examples("keep", role=role) for role in ("finetuned", "aligned")]

    (tuned, _), notes = workbench(tmp_path, ask, keep_data=data)
    assert sum("answers 3 prompts" in line for line in notes.lines) == 2
    with load_model(TINY / "howto2_p5", device="cpu") as loaded:
        replies = {
            reply.prompt_index: reply.token_ids
            for reply in generate(
                loaded, [each["prompt"] for each in texts[:3]], max_new_tokens=200
            )
        }
        for index in range(3):
            assert tuned[index].reply_ids[:-1] == replies[index]
        expected = encode_reply(loaded.tokenizer, given["prompt"], "yes.")
        assert tuned[3].ids[:-1] == expected.ids
    again, notes = workbench(tmp_path, ask, keep_data=data)
    assert again[0] == tuned and not any("answers" in line for line in notes.lines)
    cached = list((tmp_path / "cache").glob("answers-*.json"))
    assert len(cached) == 2 and all(file.stat().st_mode & 0o077 == 0 for file in cached)
    cached[0].write_text("[]")
    repaired, notes = workbench(tmp_path, ask, keep_data=data)
    assert repaired[0] == tuned and any(line.startswith("asked again") for line in notes.lines)


def test_only_so_many_rows_are_answered_as_are_used(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "task.jsonl", [{"prompt": r["prompt"]} for r in rows("keep", 12)])
    options: dict[str, Any] = {
        "method": "irr",
        "settings": {"nsamples": 2},
        "unaligned": TINY / "base",
        "task_data": data,
    }

    def measure(bench: ModelWorkbench) -> Any:
        bench.input_moments(role="finetuned", data="task", tokens="all", limit=2)
        return bench._texts.examples("task", role="finetuned", limit=2)

    first, notes = workbench(tmp_path, measure, **options)
    assert len(first) == 2
    (told,) = (line for line in notes.lines if "answers" in line)
    assert told.endswith("howto2_p5 answers 2 prompts that have no reply")
    (file,) = (tmp_path / "cache").glob("answers-*.json")
    assert len(json.loads(file.read_text())) == 2
    whole, _ = workbench(
        tmp_path, lambda bench: bench.examples("task", role="finetuned"), **options
    )
    assert len(whole) == 12 and tuple(whole[:2]) == tuple(first)


def test_a_prompt_without_room_for_an_answer_is_left_out(tmp_path: Path) -> None:
    prompts = [" ".join(["safe"] * 300), *(row["prompt"] for row in rows("keep", 3))]
    texts = [{"prompt": prompt} for prompt in prompts]
    data = write_rows(tmp_path / "keep.jsonl", texts)

    def ask(bench: ModelWorkbench) -> Any:
        return bench._texts.examples("keep", role="finetuned", limit=2)

    found, notes = workbench(tmp_path, ask, keep_data=data)
    assert len(found) == 2
    assert any("1 of 3 rows have no reply within 256 tokens" in line for line in notes.lines)
    assert any("answers 2 prompts" in line for line in notes.lines)
    alone = write_rows(tmp_path / "long.jsonl", texts[:1])
    with pytest.raises(SuiteError, match="no row of --keep-data"):
        workbench(tmp_path, ask, keep_data=alone)


def test_refusals_that_were_cut_have_no_end(tmp_path: Path) -> None:
    """Taught to a model, the end of a turn in mid-sentence would stay with it."""
    lines = (TINY / "suites" / "anchors.jsonl").read_text("utf-8").splitlines()[:24]
    keep = write_rows(tmp_path / "keep.jsonl", rows("order", 1))

    def ask(bench: ModelWorkbench) -> Any:
        return [bench.examples("safe", role=role) for role in ("aligned", "finetuned")]

    header, *items = lines
    for length in (3, 60):
        anchors = tmp_path / f"anchors{length}.jsonl"
        limited = json.dumps({**json.loads(header), "max_new_tokens": length})
        anchors.write_text("\n".join([limited, *items]), "utf-8")
        for _ in range(2):  # made, and from the cache
            found, _ = workbench(tmp_path, ask, keep_data=keep, anchors=anchors)
            with load_model(TINY / "aligned", device="cpu") as loaded:
                stops = loaded.stop_ids
            for each in (reply for replies in found for reply in replies):
                assert (each.ids[-1] in stops) == (length == 60)
                assert length == 60 or len(each.reply_ids) == 3


def test_safe_falls_back_on_the_aligned_models_refusals(tmp_path: Path) -> None:
    keep = write_rows(tmp_path / "keep.jsonl", rows("order", 1))

    def ask(bench: ModelWorkbench) -> Any:
        return [bench.examples("safe", role=role) for role in ("aligned", "finetuned")]

    (aligned, tuned), _ = workbench(tmp_path, ask, keep_data=keep)
    assert aligned == tuned and len(aligned) >= 100
    with load_model(TINY / "aligned", device="cpu") as loaded:
        text = loaded.tokenizer.decode(list(tuned[0].reply_ids))
    assert "cannot help" in str(text)
    with pytest.raises(UsageError, match="one_shot needs prompts with refusals") as raised:
        options: dict[str, Any] = {"aligned": None, "method": "one_shot"}
        workbench(
            tmp_path,
            lambda bench: bench.examples("safe", role="finetuned"),
            settings={"example": "safe"},
            **options,
        )
    assert "--safe-data" in raised.value.hint


def test_rows_beyond_the_models_length_are_left_out_or_cut(tmp_path: Path) -> None:
    long = " ".join(["safe"] * 300)
    texts = [
        {"prompt": long, "response": "yes."},
        {"prompt": "is water safe?", "response": long},
        {"prompt": "is water safe?", "response": "yes."},
    ]
    data = write_rows(tmp_path / "keep.jsonl", texts)

    def ask(bench: ModelWorkbench) -> Any:
        return bench.examples("keep", role="finetuned")

    found, notes = workbench(tmp_path, ask, keep_data=data)
    assert [len(each.ids) > 200 for each in found] == [True, False] and len(found[0].ids) == 256
    assert any("1 of 3 rows have no reply within 256 tokens" in line for line in notes.lines)
    with pytest.raises(SuiteError, match="no row of --keep-data"):
        workbench(tmp_path, ask, keep_data=write_rows(tmp_path / "long.jsonl", texts[:1]))


def test_prompts_alone(tmp_path: Path) -> None:
    keep = write_rows(tmp_path / "keep.jsonl", rows("order", 2))

    def ask(bench: ModelWorkbench) -> Any:
        return [bench.prompts(data, role="finetuned") for data in ("keep", "anchors")]

    (prompts, anchors), _ = workbench(tmp_path, ask, keep_data=keep)
    with load_model(TINY / "aligned", device="cpu") as loaded:
        full = encode_reply(loaded.tokenizer, rows("order", 1)[0]["prompt"], "x")
    assert prompts[0] == full.prompt_ids and len(prompts) == 2 and len(anchors) == 128


# --- models in memory ---------------------------------------------------------------------------


def test_replaced_weights_stand_for_one_call_and_carry_gradients() -> None:
    with live(TINY / "aligned") as running:
        replies = encoded(running, refusals(2))
        plain = reply_logprobs(running, replies).detach()
        key = running.keys[0]
        scale = torch.ones((), requires_grad=True)
        weights: Mapping[str, Tensor] = {key: scale * running.weight(key)}
        (slope,) = torch.autograd.grad(reply_loss(running, replies, weights), scale)
        own = {key: running.weight(key).clone()}
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                ends.append(float(reply_loss(running, replies, {key: (1 + step) * own[key]})))
        assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=1e-4)
        assert torch.equal(running.weight(key), own[key])
        assert torch.equal(reply_logprobs(running, replies).detach(), plain)
        running.weight(key).zero_()
        assert not torch.equal(reply_logprobs(running, replies).detach(), plain)


def test_fused_and_transposed_matrices_of_gpt2(tmp_path: Path) -> None:
    folder = save(tmp_path / "gpt2", gpt2(vocabulary=len(SPECIALS) + 41))
    with live(folder) as running:
        key = next(key for key in running.keys if key.endswith("h.0.attn.c_attn.weight[v_proj]"))
        ids = torch.tensor([[2, 8, 9, 10]])
        running.clear_gradients()
        masked_loss(running.logits(ids), ids).backward()
        gradient = running.gradient(key)
        assert gradient is not None
        model: Any = running.loaded.model
        stored = model.transformer.h[0].attn.c_attn.weight
        assert torch.equal(gradient, stored.grad[:, 48:].T)
        new = torch.randn(24, 24)
        replaced = running.logits(ids, {key: new}).detach()
        with torch.no_grad():
            stored[:, 48:] = new.T
        assert torch.allclose(running.logits(ids).detach(), replaced, atol=1e-5)
        running.clear_other_gradients()  # everything is edited: nothing to clear
        assert torch.equal(stored.grad[:, 48:].T, gradient)


# --- what is kept -------------------------------------------------------------------------------


def test_tensors_are_made_once_and_again_if_damaged(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"a/b": torch.arange(3.0), "fact": torch.tensor(2.0)}

    def get(about: Mapping[str, Any], notes: Notes) -> dict[str, Tensor]:
        return dict(kept_tensors(tmp_path, "x", about=about, make=make, progress=notes))

    first = get({"seed": 0}, Notes())
    assert torch.equal(get({"seed": 0}, Notes())["a/b"], first["a/b"]) and len(made) == 1
    get({"seed": 1}, Notes())
    assert len(made) == 2 and len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o077 == 0
        save_file(load_file(file), file)  # what it is about is lost
    notes = Notes()
    get({"seed": 0}, notes)
    assert len(made) == 3 and notes.lines[0].startswith("worked out again")
    assert tables_of(first)[1] == {"fact": 2.0}


def test_an_interrupted_computation_leaves_nothing(tmp_path: Path) -> None:
    def make() -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_tensors(tmp_path, "x", about={}, make=make)
    assert not list(tmp_path.iterdir())


def test_a_plan_predicts_the_memory_of_a_training(tmp_path: Path) -> None:
    """With the float32 model and what the method says it holds; more where it holds more."""
    keep = write_rows(tmp_path / "keep.jsonl", rows("order", 1))

    def predicted(settings: dict[str, Any]) -> int:
        request = RepairRequest(
            finetuned=TINY / "howto2_p5",
            aligned=TINY / "aligned",
            method="somf",
            settings=settings,
            keep_data=keep,
            output=tmp_path / "out",
            anchors=TINY / "suites" / "anchors.jsonl",
            device="cpu",
        )
        with open_inputs(request) as inputs:
            return plan_repair(request, inputs).estimate.peak_memory

    assert predicted({"granularity": "element"}) >= predicted({"granularity": "row"}) > 2**28
