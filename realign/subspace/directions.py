"""Directions in weight space, tensor by tensor: random, along and across a given one.

Every tensor of a direction is drawn from a generator of its own, keyed by the seed and the name of
the tensor, so that neither the device nor the order in which tensors are visited matters. Lengths
follow arXiv 2405.17374 (a random direction is as long as the tensor it perturbs) and 2506.08473 (a
direction across the alignment vector is as long as the vector). Not here: which models they start
from, and what is measured on the way (`realign.audit.landscape`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.subspace.keyed import generator

_VANISHES = 1e-6  # of the length drawn: what is left of it is rounding


def seeded_normal(name: str, shape: tuple[int, ...], *, seed: int, role: str = "random") -> Tensor:
    """Draw N(0, 1) for one tensor, float32 on the CPU.

    Args:
        name: of the tensor; part of the key.
        shape: of the tensor.
        seed: of the direction.
        role: what is drawn, so that two directions of one seed differ.
    """
    drawn = generator(seed=seed, method="landscape", key=name, role=role).standard_normal(
        shape, dtype="float32"
    )
    # A scalar parameter would come back as a number.
    return torch.as_tensor(drawn, dtype=torch.float32).reshape(shape)


def perturbed(name: str) -> bool:
    """Whether random directions touch a tensor: all but those with `norm` in their name."""
    return "norm" not in name.lower()


def random_direction(name: str, tensor: Tensor, *, seed: int, role: str = "random") -> Tensor:
    """N(0, 1), scaled to the norm of the tensor it perturbs; 0 for norms (2405.17374).

    Args:
        name: of the tensor.
        tensor: the weights at the start, of any float dtype.
        seed: of the direction.
        role: see `seeded_normal`.

    Returns:
        float32, in the tensor's shape.
    """
    if not perturbed(name):
        return torch.zeros(tensor.shape)
    drawn = seeded_normal(name, tuple(tensor.shape), seed=seed, role=role)
    return rescaled(drawn, _norm(tensor))


def second_random_direction(name: str, tensor: Tensor, *, first: Tensor, seed: int) -> Tensor:
    """A random direction at right angles to another one, of the same length, per tensor."""
    drawn = random_direction(name, tensor, seed=seed, role="second")
    return rescaled(across(drawn, first), _norm(drawn))


def orthogonal_direction(name: str, along: Tensor, *, seed: int) -> Tensor:
    """N(0, 1) without its part along a direction, as long as that one; 0 where that is 0.

    Args:
        name: of the tensor.
        along: one tensor of the direction it is to be orthogonal to.
        seed: of the direction.
    """
    length = _norm(along)
    if length == 0.0:
        return torch.zeros(along.shape)
    drawn = seeded_normal(name, tuple(along.shape), seed=seed, role="orthogonal")
    rest = across(drawn, along)
    if _norm(rest) <= _VANISHES * _norm(drawn):
        return torch.zeros(along.shape)  # a single entry has nothing across
    return rescaled(rest, length)


def aligned_direction(reference: Tensor, base: Tensor) -> Tensor:
    """W_reference - W_base in float32, at its own length."""
    return reference.to(torch.float32) - base.to(torch.float32)


def across(vector: Tensor, along: Tensor) -> Tensor:
    """The part of a tensor at right angles to another: v - <v, a> / <a, a> a.

    Computed in float64 and returned in float32; where `along` is 0, the vector itself.
    """
    v, a = vector.double(), along.double()
    square = float((a * a).sum())
    if square == 0.0:
        return vector.float()
    # Twice: in float32 the first pass leaves a trace of what it removes.
    for _ in range(2):
        v = v - float((v * a).sum()) / square * a
    return v.float()


def rescaled(vector: Tensor, length: float) -> Tensor:
    """The vector with another Frobenius norm; 0 stays 0."""
    norm = _norm(vector)
    return vector.float() if norm == 0.0 else (vector.double() * (length / norm)).float()


def grid(low: float, high: float, points: int) -> tuple[float, ...]:
    """Evenly spaced points with both ends, each the nearest float to its decimal.

    Raises:
        UsageError: below two points, or 0 would lie between two of them.
    """
    step = (high - low) / max(points - 1, 1)
    values = tuple(round(low + index * step, 10) + 0.0 for index in range(points))
    if points < 2 or 0.0 not in values:
        raise UsageError(
            f"{points} points from {low:g} to {high:g} do not include 0", "use 5, 9, 13, 17 or 21"
        )
    return values


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))
