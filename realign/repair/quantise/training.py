"""Q-realign's training: clip factors and smoothing of one block after the other.

Full-precision and quantised hidden states run side by side. Of a benign sequence the quantised
block output is drawn to the full-precision one at all positions; of a malicious one only its last
position counts, and a frozen probe pulls it to the malicious side. Rounding passes gradients
straight through; nothing but g, h and v receives any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from realign.model.block_chain import BlockChain, Call, Captured
from realign.progress import Task
from realign.repair.quantise.blocks import BlockMatrix, Smoothed, smoothed_groups, smoothing_error
from realign.subspace.probe import Probe
from realign.subspace.quantiser import (
    FACTOR_AT_START,
    clip_factors,
    quantise,
    settled_smoothing,
    smoothing,
)

_LEAST_SMOOTHING = 0.01
"""v stays above this share of where it started: a division by it must stay harmless."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a quantiser is trained; see the parameters of `q_realign`."""

    bits: int
    clip: bool
    smooth: bool
    quantise: bool
    epochs_first: int
    epochs_rest: int
    clip_rate: float
    smooth_rate: float
    dtype: torch.dtype
    """Of the file, in which steps and norms are stored."""


@dataclass(frozen=True, eq=False)
class Example:
    """A calibration sequence on its way through the blocks."""

    full: Tensor
    """Hidden states of the full-precision stream [1, length, d]."""
    rounded: Tensor
    """Of the quantised stream."""
    calls: tuple[Call, ...]
    malicious: bool


@dataclass(frozen=True, eq=False)
class Trained:
    """What was decided for one block, by slot key.

    Attributes:
        high: sigmoid(g) [rows]; absent where nothing is clipped.
        low: sigmoid(h) [rows].
        smooth: v [d_in], settled to the file's type; absent where nothing is smoothed.
        norms: v by the name of the norm's stored weight, and what the norm adds to that weight.
        control_error: see `blocks.smoothing_error`; the largest over all sequences.
    """

    high: Mapping[str, Tensor]
    low: Mapping[str, Tensor]
    smooth: Mapping[str, Tensor]
    norms: Mapping[str, tuple[Tensor, float]]
    control_error: float
    crossed: tuple[float, float]
    """Share of malicious sequences on the probe's malicious side, of the full-precision and of the
    quantised stream."""
    loss: tuple[float, float]
    """Mean loss in the first and in the last epoch."""


def examples_of(captured: Sequence[Captured], labels: Sequence[int]) -> list[Example]:
    """Return calibration sequences at the first block."""
    return [
        Example(each.hidden, each.hidden, each.calls, bool(label))
        for each, label in zip(captured, labels, strict=True)
    ]


def example_loss(
    output: Tensor, *, target: Tensor, malicious: bool, weight: Tensor, bias: float
) -> Tensor:
    """Return L_l of one sequence.

    Args:
        output: h_q [1, length, d].
        target: h_fp [1, length, d].
        malicious: which branch.
        weight: of the probe [d].
        bias: of the probe.
    """
    if malicious:
        return functional.softplus(-(output[0, -1] @ weight + bias))
    return functional.mse_loss(output, target)


class BlockQuantiser(nn.Module):
    """The trainable part of one block: g and h per row, v per norm."""

    def __init__(
        self, matrices: Sequence[BlockMatrix], groups: Sequence[Smoothed], recipe: Recipe
    ) -> None:
        """Everything at its start; v is set by `start_smoothing`."""
        super().__init__()
        self.matrices, self.groups, self.recipe = tuple(matrices), tuple(groups), recipe
        self._group_of = {
            member.parameter: at for at, group in enumerate(self.groups) for member in group.members
        }
        self.high, self.low = nn.ParameterDict(), nn.ParameterDict()
        self.smooth = nn.ParameterList()
        for at, each in enumerate(self.matrices):
            if recipe.clip:
                for table in (self.high, self.low):
                    full = torch.full((each.weight.shape[0],), FACTOR_AT_START)
                    table[str(at)] = nn.Parameter(full.to(each.weight.device))
        for group in self.groups:
            self.smooth.append(nn.Parameter(torch.ones_like(group.gain)))

    def start_smoothing(self, largest: Sequence[Tensor]) -> None:
        """Set v from max|x| of every group's channels."""
        for parameter, group, inputs in zip(self.smooth, self.groups, largest, strict=True):
            columns = torch.stack([m.weight.abs().amax(dim=0) for m in group.members]).amax(dim=0)
            parameter.data.copy_(smoothing(inputs, columns))
        self._floors = [_LEAST_SMOOTHING * each.detach().clone() for each in self.smooth]

    def keep_positive(self) -> None:
        """Keep v above its floor after a step."""
        with torch.no_grad():
            for parameter, floor in zip(self.smooth, self._floors, strict=True):
                parameter.copy_(torch.maximum(parameter, floor))

    def smoothing_of(self, matrix: BlockMatrix) -> Tensor | None:
        """Return v of a matrix; None where no norm feeds it."""
        at = self._group_of.get(matrix.parameter)
        return None if at is None else self.smooth[at]

    def settle(self) -> None:
        """Move v to what a norm in the file's type can carry."""
        with torch.no_grad():
            for parameter, group in zip(self.smooth, self.groups, strict=True):
                parameter.copy_(
                    settled_smoothing(
                        parameter.detach(), group.gain, self.recipe.dtype, offset=group.offset
                    )
                )

    def weights(self) -> dict[str, Tensor]:
        """Return the quantised weights, v folded back, as the block stores them."""
        found: dict[str, Tensor] = {}
        for at, each in enumerate(self.matrices):
            clip = self.recipe.clip
            found[each.parameter] = each.stored(
                quantise(
                    each.weight,
                    high=clip_factors(self.high[str(at)] if clip else None),
                    low=clip_factors(self.low[str(at)] if clip else None),
                    bits=self.recipe.bits,
                    smooth=self.smoothing_of(each),
                    dtype=self.recipe.dtype,
                )
            )
        return found

    def optimiser(self) -> torch.optim.Optimizer:
        """Return AdamW without decay, one rate for g and h and one for v."""
        recipe = self.recipe
        clips = [*self.high.values(), *self.low.values()]
        groups = [
            {"params": clips, "lr": recipe.clip_rate},
            {"params": list(self.smooth), "lr": recipe.smooth_rate},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)


