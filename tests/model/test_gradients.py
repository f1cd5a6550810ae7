"""Gradient statistics against plain automatic differentiation of one example at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.block_support import CONFIGS, block_model
from support.model_support import loaded
from torch import Tensor

from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.slots import slot_shape, slots_of
from realign.errors import ModelError, NonFiniteError, UsageError
from realign.model.chat import EncodedReply
from realign.model.gradients import collect_gradients
from realign.model.growing_file import GrowingFile
from realign.model.slot_views import SlotViews

EXAMPLES = [
    EncodedReply(tuple(4 + (7 * i + 3 * j) % 40 for j in range(length)), start)
    for i, (length, start) in enumerate([(9, 4), (5, 2), (12, 6), (7, 6)])
]


def _views(model: Any, folder: Path, *, outside: bool = False) -> SlotViews:
    model.save_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        slots = {
            slot.key: slot
            for name, info in checkpoint.tensors.items()
            for slot in slots_of(checkpoint, name)
            if len(info.shape) >= 2
            and "conv" not in name
            and (slot.layer is not None) >= (not outside)
        }
        shapes = {k: slot_shape(checkpoint.tensors[s.tensor].shape, s) for k, s in slots.items()}
    return SlotViews(model, slots, shapes=shapes)


def _collected(
    model: Any, views: SlotViews, kind: Any, folder: Path, **options: Any
) -> dict[str, Tensor]:
    examples = options.pop("examples", EXAMPLES)
    keys = options.pop("keys", views.keys)
    path = folder / "gradients.safetensors"
    with GrowingFile(path, header_bytes=64) as sink:
        collect_gradients(
            loaded(model), examples, views=views, keys=keys, kind=kind, sink=sink, **options
        )
        sink.finish({})
    return load_file(path)


def _per_example(model: Any, views: SlotViews, examples: Sequence[EncodedReply]):
    """Gradients of every example by ordinary autograd, through one forward pass each."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for each in examples:
        model.zero_grad(set_to_none=True)
        ids = torch.tensor([each.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        picked = logits.log_softmax(-1)[each.start - 1 : -1]
        wanted = torch.tensor(each.ids[each.start :])[:, None]
        (-picked.gather(1, wanted).mean()).backward()
        found: dict[str, Tensor] = {}
        for key in views.keys:
            gradient = views.gradient(key)
            found[key] = (
                torch.zeros_like(views.weight(key)) if gradient is None else gradient.clone()
            )
        yield found
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def _statistic(kind: str, gradient: Tensor, weight: Tensor) -> Tensor:
    g, w = gradient.double(), weight.double()
    return {"mean": g, "fisher": g.square(), "snip": (w * g).abs()}[kind]


def _expected(model: Any, views: SlotViews, kind: str) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for gradients in _per_example(model, views, EXAMPLES):
        for key, gradient in gradients.items():
            value = _statistic(kind, gradient, views.weight(key)) / len(EXAMPLES)
            sums[key] = sums.get(key, torch.zeros_like(value)) + value
    return sums


def _close(found: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max())
    return bool((found.double() - expected).abs().max() <= 1e-4 * scale + 1e-12)


@pytest.mark.parametrize("arch", CONFIGS)
def test_block_by_block_equals_plain_autograd(arch: str, tmp_path: Path) -> None:
    model = block_model(arch)
    views = _views(model, tmp_path)
    assert len(views.keys) >= 4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kind in ("mean", "fisher", "snip"):
        expected = _expected(model, views, kind)
        found = _collected(model, views, kind, tmp_path)
        assert found.keys() == expected.keys()
        assert all(value.dtype == torch.float32 for value in found.values())
        for key, value in expected.items():
            assert value.abs().max() > 0 or "experts" in key, key
            assert _close(found[key], value), (kind, key)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_squares_and_magnitudes_are_taken_per_example(tmp_path: Path) -> None:
    """The traps: the square of a batch's mean gradient, the magnitude of the mean of W (.) g."""
    model = block_model("llama")
    views = _views(model, tmp_path)
    mean, fisher, snip = (
        _collected(model, views, kind, tmp_path) for kind in ("mean", "fisher", "snip")
    )
    for key in views.keys:
        assert bool((fisher[key] >= mean[key].square() * (1 - 1e-4)).all())
        assert fisher[key].sum() > 1.5 * mean[key].square().sum()
        assert snip[key].sum() > 1.2 * (views.weight(key) * mean[key]).abs().sum()


def test_waves_change_nothing_but_rounding(tmp_path: Path) -> None:
    model = block_model("qwen2_moe")
    views = _views(model, tmp_path)
    whole = _collected(model, views, "fisher", tmp_path)
    waves = _collected(model, views, "fisher", tmp_path, held_bytes=1)
    for key, value in whole.items():
        assert _close(waves[key], value.double()), key


def test_a_half_precision_model_is_measured_in_float32(tmp_path: Path) -> None:
    half = block_model("llama").to(torch.bfloat16)
    wide = block_model("llama").to(torch.bfloat16).float()
    found = _collected(half, _views(half, tmp_path / "half", outside=True), "snip", tmp_path)
    views = _views(wide, tmp_path / "wide", outside=True)
    expected = _expected(wide, views, "snip")
    assert found.keys() == expected.keys()
    assert "model.embed_tokens.weight" in found, "tied: what the head gives is in it"
    for key, value in expected.items():
        assert _close(found[key], value), key
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_blocks_that_hand_on_aside_are_measured_plainly(tmp_path: Path) -> None:
    model: Any = block_model("llama")
    shared: dict[str, Tensor] = {}

    def first(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "aside": shared}

    layers = model.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(first, with_kwargs=True)
    original = type(layers[0]).forward

    class Aside(type(layers[0])):
        def forward(self, hidden_states: Tensor, *args: Any, aside: Any, **kwargs: Any) -> Tensor:
            out = original(self, hidden_states, *args, **kwargs)
            if self is layers[0]:
                aside["state"] = out.tanh()
            return out + aside["state"] if self is layers[2] else out

    for layer in layers:
        layer.__class__ = Aside
    views = _views(model, tmp_path)
    expected = _expected(model, views, "mean")
    shared.clear()
    found = _collected(model, views, "mean", tmp_path)
    for key, value in expected.items():
        assert _close(found[key], value), key


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    model = block_model("llama")
    views = _views(model, tmp_path)
    for examples in ([], [EncodedReply((4, 5), 2)]):
        with pytest.raises(UsageError, match="replies"):
            _collected(model, views, "mean", tmp_path, examples=examples)
    with pytest.raises(ModelError, match="not at hand"):
        _collected(model, views, "mean", tmp_path, keys=["nothing"])
    model.get_parameter("model.norm.weight").data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        _collected(model, views, "mean", tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert not any("gradients" in name for name in left), left
    assert not any("forward" in vars(module) for module in model.modules())
