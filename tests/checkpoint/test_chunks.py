from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from realign.checkpoint.chunks import chunks_of, read_chunk
from realign.checkpoint.reader import FolderCheckpoint

SHAPES = {"scalar": (), "row": (7,), "matrix": (9, 5), "stack": (3, 8, 4), "empty": (4, 0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


@given(name=st.sampled_from(sorted(SHAPES)), nbytes=st.integers(1, 500), data=st.data())
def test_chunks_put_together_are_the_tensor(
    folder: Path, name: str, nbytes: int, data: st.DataObject
) -> None:
    shape = SHAPES[name]
    count = shape[0] if shape else 1
    first = data.draw(st.integers(0, count))
    rows = (first, data.draw(st.integers(first, count)))
    with FolderCheckpoint(folder, source="model") as checkpoint:
        chunks = list(chunks_of([(checkpoint, name)], nbytes=nbytes, rows=rows))
        read = [read_chunk(checkpoint, name, chunk) for chunk in chunks]
        whole = checkpoint.read(name).reshape(count, -1)[slice(*rows)].reshape(-1)
    assert [tensor.numel() for tensor in read] == [chunk.numel for chunk in chunks]
    assert torch.equal(torch.cat([torch.empty(0), *(each.reshape(-1) for each in read)]), whole)
    width = max(1, shape[-1] if shape else 1)  # at least one row, however long
    assert all(tensor.nbytes <= max(nbytes, 4 * width) for tensor in read)


class Merging(FolderCheckpoint):
    """A checkpoint that makes a matrix of a stack as a whole."""

    def reads_within(self, name: str) -> bool:
        return False


def test_no_parts_where_each_would_cost_a_whole_matrix(folder: Path) -> None:
    with (
        FolderCheckpoint(folder, source="model") as plain,
        Merging(folder, source="model") as merging,
    ):
        parts = list(chunks_of([(plain, "stack")], nbytes=16))
        assert len(parts) == 24 and all(part.within is not None for part in parts)
        whole = list(chunks_of([(plain, "stack"), (merging, "stack")], nbytes=16))
        assert [(each.start, each.stop, each.within) for each in whole] == [
            (0, 1, None),
            (1, 2, None),
            (2, 3, None),
        ]
