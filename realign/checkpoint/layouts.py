"""A checkpoint seen in the layout of another: fused as split, stacks of experts as tensors, names.

Weights of the same meaning are stored in many ways. `conform` shows one checkpoint under the names
and shapes of the fine-tune, so that everything after it pairs by name. Rows are read when they are
asked for, and bits are moved, never computed. Here: the view. Not here: which matrices mean the
same (`spellings`), and whether the result fits (`matching`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from realign.checkpoint.hashing import StreamHashes
from realign.checkpoint.headers import DTYPES, FLOATS, TensorInfo
from realign.checkpoint.names import role_of
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, slot_shape, stored_rows
from realign.checkpoint.spellings import Part, parts_of
from realign.progress import SILENT, Progress


@dataclass(frozen=True)
class _Recipe:
    """How one tensor of the fine-tune's layout comes from another checkpoint."""

    info: TensorInfo
    pieces: tuple[tuple[Slot, Slot], ...]
    """Target and source of every logical matrix in it, in row order."""
    renamed: bool
    """One tensor for one tensor, the name apart."""


def conform(other: Checkpoint, finetuned: Checkpoint) -> Checkpoint:
    """Show a checkpoint under the fine-tune's names and shapes, as far as meanings allow.

    Args:
        other: the checkpoint to read beside the fine-tune.
        finetuned: the one whose layout counts.

    Returns:
        `other` itself where nothing differs, else a view of it. Tensors without a counterpart keep
        their names: `matching.match` refuses them by name.
    """
    wanted = [name for name in finetuned.tensors if not _agree(finetuned, other, name)]
    if not wanted:
        return other
    ours = {name: parts_of(finetuned, name) for name in finetuned.tensors}
    theirs = {
        name: parts_of(other, name)
        for name in other.tensors
        if name not in ours or not _agree(finetuned, other, name)
    }
    found = _unique(part for parts in theirs.values() for part in parts)
    known = _unique(part for parts in ours.values() for part in parts)
    recipes: dict[str, _Recipe] = {}
    for name in wanted:
        sources = [found.get(part.key) for part in ours[name] if part.key in known]
        if len(sources) == len(ours[name]) and None not in sources:
            pairs = zip(ours[name], sources, strict=True)
            pieces = tuple((part.slot, source) for part, source in pairs if source is not None)
            recipe = _recipe(finetuned.tensors[name], pieces, other)
            if recipe is not None:
                recipes[name] = recipe
    return LayoutView(other, recipes, theirs) if recipes else other


