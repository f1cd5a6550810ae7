"""Which device things run on.

Torch alone is needed to find out: a repair from weights never runs a model, and what runs one would
double its memory and its time to start.
"""

from __future__ import annotations

import torch

from realign.errors import UsageError


def pick_device(spec: str | torch.device = "auto") -> torch.device:
    """The device named by "auto", "cpu", "cuda", "cuda:1" or "mps".

    "auto" is the first CUDA device, else mps, else the CPU.

    Raises:
        UsageError: an unknown spelling, or a device this machine does not have.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if spec == "auto":
        return torch.device("cuda:0" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(spec)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {spec!r}", "use auto, cpu, cuda, cuda:N or mps"
        ) from error
    if device.type == "cpu" or (device.type == "mps" and mps):
        return device
    if device.type == "cuda" and cuda and (device.index or 0) < torch.cuda.device_count():
        return torch.device("cuda", device.index or 0)
    raise UsageError(f"device {str(spec)!r} is not available on this machine", "use auto, or cpu")
