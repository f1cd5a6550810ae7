"""Layers with LoRA factors, and Safe LoRA's and SafeMERGE's dense float64 references."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from support.subspace_support import layer_of, matrix
from torch import Tensor

from realign.repair.edit import Layer, LoraFactors
from realign.repair.methods.cosine import CosineMethod
from realign.repair.preparation import Statistics


def adapter_layer(shape: tuple[int, int], *, rank: int = 2, scale: float = 1.5) -> Layer:
    """A fine-tune that is an adapter of its own rank and scale over the aligned weights."""
    plain = layer_of(shape)
    lora = factors(shape, rank=rank, scale=scale, seed=31)
    finetuned = plain.require("aligned") + lora.scale * (lora.up @ lora.down)
    return dataclasses.replace(plain, finetuned=finetuned, lora=lora)


def safe_adapter(layer: Layer, *, rank: int = 3, scale: float = 0.7) -> Layer:
    """The layer with a safety model that is an adapter, too."""
    shape = (layer.finetuned.shape[0], layer.finetuned.shape[1])
    lora = factors(shape, rank=rank, scale=scale, seed=41)
    safety = layer.require("aligned") + lora.scale * (lora.up @ lora.down)
    return dataclasses.replace(layer, safety=safety, safety_lora=lora)


def factors(shape: tuple[int, int], *, rank: int, scale: float, seed: int) -> LoraFactors:
    down, up = matrix(rank, shape[1], seed=seed), matrix(shape[0], rank, seed=seed + 1, scale=0.1)
    return LoraFactors(down=down, up=up, scale=scale)


def whole(layer: Layer) -> Layer:
    """The same weights without their factors: the merged checkpoint."""
    return dataclasses.replace(layer, lora=None, safety_lora=None)


def named(layer: Layer, number: int) -> Layer:
    """The layer as the projection of another block."""
    return dataclasses.replace(
        layer, key=f"model.layers.{number}.self_attn.q_proj.weight", layer=number
    )


def selected(method: CosineMethod, layers: Iterable[Layer]) -> Statistics:
    """What the engine gives to `edit`: the scores of these layers, and what is selected by them."""
    scores = {}
    for layer in layers:
        score = method.score(layer)
        if score is not None:
            scores[layer.key] = score
    return Statistics(scores=scores, selection=method.select(scores))


def dense_filter(layer: Layer, kind: str = "base") -> Tensor:
    """C = V V^T / norm(V), formed."""
    other = layer.base if kind == "base" else layer.unaligned
    assert layer.aligned is not None
    assert other is not None
    v = layer.aligned.double() - other.double()
    return v @ v.T / v.norm()


def dense_safe_lora(layer: Layer, kind: str = "base") -> Tensor:
    """W' = Wa + C dW."""
    assert layer.aligned is not None
    task = layer.finetuned.double() - layer.aligned.double()
    return layer.aligned.double() + dense_filter(layer, kind) @ task


def orthogonal(n: int, *, seed: int) -> Tensor:
    return torch.linalg.qr(matrix(n, n, seed=seed))[0]
