"""What happens to refusal when the aligned model is moved along the alignment vector and across it.

AsFT (arXiv 2506.08473) claims that harmful perturbations are orthogonal to V = Wa - W0. Cosines
alone say little in so many dimensions, where almost everything is orthogonal to V. So the harmful
update H = Wu - Wa (hazard compliance) is split, over all block matrices as one vector, into
H = a V + H_perp, and the aligned model is moved by either part, and by other things of the norm of
H: along V, against V, along the general-skills update without its part in V, along noise.

Here: those models, in memory, and the compliance of each. Not here: the figures of the weights
(`claims_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign.audit.suites import Suite, load_suite
from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.slots import slot_shape
from realign.errors import NotFoundError
from realign.lab.claim_figures import GENERAL
from realign.lab.claims import family_models, matched_slots, slot_weight
from realign.lab.measure import measure
from realign.lab.record import read_record
from realign.model.loading import LoadedModel, load_model
from realign.model.slot_views import SlotViews
from realign.progress import SILENT, Progress
from realign.subspace.vectors import difference

HARMFUL = "unaligned"
_MEASURED = ("harmful", "lookalikes", "general")
_NOISE_SEEDS = (1, 2)

Update = Mapping[str, Tensor]
"""A matrix [d_out, d_in] by slot key."""


@dataclass(frozen=True)
class MovedModel:
    """The aligned model moved by one perturbation.

    Attributes:
        norm: of the perturbation, over norm(V).
        cosine: of the perturbation with V.
        rates: by suite, as `lab.measure` reports them.
    """

    norm: float
    cosine: float
    rates: Mapping[str, Any]


@dataclass(frozen=True)
class MovedClaims:
    """What each perturbation does."""

    cosine: float
    """cos(H, V)."""
    models: Mapping[str, MovedModel]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)


def measure_moved(
    family: str | Path, *, device: str = "cpu", progress: Progress = SILENT
) -> MovedClaims:
    """Move the aligned model and measure what it answers.

    Args:
        family: its folder; needs the models base, aligned and unaligned.
        device: where it runs.
        progress: shows answers.

    Raises:
        NotFoundError: no family, or one of these models is missing.
    """
    folder = Path(family)
    read_record(folder)
    suites = {name: load_suite(folder / "suites" / f"{name}.jsonl") for name in _MEASURED}
    found_models = family_models(folder, None, None)
    if HARMFUL not in found_models:
        raise NotFoundError(
            f"{folder} has no model {HARMFUL}, whose update is the harmful one",
            f"add it: realign lab build, --variant {HARMFUL}",
        )
    models = {n: path for n, path in found_models.items() if n in ("base", HARMFUL, GENERAL)}
    with ExitStack() as stack:
        aligned = stack.enter_context(open_checkpoint(folder / "aligned"))
        opened = {name: stack.enter_context(open_checkpoint(path)) for name, path in models.items()}
        slots = {slot.key: slot for slot in matched_slots(aligned, opened)}
        own = {key: slot_weight(aligned, slot) for key, slot in slots.items()}

        def update(name: str, sign: float) -> dict[str, Tensor]:
            other = {key: slot_weight(opened[name], slot) for key, slot in slots.items()}
            return {key: sign * difference(other[key], own[key]).double() for key in slots}

        vector = update("base", -1.0)
        benign = update(GENERAL, 1.0) if GENERAL in opened else None
        moves = perturbations(update(HARMFUL, 1.0), vector, benign=benign)
        shapes = {
            key: slot_shape(aligned.tensors[slot.tensor].shape, slot) for key, slot in slots.items()
        }
        loaded = stack.enter_context(load_model(aligned, device=device, dtype=torch.float32))
        views = SlotViews(loaded.model, slots, shapes=shapes)
        found = {
            name: MovedModel(
                norm=norm(move) / norm(vector),
                cosine=inner(move, vector) / (norm(move) * norm(vector)),
                rates=_rates(loaded, views, own, move, suites, progress),
            )
            for name, move in moves.items()
        }
    harmful = moves["harmful update"]
    return MovedClaims(inner(harmful, vector) / (norm(harmful) * norm(vector)), found)


def perturbations(harmful: Update, vector: Update, *, benign: Update | None) -> dict[str, Update]:
    """Return the perturbations by name; all but the two parts of H have the norm of H.

    Args:
        harmful: H.
        vector: V.
        benign: an update that keeps refusing; None: left out.
    """
    size = norm(harmful)
    along, across = split(harmful, vector)
    found: dict[str, Update] = {
        "harmful update": harmful,
        "its part in V": along,
        "its part across V": across,
        "along V": scaled(vector, size / norm(vector)),
        "against V": scaled(vector, -size / norm(vector)),
    }
    if benign is not None:
        _, clean = split(benign, vector)
        found["general update across V"] = scaled(clean, size / norm(clean))
    for seed in _NOISE_SEEDS:
        generator = torch.Generator().manual_seed(seed)
        noise = {
            key: torch.randn(each.shape, generator=generator, dtype=torch.float64)
            * (each.norm() / math.sqrt(each.numel()))
            for key, each in harmful.items()
        }
        _, clean = split(noise, vector)
        found[f"noise across V, draw {seed}"] = scaled(clean, size / norm(clean))
    return found


def split(update: Update, vector: Update) -> tuple[Update, Update]:
    """Return the part of an update in V and the part across it, all matrices as one vector."""
    factor = inner(update, vector) / inner(vector, vector)
    along = scaled(vector, factor)
    return along, {key: update[key] - along[key] for key in update}


def scaled(update: Update, factor: float) -> Update:
    """Return factor times an update."""
    return {key: factor * each for key, each in update.items()}


def inner(a: Update, b: Update) -> float:
    """Return <a, b> over all matrices."""
    return sum(float((a[key] * b[key]).sum()) for key in a)


def norm(update: Update) -> float:
    """Return the norm over all matrices."""
    return math.sqrt(inner(update, update))


def _rates(
    loaded: LoadedModel,
    views: SlotViews,
    own: Update,
    move: Update,
    suites: Mapping[str, Suite],
    progress: Progress,
) -> dict[str, Any]:
    with torch.no_grad():
        for key, weight in own.items():
            views.weight(key).copy_(weight.double() + move[key])
    return measure(loaded, suites, names=_MEASURED, progress=progress)
