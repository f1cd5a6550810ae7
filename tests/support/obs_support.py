"""Plain float64 references for the methods that weigh entries by their inputs' moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from realign.checkpoint.slots import Slot
from realign.model.moments import Moments
from realign.progress import SILENT
from realign.repair.edit import Layer
from realign.repair.preparation import Statistics


def psd(n: int, *, seed: int) -> Tensor:
    """A well-conditioned matrix of second moments with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator).double()
    x = mix @ torch.randn(n, 4 * n + 4, generator=generator).double()
    gram = x @ x.T
    return (gram + gram.T) / 2 + 0.1 * n * torch.eye(n).double()


def sweep_by_definition(
    start: Tensor, goal: Tensor, mask: Tensor, h: Tensor, *, group: int = 1
) -> Tensor:
    """Column by column: U from the inverse itself, every update at once."""
    inverse = torch.linalg.inv(h)
    u = torch.linalg.cholesky((inverse + inverse.T) / 2).T
    w = start.clone()
    for j in range(w.shape[1]):
        later = (j // group + 1) * group if group > 1 else j + 1
        q = torch.where(mask[:, j], goal[:, j], w[:, j])
        err = (w[:, j] - q) / u[j, j]
        w[:, j] = q
        w[:, later:] -= torch.outer(err, u[j, later:])
    return w


def safe_delta_by_definition(
    aligned: Tensor,
    finetuned: Tensor,
    h: Tensor,
    *,
    s: float,
    relative: bool,
    drop: float = 0.15,
    block: int = 2048,
    group: int = 1,
    damp: float = 0.01,
) -> Tensor:
    """Safe Delta entry by entry: one list of entries per block, sorted and summed in order."""
    h = h.clone()
    for j in range(h.shape[0]):
        if h[j, j] == 0:
            h[j, j] = 1.0
    h = h + damp * h.diagonal().mean() * torch.eye(h.shape[0]).double()
    inverse = torch.linalg.inv(h)
    u = torch.linalg.cholesky((inverse + inverse.T) / 2).T
    cost = [float(1 / torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(h.shape[0])]
    w = aligned.double().clone()
    d_out, d_in = w.shape
    for start in range(0, d_in, block):
        columns = range(start, min(start + block, d_in))
        loss = {
            (i, j): float((finetuned[i, j] - w[i, j]) ** 2) * cost[j]
            for j in columns
            for i in range(d_out)
        }
        mean_cost = sum(cost[j] for j in columns) / len(columns)
        eps = s * (len(columns) / 4096) * (d_out / 4096) * mean_cost
        if relative:
            eps = s * sum(loss.values())
        order = sorted(loss, key=lambda place: (cost[place[1]], place[1], place[0]))
        kept, spent = set[tuple[int, int]](), 0.0
        for place in order[: len(order) - int(drop * len(order))]:
            spent += loss[place]
            if spent > eps:
                break
            kept.add(place)
        errors = torch.zeros(d_out, len(columns)).double()
        for at, j in enumerate(columns):
            later = start + (at // group + 1) * group if group > 1 else j + 1
            for i in range(d_out):
                q = finetuned[i, j].double() if (i, j) in kept else w[i, j]
                errors[i, at] = (w[i, j] - q) / u[j, j]
                w[i, j] = q
            inside = slice(later, columns[-1] + 1)
            w[:, inside] -= torch.outer(errors[:, at], u[j, inside])
        beyond = columns[-1] + 1
        w[:, beyond:] -= errors @ u[start:beyond, beyond:]
    return w


class Bench:
    """A workbench over tensors in memory; records what it is asked for."""

    def __init__(
        self,
        moments: Mapping[str, Moments],
        *,
        layers: Sequence[Layer] = (),
        tables: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.seed = seed
        self.device = torch.device("cpu")
        self.progress = SILENT
        self.slots = {
            layer.key: Slot(layer.key, layer.key, layer.module, layer.layer) for layer in layers
        }
        self._moments, self._layers, self._tables = moments, layers, tables or {}

    def layers(self) -> Iterator[Layer]:
        return iter(self._layers)

    def input_moments(
        self,
        *,
        role: str,
        data: str,
        tokens: str,
        diagonal: bool = False,
        limit: int | None = None,
        length: int | None = None,
    ) -> Statistics:
        cut = () if length is None else (length,)
        self.asked.append(("input_moments", role, data, tokens, diagonal, limit, *cut))
        return Statistics(dict(self._moments), {"from": role})

    def gradients(
        self, *, role: str, data: str, kind: str, limit: int | None = None
    ) -> Mapping[str, Tensor]:
        self.asked.append(("gradients", role, data, kind, limit))
        return dict(self._tables)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"these methods do not ask for {name}")
