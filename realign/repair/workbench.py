"""What a method may ask of a running model: activation moments on anchors that the model refuses.

The model answers the anchors greedily; answers that the keyword judge does not take for refusals
are dropped; one teacher-forced pass over prompt and answer accumulates the moments. Both results
are kept in a cache under a hash of everything they depend on, and the model's memory is freed
before any tensor is edited. Not here: what a method makes of the moments.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from realign._version import __version__
from realign.audit.canonical import sha256_json
from realign.audit.judges import keyword_judge
from realign.audit.suites import Suite
from realign.checkpoint.layouts import locate, original
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, slot_shape
from realign.errors import CheckpointError, ModelError, OutputError, SuiteError, UsageError
from realign.model.chat import EncodedReply, encode
from realign.model.generation import generate
from realign.model.loading import LoadedModel, load_model
from realign.model.moments import (
    MomentRequest,
    MomentSet,
    Tokens,
    collect_moments,
    token_sequence,
)
from realign.model.moments_file import StoredMoments, save_moments
from realign.progress import SILENT, Progress
from realign.repair.cache import cache_folder
from realign.repair.edit import Layer
from realign.repair.kept_tensors import kept_tensors
from realign.repair.layers import read_layers
from realign.repair.plan import Plan
from realign.repair.plan_anchors import MIN_ANCHORS, load_anchors
from realign.repair.preparation import Data, GradientKind, Statistics
from realign.repair.record import versions
from realign.repair.rendered import Prompts, RenderedTexts
from realign.repair.request import Inputs, RepairRequest
from realign.repair.running import LiveModel, running_model
from realign.repair.texts import texts_of

MAX_REPLY_TOKENS = 128
"""An anchor's answer is cut here: a refusal has said what it says by then."""

CACHE_VERSION = 2
"""Raised when the same inputs would give other statistics."""


@dataclass(frozen=True)
class AnchorReply:
    """An anchor and what the model answered."""

    id: str
    prompt: str
    token_ids: tuple[int, ...]
    text: str
    refused: bool


