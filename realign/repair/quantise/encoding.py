"""The same repair once more as real eight-bit integers, in a folder of its own inside the output.

OUTPUT/compressed-tensors is a model folder that transformers loads with the package
compressed-tensors. Its linear layers hold the codes of W diag(v), its norms carry 1 / v, everything
else is copied. It is part of the output: it appears and is verified with it, and has a manifest of
its own, so that it can be moved away. Here: what is written there. Not here: what can be
(`encodable`), the layout of those weights (`realign.checkpoint.int8`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from realign.checkpoint.chunks import chunks_of, read_chunk
from realign.checkpoint.headers import DTYPES
from realign.checkpoint.int8 import (
    BITS,
    int8_matrix,
    quantisation_config,
)
from realign.checkpoint.manifest import MANIFEST_NAME
from realign.checkpoint.names import role_of
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.shards import ShardLayout, ShardWriter, TensorSpec, index_of
from realign.checkpoint.slots import Slot, logical_matrix
from realign.checkpoint.space import require_space
from realign.checkpoint.weights import INDEX_FILE
from realign.checkpoint.writer import OutputFolder
from realign.progress import Progress
from realign.repair.preparation import Statistics
from realign.repair.quantise.encodable import encoded_specs
from realign.repair.quantise.matrix import quantised_matrix
from realign.repair.stream import read_slot

if TYPE_CHECKING:
    from realign.repair.plan import Plan

FOLDER = "compressed-tensors"
"""Name of the folder, and of the encoding."""

Manifest: TypeAlias = Callable[[Mapping[str, str], Sequence[ShardLayout]], Mapping[str, Any]]
"""Makes a manifest's content from the hashes of its files and its weight files."""

_CHUNK = 8 * 2**20


def write_encoded(
    plan: Plan,
    finetuned: Checkpoint,
    statistics: Statistics,
    output: OutputFolder,
    manifest: Manifest,
    *,
    progress: Progress,
) -> None:
    """Write the folder of integers of a repair.

    Args:
        plan: of the repair.
        finetuned: its subject.
        statistics: what the training decided.
        output: the folder that the repair is written to.
        manifest: makes the encoded folder's own.
        progress: shows bytes written.

    Raises:
        OutputError: the disk is full or not writable.
    """
    Encoder(
        finetuned=finetuned,
        slots={pair.role.name: pair.slots for pair in plan.edits},
        layout=plan.layout,
        statistics=statistics,
        output=output,
        progress=progress,
    ).write(manifest)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Writes one encoded folder."""

    finetuned: Checkpoint
    slots: Mapping[str, Sequence[Slot]]
    """The matrices of every quantised tensor, in the order of its rows."""
    layout: Sequence[ShardLayout]
    """Of the de-quantised output."""
    statistics: Statistics
    output: OutputFolder
    progress: Progress

    def write(self, manifest: Manifest) -> None:
        """Write weights, config, the small files and the folder's own manifest.

        Args:
            manifest: makes its content from the hashes of its files and its weight files.

        Raises:
            OutputError: the disk is full or not writable.
        """
        layout = tuple(
            ShardLayout(each.filename, tuple(s for spec in each.tensors for s in self._specs(spec)))
            for each in self.layout
        )
        require_space(self.output.partial, sum(each.file_size for each in layout))
        total = sum(each.nbytes for each in layout)
        with self.progress.task("write integers", total=total, unit="B") as task:
            for plain, each in zip(self.layout, layout, strict=True):
                placed = ShardLayout(f"{FOLDER}/{each.filename}", each.tensors)
                if not self.output.is_done(placed):
                    with self.output.shard(placed) as writer:
                        for spec in plain.tensors:
                            self._write_tensor(writer, spec)
                task.advance(each.nbytes)
        index = index_of(layout)
        if index is not None:
            self.output.write_json(f"{FOLDER}/{INDEX_FILE}", index)
        for name, content in self.finetuned.sidecars().items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            if name == "config.json":
                data = self._config(data)
            self.output.write_bytes(f"{FOLDER}/{name}", data)
        prefix = f"{FOLDER}/"
        hashes = {
            name.removeprefix(prefix): digest
            for name, digest in self.output.hashes.items()
            if name.startswith(prefix)
        }
        self.output.write_json(f"{FOLDER}/{MANIFEST_NAME}", manifest(hashes, layout))

    def _specs(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        if spec.name not in self.slots:
            return (spec,)
        return encoded_specs(spec)

    def _write_tensor(self, writer: ShardWriter, spec: TensorSpec) -> None:
        if spec.name in self.slots:
            for name, tensor in self._integers(spec).items():
                writer.write(name, tensor)
            return
        if (norm := self._norm(spec)) is not None:
            writer.write(spec.name, norm)
            return
        for chunk in chunks_of([(self.finetuned, spec.name)], nbytes=_CHUNK):
            writer.write(spec.name, read_chunk(self.finetuned, spec.name, chunk))

    def _integers(self, spec: TensorSpec) -> dict[str, Tensor]:
        """The integers of one stored tensor, its matrices below one another."""
        slots = self.slots[spec.name]
        parts = [
            quantised_matrix(
                logical_matrix(read_slot(self.finetuned, slot), slot),
                slot.key,
                self.statistics,
                bits=BITS,
            )
            for slot in slots
        ]
        codes = torch.cat([each.codes for each in parts])
        assert tuple(codes.shape) == spec.shape, f"{spec.name}: rows that no matrix covers"
        found = int8_matrix(
            codes,
            zero=torch.cat([each.grid.zero for each in parts]),
            step=torch.cat([each.grid.step for each in parts]),
            dtype=DTYPES[spec.dtype],
        )
        return found.tensors(spec.name.removesuffix(".weight"))

    def _norm(self, spec: TensorSpec) -> Tensor | None:
        """A norm divided by v, its bias too; None for every other tensor."""
        module, _, leaf = spec.name.rpartition(".")
        weight = f"{module}.weight"
        v = self.statistics.tensor("norm", weight)
        if v is None or leaf not in ("weight", "bias"):
            return None
        shift = self.statistics.tensor("offset", weight)
        offset = 0.0 if shift is None or leaf == "bias" else float(shift)
        stored = self.finetuned.read(spec.name)
        return ((stored.to(v) + offset) / v - offset).to(stored.dtype)

    def _config(self, content: bytes) -> bytes:
        config = json.loads(content)
        config["quantization_config"] = quantisation_config(self._ignored())
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")

    def _ignored(self) -> list[str]:
        """Linear modules that keep their weights; naming what is no such module does no harm."""
        found = {"lm_head"}
        for name, info in self.finetuned.tensors.items():
            matrix = len(info.shape) == 2 and name.endswith(".weight")
            if matrix and name not in self.slots and role_of(info).kind != "embedding":
                found.add(name.removesuffix(".weight"))
        return sorted(found)
