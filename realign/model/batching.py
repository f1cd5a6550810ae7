"""Sequences of different lengths into padded batches: which go together, and the tensors.

Longest first, so that a run that does not fit fails at once, and neighbours are of similar length.
Padding is on the left with an explicit attention mask and position ids made from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from realign.errors import ModelError, RealignError, UsageError

TOKEN_BUDGET = 32_768
"""Padded positions per batch: bounds activations and the cache, whatever the batch size."""


@dataclass(frozen=True)
class Batch:
    """Left-padded sequences [rows, length] on the model's device."""

    indices: tuple[int, ...]  # which of the caller's sequences the rows are
    input_ids: Tensor
    attention_mask: Tensor  # int64, 1 at real tokens
    position_ids: Tensor  # int64, counted from the first real token; 0 at padding
    padded: bool = True  # whether there is any

    @property
    def length(self) -> int:
        """Padded length in tokens."""
        return int(self.input_ids.shape[1])


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    extra: int = 0,
    token_budget: int = TOKEN_BUDGET,
    padded: bool = True,
) -> list[list[int]]:
    """Indices grouped into batches: longest first, equal lengths in the order given.

    Args:
        lengths: tokens per sequence.
        batch_size: most rows in a batch.
        extra: positions every row will grow by (new tokens).
        token_budget: most padded positions in a batch; one row always fits.
        padded: False puts only equal lengths together, for a model that padding disturbs.

    Raises:
        UsageError: `batch_size` or `token_budget` below 1.
    """
    for name, value in (("batch_size", batch_size), ("token_budget", token_budget)):
        if value < 1:
            raise UsageError(f"{name} is {value}", "it must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        width = max(lengths[order[start]] + extra, 1)  # the first is the longest
        rows = min(batch_size, max(1, token_budget // width))
        if not padded:
            same = sum(lengths[index] == lengths[order[start]] for index in order[start:])
            rows = min(rows, same)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def waves_of(
    plan: Sequence[Sequence[int]],
    ids: Sequence[Sequence[int]],
    *,
    position_bytes: int,
    held_bytes: int,
) -> Iterator[list[Sequence[int]]]:
    """Batches in groups whose hidden states are held together; at least one batch in each."""
    wave: list[Sequence[int]] = []
    held = 0
    for indices in plan:
        cost = position_bytes * len(indices) * max(len(ids[index]) for index in indices)
        if wave and held + cost > held_bytes:
            yield wave
            wave, held = [], 0
        wave.append(indices)
        held += cost
    if wave:
        yield wave


def pad_left(
    sequences: Sequence[Sequence[int]],
    indices: Sequence[int],
    *,
    pad_id: int,
    device: torch.device,
) -> Batch:
    """The sequences at `indices` as one batch; `pad_id` fills positions that nothing attends to."""
    length = max(len(sequences[index]) for index in indices)
    ids = torch.full((len(indices), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(indices), length), dtype=torch.long)
    for row, index in enumerate(indices):
        tokens = sequences[index]
        if tokens:
            ids[row, length - len(tokens) :] = torch.tensor(tokens, dtype=torch.long)
            mask[row, length - len(tokens) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0) * mask
    padded = not bool(mask.all())
    return Batch(tuple(indices), ids.to(device), mask.to(device), positions.to(device), padded)


def forward(model: Any, batch: Batch, *, last: int | None = None) -> Any:
    """Run `model` (a causal model or its decoder) on `batch` without a cache.

    Args:
        model: a transformers module.
        batch: its inputs.
        last: compute logits for this many last positions only, where the model can; the caller
            takes the last ones of what comes back in either case.
    """
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"attention_mask": batch.attention_mask, "use_cache": False}
    # Without padding a model's own count is right, also where it does not begin at 0 (RoBERTa).
    if "position_ids" in accepted and batch.padded:
        options["position_ids"] = batch.position_ids
    if last is not None and "logits_to_keep" in accepted:
        options["logits_to_keep"] = last
    return model(input_ids=batch.input_ids, **options)


@contextmanager
def explained(name: str) -> Generator[None]:
    """Turn whatever a model's own code raises while it runs into one line that names the model.

    Raises:
        ModelError: anything but our own errors, failed assertions and a lack of memory.
    """
    try:
        yield
    except (RealignError, AssertionError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # an architecture's code can raise anything
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"{name} cannot be run by transformers: {type(error).__name__}: "
            f"{lines[0] if lines else ''}",
            "methods that need no activations do not run it (replace, delta_svd, resta, wise_ft)",
        ) from error


def padding_matters(
    model: Any, sequences: Sequence[Sequence[int]], *, pad_id: int, device: torch.device
) -> bool:
    """Whether padding on the left changes what a model says: try it on the shortest sequence.

    Recurrent models that read no attention mask carry the padding in their state, and some encoders
    count positions in a way of their own. Differences below the square root of the dtype's
    precision (relative, Frobenius) are rounding.
    """
    lengths = [len(each) for each in sequences]
    if not lengths or min(lengths) in (0, max(lengths)):
        return False
    short = lengths.index(min(lengths))
    seen: list[Tensor] = []
    for indices in ((short,), (short, lengths.index(max(lengths)))):
        batch = pad_left(sequences, indices, pad_id=pad_id, device=device)
        with torch.no_grad(), explained(type(model).__name__):
            output = forward(model, batch)[0]
        seen.append(output[0, -lengths[short] :])
    alone, beside = seen
    if alone.shape != beside.shape or not alone.is_floating_point():
        return False
    tolerance = torch.finfo(alone.dtype).eps ** 0.5
    difference = (alone.double() - beside.double()).norm()
    return bool(difference > tolerance * alone.double().norm())


def pad_flags(flags: Sequence[Sequence[bool]], indices: Sequence[int], *, batch: Batch) -> Tensor:
    """Per-token flags of the batch's rows as a bool tensor [rows, length]; False at padding."""
    padded = torch.zeros(tuple(batch.input_ids.shape), dtype=torch.bool)
    for row, index in enumerate(indices):
        if flags[index]:
            padded[row, batch.length - len(flags[index]) :] = torch.tensor(flags[index])
    return padded.to(batch.input_ids.device)
