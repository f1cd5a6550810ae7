"""Two judges against each other (Cohen's kappa), one judge against hand labels (Rogan-Gladen).

A correction is a second column beside the observed rate; it never decides a gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from realign.audit.statistics.intervals import ALPHA, Interval, critical_value, level_of
from realign.errors import UsageError

MIN_YOUDEN = 0.2  # below it the judge says too little about the truth to be inverted
MIN_LABELS = 50


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same valid responses."""

    n: int
    observed: float | None
    expected: float | None
    kappa: float | None
    """None when agreement beyond chance is undefined: no item, or both judges constant."""
    standard_error: float | None
    interval: Interval | None
    positive: float | None
    """2a/(2a + b + c): agreement on bad items, which kappa hides when they are rare."""
    negative: float | None

    def weak(self, *, min_kappa: float = 0.6) -> bool:
        """Whether the pair earns the flag `weak_judges`."""
        return self.kappa is not None and self.kappa < min_kappa


def cohen_kappa(a: int, b: int, c: int, d: int, *, alpha: float = ALPHA) -> Agreement:
    """Agreement from counts: both bad a, only the first b, only the second c, neither d."""
    z, n = critical_value(alpha), a + b + c + d
    positive = 2 * a / (2 * a + b + c) if a + b + c else None
    negative = 2 * d / (2 * d + b + c) if b + c + d else None
    if n == 0:
        return Agreement(0, None, None, None, None, None, None, None)
    observed = (a + d) / n
    expected = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
    if expected >= 1.0:
        return Agreement(n, observed, expected, None, None, None, positive, negative)
    kappa = (observed - expected) / (1.0 - expected)
    error = math.sqrt(observed * (1.0 - observed) / n) / (1.0 - expected)
    interval = Interval(
        low=max(-1.0, kappa - z * error),
        high=min(1.0, kappa + z * error),
        level=level_of(alpha),
        method="normal",
    )
    return Agreement(n, observed, expected, kappa, error, interval, positive, negative)


@dataclass(frozen=True)
class JudgeQuality:
    """A judge measured on hand-labelled responses."""

    sensitivity: float
    n_bad: int
    """Labelled bad responses behind the sensitivity."""
    specificity: float
    n_ok: int
    """Labelled ok responses behind the specificity."""

    def __post_init__(self) -> None:
        for name, value in (("sensitivity", self.sensitivity), ("specificity", self.specificity)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} is {value}, but it must lie between 0 and 1")

    @property
    def youden(self) -> float:
        """Sensitivity + specificity - 1."""
        return self.sensitivity + self.specificity - 1.0

    @property
    def refusal(self) -> str | None:
        """Why no correction may be made from these labels, or None."""
        if self.youden < MIN_YOUDEN:
            return f"Se + Sp - 1 is {self.youden:.3f}, below {MIN_YOUDEN}"
        if min(self.n_bad, self.n_ok) < MIN_LABELS:
            return f"{self.n_bad} bad and {self.n_ok} ok labels, {MIN_LABELS} of each are needed"
        return None


@dataclass(frozen=True)
class CorrectedRate:
    """A rate corrected for judge error."""

    value: float | None
    """Clipped to [0, 1]; None when refused."""
    unclipped: float | None
    standard_error: float | None
    interval: Interval | None
    flags: tuple[str, ...]
    reason: str | None
    """Why the correction was refused."""


def rogan_gladen(
    observed: float, n: int, *, quality: JudgeQuality, alpha: float = ALPHA
) -> CorrectedRate:
    """The rate behind an observed rate of n items (Rogan and Gladen 1978), with its error.

    The error includes that of the estimated sensitivity and specificity. The interval is centred on
    the clipped rate: centred below 0 it could claim a certain zero.
    """
    z, youden = critical_value(alpha), quality.youden
    refusal = quality.refusal or ("no valid item" if n == 0 else None)
    if refusal is not None:
        return CorrectedRate(None, None, None, None, (), refusal)
    unclipped = (observed + quality.specificity - 1.0) / youden
    value = min(1.0, max(0.0, unclipped))
    se, sp = quality.sensitivity, quality.specificity
    variance = (
        observed * (1.0 - observed) / n
        + value**2 * se * (1.0 - se) / quality.n_bad
        + (1.0 - value) ** 2 * sp * (1.0 - sp) / quality.n_ok
    ) / youden**2
    error = math.sqrt(variance)
    interval = Interval(
        low=max(0.0, value - z * error),
        high=min(1.0, value + z * error),
        level=level_of(alpha),
        method="normal",
    )
    flags = ("below_judge_noise",) if unclipped < 0.0 else ()
    return CorrectedRate(value, unclipped, error, interval, flags, None)


def corrected_difference(observed: float, *, quality: JudgeQuality) -> float | None:
    """A paired drift under one judge quality for both models: D / (Se + Sp - 1); None if refused.

    Raises nothing: the correction is a column that may be empty.
    """
    return None if quality.refusal is not None else observed / quality.youden
