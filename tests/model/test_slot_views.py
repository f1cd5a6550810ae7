"""Views of logical matrices in running models, against what the files hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.expert_support import CONFIGS as EXPERTS
from support.layouts_support import stack_experts
from support.repair_support import CONFIGS, read_folder
from torch import Tensor

from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, slot_shape, slots_of, stored_rows
from realign.errors import ModelError
from realign.model.slot_views import SlotViews

ARCHITECTURES = {
    "llama": CONFIGS["llama"],
    "gpt2": CONFIGS["gpt2"],
    "phi3": CONFIGS["phi3"],
    **EXPERTS,
}


def _slots(checkpoint: Checkpoint) -> dict[str, Slot]:
    found = [slot for name in checkpoint.tensors for slot in slots_of(checkpoint, name)]
    return {slot.key: slot for slot in found if len(checkpoint.tensors[slot.tensor].shape) >= 2}


def _stored(checkpoint: Checkpoint, slot: Slot) -> Tensor:
    rows = stored_rows(slot, checkpoint.tensors[slot.tensor].shape)
    return logical_matrix(checkpoint.read(slot.tensor, rows), slot)


def _views(checkpoint: Checkpoint, model: transformers.PreTrainedModel) -> SlotViews:
    slots = _slots(checkpoint)
    shapes = {
        key: slot_shape(checkpoint.tensors[slot.tensor].shape, slot) for key, slot in slots.items()
    }
    return SlotViews(model, slots, shapes=shapes)


def _save(folder: Path, config: Callable[[], transformers.PretrainedConfig]) -> Path:
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_matrix_is_where_its_view_says(arch: str, tmp_path: Path) -> None:
    folder = _save(tmp_path, ARCHITECTURES[arch])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with open_checkpoint(folder) as checkpoint:
        views = _views(checkpoint, model)
        assert not views.missing
        slots = _slots(checkpoint)
        assert views.keys == tuple(slots)
        for key, slot in slots.items():
            assert torch.equal(views.weight(key), _stored(checkpoint, slot)), key
        before = {key: views.weight(key).clone() for key in slots}
    chosen = list(slots)[1::2]
    new = {key: torch.randn(before[key].shape, requires_grad=True) for key in chosen}
    built = views.assemble(new)
    ids = torch.arange(3, 9)[None]
    logits = torch.func.functional_call(model, built, (ids,), {"use_cache": False}).logits
    through = torch.autograd.grad(logits.square().sum(), [new[key] for key in chosen])
    for key in chosen:
        views.weight(key).copy_(new[key].detach())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    direct = model(ids, use_cache=False).logits
    assert torch.equal(direct, logits)
    direct.square().sum().backward()
    for key, gradient in zip(chosen, through, strict=True):
        mine = views.gradient(key)
        assert mine is not None
        assert torch.allclose(mine, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    for key in set(slots) - set(chosen):
        assert torch.equal(views.weight(key), before[key]), key


def test_stacks_in_the_file_are_stacks_in_memory(tmp_path: Path) -> None:
    folder = _save(tmp_path, EXPERTS["mixtral"])
    tensors = {n: t.contiguous() for n, t in stack_experts(read_folder(folder)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        views = _views(checkpoint, model)
        for key, slot in _slots(checkpoint).items():
            assert torch.equal(views.weight(key), _stored(checkpoint, slot)), key


def test_what_has_no_view_is_named(tmp_path: Path) -> None:
    folder = _save(tmp_path, CONFIGS["llama"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    slot = Slot(name, name, "up_proj", 0)
    strange = Slot("x", "model.layers.9.mlp.up_proj.weight", "up_proj", 9)
    views = SlotViews(model, {name: slot, "x": strange}, shapes={name: (5, 5), "x": (48, 32)})
    assert not views.keys
    assert "[48, 32], expected [5, 5]" in views.missing[name]
    assert "no module model.layers.9.mlp.up_proj" in views.missing["x"]
    with pytest.raises(ModelError, match="is not at hand"):
        views.require([name])
