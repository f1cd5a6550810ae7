"""Tiny families of real transformers models, and dense float64 references of their repairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

SMALL: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}

CONFIGS: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(
        **SMALL, intermediate_size=48, num_hidden_layers=2, tie_word_embeddings=True
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL, intermediate_size=48, num_hidden_layers=2, tie_word_embeddings=False
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL,
        intermediate_size=24,
        num_hidden_layers=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
        tie_word_embeddings=False,
    ),
    "phi3": lambda: transformers.Phi3Config(
        **SMALL,
        intermediate_size=48,
        num_hidden_layers=2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


@dataclass(frozen=True)
class Trio:
    """Where a base, its aligned model, an unaligned one and a fine-tune stand."""

    base: Path
    aligned: Path
    unaligned: Path
    finetuned: Path


def make_trio(
    folder: Path,
    arch: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    size: float = 0.02,
) -> Trio:
    """Save a family whose drifts are of rank 2 plus noise: a cut at 2 is far from degenerate."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[arch]())
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    aligned = drift(base, seed=11, size=size)
    unaligned = drift(aligned, seed=13, size=size / 2)
    finetuned = drift(aligned, seed=17, size=size)
    trio = Trio(folder / "base", folder / "aligned", folder / "unaligned", folder / "finetuned")
    for path, state in (
        (trio.base, base),
        (trio.aligned, aligned),
        (trio.unaligned, unaligned),
        (trio.finetuned, finetuned),
    ):
        model.load_state_dict(state)
        model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
        model.to(torch.float32)
    return trio


def drift(state: Mapping[str, Tensor], *, seed: int, size: float) -> dict[str, Tensor]:
    """Every tensor moved by noise, matrices also in a direction of rank 2; ties stay ties."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    moved: dict[str, Tensor] = {}
    for name, value in state.items():
        new = value.clone()
        if value.is_floating_point():
            new += size * 0.1 * normal(*value.shape)
            if value.dim() >= 2:
                *stack, rows, columns = value.shape
                new += size * normal(*stack, rows, 2) @ normal(*stack, 2, columns)
        moved[name] = new
    if "lm_head.weight" in moved and torch.equal(
        state["lm_head.weight"], state.get("model.embed_tokens.weight", torch.zeros(1))
    ):
        moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
    return moved


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by the reference library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def ulp(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` around each entry, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(reference.abs().double().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


def assert_output(result: Tensor, finetuned: Tensor, edit: Tensor) -> None:
    """|W' - ref| <= 1 ulp(ref) + 1e-6 max|E|, entry by entry; `edit` is E in float64."""
    reference = finetuned.double() + edit
    allowed = ulp(reference, result.dtype) + 1e-6 * edit.abs().max()
    error = (result.double() - reference).abs()
    assert bool((error <= allowed).all()), f"off by up to {float((error / allowed).max())} bounds"


def dense_replace(base: Tensor, aligned: Tensor, finetuned: Tensor, *, rank: int) -> Tensor:
    """The two-sided replacement with materialised projectors, [d_out, d_in] float64."""
    u, _, vt = torch.linalg.svd(aligned.double() - base.double(), full_matrices=False)
    p = u[:, :rank] @ u[:, :rank].T
    q = vt[:rank].T @ vt[:rank]
    d = aligned.double() - finetuned.double()
    return p @ d + d @ q - p @ d @ q


def folder_bytes(folder: Path, *, but: frozenset[str] = frozenset()) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in but
    }
