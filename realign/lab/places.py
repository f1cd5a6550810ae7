"""Where the leaderboard's work happens: one family, one scenario, one seed, and the models of it.

A place makes the fine-tune it needs and keeps it, opens world, exam and texts, and holds one model
in memory into which weights are put. What is repaired how is in `compare`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from realign.audit.canonical import sha256_json
from realign.audit.suites import Suite
from realign.errors import NotFoundError
from realign.lab.build import finetune_variant, recorded_preset
from realign.lab.exam import EXAM_VERSION, build_exam
from realign.lab.marking import Weights, mark, put_weights, read_weights
from realign.lab.materials import make_materials, materials_digest, write_materials
from realign.lab.members import Studio, open_studio
from realign.lab.record import FamilyRecord, read_record
from realign.lab.scenarios import Scenario
from realign.lab.suites import write_suites
from realign.model.loading import LoadedModel, load_model
from realign.progress import SILENT, Progress

ROLES = ("base", "aligned", "unaligned")
ALWAYS = ("harmful", "lookalikes", "harmful_second", "general")
"""Suites that every model is asked."""


@dataclass(frozen=True)
class Place:
    """One family with one scenario and one fine-tuning seed."""

    family: Path
    scenario: Scenario
    seed: int
    out: Path
    """Of the whole comparison."""
    progress: Progress = SILENT

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.family.name} {self.scenario.name} seed {self.seed}"

    @property
    def cells(self) -> Path:
        """Where its results lie."""
        return self.out / "cells" / self.family.name / f"{self.scenario.name}-s{self.seed}"

    @cached_property
    def record(self) -> FamilyRecord:
        """The family's record."""
        return read_record(self.family)

    @cached_property
    def studio(self) -> Studio:
        """World, tokenizer and settings of the family."""
        return open_studio(
            recorded_preset(self.record),
            seed=self.record.seed,
            tokenizer=self.record.tokenizer,
            device="cpu",
            progress=self.progress,
        )

    @cached_property
    def exam(self) -> dict[str, Suite]:
        """The held-out suites."""
        return build_exam(self.studio.world, self.record.tokenizer)

    @cached_property
    def texts(self) -> dict[str, Path]:
        """The files that methods may ask for, by kind."""
        folder = self.out / "materials" / self.family.name / self.scenario.name
        return write_materials(make_materials(self.studio.world, self.scenario), folder)

    def texts_digest(self, kinds: Iterable[str]) -> str:
        """Of the texts that one method asks for."""
        made = make_materials(self.studio.world, self.scenario)
        return materials_digest({kind: made[kind] for kind in sorted(kinds)})

    @cached_property
    def withheld(self) -> tuple[Path, ...]:
        """The exam's harmful and safe suites as files: no repair may be calibrated on them."""
        folder = self.out / "materials" / self.family.name / "exam"
        suites = [suite for suite in self.exam.values() if suite.kind != "task"]
        return tuple(write_suites(folder, suites))

    @property
    def asked(self) -> tuple[str, ...]:
        """The suites that count here."""
        return tuple(dict.fromkeys((*ALWAYS, *self.scenario.tasks)))

    def role(self, name: str) -> Path:
        """A checkpoint of the family by role.

        The safety model is trained where it is asked for, and so is the unaligned one of a family
        that has none: with the family's own seed it has the bytes that a build would give it.

        Raises:
            NotFoundError: the family has none.
        """
        if name == "safety":
            return self.tune("safety", self.record.seed)
        folder = self.family / name
        if name == "unaligned" and not folder.is_dir():
            return self.tune("unaligned", self.record.seed)
        if not folder.is_dir():
            raise NotFoundError(
                f"{self.family}: the family has no {name} model",
                f"add it: realign lab build {self.family} --variant {name}, with its own preset",
            )
        return folder

    def tune(self, variant: str, seed: int) -> Path:
        """A fine-tune of the family, trained once and kept."""
        target = self.out / "tunes" / self.family.name / f"{variant}-s{seed}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            finetune_variant(self.family, variant, seed=seed, out=target, progress=self.progress)
        return target

    @cached_property
    def subject(self) -> Path:
        """The fine-tune to repair."""
        return self.tune(self.scenario.variant, self.seed)

    @cached_property
    def loaded(self) -> LoadedModel:
        """One model of the family's shape; its weights change."""
        return load_model(self.role("aligned"), device="cpu", dtype=torch.float32)

    def ask(self, weights: Weights) -> dict[str, object]:
        """Put weights into the model and ask the exam."""
        put_weights(self.loaded, weights)
        return mark(self.loaded, self.exam, names=self.asked)

    @cached_property
    def start(self) -> Weights:
        """The fine-tune's weights."""
        return read_weights(self.subject)

    @cached_property
    def digest(self) -> str:
        """Everything that results depend on but the method and its texts: models, questions."""
        folders = [self.subject, *(self.family / role for role in ROLES)]
        return sha256_json(
            {
                "models": [_weights_digest(folder) for folder in folders if folder.is_dir()],
                "exam": [EXAM_VERSION, *(self.exam[name].suite_hash for name in self.asked)],
                "rounds": self.scenario.rounds,
            }
        )


def _weights_digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()
