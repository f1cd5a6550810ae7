"""Losses on replies and short trainings of a running model: what training methods share.

Here: losses and log-probabilities of replies, batches in a keyed order, AdamW on the matrices of a
plan. Not here: what is trained and why (`one_shot`, `somf`, `safe_patching`), training a model to
be kept (`realign.model.training`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from realign.errors import NonFiniteError
from realign.model.chat import EncodedReply
from realign.model.training import IGNORED, Example, collate, masked_loss
from realign.progress import Progress
from realign.repair.preparation import RunningModel
from realign.subspace.keyed import generator


def reply_loss(
    running: RunningModel,
    replies: Sequence[EncodedReply],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the mean cross-entropy over all reply tokens, in nats per token.

    Args:
        running: the model.
        replies: prompts with their replies; prompt tokens carry no loss.
        weights: see `RunningModel.logits`.
    """
    ids, labels = _padded(running, replies)
    return masked_loss(running.logits(ids, weights), labels)


def reply_logprobs(
    running: RunningModel,
    replies: Sequence[EncodedReply],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the summed log-probability of every reply, in nats [len(replies)]."""
    ids, labels = _padded(running, replies)
    logits, wanted = running.logits(ids, weights)[:, :-1], labels[:, 1:]
    counted = wanted != IGNORED
    chosen = logits.gather(-1, wanted.clamp_min(0)[..., None])[..., 0].float()
    logprobs = chosen - logits.float().logsumexp(-1)
    return (logprobs * counted).sum(-1)


def reply_positions(
    running: RunningModel, replies: Sequence[EncodedReply]
) -> tuple[Tensor, Tensor]:
    """Return token ids [n, length] and where logits predict a reply token, bool [n, length - 1]."""
    ids, labels = _padded(running, replies)
    return ids, labels[:, 1:] != IGNORED


def _padded(running: RunningModel, replies: Sequence[EncodedReply]) -> tuple[Tensor, Tensor]:
    examples = [Example(reply.ids, reply.start) for reply in replies]
    batch = collate(examples, pad_id=running.loaded.pad_id)
    device = running.loaded.device
    return batch.input_ids.to(device), batch.labels.to(device)


def shuffled(count: int, *, seed: int, method: str, role: str) -> list[int]:
    """Return the numbers below `count` in an order that depends on these alone."""
    return generator(seed=seed, method=method, key="", role=role).permutation(count).tolist()


def batches(count: int, size: int, *, seed: int, method: str) -> Iterator[list[int]]:
    """Yield indices of examples, pass after pass, every pass in an order of its own."""
    size = min(size, count)
    epoch, waiting = 0, list[int]()
    while True:
        while len(waiting) < size:
            waiting += shuffled(count, seed=seed, method=method, role=f"order {epoch}")
            epoch += 1
        yield waiting[:size]
        waiting = waiting[size:]


def adamw_run(
    running: RunningModel,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    label: str,
    progress: Progress,
    done: Callable[[float], bool] | None = None,
) -> list[float]:
    """Step the matrices of the plan with AdamW, without decay, at a constant rate.

    Args:
        running: the model; its weights change.
        loss_of: the loss of a step, to be made smaller.
        steps: at most so many.
        lr: learning rate.
        label: what the progress shows.
        progress: where it is shown.
        done: asked with the loss before every update; True ends the run.

    Returns:
        The loss before every update.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    optimizer = torch.optim.AdamW(running.parameters(), lr=lr, weight_decay=0.0)
    losses: list[float] = []
    with progress.task(label, total=steps) as task:
        for step in range(steps):
            running.clear_gradients()
            loss = loss_of(step)
            losses.append(finite(float(loss.detach()), step=step, label=label))
            if done is not None and done(losses[-1]):
                break
            loss.backward()
            running.clear_other_gradients()
            torch.nn.utils.clip_grad_norm_(running.parameters(), 1.0)
            optimizer.step()
            task.advance()
    running.clear_gradients()
    return losses


def finite(loss: float, *, step: int, label: str) -> float:
    """Return the loss.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise NonFiniteError(f"{label}: the loss is {loss} at step {step}", "lower the rate (lr)")
    return loss
