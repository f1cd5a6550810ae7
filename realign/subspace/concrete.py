"""Masks from logits: the Concrete relaxation of a Bernoulli mask, and what is used in its place.

    m = sigmoid((log(u / (1 - u)) + x) / tau),  u ~ U(0, 1)     m > 1/2 exactly when u > sigmoid(-x)

Maddison et al., arXiv 1611.00712; Jang et al., arXiv 1611.01144. Here: the draw, the deterministic
masks, and the division by the mean. Not here: how logits are trained, what is masked (`methods`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MaskMode = Literal["hard", "soft", "sample"]


def concrete(x: Tensor, u: Tensor, tau: float) -> Tensor:
    """Return the relaxed mask m; gradients flow to x.

    Args:
        x: logits, any shape.
        u: uniforms in (0, 1), the shape of x; computed in their dtype.
        tau: temperature, above 0; small ones give masks near 0 and 1.
    """
    return torch.sigmoid((torch.logit(u).to(x.dtype) + x) / tau)


def hard(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Return 1[sigmoid(x) >= threshold], in the dtype of x."""
    return (x >= math.log(threshold / (1.0 - threshold))).to(x.dtype)


def factor(mask: Tensor, *, rescale: bool = True) -> Tensor:
    """Return m / mean(m), or m itself without `rescale`; a mask of zeros stays zero."""
    if not rescale:
        return mask
    mean = mask.mean()
    return mask / torch.where(mean > 0, mean, 1.0)
