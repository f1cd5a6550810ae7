"""How much is read for a comparison, and what counts where nothing is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from realign.checkpoint.reader import FolderCheckpoint
from realign.diff.pairs import pair_tensors
from realign.diff.reading import measure_pieces

NAME = "model.layers.0.mlp.experts.gate_up_proj"
EXPERTS, ROWS, COLUMNS = 3, 32, 16


class Merging(FolderCheckpoint):
    """A reference that makes each matrix of a stack as a whole, as an adapter does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, source=folder.name)
        self.entries: Counter[str] = Counter()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        found = super().read(name, rows)
        self.entries[name] += found.numel()
        return found

    def read_within(self, name: str, index: int, rows: tuple[int, int]) -> Tensor:
        return self.read(name, (index, index + 1))[0][slice(*rows)]

    def reads_within(self, name: str) -> bool:
        return False


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(4)
    for name in ("a", "b", "reference"):
        (tmp_path / name).mkdir()
        stack = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator)
        save_file({NAME: stack}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return [tmp_path / name for name in ("a", "b", "reference")]


def test_a_reference_that_merges_is_read_once(folders: list[Path]) -> None:
    with (
        FolderCheckpoint(folders[0], source="a") as a,
        FolderCheckpoint(folders[1], source="b") as b,
        Merging(folders[2]) as reference,
    ):
        pairs = pair_tensors(a, b)
        found = list(measure_pieces(pairs, a, b, reference=reference, piece_bytes=256))
        assert reference.entries == {NAME: EXPERTS * ROWS * COLUMNS}
        alone = list(measure_pieces(pairs, a, b, piece_bytes=256))
    assert sum(nbytes for _, _, nbytes in found) == sum(nbytes for _, _, nbytes in alone)
    assert len(found) == EXPERTS and len(alone) == 8 * EXPERTS
