"""The subspace file: what alignment wrote, decomposed once per family and read again by others.

For every linear layer of the decoder blocks it holds the leading singular triples of
a = W_aligned - W_base, in float32, and in the header's metadata where they come from. Layout:
tensors "<key>.U" [d_out, k], "<key>.S" [k], "<key>.V" [d_in, k]; metadata `schema`, `rank_rule`,
`aligned` and `base` (JSON: source, commit, content_digest) and `matrices` (JSON: one row each).

Here: the format and reading it. Not here: computing and writing it, which the room of repairs does,
and what is measured against it (`family_scan`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realign.checkpoint.headers import Header, read_header
from realign.checkpoint.pread import TensorFiles
from realign.errors import CheckpointError, HeaderError
from realign.subspace.spectrum import Triplets

SCHEMA = "realign/subspace/1"


@dataclass(frozen=True, kw_only=True)
class SubspaceRow:
    """What the spectrum of one matrix of the alignment vector looks like."""

    key: str
    tensor: str
    module: str
    layer: int | None
    shape: tuple[int, int]
    """[d_out, d_in]."""
    norm: float
    """norm(a), Frobenius."""
    relative_norm: float
    """norm(a) / norm(W_aligned)."""
    entropy_rank: int
    """Rule (7) of arXiv 2602.00038 at `eta`, whatever rule decided what is kept."""
    facts: Mapping[str, float | int | str | None] = field(default_factory=dict[str, Any])
    """As of an edit: `rank` (kept), `entropy`, `effective_rank`, `stable_rank`, `kept_energy`."""


@dataclass(frozen=True)
class Family:
    """Which checkpoint a subspace file was made from."""

    source: str
    commit: str | None
    content_digest: str

    @property
    def address(self) -> str:
        """Where it can be opened again, at the same commit."""
        if self.commit is None:
            return self.source
        return f"{self.source.partition('@')[0]}@{self.commit}"


class SubspaceFile:
    """A subspace file opened for reading, one matrix at a time."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self.path = header.file
        metadata = header.metadata
        self.rank_rule = metadata["rank_rule"]
        self.aligned = Family(**json.loads(metadata["aligned"]))
        self.base = Family(**json.loads(metadata["base"]))
        rows: list[dict[str, Any]] = json.loads(metadata["matrices"])
        self.rows = {row["key"]: _row_from(row) for row in rows}
        """By the key of the matrix, in the order of the file."""
        self.check()

    def check(self) -> None:
        """Raise ValueError where a matrix lacks its factors or they have another shape."""
        for key, row in self.rows.items():
            shapes = [self._header.tensors[f"{key}.{part}"].shape for part in "USV"]
            d_out, d_in = row.shape
            (k,) = shapes[1]
            if shapes != [(d_out, k), (k,), (d_in, k)]:
                raise ValueError(f"the factors of {key} have shapes {shapes}")

    def triplets(self, key: str) -> Triplets:
        """U_k [d_out, k], S_k [k] and V_k [d_in, k] of one matrix, float32."""
        files = TensorFiles()
        try:
            u, s, v = (files.read(self._header.tensors[f"{key}.{part}"]) for part in "USV")
        finally:
            files.close()
        return Triplets(u=u, s=s, v=v)


def read_subspace(path: str | Path) -> SubspaceFile:
    """Open a subspace file.

    Raises:
        CheckpointError: it is missing, damaged, or of another schema.
    """
    try:
        header = read_header(Path(path))
        if header.metadata.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{path} is not a subspace file of schema {SCHEMA}",
                "make one with: realign subspace ALIGNED --base BASE -o FILE",
            )
        return SubspaceFile(header)
    except HeaderError as error:
        raise CheckpointError(error.message, _AGAIN) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a subspace file: {error}", _AGAIN
        ) from error


_AGAIN = "make it again with: realign subspace ALIGNED --base BASE -o FILE"


def _row_from(value: Mapping[str, Any]) -> SubspaceRow:
    d_out, d_in = value["shape"]
    fields: dict[str, Any] = {**value, "shape": (d_out, d_in)}
    return SubspaceRow(**fields)
