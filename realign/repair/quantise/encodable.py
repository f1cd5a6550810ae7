"""Whether a repair can be written as integers: told by headers and settings, before the work."""

from __future__ import annotations

from collections.abc import Sequence

from realign.checkpoint.int8 import BITS, ENDINGS, TYPES, int8_shapes
from realign.checkpoint.matching import Matching
from realign.checkpoint.shards import ShardLayout, TensorSpec
from realign.errors import UsageError
from realign.repair.method import Method


def encoded_specs(spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """Return the tensors that stand for a weight in the encoded folder."""
    module = spec.name.removesuffix(".weight")
    return tuple(
        TensorSpec(f"{module}.{ending}", dtype or spec.dtype, shape)
        for ending, dtype, shape in zip(ENDINGS, TYPES, int8_shapes(spec.shape), strict=True)
    )


def encoded_bytes(layout: Sequence[ShardLayout], matching: Matching) -> int:
    """Return the bytes that the encoded folder adds to an output of this layout."""
    edited = {pair.role.name for pair in matching.pairs if pair.action == "edit"}
    return sum(
        each.nbytes
        for shard in layout
        for spec in shard.tensors
        for each in (encoded_specs(spec) if spec.name in edited else (spec,))
    )


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
