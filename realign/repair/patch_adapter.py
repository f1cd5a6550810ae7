"""A repaired adapter: the fine-tune's own LoRA and the repair's edit as one adapter over its base.

W_f = W + s B A and W' = W_f + t L R give W' = W + s [B, (t/s) L] [A; R]: the factors are laid side
by side, the fine-tune's own first and bit for bit, and lora_alpha keeps the scale s at the new
rank. What the adapter has beside LoRA (modules trained whole, biases, trained tokens) goes along as
it is. A DoRA weight is no sum of products, so a DoRA adapter cannot be extended. Here: the content
of that adapter. Not here: computing the edit, and writing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.headers import TensorInfo, read_header
from realign.checkpoint.lora import LoraConfig
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.reader import read_json_object
from realign.checkpoint.sidecars import folder_sidecars
from realign.errors import UsageError
from realign.repair.patch_content import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    Patch,
    base_name,
    by_parameter,
    model_bytes,
    named_pair,
    number,
    stored_transposed,
)
from realign.repair.patch_modules import INSTEAD, ModuleFactors

_PLACES = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Ways of naming target modules that a list of full names makes superfluous."""


def check_extendable(adapter: AdapterCheckpoint) -> None:
    """Refuse adapters to which no edit can be added.

    Raises:
        UsageError: the adapter is a DoRA, or has LoRA on bare parameters.
    """
    if adapter.lora.dora:
        raise UsageError(
            f"{adapter.source} is a DoRA adapter: its magnitudes rescale whatever is added, so the "
            "repair cannot be written into it",
            f"{INSTEAD}: the result is merged; or merge the adapter with peft first and write a "
            "patch over the merged model",
        )
    if adapter.lora.parameters:
        raise UsageError(
            f"{adapter.source} has LoRA on bare parameters (target_parameters): the repair cannot "
            "be written into it",
            f"{INSTEAD}: the result is merged; or merge the adapter with peft first and write a "
            "patch over the merged model",
        )


def extend_adapter(
    modules: Sequence[ModuleFactors], adapter: AdapterCheckpoint, *, strength: float, error: float
) -> Patch:
    """The adapter with the repair in it, over the adapter's own base.

    Args:
        modules: the edit's factors at strength 1.
        adapter: the fine-tune.
        strength: t.
        error: of the factors, for the record.

    Raises:
        UsageError: see `check_extendable`; or the edit reaches rows that were trained by
            themselves.
    """
    check_extendable(adapter)
    return _Extension(adapter, strength).patch(modules, error=error)


