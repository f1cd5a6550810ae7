"""Null controls: `replace` and `delta_svd` with random directions and the same singular values.

For benchmarks only; not registered. If a control repairs as well as its method, the method's
directions are not what repairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from realign.repair.edit import Layer
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.methods.replace import Replace
from realign.repair.parameters import Integer, parameter
from realign.subspace.null import random_triplets
from realign.subspace.spectrum import Decomposition


@dataclass(frozen=True, kw_only=True)
class ReplaceNull(Replace):
    """`replace` with random P and Q of the ranks that `replace` would choose."""

    name: ClassVar[str] = "replace_null"

    null_seed: int = parameter(0, Integer(0), source="our control")
    """Seed of the random directions."""

    def _subspaces(
        self, layer: Layer, decomposition: Decomposition, k: int
    ) -> tuple[Tensor, Tensor]:
        null = random_triplets(decomposition.triplets(k), seed=self.null_seed, key=layer.key)
        return null.u, null.v


@dataclass(frozen=True, kw_only=True)
class DeltaSvdNull(DeltaSvd):
    """`delta_svd` with random directions carrying the singular values of the safety vector."""

    name: ClassVar[str] = "delta_svd_null"

    null_seed: int = parameter(0, Integer(0), source="our control")
    """Seed of the random directions."""

    def _factors(
        self, layer: Layer, decomposition: Decomposition, rank: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        null = random_triplets(decomposition.triplets(rank), seed=self.null_seed, key=layer.key)
        delta = decomposition.matrix
        return null.u.to(delta) * null.s.to(delta), null.v.T.to(delta), null.u.to(delta)
