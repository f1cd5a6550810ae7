"""Eight-bit integer weights in the layout of compressed-tensors, format `pack-quantized`.

Of a linear layer's `weight` [d_out, d_in] a file holds

    weight_packed      int32 [d_out, ceil(d_in / 4)]: four codes 0 .. 255 a word, the first lowest
    weight_scale       the step of each row [d_out, 1], in the type of the model
    weight_zero_point  int32 [ceil(d_out / 4), 1]: the codes of 0, four rows a word
    weight_shape       int64 [2]: d_out, d_in

and stands for (code - zero) step. Here: that layout, its config, and reading it back. Not here: how
codes are made (`realign.subspace.quantiser`), which files they go to (`realign.repair.quantise`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BITS = 8
FORMAT = "pack-quantized"
ENDINGS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_PER_WORD = 4


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """One quantised weight as it is stored; see the module's docstring."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    shape: Tensor

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Return its tensors by their names in a file."""
        values = (self.packed, self.scale, self.zero_point, self.shape)
        return {f"{module}.{end}": value for end, value in zip(ENDINGS, values, strict=True)}

    def decode(self) -> Tensor:
        """Return (code - zero) step [d_out, d_in] in float32."""
        d_out, d_in = (int(each) for each in self.shape)
        codes = _unpack(self.packed)[:, :d_in]
        zero = _unpack(self.zero_point.T.contiguous())[:, :d_out].T
        return (codes - zero).float() * self.scale.float()


def pack_matrix(codes: Tensor, *, zero: Tensor, step: Tensor, dtype: torch.dtype) -> PackedMatrix:
    """Return a matrix as it is stored.

    Args:
        codes: whole numbers 0 .. 255 [d_out, d_in].
        zero: the code of 0 [d_out, 1].
        step: [d_out, 1], numbers of `dtype`.
        dtype: of the model.
    """
    scale = step.to(dtype)
    assert torch.equal(scale.to(step.dtype), step), "a step that the file cannot hold"
    return PackedMatrix(
        packed=_pack(codes),
        scale=scale.contiguous(),
        zero_point=_pack(zero.T).T.contiguous(),
        shape=torch.tensor(codes.shape, dtype=torch.int64),
    )


def packed_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors that stand for a weight, in the order of `ENDINGS`."""
    d_out, d_in = shape
    return (d_out, -(-d_in // _PER_WORD)), (d_out, 1), (-(-d_out // _PER_WORD), 1), (2,)


def read_packed(tensors: Mapping[str, Tensor], module: str) -> PackedMatrix:
    """Return the stored weight of a module."""
    return PackedMatrix(*(tensors[f"{module}.{ending}"] for ending in ENDINGS))


def quantisation_config(ignore: Sequence[str]) -> dict[str, Any]:
    """Return what config.json must say for loaders to take the weights up.

    Args:
        ignore: linear modules whose weights are stored as they were.
    """
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": FORMAT,
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": BITS,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "channel",
                    "group_size": None,
                    "dynamic": False,
                    "actorder": None,
                    "block_structure": None,
                },
            }
        },
    }


def _pack(codes: Tensor) -> Tensor:
    """Four codes of a row in one word."""
    short = -codes.shape[1] % _PER_WORD
    bytes_ = functional.pad(codes.to(torch.uint8), (0, short)).contiguous()
    # torch views bytes in the machine's order; all machines that torch runs on are little-endian.
    return bytes_.view(torch.int32)


def _unpack(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8).to(torch.int32)
