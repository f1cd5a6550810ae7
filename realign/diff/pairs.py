"""Which tensor of A stands against which of B, told from headers alone.

Tensors pair by name. Where the output head of one side is tied to its embeddings and the other
side stores one, the head stands against the embeddings. Where the first dimension of an embedding
or head differs, the vocabulary was extended: the rows that both have are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.matching import check_architecture
from realign.checkpoint.names import TensorRole, find_embedding, find_head, is_tied, role_of
from realign.checkpoint.reader import Checkpoint
from realign.errors import MismatchError, UsageError

Status = Literal["identical", "changed", "dtype_differs", "shape_differs", "only_a", "only_b"]


@dataclass(frozen=True)
class Pair:
    """One tensor of A, of B, or of both."""

    role: TensorRole
    a: TensorInfo | None
    b: TensorInfo | None
    rows: int | None = None
    """So many leading rows are compared; None: everything."""

    @property
    def name(self) -> str:
        """The tensor's name, B's where A ties it."""
        return self.role.name

    @property
    def comparable(self) -> bool:
        """Whether there are entries to compare."""
        if self.a is None or self.b is None:
            return False
        return self.rows is not None or self.a.shape == self.b.shape

    def status(self, *, changed: int) -> Status:
        """What is to be said of the pair, once the entries that differ are counted."""
        if self.b is None:
            return "only_a"
        if self.a is None:
            return "only_b"
        if self.a.shape != self.b.shape:
            return "shape_differs"
        if self.a.dtype != self.b.dtype:
            return "dtype_differs"
        return "changed" if changed else "identical"


def pair_tensors(a: Checkpoint, b: Checkpoint, *, only: Sequence[str] = ()) -> tuple[Pair, ...]:
    """Pair the tensors of two checkpoints, in A's order, then what B alone has.

    Args:
        a: the first checkpoint.
        b: the second.
        only: patterns of names with * and ?; empty takes all.

    Raises:
        UsageError: no tensor has a name like `only`.
    """
    pairs: list[Pair] = []
    taken: set[str] = set()
    for name, info in a.tensors.items():
        there = b.tensors.get(name)
        if there is None:
            tied = _tied_head(name, stored=a, other=b)
            there = b.tensors[tied] if tied else None
        else:
            taken.add(name)
        pairs.append(_pair(role_of(info), info, there))
    for name, info in b.tensors.items():
        if name not in taken and name not in a.tensors:
            tied = _tied_head(name, stored=b, other=a)
            pairs.append(_pair(role_of(info), a.tensors[tied] if tied else None, info))
    chosen = [p for p in pairs if not only or any(fnmatchcase(p.name, each) for each in only)]
    if not chosen and only:
        raise UsageError(
            f"no tensor of {a.source} or {b.source} is named like {' or '.join(only)}",
            f"the first is {pairs[0].name}" if pairs else "",
        )
    return tuple(chosen)


def require_one_architecture(a: Checkpoint, b: Checkpoint) -> None:
    """Refuse checkpoints whose configs name different architectures or sizes.

    Raises:
        MismatchError: names the key and both values.
    """
    try:
        check_architecture(a, "other", b)
    except MismatchError as error:
        raise MismatchError(
            error.message, "only checkpoints of one architecture can be compared tensor by tensor"
        ) from None


def _tied_head(name: str, *, stored: Checkpoint, other: Checkpoint) -> str | None:
    """The embeddings of `other` if they are what `stored` keeps apart as its output head."""
    if name != find_head(stored.tensors) or not is_tied(other.config, other.tensors):
        return None
    return find_embedding(other.tensors)


def _pair(role: TensorRole, a: TensorInfo | None, b: TensorInfo | None) -> Pair:
    if a is None or b is None or a.shape == b.shape:
        return Pair(role, a, b)
    extended = role.kind in ("embedding", "head") and len(a.shape) == len(b.shape) > 0
    rows = min(a.shape[0], b.shape[0]) if extended and a.shape[1:] == b.shape[1:] else None
    return Pair(role, a, b, rows)
