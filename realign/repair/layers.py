"""Tensors of all checkpoints as the layers that methods see, with LoRA factors where there are any.

Here: making one `Layer`, and reading those of a whole plan one after the other, for what a method
prepares from weights alone. Not here: pieces, threads and memory of a repair (`stream`, `flow`),
models that run (`workbench`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.chunks import read_rows
from realign.checkpoint.layouts import locate, original
from realign.checkpoint.lora import Factors
from realign.checkpoint.matching import same_weights
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, slot_shape, stored_rows
from realign.progress import SILENT, Progress
from realign.repair.edit import Layer, LoraFactors
from realign.repair.request import ALSO, ROLES, Inputs
from realign.repair.verify import check_input

if TYPE_CHECKING:
    from realign.repair.plan import Plan

_FACTORED = {"finetuned": "lora", "safety": "safety_lora", "reference": "reference_lora"}
"""Roles whose factors methods may ask for, and where a layer holds them."""


def factored_roles(inputs: Inputs) -> frozenset[str]:
    """The roles whose checkpoint is a LoRA adapter over the aligned model, factors at hand.

    Where no aligned model was given, an adapter's base stands for it.
    """
    aligned = inputs.others.get("aligned")
    return frozenset(
        role
        for role in _FACTORED
        if (checkpoint := inputs.all().get(role)) is not None
        and _stands_on(original(checkpoint), None if aligned is None else original(aligned))
    )


def _stands_on(checkpoint: Checkpoint, aligned: Checkpoint | None) -> bool:
    if not isinstance(checkpoint, AdapterCheckpoint):
        return False
    return aligned is None or checkpoint.base is aligned or same_weights(checkpoint.base, aligned)


def lora_factors(checkpoint: Checkpoint, slot: Slot) -> LoraFactors | None:
    """The factors of one logical matrix of an adapter, where its whole change is their product.

    Args:
        checkpoint: an adapter, perhaps shown in another layout.
        slot: the matrix, in the layout that is shown.

    Returns:
        None where the matrix has no LoRA, or one that is more than a product of two factors.
    """
    adapter, place = original(checkpoint), locate(checkpoint, slot)
    if not isinstance(adapter, AdapterCheckpoint) or adapter.changes(place.tensor) != "product":
        return None
    factors = adapter.factors(place.tensor)
    if len(factors) != 1:
        return None
    found = _of_slot(factors[0], place)
    shape = slot_shape(adapter.tensors[place.tensor].shape, place)
    if found is None or (found.up.shape[0], found.down.shape[1]) != shape:
        return None
    return found


def _of_slot(factors: Factors, slot: Slot) -> LoraFactors | None:
    """The part of a module's factors that belongs to one matrix in it."""
    down, up = factors.a, factors.b
    if factors.transposed != slot.transposed or factors.stacked != (slot.expert is not None):
        return None
    if slot.expert is not None:
        down, up = down[slot.expert], up[slot.expert]
    rows = slot.rows if slot.span is None else slot.span
    if slot.span is not None and (slot.transposed or slot.rows is not None):
        return None
    return LoraFactors(down, up if rows is None else up[slice(*rows)], factors.scale)


class LayerMaker:
    """Makes the layers of one plan; safe to call from several threads."""

    def __init__(self, plan: Plan, inputs: Inputs | None) -> None:
        """Read nothing yet.

        Args:
            plan: what is done.
            inputs: the open checkpoints, for LoRA factors; None: layers have none.
        """
        self._plan = plan
        everything = {} if inputs is None else inputs.all()
        self._adapters = {
            role: everything[role]
            for role in _FACTORED
            if role in everything and role in plan.factored and role in plan.inputs
        }

    def matrix(self, slot: Slot, tensors: Mapping[str, Tensor]) -> Layer:
        """The layer of a logical matrix.

        Args:
            slot: the matrix.
            tensors: [d_out, d_in] by role.
        """
        device = tensors["finetuned"].device
        loras: dict[str, LoraFactors | None] = {}
        for role, adapter in self._adapters.items():
            found = lora_factors(adapter, slot)
            if found is not None and device.type != "cpu":
                found = LoraFactors(found.down.to(device), found.up.to(device), found.scale)
            loras[_FACTORED[role]] = found
        return self._layer(slot.key, slot.module, slot.layer, tensors, loras=loras)

    def entries(
        self,
        name: str,
        module: str,
        layer: int | None,
        tensors: Mapping[str, Tensor],
        *,
        start: int,
    ) -> Layer:
        """The layer of a tensor, or of a chunk of one, that is edited entry by entry.

        Args:
            name: the tensor.
            module: its module's last name.
            layer: its decoder block.
            tensors: by role, all of one shape.
            start: entries of the stored tensor before the chunk.
        """
        return self._layer(name, module, layer, tensors, start=start)

    def _layer(
        self,
        key: str,
        module: str,
        layer: int | None,
        tensors: Mapping[str, Tensor],
        *,
        loras: Mapping[str, LoraFactors | None] | None = None,
        start: int = 0,
    ) -> Layer:
        others: dict[str, Any] = {role: tensors.get(role) for role in ROLES}
        return Layer(
            key=key,
            module=module,
            layer=layer,
            finetuned=tensors["finetuned"],
            also=tuple(each for role, each in tensors.items() if role.startswith(ALSO)),
            seed=self._plan.seed,
            start=start,
            **others,
            **dict[str, Any](loras or {}),
        )


