"""RESTA through the engine: buffers of old files, adapters as the unaligned model, and DARE."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.adapter_support import tune, with_adapter
from support.repair_support import SMALL, Trio, drift, make_trio, read_folder

from realign.errors import EmptyEditError
from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest
from realign.subspace.dare import kept_entries


def run(trio: Trio, out: Path, **request: object) -> RepairResult:
    given = {"finetuned": trio.finetuned, "aligned": trio.aligned, "unaligned": trio.unaligned}
    return repair(RepairRequest(output=out, method="resta", device="cpu", **{**given, **request}))


def test_buffers_of_old_files_are_copied_and_break_nothing(tmp_path: Path) -> None:
    """Llama-2 files hold rotary_emb.inv_freq; those of a newer save do not."""
    trio = make_trio(tmp_path, "llama")
    run(trio, tmp_path / "plain")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for role in ("finetuned", "unaligned"):
        folder: Path = getattr(trio, role)
        stored = {**read_folder(folder), name: torch.arange(4).float()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    run(trio, tmp_path / "old")
    plain, old = read_folder(tmp_path / "plain"), read_folder(tmp_path / "old")
    assert torch.equal(old.pop(name), torch.arange(4).float())
    assert old.keys() == plain.keys()
    for key, tensor in plain.items():
        assert torch.equal(old[key], tensor), key


def test_an_unaligned_adapter_is_a_difference_of_weights(tmp_path: Path) -> None:
    """Wu = Wa + s B A gives W' = Wf - gamma s B A; a baseline adds gamma times A and B instead."""
    trio = make_trio(tmp_path, "qwen2")
    unaligned = tune(
        trio.aligned, tmp_path / "adapter", r=2, lora_alpha=5, target_modules=["q_proj"]
    )
    result = run(trio, tmp_path / "out", unaligned=unaligned, settings={"gamma": 0.4})
    out, finetuned = read_folder(tmp_path / "out"), read_folder(trio.finetuned)
    aligned = read_folder(trio.aligned)
    merged = with_adapter(trio.aligned, unaligned).merge_and_unload().state_dict()
    for name, tensor in finetuned.items():
        expected = tensor + 0.4 * (aligned[name] - merged[name])
        assert torch.allclose(out[name], expected, rtol=0, atol=1e-7), name
    unmoved = {row.reason for row in result.rows if row.outcome == "unchanged"}
    assert unmoved == {"safety vector is zero"}
    assert {row.module for row in result.rows if row.outcome == "edited"} == {"q_proj"}


def test_the_draw_of_a_tensor_that_comes_in_many_chunks(tmp_path: Path) -> None:
    """2.5 MB are read in pieces and edited in parts of those: the mask is that of the whole."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 20000}, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = {name: each.detach().clone() for name, each in model.state_dict().items()}
    for seed, role in enumerate(("aligned", "unaligned", "finetuned")):
        model.load_state_dict(drift(state, seed=seed, size=0.02))
        model.save_pretrained(tmp_path / role)
    trio = Trio(tmp_path, *(tmp_path / role for role in ("aligned", "unaligned", "finetuned")))
    run(trio, tmp_path / "out", settings={"dare": "task", "drop_rate": 0.5, "gamma": 0.0}, seed=3)
    name = "model.embed_tokens.weight"
    out, finetuned, aligned = (
        read_folder(folder)[name].double()
        for folder in (tmp_path / "out", trio.finetuned, trio.aligned)
    )
    kept = kept_entries(out, 0.5, seed=3, method="resta", key=name, role="task")
    expected = aligned + torch.where(kept, 2 * (finetuned - aligned), 0.0)
    assert torch.allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dare", ["task", "safety"])
def test_the_draw_is_that_of_the_run(tmp_path: Path, trio_of, dare: str) -> None:
    """One seed, one result, whatever the number of threads; another seed, another result."""
    trio = trio_of("llama")
    settings = {"dare": dare, "drop_rate": 0.5}
    outs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(trio, tmp_path / name, settings=settings, seed=seed)
        outs.append(read_folder(tmp_path / name)["model.norm.weight"])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_nothing_added_and_nothing_dropped_fails_as_a_no_op(tmp_path: Path, trio_of) -> None:
    settings = {"gamma": 0.0, "dare": "task", "drop_rate": 0.0}
    with pytest.raises(EmptyEditError):
        run(trio_of("llama"), tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_there_and_back_again(tmp_path: Path) -> None:
    """+gamma, then the same vector with the other sign, is the fine-tune up to rounding."""
    trio = make_trio(tmp_path, "llama")
    settings = {"gamma": 0.5, "safety_vector": "unaligned"}
    run(trio, tmp_path / "there", settings=settings)
    shutil.copytree(tmp_path / "there", tmp_path / "again")
    run(
        trio,
        tmp_path / "back",
        finetuned=tmp_path / "again",
        aligned=trio.unaligned,
        unaligned=trio.aligned,
        settings=settings,
        force=True,
    )
    there, back = read_folder(tmp_path / "there"), read_folder(tmp_path / "back")
    for name, tensor in read_folder(trio.finetuned).items():
        assert torch.allclose(back[name], tensor, rtol=0, atol=1e-6), name
        assert not torch.equal(there[name], tensor), name
