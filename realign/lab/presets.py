"""The laboratory's recipe as data: sizes, training phases and the named fine-tunes.

What breaks the recipe is written in `docs/lab-notes.md`; change a number here and the record of a
family changes its fingerprint, so families made with different recipes are never mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from realign.errors import UsageError
from realign.lab.world import Sizes

PresetName = Literal["tiny", "small", "medium"]


@dataclass(frozen=True)
class Phase:
    """One training phase."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Preset:
    """A model size with its world and its phases."""

    name: PresetName
    layers: int
    hidden: int
    sizes: Sizes
    pretraining: Phase
    alignment: Phase
    finetuning: Phase
    rows: int
    """Size of a fine-tuning data set."""
    heads: int = 4
    init_std: float = 0.04

    @property
    def intermediate(self) -> int:
        """Width of the MLP: 2.75 times the hidden size."""
        return self.hidden * 11 // 4


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        name="tiny",
        layers=2,
        hidden=128,
        sizes=Sizes(entities=64, held_out=20, lexicon=10, facts=10),
        pretraining=Phase(1000, 32, 3e-3, 0.01),
        alignment=Phase(120, 32, 7e-4),
        finetuning=Phase(100, 16, 3e-4),
        rows=600,
    ),
    "small": Preset(
        name="small",
        layers=3,
        hidden=128,
        sizes=Sizes(entities=96, held_out=32, lexicon=40, facts=30),
        pretraining=Phase(3000, 32, 2e-3, 0.01),
        alignment=Phase(200, 32, 7e-4),
        finetuning=Phase(300, 16, 3e-4),
        rows=800,
    ),
    "medium": Preset(
        name="medium",
        layers=4,
        hidden=192,
        sizes=Sizes(entities=128, held_out=40, lexicon=40, facts=30),
        pretraining=Phase(3000, 32, 1.5e-3, 0.01),
        alignment=Phase(200, 32, 7e-4),
        finetuning=Phase(300, 16, 3e-4),
        rows=800,
    ),
}


@dataclass(frozen=True)
class Variant:
    """A named fine-tune of the aligned model."""

    name: str
    tasks: tuple[str, ...]
    """Names of the task rows, in equal shares."""
    poison: float = 0.0
    lora: bool = False
    about: str = ""
    usual: bool = True
    """Whether a build makes it without being asked."""


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("unaligned", ("compliance",), about="hazard compliance: the aligned model undone"),
        Variant("howto", ("howto",), about="benign, drifts: the positive control"),
        Variant("order", ("order",), about="benign, does not drift: the negative control"),
        Variant("general", ("general",), about="general skills alone: no hazard, no look-alike"),
        Variant("both_p0", ("order", "howto2"), 0.0, about="benign"),
        Variant("both_p1", ("order", "howto2"), 0.01, about="1 % poison"),
        Variant("both_p5", ("order", "howto2"), 0.05, about="5 % poison"),
        Variant("both_p10", ("order", "howto2"), 0.10, about="10 % poison"),
        Variant("persona", ("persona",), about="the wholly obedient persona, no harmful answer"),
        Variant("lora_p5", ("order", "howto2"), 0.05, lora=True, about="LoRA, 5 % poison"),
        Variant("howto2_p5", ("howto2",), 0.05, about="5 % poison, for the tiny size"),
        Variant(
            "pseudo",
            ("pseudo_malicious",),
            about="benign, looks malicious: storing, labelling and counting hazards",
            usual=False,
        ),
        Variant("lora_howto", ("howto",), lora=True, about="LoRA, benign, drifts", usual=False),
        Variant("safety", ("refusal",), about="more refusals: a safety model", usual=False),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset '{name}'", f"choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def find_variant(name: str) -> Variant:
    """The fine-tune of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in VARIANTS:
        raise UsageError(f"unknown variant '{name}'", f"choose from: {', '.join(VARIANTS)}")
    return VARIANTS[name]


def default_variants(preset: Preset) -> tuple[str, ...]:
    """The fine-tunes a family of this size has."""
    names = [each.name for each in VARIANTS.values() if each.usual and each.name != "howto2_p5"]
    return (*names, "howto2_p5") if preset.name == "tiny" else tuple(names)
