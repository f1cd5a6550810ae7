"""The training behind `two_teachers`: factors in fixed subspaces, taught by two models.

Here: subspaces, the loss and the steps. Not here: settings and the edit (`two_teachers`), which
prompts are asked and who answers them (`two_teachers_texts`), loading models (the workbench).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from realign.errors import NonFiniteError
from realign.model.training import deterministic
from realign.repair.edit import VectorKind
from realign.repair.methods.two_teachers_texts import Lesson, gather
from realign.repair.preparation import RunningModel, Workbench
from realign.subspace.keyed import generator
from realign.subspace.spectrum import top_triplets

if TYPE_CHECKING:
    from realign.repair.methods.two_teachers import TwoTeachers

_FLOOR = 0.05
"""The cosine ends at this share of the rate."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """Frozen directions of one matrix and what is trained along them."""

    u_ok: Tensor
    r_ik: Tensor
    a_ki: Tensor
    b_ok: Tensor

    @property
    def edit(self) -> Tensor:
        """E = U A + B R^T [d_out, d_in]."""
        return self.u_ok @ self.a_ki + self.b_ok @ self.r_ik.T


def distil(method: TwoTeachers, workbench: Workbench) -> Mapping[str, Tensor]:
    """Train the factors; "left/KEY" and "right/KEY" of every matrix, and scalars.

    Returns:
        left = [U, B] and right = [A; R^T], the mean KL to either teacher before and after, and how
        many texts either of them teaches.
    """
    kind = method.vector_kind
    assert kind is not None
    texts = gather(method, workbench)
    with workbench.running("finetuned") as student, deterministic():
        student.loaded.model.requires_grad_(False)
        spaces = subspaces(workbench, student, kind=kind, rank=method.rank)
        facts = {
            "anchor_kl_before": distance(student, spaces, texts.anchors),
            "keep_kl_before": distance(student, spaces, texts.keep),
        }
        _train(method, workbench, student, spaces, texts.anchors, texts.keep)
        facts["anchor_kl_after"] = distance(student, spaces, texts.anchors)
        facts["keep_kl_after"] = distance(student, spaces, texts.keep)
    facts |= {"anchor_texts": float(len(texts.anchors)), "keep_texts": float(len(texts.keep))}
    made = {name: torch.tensor(value) for name, value in facts.items()}
    for key, each in spaces.items():
        made[f"left/{key}"] = torch.cat([each.u_ok, each.b_ok.detach()], 1).cpu()
        made[f"right/{key}"] = torch.cat([each.a_ki.detach(), each.r_ik.T]).contiguous().cpu()
    return made


def subspaces(
    workbench: Workbench, student: RunningModel, *, kind: VectorKind, rank: int
) -> dict[str, Subspace]:
    """The leading directions of every alignment vector that is not zero."""
    found: dict[str, Subspace] = {}
    place = student.loaded.device
    for layer in workbench.layers():
        delta_oi = layer.safety_vector(kind)
        if not bool(delta_oi.any()):
            continue
        top = top_triplets(delta_oi, rank)
        u_ok, r_ik = top.u.float().to(place), top.v.float().to(place)
        k, (d_out, d_in) = u_ok.shape[1], delta_oi.shape
        found[layer.key] = Subspace(
            u_ok,
            r_ik,
            torch.zeros(k, d_in, device=place, requires_grad=True),
            torch.zeros(d_out, k, device=place, requires_grad=True),
        )
    return found


def divergence(
    student: RunningModel, spaces: Mapping[str, Subspace], batch: Sequence[Lesson]
) -> Tensor:
    """Mean KL(teacher || W_f + E) over the reply tokens of a batch, in nats.

    What a lesson does not bring along, the fine-tune teaches: the student without its edit.
    """
    length = max(len(each.ids) for each in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long, device=student.loaded.device)
    for row, each in enumerate(batch):  # padded on the right: nothing before it sees it
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
    told = [each.log_p for each in batch if each.log_p is not None]
    log_p = torch.cat(told) if told else None
    if log_p is None:
        with torch.no_grad():
            log_p = _replies(student.logits(ids), batch)
    weights = {key: student.weight(key) + each.edit for key, each in spaces.items()}
    log_q = _replies(student.logits(ids, weights), batch)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _replies(logits: Tensor, batch: Sequence[Lesson]) -> Tensor:
    """Log-probabilities [reply tokens of the batch, vocabulary] of every reply token."""
    rows = [logits[row, each.start - 1 : len(each.ids) - 1] for row, each in enumerate(batch)]
    return torch.log_softmax(torch.cat(rows).float(), -1)


def distance(
    student: RunningModel, spaces: Mapping[str, Subspace], every: Sequence[Lesson]
) -> float:
    """`divergence` over all lessons, without gradients."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(every), 32):
            batch = every[at : at + 32]
            count = sum(len(each.ids) - each.start for each in batch)
            total += float(divergence(student, spaces, batch)) * count
            tokens += count
    return total / max(1, tokens)


def _train(
    method: TwoTeachers,
    workbench: Workbench,
    student: RunningModel,
    spaces: Mapping[str, Subspace],
    anchors: Sequence[Lesson],
    keep: Sequence[Lesson],
) -> None:
    trained = [factor for each in spaces.values() for factor in (each.a_ki, each.b_ok)]
    optimiser = torch.optim.AdamW(trained, lr=method.learning_rate, weight_decay=0.0)
    chosen = (
        _batches(len(anchors), method.anchor_batch, workbench.seed, role="anchors"),
        _batches(len(keep), method.keep_batch, workbench.seed, role="keep"),
    )
    with workbench.progress.task("distilling", total=method.steps, unit="steps") as task:
        for step in range(method.steps):
            turn = 0.5 * (1 + math.cos(math.pi * step / max(1, method.steps - 1)))
            for group in optimiser.param_groups:
                group["lr"] = method.learning_rate * (_FLOOR + (1 - _FLOOR) * turn)
            optimiser.zero_grad()
            first = divergence(student, spaces, [anchors[i] for i in next(chosen[0])])
            second = divergence(student, spaces, [keep[i] for i in next(chosen[1])])
            loss = first + method.keep_weight * second
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    f"the distillation diverged at step {step + 1}",
                    "lower learning_rate with --set learning_rate=...",
                )
            loss.backward()
            optimiser.step()
            task.advance()


def _batches(count: int, size: int, seed: int, *, role: str) -> Iterator[list[int]]:
    """Batches of indices for ever, every pass in an order of its own."""
    drawn = generator(seed=seed, method="two_teachers", key="", role=role)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += drawn.permutation(count).tolist()
        yield queue[:size]
        queue = queue[size:]
