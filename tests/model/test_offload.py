"""Models read block by block against the same models in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.block_support import CONFIGS, block_model
from support.model_support import word_tokenizer

from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.slots import slot_shape, slots_of
from realign.errors import ModelError
from realign.model.chat import EncodedReply
from realign.model.generation import generate
from realign.model.gradients import collect_gradients
from realign.model.growing_file import GrowingFile
from realign.model.loading import LoadedModel, load_model
from realign.model.moments import MomentRequest, collect_moments, token_sequence
from realign.model.slot_views import SlotViews

TEXTS = [
    EncodedReply(tuple(4 + (5 * i + 3 * j) % 40 for j in range(length)), 3)
    for i, length in enumerate([9, 5, 12, 7, 7])
]


def _saved(folder: Path, arch: str, dtype: torch.dtype = torch.float32) -> Path:
    block_model(arch).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    word_tokenizer().save_pretrained(folder)
    return folder


def _gradients(loaded: LoadedModel, folder: Path, to: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        slots = {
            slot.key: slot
            for name, info in checkpoint.tensors.items()
            for slot in slots_of(checkpoint, name)
            if len(info.shape) >= 2 and slot.layer is not None and "conv" not in name
        }
        shapes = {k: slot_shape(checkpoint.tensors[s.tensor].shape, s) for k, s in slots.items()}
    views = SlotViews(loaded.model, slots, shapes=shapes)
    with GrowingFile(to) as sink:
        collect_gradients(loaded, TEXTS, views=views, keys=views.keys, kind="fisher", sink=sink)
        sink.finish({})
    return load_file(to)


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = float(expected.abs().max())
    return bool((found - expected).abs().max() <= 1e-4 * scale)


@pytest.mark.parametrize("arch", CONFIGS)
def test_everything_is_as_in_memory(arch: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", arch)
    whole = load_model(folder, device="cpu")
    apart = load_model(folder, device="cpu", offload=True)
    assert apart.offloaded
    assert (apart.stop_ids, apart.dtype, apart.device) == (
        whole.stop_ids,
        whole.dtype,
        whole.device,
    )
    ids = torch.tensor([TEXTS[0].ids])
    with torch.no_grad(), apart.held_weights():
        found, expected = apart.model(ids).logits, whole.model(ids).logits
        for name, value in whole.model.state_dict().items():
            assert torch.equal(apart.model.state_dict()[name], value), name
    assert _close(found, expected)  # where numbers lie in memory decides how they are summed
    asked: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 9}
    prompts = ["w1 w2", "w3"]
    assert list(generate(apart, prompts, **asked)) == list(generate(whole, prompts, **asked))
    paths = [
        name
        for name, module in whole.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    requests = {path: MomentRequest("input", path) for path in paths}
    sequences = [token_sequence(each.prompt_ids, each.reply_ids) for each in TEXTS]
    one, two = (
        collect_moments(each, sequences, requests=requests, batch_size=2) for each in (whole, apart)
    )
    assert one.missing == two.missing
    assert one.keys() == two.keys()
    assert all(_close(two[key].s2, one[key].s2) for key in one)
    first = _gradients(whole, folder, tmp_path / "one.safetensors")
    second = _gradients(apart, folder, tmp_path / "two.safetensors")
    assert first.keys() == second.keys()
    assert all(_close(second[key], value) for key, value in first.items())
    weights = [p for name, p in apart.model.named_parameters() if ".layers." in f".{name}"]
    assert all(parameter.is_meta for parameter in weights), "nothing stays"


def test_only_one_block_is_in_place_at_a_time(tmp_path: Path) -> None:
    loaded = load_model(_saved(tmp_path, "llama"), device="cpu", offload=True)
    layers: Any = loaded.model.get_submodule("model.layers")
    seen: list[int] = []

    def look(*_: Any) -> None:
        here = [not next(layer.parameters()).is_meta for layer in layers]
        seen.append(sum(here))

    for layer in layers:
        layer.mlp.register_forward_pre_hook(look)
    sequences = [token_sequence(each.prompt_ids, each.reply_ids) for each in TEXTS]
    path = "model.layers.1.mlp.down_proj"
    found = collect_moments(
        loaded, sequences, requests={"x": MomentRequest("input", path)}, batch_size=2
    )
    assert found["x"].n == sum(len(each.reply_ids) for each in TEXTS)
    assert seen
    assert set(seen) == {1}


def test_a_half_precision_model_keeps_its_dtype(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "gemma2 (windows)", torch.bfloat16)
    whole = load_model(folder, device="cpu")
    apart = load_model(folder, device="cpu", offload=True)
    ids = torch.tensor([TEXTS[1].ids])
    with torch.no_grad():
        one, two = whole.model(ids).logits, apart.model(ids).logits
    assert one.dtype == two.dtype == torch.bfloat16
    assert (one.double() - two.double()).norm() < 0.02 * one.double().norm()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path
    block_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(folder, device="cpu", offload=True)
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight") as caught:
        loaded.model(torch.tensor([TEXTS[0].ids]))
    assert "--offload" in str(caught.value)
