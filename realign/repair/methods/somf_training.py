"""The training of SOMF's mask logits, with gradients through the fused model.

Here: what is masked and how weights come of it, the two losses, the loop. Not here: the mask's
mathematics (`realign.subspace.concrete`), what is made of the logits (`somf`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from realign.model.chat import EncodedReply
from realign.model.training import TrainingPlan, deterministic
from realign.progress import Progress
from realign.repair.edit import Layer
from realign.repair.kept_tensors import as_tensors
from realign.repair.methods.short_runs import (
    batches,
    finite,
    reply_logprobs,
    reply_positions,
    shuffled,
)
from realign.repair.methods.somf import MICRO_TOKENS, Somf, task_vectors
from realign.repair.preparation import RunningModel, Workbench
from realign.subspace.concrete import concrete, factor
from realign.subspace.keyed import uniforms
from realign.subspace.merging import magnitude_at, ties

WARMUP_STEPS = 40
"""The authors' scripts warm up 30 to 50 steps; never more than a tenth of all here."""

Masks = Mapping[str, Tensor]
"""Factors m / mean(m) by unit: a slot key, or that of a factor."""


def train_logits(method: Somf, workbench: Workbench) -> dict[str, Tensor]:
    """Train and return the logits by table and slot key, with facts as scalars."""
    with workbench.running("finetuned") as running, deterministic():
        fusion = _AdapterFusion if method.space == "adapter" else _MergedFusion
        fused = fusion(method, workbench, running)
        if not fused.shapes:
            return {}
        loss = (_Dpo if method.loss == "dpo" else _Refusal)(method, workbench, running)
        logits, facts = train_masks(
            method,
            fused,
            loss,
            seed=workbench.seed,
            device=workbench.device,
            progress=workbench.progress,
        )
        return fused.stored(logits) | as_tensors(facts)


class Fusion(ABC):
    """The weights W'(x) of every matrix; the model in memory is the plain fusion, all masks 1."""

    shapes: dict[str, tuple[int, int]]
    """Of the logits, by unit."""

    @abstractmethod
    def weights(self, masks: Masks) -> dict[str, Tensor]:
        """W' by slot key."""

    @abstractmethod
    def stored(self, logits: Masks) -> dict[str, Tensor]:
        """What the cache keeps."""


class _MergedFusion(Fusion):
    """Masks on task vectors. All rules but TIES are linear: one merged vector stands for all."""

    def __init__(self, method: Somf, workbench: Workbench, running: RunningModel) -> None:
        self._method, self._running = method, running
        device = running.loaded.device
        self._layers: dict[str, Layer] = {}
        self._vectors: dict[str, list[Tensor]] = {}
        for layer in workbench.layers():
            vectors = [each.to(device, torch.float32) for each in task_vectors(layer)]
            if any(bool(each.any()) for each in vectors):
                self._vectors[layer.key] = vectors
                self._layers[layer.key] = _named(layer)
        self._nonlinear = method.merge == "ties" and any(len(v) > 1 for v in self._vectors.values())
        if self._nonlinear:
            self._aligned = {
                key: running.weight(key) - vectors[0] for key, vectors in self._vectors.items()
            }
        else:
            for key, vectors in self._vectors.items():
                merged = method.merged(vectors, self._layers[key], thresholds=None)
                if len(vectors) > 1:
                    running.weight(key).add_(merged - vectors[0])
                self._vectors[key] = [merged]
        self.shapes = {
            key: _logits_shape(vectors[0], method) for key, vectors in self._vectors.items()
        }
        if self._nonlinear:
            plain = self.weights({key: torch.ones((), device=device) for key in self._vectors})
            for key, weight in plain.items():
                running.weight(key).copy_(weight)

    def weights(self, masks: Masks) -> dict[str, Tensor]:
        if not self._nonlinear:
            return {
                key: torch.addcmul(self._running.weight(key), masks[key] - 1.0, vector)
                for key, (vector,) in self._vectors.items()
            }
        thresholds = self._thresholds(masks)
        scale = cast(float, self._method.merge_lambda)
        return {
            key: self._aligned[key] + ties([masks[key] * v for v in vectors], scale, thresholds)
            for key, vectors in self._vectors.items()
        }

    def stored(self, logits: Masks) -> dict[str, Tensor]:
        made = {f"logits/{key}": each for key, each in logits.items()}
        if self._nonlinear:
            masks = _deployed(self._method, logits, self._layers)
            made["ties/thresholds"] = torch.tensor(self._thresholds(masks), dtype=torch.float64)
        return made

    def _thresholds(self, masks: Masks) -> list[float]:
        """The magnitude at which TIES cuts each masked task vector, over all matrices at once."""
        count = len(next(iter(self._vectors.values())))

        def masked(task: int) -> Iterable[Tensor]:
            return (masks[key].detach() * each[task] for key, each in self._vectors.items())

        return [
            magnitude_at(self._method.ties_keep, lambda task=task: masked(task))
            for task in range(count)
        ]


