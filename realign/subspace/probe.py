"""A linear probe: logistic regression with an L1 penalty, fitted by proximal gradient steps.

    minimise over (w, b)   mean_i softplus(-s_i (w . z_i + b)) + penalty norm_1(w),   s_i = +1, -1

z are the features with mean 0 and variance 1 per channel; the result is given back for raw
features. The intercept is not penalised. FISTA with restarts (Beck and Teboulle 2009; O'Donoghue
and Candes 2015), float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MOST_STEPS = 5000
_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Probe:
    """score(x) = w . x + b; positive means the class of label 1.

    Attributes:
        weight: w [d], for raw features, float64.
        bias: b.
        accuracy: share of the examples it was fitted on that it tells right.
    """

    weight: Tensor
    bias: float
    accuracy: float

    def score(self, features: Tensor) -> Tensor:
        """Return w . x + b [n] of features [n, d]."""
        return features.double() @ self.weight + self.bias


def fit_probe(features: Tensor, labels: Tensor, *, penalty: float) -> Probe:
    """Fit a probe.

    Args:
        features: [n, d]; channels without variance get weight 0.
        labels: [n] of 0 and 1, both present.
        penalty: of the L1 norm, above 0.
    """
    x = features.double()
    assert 0 < int(labels.sum()) < len(labels), "a probe needs both classes"
    sign = labels.double() * 2 - 1
    mean = x.mean(dim=0)
    spread = (x - mean).square().mean(dim=0).sqrt()
    live = spread > 1e-12 * (1 + mean.abs())
    z = torch.where(live, (x - mean) / torch.where(live, spread, torch.ones_like(spread)), 0.0)
    # The design with a column of ones; 1/4 bounds the curvature of softplus.
    design = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
    rate = 1.0 / (0.25 * torch.linalg.matrix_norm(design, 2).square() / len(z)).item()
    at = torch.zeros(design.shape[1], dtype=torch.float64)
    ahead, momentum = at.clone(), 1.0
    for _ in range(MOST_STEPS):
        margin = sign * (design @ ahead)
        gradient = design.T @ (-sign * torch.sigmoid(-margin)) / len(z)
        step = ahead - rate * gradient
        body = step[:-1]
        new = torch.cat([body.sign() * (body.abs() - rate * penalty).clamp(min=0), step[-1:]])
        moved = new - at
        if torch.dot(ahead - new, moved) > 0:  # the momentum points uphill: begin anew
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * moved
        at, momentum = new, following
        if moved.abs().max() <= _TOLERANCE * (1 + at.abs().max()):
            break
    weight = torch.where(live, at[:-1] / torch.where(live, spread, torch.ones_like(spread)), 0.0)
    bias = float(at[-1] - weight @ mean)
    right = ((x @ weight + bias) > 0) == (sign > 0)
    return Probe(weight, bias, float(right.double().mean()))


def penalised_loss(probe: Probe, features: Tensor, labels: Tensor, *, penalty: float) -> float:
    """Return the objective that `fit_probe` minimises, at this probe."""
    x = features.double()
    spread = (x - x.mean(dim=0)).square().mean(dim=0).sqrt()
    sign = labels.double() * 2 - 1
    loss = functional.softplus(-sign * probe.score(x)).mean()
    return float(loss + penalty * (probe.weight * spread).abs().sum())
