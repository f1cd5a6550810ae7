"""Which entries of a matrix a method takes: the largest of a row or a matrix, or those in a budget.

Equal scores are told apart by place, so that a mask has exactly as many entries as it should, on
every machine: by the smaller column within a row, by (column, row) within a matrix. Here: masks
from scores. Not here: what the scores mean, and what becomes of the entries (`obs`, the methods).

Shape suffixes: o is d_out, i is d_in, b the columns of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLACK = 1e-9
"""Taken off before rounding a count up, so that 0.07 * 100 is 7."""


def count_up(share: float, total: int) -> int:
    """Return ceil(share * total), where rounding of the product does not count."""
    return min(max(math.ceil(share * total - SLACK), 0), total)


def count_down(share: float, total: int) -> int:
    """Return floor(share * total), where rounding of the product does not count."""
    return min(max(math.floor(share * total + SLACK), 0), total)


def largest_per_row(scores_oi: Tensor, count: int) -> Tensor:
    """Return a mask [d_out, d_in] with the `count` largest scores of every row.

    Args:
        scores_oi: no NaN.
        count: of each row; equal scores go to the smaller column.
    """
    width = scores_oi.shape[1]
    assert 0 <= count <= width, (count, width)
    if count in (0, width) or scores_oi.numel() == 0:
        return torch.full_like(scores_oi, count > 0, dtype=torch.bool)
    least_o1 = torch.topk(scores_oi, count, dim=1, sorted=False).values.amin(1, keepdim=True)
    mask_oi = scores_oi > least_o1
    missing_o1 = count - mask_oi.sum(1, keepdim=True)
    equal_oi = scores_oi == least_o1
    return mask_oi | (equal_oi & (equal_oi.cumsum(1) <= missing_o1))


def largest(scores_oi: Tensor, count: int) -> Tensor:
    """Return a mask [d_out, d_in] with the `count` largest scores of the whole matrix.

    Args:
        scores_oi: no NaN.
        count: of the matrix; equal scores go by column, then row.
    """
    return lowest(-scores_oi, count)


def lowest(scores_oi: Tensor, count: int, *, among_oi: Tensor | None = None) -> Tensor:
    """Return a mask [d_out, d_in] with the `count` lowest scores.

    Args:
        scores_oi: no NaN.
        count: at most as many as there are candidates; equal scores go by column, then row.
        among_oi: the candidates, [d_out, d_in] bool; None: all entries.
    """
    # Transposed: row-major order is then column, then row.
    scores_io = scores_oi.T.contiguous()
    candidates = scores_io.view(-1) if among_oi is None else scores_io[among_oi.T]
    total = candidates.numel()
    assert 0 <= count <= total, (count, total)
    if count == 0:
        return torch.zeros_like(scores_oi, dtype=torch.bool)
    most = torch.kthvalue(candidates, count).values
    chosen_io, equal_io = scores_io < most, scores_io == most
    if among_oi is not None:
        chosen_io &= among_oi.T
        equal_io &= among_oi.T
    missing = count - int(chosen_io.sum())
    ties = equal_io.view(-1).nonzero().view(-1)[:missing]
    chosen_io.view(-1)[ties] = True
    return chosen_io.T.contiguous()


def prefix_within(
    loss_ob: Tensor, cost_b: Tensor, *, budget: float, relative: bool, most: int
) -> Tensor:
    """Return the longest prefix of the entries, cheapest first, whose summed loss is affordable.

    The order is by the cost of the column, then column, then row.

    Args:
        loss_ob: what taking an entry adds, >= 0.
        cost_b: of a column.
        budget: the sum that may not be exceeded; with `relative`, a share of the whole loss.
        relative: see `budget`.
        most: no more entries than these.

    Returns:
        A mask [d_out, b].
    """
    rows, width = loss_ob.shape
    mask_ob = torch.zeros_like(loss_ob, dtype=torch.bool)
    if mask_ob.numel() == 0:
        return mask_ob
    order_b = torch.argsort(cost_b, stable=True)
    spent_b = loss_ob.sum(0)[order_b].cumsum(0)
    limit = budget * float(spent_b[-1]) if relative else budget
    whole = int((spent_b <= limit).sum())
    length = whole * rows
    if whole < width:
        before = float(spent_b[whole - 1]) if whole else 0.0
        next_o = before + loss_ob[:, order_b[whole]].cumsum(0)
        length += int((next_o <= limit).sum())
    length = min(length, most)
    mask_ob[:, order_b[: length // rows]] = True
    if length % rows:
        mask_ob[: length % rows, order_b[length // rows]] = True
    return mask_ob
