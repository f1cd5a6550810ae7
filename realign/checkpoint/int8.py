"""Eight-bit integer weights in the layout of compressed-tensors, format `int-quantized`.

Of a linear layer a file holds, instead of its weight [d_out, d_in],

    weight             int8 [d_out, d_in]: the codes 0 .. 255, less 128
    weight_scale       the step of each row [d_out, 1], in the type of the model
    weight_zero_point  int8 [d_out, 1]: the code of 0, less 128

and they stand for (weight - zero_point) scale. Here: that layout, its config, and reading it back.
Not here: how codes are made (`realign.subspace.quantiser`), which files they go to
(`realign.repair.quantise`).

Not `pack-quantized`, four codes a word: compressed-tensors 0.20 packs zero points, too, and then
transformers 5.23 cannot load them (it expects them unpacked while a model is put together).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BITS = 8
FORMAT = "int-quantized"
ENDINGS = ("weight", "weight_scale", "weight_zero_point")
TYPES = ("I8", None, "I8")
"""Of these tensors; None: the model's."""
_MIDDLE = 128


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """One quantised weight as it is stored; see the module's docstring."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Return its tensors by their names in a file."""
        values = (self.weight, self.scale, self.zero_point)
        return {f"{module}.{end}": value for end, value in zip(ENDINGS, values, strict=True)}

    def decode(self) -> Tensor:
        """Return (weight - zero_point) scale [d_out, d_in] in float32."""
        return (self.weight.float() - self.zero_point.float()) * self.scale.float()


def int8_matrix(codes: Tensor, *, zero: Tensor, step: Tensor, dtype: torch.dtype) -> Int8Matrix:
    """Return a matrix as it is stored.

    Args:
        codes: whole numbers 0 .. 255 [d_out, d_in].
        zero: the code of 0 [d_out, 1].
        step: [d_out, 1], numbers of `dtype`.
        dtype: of the model.
    """
    scale = step.to(dtype)
    assert torch.equal(scale.to(step.dtype), step), "a step that the file cannot hold"
    return Int8Matrix(
        (codes - _MIDDLE).to(torch.int8), scale.contiguous(), (zero - _MIDDLE).to(torch.int8)
    )


def int8_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors that stand for a weight, in the order of `ENDINGS`."""
    return shape, (shape[0], 1), (shape[0], 1)


def read_int8(tensors: Mapping[str, Tensor], module: str) -> Int8Matrix:
    """Return the stored weight of a module."""
    return Int8Matrix(*(tensors[f"{module}.{ending}"] for ending in ENDINGS))


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
