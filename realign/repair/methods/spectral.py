"""What the methods share that decompose the safety vector: one matrix, or several of one shape.

Not here: what becomes of the directions (`delta_svd`, `lox`, `replace`), and how many are kept
(`ranks`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from realign.repair.edit import Edit, Layer, Unchanged
from realign.repair.method import Method
from realign.repair.preparation import Statistics
from realign.subspace.spectrum import Decomposition, decompose, decompose_batch


class SpectralMethod(Method):
    """A method whose edit follows from the singular directions of the safety vector."""

    @abstractmethod
    def safety_matrix(self, layer: Layer) -> Tensor | Unchanged:
        """Return delta_safe [d_out, d_in], or why the layer is left alone."""

    @abstractmethod
    def edit_spectrum(self, layer: Layer, decomposition: Decomposition) -> Edit:
        """Return the edit of a layer from its decomposed safety vector."""

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Decompose the safety vector of one matrix and edit by it."""
        delta_safe = self.safety_matrix(layer)
        if isinstance(delta_safe, Unchanged):
            return delta_safe
        shared = statistics.decompositions
        found = decompose(delta_safe) if shared is None else shared.decompose(delta_safe)
        return self.edit_spectrum(layer, found)

    def edit_batch(self, layers: Sequence[Layer], statistics: Statistics) -> list[Edit]:
        """Decompose the safety vectors of matrices of one shape in one call."""
        found: dict[int, Edit] = {}
        stack: list[tuple[int, Tensor]] = []
        for number, layer in enumerate(layers):
            delta_safe = self.safety_matrix(layer)
            if isinstance(delta_safe, Unchanged):
                found[number] = delta_safe
            else:
                stack.append((number, delta_safe))
        if stack:
            matrices, shared = torch.stack([delta for _, delta in stack]), statistics.decompositions
            together = decompose_batch if shared is None else shared.decompose_batch
            decomposed = together(matrices)
            for (number, _), each in zip(stack, decomposed, strict=True):
                found[number] = self.edit_spectrum(layers[number], each)
        return [found[number] for number in range(len(layers))]

    def nonzero_vector(self, layer: Layer) -> Tensor | Unchanged:
        """Return delta_safe of the settled kind, or that it is zero."""
        kind = self.vector_kind
        assert kind is not None
        delta_safe = layer.safety_vector(kind)
        return delta_safe if bool(delta_safe.any()) else Unchanged("safety vector is zero")

    def _factors(
        self, layer: Layer, decomposition: Decomposition, rank: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return left [d_out, r], right [r, d_in] with sum S_i u_i v_i^T, and the left basis.

        Only the smaller side's vectors are trusted: U_r U_r^T delta = delta V_r V_r^T is the
        truncation, so nothing is divided by a small singular value.
        """
        delta = decomposition.matrix
        if decomposition.smaller_is_left:
            u_or = decomposition.left(rank).to(delta)
            return u_or, u_or.T @ delta, u_or
        v_ir = decomposition.right(rank).to(delta)
        return delta @ v_ir, v_ir.T, decomposition.left(rank)
