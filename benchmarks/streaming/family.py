"""A synthetic family of Llama-shaped checkpoints: base, aligned, fine-tuned.

    python -m benchmarks.streaming.family FOLDER --shape 1.1b

Nothing is trained. The base is Gaussian; the safety vector (aligned - base) and the task vector are
a low-rank signal plus a dense bulk whose entries and whose spectrum have heavy tails, which is what
differences of real checkpoints look like. The fine-tune loses part of the safety signal. Tensors
are made and written in blocks of rows, all three roles at once, so the builder needs the memory of
a few blocks whatever the size. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realign.checkpoint.shards import ShardLayout, ShardWriter, TensorSpec, index_of

ROLES = ("base", "aligned", "finetuned")
BLOCK = 2**21  # entries made at a time
RANK = 8
SAFETY, TASK = 0.02, 0.015  # norms relative to the base
SIGNAL = 0.5  # share of a vector's energy that is low-rank
KEPT = 0.4  # what the fine-tune keeps of the safety vector's low-rank part


@dataclass(frozen=True)
class Shape:
    """What a Llama config has to say."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int = 5

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for _, shape in tensors(self))

    @property
    def nbytes(self) -> int:
        """Of one checkpoint's tensors, in bfloat16."""
        return 2 * self.parameters

    def largest_matrix(self) -> int:
        """Entries of the largest matrix in a decoder block: what a spectral method decomposes."""
        return max(prod(shape) for name, shape in tensors(self) if ".layers." in name)


