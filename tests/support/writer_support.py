"""A small sharded checkpoint, and writing its like into an output folder."""

from __future__ import annotations

from pathlib import Path

import torch
from support.checkpoint_support import llama_tensors, write_model

from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.writer import OutputFolder, ShardLayout, plan_layout

TENSORS = llama_tensors(dtype=torch.bfloat16)
NAMES = list(TENSORS)


def sharded_model(folder: Path) -> Checkpoint:
    """A model of three weight files."""
    shards = [NAMES[:4], NAMES[4:8], NAMES[8:]]
    return open_checkpoint(write_model(folder, TENSORS, shards=shards))


def fill(output: OutputFolder, layout: ShardLayout, source: Checkpoint, *, rows: int = 3) -> None:
    """Write one weight file, a few rows at a time."""
    with output.shard(layout) as writer:
        for spec in layout.tensors:
            for at in range(0, spec.shape[0], rows):
                part = (at, min(at + rows, spec.shape[0]))
                writer.write(spec.name, source.read(spec.name, part))
        writer.facts["tensors"] = len(layout.tensors)


def copy_of(model: Checkpoint, target: Path, *, fingerprint: str = "f") -> Path:
    """A whole run: the copy of a checkpoint."""
    layout = plan_layout(model)
    with OutputFolder(target, fingerprint=fingerprint, layout=layout) as output:
        for each in layout:
            if not output.is_done(each):
                fill(output, each, model)
        output.copy_sidecars(model)
        output.write_index(layout)
        return output.commit()


def leftovers(folder: Path) -> set[str]:
    """The names in a folder."""
    return {path.name for path in folder.iterdir()}
