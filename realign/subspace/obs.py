"""Optimal brain surgery on rows of a matrix: some entries change, later ones make up for it.

With H the second moments of a layer's inputs, a change dw of a row costs dw H dw^T in the layer's
outputs. Columns are visited from left to right; where an entry has to change, the columns to its
right move so that the outputs change least (Hassibi and Stork 1993; column by column with one
Cholesky factor for all rows: Frantar and Alistarh, arXiv 2301.00774).

    U upper triangular, U^T U = (H + damping I)^-1 ;   d_j = U_jj
    err_j = (w_j - q_j) / d_j ;   w_k <- w_k - err_j U_jk   for all k > j

Here: the factor and the sweep, in float64. Not here: which entries change, and to what (`masks` and
the methods). Shape suffixes: o is d_out, i is d_in, b the columns of a block, p those of a panel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from realign.subspace.eigen import NotDefiniteError, require_finite
from realign.subspace.lapack import invert_cholesky

RETRIES = 3
"""How often the damping is raised tenfold before a matrix is refused."""

PANEL = 64
"""Columns that are visited one by one before the rest of their block is updated at once."""

Choice = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""From columns and their present values [d_out, b] to (mask, values): what is fixed, and where."""


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """U of a damped H.

    Attributes:
        u_ii: [d_in, d_in] float64, upper triangular, U^T U = (H + damping I)^-1.
        damping: what was added to the diagonal, as a multiple of its mean.
    """

    u_ii: Tensor
    damping: float

    def costs(self) -> Tensor:
        """Return 1 / d_j^2 [d_in]: what a unit change of entry j costs once j is visited.

        d_j^2 is the first diagonal entry of (H_{j:,j:})^-1, so the columns after j make up for it.
        """
        return self.u_ii.diagonal().square().reciprocal()


def inverse_factor(scatter_ii: Tensor, *, damp: float, overwrite: bool = False) -> InverseFactor:
    """Return U upper triangular with U^T U = (H + damping mean(diag H) I)^-1.

    An input that was never there, H_jj = 0, gets H_jj = 1. Where H is not positive definite in
    spite of the damping, this is raised tenfold, up to three times; a damping of 0 stays 0.

    Args:
        scatter_ii: H [d_in, d_in], symmetric, positive semi-definite.
        damp: added to the diagonal, as a multiple of its mean.
        overwrite: give the memory of H away.

    Raises:
        NonFiniteError: H holds NaN or infinity.
        NotDefiniteError: H is not positive definite with a thousand times the damping, or without
            any where `damp` is 0.
    """
    assert scatter_ii.dim() == 2, "the whole matrix of second moments, not its diagonal"
    assert scatter_ii.shape[0] == scatter_ii.shape[1], tuple(scatter_ii.shape)
    require_finite(scatter_ii)
    h_ii = scatter_ii.to(torch.float64).contiguous()
    if not overwrite and h_ii.data_ptr() == scatter_ii.data_ptr():
        h_ii = h_ii.clone()
    diagonal = h_ii.diagonal()
    diagonal[diagonal == 0] = 1.0
    own, mean = diagonal.clone(), float(diagonal.mean()) if diagonal.numel() else 0.0
    # Read from its last row and column on, H gives U by one factorisation: with J H J = L L^T,
    # U = J L^-1 J.
    _reverse(h_ii)
    route = factor_in_place if h_ii.device.type == "cpu" else factor_by_solving
    for attempt in range(RETRIES + 1 if damp else 1):
        damping = damp * 10.0**attempt
        h_ii.diagonal().copy_((own + damping * mean).flip(0))
        u_ii = route(h_ii)
        if u_ii is not None:
            return InverseFactor(u_ii, damping)
    what = "the second moments of its inputs are not positive definite"
    if not damp:
        raise NotDefiniteError(
            f"{what} with damp = 0: there are too few tokens, or inputs that repeat each other",
            "set damp above 0 (--set damp=0.01), or give more texts",
        )
    raise NotDefiniteError(
        f"{what} with {damp * 10.0**RETRIES:g} of its mean diagonal added, a thousand times damp",
        "give a larger damp (--set damp=...) or more texts",
    )


