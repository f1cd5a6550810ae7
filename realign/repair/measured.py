"""Statistics of a run's models on texts: measured once, kept, and found again by other methods.

Everything lies in the cache under a hash of what it depends on: the model by its files, the texts
by their tokens, the options, the versions. Files name matrices by their place in the model that
ran, so that methods which edit other matrices, or fine-tunes in another layout, share them; a
diagonal is served from a full set. Here: asking, keeping and finding. Not here: the passes
(`realign.model.moments`, `gradients`), where texts come from (`rendered`, `refusals`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from realign.audit.canonical import sha256_json
from realign.checkpoint.layouts import locate
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, slot_shape
from realign.errors import CheckpointError, ModelError
from realign.model.chat import EncodedReply, encode
from realign.model.gradients import collect_gradients
from realign.model.growing_file import GrowingFile
from realign.model.loading import LoadedModel
from realign.model.moments import (
    MomentRequest,
    Moments,
    Tokens,
    TokenSequence,
    collect_moments,
    token_sequence,
)
from realign.model.moments_file import MomentsWriter, StoredMoments
from realign.model.slot_views import SlotViews
from realign.progress import SILENT, Progress
from realign.repair.plan import Plan
from realign.repair.preparation import GradientKind, Statistics
from realign.repair.refusals import Refusals

_SCHEMA = "realign/gradients/1"


@dataclass(frozen=True)
class RunnableModel:
    """One model of a run, to be loaded only if something has to be measured."""

    shown: Checkpoint
    """In the fine-tune's layout."""
    about: Mapping[str, str]
    """What anything depends on that it does: weights, versions, device."""
    load: Callable[[bool], AbstractContextManager[LoadedModel]]
    """Loads it; True: with its adapter merged."""


