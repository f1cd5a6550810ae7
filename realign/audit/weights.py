"""Weight-space drift of checkpoints, streamed matrix by matrix.

A screening signal, never a safety verdict: in a study of a hundred models the distance of weights
did not predict safety drift (2604.24902). Nothing here can pass or fail a gate, and every output
that shows these numbers says that they are not validated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from realign.audit.schema import Role, WeightGroup, WeightRow, Weights
from realign.checkpoint.headers import FLOATS
from realign.checkpoint.layouts import conform
from realign.checkpoint.names import TensorRole, classify
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, slots_of, stored_rows
from realign.errors import NonFiniteError
from realign.progress import SILENT, Progress
from realign.subspace.drift import (
    DriftMetrics,
    MatrixDrift,
    distance_terms,
    drift_table,
    matrix_drift,
)
from realign.subspace.eigen import decomposing

NORM = "norm"
"""The row under which norms and biases stand."""
NOT_VALIDATED = "weight screening: NOT validated"
MOST_UNMATCHED = 0.01
"""Share of parameters that may be unmatched before the global values are withheld."""
_VOCABULARY = {"embedding": "embed", "head": "head"}


@dataclass(frozen=True)
class _Trio:
    reference: Checkpoint
    subject: Checkpoint
    base: Checkpoint | None


def measure_weights(
    *,
    reference: Checkpoint,
    subjects: Mapping[Role, Checkpoint],
    base: Checkpoint | None = None,
    spectra: bool = True,
    progress: Progress = SILENT,
) -> Weights:
    """The drift of every subject from the reference, matched by tensor name, layouts apart.

    Args:
        reference: the aligned model.
        subjects: by role; at least one, usually the subject and the repaired model.
        base: its pretrained ancestor; without one, only the metrics of the task vector are there.
        spectra: also decompose the task vector (entropy, ranks, principal angles).
        progress: counts tensors.

    Returns:
        The section of the report. What does not match by name and shape is listed in it; where that
        is more than 1 % of the parameters, the global values are null with a reason.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; names it.
        CheckpointError: a decomposition does not converge; names the matrix.
    """
    assert subjects, "no model to compare with the reference"
    groups = tuple(
        _group(
            role,
            _Trio(
                conform(reference, subject),
                subject,
                None if base is None else conform(base, subject),
            ),
            spectra=spectra,
            progress=progress,
        )
        for role, subject in subjects.items()
    )
    first = groups[0]
    return Weights(
        status="not_validated",
        line=NOT_VALIDATED,
        global_={} if first.total is None else _numbers(first.total),
        global_reason=first.total_reason,
        per_module=first.per_module,
        per_layer=first.per_layer,
        unmatched=first.unmatched,
        skipped=first.skipped,
        groups=groups,
    )


def _group(role: Role, trio: _Trio, *, spectra: bool, progress: Progress) -> WeightGroup:
    rows: list[MatrixDrift] = []
    vocabulary: list[MatrixDrift] = []
    skipped: list[str] = []
    unmatched = sorted(set(trio.reference.tensors) - set(trio.subject.tensors))
    lost = sum(trio.reference.tensors[name].numel for name in unmatched)
    roles = classify(trio.subject)
    with progress.task(f"weights of {role}", total=len(roles), unit="tensors") as task:
        for each in roles.values():
            here = trio.subject.tensors[each.name]
            if not _matches(each, trio):
                unmatched.append(each.name)
                lost += here.numel
            elif each.kind in ("router", "buffer", "other"):
                skipped.append(f"{each.name}: {each.kind}")
            else:
                found = list(_drift_of(each, trio, spectra=spectra))
                if each.kind not in ("norm", "bias") and trio.base is not None:
                    lacking = _lacking(each, trio, trio.base)
                    skipped += [f"{each.name}: {lacking}"] if lacking else []
                _require_finite(found, role, trio)
                (vocabulary if each.kind in _VOCABULARY else rows).extend(found)
            task.advance()
    share = lost / max(1, sum(info.numel for info in trio.subject.tensors.values()))
    table = drift_table(rows)
    complete = share <= MOST_UNMATCHED and bool(rows)
    reason = f"{min(share, 1.0):.1%} of the parameters do not match by name and shape"
    return WeightGroup(
        role=role,
        total=_row("global", table.overall) if complete else None,
        total_reason=None if complete else reason if rows or share else "there are no matrices",
        per_module=(
            *(_row(name, metrics) for name, metrics in table.by_module.items()),
            *(_row(row.module, row.terms.metrics()) for row in vocabulary),
        ),
        per_layer=tuple(_row(str(layer), metrics) for layer, metrics in table.by_layer.items()),
        per_matrix=tuple(
            _row(row.key, row.terms.metrics()) for row in (*rows, *vocabulary) if row.module != NORM
        ),
        skipped=tuple(skipped),
        unmatched=tuple(sorted(unmatched)),
    )


def _matches(each: TensorRole, trio: _Trio) -> bool:
    """Whether the reference has the same tensor; vocabularies may differ in length."""
    here, there = trio.subject.tensors[each.name], trio.reference.tensors.get(each.name)
    if there is None or (here.dtype in FLOATS) != (there.dtype in FLOATS):
        return False
    first = 1 if each.kind in _VOCABULARY else 0
    return len(here.shape) == len(there.shape) and here.shape[first:] == there.shape[first:]


def _drift_of(each: TensorRole, trio: _Trio, *, spectra: bool) -> Iterator[MatrixDrift]:
    """The rows of one tensor: its matrices, or the plain distance of a norm or bias."""
    name = each.name
    if each.kind in ("norm", "bias"):
        # Norms and biases have no singular vectors: they count in the distance alone.
        terms = distance_terms(reference=trio.reference.read(name), subject=trio.subject.read(name))
        yield MatrixDrift(key=name, module=NORM, layer=each.layer, terms=terms)
        return
    shape = trio.reference.tensors[name].shape
    fits = trio.base is not None and not _lacking(each, trio, trio.base)
    if each.kind in _VOCABULARY:
        common = min(shape[0], trio.subject.tensors[name].shape[0])
        slots = (Slot(name, name, _VOCABULARY[each.kind], None, rows=(0, common)),)
    else:
        slots = slots_of(trio.subject, name)
    for slot in slots:
        with decomposing(slot.key):
            found = matrix_drift(
                key=slot.key,
                module=slot.module,
                layer=slot.layer,
                reference=_read(trio.reference, slot),
                subject=_read(trio.subject, slot),
                base=_read(trio.base, slot) if trio.base is not None and fits else None,
                spectra=spectra,
            )
        yield found


def _lacking(each: TensorRole, trio: _Trio, base: Checkpoint) -> str:
    """Why the base cannot give a tensor's alignment direction, or nothing if it can."""
    there, shape = base.tensors.get(each.name), trio.reference.tensors[each.name].shape
    if there is None:
        return "not in the base, compared with the reference alone"
    if each.kind in _VOCABULARY:
        common = min(shape[0], trio.subject.tensors[each.name].shape[0])
        fits = there.shape[0] >= common and there.shape[1:] == shape[1:]
    else:
        fits = there.shape == shape
    return "" if fits else "of another shape in the base, compared with the reference alone"


