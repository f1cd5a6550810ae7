"""Making a subspace file: the alignment vector of a family, decomposed matrix by matrix.

Here: computing and writing it. Not here: its format and reading it (`realign.audit.subspace_file`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign._version import __version__
from realign.audit.subspace_file import SCHEMA, Family, SubspaceFile, SubspaceRow, read_subspace
from realign.checkpoint.layouts import conform
from realign.checkpoint.manifest import content_digest
from realign.checkpoint.matching import match, same_weights
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.slots import Slot, logical_matrix
from realign.errors import NothingToDoError, OutputError, UsageError
from realign.model.devices import pick_device
from realign.progress import SILENT, Progress
from realign.repair.methods.ranks import choose_rank, spectrum_facts
from realign.repair.prefetch import Prefetch
from realign.repair.stream import read_slot
from realign.repair.verify import check_input
from realign.subspace.eigen import decomposing
from realign.subspace.entropy import entropy_rank
from realign.subspace.projector import fix_signs
from realign.subspace.spectrum import Triplets, decompose
from realign.subspace.vectors import difference, squared_norm

RANK_RULES = ("stable", "energy", "entropy")
DEFAULT_RANK = 32
DEFAULT_ETA = 0.85


@dataclass(frozen=True, kw_only=True)
class SubspaceRequest:
    """One subspace file, as a user words it."""

    aligned: str | Path
    base: str | Path
    output: str | Path
    rank: int | str = DEFAULT_RANK
    """Triples kept per matrix: a number, or `stable`, `energy` or `entropy` (at `eta`)."""
    eta: float = DEFAULT_ETA
    """Threshold of the rules `energy` and `entropy`, and of the entropy rank in the report."""
    device: str = "auto"
    offline: bool = False


def write_subspace(request: SubspaceRequest, *, progress: Progress = SILENT) -> SubspaceFile:
    """Decompose the alignment vector of a family and write the file.

    Raises:
        UsageError: the rank rule or its threshold is out of range.
        NothingToDoError: aligned and base hold the same weights.
        OutputError: the target exists or cannot be written.
        MismatchError, NonFiniteError: the checkpoints do not fit, or hold NaN or infinity.
    """
    _check(request)
    target = Path(request.output)
    if target.exists():
        raise OutputError(f"{target} exists already", "choose another -o, or remove it first")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target.parent} is not a folder", "make it first")
    device = pick_device(request.device)
    options: dict[str, Any] = {"offline": request.offline, "progress": progress}
    with (
        open_checkpoint(request.aligned, **options) as aligned,
        open_checkpoint(request.base, **options) as opened,
    ):
        base = conform(opened, aligned)
        if same_weights(aligned, base):
            raise NothingToDoError(
                f"{aligned.source} and {base.source} hold the same weights: "
                "alignment wrote nothing",
                "check --aligned and --base",
            )
        triplets: dict[str, Triplets] = {}
        rows: list[SubspaceRow] = []
        slots = [
            slot
            for pair in match(aligned, {"base": base}, scope="block_linear").pairs
            for slot in pair.slots
        ]
        with (
            progress.task("decomposing", total=len(slots), unit="matrices") as task,
            Prefetch(_matrices(slots, aligned, base)) as matrices,
        ):
            for slot, wa, w0 in matrices:
                with decomposing(slot.key):
                    row, found = _decompose(slot, wa.to(device), w0.to(device), request)
                rows.append(row)
                small = (value.to("cpu", torch.float32) for _, value in _parts(found))
                triplets[slot.key] = Triplets(*small)
                task.advance()
        save_subspace(
            target,
            rows,
            triplets,
            rank_rule=_rule_text(request),
            aligned=_family(aligned),
            base=_family(opened),
        )
    return read_subspace(target)


def save_subspace(
    target: Path,
    rows: Sequence[SubspaceRow],
    triplets: Mapping[str, Triplets],
    *,
    rank_rule: str,
    aligned: Family,
    base: Family,
) -> None:
    """Write a subspace file, all or nothing.

    Args:
        target: the file; it is replaced if it exists.
        rows: one for each matrix.
        triplets: by the keys of the rows; stored in float32.
        rank_rule: how the number of directions was chosen, in words.
        aligned: the reference that it belongs to.
        base: what alignment started from.

    Raises:
        OutputError: it cannot be written.
    """
    metadata = {
        "schema": SCHEMA,
        "rank_rule": rank_rule,
        "aligned": json.dumps(dataclasses.asdict(aligned), sort_keys=True),
        "base": json.dumps(dataclasses.asdict(base), sort_keys=True),
        "matrices": json.dumps([dataclasses.asdict(row) for row in rows], sort_keys=True),
        "realign": __version__,
    }
    tensors = {
        f"{row.key}.{part}": value.to(torch.float32).contiguous()
        for row in rows
        for part, value in _parts(triplets[row.key])
    }
    _save(target, tensors, metadata)


def _parts(triplets: Triplets) -> Iterator[tuple[str, Tensor]]:
    yield "U", triplets.u
    yield "S", triplets.s
    yield "V", triplets.v


def _check(request: SubspaceRequest) -> None:
    rank = request.rank
    if isinstance(rank, bool) or (isinstance(rank, int) and rank < 1):
        raise UsageError(f"rank is {rank}", "give a whole number of at least 1")
    if isinstance(rank, str) and rank not in RANK_RULES:
        raise UsageError(f"there is no rank rule {rank!r}", f"rules: {', '.join(RANK_RULES)}")
    if not 0.0 <= request.eta <= 1.0:
        raise UsageError(f"eta is {request.eta:g}", "give a number in [0, 1]")


def _matrices(
    slots: list[Slot], aligned: Checkpoint, base: Checkpoint
) -> Iterator[tuple[Slot, Tensor, Tensor]]:
    for slot in slots:
        pair: list[Tensor] = []
        for role, checkpoint in (("aligned", aligned), ("base", base)):
            stored = read_slot(checkpoint, slot)
            check_input(stored, name=slot.tensor, role=role, source=checkpoint.source)
            pair.append(logical_matrix(stored, slot))
        yield slot, pair[0], pair[1]


def _decompose(
    slot: Slot, wa: Tensor, w0: Tensor, request: SubspaceRequest
) -> tuple[SubspaceRow, Triplets]:
    delta = difference(wa, w0)
    decomposition = decompose(delta)
    energies = decomposition.energies
    k = choose_rank(energies, request.rank, eta=request.eta)
    triplets = decomposition.triplets(k)
    u, v = fix_signs(triplets.u, triplets.v) if k else (triplets.u, triplets.v)
    norm_sq, weight_sq = squared_norm(delta), squared_norm(wa)
    row = SubspaceRow(
        key=slot.key,
        tensor=slot.tensor,
        module=slot.module,
        layer=slot.layer,
        shape=(delta.shape[0], delta.shape[1]),
        norm=math.sqrt(norm_sq),
        relative_norm=math.sqrt(norm_sq / weight_sq) if weight_sq else 0.0,
        entropy_rank=entropy_rank(energies, request.eta) if norm_sq else 0,
        facts=spectrum_facts(energies, k) if norm_sq else {"rank": 0, "available_rank": 0},
    )
    return row, Triplets(u=u, s=triplets.s, v=v)


def _rule_text(request: SubspaceRequest) -> str:
    if request.rank in ("energy", "entropy"):
        return f"{request.rank} {request.eta:g}"
    return str(request.rank)


def _family(checkpoint: Checkpoint) -> Family:
    return Family(checkpoint.source, checkpoint.commit, content_digest(checkpoint.folder))


def _save(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, all or nothing, with its metadata in a fixed order.

    The reference library writes metadata in the order of a hash table: other bytes every time.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, tensor in tensors.items():
        span = [at, at + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}", "is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)