SHAPES = {
    "toy": Shape(hidden=64, ffn=176, layers=2, heads=4, kv_heads=2, vocab=512, shards=2),
    "0.1b": Shape(hidden=768, ffn=2048, layers=12, heads=12, kv_heads=4, vocab=16_000),
    "0.3b": Shape(hidden=1024, ffn=4096, layers=16, heads=16, kv_heads=4, vocab=32_000),
    # TinyLlama's
    "1.1b": Shape(hidden=2048, ffn=5632, layers=22, heads=32, kv_heads=4, vocab=32_000),
    # One layer of Llama 3 70B with both embeddings
    "70b-layer": Shape(hidden=8192, ffn=28_672, layers=1, heads=64, kv_heads=8, vocab=128_256),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the files."""
    hidden, ffn = shape.hidden, shape.ffn
    kv = hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{layer}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, ffn)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab, hidden)


def layout(shape: Shape) -> tuple[ShardLayout, ...]:
    """About `shape.shards` files of equal size, tensors in order."""
    limit = shape.nbytes / shape.shards
    files: list[list[TensorSpec]] = [[]]
    filled = 0.0
    for name, dims in tensors(shape):
        if files[-1] and filled >= limit * len(files):
            files.append([])
        files[-1].append(TensorSpec(name, "BF16", dims))
        filled += files[-1][-1].nbytes
    count = len(files)
    return tuple(
        ShardLayout(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(specs))
        for i, specs in enumerate(files, 1)
    )


def build(folder: Path, shape: Shape, *, seed: int = 0) -> None:
    """Write the three checkpoints into `folder`; one that is complete already is kept."""
    facts = {"shape": asdict(shape), "seed": seed}
    marker = folder / "family.json"
    if marker.exists() and json.loads(marker.read_text("utf-8")) == facts:
        return
    shards = layout(shape)
    for role in ROLES:
        (folder / role).mkdir(parents=True, exist_ok=True)
        for file in (folder / role).glob("*"):
            file.unlink()
        _sidecars(folder / role, shape, role)
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index_of(shards)))
    with ThreadPoolExecutor(max_workers=3) as pool:
        for shard in shards:
            _shard(folder, shard, seed, pool)
    marker.write_text(json.dumps(facts), "utf-8")


def _shard(folder: Path, shard: ShardLayout, seed: int, pool: ThreadPoolExecutor) -> None:
    with ExitStack() as stack:
        writers = {
            role: stack.enter_context(closing(ShardWriter(folder / role / shard.filename, shard)))
            for role in ROLES
        }
        for spec in shard.tensors:
            for values in blocks(spec.name, spec.shape, seed=seed, pool=pool):
                for role, value in values.items():
                    rows = torch.from_numpy(value).to(torch.bfloat16)
                    writers[role].write(spec.name, rows.reshape(-1, *spec.shape[1:]))
        for writer in writers.values():
            writer.finish()


def blocks(
    name: str, shape: tuple[int, ...], *, seed: int, pool: ThreadPoolExecutor
) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of rows of one tensor, by role, in float32."""
    rows, width = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
    norm = len(shape) == 1  # a layer norm: around 1, and it hardly moves
    sources = {kind: _generator(seed, name, kind) for kind in ("weights", "safety", "task")}
    vectors = {kind: _Vector(sources[kind], rows, width) for kind in ("safety", "task")}
    scale = 0.02
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        size = (part.stop - part.start, width)
        made = {kind: pool.submit(vectors[kind].rows, sources[kind], part) for kind in vectors}
        base = sources["weights"].standard_normal(size, dtype=np.float32)
        base *= scale
        if norm:
            base += 1
        signal, bulk = made["safety"].result()
        task_signal, task_bulk = made["task"].result()
        signal *= SAFETY * scale
        bulk *= SAFETY * scale
        aligned = base + signal
        aligned += bulk
        signal *= 1 - KEPT
        task_signal += task_bulk
        task_signal *= TASK * scale
        task_signal += aligned
        task_signal -= signal
        yield {"base": base, "aligned": aligned, "finetuned": task_signal}


class _Vector:
    """A difference of unit root mean square: low-rank signal plus heavy-tailed bulk."""

    def __init__(self, source: np.random.Generator, rows: int, width: int) -> None:
        rank = min(RANK, rows, width)
        strength = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
        strength *= np.sqrt(SIGNAL / np.square(strength).sum())
        self._left = source.standard_normal((rows, rank), dtype=np.float32) * strength
        self._right = source.standard_normal((rank, width), dtype=np.float32)
        # Lognormal scales of rows and columns bend the flat spectrum of noise into a long tail.
        self._row = _lognormal(source, rows)
        self._column = _lognormal(source, width) * np.float32(np.sqrt(1 - SIGNAL))

    def rows(self, source: np.random.Generator, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Signal and bulk of some rows."""
        signal = self._left[part] @ self._right
        bulk = source.standard_normal(signal.shape, dtype=np.float32)
        tails = np.square(bulk)
        tails *= 0.1
        tails += 0.7
        bulk *= tails  # 0.7 n + 0.1 n^3: variance 1.06, kurtosis 8
        bulk *= self._row[part, None]
        bulk *= self._column
        return signal, bulk


def _lognormal(source: np.random.Generator, count: int) -> np.ndarray:
    scales = np.exp(0.5 * source.standard_normal(count, dtype=np.float32))
    return scales / np.sqrt(np.square(scales).mean())


def _generator(seed: int, name: str, kind: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}\0{kind}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:8], "little")))


def _sidecars(folder: Path, shape: Shape, role: str) -> None:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "_name_or_path": f"synthetic/{role}",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    vocab = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", "a", "b"))}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def add_shape_options(parser: argparse.ArgumentParser, default: str) -> None:
    """--shape and what overrides it."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default=default)
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--vocab", type=int, help="instead of the shape's own size")
    parser.add_argument("--shards", type=int, help="weight files per checkpoint")
    parser.add_argument("--seed", type=int, default=0)


def chosen_shape(options: argparse.Namespace) -> Shape:
    """The shape that the options of `add_shape_options` name."""
    changes = {
        name: getattr(options, name)
        for name in ("layers", "vocab", "shards")
        if getattr(options, name) is not None
    }
    return replace(SHAPES[options.shape], **changes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    add_shape_options(parser, "1.1b")
    options = parser.parse_args()
    shape = chosen_shape(options)
    build(options.folder, shape, seed=options.seed)
    print(f"{options.folder}: 3 x {shape.parameters / 1e9:.3f} B parameters")


if __name__ == "__main__":
    main()
