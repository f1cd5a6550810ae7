"""The weights of one decoder block that are to be quantised, and the norms that feed them.

Here: which parameters of a running block hold which matrices of the plan, the groups that smoothing
works on, and the check that smoothing alone is the identity. Not here: training (`training`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from realign.checkpoint.slots import Slot
from realign.errors import ModelError
from realign.model.block_chain import BlockChain, Call
from realign.repair.preparation import RunningModel

LET_TOLERANCE = 1e-5
"""Of the control: smoothing without rounding moves a block's outputs by no more than this share."""

_ELSEWHERE = "use a method that works on single matrices (lssf, safe_delta, replace, wise_ft)"


@dataclass(frozen=True, eq=False)
class BlockMatrix:
    """One parameter of a block, as a matrix [d_out, d_in]."""

    parameter: str
    """Its name within the block."""
    weight: Tensor
    """[d_out, d_in], float32, a view."""
    transposed: bool
    """Stored as [d_in, d_out]."""
    rows: Mapping[str, tuple[int, int]]
    """Rows of each matrix of the plan, by slot key."""
    prefix: str
    """What stands before its name in the checkpoint, as "model.layers.0."."""

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix as the block stores it."""
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True, eq=False)
class Smoothed:
    """A norm and the matrices that read it."""

    norm: str
    members: tuple[BlockMatrix, ...]
    gain: Tensor
    """What the norm multiplies by [d_in]."""
    offset: float
    """What it adds to its stored weight: 0, Gemma's norms 1."""

    @property
    def norm_tensor(self) -> str:
        """The name of its weight in the checkpoint."""
        return f"{self.members[0].prefix}{self.norm}.weight"


def block_matrices(
    running: RunningModel, chain: BlockChain, slots: Mapping[str, Slot]
) -> list[tuple[BlockMatrix, ...]]:
    """Return the matrices of the plan by block; a block without any has none.

    Raises:
        ModelError: a matrix is an expert, or no parameter of a block.
    """
    homes: dict[int, tuple[int, str, Tensor]] = {}
    for index, block in enumerate(chain.blocks):
        for name, parameter in block.named_parameters():
            homes[parameter.untyped_storage().data_ptr()] = (index, name, parameter)
    grouped: dict[tuple[int, str], list[Slot]] = defaultdict(list)
    for key in sorted(running.keys):  # gradients add up in this order, whatever that of the files
        slot = slots[key]
        home = homes.get(running.weight(key).untyped_storage().data_ptr())
        if home is None or home[2].dim() != 2 or slot.expert is not None or slot.span is not None:
            raise ModelError(
                f"{key}: this method quantises plain linear layers of decoder blocks, not experts "
                "or shared weights",
                _ELSEWHERE,
            )
        grouped[home[0], home[1]].append(slot)
    found: list[list[BlockMatrix]] = [[] for _ in chain.blocks]
    for (index, name), members in grouped.items():
        parameter = chain.blocks[index].get_parameter(name).detach()
        matrix = parameter.T if members[0].transposed else parameter
        whole = (0, matrix.shape[0])
        rows = {slot.key: slot.rows or whole for slot in members}
        prefix = members[0].tensor.removesuffix(name)
        found[index].append(BlockMatrix(name, matrix, members[0].transposed, rows, prefix))
    return [tuple(each) for each in found]


def smoothed_groups(
    chain: BlockChain,
    index: int,
    matrices: Sequence[BlockMatrix],
    *,
    hidden: Tensor,
    call: Call,
) -> list[Smoothed]:
    """Return the groups of one block: each norm with the matrices that read its very output.

    Raises:
        ModelError: no norm stands before a linear layer, or something else reads the norm, so that
            scaling it would change the block.
    """
    by_name = {each.parameter: each for each in matrices}
    groups: list[Smoothed] = []
    for fed in chain.fed(index, hidden, call, list(by_name)):
        weight = chain.blocks[index].get_parameter(f"{fed.norm}.weight").detach()
        members = tuple(by_name[name] for name in fed.weights)
        trial = torch.linspace(0.5, 2.0, weight.numel(), device=weight.device)
        errors: list[float] = []
        for offset in (0.0, 1.0):
            group = Smoothed(fed.norm, members, weight + offset, offset)
            errors.append(smoothing_error(chain, index, [(group, trial)], hidden=hidden, call=call))
            if errors[-1] <= LET_TOLERANCE:
                groups.append(group)
                break
        else:
            raise ModelError(
                f"{chain.prefix}.{index}: scaling {fed.norm} and what reads it changes the block's "
                f"outputs by {min(errors):.1e} of their size: something else reads it, too",
                "--set smooth=false quantises without smoothing; with --modules, name all kinds of "
                "modules that read it",
            )
    if matrices and not groups:
        raise ModelError(
            f"{chain.prefix}.{index}: no norm stands directly before its linear layers, so there "
            "is nothing to smooth",
            "--set smooth=false quantises without smoothing",
        )
    return groups


def smoothing_error(
    chain: BlockChain,
    index: int,
    groups: Sequence[tuple[Smoothed, Tensor]],
    *,
    hidden: Tensor,
    call: Call,
) -> float:
    """Return how far smoothing without rounding moves a block's outputs, as a share of the largest.

    Args:
        chain: the blocks.
        index: of the block.
        groups: each with its v [d_in]; the norm is divided by it, the columns multiplied.
        hidden: input of the block.
        call: what else it is given.
    """
    weights: dict[str, Tensor] = {}
    for group, smooth in groups:
        weights[f"{group.norm}.weight"] = group.gain / smooth - group.offset
        bias = f"{group.norm}.bias"
        if any(name == bias for name, _ in chain.blocks[index].named_parameters()):
            weights[bias] = chain.blocks[index].get_parameter(bias).detach() / smooth
        for each in group.members:
            weights[each.parameter] = each.stored(each.weight * smooth)
    with torch.no_grad():
        plain = chain.run(index, hidden, call)
        scaled = chain.run(index, hidden, call, weights)
    return float((scaled - plain).abs().max() / plain.abs().max())
