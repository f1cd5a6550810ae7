"""What a method may ask for before it edits: statistics, texts as tokens, running models.

Here: which checkpoint of the plan is meant, and what anything that it does depends on. Not here:
statistics and where they are kept (`measured`), answers to the anchors (`refusals`), texts
(`rendered`), models that are trained (`running`), what a method makes of it all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from realign._version import __version__
from realign.audit.suites import Suite
from realign.checkpoint.layouts import locate, original
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import slot_shape
from realign.model.chat import EncodedReply
from realign.model.loading import LoadedModel, load_model
from realign.model.moments import (
    Tokens,
)
from realign.progress import SILENT, Progress
from realign.repair.cache import cache_folder
from realign.repair.kept_tensors import kept_tensors
from realign.repair.layers import MatrixWorkbench
from realign.repair.measured import Measurements, RunnableModel
from realign.repair.plan import Plan
from realign.repair.plan_anchors import load_anchors
from realign.repair.preparation import Data, GradientKind, Statistics
from realign.repair.record import versions
from realign.repair.refusals import AnchorReply, Refusals
from realign.repair.rendered import Prompts, RenderedTexts
from realign.repair.request import Inputs, RepairRequest
from realign.repair.running import LiveModel, running_model
from realign.repair.texts import texts_of, withheld_words

CACHE_VERSION = 4
"""Raised when the same inputs would give other statistics."""


class ModelWorkbench(MatrixWorkbench):
    """Runs the checkpoints of a plan on its anchors; implements `method.Workbench`."""

    def __init__(
        self, request: RepairRequest, plan: Plan, inputs: Inputs, *, progress: Progress = SILENT
    ) -> None:
        super().__init__(plan, inputs, progress=progress)
        self._anchors, self._suites = request.anchors, request.suites
        self._cache = cache_folder(request.cache_dir)
        self._measured = Measurements(plan, inputs.finetuned, self._cache, progress)
        self._texts = RenderedTexts(
            sources=texts_of(request),
            checkpoint=lambda role: original(inputs.all()[role]),
            about=self._running_about,
            refusals=lambda: self.refusals("aligned"),
            anchors=lambda: [item.prompt for item in self._suite.items],
            cache=self._cache,
            device=self.device,
            offload=plan.offload,
            progress=progress,
        )

    @cached_property
    def _suite(self) -> Suite:
        return load_anchors(self._anchors)

    def input_moments(
        self,
        *,
        role: str,
        data: Data,
        tokens: str,
        diagonal: bool = False,
        limit: int | None = None,
        length: int | None = None,
    ) -> Statistics:
        """Moments of what every matrix is fed."""
        texts = self._texts.examples(data, role=role, limit=limit)
        if length is not None:
            texts = [EncodedReply(t.ids[:length], min(t.start, length)) for t in texts]
        return self._measured.input_moments(
            self._model(role), texts, tokens=cast(Tokens, tokens), diagonal=diagonal
        )

    def gradients(
        self, *, role: str, data: Data, kind: GradientKind, limit: int | None = None
    ) -> Mapping[str, Tensor]:
        """A gradient statistic of every matrix."""
        texts = self._texts.examples(data, role=role, limit=limit)
        return self._measured.gradients(self._model(role), texts, kind=kind)

    def examples(self, data: Data, *, role: str) -> Sequence[EncodedReply]:
        """Texts as tokens."""
        return self._texts.examples(data, role=role)

    def pairs(self, *, role: str) -> Sequence[tuple[EncodedReply, EncodedReply]]:
        """Pairs of answers as tokens."""
        return self._texts.pairs(role=role)

    def prompts(self, data: Prompts, *, role: str) -> Sequence[tuple[int, ...]]:
        """Prompts alone as tokens, ready for the assistant to speak."""
        return self._texts.prompts(data, role=role)

    def withheld(self) -> frozenset[str]:
        """Words that no prompt may contain which a model writes for this run."""
        anchors = (item.prompt for item in self._suite.items)
        return withheld_words(self._suites, [*anchors, *self._texts.given()])

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
        models = {role: self._running_about(role) for role in self._inputs.all()}
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
        return self._measured.anchor_moments(
            self._model(role),
            self._refusals,
            standardize=standardize,
            tokens=cast(Tokens, tokens),
        )

    def refusals(self, role: str) -> list[AnchorReply]:
        """The anchors that the model `role` refuses, with its refusals.

        Raises:
            SuiteError: fewer than 16 anchors are refused.
            ModelError: the checkpoint cannot be run or has no chat template.
        """
        with self._load(role) as loaded:
            return self._refusals.kept(loaded, self._running_about(role))

    @cached_property
    def _refusals(self) -> Refusals:
        return Refusals(self._suite, self._cache, self._progress)

    def _load(self, role: str, *, merge: bool = False) -> LoadedModel:
        return load_model(
            original(self._inputs.all()[role]),
            device=self._plan.device,
            merge=merge,
            offload=self._plan.offload,
        )

    def _model(self, role: str) -> RunnableModel:
        return RunnableModel(
            self._inputs.all()[role],
            self._running_about(role),
            lambda merge: self._load(role, merge=merge),
        )

    def _running_about(self, role: str) -> dict[str, str]:
        """What anything that a model does depends on."""
        installed = versions()
        device = self._plan.device.partition(":")[0]
        # Sums are split among threads, and rounded accordingly. One thread for all would make the
        # calibration of a large model slow; so what was measured with another number is not used.
        threads = "any" if device == "cuda" else str(torch.get_num_threads())
        return {
            "model": model_identity(original(self._inputs.all()[role]), self._progress),
            "device": device,
            "threads": threads,
            "version": f"{__version__}/{CACHE_VERSION}",
            "torch": installed["torch"],
            "transformers": installed["transformers"],
        }


def model_identity(checkpoint: Checkpoint, progress: Progress = SILENT) -> str:
    """One hash over the hashes of a checkpoint's weight, config and tokenizer files."""
    lines = (f"{sha}  {name}\n" for name, sha in sorted(checkpoint.file_hashes(progress).items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
