"""Decompositions that several repairs share: worked out once, kept in a folder until the last one.

Fine-tunes of one family have the same safety vectors, and a method asks for the same few singular
vectors of each. A matrix is known by the hash of its entries: a hit is the same matrix, whatever
its name. Kept are the energies and the vectors that were asked for, never the whole reduction.
Here: keeping them. Not here: decomposing (`realign.subspace.spectrum`), who shares (`several`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from realign.errors import OutputError
from realign.subspace.eigen import Eigenpairs
from realign.subspace.spectrum import Decomposition, decompose, decompose_batch


class Decompositions:
    """Decomposes every matrix once; safe to call from several threads."""

    def __init__(self, folder: Path) -> None:
        """Start with what a folder holds.

        Args:
            folder: exists; belongs to this object alone.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self.computed = 0
        """Matrices that were decomposed, and not found."""

    def decompose(self, matrix: Tensor) -> Decomposition:
        """As `realign.subspace.spectrum.decompose`, from what is kept where that is enough."""
        return self._kept(matrix, lambda: decompose(matrix).pairs)

    def decompose_batch(self, matrices: Tensor) -> list[Decomposition]:
        """As `realign.subspace.spectrum.decompose_batch`; what is not known is done in one call."""
        names = [_digest(matrix) for matrix in matrices]
        new = [number for number, name in enumerate(names) if not self._path(name).exists()]
        done = dict(zip(new, decompose_batch(matrices[new]), strict=True)) if new else {}
        found: list[Decomposition] = []
        for number, matrix in enumerate(matrices):
            known = done.get(number)
            make = (lambda one=matrix: decompose(one).pairs) if known is None else None
            pairs = _Kept(self, names[number], matrix, make or (lambda got=known: _pairs(got)))
            found.append(Decomposition(matrix=matrix, pairs=pairs))
        return found

    def _kept(self, matrix: Tensor, make: Callable[[], Eigenpairs]) -> Decomposition:
        return Decomposition(matrix=matrix, pairs=_Kept(self, _digest(matrix), matrix, make))

    def read(self, name: str, device: torch.device) -> Tensor | None:
        """A tensor that is kept; None where there is none that can be read."""
        try:
            stored = load_file(self._path(name), device=str(device))
        except (OSError, SafetensorError):
            return None
        return stored["rows"] if "rows" in stored else stored["columns"].T

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor, and the way round in which it lies: products depend on it in the last bit.

        Raises:
            OutputError: the disk is full.
        """
        path = self._path(name)
        by_columns = tensor.dim() == 2 and tensor.stride(0) == 1
        label, laid = ("columns", tensor.T) if by_columns else ("rows", tensor)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            save_file({label: laid.cpu().contiguous()}, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} cannot be written: {error}", "is the disk full?") from error

    def count(self) -> None:
        """Note that a matrix was decomposed."""
        with self._lock:
            self.computed += 1

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


class _Kept(Eigenpairs):
    """Eigenpairs that are decomposed only where something is asked for that is not kept."""

    def __init__(
        self, store: Decompositions, name: str, matrix: Tensor, make: Callable[[], Eigenpairs]
    ) -> None:
        self._store, self._name, self._make = store, name, make
        self._device = matrix.device
        self._made: Eigenpairs | None = None

    @property
    def values(self) -> Tensor:
        """See `Eigenpairs.values`."""
        return self._found(self._name, lambda pairs: pairs.values)

    def top(self, k: int) -> Tensor:
        """See `Eigenpairs.top`."""
        return self._found(f"{self._name}-{k}", lambda pairs: pairs.top(k))

    def _found(self, name: str, ask: Callable[[Eigenpairs], Tensor]) -> Tensor:
        if self._made is None:
            kept = self._store.read(name, self._device)
            if kept is not None:
                return kept
            self._made = self._make()
            self._store.count()
        asked = ask(self._made)
        self._store.write(name, asked)
        return asked


def _pairs(decomposition: Decomposition | None) -> Eigenpairs:
    assert decomposition is not None
    return decomposition.pairs


def _digest(matrix: Tensor) -> str:
    """One hash of shape, type and entries."""
    laid = matrix.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tuple(laid.shape)} {laid.dtype} ".encode())
    entries: Any = laid.reshape(-1).view(torch.uint8).numpy()
    found.update(entries)
    return found.hexdigest()