def train_block(
    chain: BlockChain,
    index: int,
    matrices: Sequence[BlockMatrix],
    examples: Sequence[Example],
    *,
    probe: Probe,
    recipe: Recipe,
    task: Task,
) -> tuple[list[Example], Trained | None]:
    """Train the quantiser of one block and take both streams through it.

    Returns:
        The examples at the next block, and what was decided (None: nothing in it is quantised).
    """
    first = examples[0]
    groups: list[Smoothed] = []
    if matrices and recipe.smooth:
        groups = smoothed_groups(chain, index, matrices, hidden=first.full, call=first.calls[index])
    quantiser = BlockQuantiser(matrices, groups, recipe)
    targets: list[Tensor] = []

    def full_precision() -> None:
        targets[:] = [chain.run(index, e.full, e.calls[index]) for e in examples]

    with torch.no_grad():
        largest = [
            chain.largest_input(index, group.members[0].parameter, full_precision)
            for group in groups
        ]
        if not targets:
            full_precision()
    quantiser.start_smoothing(largest)
    quantiser.settle()
    control = 0.0
    if groups:
        pairs = [(g, v.detach()) for g, v in zip(groups, quantiser.smooth, strict=True)]
        control = max(
            smoothing_error(chain, index, pairs, hidden=e.full, call=e.calls[index])
            for e in examples
        )
    if not matrices or not recipe.quantise:
        with torch.no_grad():
            moved = [chain.run(index, e.rounded, e.calls[index]) for e in examples]
        decided = None if not matrices else _decided(quantiser, control, (0.0, 0.0), (0.0, 0.0))
        return _advance(examples, targets, moved), decided
    losses = _train(chain, index, quantiser, examples, targets, probe=probe, task=task)
    quantiser.settle()
    with torch.no_grad():
        weights = quantiser.weights()
        moved = [chain.run(index, e.rounded, e.calls[index], weights) for e in examples]
    crossed = (_crossed(targets, examples, probe), _crossed(moved, examples, probe))
    return _advance(examples, targets, moved), _decided(quantiser, control, crossed, losses)


def _train(
    chain: BlockChain,
    index: int,
    quantiser: BlockQuantiser,
    examples: Sequence[Example],
    targets: Sequence[Tensor],
    *,
    probe: Probe,
    task: Task,
) -> tuple[float, float]:
    recipe = quantiser.recipe
    early = index < len(chain.blocks) // 2
    epochs = recipe.epochs_first if early else recipe.epochs_rest
    if not list(quantiser.parameters()):
        return 0.0, 0.0  # plain rounding: nothing to train
    optimiser = quantiser.optimiser()
    weight = probe.weight.to(targets[0])
    means: list[float] = []
    for _ in range(epochs):
        total = 0.0
        for example, target in zip(examples, targets, strict=True):
            output = chain.run(index, example.rounded, example.calls[index], quantiser.weights())
            loss = example_loss(
                output, target=target, malicious=example.malicious, weight=weight, bias=probe.bias
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            optimiser.step()
            quantiser.keep_positive()
            total += float(loss.detach())
        means.append(total / len(examples))
        task.advance(1)
    return means[0], means[-1]


def _decided(
    quantiser: BlockQuantiser,
    control: float,
    crossed: tuple[float, float],
    loss: tuple[float, float],
) -> Trained:
    high: dict[str, Tensor] = {}
    low: dict[str, Tensor] = {}
    smooth: dict[str, Tensor] = {}
    for at, each in enumerate(quantiser.matrices):
        v = quantiser.smoothing_of(each)
        for key, (start, stop) in each.rows.items():
            if quantiser.recipe.clip:
                # As factors, not as logits: a sigmoid is not the same to the bit on every device.
                for found, logits in ((high, quantiser.high), (low, quantiser.low)):
                    found[key] = torch.sigmoid(logits[str(at)].detach())[start:stop].cpu().clone()
            if v is not None:
                smooth[key] = v.detach().cpu().clone()
    norms = {
        group.norm_tensor: (v.detach().cpu().clone(), group.offset)
        for group, v in zip(quantiser.groups, quantiser.smooth, strict=True)
    }
    return Trained(high, low, smooth, norms, control, crossed, loss)


def _advance(
    examples: Sequence[Example], full: Sequence[Tensor], rounded: Sequence[Tensor]
) -> list[Example]:
    return [
        Example(f.detach(), r.detach(), e.calls, e.malicious)
        for e, f, r in zip(examples, full, rounded, strict=True)
    ]


def _crossed(outputs: Sequence[Tensor], examples: Sequence[Example], probe: Probe) -> float:
    at_end = [o[0, -1] for o, e in zip(outputs, examples, strict=True) if e.malicious]
    return float((probe.score(torch.stack(at_end).cpu()) > 0).double().mean())
