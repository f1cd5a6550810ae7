"""Which base tensors an adapter changes, and how: its names, shapes and ties settled from headers.

Here: adapter tensors paired with base tensors, and what that means for shapes and config of the
merged checkpoint. Not here: reading and merging (`adapter`), the arithmetic (`lora`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.lora import LoraConfig
from realign.checkpoint.names import find_embedding, find_head, is_conv1d, is_tied, role_of
from realign.checkpoint.reader import ADAPTER_CONFIG, Checkpoint
from realign.checkpoint.spellings import spelled
from realign.checkpoint.stacks import StackTarget, find_stack
from realign.errors import CheckpointError, MismatchError

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_HEAD = "lm_head"


@dataclass(eq=False)
class Change:
    """All that an adapter does to one effective tensor, in the order in which it is done."""

    replaced: TensorInfo | None = None
    """Trained whole, or saved with its LoRA: read from the adapter."""
    own: bool = False
    """Trained whole, as a copy that no longer serves the other side of a tie."""
    base_name: str | None = None
    """The base tensor to start from, where it has another name."""
    tokens: tuple[TensorInfo, tuple[int, ...]] | None = None
    """Trained rows and where they go."""
    loras: list[LoraTensors] = field(default_factory=list["LoraTensors"])
    added: tuple[TensorInfo, float] | None = None
    """A trained bias correction and its factor."""


@dataclass(frozen=True, eq=False)
class LoraTensors:
    """The factors of one target module, and how they are multiplied."""

    module: str
    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None
    embedding: bool
    scale: float
    transposed: bool
    stack: StackTarget | None = None
    """Where the factors are those of a stack of experts, of which the tensor may be a part."""


class Pairing:
    """Collects an adapter's tensors by the base tensor that they change."""

    def __init__(self, base: Checkpoint, lora: LoraConfig, folder: Path) -> None:
        self._base, self._lora, self._folder = base, lora, folder
        self._parts: dict[str, dict[str, TensorInfo]] = {}
        self._changes: dict[str, Change] = {}

    def add(self, name: str, info: TensorInfo) -> None:
        """Take in one tensor of the adapter.

        Raises:
            MismatchError: the base has nothing of this name and shape.
        """
        plain = name.removeprefix("base_model.model.")
        found = _KEY.fullmatch(plain)
        if found is None:
            self._replace(plain, info)
            return
        part = found["part"].removeprefix("token_adapter.")
        if found["leaf"] == ".bias":
            part += ".bias"
        self._parts.setdefault(found["module"], {})[part] = info

    def _replace(self, plain: str, info: TensorInfo) -> None:
        if ".original_module." in plain:
            return
        plain = plain.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        under_lora = ".base_layer." in plain
        plain = plain.replace(".base_layer.", ".")
        name = self._resolve(plain)
        if name is None and under_lora:
            name = self._tied_head(plain.removesuffix(".weight"))
        if name is None and plain.split(".")[-2:] == [_HEAD, "weight"]:
            name = plain  # a tied head that was trained on its own; settled in `settle_ties`
        if name is None:
            raise self._absent(plain)
        have = self._base.tensors.get(name)
        if have is not None and have.shape != info.shape and not _resized(have, info):
            raise self._misfit(plain, info, have)
        change = self._change(name)
        change.replaced, change.own = info, not under_lora

    def _change(self, name: str) -> Change:
        return self._changes.setdefault(name, Change())

    def finish(self) -> dict[str, Change]:
        """The changes by effective tensor name.

        Raises:
            CheckpointError: factors are missing or contradict the config.
            MismatchError: the base has nothing of this name and shape.
        """
        # Embeddings before the head, as peft merges modules in the model's order.
        for module in sorted(self._parts, key=lambda m: (m.endswith(_HEAD), m)):
            self._apply(module, self._parts[module])
        if not self._changes:
            raise CheckpointError(
                f"{self._folder / ADAPTER_WEIGHTS} holds no adapter tensors", "export it again"
            )
        return self._changes

    def _apply(self, module: str, parts: Mapping[str, TensorInfo]) -> None:
        name = self._resolve(f"{module}.weight") or self._tied_head(module)
        if name is None and self._apply_stack(module, parts):
            return
        if name is None:
            raise self._absent(module)
        change = self._change(name)
        have = change.replaced or self._base.tensors[name]
        if "trainable_tokens_delta" in parts:
            change.tokens = self._tokens(module, parts["trainable_tokens_delta"], have)
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        a, b = (parts.get(key) for key in keys)
        if a is None and b is None:
            return
        if a is None or b is None:
            raise CheckpointError(
                f"{self._folder / ADAPTER_WEIGHTS} has only one of {keys[0]} and {keys[1]} "
                f"for {module}",
                "export the adapter again",
            )
        magnitude = parts.get("lora_magnitude_vector")
        if self._lora.dora != (magnitude is not None):
            raise CheckpointError(
                f"{module}: the DoRA magnitude is {'missing' if self._lora.dora else 'unexpected'}",
                "adapter_config.json and the weights do not belong together",
            )
        lora = LoraTensors(
            module, a, b, magnitude, embedding, self._lora.scale_of(module), transposed=False
        )
        change.loras.append(self._oriented(lora, have))
        if "lora_B.bias" in parts:
            bias = self._resolve(f"{module}.bias")
            if bias is None:
                raise self._absent(f"{module}.bias")
            if parts["lora_B.bias"].shape != self._base.tensors[bias].shape:
                raise self._misfit(f"{module}.bias", parts["lora_B.bias"], self._base.tensors[bias])
            self._change(bias).added = (parts["lora_B.bias"], lora.scale)

    def _apply_stack(self, module: str, parts: Mapping[str, TensorInfo]) -> bool:
        """Pair LoRA on a bare parameter; False where the module has none."""
        a, b = parts.get("lora_A"), parts.get("lora_B")
        if not self._lora.parameters or a is None or b is None:
            return False
        targets = find_stack(self._base, self._lora, module, a, b)
        for each in targets:
            scale = self._lora.scale_of(each.parameter)
            lora = LoraTensors(module, a, b, None, False, scale, each.transposed, stack=each)
            self._change(each.tensor).loras.append(lora)
        return bool(targets)

    def _oriented(self, lora: LoraTensors, have: TensorInfo) -> LoraTensors:
        """Check the shapes against the rank in the config, and settle how the weight is stored."""
        rank = self._lora.rank_of(lora.module)
        if len(lora.a.shape) != 2 or len(lora.b.shape) != 2 or len(have.shape) != 2:
            raise self._misfit(lora.module, lora.a, have)
        if lora.a.shape[0] != rank or lora.b.shape[1] != rank:
            raise CheckpointError(
                f"{lora.module}: the factors have shapes {list(lora.a.shape)} and "
                f"{list(lora.b.shape)}, the config says rank {rank}",
                "adapter_config.json and the weights do not belong together",
            )
        product = (lora.b.shape[0], lora.a.shape[1])
        transposed = lora.embedding or is_conv1d(self._base.config, lora.module.split(".")[-1])
        if not transposed and self._lora.fan_in_fan_out and product != have.shape:
            transposed = True
        if (product[::-1] if transposed else product) != have.shape:
            raise MismatchError(
                f"{lora.module}: the LoRA product is {list(product)}, the base "
                f"{self._base.source} has {list(have.shape)}",
                "the adapter was trained on another base: name the right one as BASE+ADAPTER",
            )
        return replace(lora, transposed=transposed)

    def _tokens(
        self, module: str, info: TensorInfo, have: TensorInfo
    ) -> tuple[TensorInfo, tuple[int, ...]]:
        for key, indices in self._lora.token_indices.items():
            if module == key or module.endswith(f".{key}"):
                fits = info.shape == (len(indices), *have.shape[1:])
                if not fits or not all(0 <= i < have.shape[0] for i in indices):
                    raise self._misfit(module, info, have)
                return info, indices
        raise CheckpointError(
            f"{self._folder / ADAPTER_CONFIG} does not say which tokens {module} trains",
            "export the adapter again",
        )

    def _resolve(self, name: str) -> str | None:
        """The base tensor of an adapter's name; files may lack the prefix that peft sees."""
        tensors = self._base.tensors
        parts = name.split(".")
        for drop in range(min(3, len(parts) - 1)):
            tail = ".".join(parts[drop:])
            if tail in tensors:
                return tail
        longer = [each for each in tensors if each.endswith(f".{name}")]
        if len(longer) == 1:
            return longer[0]
        alike = self._by_spelling.get(spelled(name), [])
        return alike[0] if len(alike) == 1 and not longer else None

    @cached_property
    def _by_spelling(self) -> Mapping[str, list[str]]:
        """Files may order the parts of a model's name otherwise than the classes of today."""
        found: dict[str, list[str]] = {}
        for each in self._base.tensors:
            found.setdefault(spelled(each), []).append(each)
        return found

    def _tied_head(self, module: str) -> str | None:
        if module.split(".")[-1] == _HEAD and is_tied(self._base.config, self._base.tensors):
            return find_embedding(self._base.tensors)
        return None

    def _absent(self, name: str) -> MismatchError:
        return MismatchError(
            f"the adapter {self._folder} changes {name}, which the base {self._base.source} "
            "does not have",
            "it was trained on another base: name the right one as BASE+ADAPTER",
        )

    def _misfit(self, name: str, info: TensorInfo, have: TensorInfo) -> MismatchError:
        return MismatchError(
            f"{name} is {list(info.shape)} in the adapter {self._folder} and {list(have.shape)} in "
            f"the base {self._base.source}",
            "it was trained on another base: name the right one as BASE+ADAPTER",
        )