def original(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it is stored: what a view looks at, or what was given."""
    return checkpoint.inner if isinstance(checkpoint, LayoutView) else checkpoint


def locate(checkpoint: Checkpoint, slot: Slot) -> Slot:
    """Where a logical matrix of the fine-tune's layout lies in a checkpoint as it is stored."""
    return checkpoint.locate(slot) if isinstance(checkpoint, LayoutView) else slot


class LayoutView(Checkpoint):
    """Another checkpoint under other names and in other shapes; made by `conform`."""

    def __init__(
        self,
        inner: Checkpoint,
        recipes: Mapping[str, _Recipe],
        candidates: Mapping[str, Sequence[Part]],
    ) -> None:
        """Take a checkpoint.

        Args:
            inner: what is looked at; the caller closes it.
            recipes: the tensors that are shown in another way.
            candidates: the parts of the tensors that may be hidden: where all are used.
        """
        self.inner = inner
        self._recipes = recipes
        self.source, self.folder, self.commit = inner.source, inner.folder, inner.commit
        self.kind, self.config = inner.kind, inner.config
        self.weight_files = inner.weight_files
        self.remarks = (*inner.remarks, *_remarks(inner, recipes))
        used = {source.key for each in recipes.values() for _, source in each.pieces}
        hidden = {n for n, parts in candidates.items() if all(p.slot.key in used for p in parts)}
        kept = {n: info for n, info in inner.tensors.items() if n not in hidden}
        shown = {name: recipe.info for name, recipe in recipes.items()}
        self.tensors = MappingProxyType(kept | shown)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `Checkpoint.read`; only the rows that are asked for are read and held."""
        there = self._same_shape(name)
        if there is not None:
            return self.inner.read(there, rows)
        recipe = self._recipes[name]
        shape = recipe.info.shape
        start, stop = rows or (0, shape[0])
        out = torch.empty((stop - start, *shape[1:]), dtype=recipe.info.torch_dtype)
        for target, source in recipe.pieces:
            first, last = stored_rows(target, shape)
            low, high = max(first, start), min(last, stop)
            if low >= high:
                continue
            place = out[low - start : high - start]
            if target.expert is None and not target.transposed:  # its rows are stored rows
                place.copy_(self._logical(source, low - first, high - first))
            elif target.expert is not None:
                matrix = logical_matrix(place, target)
                matrix.copy_(self._logical(source, 0, matrix.shape[0]))
            else:  # stored rows are columns of it
                d_out, _ = slot_shape(shape, target)
                columns = self._logical(source, 0, d_out)[:, low - first : high - first]
                logical_matrix(place, target).copy_(columns)
        return out

    def read_within(self, name: str, index: int, rows: tuple[int, int]) -> Tensor:
        """See `Checkpoint.read_within`."""
        there = self._same_shape(name)
        if there is None:
            return super().read_within(name, index, rows)
        return self.inner.read_within(there, index, rows)

    def reads_within(self, name: str) -> bool:
        """See `Checkpoint.reads_within`."""
        there = self._same_shape(name)
        return there is not None and self.inner.reads_within(there)

    def _same_shape(self, name: str) -> str | None:
        """The name in `inner` of a tensor that is shown as it is there."""
        recipe = self._recipes.get(name)
        if recipe is None:
            return name
        return recipe.pieces[0][1].tensor if recipe.renamed else None

    def locate(self, slot: Slot) -> Slot:
        """Where a logical matrix lies in `inner`."""
        recipe = self._recipes.get(slot.tensor)
        if recipe is None:
            return slot
        if recipe.renamed:
            return replace(slot, tensor=recipe.pieces[0][1].tensor)
        return next(source for target, source in recipe.pieces if target.key == slot.key)

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self.inner.close()

    def watch(self, hashes: StreamHashes) -> None:
        """See `Checkpoint.watch`."""
        self.inner.watch(hashes)

    def file_hashes(self, progress: Progress = SILENT) -> Mapping[str, str]:
        """See `Checkpoint.file_hashes`."""
        return self.inner.file_hashes(progress)

    def sidecars(self) -> Mapping[str, Path | bytes]:
        """See `Checkpoint.sidecars`."""
        return self.inner.sidecars()

    def _logical(self, source: Slot, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a logical matrix of `inner`."""
        shape = self.inner.tensors[source.tensor].shape
        first, last = stored_rows(source, shape)
        if not source.transposed:
            if source.expert is None:
                return self.inner.read(source.tensor, (first + start, first + stop))
            above = source.rows[0] if source.rows else 0
            return self.inner.read_within(source.tensor, first, (above + start, above + stop))
        whole = self.inner.read(source.tensor, (first, last))
        return logical_matrix(whole, source)[start:stop]


def _agree(finetuned: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether both store a tensor in the same way, the length of a vocabulary apart."""
    here, there = finetuned.tensors[name], other.tensors.get(name)
    if there is None:
        return False
    # Another length of the vocabulary is for `match` to judge.
    return here.shape == there.shape or role_of(here).kind in {"embedding", "head"}


def _unique(parts: Iterable[Part]) -> dict[str, Slot]:
    """Parts by key, without those whose key is not theirs alone."""
    listed = list(parts)
    count = Counter(part.key for part in listed)
    return {part.key: part.slot for part in listed if count[part.key] == 1}


def _recipe(
    here: TensorInfo, pieces: tuple[tuple[Slot, Slot], ...], other: Checkpoint
) -> _Recipe | None:
    infos = [other.tensors[source.tensor] for _, source in pieces]
    first = infos[0]
    if len(pieces) == 1 and _whole(pieces[0][0]) and _whole(pieces[0][1]):
        same_way = pieces[0][0].transposed == pieces[0][1].transposed
        if same_way:
            return _Recipe(replace(first, name=here.name), pieces, renamed=True)
    if not all(info.dtype in FLOATS for info in (here, *infos)):
        return None
    for (target, source), info in zip(pieces, infos, strict=True):
        if _logical_shape(here.shape, target) != _logical_shape(info.shape, source):
            return None
    dtypes = {info.dtype for info in infos}
    dtype = first.dtype if len(dtypes) == 1 else _widest(dtypes)
    nbytes = math.prod(here.shape) * DTYPES[dtype].itemsize
    return _Recipe(
        replace(first, name=here.name, dtype=dtype, shape=here.shape, nbytes=nbytes),
        pieces,
        renamed=False,
    )


def _whole(slot: Slot) -> bool:
    return slot.rows is None and slot.expert is None and slot.span is None


def _logical_shape(shape: tuple[int, ...], slot: Slot) -> tuple[int, ...]:
    if len(shape) >= 2:
        return slot_shape(shape, slot)
    return shape if slot.rows is None else (slot.rows[1] - slot.rows[0],)


def _widest(dtypes: set[str]) -> str:
    """A type that holds all values of several: two different halves need float32."""
    return "F64" if "F64" in dtypes else "F32"


def _remarks(other: Checkpoint, recipes: Mapping[str, _Recipe]) -> list[str]:
    """One line for names that differ, and one for what is packed differently."""
    lines: list[str] = []
    renamed = [name for name, each in recipes.items() if each.renamed]
    if renamed:
        lines.append(
            f"{other.source} spells {_tensors(renamed)} differently (first: {renamed[0]} is its "
            f"{recipes[renamed[0]].pieces[0][1].tensor})"
        )
    packed = [name for name, each in recipes.items() if not each.renamed]
    if packed:
        modules = dict.fromkeys(role_of(recipes[name].info).module for name in packed)
        sources = list(dict.fromkeys(s.tensor for _, s in recipes[packed[0]].pieces))
        shown = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
        lines.append(
            f"{other.source} packs {', '.join(modules)} differently: {_tensors(packed)} read from "
            f"the matrices of the same meaning (first: {packed[0]} from {shown})"
        )
    return lines


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
