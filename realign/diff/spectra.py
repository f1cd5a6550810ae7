"""The spectrum of a change: how many directions it has, and how much lies in the first of them.

A change that a LoRA adapter of rank 8 made has at most 8 directions; one of full fine-tuning has as
many as the matrix. The Gram matrix of the smaller side is summed up in float64 from pieces of both
checkpoints, so the difference itself is never held.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from realign.checkpoint.headers import FLOATS
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, slot_shape, slots_of, stored_rows
from realign.subspace.eigen import decomposing, eigenvalues
from realign.subspace.entropy import effective_rank, kept_energy, stable_rank
from realign.subspace.threads import torch_threads

_BLOCK_ENTRIES = 2**20
"""Entries of the difference at a time."""
_MOST_THREADS = 4
_GRAM_BYTES = 2**30
"""All Gram matrices that are worked on at once, unless a single one is larger."""


@dataclass(frozen=True)
class MatrixSpectrum:
    """The spectrum of B - A for one logical matrix (a stored tensor may hold several)."""

    key: str
    module: str
    layer: int | None
    shape: tuple[int, int]
    """[d_out, d_in]."""
    stable_rank: float
    """Sum of the squared singular values by the largest of them."""
    effective_rank: float
    """exp of the entropy (nats) of the shares of energy, the squared singular values."""
    singular_values: tuple[float, ...]
    """The largest, descending."""
    top_share: float
    """Share of the energy in those."""

    def to_json(self) -> dict[str, Any]:
        """The spectrum as JSON."""
        return asdict(self) | {
            "shape": list(self.shape),
            "singular_values": list(self.singular_values),
        }


def matrices_of(a: Checkpoint, name: str, *, widest: int | None) -> tuple[Slot, ...]:
    """The logical matrices of a tensor of which a spectrum is to be taken.

    Args:
        a: the checkpoint that gives names and shapes.
        name: one of its tensors.
        widest: leave out matrices whose smaller side is longer; None takes all.
    """
    info = a.tensors[name]
    if info.dtype not in FLOATS or len(info.shape) < 2 or not info.numel:
        return ()
    found: list[Slot] = []
    for slot in slots_of(a, name):
        is_matrix = len(info.shape) == 2 or slot.expert is not None
        if is_matrix and (widest is None or min(slot_shape(info.shape, slot)) <= widest):
            found.append(slot)
    return tuple(found)


def spectra_of_change(
    a: Checkpoint, b: Checkpoint, slots: Sequence[Slot], *, directions: int
) -> Iterator[MatrixSpectrum]:
    """Yield the spectrum of every slot in order; a few matrices are worked on at once."""
    widest = max((min(slot_shape(a.tensors[s.tensor].shape, s)) for s in slots), default=1)
    processors = os.cpu_count() or 1
    workers = max(1, min(_MOST_THREADS, processors, _GRAM_BYTES // (8 * widest**2)))
    waiting: deque[Future[MatrixSpectrum]] = deque()
    with torch_threads(max(1, processors // workers)), ThreadPoolExecutor(workers) as pool:
        try:
            for slot in slots:
                waiting.append(pool.submit(spectrum_of_change, a, b, slot, directions=directions))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def spectrum_of_change(
    a: Checkpoint, b: Checkpoint, slot: Slot, *, directions: int
) -> MatrixSpectrum:
    """The spectrum of B - A for one logical matrix.

    Args:
        a: gives names and shapes.
        b: holds a tensor of that name and shape, too.
        slot: one of `matrices_of`.
        directions: how many singular values are kept.

    Raises:
        NonFiniteError: the difference holds NaN or infinity.
        CheckpointError: the decomposition does not converge.
    """
    shape = a.tensors[slot.tensor].shape
    d_out, d_in = slot_shape(shape, slot)
    plain = slot.expert is None and not slot.transposed
    gram = (_by_rows if plain and d_out > d_in else _by_columns)(a, b, slot)
    with decomposing(slot.key):
        energies = eigenvalues(gram, overwrite=True)
    kept = min(directions, energies.numel())
    return MatrixSpectrum(
        key=slot.key,
        module=slot.module,
        layer=slot.layer,
        shape=(d_out, d_in),
        stable_rank=stable_rank(energies),
        effective_rank=effective_rank(energies),
        singular_values=tuple(energies[:kept].sqrt().tolist()),
        top_share=kept_energy(energies, kept),
    )


def _by_rows(a: Checkpoint, b: Checkpoint, slot: Slot) -> Tensor:
    """(B - A)^T (B - A) of a tall matrix, which is never in memory as a whole (embeddings)."""
    shape = a.tensors[slot.tensor].shape
    start, stop = stored_rows(slot, shape)
    out = torch.zeros(shape[1], shape[1], dtype=torch.float64)
    step = max(1, _BLOCK_ENTRIES // shape[1])
    for at in range(start, stop, step):
        rows = (at, min(at + step, stop))
        change = _change(a.read(slot.tensor, rows), b.read(slot.tensor, rows))
        out.addmm_(change.T, change)
    return out


def _by_columns(a: Checkpoint, b: Checkpoint, slot: Slot) -> Tensor:
    """The Gram matrix of the smaller side of a matrix that is read whole, in its types on disk."""
    rows = stored_rows(slot, a.tensors[slot.tensor].shape)
    one, two = (logical_matrix(each.read(slot.tensor, rows), slot) for each in (a, b))
    if one.shape[0] > one.shape[1]:
        one, two = one.T, two.T
    n, length = one.shape
    out = torch.zeros(n, n, dtype=torch.float64)
    step = max(1, _BLOCK_ENTRIES // n)
    for at in range(0, length, step):
        change = _change(one[:, at : at + step], two[:, at : at + step])
        out.addmm_(change, change.T)
    return out


def _change(a: Tensor, b: Tensor) -> Tensor:
    return b.to(torch.float64).sub_(a.to(torch.float64)) if b.dtype != torch.float64 else b - a