def _require_finite(rows: Sequence[MatrixDrift], role: Role, trio: _Trio) -> None:
    """Sums of squares are finite exactly where all entries are (and do not overflow)."""
    for row in rows:
        for value, whose in (
            (row.terms.reference, trio.reference),
            (row.terms.task, trio.subject),
        ):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{row.key} of {whose.source} holds NaN or infinity",
                    f"the {role} model is damaged; copy or train it again"
                    if whose is trio.subject
                    else "copy the reference again",
                )


def _read(checkpoint: Checkpoint, slot: Slot) -> Tensor:
    """One logical matrix [d_out, d_in] in its dtype on disk."""
    rows = stored_rows(slot, checkpoint.tensors[slot.tensor].shape)
    return logical_matrix(checkpoint.read(slot.tensor, rows), slot)


def _row(key: str, metrics: DriftMetrics) -> WeightRow:
    below = metrics.below_storage_precision
    return WeightRow(
        key=key,
        matrices=metrics.matrices,
        relative_distance=metrics.relative_distance,
        alignment_retained=metrics.alignment_retained,
        cosine=metrics.cosine,
        energy=metrics.subspace_share,
        energy_squared=metrics.subspace_energy,
        excess=metrics.excess,
        lox_ratio=metrics.lox_ratio,
        lox_published=metrics.lox_published,
        entropy=metrics.entropy,
        effective_rank=metrics.effective_rank,
        stable_rank=metrics.stable_rank,
        overlap=metrics.overlap,
        flags=("below_storage_precision",) if below else (),
    )


def _numbers(row: WeightRow) -> dict[str, float | None]:
    """The global values as the report's plain mapping."""
    plain = row.model_dump(exclude={"key", "matrices", "flags"})
    return dict(plain.items())
