"""Next-token log-probabilities of a running model, teacher-forced, in float64.

The batching and the numerics are here; what is asked of the numbers is in scoring.py and trace.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from realign.errors import NonFiniteError
from realign.model.batching import TOKEN_BUDGET, forward, pad_left, plan_batches
from realign.model.generation import check_lengths
from realign.model.loading import LoadedModel
from realign.progress import SILENT, Progress


def log_softmax64(logits: Tensor) -> Tensor:
    """Log-probabilities in float64 (on the CPU where the device has no float64)."""
    if logits.device.type == "mps":
        logits = logits.cpu()
    return torch.log_softmax(logits.to(torch.float64), dim=-1)


def continuation_logprobs(
    loaded: LoadedModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = SILENT,
) -> list[Tensor]:
    """Log-probability of every token of each continuation, given what stands before it.

    Args:
        loaded: the model.
        pairs: (prompt ids, continuation ids); the prompt is not empty.
        batch_size: most pairs at a time.
        token_budget: most padded positions at a time.
        progress: counts pairs.

    Returns:
        In the order of `pairs`, float64 [length of the continuation], on the CPU.

    Raises:
        ModelError: a pair is longer than the model's positions.
        NonFiniteError: the model's outputs are NaN.
    """
    results: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * len(pairs)
    sequences = [[*prompt, *continuation] for prompt, continuation in pairs]
    rows = [len(continuation) + 1 for _, continuation in pairs]
    batches = last_logits(
        loaded,
        sequences,
        rows,
        batch_size=batch_size,
        token_budget=token_budget,
        progress=progress,
        what="scoring",
    )
    for index, logits in batches:
        targets = torch.tensor(list(pairs[index][1]), dtype=torch.long)
        parts = [
            log_softmax64(some).cpu().gather(1, target[:, None])[:, 0]
            for some, target in zip(
                logits[:-1].split(_rows_at_once(logits)),
                targets.split(_rows_at_once(logits)),
                strict=True,
            )
        ]
        results[index] = torch.cat(parts)
    return results


def last_logits(
    loaded: LoadedModel,
    sequences: Sequence[Sequence[int]],
    rows: Sequence[int],
    *,
    batch_size: int,
    token_budget: int,
    progress: Progress,
    what: str,
) -> Iterator[tuple[int, Tensor]]:
    """For each sequence its index and the logits [rows, vocabulary] at its last positions."""
    check_lengths(loaded, [len(sequence) for sequence in sequences])
    plan = plan_batches(
        [len(sequence) for sequence in sequences], batch_size=batch_size, token_budget=token_budget
    )
    with progress.task(what, total=len(sequences), unit="sequences") as task:
        for indices in plan:
            batch = pad_left(sequences, indices, pad_id=loaded.pad_id, device=loaded.device)
            with torch.no_grad():
                logits: Tensor = forward(
                    loaded.model, batch, last=max(rows[index] for index in indices)
                ).logits
            for row, index in enumerate(indices):
                assert len(sequences[index]) >= rows[index] >= 1, (index, rows[index])
                some = logits[row, -rows[index] :]
                if bool(torch.isnan(some).any()):
                    raise NonFiniteError(
                        f"{loaded.name} gives NaN for prompt {index}",
                        "its weights may be damaged, or overflow in this dtype",
                    )
                yield index, some
            task.advance(len(indices))


def _rows_at_once(logits: Tensor) -> int:
    return max(1, 2**25 // logits.shape[1])  # 256 MiB in float64
