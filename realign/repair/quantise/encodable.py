"""Whether a repair can be written as integers: told by headers and settings, before the work."""

from __future__ import annotations

from realign.checkpoint.int8 import BITS
from realign.checkpoint.matching import Matching
from realign.errors import UsageError
from realign.repair.method import Method


def check_encodable(method: Method, matching: Matching, *, strength: float, dials: bool) -> None:
    """Check that a repair can be written as integers.

    Args:
        method: settled.
        matching: what it edits.
        strength: the dial t.
        dials: whether single layers have dials of their own.

    Raises:
        UsageError: it does not quantise to eight bits, is used at another strength than 1, or edits
            weights that are no plain linear layers.
    """
    settings = method.settings()
    if method.name != "q_realign" or settings["bits"] != BITS or not settings["quantise"]:
        raise UsageError(
            "--encode compressed-tensors writes the integers of q_realign at 8 bits, this run is "
            f"{method.name}"
            + (f" with bits = {settings['bits']}" if method.name == "q_realign" else ""),
            "use --method q_realign --set bits=8, or leave --encode out",
        )
    if strength != 1.0 or dials:
        raise UsageError(
            "--encode needs strength 1: between the fine-tune and the repair there are no integers",
            "leave --strength out",
        )
    for pair in matching.pairs:
        for slot in pair.slots if pair.action == "edit" else ():
            if slot.transposed or slot.expert is not None or slot.span is not None:
                raise UsageError(
                    f"{slot.tensor} is no plain linear layer: compressed-tensors has no integers "
                    "for it",
                    "leave --encode out: the de-quantised checkpoint is written all the same",
                )