def settle_ties(
    base: Checkpoint,
    lora: LoraConfig,
    changes: dict[str, Change],
    same: Callable[[Change, Change], bool],
) -> dict[str, Any]:
    """Give the head its own tensor where training untied it; returns what the config must say."""
    head = next((n for n in changes if n.split(".")[-2:] == [_HEAD, "weight"]), None)
    embedding = find_embedding(base.tensors)
    if find_head(base.tensors) or embedding is None or not is_tied(base.config, base.tensors):
        return {}
    embedded = changes.get(embedding)
    if head is not None:
        if embedded is not None and same(changes[head], embedded):
            del changes[head]
            return {}
        return {"tie_word_embeddings": False}
    if embedded is not None and embedded.own and not lora.ties_weights:
        # The trained copy serves the input only; peft leaves the base's matrix in the head.
        changes[f"{_HEAD}.weight"] = Change(base_name=embedding)
        return {"tie_word_embeddings": False}
    return {}


def tie_remarks(base: Checkpoint, changes: Mapping[str, Change]) -> tuple[str, ...]:
    """What is worth saying where LoRA and tied embeddings meet."""
    embedding = find_embedding(base.tensors)
    if embedding is None or find_head(base.tensors) or not is_tied(base.config, base.tensors):
        return ()
    if embedding not in changes or not changes[embedding].loras:
        return ()
    return (
        f"the adapter has LoRA on {embedding}, which the model ties: merged, as peft does it, it "
        "changes embeddings and output head alike, which the running adapter does not",
    )