@dataclass(frozen=True)
class Measurements:
    """The statistics of one run's matrices."""

    plan: Plan
    finetuned: Checkpoint
    cache: Path
    progress: Progress = SILENT

    def anchor_moments(
        self, model: RunnableModel, refusals: Refusals, *, standardize: str, tokens: Tokens
    ) -> Statistics:
        """Moments on the anchors that the model refuses, of the smaller side of every matrix.

        Raises:
            SuiteError: fewer than 16 anchors are refused.
            ModelError: the model cannot be run.
        """
        asked = moment_requests(
            self.plan, self.finetuned, running=model.shown, standardize=standardize
        )
        names = {key: _key_there(locate(model.shown, each)) for key, each in self._slots().items()}
        requests = {names[key]: request for key, request in asked.items()}
        about = refusals.about(model.about) | {"tokens": tokens, "standardize": standardize}
        stored = self._found_moments("moments", about, requests)
        if stored is None:
            path = self._path("moments", about, sorted(requests))
            with model.load(False) as loaded:
                kept = refusals.kept(loaded, model.about)
                sequences = [
                    token_sequence(
                        encode(loaded.tokenizer, reply.prompt), reply.token_ids, tokens=tokens
                    )
                    for reply in kept
                ]
                counts = {
                    "anchors_refused": str(len(kept)),
                    "anchors_asked": str(len(refusals.suite.items)),
                }
                self._measure(loaded, sequences, requests, path=path, about=about | counts)
            stored = StoredMoments(path)
        found = _Renamed(stored, {k: n for k, n in names.items() if n in stored}, False)
        return Statistics(found, about, disposable=True)

    def input_moments(
        self,
        model: RunnableModel,
        texts: Sequence[EncodedReply],
        *,
        tokens: Tokens,
        diagonal: bool,
    ) -> Statistics:
        """Moments of what every matrix is fed.

        Raises:
            ModelError: the model cannot be run.
        """
        names: dict[str, str] = {}
        requests: dict[str, MomentRequest] = {}
        for key, slot in self._slots().items():
            request = _input_request(locate(model.shown, slot))
            names[key] = f"{request.module_path}[{request.expert}]"
            requests[names[key]] = request
        about = {**model.about, **_about_texts(texts), "tokens": tokens, "moments": "input"}
        stored = None
        for kind in ("diagonal", "inputs") if diagonal else ("inputs",):
            stored = stored or self._found_moments(kind, about, requests)
        if stored is None:
            path = self._path("diagonal" if diagonal else "inputs", about, sorted(requests))
            sequences = [
                token_sequence(each.prompt_ids, each.reply_ids, tokens=tokens) for each in texts
            ]
            with model.load(False) as loaded:
                self._measure(
                    loaded, sequences, requests, path=path, about=about, diagonal=diagonal
                )
            stored = StoredMoments(path)
        found = _Renamed(stored, {k: n for k, n in names.items() if n in stored}, diagonal)
        return Statistics(found, about, disposable=True)

    def gradients(
        self, model: RunnableModel, texts: Sequence[EncodedReply], *, kind: GradientKind
    ) -> Mapping[str, Tensor]:
        """A gradient statistic of every matrix, read from the file one by one.

        Raises:
            ModelError: the model cannot be run, or holds a matrix in a form of its own.
        """
        places = {key: locate(model.shown, slot) for key, slot in self._slots().items()}
        names = {key: _name(place) for key, place in places.items()}
        about = {**model.about, **_about_texts(texts), "gradients": kind}
        for path in self._candidates(f"gradients-{kind}", about):
            stored = self._stored_gradients(path, about, names.values())
            if stored is not None:
                return _StoredTensors(path, names)
        path = self._path(f"gradients-{kind}", about, sorted(names.values()))
        shapes = {names[key]: self._shape(slot) for key, slot in self._slots().items()}
        with model.load(True) as loaded:
            views = SlotViews(
                loaded.model, {names[key]: each for key, each in places.items()}, shapes=shapes
            )
            with GrowingFile(path) as file:
                collect_gradients(
                    loaded,
                    texts,
                    views=views,
                    keys=list(shapes),
                    kind=kind,
                    sink=file,
                    progress=self.progress,
                )
                file.finish({"schema": _SCHEMA, "about": json.dumps(about, sort_keys=True)})
        return _StoredTensors(path, names)

    def _slots(self) -> dict[str, Slot]:
        return {slot.key: slot for pair in self.plan.edits for slot in pair.slots}

    def _shape(self, slot: Slot) -> tuple[int, int]:
        return slot_shape(self.finetuned.tensors[slot.tensor].shape, slot)

    def _measure(
        self,
        loaded: LoadedModel,
        sequences: Sequence[TokenSequence],
        requests: Mapping[str, MomentRequest],
        *,
        path: Path,
        about: Mapping[str, str],
        diagonal: bool = False,
    ) -> None:
        with MomentsWriter(path, about=about) as writer:
            found = collect_moments(
                loaded,
                sequences,
                requests=requests,
                diagonal=diagonal,
                sink=writer,
                progress=self.progress,
            )
            if not set(requests) - set(found.missing):
                raise ModelError(
                    f"no activations were measured in {loaded.name}: "
                    f"{next(iter(found.missing.values()))}",
                    "use a method that needs no activations (replace, delta_svd, resta, wise_ft)",
                )
            writer.finish(found.missing)

    def _path(self, kind: str, about: Mapping[str, str], wanted: object) -> Path:
        whole = f"{sha256_json(dict(about))[:32]}-{sha256_json(wanted)[:8]}"
        return self.cache / f"{kind}-{whole}.safetensors"

    def _candidates(self, kind: str, about: Mapping[str, str]) -> list[Path]:
        return sorted(self.cache.glob(f"{kind}-{sha256_json(dict(about))[:32]}-*.safetensors"))

    def _found_moments(
        self, kind: str, about: Mapping[str, str], requests: Mapping[str, MomentRequest]
    ) -> StoredMoments | None:
        for path in self._candidates(kind, about):
            stored = self._stored_moments(path, about, requests)
            if stored is not None:
                return stored
        return None

    def _stored_moments(
        self, path: Path, about: Mapping[str, str], requests: Mapping[str, MomentRequest]
    ) -> StoredMoments | None:
        """The moments in a file, if all that is asked for is there and can be trusted."""
        try:
            stored = StoredMoments(path)
        except CheckpointError as error:
            self.progress.note(f"measured again: {error.message}")
            return None
        if not about.items() <= stored.about.items():
            self.progress.note(f"measured again: {path} belongs to another run")
            return None
        if not set(requests) <= set(stored) | set(stored.missing):
            return None  # of other matrices
        self.progress.note(f"activation statistics from {path}")
        return stored

    def _stored_gradients(
        self, path: Path, about: Mapping[str, str], names: Iterable[str]
    ) -> Path | None:
        try:
            with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                metadata: dict[str, str] = file.metadata() or {}
                there: set[str] = set(file.keys())
            if metadata.get("schema") != _SCHEMA or json.loads(metadata["about"]) != dict(about):
                raise ValueError("it belongs to another run")
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            self.progress.note(f"measured again: {path} cannot be used ({error})")
            return None
        if not set(names) <= there:
            return None
        self.progress.note(f"gradient statistics from {path}")
        return path


