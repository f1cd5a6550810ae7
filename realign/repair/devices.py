"""Which device the decompositions run on, found out without loading a model library for it."""

from __future__ import annotations

import torch


def resolve_device(spec: str) -> torch.device:
    """The device named by "auto", "cpu", "cuda", "cuda:N" or "mps".

    A repair from weights alone on the processor never runs a model: importing what runs one would
    double its memory and its time to start.

    Raises:
        UsageError: an unknown spelling, or a device that this machine does not have.
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    if spec == "cpu" or (spec == "auto" and not accelerated):
        return torch.device("cpu")
    from realign.model.loading import pick_device

    return pick_device(spec)