def factor_in_place(h_ii: Tensor) -> Tensor | None:
    """Return J L^-1 J of H = L L^T in the memory of H [n, n], on the CPU.

    None where H is not positive definite; all of it but its diagonal is then as it was.
    """
    if not invert_cholesky(h_ii):
        above = h_ii.triu(1)  # the routine reads and writes below only
        h_ii.copy_(above).add_(above.T)
        return None
    _reverse(h_ii)
    return h_ii.triu_()


def factor_by_solving(h_ii: Tensor) -> Tensor | None:
    """Return J L^-1 J of H = L L^T [n, n], on any device; None where H is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(h_ii)
    if int(info) != 0:
        return None
    unit = torch.eye(h_ii.shape[0], dtype=h_ii.dtype, device=h_ii.device)
    return torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1)


def _reverse(square: Tensor) -> None:
    """Turn the order of rows and columns round, in place."""
    flat = square.view(-1)
    half = flat.numel() // 2
    if half:
        last = flat[-half:].flip(0)
        flat[-half:] = flat[:half].flip(0)
        flat[:half] = last


def sweep(weight_oi: Tensor, u_ii: Tensor, *, choose: Choice, block: int, group: int = 1) -> Tensor:
    """Fix entries from left to right and let the columns behind them make up for it; in place.

    The rows do not depend on each other. For a given mask the result does not depend on `block`.

    Args:
        weight_oi: [d_out, d_in] float64, overwritten.
        u_ii: as in `InverseFactor`.
        choose: asked once for every block, in order; it may change neither argument.
        block: how many columns are chosen from at once.
        group: so many neighbouring columns do not make up for each other; 1 is exact.

    Returns:
        `weight_oi`, in which the chosen entries are exactly what they were fixed to.
    """
    assert weight_oi.dtype == u_ii.dtype == torch.float64, (weight_oi.dtype, u_ii.dtype)
    d_in = weight_oi.shape[1]
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        columns = slice(start, stop)
        present_ob = weight_oi[:, columns]
        mask_ob, values_ob = choose(columns, present_ob)
        errors_ob = _sweep_block(
            present_ob, u_ii[columns, columns], mask_ob, values_ob, group=group
        )
        if stop < d_in:
            weight_oi[:, stop:].addmm_(errors_ob, u_ii[columns, stop:], alpha=-1.0)
    return weight_oi


def _sweep_block(
    weight_ob: Tensor, u_bb: Tensor, mask_ob: Tensor, values_ob: Tensor, *, group: int
) -> Tensor:
    """Sweep one block in place and return err [d_out, b], with which later columns are updated."""
    width = weight_ob.shape[1]
    errors_ob = torch.empty_like(weight_ob)
    panel = max(PANEL // group, 1) * group
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        inside = slice(start, stop)
        # Columns as rows: they lie together in memory, and fit into the processor's cache.
        w_po = weight_ob[:, inside].T.contiguous()
        mask_po = mask_ob[:, inside].T.contiguous()
        values_po = values_ob[:, inside].T.to(w_po.dtype)
        u_pp = u_bb[inside, inside]
        errors_po = torch.zeros_like(w_po)
        for j in range(stop - start):
            done = j - j % group
            if done:
                w_po[j].addmv_(errors_po[:done].T, u_pp[:done, j], alpha=-1.0)
            fixed_o = torch.where(mask_po[j], values_po[j], w_po[j])
            torch.sub(w_po[j], fixed_o, out=errors_po[j])
            errors_po[j] /= u_pp[j, j]
            w_po[j] = fixed_o
        weight_ob[:, inside] = w_po.T
        errors_ob[:, inside] = errors_po.T
        if stop < width:
            weight_ob[:, stop:].addmm_(errors_ob[:, inside], u_bb[inside, stop:], alpha=-1.0)
    return errors_ob
