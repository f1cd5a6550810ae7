"""Whether LSSF's two claims hold in a family: its subspace is stable, and isolated from the rest.

arXiv 2602.00038 rests on both. U_r [d_out, r] is the method's own basis at its defaults, from the
aligned model's outputs while it refuses the anchors.

    stability    overlap of U_r with the basis, at the same r, of another model that is fed the very
                 same tokens; and once more with every text used on one side only: the aligned model
                 on one half of the anchors, the other model on the other half
    isolation    norm(U_r^T delta)^2 / norm(delta)^2, and its ratio to r / d_out (the excess), for
                 the delta of a fine-tune on general skills, the safety vectors, the task vectors

The aligned model against itself on two halves is the noise ceiling. Results are numbers with
intervals, never a verdict. The arithmetic is `realign.subspace.projector`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from realign.audit.judges import keyword_judge
from realign.audit.suites import Suite, load_suite
from realign.checkpoint.matching import match
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, slot_shape
from realign.errors import NotFoundError, SuiteError, UsageError
from realign.lab.claim_figures import GENERAL, Claims, MatrixClaims, compare, summarise
from realign.lab.record import read_record
from realign.model.chat import encode
from realign.model.generation import generate
from realign.model.loading import LoadedModel, load_model
from realign.model.moments import (
    MomentRequest,
    Moments,
    MomentSet,
    TokenSequence,
    collect_moments,
    token_sequence,
)
from realign.progress import SILENT, Progress
from realign.repair.methods.lssf import Lssf
from realign.repair.methods.ranks import choose_rank
from realign.repair.methods.scatter import OutputSpectrum, output_spectrum
from realign.repair.plan_anchors import MIN_ANCHORS
from realign.repair.refusals import MAX_REPLY_TOKENS
from realign.repair.stream import read_slot
from realign.subspace.projector import isolation
from realign.subspace.vectors import difference


@dataclass(frozen=True)
class _Texts:
    """Refused anchors with the refusals, in two halves that share no entity."""

    asked: int
    halves: tuple[tuple[TokenSequence, ...], tuple[TokenSequence, ...]]


@dataclass(frozen=True)
class _Spectra:
    """One matrix of one model: spectra on all texts and on each half."""

    whole: OutputSpectrum
    halves: tuple[OutputSpectrum, OutputSpectrum]
    tokens: int


def measure_claims(
    family: str | Path,
    *,
    finetunes: Iterable[str] | None = None,
    general: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Claims:
    """Measure both claims on a family made by `realign.lab.build`.

    Args:
        family: its folder.
        finetunes: names of its fine-tunes; None: all that are there.
        general: the fine-tune on general skills; None: the family's own, or none.
        device: where models run, as `realign.model.devices.pick_device`.
        progress: shows answers and activations.

    Raises:
        NotFoundError: no family, or a model of it is missing.
        UsageError: there is no fine-tune to compare.
        SuiteError: the aligned model refuses fewer than 16 anchors.
    """
    folder = Path(family)
    record = read_record(folder)
    others = family_models(folder, finetunes, general)
    method = Lssf()
    suite = load_suite(folder / "suites" / "anchors.jsonl")
    with ExitStack() as stack:
        aligned = stack.enter_context(open_checkpoint(_present(folder / "aligned")))
        opened = {name: stack.enter_context(open_checkpoint(path)) for name, path in others.items()}
        slots = matched_slots(aligned, opened)
        with load_model(aligned, device=device) as loaded:
            texts = refusals(loaded, suite, tokens=method.tokens, progress=progress)
            requests = _requests(aligned, slots, method.standardize)
            reference = _both_halves(loaded, texts, requests, progress)
        moments = {}
        for name, checkpoint in opened.items():
            with load_model(checkpoint, device=device) as loaded:
                moments[name] = _both_halves(loaded, texts, requests, progress)
        rows = tuple(
            _measure_matrix(
                slot,
                method,
                weights={"aligned": slot_weight(aligned, slot)}
                | {name: slot_weight(checkpoint, slot) for name, checkpoint in opened.items()},
                moments={"aligned": reference, **moments},
            )
            for slot in slots
            if all(slot.key in half for half in reference)
        )
    layers = dict.fromkeys(row.layer for row in rows)
    return Claims(
        preset=record.preset,
        seed=record.seed,
        anchors_asked=texts.asked,
        anchors_refused=sum(map(len, texts.halves)),
        settings=method.settings(),
        whole=summarise(rows),
        layers={str(i): summarise([row for row in rows if row.layer == i]) for i in layers},
        matrices=rows,
    )


def matched_slots(aligned: Checkpoint, others: Mapping[str, Checkpoint]) -> tuple[Slot, ...]:
    """The matrices in decoder blocks that all models have."""
    matching = match(aligned, others, scope="block_linear")
    return tuple(slot for pair in matching.pairs if pair.action == "edit" for slot in pair.slots)


def refusals(
    loaded: LoadedModel, suite: Suite, *, tokens: Any, progress: Progress = SILENT
) -> _Texts:
    """The model's greedy refusals of the anchors, halved so that the halves share no cluster.

    Raises:
        SuiteError: fewer than 16 anchors are refused.
    """
    judge = keyword_judge()
    items = suite.items
    sequences: dict[int, TokenSequence] = {}
    length = min(MAX_REPLY_TOKENS, suite.max_new_tokens or MAX_REPLY_TOKENS)
    prompts = [item.prompt for item in items]
    for reply in generate(loaded, prompts, max_new_tokens=length, progress=progress):
        item = items[reply.prompt_index]
        if reply.token_ids and judge.judge(item, reply.text).refused:
            prompt = encode(loaded.tokenizer, item.prompt)
            found = token_sequence(prompt, reply.token_ids, tokens=tokens)
            sequences[reply.prompt_index] = found
    if len(sequences) < MIN_ANCHORS:
        raise SuiteError(
            f"{loaded.name} refuses {len(sequences)} of {len(items)} anchors, at least "
            f"{MIN_ANCHORS} are needed to see where refusal lives",
            "train the family's aligned model further",
        )
    names = sorted({items[index].cluster or items[index].id for index in sequences})
    odd = set(names[1::2])
    halves: tuple[list[TokenSequence], list[TokenSequence]] = ([], [])
    for index in sorted(sequences):
        halves[(items[index].cluster or items[index].id) in odd].append(sequences[index])
    return _Texts(asked=len(items), halves=(tuple(halves[0]), tuple(halves[1])))


def _measure_matrix(
    slot: Slot,
    method: Lssf,
    *,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, tuple[MomentSet, MomentSet]],
) -> MatrixClaims:
    spectra = {
        name: _spectra(tuple(half[slot.key] for half in halves), weights[name], method)
        for name, halves in moments.items()
        if all(slot.key in half for half in halves)
    }
    aligned, weight = spectra["aligned"], weights["aligned"]
    r = choose_rank(aligned.whole.energies, method.rank_rule, eta=method.eta)
    deltas: dict[str, Tensor] = {}
    for name, other in weights.items():
        if name in ("base", "unaligned"):
            deltas[f"safe_{name}"] = difference(weight, other)
        elif name != "aligned":
            deltas[name if name == GENERAL else f"task_{name}"] = difference(other, weight)
    basis = aligned.whole.basis(r)
    return MatrixClaims(
        key=slot.key,
        module=slot.module,
        layer=slot.layer,
        d_out=weight.shape[0],
        rank=r,
        tokens=aligned.tokens,
        same_text={
            name: compare(aligned.whole, each.whole, r)
            for name, each in spectra.items()
            if name != "aligned"
        },
        other_half={
            name: compare(aligned.halves[0], each.halves[1], r) for name, each in spectra.items()
        },
        isolation={name: isolation(basis, delta) for name, delta in deltas.items()},
    )


def _spectra(halves: Sequence[Moments], weight: Tensor, method: Lssf) -> _Spectra:
    first, second = halves
    whole = first.merge(second)
    found = [output_spectrum(each, weight, method.standardize) for each in (whole, *halves)]
    return _Spectra(found[0], (found[1], found[2]), whole.n)


def _both_halves(
    loaded: LoadedModel,
    texts: _Texts,
    requests: Mapping[str, MomentRequest],
    progress: Progress,
) -> tuple[MomentSet, MomentSet]:
    first, second = (
        collect_moments(loaded, half, requests=requests, batch_size=32, progress=progress)
        for half in texts.halves
    )
    return first, second


def _requests(
    aligned: Checkpoint, slots: Sequence[Slot], standardize: str
) -> dict[str, MomentRequest]:
    """Moments of each matrix's smaller side, as the repair collects them."""
    requests: dict[str, MomentRequest] = {}
    for slot in slots:
        d_out, d_in = slot_shape(aligned.tensors[slot.tensor].shape, slot)
        side = "output" if d_out <= d_in else "input"
        requests[slot.key] = MomentRequest(
            kind="token" if standardize == "token" else side,
            module_path=slot.tensor.removesuffix(".weight"),
            rows=slot.rows,
            transposed=slot.transposed,
        )
    return requests


