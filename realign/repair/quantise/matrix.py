"""One matrix on its grid, from what a training decided: the same numbers for every output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from realign.repair.preparation import Statistics
from realign.subspace.quantiser import Grid, codes_of, decode, row_grid


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """Q(W diag(v)) in codes.

    Attributes:
        codes: whole numbers [d_out, d_in].
        grid: what they stand for.
        smooth: v [d_in]; None where nothing is smoothed.
    """

    codes: Tensor
    grid: Grid
    smooth: Tensor | None

    def decoded(self) -> Tensor:
        """Return Q(W diag(v)), which reads inputs divided by v."""
        return decode(self.codes, self.grid)

    def folded(self) -> Tensor:
        """Return Q(W diag(v)) diag(1 / v), which reads inputs as they are."""
        return self.decoded() if self.smooth is None else self.decoded() / self.smooth


def quantised_matrix(
    stored: Tensor, key: str, statistics: Statistics, *, bits: int
) -> QuantisedMatrix:
    """Return a matrix on its grid.

    Args:
        stored: [d_out, d_in] in the file's type, which decides how steps are rounded.
        key: its slot key.
        statistics: tables "high" and "low" (factors of the rows' ranges) and "smooth" (v), where
            they were trained.
        bits: of a code.
    """
    weight = stored.to(torch.promote_types(stored.dtype, torch.float32))

    def table(name: str) -> Tensor | None:
        found = statistics.tensor(name, key)
        return None if found is None else found.to(weight)

    def factor(name: str) -> Tensor | float:
        found = table(name)
        return 1.0 if found is None else found.unsqueeze(1)

    smooth = table("smooth")
    scaled = weight if smooth is None else weight * smooth
    grid = row_grid(
        scaled,
        high=factor("high"),
        low=factor("low"),
        bits=bits,
        dtype=stored.dtype,
    )
    return QuantisedMatrix(codes_of(scaled, grid), grid, smooth)
