"""The scan of a further fine-tune of a known family against only reading its two checkpoints.

    python -m benchmarks.spectra.family [--layers N] [--hidden N] [--ffn N] [--repeats N]

A made-up family is written to a temporary folder: a reference, a fine-tune of it, and a subspace
file of 32 directions per matrix, bfloat16, shapes of a 1.1 B model. The floor reads every byte of
both in the chunks of the scan, one after the other, and does nothing with them. One BLAS thread;
the scan reads and computes in as many threads as there are cores, at most four. Measured twice:
with both checkpoints in the page cache, and after the kernel was asked to drop them from it, as a
fine-tune is that has just been fetched.
"""

from __future__ import annotations

from benchmarks.spectra.alone import one_thread

if __name__ == "__main__":
    one_thread()

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.spectra.synthetic import generator
from benchmarks.spectra.timing import in_turns, ratio, spoken
from realign.audit.family_scan import READ_BYTES, FamilyScan, scan_family
from realign.audit.subspace_file import Family, SubspaceRow, read_subspace
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.repair.subspace_file import save_subspace
from realign.subspace.spectrum import Triplets

K = 32
STRENGTH = 0.5
"""Norm of the known alignment vector over that of its matrix, per direction, falling as 1/i."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the made-up model."""

    layers: int
    hidden: int
    ffn: int
    kv: int
    vocabulary: int

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and shape of every linear layer."""
        h, f = self.hidden, self.ffn
        parts = {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (self.kv, h),
            "self_attn.v_proj": (self.kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }
        for layer in range(self.layers):
            for name, shape in parts.items():
                yield f"model.layers.{layer}.{name}.weight", shape

    def others(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every other tensor."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "lm_head.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        for layer in range(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{name}.weight", (self.hidden,)


def make(folder: Path, shape: Shape) -> None:
    """Write reference, subject and subspace file: noise of the right size, quickly made."""
    draw = generator(0)
    everything = dict([*shape.matrices(), *shape.others()])
    largest = max(math.prod(size) for size in everything.values())
    noise = torch.randn(largest, generator=draw)
    drift = torch.randn(largest, generator=draw)
    reference: dict[str, Tensor] = {}
    subject: dict[str, Tensor] = {}
    for index, (name, size) in enumerate(everything.items()):
        # One draw serves all: rolled by another amount for every tensor.
        part = torch.roll(noise[: math.prod(size)], index).view(size)
        reference[name] = (0.02 * part).bfloat16()
        moved = 1e-3 * torch.roll(drift[: math.prod(size)], 7 * index).view(size)
        subject[name] = (reference[name].float() + moved).bfloat16()
    config = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "tie_word_embeddings": False,
    }
    for role, tensors in (("reference", reference), ("subject", subject)):
        (folder / role).mkdir()
        (folder / role / "config.json").write_text(json.dumps(config), "utf-8")
        save_file(tensors, folder / role / "model.safetensors", metadata={"format": "pt"})
    rows: list[SubspaceRow] = []
    triplets: dict[str, Triplets] = {}
    for index, (name, size) in enumerate(shape.matrices()):
        weight = math.sqrt(float(reference[name].double().square().sum()))
        s = STRENGTH * weight / torch.arange(1, K + 1)
        u, v = (torch.linalg.qr(torch.randn(d, K, generator=draw)).Q for d in size)
        triplets[name] = Triplets(u, s, v)
        norm = float(s.double().norm())
        layer = index // 7
        rows.append(
            SubspaceRow(
                key=name,
                tensor=name,
                module=name.split(".")[-2],
                layer=layer,
                shape=size,
                norm=norm,
                relative_norm=norm / weight,
                entropy_rank=K,
            )
        )
    aligned, base = (Family(role, None, "") for role in ("reference", "base"))
    save_subspace(
        folder / "safety.safetensors", rows, triplets, rank_rule=str(K), aligned=aligned, base=base
    )


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files of a folder from its cache."""
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that wait to be written stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def only_read(reference: Checkpoint, subject: Checkpoint) -> int:
    """Read every tensor of both in chunks of rows; returns the bytes."""
    total = 0
    for name, info in reference.tensors.items():
        step = max(1, READ_BYTES * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], step):
            rows = (start, min(start + step, info.shape[0]))
            total += reference.read(name, rows).nbytes + subject.read(name, rows).nbytes
    return total


def measure(shape: Shape, *, repeats: int, folder: Path | None = None) -> dict[str, Any]:
    """Wall time of the scan over that of only reading, and what the scan found."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        make(place, shape)
        file = read_subspace(place / "safety.safetensors")
        scans: list[FamilyScan] = []
        read: list[int] = []
        with (
            open_checkpoint(place / "reference") as reference,
            open_checkpoint(place / "subject") as subject,
        ):

            def scan() -> None:
                scans.append(scan_family(file, reference=reference, subject=subject))

            def floor() -> None:
                read.append(only_read(reference, subject))

            def cold() -> None:
                forget(place)

            warm = in_turns({"scan": scan, "read": floor}, repeats=repeats)
            fresh = in_turns({"scan": scan, "read": floor}, repeats=repeats, before=cold)
    total = scans[-1].total
    assert total is not None, scans[-1].total_reason
    return {
        "bytes": read[-1],
        **{
            name: {
                **ratio(times["scan"], times["read"]),
                "seconds_of": {each: times[each].median for each in times},
                "gb_per_second": read[-1] / 1e9 / times["read"].median,
            }
            for name, times in (("warm", warm), ("cold", fresh))
        },
        "matrices": total.known,
        "found": {
            "relative_distance": total.relative_distance,
            "energy": total.energy,
            "excess": total.excess,
            "retained_k": total.retained_k,
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--kv", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written for the run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = Shape(options.layers, options.hidden, options.ffn, options.kv, options.vocabulary)
    found = measure(shape, repeats=options.repeats, folder=options.folder)
    print(json.dumps(found))
    for name in ("cold", "warm"):
        print(
            f"Scan of a further fine-tune, {name}: {spoken(found[name], 2)} of only reading both "
            f"({found['bytes'] / 1e9:.1f} GB at {found[name]['gb_per_second']:.1f} GB/s)",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
