"""The tensors of a model with a patch merged in, written as a stream of rows.

W' = W_f + t B A in float32, added once and rounded once, by blocks of rows; a stack of experts
expert by expert. Memory is a few blocks and the factors, whatever the size of a tensor. Here: what
is done to each tensor. Not here: what is checked and recorded around it (`patch_apply`), reading a
merged model (`realign.checkpoint.adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from math import prod

import torch
from torch import Tensor

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.lora import Factors
from realign.checkpoint.names import role_of
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.shards import ShardLayout, ShardWriter
from realign.checkpoint.writer import OutputFolder
from realign.progress import Progress, Task
from realign.repair.apply import CHUNK_ELEMENTS, Effect, apply_edit, row_chunks
from realign.repair.edit import LowRank
from realign.repair.estimate import STREAM_BYTES
from realign.repair.record import TensorRow, edited_row
from realign.repair.verify import check_input, check_output


@dataclass(frozen=True, kw_only=True)
class _Product:
    """t B A of one 2-D tensor, or of the experts of a stack, as rows of what is stored."""

    left: Tensor
    """[rows, r], or [experts, rows, r]."""
    right: Tensor
    """[r, columns], or [experts, r, columns]."""
    strength: float
    transposed: bool = False
    """Of a stack: experts are stored as [d_in, d_out]."""

    def add(self, stored: Tensor, start: int) -> tuple[Tensor, Effect]:
        """Merge it into the stored rows (or experts) from `start` on."""
        if self.left.dim() == 2:
            left = self.left[start : start + stored.shape[0]]
            return apply_edit(stored, LowRank(left, self.right), strength=self.strength)
        result, total = torch.empty_like(stored), Effect()
        for i, weight in enumerate(stored):
            edit = LowRank(self.left[start + i], self.right[start + i])
            logical = weight.T if self.transposed else weight
            new, effect = apply_edit(logical, edit, strength=self.strength)
            result[i] = new.T if self.transposed else new
            total = total + effect
        return result, total


@dataclass(frozen=True)
class Merger:
    """Writes a model with a patch merged in."""

    merged: AdapterCheckpoint
    """The patch over its model."""
    _: KW_ONLY
    strength: float
    """What the record says of it."""
    factor: float
    """What the scales in the patch's config are multiplied by."""

    @property
    def model(self) -> Checkpoint:
        """The model under the patch."""
        return self.merged.base

    def write_shards(
        self, output: OutputFolder, layout: Sequence[ShardLayout], *, progress: Progress
    ) -> list[TensorRow]:
        """Write every weight file that is not finished; returns a row per tensor that changes.

        Raises:
            NonFiniteError: NaN or infinity in the model, the patch or the result.
            OutputError: the disk is full or not writable.
        """
        rows: list[TensorRow] = []
        total = sum(shard.nbytes for shard in layout if not output.is_done(shard))
        with progress.task("applying the patch", total=total, unit="B") as task:
            for shard in layout:
                done = output.finished(shard)
                if done is not None:
                    rows += [TensorRow.from_json(each) for each in done["rows"]]
                    continue
                written: list[TensorRow] = []
                with output.shard(shard) as writer:
                    for spec in shard.tensors:
                        found = self._write_tensor(writer, spec.name, task)
                        written += [] if found is None else [found]
                    writer.facts["rows"] = [row.to_json() for row in written]
                rows += written
        return rows

    def _write_tensor(self, writer: ShardWriter, name: str, task: Task) -> TensorRow | None:
        how = self.merged.changes(name)
        if how == "none":
            for rows in self._blocks(name):
                stored = self.model.read(name, rows)
                self._check_input(name, stored)
                writer.write(name, stored)
                task.advance(stored.nbytes)
            return None
        product, rank = None, None
        if how == "product":
            factors = self.merged.factors(name)
            for part in (tensor for each in factors for tensor in (each.a, each.b)):
                check_input(part, name=name, role="patch", source=self.merged.source)
            rank = sum(each.b.shape[-1] for each in factors)
            product = _product(factors, self.factor)
        effect = Effect()
        for rows in self._blocks(name):
            if product is not None:
                finetuned = self.model.read(name, rows)
                self._check_input(name, finetuned)
                stored, one = product.add(finetuned, rows[0] if rows else 0)
            else:
                stored = self.merged.read(name, rows)
                one = self._difference(name, rows, stored)
            effect = effect + one
            check_output(stored, name=name, dtype=str(stored.dtype))
            writer.write(name, stored)
            task.advance(stored.nbytes)
        role = role_of(self.merged.tensors[name])
        row = edited_row(
            key=name,
            tensor=name,
            module=role.module,
            layer=role.layer,
            edit="dense" if rank is None else "low-rank",
            strength=self.strength,
            effect=effect,
            facts={} if rank is None else {"rank": rank},
        )
        # Of a tensor that was trained whole only the result is known, not what was rounded away.
        return row if rank is not None else replace(row, survival=None)

    def _difference(self, name: str, rows: tuple[int, int] | None, stored: Tensor) -> Effect:
        """What a tensor that was trained whole changes; a new or resized one changes throughout."""
        old = self.model.tensors.get(name)
        if old is None or old.shape != self.merged.tensors[name].shape:
            return Effect(numel=stored.numel(), changed=stored.numel())
        before = self.model.read(name, rows).double()
        moved = stored.double() - before
        return Effect(
            numel=moved.numel(),
            changed=int(torch.count_nonzero(moved)),
            max_edit=float(moved.abs().max()) if moved.numel() else 0.0,
            edit_sq=float(moved.square().sum()),
            finetuned_sq=float(before.square().sum()),
        )

    def _check_input(self, name: str, tensor: Tensor) -> None:
        if role_of(self.model.tensors[name]).kind != "buffer":
            check_input(tensor, name=name, role="fine-tuned", source=self.model.source)

    def _blocks(self, name: str) -> Iterator[tuple[int, int] | None]:
        """Rows that are handled at once: a multiple of those that are added at once.

        So the sums are those of the repair that made the factors, in the same order.
        """
        info = self.merged.tensors[name]
        if not info.shape:
            yield None
            return
        per_row = max(1, prod(info.shape[1:]))
        step = max(1, CHUNK_ELEMENTS // per_row)
        wanted = STREAM_BYTES // (per_row * info.torch_dtype.itemsize)
        yield from row_chunks(info.shape, max(1, wanted // step) * step * per_row)


def _product(factors: Sequence[Factors], factor: float) -> _Product:
    """The one product that is added to a stored tensor."""
    if len(factors) == 1:
        (only,) = factors
        if only.stacked:
            return _Product(
                left=only.b,
                right=only.a,
                strength=only.scale * factor,
                transposed=only.transposed,
            )
        left, right = _sides(only)
        return _Product(left=left, right=right, strength=only.scale * factor)
    # Both sides of tied embeddings: one sum, so that the matrix is rounded once.
    sides = [_sides(each) for each in factors]
    return _Product(
        left=torch.cat(
            [left * each.scale for (left, _), each in zip(sides, factors, strict=True)], 1
        ),
        right=torch.cat([right for _, right in sides]),
        strength=factor,
    )


def _sides(factors: Factors) -> tuple[Tensor, Tensor]:
    """[rows, r] and [r, columns] of what is stored."""
    if factors.transposed:
        return factors.a.T, factors.b.T
    return factors.b, factors.a
