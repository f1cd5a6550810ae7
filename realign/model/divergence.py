"""How far a model's next-token distributions are from a reference's: the numbers.

KL(p_ref || p_sub) position by position, for vocabularies that agree and for ones that only overlap.
Tensor arithmetic; running the two models one after the other is trace.py's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from realign.errors import MismatchError

CLAMP = -50.0
"""Least log-probability of the subject: a suppressed token is far away, not infinitely far."""
MOST_DROPPED = 0.01
"""Largest mean probability mass outside the shared vocabulary that still allows a comparison."""
_LEAST_KL = -1e-6  # rounding; anything below is a fault of ours


@dataclass(frozen=True)
class KLCurve:
    """Per-token KL to the reference, in nats, along the reference's own replies."""

    per_prompt: tuple[tuple[float, ...], ...]
    """For each prompt, KL at reply positions 1, 2, ...: as many as the reply has, at most K."""
    clamped: int
    """Terms whose subject log-probability was raised to -50."""
    dropped_reference: float
    """Mean mass of the reference on tokens the subject does not have; 0 for equal vocabularies."""
    dropped_subject: float
    """The same, the other way round."""

    @property
    def counts(self) -> tuple[int, ...]:
        """How many prompts reach position k = 1, 2, ..."""
        longest = max((len(values) for values in self.per_prompt), default=0)
        return tuple(
            sum(len(values) >= k for values in self.per_prompt) for k in range(1, longest + 1)
        )

    @property
    def curve(self) -> tuple[float, ...]:
        """Mean over the prompts that reach position k = 1, 2, ..."""
        return tuple(
            sum(values[k] for values in self.per_prompt if len(values) > k) / count
            for k, count in enumerate(self.counts)
        )

    @property
    def first(self) -> float | None:
        """The curve at k = 1; None without prompts."""
        return self.curve[0] if self.per_prompt else None

    @property
    def shallow(self) -> float | None:
        """Mean of the curve at k = 1..5, where alignment sits (arXiv 2406.05946)."""
        head = self.curve[:5]
        return sum(head) / len(head) if head else None


def kl_divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, int]:
    """KL(p || q) of each row, in nats, and how many terms were clamped.

    Args:
        log_p: [rows, vocabulary], log-probabilities in float64; -inf where p is 0.
        log_q: the same for q.

    Returns:
        [rows] and the number of terms with p > 0 whose log q was below -50.
    """
    present = log_p > -torch.inf
    clamped = int((present & (log_q < CLAMP)).sum())
    difference = torch.where(present, log_p - log_q.clamp_min(CLAMP), torch.zeros_like(log_p))
    divergence = (log_p.exp() * difference).sum(dim=-1)
    assert not bool((divergence < _LEAST_KL).any()), f"negative KL {float(divergence.min())}"
    return divergence, clamped


@dataclass(frozen=True)
class SharedVocabulary:
    """The token strings two vocabularies have in common; `None` ids: the two are equal."""

    reference_ids: Tensor | None
    subject_ids: Tensor | None
    translate: Mapping[int, int]
    """Reference id to subject id, of the shared strings."""

    def restrict(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both distributions on the shared tokens, renormalised, and the mass each [rows] lost."""
        if self.reference_ids is None or self.subject_ids is None:
            nothing = torch.zeros(log_p.shape[0], dtype=torch.float64)
            return log_p, log_q, nothing, nothing
        p, q = log_p[:, self.reference_ids], log_q[:, self.subject_ids]
        kept_p, kept_q = torch.logsumexp(p, dim=-1), torch.logsumexp(q, dim=-1)
        return (
            p - kept_p[:, None],
            q - kept_q[:, None],
            1 - kept_p.exp(),
            1 - kept_q.exp(),
        )


def share_vocabulary(
    reference: Mapping[str, int], subject: Mapping[str, int], *, rows: tuple[int, int]
) -> SharedVocabulary:
    """Match two vocabularies by token string.

    Args:
        reference: token string to id.
        subject: the same.
        rows: width of the two models' logits; ids at or above it are no outputs.

    Raises:
        MismatchError: they have no token in common.
    """
    if rows[0] == rows[1] and dict(reference) == dict(subject):
        return SharedVocabulary(None, None, {i: i for i in range(rows[0])})
    pairs = sorted(
        (i, subject[token])
        for token, i in reference.items()
        if i < rows[0] and subject.get(token, rows[1]) < rows[1]
    )
    if not pairs:
        raise MismatchError(
            "the two tokenizers have no token in common", "compare models of one family"
        )
    ours, theirs = zip(*pairs, strict=True)
    return SharedVocabulary(torch.tensor(ours), torch.tensor(theirs), dict(pairs))
