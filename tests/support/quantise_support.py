"""A workbench over real checkpoints, for training a quantiser without the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from support.model_support import save
from torch import Tensor

from realign.checkpoint.matching import match
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, slot_shape
from realign.model.chat import encode
from realign.model.loading import load_tokenizer
from realign.progress import SILENT, Progress
from realign.repair.edit import Layer
from realign.repair.preparation import RunningModel
from realign.repair.running import running_model
from realign.repair.stream import read_slot


def prompts_of(file: Path) -> list[str]:
    """The prompts of a laboratory suite."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [row["prompt"] for row in rows if "prompt" in row]


class FolderWorkbench:
    """What `q_realign` asks of a workbench, over open checkpoints of one architecture."""

    seed = 0
    device = torch.device("cpu")
    progress: Progress = SILENT

    def __init__(
        self, checkpoints: Mapping[str, Checkpoint], texts: Mapping[str, Sequence[Any]]
    ) -> None:
        self._checkpoints, self._texts = checkpoints, texts
        self.made = 0
        finetuned = checkpoints["finetuned"]
        others = {role: each for role, each in checkpoints.items() if role != "finetuned"}
        pairs = match(finetuned, others, scope="block_linear").pairs
        self.slots: Mapping[str, Slot] = {
            slot.key: slot for pair in pairs if pair.action == "edit" for slot in pair.slots
        }

    def layer(self, key: str) -> Layer:
        slot = self.slots[key]
        stored = {
            role: logical_matrix(read_slot(each, slot), slot)
            for role, each in self._checkpoints.items()
        }
        return Layer(
            key=key,
            module=slot.module,
            layer=slot.layer,
            finetuned=stored["finetuned"],
            aligned=stored["aligned"],
        )

    def layers(self) -> Iterator[Layer]:
        return (self.layer(key) for key in self.slots)

    def prompts(self, data: str, *, role: str) -> Sequence[tuple[int, ...]]:
        texts = self._texts[data]
        if texts and not isinstance(texts[0], str):
            return [tuple(each) for each in texts]
        tokenizer = load_tokenizer(self._checkpoints[role])
        return [tuple(encode(tokenizer, text)) for text in texts]

    def running(self, role: str) -> AbstractContextManager[RunningModel]:
        checkpoint = self._checkpoints[role]
        shapes = {
            key: slot_shape(checkpoint.tensors[slot.tensor].shape, slot)
            for key, slot in self.slots.items()
        }
        return running_model(checkpoint, places=self.slots, shapes=shapes, device="cpu")

    def cached(
        self, name: str, about: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        assert json.dumps(about)
        self.made += 1
        return make()


TEXTS: Mapping[str, Sequence[Any]] = {
    "anchors": [f"w{i} w{i + 1} w{i % 7}" for i in range(18)],
    "keep": [f"w{30 + i} w{i}" for i in range(6)],
}
"""Prompts of the word tokenizer: enough of both kinds to calibrate on."""


def save_pair(folder: Path, model: Any, *, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """A model and a drifted copy, saved as aligned and finetuned with a word tokenizer."""
    paths = {role: folder / role for role in ("aligned", "finetuned")}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:  # gains that differ, as in trained models
                parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
    save(paths["aligned"], model.to(dtype))
    model.to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * noise * parameter.std().nan_to_num(0.1)
    save(paths["finetuned"], model.to(dtype))
    return paths


@contextmanager
def opened(paths: Mapping[str, Path]) -> Generator[FolderWorkbench]:
    """A workbench over saved models."""
    with ExitStack() as stack:
        checkpoints = {
            role: stack.enter_context(open_checkpoint(path)) for role, path in paths.items()
        }
        yield FolderWorkbench(checkpoints, TEXTS)