class ModelWorkbench:
    """Runs the checkpoints of a plan on its anchors; implements `method.Workbench`."""

    def __init__(
        self, request: RepairRequest, plan: Plan, inputs: Inputs, *, progress: Progress = SILENT
    ) -> None:
        self._plan = plan
        self._inputs = inputs
        self._progress = progress
        self._anchors = request.anchors
        self._cache = cache_folder(request.cache_dir)
        self._texts = RenderedTexts(
            sources=texts_of(request),
            checkpoint=lambda role: original(inputs.all()[role]),
            about=lambda role: self._running_about(original(inputs.all()[role])),
            refusals=lambda: [
                (each.prompt, each.token_ids, each.text) for each in self.refusals("aligned")
            ],
            anchors=lambda: [item.prompt for item in self._suite.items],
            cache=self._cache,
            device=self.device,
            progress=progress,
        )

    @cached_property
    def _suite(self) -> Suite:
        return load_anchors(self._anchors)

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self._plan.seed

    @property
    def device(self) -> torch.device:
        """Where models run."""
        return torch.device(self._plan.device)

    @property
    def progress(self) -> Progress:
        """Shows what is being done."""
        return self._progress

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The matrices that are to be edited, by key."""
        return {slot.key: slot for pair in self._plan.edits for slot in pair.slots}

    def layers(self) -> Iterator[Layer]:
        """The matrices to edit, one after the other."""
        return (layer for _, layer in read_layers(self._plan, self._inputs))

    def input_moments(
        self,
        *,
        role: str,
        data: Data,
        tokens: str,
        diagonal: bool = False,
        limit: int | None = None,
    ) -> Statistics:
        """Moments of what every matrix is fed."""
        raise NotImplementedError

    def gradients(
        self, *, role: str, data: Data, kind: GradientKind, limit: int | None = None
    ) -> Mapping[str, Tensor]:
        """A gradient statistic of every matrix."""
        raise NotImplementedError

    def examples(self, data: Data, *, role: str) -> Sequence[EncodedReply]:
        """Texts as tokens."""
        return self._texts.examples(data, role=role)

    def pairs(self, *, role: str) -> Sequence[tuple[EncodedReply, EncodedReply]]:
        """Pairs of answers as tokens."""
        return self._texts.pairs(role=role)

    def prompts(self, data: Prompts, *, role: str) -> Sequence[tuple[int, ...]]:
        """Prompts alone as tokens, ready for the assistant to speak."""
        return self._texts.prompts(data, role=role)

    def running(self, role: str) -> AbstractContextManager[LiveModel]:
        """A model in memory."""
        shown, tensors = self._inputs.all()[role], self._inputs.finetuned.tensors
        slots = self.slots
        return running_model(
            original(shown),
            places={key: locate(shown, slot) for key, slot in slots.items()},
            shapes={
                key: slot_shape(tensors[slot.tensor].shape, slot) for key, slot in slots.items()
            },
            device=self.device,
        )

    def cached(
        self, name: str, about: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Tensors from the cache, or made."""
        models = {
            role: self._running_about(original(each)) for role, each in self._inputs.all().items()
        }
        everything = {
            "about": dict(about),
            "models": models,
            "texts": self._texts.identity(),
            "anchors": None if self._plan.anchors is None else self._suite.suite_hash,
            "seed": self.seed,
            "matrices": sorted(self.slots),
        }
        return kept_tensors(self._cache, name, about=everything, make=make, progress=self._progress)

    def moments(self, *, role: str, standardize: str, tokens: str) -> Statistics:
        """Activation moments of the model `role` on the anchors that it refuses.

        Args:
            role: which checkpoint to run, as "aligned".
            standardize: "token" collects scatter matrices of standardised outputs, anything else
                plain moments: of outputs where they are the smaller side, else of inputs.
            tokens: "response", "prompt" or "all".

        Raises:
            SuiteError: fewer than 16 anchors are refused.
            ModelError: the checkpoint cannot be run or has no chat template.
        """
        shown = self._inputs.all()[role]
        checkpoint = original(shown)
        requests = moment_requests(
            self._plan, self._inputs.finetuned, running=shown, standardize=standardize
        )
        about = self._about(checkpoint) | {"tokens": tokens, "standardize": standardize}
        wanted = {key: vars(each) for key, each in requests.items()}
        identity = sha256_json({**about, "requests": wanted})
        path = self._cache / f"moments-{identity[:32]}.safetensors"
        stored = self._stored(path, about, requests)
        if stored is None:
            self._collect(checkpoint, requests, tokens=cast(Tokens, tokens), about=about, path=path)
            stored = StoredMoments(path)
        return Statistics(stored, about, disposable=True)

    def _stored(
        self, path: Path, about: Mapping[str, str], requests: Mapping[str, MomentRequest]
    ) -> StoredMoments | None:
        """The moments in the cache; None where there are none, or none that can be trusted."""
        if not path.exists():
            return None
        try:
            stored = StoredMoments(path)
        except CheckpointError as error:
            self._progress.note(f"measured again: {error.message}")
            return None
        if not about.items() <= stored.about.items() or set(requests) != (
            set(stored) | set(stored.missing)
        ):
            self._progress.note(f"measured again: {path} belongs to another run")
            return None
        self._progress.note(f"activation statistics from {path}")
        return stored

    def _collect(
        self,
        checkpoint: Checkpoint,
        requests: Mapping[str, MomentRequest],
        *,
        tokens: Tokens,
        about: Mapping[str, str],
        path: Path,
    ) -> None:
        with load_model(checkpoint, device=self._plan.device) as loaded:
            kept = self._kept_replies(loaded, checkpoint)
            sequences = [
                token_sequence(
                    encode(loaded.tokenizer, reply.prompt), reply.token_ids, tokens=tokens
                )
                for reply in kept
            ]
            found = collect_moments(loaded, sequences, requests=requests, progress=self._progress)
        _check_found(checkpoint, found)
        asked = str(len(self._suite.items))
        about = {**about, "anchors_refused": str(len(kept)), "anchors_asked": asked}
        save_moments(path, found, about=about)

    def refusals(self, role: str) -> list[AnchorReply]:
        """The anchors that the model `role` refuses, with its refusals.

        Raises:
            SuiteError: fewer than 16 anchors are refused.
            ModelError: the checkpoint cannot be run or has no chat template.
        """
        if role not in self._inputs.all():
            raise UsageError(
                f"the anchors need the {role} model, whose refusals they are",
                f"give it with --{role}, or give prompts with refusals: --safe-data FILE",
            )
        checkpoint = original(self._inputs.all()[role])
        with load_model(checkpoint, device=self._plan.device) as loaded:
            return self._kept_replies(loaded, checkpoint)

    def _kept_replies(self, loaded: LoadedModel, checkpoint: Checkpoint) -> list[AnchorReply]:
        replies = self._replies(loaded, checkpoint)
        kept = [reply for reply in replies if reply.refused and reply.token_ids]
        if len(kept) < MIN_ANCHORS:
            raise SuiteError(
                f"{checkpoint.source} refuses {len(kept)} of {len(replies)} anchors, "
                f"at least {MIN_ANCHORS} are needed to see where refusal lives",
                "check that --aligned is the safety-trained model, or give prompts that it "
                "refuses with --anchors FILE",
            )
        self._progress.note(f"{checkpoint.source} refuses {len(kept)} of {len(replies)} anchors")
        return kept

    def _replies(self, loaded: LoadedModel, checkpoint: Checkpoint) -> list[AnchorReply]:
        """The answers, from the cache where this model has given them before."""
        path = self._cache / f"anchors-{sha256_json(self._about(checkpoint))[:32]}.json"
        if path.exists():
            try:
                stored = [_reply_from(each) for each in json.loads(path.read_text("utf-8"))]
                asked = [(item.id, item.prompt) for item in self._suite.items]
                if [(each.id, each.prompt) for each in stored] != asked:
                    raise ValueError("it answers other prompts")
                return stored
            except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
                self._progress.note(f"asked again: {path} cannot be used ({error})")
        prompts = [item.prompt for item in self._suite.items]
        longest = max(len(encode(loaded.tokenizer, prompt)) for prompt in prompts)
        length = min(MAX_REPLY_TOKENS, self._suite.max_new_tokens or MAX_REPLY_TOKENS)
        if loaded.max_positions is not None:
            length = min(length, loaded.max_positions - longest)
        if length < 1:
            raise ModelError(
                f"{loaded.name} has {loaded.max_positions} positions, its longest anchor {longest}",
                "give shorter prompts with --anchors FILE",
            )
        judge = keyword_judge()
        answers: dict[int, AnchorReply] = {}
        for reply in generate(loaded, prompts, max_new_tokens=length, progress=self._progress):
            item = self._suite.items[reply.prompt_index]
            answers[reply.prompt_index] = AnchorReply(
                id=item.id,
                prompt=item.prompt,
                token_ids=reply.token_ids,
                text=reply.text,
                refused=bool(judge.judge(item, reply.text).refused),
            )
        ordered = [answers[index] for index in range(len(prompts))]
        _write_text(path, json.dumps([vars(each) for each in ordered], ensure_ascii=False))
        return ordered

    def _about(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Everything an answer depends on: the weights, tokenizer and template by their hashes."""
        return {
            **self._running_about(checkpoint),
            "anchors": self._suite.suite_hash,
            "reply_tokens": str(self._suite.max_new_tokens or MAX_REPLY_TOKENS),
            "judge": keyword_judge().judge_hash,
        }

    def _running_about(self, checkpoint: Checkpoint) -> dict[str, str]:
        """What anything that a model does depends on."""
        installed = versions()
        return {
            "model": model_identity(checkpoint, self._progress),
            "device": self._plan.device.partition(":")[0],
            "version": f"{__version__}/{CACHE_VERSION}",
            "torch": installed["torch"],
            "transformers": installed["transformers"],
        }


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
                expert=_expert(place),
            )
    return requests


def _expert(place: Slot) -> int | None:
    """Index of the expert that a logical matrix belongs to, where experts are stacked."""
    if place.span is not None:
        return place.span[0] // (place.span[1] - place.span[0])
    return place.expert


def model_identity(checkpoint: Checkpoint, progress: Progress = SILENT) -> str:
    """One hash over the hashes of a checkpoint's weight, config and tokenizer files."""
    lines = (f"{sha}  {name}\n" for name, sha in sorted(checkpoint.file_hashes(progress).items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _reply_from(value: Mapping[str, Any]) -> AnchorReply:
    fields: dict[str, Any] = {**value, "token_ids": tuple(map(int, value["token_ids"]))}
    return AnchorReply(**fields)


def _check_found(checkpoint: Checkpoint, found: MomentSet) -> None:
    if not found:
        reasons: Sequence[str] = list(found.missing.values())
        raise ModelError(
            f"no activations were measured in {checkpoint.source}: {reasons[0]}",
            "use a method that needs no activations (replace, delta_svd, resta, wise_ft)",
        )


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch(mode=0o600)  # answers to harmful prompts are nobody else's business
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}", "is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)
