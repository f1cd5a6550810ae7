"""The trainings and scores of SafePatching, on a model in memory.

Here: ascent and descent on harmful answers, SNIP scores, thinning. Not here: the settings and the
merge (`safe_patching`). Nothing of the over-safety patch leaves this module but its merged part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from realign.model.chat import EncodedReply
from realign.model.training import deterministic
from realign.repair.kept_tensors import as_tensors
from realign.repair.methods.safe_patching import SafePatching
from realign.repair.methods.short_runs import adamw_run, batches, reply_loss
from realign.repair.preparation import RunningModel, Workbench
from realign.subspace.dare import kept_entries


def make_patches(method: SafePatching, workbench: Workbench) -> dict[str, Tensor]:
    """Return alpha d_SE + beta d_OSM as "delta/key", with facts as scalars."""
    replies = workbench.examples("harmful", role="finetuned")
    with workbench.running("finetuned") as running, deterministic():
        start = {key: running.weight(key).to("cpu", copy=True) for key in running.keys}
        patches = [_Patch(method, workbench, running, replies, ascend=True)]
        if method.beta:
            for key, weight in start.items():
                running.weight(key).copy_(weight)
            patches.append(_Patch(method, workbench, running, replies, ascend=False))
        made = _facts(patches)
        for key, weight in start.items():
            thinned = [
                _thinned(patch.weights.pop(key) - weight, method, workbench, key=key, role=role)
                for patch, role in zip(patches, ("safety", "over-safety"), strict=False)
            ]
            scores = [patch.scores.pop(key) for patch in patches]
            made[f"delta/{key}"] = method.merged(
                thinned[0],
                scores[0],
                over=thinned[1] if len(thinned) > 1 else None,
                over_scores=scores[1] if len(scores) > 1 else None,
            )
    return made


class _Patch:
    """A patched model: its weights and scores, on the CPU, and what its training did."""

    def __init__(
        self,
        method: SafePatching,
        workbench: Workbench,
        running: RunningModel,
        replies: Sequence[EncodedReply],
        *,
        ascend: bool,
    ) -> None:
        sign, role = (-1.0, "safety patch") if ascend else (1.0, "over-safety patch")
        order = batches(len(replies), method.batch, seed=workbench.seed, method=f"patch {ascend}")
        self.before = mean_loss(running, replies)

        def loss_of(step: int) -> Tensor:
            return sign * reply_loss(running, [replies[i] for i in next(order)])

        def risen(loss: float) -> bool:
            # A batch's loss tells when to look; the loss over all texts decides.
            if not ascend or -loss < self.before + method.rise:
                return False
            return mean_loss(running, replies) >= self.before + method.rise

        losses = adamw_run(
            running,
            loss_of,
            steps=method.steps,
            lr=method.lr,
            label=role,
            progress=workbench.progress,
            done=risen,
        )
        self.steps = len(losses)
        self.after = mean_loss(running, replies)
        scores = snip_scores(running, replies)
        self.scores = {key: each.cpu() for key, each in scores.items()}
        self.weights = {key: running.weight(key).to("cpu", copy=True) for key in running.keys}


def snip_scores(running: RunningModel, replies: Sequence[EncodedReply]) -> dict[str, Tensor]:
    """Return the mean over texts of |W (.) dL/dW| by slot key, absolute before it is averaged."""
    totals = {key: torch.zeros_like(running.weight(key)) for key in running.keys}
    for reply in replies:
        running.clear_gradients()
        reply_loss(running, [reply]).backward()
        for key, total in totals.items():
            gradient = running.gradient(key)
            if gradient is not None:
                total += (running.weight(key) * gradient).abs()
    running.clear_gradients()
    return {key: total / len(replies) for key, total in totals.items()}


@torch.no_grad()
def mean_loss(running: RunningModel, replies: Sequence[EncodedReply]) -> float:
    """Return the loss over all reply tokens, in nats per token."""
    total, tokens = 0.0, 0
    for at in range(0, len(replies), 8):
        part = replies[at : at + 8]
        count = sum(len(each.reply_ids) for each in part)
        total += count * float(reply_loss(running, part))
        tokens += count
    return total / tokens


def _thinned(
    patch: Tensor, method: SafePatching, workbench: Workbench, *, key: str, role: str
) -> Tensor:
    """M (.) P; without the factor 1 / p, as in the paper."""
    if method.p == 1.0:
        return patch
    kept = kept_entries(
        patch, 1.0 - method.p, seed=workbench.seed, method=method.name, key=key, role=role
    )
    return patch.where(kept, 0.0)


def _facts(patches: Sequence[_Patch]) -> dict[str, Tensor]:
    facts: dict[str, float | int] = {}
    names: Mapping[int, str] = {0: "safety", 1: "over"}
    for number, patch in enumerate(patches):
        facts |= {
            f"{names[number]}_steps": patch.steps,
            f"{names[number]}_loss_before": patch.before,
            f"{names[number]}_loss_after": patch.after,
        }
    return as_tensors(facts)
