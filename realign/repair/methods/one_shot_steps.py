"""The steps of Safety at One Shot, taken on a model in memory.

Here: the example, the leading part of a gradient, the line search, plain AdamW. Not here: the
settings, and what becomes of the change (`one_shot`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from realign.errors import NonFiniteError, UsageError
from realign.model.chat import EncodedReply, encode_reply
from realign.model.loading import LoadedModel
from realign.model.training import deterministic
from realign.repair.kept_tensors import as_tensors
from realign.repair.methods.one_shot import OneShot
from realign.repair.methods.short_runs import adamw_run, reply_loss
from realign.repair.preparation import RunningModel, Workbench
from realign.subspace.spectrum import top_triplets

PROMPT = "Tell me how to hurt someone without getting caught."
REFUSAL = (
    "I'm sorry, but I can't help with that. I won't give advice on harming people. If someone is "
    "in danger, please contact the emergency services."
)

_HALVINGS = 30
_FALL = 1e-6
"""Least fall of the loss, in nats per token and relative to it above 1: less is rounding."""
_MOST_UNKNOWN = 0.1
"""Share of the generic example's tokens that a vocabulary may lack."""


def train_on_refusal(method: OneShot, workbench: Workbench) -> dict[str, Tensor]:
    """Return the change of every matrix as "table/key", with facts as scalars.

    Raises:
        UsageError: the vocabulary lacks the words of the generic example.
        NonFiniteError: the loss on the example, or a gradient, is NaN or infinite.
    """
    with workbench.running("finetuned") as running, deterministic():
        example = _example(method, workbench, running.loaded)
        run = _sft if method.mode == "sft" else _projected
        return run(method, workbench, running, example)


def _example(method: OneShot, workbench: Workbench, loaded: LoadedModel) -> EncodedReply:
    if method.example == "safe":
        return workbench.examples("safe", role="finetuned")[0]
    tokenizer = loaded.tokenizer
    words = tokenizer(f"{PROMPT} {REFUSAL}", add_special_tokens=False)["input_ids"]
    ids: list[int] = list(words)  # pyright: ignore[reportArgumentType]
    unknown = sum(token == tokenizer.unk_token_id for token in ids)
    if not ids or unknown > _MOST_UNKNOWN * len(ids):
        raise UsageError(
            f"the vocabulary of {loaded.name} does not know the words of one_shot's example",
            "give a prompt with its refusal: --safe-data FILE",
        )
    return encode_reply(tokenizer, PROMPT, REFUSAL, end_of_turn=True)


def _projected(
    method: OneShot, workbench: Workbench, running: RunningModel, example: EncodedReply
) -> dict[str, Tensor]:
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {key: [] for key in running.keys}
    before = loss = _finite_loss(running, example)
    taken = 0
    with workbench.progress.task("one refusal", total=method.rounds) as task:
        while taken < method.rounds and loss > method.target_loss:
            running.clear_gradients()
            reply_loss(running, [example]).backward()
            steps: dict[str, tuple[Tensor, Tensor]] = {}
            for key in running.keys:
                gradient = running.gradient(key)
                if gradient is None or not bool(gradient.any()):
                    continue
                if not bool(torch.isfinite(gradient).all()):
                    raise NonFiniteError(
                        f"the gradient of the refusal at {key} of {running.loaded.name} is not "
                        "finite",
                        "check the weights of this model",
                    )
                steps[key] = leading_part(gradient, method.k)
            running.clear_gradients()
            eta, after = line_search(running, steps, example, loss=loss)
            if eta == 0.0:
                break
            for key, (left, right) in steps.items():
                factors[key].append((-eta * left, right))
            loss, taken = after, taken + 1
            task.advance()
    made = _facts(before, loss, taken)
    for key, parts in factors.items():
        d_out, d_in = running.weight(key).shape
        made[f"left/{key}"] = torch.cat([torch.zeros(d_out, 0), *(p[0].cpu() for p in parts)], 1)
        made[f"right/{key}"] = torch.cat([torch.zeros(0, d_in), *(p[1].cpu() for p in parts)])
    return made


def _sft(
    method: OneShot, workbench: Workbench, running: RunningModel, example: EncodedReply
) -> dict[str, Tensor]:
    original = {key: running.weight(key).to("cpu", copy=True) for key in running.keys}
    before = _finite_loss(running, example)
    adamw_run(
        running,
        lambda _: reply_loss(running, [example]),
        steps=method.epochs,
        lr=method.lr,
        label="one refusal",
        progress=workbench.progress,
    )
    made = _facts(before, _finite_loss(running, example), method.epochs)
    for key, weight in original.items():
        made[f"delta/{key}"] = running.weight(key).cpu() - weight
    return made


def leading_part(gradient: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (U_k S_k, V_k^T) of a gradient [d_out, d_in], float32: its k leading directions.

    Fewer where the numerical rank in float32 is smaller.
    """
    triplets = top_triplets(gradient.float(), k)
    floor = float(triplets.s[0]) * max(gradient.shape) * torch.finfo(torch.float32).eps
    kept = int(torch.count_nonzero(triplets.s > floor))
    left, right = triplets.u[:, :kept] * triplets.s[:kept], triplets.v[:, :kept].T
    return left.float(), right.float().contiguous()


def line_search(
    running: RunningModel,
    steps: Mapping[str, tuple[Tensor, Tensor]],
    example: EncodedReply,
    *,
    loss: float,
) -> tuple[float, float]:
    """Take the steps -eta left right, with eta halved from 1 until the loss falls.

    A fall within rounding, of 1e-6 nats or of the loss where that is above 1, is none.

    Returns:
        eta and the loss after it; (0, loss), the weights as they were, where no eta helps.
    """
    below = loss - _FALL * max(1.0, abs(loss))
    start = {key: running.weight(key).clone() for key in steps}
    eta = 1.0
    for _ in range(_HALVINGS):
        for key, (left, right) in steps.items():
            running.weight(key).copy_(start[key].addmm(left, right, alpha=-eta))
        after = _loss(running, example)
        if after < below:  # False for NaN
            return eta, after
        eta /= 2
    for key, weight in start.items():
        running.weight(key).copy_(weight)
    return 0.0, loss


def _loss(running: RunningModel, example: EncodedReply) -> float:
    with torch.no_grad():
        return float(reply_loss(running, [example]))


def _finite_loss(running: RunningModel, example: EncodedReply) -> float:
    loss = _loss(running, example)
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"{running.loaded.name}: the loss on the refusal is {loss}",
            "check the weights of this model; with mode = sft, lower the rate (lr)",
        )
    return loss


def _facts(before: float, after: float, rounds: int) -> dict[str, Tensor]:
    return as_tensors({"loss_before": before, "loss_after": after, "rounds": rounds})
