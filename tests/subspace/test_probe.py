"""The L1 probe against the conditions of its optimum and an independent solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from realign.subspace.probe import fit_probe, penalised_loss


def problem(n: int = 60, d: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(n, d, generator=generator).double() * torch.logspace(-2, 2, d) + 3.0
    truth = (features[:, 0] - 3) * 100 + torch.randn(n, generator=generator) > 0
    return features, truth.double()


@pytest.mark.parametrize("penalty", [0.2, 0.02, 0.002])
def test_the_optimum_is_reached(penalty: float) -> None:
    features, labels = problem()
    probe = fit_probe(features, labels, penalty=penalty)
    mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
    z, sign = (features - mean) / spread, labels * 2 - 1
    gradient = z.T @ (-sign * torch.sigmoid(-sign * probe.score(features))) / len(z)
    w = probe.weight * spread
    on = w != 0
    assert torch.allclose(gradient[on], -penalty * w[on].sign(), atol=1e-6)
    assert (gradient[~on].abs() <= penalty + 1e-6).all()
    assert on.any() and (~on).any()  # an L1 probe is sparse


def test_an_independent_solver_finds_nothing_better() -> None:
    features, labels = problem()
    probe = fit_probe(features, labels, penalty=0.05)
    spread = features.std(dim=0, correction=0)
    z = ((features - features.mean(dim=0)) / spread).numpy()
    sign = (labels * 2 - 1).numpy()
    d = z.shape[1]

    def objective(x: np.ndarray) -> float:  # w = positive part - negative part
        score = z @ (x[:d] - x[d : 2 * d]) + x[-1]
        return float(np.logaddexp(0, -sign * score).mean() + 0.05 * x[: 2 * d].sum())

    bounds = [(0, None)] * (2 * d) + [(None, None)]
    other = minimize(objective, np.zeros(2 * d + 1), bounds=bounds, method="L-BFGS-B")
    assert penalised_loss(probe, features, labels, penalty=0.05) <= other.fun + 1e-6


def test_positive_scores_mean_the_class_of_label_one() -> None:
    features, labels = problem()
    probe = fit_probe(features, labels, penalty=0.002)
    right = (probe.score(features) > 0) == (labels > 0)
    assert probe.accuracy == pytest.approx(float(right.double().mean())) and probe.accuracy > 0.8
    flipped = fit_probe(features, 1 - labels, penalty=0.002)
    assert torch.allclose(flipped.weight, -probe.weight, atol=1e-6)


def test_a_channel_that_never_moves_gets_no_weight() -> None:
    features, labels = problem()
    features[:, 3] = 7.0
    assert fit_probe(features, labels, penalty=0.01).weight[3] == 0
