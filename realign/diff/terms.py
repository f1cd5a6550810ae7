"""The figures of one pair of tensors, from sums that add up over pieces, tensors and layers.

    relative = norm(B - A) / norm(A)          cosine = <A, B> / (norm(A) norm(B))

Here: the sums and what follows from them. Not here: where the tensors come from (`compare`), the
spectrum of a difference (`spectra`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BLOCK = 2**16
"""Entries at a time: three float64 copies of them stay in a processor's cache."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Terms:
    """Sums over the entries of two tensors A and B, and perhaps of a reference R."""

    entries: int = 0
    changed: int = 0
    """Entries whose stored bits differ; whose values differ, where the types do."""
    a: float = 0.0
    """Sum of squares of A."""
    b: float = 0.0
    delta: float = 0.0
    """Sum of squares of B - A."""
    inner: float = 0.0
    """<A, B>."""
    largest: float = 0.0
    """max |B - A|."""
    reference_entries: int = 0
    """Entries with a counterpart in R: the sums below go over these alone."""
    reference: float = 0.0
    """Sum of squares of A - R."""
    reference_delta: float = 0.0
    """Sum of squares of B - A."""
    reference_inner: float = 0.0
    """<B - A, A - R>."""

    def __add__(self, other: Terms) -> Terms:
        return Terms(
            entries=self.entries + other.entries,
            changed=self.changed + other.changed,
            a=self.a + other.a,
            b=self.b + other.b,
            delta=self.delta + other.delta,
            inner=self.inner + other.inner,
            largest=_largest(self.largest, other.largest),
            reference_entries=self.reference_entries + other.reference_entries,
            reference=self.reference + other.reference,
            reference_delta=self.reference_delta + other.reference_delta,
            reference_inner=self.reference_inner + other.reference_inner,
        )

    @property
    def finite(self) -> bool:
        """Whether neither side holds NaN or infinity (nor squares beyond float64)."""
        return all(map(math.isfinite, (self.a, self.b, self.delta, self.inner)))

    @property
    def reference_finite(self) -> bool:
        """Whether the sums with R are finite."""
        return math.isfinite(self.reference) and math.isfinite(self.reference_inner)

    def without_reference(self) -> Terms:
        """The sums of A and B alone."""
        return replace(
            self, reference_entries=0, reference=0.0, reference_delta=0.0, reference_inner=0.0
        )

    def figures(self) -> Figures:
        """The figures that people read; None where they are not defined or not finite."""
        norm_a, norm_b, norm_delta = (math.sqrt(x) for x in (self.a, self.b, self.delta))
        relative = 0.0 if self.delta == 0.0 else _ratio(norm_delta, norm_a)
        # Equal vectors: rounding must not make their cosine 1 - 1e-16.
        same = self.delta == 0.0 and self.a > 0.0
        return Figures(
            entries=self.entries,
            changed=self.changed,
            norm_a=_plain(norm_a),
            norm_b=_plain(norm_b),
            norm_delta=_plain(norm_delta),
            relative=relative,
            cosine=1.0 if same and self.finite else _cosine(self.inner, norm_a, norm_b),
            largest=_plain(self.largest),
            cosine_reference=_cosine(
                self.reference_inner, math.sqrt(self.reference_delta), math.sqrt(self.reference)
            ),
        )


@dataclass(frozen=True)
class Figures:
    """What is reported of two tensors, or of many taken as one long vector."""

    entries: int
    changed: int
    norm_a: float | None
    norm_b: float | None
    norm_delta: float | None
    relative: float | None
    """norm(B - A) / norm(A)."""
    cosine: float | None
    """Of the weights: <A, B> / (norm(A) norm(B))."""
    largest: float | None
    """max |B - A|."""
    cosine_reference: float | None
    """cos(B - A, A - R) over what has a counterpart in a reference R, where one was given."""


class Meter:
    """Measures pieces of tensors with scratch memory of its own; one per thread."""

    def __init__(self) -> None:
        self._a, self._b, self._r = (torch.empty(_BLOCK, dtype=torch.float64) for _ in range(3))

    def measure(self, a: Tensor, b: Tensor, reference: Tensor | None = None) -> Terms:
        """The terms of two pieces of equal shape, in any types; sums are taken in float64.

        Args:
            a: as stored.
            b: as stored, of A's shape.
            reference: as stored, of A's shape.
        """
        assert a.shape == b.shape, (tuple(a.shape), tuple(b.shape))
        a, b = a.reshape(-1), b.reshape(-1)
        entries = a.numel()
        changed = _changed(a, b)
        a, b = _numbers(a), _numbers(b)
        r = None if reference is None else _numbers(reference.reshape(-1))
        total = Terms(
            entries=entries, changed=changed, reference_entries=0 if r is None else entries
        )
        for start in range(0, a.numel(), _BLOCK):
            block = slice(start, start + _BLOCK)
            total += self._block(
                a[block], b[block], None if r is None else r[block], same=changed == 0
            )
        return total

    def _block(self, a: Tensor, b: Tensor, r: Tensor | None, *, same: bool) -> Terms:
        n = a.numel()
        x = self._a[:n].copy_(a)
        size = float(torch.dot(x, x))
        # Bits that agree may still be NaN: the difference is then zero, the norm is not finite.
        if same and r is None:
            return Terms(a=size, b=size, inner=size)
        y = self._b[:n].copy_(b)
        size_b, inner = float(torch.dot(y, y)), float(torch.dot(x, y))
        y.sub_(x)
        delta = float(torch.dot(y, y))
        low, high = torch.aminmax(y)
        found = Terms(
            a=size, b=size_b, delta=delta, inner=inner, largest=_largest(-float(low), float(high))
        )
        if r is None:
            return found
        z = torch.sub(x, self._r[:n].copy_(r), out=self._r[:n])
        return replace(
            found,
            reference=float(torch.dot(z, z)),
            reference_delta=delta,
            reference_inner=float(torch.dot(y, z)),
        )


def _changed(a: Tensor, b: Tensor) -> int:
    if a.dtype == b.dtype:
        bits = _BITS[a.itemsize]
        one, two = a.view(bits), b.view(bits)
        # Telling that nothing changed is several times faster than counting.
        return 0 if torch.equal(one, two) else int(torch.count_nonzero(one != two))
    return int(torch.count_nonzero(_as_float64(a) != _as_float64(b)))


def _numbers(x: Tensor) -> Tensor:
    return torch.view_as_real(x).reshape(-1) if x.is_complex() else x


def _as_float64(x: Tensor) -> Tensor:
    return x if x.is_complex() else x.to(torch.float64)


def _largest(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else max(x, y)


def _plain(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _ratio(numerator: float, denominator: float) -> float | None:
    return _plain(numerator / denominator) if denominator > 0.0 else None


def _cosine(inner: float, one: float, two: float) -> float | None:
    product = one * two
    if not math.isfinite(inner) or not math.isfinite(product) or product == 0.0:
        return None
    return max(-1.0, min(1.0, inner / product))
