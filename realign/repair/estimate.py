"""What a repair will read, write and hold in memory, from headers alone.

The figures are for people who decide whether a run fits their machine; constants that stand for
what was measured say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from realign.checkpoint.matching import Matching, TensorPair
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import slot_shape
from realign.repair.method import Method
from realign.repair.request import Inputs

INTERPRETER_BYTES = 225 * 2**20
"""Resident size of Python with torch imported, before any tensor."""

MODEL_LIBRARY_BYTES = 150 * 2**20
"""What transformers adds, where a model is run."""

STREAM_BYTES = 4 * 2**20
"""Tensors that are copied or edited entry by entry are read in chunks of about this size."""


@dataclass(frozen=True)
class Estimate:
    """What the run is expected to move and to hold, in bytes."""

    read: int
    """Tensors, and every weight file once more for its hash in the manifest."""
    written: int
    peak_memory: int
    """Resident memory at its highest, the interpreter included."""
    largest_matrix: int
    """Entries of the largest matrix that is decomposed; 0 for element-wise methods."""


def estimate_repair(
    method: Method,
    matching: Matching,
    inputs: Inputs,
    used: Mapping[str, Checkpoint],
    *,
    patch: bool,
) -> Estimate:
    """Estimate one run.

    Args:
        method: with its safety vector settled.
        matching: what is edited and what is copied.
        inputs: the open checkpoints.
        used: those that the method reads beside the fine-tune.
        patch: whether only the edit is written.
    """
    finetuned = inputs.finetuned
    read = written = held = largest = 0
    for pair in matching.pairs:
        info = finetuned.tensors[pair.role.name]
        written += info.nbytes
        if pair.action == "copy":
            read += 0 if patch else info.nbytes
            continue
        read += info.nbytes + sum(other.tensors[pair.role.name].nbytes for other in used.values())
        if not method.elementwise:
            matrix, peak = _matrix_bytes(pair, info.shape, info.nbytes, inputs=1 + len(used))
            largest, held = max(largest, matrix), max(held, peak)
    checkpoints = [finetuned, *used.values()]
    files = {file for checkpoint in checkpoints for file in checkpoint.weight_files}
    read += sum(file.stat().st_size for file in files)
    # Measured: a set of chunks in work and one read ahead take three times their size, because the
    # allocator keeps what two threads free; hashing and the libraries' own buffers take the rest.
    held = max(held, STREAM_BYTES * 6 * len(checkpoints)) + 20 * 2**20
    if method.needs_anchors:
        model = sum(info.nbytes for info in used["aligned"].tensors.values())
        read += model
        # While they are collected, all moments are held; for the edit they are read one by one.
        held = max(held, model + _moment_bytes(matching, finetuned)) + MODEL_LIBRARY_BYTES
    return Estimate(
        read=read,
        written=0 if patch else written,
        peak_memory=INTERPRETER_BYTES + held,
        largest_matrix=largest,
    )


def _matrix_bytes(
    pair: TensorPair, shape: tuple[int, ...], nbytes: int, *, inputs: int
) -> tuple[int, int]:
    """Entries of the largest matrix of a tensor, and the bytes held while it is decomposed."""
    numel = max(1, math.prod(shape))
    itemsize = max(1, nbytes // numel)
    best = (0, 0)
    for slot in pair.slots:
        d_out, d_in = slot_shape(shape, slot)
        entries, smaller = d_out * d_in, min(d_out, d_in)
        # Every checkpoint twice (one set is read ahead), the result; two float32 differences and
        # one of scratch; in float64 the Gram, its eigenvectors, their copy and LAPACK's workspace.
        peak = entries * (itemsize * (2 * inputs + 1) + 12) + smaller * smaller * 8 * 6
        best = max(best, (entries, peak), key=lambda each: each[1])
    return best


def _moment_bytes(matching: Matching, finetuned: Checkpoint) -> int:
    """Float64 moments of every matrix, on its smaller side, as they are collected."""
    shapes = [
        slot_shape(finetuned.tensors[slot.tensor].shape, slot)
        for pair in matching.pairs
        for slot in pair.slots
    ]
    return sum(min(shape) ** 2 * 8 for shape in shapes)
