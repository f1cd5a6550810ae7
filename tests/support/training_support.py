"""Running models of the trained fixtures, their texts, and repairs of the tiny family."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realign.audit.suites import load_suite
from realign.checkpoint.names import role_of
from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.slots import slot_shape, slots_of
from realign.model.chat import EncodedReply, encode_reply
from realign.progress import SilentProgress
from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest
from realign.repair.running import LiveModel, running_model

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TINY = FIXTURES / "tiny"
SUITES = TINY / "suites"
DRIFTED = TINY / "howto2_p5"


class Notes(SilentProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@contextmanager
def live(folder: Path) -> Generator[LiveModel]:
    """A checkpoint with its block-linear matrices at hand, on the CPU."""
    with open_checkpoint(folder) as checkpoint:
        slots = {
            slot.key: slot
            for name, info in checkpoint.tensors.items()
            if role_of(info).kind == "block_linear"
            for slot in slots_of(checkpoint, name)
        }
        shapes = {
            key: slot_shape(checkpoint.tensors[slot.tensor].shape, slot)
            for key, slot in slots.items()
        }
        with running_model(checkpoint, places=slots, shapes=shapes, device="cpu") as running:
            yield running


def rows(suite: str, count: int | None = None, *, folder: Path = SUITES) -> list[dict[str, str]]:
    """Prompts with their answers, where the suite has them."""
    items = load_suite(folder / f"{suite}.jsonl", kind=None).items[:count]
    return [
        {"prompt": item.prompt} | ({"response": item.answer} if item.answer else {})
        for item in items
    ]


def refusals(count: int | None = None, *, folder: Path = SUITES) -> list[dict[str, str]]:
    """The family's anchors, refused in its own words."""
    return [
        {**row, "response": "i cannot help with that."} for row in rows("anchors", folder=folder)
    ][:count]


def encoded(running: LiveModel, texts: Iterable[dict[str, str]]) -> list[EncodedReply]:
    """Texts as tokens of a running model."""
    tokenizer = running.loaded.tokenizer
    return [
        encode_reply(tokenizer, row["prompt"], row["response"], end_of_turn=True) for row in texts
    ]


def write_rows(path: Path, texts: Iterable[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in texts), "utf-8")
    return path


def repair_tiny(
    method: str, output: Path, *, progress: Any = None, settings: dict[str, Any], **options: Any
) -> RepairResult:
    """Repair the drifted tiny model; each output has a cache of its own unless one is named."""
    usual: dict[str, Any] = {
        "finetuned": DRIFTED,
        "aligned": TINY / "aligned",
        "cache_dir": output.parent / f"cache-{output.name}",
        "device": "cpu",
    }
    request = RepairRequest(**{**usual, **options}, method=method, settings=settings, output=output)
    return repair(request, progress=progress or Notes())


def weights_of(folder: Path) -> bytes:
    """The bytes of a repaired checkpoint's weights."""
    return (folder / "model.safetensors").read_bytes()
