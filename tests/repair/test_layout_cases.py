"""Files, types, ties and vocabularies that differ between the inputs of one repair."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from support.layouts_support import SMALL, make_family, respelled, split_phi3
from support.repair_support import Trio, assert_output, read_folder
from torch import Tensor

from realign.checkpoint.spellings import spelled
from realign.errors import MismatchError
from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest

Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def run(trio: Trio, out: Path, method: str = "resta", **rest: object) -> RepairResult:
    return repair(
        RepairRequest(
            finetuned=trio.finetuned,
            aligned=trio.aligned,
            base=None if method == "wise_ft" else trio.base,
            output=out,
            method=method,
            **rest,  # type: ignore[arg-type]
        )
    )


def rewritten(
    source: Path, target: Path, change: Change, config: Mapping[str, object] | None = None
) -> Path:
    """A copy of a checkpoint with other tensors and, as far as given, another config."""
    target.mkdir(parents=True)
    settings = json.loads((source / "config.json").read_text("utf-8")) | dict(config or {})
    (target / "config.json").write_text(json.dumps(settings), "utf-8")
    tensors = {name: each.contiguous() for name, each in change(read_folder(source)).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def sharded(source: Path, target: Path, sizes: list[int]) -> Path:
    """The same tensors over several files, in an order of its own, with an index."""
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = read_folder(source)
    names = sorted(tensors, key=lambda name: name[::-1])
    weight_map: dict[str, str] = {}
    cuts = [0, *sizes, len(names)]
    for i, (start, stop) in enumerate(pairwise(cuts), start=1):
        file = f"model-{i:05}-of-{len(cuts) - 1:05}.safetensors"
        save_file({n: tensors[n] for n in names[start:stop]}, target / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[start:stop], file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return target


def grown(rows: int, *, seed: int) -> Change:
    """Embeddings and head with more rows."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for name in (EMBEDDINGS, HEAD):
            if name in tensors:
                more = 0.02 * torch.randn(rows, tensors[name].shape[1], generator=generator)
                tensors[name] = torch.cat([tensors[name], more.to(tensors[name].dtype)])
        return tensors

    return change


def retyped(dtype: torch.dtype, *, but: str = "\0") -> Change:
    return lambda tensors: {n: t if but in n else t.to(dtype) for n, t in tensors.items()}