class _Extension:
    def __init__(self, adapter: AdapterCheckpoint, strength: float) -> None:
        self._adapter, self._strength = adapter, strength
        self._lora: LoraConfig = adapter.lora
        self._header = read_header(adapter.folder / ADAPTER_WEIGHTS).tensors
        self._files = TensorFiles()
        self._tensors: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}
        self._edit_ranks: dict[str, int] = {}

    def patch(self, modules: Sequence[ModuleFactors], *, error: float) -> Patch:
        try:
            return self._patch(modules, error=error)
        finally:
            self._files.close()

    def _patch(self, modules: Sequence[ModuleFactors], *, error: float) -> Patch:
        for name, info in self._header.items():
            self._tensors[name] = self._files.read(info)
        own = self._own_modules()
        for name in own:
            self._ranks[name] = self._lora.rank_of(name)
            self._alphas[name] = self._alpha(self._lora.scale_of(name), self._ranks[name])
        new: list[ModuleFactors] = []
        for module in modules:
            self._add(module, new)
        for module in new:
            self._tensors |= named_pair(module, new)
        return Patch(
            dict(sorted(self._tensors.items())),
            self._config(own, new),
            ranks=dict(sorted(self._ranks.items())),
            edit_ranks=dict(sorted(self._edit_ranks.items())),
            error=error,
            model_bytes=model_bytes(self._adapter),
            extends_adapter=True,
            sidecars=dict(folder_sidecars(self._adapter.folder)),
        )

    def _add(self, module: ModuleFactors, new: list[ModuleFactors]) -> None:
        for name in module.tensors:
            if self._adapter.trains_tokens(name):
                raise UsageError(
                    f"{name}: single tokens of it were trained, and the edit reaches all of it",
                    f"{INSTEAD}, or use --scope block_linear",
                )
        own = [each for name in module.tensors for each in self._adapter.lora_modules(name)]
        whole = [
            info for name in module.tensors if (info := self._adapter.saved_whole(name)) is not None
        ]
        if own:
            if len(own) > 1 or len(module.tensors) > 1:
                raise UsageError(
                    f"{module.name}: the adapter has LoRA on {len(own)} parts of what is one "
                    "module in memory",
                    INSTEAD,
                )
            self._extend(own[0], module)
        elif whole:
            self._add_to_whole(module, whole)
        else:
            self._edit_ranks[module.target] = self._ranks[module.target] = module.rank
            self._alphas[module.target] = self._alpha(self._strength, module.rank)
            new.append(module)
            self._settle_bias(module)

    def _extend(self, name: str, module: ModuleFactors) -> None:
        """Lay the edit's factors behind the fine-tune's own."""
        scale = self._lora.scale_of(name)
        embedding = module.kind == "embedding"
        key_a, key_b = (self._key(name, side, embedding=embedding) for side in "AB")
        a, b = self._tensors[key_a].float(), self._tensors[key_b].float()
        right, left = module.pair
        if scale == 0.0:  # a factor of 0 mutes the fine-tune's product: it is not needed
            a, b, scale = a[:0], b[:, :0], self._strength
        rank = a.shape[0] + module.rank
        self._tensors[key_a] = torch.cat([a, right])
        self._tensors[key_b] = torch.cat([b, left * (self._strength / scale)], dim=1)
        self._ranks[name] = rank
        self._alphas[name] = self._alpha(scale, rank)
        self._edit_ranks[name] = module.rank

    def _add_to_whole(self, module: ModuleFactors, whole: Sequence[TensorInfo]) -> None:
        """A module that was trained whole is saved whole: there the edit is simply added."""
        (info,) = whole
        delta = module.left_eor[0] @ module.right_eri[0]
        if module.kind == "embedding" or module.transposed:
            delta = delta.T
        tensor = self._tensors[info.name]
        wide = torch.promote_types(tensor.dtype, torch.float32)
        self._tensors[info.name] = (tensor.to(wide) + self._strength * delta).to(tensor.dtype)
        self._edit_ranks[module.target] = module.rank

    def _settle_bias(self, module: ModuleFactors) -> None:
        """The bias of a module that gets LoRA only now, as peft then looks for it.

        Raises:
            UsageError: every lora_B has a bias, and this module has none to which it could be
                merged.
        """
        trained = f"{PREFIX}{module.name}.bias"
        if trained in self._tensors:
            wrapped = f"{PREFIX}{module.name}.base_layer.bias"
            self._tensors[wrapped] = self._tensors.pop(trained)
        if not any(name.endswith("lora_B.bias") for name in self._tensors):
            return
        (tensor,) = module.tensors
        if f"{tensor.removesuffix('.weight')}.bias" not in self._adapter.tensors:
            raise UsageError(
                f"{self._adapter.source} has lora_bias, and {module.name}, which the repair edits, "
                "has no bias: peft could not merge the result",
                INSTEAD,
            )
        self._tensors[f"{PREFIX}{module.name}.lora_B.bias"] = torch.zeros(module.left_eor.shape[1])

    def _alpha(self, scale: float, rank: int) -> float:
        """The lora_alpha that gives a scale at a rank."""
        return scale * (math.sqrt(rank) if self._lora.rank_stabilised else rank)

    def _key(self, module: str, side: str, *, embedding: bool) -> str:
        part = f"lora_embedding_{side}" if embedding else f"lora_{side}"
        for key in (f"{PREFIX}{module}.{part}.weight", f"{PREFIX}{module}.{part}"):
            for name in (key, key.removeprefix(PREFIX)):
                if name in self._tensors:
                    return name
        raise AssertionError(f"{module} has no {part}")  # pragma: no cover (it was paired)

    def _own_modules(self) -> list[str]:
        names = {m for t in self._adapter.tensors for m in self._adapter.lora_modules(t)}
        return sorted(names)

    def _config(self, own: Sequence[str], new: Sequence[ModuleFactors]) -> dict[str, Any]:
        config = dict(read_json_object(self._adapter.folder / ADAPTER_CONFIG))
        base = self._adapter.base
        config |= dict.fromkeys([key for key in _PLACES if key in config])
        config |= {
            "base_model_name_or_path": base_name(base),
            "revision": base.commit,
            "inference_mode": True,
            "target_modules": sorted({*own, *(m.name for m in new if not by_parameter(m))}),
            "rank_pattern": {key: self._ranks[key] for key in sorted(self._ranks)},
            "alpha_pattern": {key: number(self._alphas[key]) for key in sorted(self._alphas)},
        }
        parameters = sorted(m.target for m in new if by_parameter(m))
        if parameters:
            config |= {"target_parameters": parameters, "lora_dropout": 0.0}
        if any(m.kind == "linear" for m in new):
            config["fan_in_fan_out"] = stored_transposed(new)
        return config