class _AdapterFusion(Fusion):
    """Masks on the two factors of an adapter, relative to no adapter."""

    def __init__(self, method: Somf, workbench: Workbench, running: RunningModel) -> None:
        self._running = running
        device = running.loaded.device
        self._factors: dict[str, tuple[Tensor, Tensor, float]] = {}
        for layer in workbench.layers():
            if layer.lora is not None:
                up, down = (each.to(device).float() for each in (layer.lora.up, layer.lora.down))
                self._factors[layer.key] = (up, down, layer.lora.scale)
        self.shapes = {
            f"{side}/{key}": _logits_shape(each, method)
            for key, (up, down, _) in self._factors.items()
            for side, each in (("up", up), ("down", down))
        }

    def weights(self, masks: Masks) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, (up, down, scale) in self._factors.items():
            new = (masks[f"up/{key}"] * up) @ (masks[f"down/{key}"] * down)
            found[key] = self._running.weight(key) + scale * (new - up @ down)
        return found

    def stored(self, logits: Masks) -> dict[str, Tensor]:
        return {f"logits_{unit}": each for unit, each in logits.items()}


class Loss(ABC):
    """A loss on some texts; a tenth of them is held out."""

    learned: list[int]
    held_out: list[int]

    def __init__(self, count: int, *, seed: int) -> None:
        order = shuffled(count, seed=seed, method="somf", role="held out")
        held = max(1, count // 10) if count > 1 else 0
        self.learned, self.held_out = order[held:], order[:held] or order

    @abstractmethod
    def parts(self, indices: Sequence[int], step: int | None) -> list[tuple[float, object]]:
        """Pieces that fit into memory, with their shares in the loss; step None: held out."""

    @abstractmethod
    def of(self, part: object, weights: Mapping[str, Tensor]) -> Tensor:
        """The loss of a piece."""


class _Dpo(Loss):
    """Preference of chosen over rejected replies, against the plain fusion."""

    def __init__(self, method: Somf, workbench: Workbench, running: RunningModel) -> None:
        self._pairs = list(workbench.pairs(role="finetuned"))
        super().__init__(len(self._pairs), seed=workbench.seed)
        self._beta, self._running = method.beta, running
        self._reference = torch.zeros(len(self._pairs))
        with torch.no_grad(), workbench.progress.task("reference", total=len(self._pairs)) as task:
            for _, part in self.parts(range(len(self._pairs)), None):
                indices = cast(list[int], part)
                self._reference[indices] = self._margin(indices, None).cpu()
                task.advance(len(indices))

    def parts(self, indices: Sequence[int], step: int | None) -> list[tuple[float, object]]:
        lengths = [max(map(len, (c.ids, r.ids))) * 2 for c, r in self._pairs]
        return [(len(p) / len(indices), p) for p in _fitting(indices, lengths)]

    def of(self, part: object, weights: Mapping[str, Tensor]) -> Tensor:
        indices = cast(list[int], part)
        margin = self._margin(indices, weights)
        return dpo_loss(margin, self._reference[indices].to(margin), self._beta)

    def _margin(self, indices: Sequence[int], weights: Mapping[str, Tensor] | None) -> Tensor:
        chosen, rejected = zip(*(self._pairs[i] for i in indices), strict=True)
        both = reply_logprobs(self._running, [*chosen, *rejected], weights)
        return both[: len(indices)] - both[len(indices) :]


class _Refusal(Loss):
    """Cross-entropy of refusals, and the divergence from the plain fusion on benign prompts."""

    def __init__(self, method: Somf, workbench: Workbench, running: RunningModel) -> None:
        self._safe = list(workbench.examples("safe", role="finetuned"))
        super().__init__(len(self._safe), seed=workbench.seed)
        self._weight, self._running, self._seed = method.kl, running, workbench.seed
        self._keep = list(workbench.examples("keep", role="finetuned")) if method.kl else []

    def parts(self, indices: Sequence[int], step: int | None) -> list[tuple[float, object]]:
        tokens = sum(len(self._safe[i].reply_ids) for i in indices)
        lengths = [len(each.ids) for each in self._safe]
        found: list[tuple[float, object]] = []
        for part in _fitting(indices, lengths):
            found.append((1.0 / tokens, ("refuse", [self._safe[i] for i in part])))
        if self._keep:
            chosen = self._benign(len(indices), step)
            tokens = sum(len(self._keep[i].reply_ids) for i in chosen)
            for part in _fitting(chosen, [len(each.ids) for each in self._keep]):
                found.append((self._weight / tokens, ("keep", [self._keep[i] for i in part])))
        return found

    def of(self, part: object, weights: Mapping[str, Tensor]) -> Tensor:
        kind, replies = cast(tuple[str, list[EncodedReply]], part)
        if kind == "refuse":
            return -reply_logprobs(self._running, replies, weights).sum()
        ids, counted = reply_positions(self._running, replies)
        with torch.no_grad():
            before = self._running.logits(ids)[:, :-1][counted].float().log_softmax(-1)
        after = self._running.logits(ids, weights)[:, :-1][counted].float().log_softmax(-1)
        return (before.exp() * (before - after)).sum()

    def _benign(self, count: int, step: int | None) -> list[int]:
        order = shuffled(len(self._keep), seed=self._seed, method="somf", role="benign")
        start = 0 if step is None else step * count
        return [order[(start + i) % len(order)] for i in range(min(count, len(order)))]


def dpo_loss(margin: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the mean of -log sigmoid(beta (margin - reference)).

    Args:
        margin: log pi(chosen) - log pi(rejected), in nats, one per pair.
        reference: the same of the reference policy.
        beta: how far the policy may go from it.
    """
    return -logsigmoid(beta * (margin - reference)).mean()


def train_masks(
    method: Somf,
    fused: Fusion,
    loss: Loss,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, float | int]]:
    """Train one logit per entry of every unit, from 0, where the mean of masks is as if all were 1.

    Args:
        method: with its settings decided.
        fused: the weights under masks.
        loss: what is made smaller.
        seed: of draws and orders.
        device: where the logits lie.
        progress: counts steps.

    Returns:
        The logits with the smallest loss on what was held out, by unit; and facts of the run.
    """
    logits = {
        unit: torch.zeros(shape, device=device, requires_grad=True)
        for unit, shape in fused.shapes.items()
    }
    size = min(method.batch, len(loss.learned) or 1)
    per_epoch = math.ceil(len(loss.learned) / size)
    steps = method.epochs * per_epoch
    best_loss = start_loss = _held_out(method, fused, loss, logits)
    best, best_step = _copies(logits), 0
    rate = cast(float, method.lr)
    if steps and rate:
        plan = TrainingPlan(
            steps=steps,
            learning_rate=rate,
            warmup=min(WARMUP_STEPS, steps / 10) / steps,
            floor=0.0,
        )
        optimizer = torch.optim.AdamW(list(logits.values()), lr=rate, weight_decay=0.0)
        order = batches(len(loss.learned), size, seed=seed, method="somf")
        with progress.task("training the mask", total=steps) as task:
            for step in range(steps):
                indices = [loss.learned[i] for i in next(order)]
                optimizer.zero_grad()
                total = 0.0
                for share, part in loss.parts(indices, step):
                    masks = _sampled(method, logits, seed=seed, step=step)
                    value = share * loss.of(part, fused.weights(masks))
                    value.backward()
                    total += float(value.detach())
                finite(total, step=step, label="training the mask")
                optimizer.param_groups[0]["lr"] = plan.rate(step)
                optimizer.step()
                if (step + 1) % per_epoch == 0:
                    now = _held_out(method, fused, loss, logits)
                    if now < best_loss:
                        best_loss, best, best_step = now, _copies(logits), step + 1
                task.advance()
    facts = {
        "steps": steps,
        "best_step": best_step,
        "loss_before": start_loss,
        "loss_after": best_loss,
    }
    return best, facts


@torch.no_grad()
def _held_out(method: Somf, fused: Fusion, loss: Loss, logits: Masks) -> float:
    """The loss under the mask of the result; a drawn one is judged by its expectation."""
    weights = fused.weights(_deployed(method, logits, None))
    return sum(
        share * float(loss.of(part, weights)) for share, part in loss.parts(loss.held_out, None)
    )


def _deployed(method: Somf, logits: Masks, layers: Mapping[str, Layer] | None) -> dict[str, Tensor]:
    """The factors of the result; without layers to draw for, `sample` counts as `soft`."""
    if layers is None:
        mode = "soft" if method.mode == "sample" else method.mode
        method = replace(method, mode=mode)
    nobody = Layer(key="", module="", layer=None, finetuned=torch.empty(0))
    return {
        unit: factor(
            method.mask(x, (layers or {}).get(unit, nobody), role="mask"), rescale=method.rescale
        )
        for unit, x in logits.items()
    }


def _sampled(method: Somf, logits: Masks, *, seed: int, step: int) -> dict[str, Tensor]:
    """The factors of one step, drawn anew."""
    found: dict[str, Tensor] = {}
    for unit, x in logits.items():
        drawn = uniforms(x.numel(), seed=seed, method="somf", key=unit, role=f"step {step}")
        mask = concrete(x, drawn.view(x.shape).to(x.device), method.tau)
        found[unit] = factor(mask, rescale=method.rescale)
    return found


def _named(layer: Layer) -> Layer:
    """A layer without its tensors: what draws need."""
    nothing = torch.empty(0)
    return Layer(
        key=layer.key, module=layer.module, layer=layer.layer, finetuned=nothing, seed=layer.seed
    )


def _logits_shape(tensor: Tensor, method: Somf) -> tuple[int, int]:
    rows, columns = tensor.shape
    return (rows, 1) if method.granularity == "row" else (rows, columns)


def _copies(logits: Masks) -> dict[str, Tensor]:
    return {unit: x.detach().clone() for unit, x in logits.items()}


def _fitting(indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut a batch into parts of at most `MICRO_TOKENS` padded positions; one alone always fits."""
    parts: list[list[int]] = []
    longest = 0
    for index in indices:
        longest = max(longest, lengths[index])
        if not parts or longest * (len(parts[-1]) + 1) > MICRO_TOKENS:
            parts.append([])
            longest = lengths[index]
        parts[-1].append(index)
    return parts
