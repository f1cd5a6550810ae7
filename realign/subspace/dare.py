"""Drop and rescale (DARE, Yu et al. 2023, arXiv 2311.03099): random entries of a difference go.

    DARE_p(D) = (k (.) D) / (1 - p),   k_ij ~ Bernoulli(1 - p)

Here: which entries stay, and the rescaled difference. Not here: which difference it is applied to.
"""

from __future__ import annotations

from torch import Tensor

from realign.subspace.keyed import uniforms


def kept_entries(
    like: Tensor, rate: float, *, seed: int, method: str, key: str, role: str, start: int = 0
) -> Tensor:
    """Return which entries stay: bool, in the shape and on the device of `like`.

    Args:
        like: a tensor, or a chunk of one.
        rate: p, the chance of an entry to be dropped.
        seed: of the run.
        method: whose draw it is.
        key: of the tensor.
        role: which difference is thinned out, as "task".
        start: entries of the tensor before this chunk, in row-major order.
    """
    drawn = uniforms(
        like.numel(), seed=seed, method=method, key=key, role=f"dare-{role}", start=start
    )
    return (drawn >= rate).reshape(like.shape).to(like.device)


def rescale_kept(delta: Tensor, kept: Tensor, rate: float) -> Tensor:
    """Return (k (.) D) / (1 - p), a new tensor in the dtype of D; rate = 0 gives D bit for bit."""
    assert 0.0 <= rate < 1.0, f"drop rate {rate}"
    return delta.where(kept, 0.0).div_(1.0 - rate)