def read_layers(plan: Plan, inputs: Inputs) -> Iterator[tuple[Slot, Layer]]:
    """Read the matrices that a plan edits one after the other, in every checkpoint of its method.

    Of a method that edits entry by entry, whole tensors are read, each with its first slot.

    Raises:
        NonFiniteError: what was read is not finite; names the tensor and the checkpoint.
    """
    maker = LayerMaker(plan, inputs)
    checkpoints = {role: inputs.all()[role] for role in plan.inputs}
    for pair in plan.edits:
        shape = inputs.finetuned.tensors[pair.role.name].shape or (1,)
        if pair.common_rows is not None:
            shape = (pair.common_rows, *shape[1:])
        if plan.by_entries(pair):
            tensors = _read(plan, checkpoints, pair.role.name, (0, shape[0]))
            role = pair.role
            yield (
                pair.slots[0],
                maker.entries(role.name, role.module, role.layer, tensors, start=0),
            )
            continue
        for slot in pair.slots:
            tensors = _read(plan, checkpoints, slot.tensor, stored_rows(slot, shape))
            views = {role: logical_matrix(each, slot) for role, each in tensors.items()}
            yield slot, maker.matrix(slot, views)


def _read(
    plan: Plan, checkpoints: Mapping[str, Checkpoint], name: str, rows: tuple[int, int]
) -> dict[str, Tensor]:
    tensors = {role: read_rows(each, name, rows) for role, each in checkpoints.items()}
    for role, tensor in tensors.items():
        check_input(tensor, name=name, role=role, source=plan.inputs[role].source)
    return tensors


def entries_before(shape: Sequence[int], row: int, within: int = 0) -> int:
    """Entries of a stored tensor before a row, or before a row of one matrix of a stack.

    Args:
        shape: of the stored tensor.
        row: on the first dimension.
        within: on the second one.
    """
    width = 1
    for size in shape[1:]:
        width *= size
    inner = shape[2] if len(shape) == 3 else 1
    return row * width + within * inner


class MatrixWorkbench:
    """What every workbench knows: the run, and the matrices that it edits."""

    def __init__(self, plan: Plan, inputs: Inputs, *, progress: Progress = SILENT) -> None:
        self._plan, self._inputs, self._progress = plan, inputs, progress

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self._plan.seed

    @property
    def device(self) -> torch.device:
        """Where matrices may be computed."""
        return torch.device(self._plan.device)

    @property
    def progress(self) -> Progress:
        """Shows what is being done."""
        return self._progress

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The matrices that are to be edited, by key, in the order of the files."""
        return {slot.key: slot for pair in self._plan.edits for slot in pair.slots}

    def layers(self) -> Iterator[Layer]:
        """Read the matrices to edit one after the other, in every checkpoint of the method."""
        return (layer for _, layer in read_layers(self._plan, self._inputs))


class WeightsWorkbench(MatrixWorkbench):
    """The workbench of methods that read weights and run no model.

    It imports no library that runs models. Here: matrices and their layers. What is asked of a
    running model is an error of the method, which must declare its needs.
    """

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{self._plan.method.name} asks for {name} of a running model and declares neither "
            "texts nor anchors nor a cost class that runs one"
        )
