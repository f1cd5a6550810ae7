"""The content of an adapter folder: tensors under peft's names, and its config.

Every module keeps its own rank (rank_pattern), so nothing is padded or scaled away, and the
strength is a dial in the config: lora_alpha = t r. Here: the content of a patch over a whole
model, and the pieces it shares with a repaired adapter (`patch_adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from realign.checkpoint.reader import Checkpoint
from realign.errors import UsageError
from realign.repair.patch_modules import INSTEAD, ModuleFactors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Patch:
    """The content of an adapter folder."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    """Rank by module."""
    edit_ranks: Mapping[str, int]
    """Of that, the rank of the repair's edit."""
    error: float
    """The largest norm(E - patch) / norm(E) of any matrix; 0 where the patch is exact."""
    model_bytes: int
    """Bytes of the tensors of the model under it."""
    extends_adapter: bool = False
    """Whether it holds the factors of the adapter that was repaired, too."""
    sidecars: Mapping[str, Path | bytes] = field(default_factory=dict[str, "Path | bytes"])
    """Small files that belong beside it, by relative name."""

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "extends_adapter": self.extends_adapter,
            "modules": len(self.edit_ranks),
            **rank_facts(self.ranks, self.edit_ranks),
            "edit_ranks": dict(self.edit_ranks),
            "nbytes": self.nbytes,
            "model_bytes": self.model_bytes,
            "error": self.error,
        }


def rank_facts(ranks: Mapping[str, int], edit_ranks: Mapping[str, int]) -> dict[str, Any]:
    """Ranks of the modules with an edit: in the file, and the fine-tune's and the repair's parts.

    Modules that were trained whole hold their edit without factors, and count as the edit's rank.
    """
    edits = [rank for rank in edit_ranks.values() if rank]
    whole = [ranks.get(name, rank) for name, rank in edit_ranks.items() if rank]
    own = [total - edit for total, edit in zip(whole, edits, strict=True)]
    return {
        key: {"min": min(some), "mean": sum(some) / len(some), "max": max(some)} if some else None
        for key, some in (("rank", whole), ("own_rank", own), ("edit_rank", edits))
    }


def plain_patch(
    modules: Sequence[ModuleFactors], finetuned: Checkpoint, *, strength: float, error: float
) -> Patch:
    """A patch over the fine-tune.

    Raises:
        UsageError: linear layers stored both ways round.
    """
    ranks = {module.target: module.rank for module in modules}
    # peft wrongly warns of patterns for parameters: the most frequent of their ranks needs none.
    bare = [module.rank for module in modules if by_parameter(module)]
    common = max(bare or ranks.values(), key=(bare or [*ranks.values()]).count, default=1)
    plain = {m.target for m in modules if by_parameter(m) and m.rank == common}
    listed = [key for key in sorted(ranks) if key not in plain]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(finetuned),
        "revision": finetuned.commit,
        "inference_mode": True,
        "r": common,
        "lora_alpha": number(strength * common),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": stored_transposed(modules),
        "target_modules": sorted(m.name for m in modules if not by_parameter(m)),
        "rank_pattern": {key: ranks[key] for key in listed},
        "alpha_pattern": {key: number(strength * ranks[key]) for key in listed},
    }
    parameters = sorted(m.target for m in modules if by_parameter(m))
    if parameters:
        config["target_parameters"] = parameters
    tensors: dict[str, Tensor] = {}
    for module in modules:
        tensors |= named_pair(module, modules)
    return Patch(
        dict(sorted(tensors.items())),
        config,
        ranks=dict(sorted(ranks.items())),
        edit_ranks=dict(sorted(ranks.items())),
        error=error,
        model_bytes=model_bytes(finetuned),
    )


def by_parameter(module: ModuleFactors) -> bool:
    """Whether it is listed in target_parameters and not in target_modules."""
    return module.kind in {"stack", "weight"}


def named_pair(module: ModuleFactors, modules: Sequence[ModuleFactors]) -> dict[str, Tensor]:
    """lora_A and lora_B of one module of an adapter under peft's names."""
    a, b = module.pair
    if module.kind == "embedding":
        stem = f"{PREFIX}{module.name}.lora_embedding_"
        return {f"{stem}A": a.contiguous(), f"{stem}B": b.contiguous()}
    stem = _stack_stem(module, modules) if module.kind == "stack" else module.name
    stem = f"{PREFIX}{stem}.lora_"
    return {f"{stem}A.weight": a.contiguous(), f"{stem}B.weight": b.contiguous()}


def _stack_stem(module: ModuleFactors, modules: Sequence[ModuleFactors]) -> str:
    """The module name under which peft keeps the factors of a stack.

    The stacks of one module are wrapped in the order in which the class defines them, the first one
    innermost.
    """
    owner = module.name.rpartition(".")[0]
    siblings = sorted(
        m.order for m in modules if m.kind == "stack" and m.name.rpartition(".")[0] == owner
    )
    depth = len(siblings) - 1 - siblings.index(module.order)
    return ".".join([owner, *["base_layer"] * depth])


def stored_transposed(modules: Sequence[ModuleFactors]) -> bool:
    """What fan_in_fan_out must say.

    Raises:
        UsageError: some linear layers are stored transposed and some are not.
    """
    kinds = {module.transposed for module in modules if module.kind == "linear"}
    if len(kinds) > 1 or (kinds == {True} and any(map(by_parameter, modules))):
        raise UsageError(
            "the model stores some linear layers transposed and some not: one LoRA patch cannot "
            "hold both",
            INSTEAD,
        )
    return kinds == {True}


def base_name(model: Checkpoint) -> str:
    """How an adapter names its base: the Hub id where it came from there, else the folder."""
    if model.commit is None:
        return str(model.folder.resolve())
    return model.source.removeprefix("hf://").partition("@")[0]


def model_bytes(model: Checkpoint) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(info.nbytes for info in model.tensors.values())


def number(value: float) -> int | float:
    """A number as a config spells it: 4, not 4.0."""
    return int(value) if float(value).is_integer() else value