def shapes_on_disk(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - the reader is no mapping
                part = stream.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


@pytest.mark.parametrize("method", ["resta", "delta_svd"])
def test_every_input_in_files_of_its_own(trio_of, tmp_path: Path, method: str) -> None:
    trio: Trio = trio_of("qwen2")
    cut = replace(
        trio,
        base=sharded(trio.base, tmp_path / "base", [3, 11]),
        aligned=sharded(trio.aligned, tmp_path / "aligned", [7]),
        finetuned=sharded(trio.finetuned, tmp_path / "finetuned", [1, 2, 15]),
    )
    run(trio, tmp_path / "whole", method)
    run(cut, tmp_path / "cut", method)
    whole, parts = read_folder(tmp_path / "whole"), read_folder(tmp_path / "cut")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    files = {path.name for path in (tmp_path / "cut").glob("*.safetensors*")}
    assert files == {path.name for path in (cut.finetuned).glob("*.safetensors*")}


@pytest.mark.parametrize("stored", ["finetuned", "aligned", "base"])
def test_tied_embeddings_are_edited_once_whoever_stores_a_copy(
    trio_of, tmp_path: Path, stored: str
) -> None:
    """What counts is what stands in the files: a copy of the embeddings is no head of its own."""
    trio: Trio = trio_of("llama")
    run(trio, tmp_path / "plain", "resta", scope="matrices")
    copied = rewritten(
        getattr(trio, stored),
        tmp_path / stored,
        lambda tensors: tensors | {HEAD: tensors[EMBEDDINGS].clone()},
    )
    done = run(replace(trio, **{stored: copied}), tmp_path / "out", "resta", scope="matrices")
    assert [row.tensor for row in done.rows if "layers" not in row.tensor] == [EMBEDDINGS]
    plain, out = read_folder(tmp_path / "plain"), read_folder(tmp_path / "out")
    assert plain.keys() == out.keys() and HEAD not in out
    assert all(torch.equal(plain[name], out[name]) for name in plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_head_that_left_its_embeddings_is_a_head(trio_of, tmp_path: Path) -> None:
    """The config says tied, the file says otherwise: the file is right, and it is said."""
    trio: Trio = trio_of("qwen2")
    finetuned = rewritten(trio.finetuned, tmp_path / "ft", dict, {"tie_word_embeddings": True})
    done = run(replace(trio, finetuned=finetuned), tmp_path / "out", "resta", scope="matrices")
    edited = {row.tensor for row in done.rows}
    assert {EMBEDDINGS, HEAD} <= edited
    assert any("although the config ties them" in note for note in done.plan.notes)


@pytest.mark.parametrize("method", ["wise_ft", "delta_svd"])
def test_three_vocabularies(trio_of, tmp_path: Path, method: str) -> None:
    """Rows that all share are edited, the fine-tune's own rows stay as they are."""
    trio: Trio = trio_of("qwen2")
    long = Trio(
        base=trio.base,
        aligned=rewritten(trio.aligned, tmp_path / "a", grown(2, seed=1), {"vocab_size": 66}),
        unaligned=trio.unaligned,
        finetuned=rewritten(trio.finetuned, tmp_path / "f", grown(5, seed=2), {"vocab_size": 69}),
    )
    shared = 66 if method == "wise_ft" else 64  # wise_ft does not read the base
    done = run(long, tmp_path / "out", method, scope="matrices")
    out, before = read_folder(tmp_path / "out"), read_folder(long.finetuned)
    for name in (EMBEDDINGS, HEAD):
        assert out[name].shape == (69, 32)
        assert torch.equal(out[name][shared:], before[name][shared:])
        assert not torch.equal(out[name][:shared], before[name][:shared])
        assert any(f"{name}: rows from {shared} on" in note for note in done.plan.notes)
    run(trio, tmp_path / "short", method, scope="matrices")
    short = read_folder(tmp_path / "short")
    for name, tensor in short.items():
        assert torch.equal(out[name][: tensor.shape[0]], tensor) or name in (EMBEDDINGS, HEAD)
    if method == "delta_svd":  # its rows beyond the base are copied: the rest is the same matrix
        assert all(torch.equal(out[n][:64], short[n]) for n in (EMBEDDINGS, HEAD))


def test_a_fine_tune_with_fewer_rows_than_the_others(trio_of, tmp_path: Path) -> None:
    trio: Trio = trio_of("qwen2")
    long = {
        role: rewritten(getattr(trio, role), tmp_path / role, grown(8, seed=3), {"vocab_size": 72})
        for role in ("base", "aligned")
    }
    run(trio, tmp_path / "plain", "resta", scope="matrices")
    run(replace(trio, **long), tmp_path / "out", "resta", scope="matrices")
    plain, out = read_folder(tmp_path / "plain"), read_folder(tmp_path / "out")
    assert all(torch.equal(plain[name], out[name]) for name in plain)


@pytest.mark.parametrize("ours", [torch.float16, torch.bfloat16, torch.float32])
def test_three_types_in_one_repair(trio_of, tmp_path: Path, ours: torch.dtype) -> None:
    """Differences are taken in at least float32, and the output keeps the fine-tune's types."""
    trio: Trio = trio_of("qwen2")
    mixed = replace(
        trio,
        base=rewritten(trio.base, tmp_path / "b", retyped(torch.float16)),
        aligned=rewritten(trio.aligned, tmp_path / "a", retyped(torch.bfloat16, but="mlp")),
        finetuned=rewritten(trio.finetuned, tmp_path / "f", retyped(ours, but="norm")),
    )
    done = run(mixed, tmp_path / "out", "resta", settings={"gamma": 0.3})
    assert shapes_on_disk(tmp_path / "out") == shapes_on_disk(mixed.finetuned)
    base, aligned, finetuned, out = (
        read_folder(each) for each in (mixed.base, mixed.aligned, mixed.finetuned, tmp_path / "out")
    )
    changed = {row.tensor for row in done.rows}
    assert any("down_proj" in name for name in changed)
    for name, tensor in finetuned.items():
        if name in changed:
            edit = 0.3 * (aligned[name].double() - base[name].double())
            assert_output(out[name], tensor, edit)
        else:
            assert torch.equal(out[name], tensor), name
    assert any("differences are taken in float32" in note for note in done.plan.notes)


@pytest.mark.parametrize("side", ["finetuned", "aligned", "base"])
@pytest.mark.parametrize("what", ["missing", "extra"])
def test_a_tensor_on_one_side_is_refused_with_both_checkpoints(
    trio_of, tmp_path: Path, side: str, what: str
) -> None:
    trio: Trio = trio_of("qwen2")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if what == "missing":
            return {name: tensor for name, tensor in tensors.items() if name != Q}
        return tensors | {Q.replace("q_proj", "s_proj"): tensors[Q].clone()}

    odd = replace(trio, **{side: rewritten(getattr(trio, side), tmp_path / "odd", change)})
    with pytest.raises(MismatchError) as caught:
        run(odd, tmp_path / "out")
    message = caught.value.message
    assert (Q if what == "missing" else Q.replace("q_proj", "s_proj")) in message
    assert str(odd.finetuned) in message
    assert str(odd.base if side == "base" else odd.aligned) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_a_phi_that_was_split_into_a_llama_pairs_with_its_parent(tmp_path: Path) -> None:
    trio = make_family(tmp_path / "phi3", "phi3")
    split = respelled(trio, tmp_path / "split", split_phi3)
    config = split.finetuned / "config.json"
    renamed = json.loads(config.read_text("utf-8")) | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    config.write_text(json.dumps(renamed), "utf-8")
    run(replace(trio, finetuned=split.finetuned), tmp_path / "out", "delta_svd")
    run(trio, tmp_path / "whole", "delta_svd")
    out, whole = read_folder(tmp_path / "out"), split_phi3(read_folder(tmp_path / "whole"))
    assert all(torch.equal(out[name], tensor) for name, tensor in whole.items())
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_language_model_taken_out_of_one_that_sees(tmp_path: Path) -> None:
    """Llava as the parent, its Llama alone as the fine-tune; every name differs by its prefix."""
    text = transformers.LlamaConfig(**SMALL, intermediate_size=48)
    eyes = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    seeing = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=eyes, text_config=text)
    )
    seeing.save_pretrained(tmp_path / "aligned")
    model = transformers.LlamaForCausalLM(text)
    model.save_pretrained(tmp_path / "finetuned")
    trio = Trio(tmp_path, tmp_path / "aligned", tmp_path, tmp_path / "finetuned")
    done = run(trio, tmp_path / "out", "wise_ft", settings={"a": 1.0}, scope="all")
    assert any("for images and sound are only in" in note for note in done.plan.notes)
    out = read_folder(tmp_path / "out")
    aligned = {spelled(name): each for name, each in read_folder(tmp_path / "aligned").items()}
    assert set(out) == set(read_folder(tmp_path / "finetuned"))
    for name, tensor in out.items():
        assert torch.equal(tensor, aligned[spelled(name)]), name
