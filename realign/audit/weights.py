"""Weight-space drift of checkpoints, streamed matrix by matrix.

A screening signal, never a safety verdict: in a study of a hundred models the distance of weights
did not predict safety drift (2604.24902). Nothing here can pass or fail a gate, and every output
that shows these numbers says that they are not validated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from realign.audit.schema import Role, WeightGroup, WeightRow, Weights
from realign.checkpoint.headers import FLOATS
from realign.checkpoint.matching import Slot, TensorPair, match
from realign.checkpoint.reader import Checkpoint
from realign.errors import MismatchError, NonFiniteError
from realign.progress import SILENT, Progress
from realign.subspace.drift import (
    DriftMetrics,
    MatrixDrift,
    distance_terms,
    drift_table,
    matrix_drift,
    merge,
)

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
) -> Weights | str:
    """The drift of every subject from the reference.

    Args:
        reference: the aligned model.
        subjects: by role; usually the subject and the repaired model.
        base: its pretrained ancestor; without one, only the metrics of the task vector are there.
        spectra: also decompose the task vector (entropy, ranks, principal angles).
        progress: counts matrices.

    Returns:
        The section of the report, or in words why there is none.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; names it.
    """
    groups: list[WeightGroup] = []
    for role, subject in subjects.items():
        try:
            groups.append(
                _group(
                    role,
                    _Trio(reference, subject, base),
                    spectra=spectra,
                    progress=progress,
                )
            )
        except MismatchError as error:
            return error.message
    if not groups:
        return "no model to compare with the reference"
    first = groups[0]
    total = first.total
    return Weights(
        status="not_validated",
        line=NOT_VALIDATED,
        global_={} if total is None else _numbers(total),
        per_module=first.per_module,
        per_layer=first.per_layer,
        unmatched=first.unmatched,
        skipped=first.skipped,
        groups=tuple(groups),
    )


def _group(role: Role, trio: _Trio, *, spectra: bool, progress: Progress) -> WeightGroup:
    others = {"aligned": trio.reference}
    if trio.base is not None:
        others["base"] = trio.base
    pairs = match(trio.subject, others, scope="matrices").pairs
    rows: list[MatrixDrift] = []
    vocabulary: list[MatrixDrift] = []
    skipped: list[str] = []
    matched = 0
    with progress.task(f"weights of {role}", total=len(pairs), unit="tensors") as task:
        for pair in pairs:
            found = list(_drift_of(pair, trio, spectra=spectra))
            _require_finite(found, role, trio)
            if found:
                matched += math.prod(trio.subject.tensors[pair.role.name].shape)
                (vocabulary if pair.role.kind in _VOCABULARY else rows).extend(found)
            else:
                skipped.append(f"{pair.role.name}: {pair.reason}")
            task.advance()
    names = {pair.role.name for pair in pairs}
    unmatched = sorted(
        (names - set(trio.reference.tensors)) | (set(trio.reference.tensors) - names)
    )
    parameters = sum(info.numel for info in trio.subject.tensors.values())
    lost = 1.0 - matched / parameters if parameters else 0.0
    table = drift_table(rows)
    complete = lost <= MOST_UNMATCHED and bool(rows)
    return WeightGroup(
        role=role,
        total=_row("global", table.overall) if complete else None,
        total_reason=None if complete else f"{lost:.1%} of the parameters are not matched",
        per_module=(
            *(_row(name, metrics) for name, metrics in table.by_module.items()),
            *(_row(row.module, row.terms.metrics()) for row in vocabulary),
        ),
        per_layer=tuple(_row(str(layer), metrics) for layer, metrics in table.by_layer.items()),
        per_matrix=tuple(
            _row(row.key, merge([row.terms]).metrics())
            for row in (*rows, *vocabulary)
            if row.module != "norm"
        ),
        skipped=tuple(skipped),
        unmatched=tuple(unmatched),
    )


def _drift_of(pair: TensorPair, trio: _Trio, *, spectra: bool) -> Iterator[MatrixDrift]:
    """The rows of one tensor: its matrices, or the plain distance of a norm or bias."""
    name, kind = pair.role.name, pair.role.kind
    if kind in _VOCABULARY and pair.action == "edit":
        common = pair.common_rows or trio.subject.tensors[name].shape[0]
        yield matrix_drift(
            key=name,
            module=_VOCABULARY[kind],
            layer=None,
            reference=trio.reference.read(name, (0, common)),
            subject=trio.subject.read(name, (0, common)),
            base=None if trio.base is None else trio.base.read(name, (0, common)),
            spectra=spectra,
        )
    elif pair.action == "edit":
        for slot in pair.slots:
            read = _reader(slot)
            yield matrix_drift(
                key=slot.key,
                module=slot.module,
                layer=slot.layer,
                reference=read(trio.reference),
                subject=read(trio.subject),
                base=None if trio.base is None else read(trio.base),
                spectra=spectra,
            )
    elif kind in ("norm", "bias"):
        there = trio.reference.tensors.get(name)
        here = trio.subject.tensors[name]
        if there is not None and there.shape == here.shape and there.dtype in FLOATS:
            # Norms and biases have no singular vectors: they count in the distance alone.
            terms = distance_terms(
                reference=trio.reference.read(name), subject=trio.subject.read(name)
            )
            yield MatrixDrift(key=name, module="norm", layer=pair.role.layer, terms=terms)


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


def _reader(slot: Slot) -> Callable[[Checkpoint], Tensor]:
    def read(checkpoint: Checkpoint) -> Tensor:
        stored = checkpoint.read(slot.tensor, slot.rows)
        return stored.T if slot.transposed else stored

    return read


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
