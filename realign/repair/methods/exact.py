"""Edits of methods that work out W' itself, entry by entry, and not the difference to Wf."""

from __future__ import annotations

import torch
from torch import Tensor

from realign.repair.edit import Dense, Facts, Unchanged


def rewritten(weight_oi: Tensor, finetuned: Tensor, *, facts: Facts) -> Dense | Unchanged:
    """Return E = W' - Wf whose result at strength 1 is W' itself, rounded once.

    What a method took over from Wf or Wa is then so bit for bit.

    Args:
        weight_oi: W' [d_out, d_in], float64 or in the dtype of Wf; its memory is given away.
        finetuned: Wf [d_out, d_in].
        facts: for the report.
    """
    target_oi = weight_oi.to(finetuned.dtype)
    if target_oi.data_ptr() == weight_oi.data_ptr():
        target_oi = target_oi.clone()
    own = finetuned.to(weight_oi.device)
    if torch.equal(target_oi, own):
        return Unchanged("what it would write is what stands there")
    double = torch.float64 in (weight_oi.dtype, own.dtype)
    delta_oi = weight_oi.to(torch.float64 if double else torch.float32).sub_(own)
    kept = torch.float64 if finetuned.dtype == torch.float64 else torch.float32
    return Dense(delta_oi.to(kept), target=target_oi, facts=facts)