class _Renamed(Mapping[str, Moments]):
    """Stored moments by the keys of the matrices that they belong to."""

    def __init__(self, stored: StoredMoments, names: Mapping[str, str], diagonal: bool) -> None:
        self._stored, self._names, self._diagonal = stored, names, diagonal

    def __getitem__(self, key: str) -> Moments:
        found = self._stored[self._names[key]]
        if self._diagonal and found.s2.dim() == 2:
            found = replace(found, s2=found.diagonal.clone())
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _StoredTensors(Mapping[str, Tensor]):
    """Tensors in a file, read one at a time."""

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        self._path, self._names = path, names

    def __getitem__(self, key: str) -> Tensor:
        name = self._names[key]
        with safe_open(self._path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            tensor: Tensor = file.get_tensor(name).clone()  # a view would keep the pages mapped
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def moment_requests(
    plan: Plan, finetuned: Checkpoint, *, running: Checkpoint, standardize: str
) -> dict[str, MomentRequest]:
    """What to collect for every matrix of the plan: the smaller side's moments.

    Modules are those of the model that runs, which may be stored in another layout.
    """
    requests: dict[str, MomentRequest] = {}
    for pair in plan.edits:
        for slot in pair.slots:
            shape = finetuned.tensors[slot.tensor].shape
            d_out, d_in = slot_shape(shape, slot)
            kind = "output" if d_out <= d_in else "input"
            place = locate(running, slot)
            requests[slot.key] = MomentRequest(
                kind="token" if standardize == "token" else kind,
                module_path=place.tensor.removesuffix(".weight"),
                rows=place.rows,
                transposed=place.transposed,
                expert=expert_of(place),
            )
    return requests


def expert_of(place: Slot) -> int | None:
    """Index of the expert that a logical matrix belongs to, where experts are stacked."""
    if place.span is not None:
        return place.span[0] // (place.span[1] - place.span[0])
    return place.expert


def _input_request(place: Slot) -> MomentRequest:
    return MomentRequest(
        kind="input",
        module_path=place.tensor.removesuffix(".weight"),
        transposed=place.transposed,
        expert=expert_of(place),
    )


def _key_there(place: Slot) -> str:
    """The key of a logical matrix in the checkpoint in which it lies."""
    _, bracket, part = place.key.partition("[")
    return f"{place.tensor}{bracket}{part}"


def _name(place: Slot) -> str:
    """Names a logical matrix by its place in a stored checkpoint."""
    parts = (("expert", place.expert), ("span", place.span), ("rows", place.rows))
    return place.tensor + "".join(f"[{what} {at}]" for what, at in parts if at is not None)


def _about_texts(texts: Sequence[EncodedReply]) -> dict[str, str]:
    return {
        "texts": sha256_json([[list(each.ids), each.start] for each in texts]),
        "examples": str(len(texts)),
    }
