"""What methods read from the second moments of a matrix's inputs.

    H = S2 = sum x x^T [d_in, d_in]         what a change of a row costs in the outputs
    norm of input feature j = sqrt(S2_jj)   how strongly an entry of column j is used

Not here: where moments come from (`realign.model.moments`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from realign.repair.edit import Layer
from realign.subspace.masks import count_up, largest_per_row

if TYPE_CHECKING:
    from realign.model.moments import Moments

NO_STATISTICS = "no activation statistics"
NO_TOKENS = "no token reached it"


def missing_inputs(moments: Moments | None) -> str:
    """Say why a matrix has no moments to go by; empty where it has."""
    if moments is None:
        return NO_STATISTICS
    return "" if moments.n else NO_TOKENS


def second_moments(moments: Moments, layer: Layer) -> Tensor:
    """Return S2 [d_in, d_in], or its diagonal [d_in] where only that was collected.

    Float64, on the device of the layer (the CPU where the device has no float64); the memory of the
    moments where these lie there already.
    """
    assert moments.kind == "input", moments.kind
    width = layer.finetuned.shape[1]
    assert moments.s2.shape[-1] == width, f"{layer.key}: {tuple(moments.s2.shape)}, {width} inputs"
    return moments.s2.to(home_of(layer.finetuned), torch.float64)


def home_of(tensor: Tensor) -> torch.device:
    """Return where float64 arithmetic on a tensor is done."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def feature_norms(s2: Tensor) -> Tensor:
    """Return sqrt(S2_jj) [d_in] from S2 or from its diagonal."""
    diagonal = s2 if s2.dim() == 1 else s2.diagonal()
    return diagonal.clamp(min=0.0).sqrt()


def used_most(weight_oi: Tensor, norms_i: Tensor, share: float) -> tuple[Tensor, int]:
    """Mark the entries of every row that contribute most, by |W_ij| norm_j.

    Args:
        weight_oi: [d_out, d_in].
        norms_i: of the input features, float64.
        share: of each row, rounded up; equal scores go to the smaller column.

    Returns:
        The mask [d_out, d_in] on the device of `norms_i`, and how many are marked in each row.
    """
    count = count_up(share, weight_oi.shape[1])
    scores_oi = weight_oi.to(norms_i.device, torch.float64).abs().mul_(norms_i)
    return largest_per_row(scores_oi, count), count