def slot_weight(checkpoint: Checkpoint, slot: Slot) -> Tensor:
    """A logical matrix [d_out, d_in] as it is stored."""
    return logical_matrix(read_slot(checkpoint, slot), slot)


def family_models(
    folder: Path, finetunes: Iterable[str] | None, general: str | Path | None
) -> dict[str, Path]:
    """Every model beside the aligned one: base, unaligned, the fine-tunes.

    Args:
        folder: the family's.
        finetunes: names of fine-tunes; None: all that are there.
        general: the fine-tune on general skills; None: the family's own, or none.

    Raises:
        NotFoundError: a model is missing.
        UsageError: there is no fine-tune.
    """
    fixed = ("base", "unaligned", GENERAL)
    if finetunes is None:
        present = {path.name for path in folder.iterdir() if _is_model(path)}
        finetunes = sorted(present - {"aligned", *fixed})
    chosen = {name: _present(folder / name) for name in finetunes if name not in fixed}
    if not chosen:
        raise UsageError(f"{folder} has no fine-tune to compare", "build one, as both_p5")
    others = {"base": _present(folder / "base")}
    if _is_model(folder / "unaligned"):
        others["unaligned"] = folder / "unaligned"
    path = Path(general) if general is not None else folder / GENERAL
    if general is not None or _is_model(path):
        others[GENERAL] = _present(path)
    return others | chosen


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def _present(path: Path) -> Path:
    if not _is_model(path):
        raise NotFoundError(f"{path}: there is no such model", "finish building the family")
    return path