def _resized(have: TensorInfo, info: TensorInfo) -> bool:
    """Whether a trained tensor differs from the base's by its vocabulary only."""
    return (
        role_of(have).kind in {"embedding", "head"} or role_of(have).module == _HEAD
    ) and have.shape[1:] == info.shape[1:]


def effective_tensors(base: Checkpoint, changes: Mapping[str, Change]) -> dict[str, TensorInfo]:
    """The tensors of the merged checkpoint, in the base's types."""
    tensors = dict(base.tensors)
    for name, change in changes.items():
        old = base.tensors.get(change.base_name or name)
        if change.replaced is None:
            assert old is not None, name
            tensors[name] = replace(old, name=name)
            continue
        like = old or base.tensors[find_embedding(base.tensors) or name]
        shape = change.replaced.shape
        nbytes = change.replaced.numel * like.torch_dtype.itemsize
        tensors[name] = replace(
            change.replaced, name=name, dtype=like.dtype, shape=shape, nbytes=nbytes
        )
    return tensors


def vocabulary_change(base: Checkpoint, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What the config must say where training resized the vocabulary."""
    name = find_embedding(base.tensors)
    if name is None or tensors[name].shape == base.tensors[name].shape:
        return {}
    return {"vocab_size": tensors[name].shape[0]}


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The base's config with changes, in the language model's part where that is nested."""
    if not changes:
        return config
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return MappingProxyType({**config, **changes})
    inner = {**cast(Mapping[str, Any], nested), **changes}
    outer = {key: value for key, value in changes.items() if key in config}
    return MappingProxyType({**config, **outer, "text_config": inner})
