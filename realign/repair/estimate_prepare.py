"""What a method's preparation holds in memory: the model that runs, sums, gradients, activations.

From headers, the configuration and the lengths of texts. Here: the prediction. Not here: what a
method asks for (`demands`, `Method.measures`, `Method.training_bytes`), the edits (`estimate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from realign.checkpoint.matching import Matching
from realign.checkpoint.names import role_of, text_config
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, slot_shape
from realign.repair.demands import Measurement, ModelSize, TextSize
from realign.repair.method import Method
from realign.repair.plan_anchors import PlannedAnchors
from realign.repair.preparation import Data
from realign.repair.texts import PlannedTexts

RUN_BYTES = 64 * 2**20
"""What a pass leaves beside weights and sums: threads, buffers of libraries, freed memory kept."""

HELD_BYTES = 512 * 2**20
"""As `realign.model.moments` and `gradients` bound what waits between two blocks."""

_CHARACTERS = 4  # of a token, about
_TEMPLATE = 16  # tokens of a chat template
_REPLY = 256  # tokens of a reply that a model gives
_ANCHOR = TextSize(1, 96, 192)  # one anchor with its refusal
_BATCH = 8  # sequences of one pass

_SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}
"""Projections that are fed the same vectors have one set of sums."""


def preparation_bytes(
    method: Method,
    matching: Matching,
    finetuned: Checkpoint,
    used: Mapping[str, Checkpoint],
    *,
    offload: bool,
    texts: Mapping[Data, PlannedTexts],
    anchors: PlannedAnchors | None,
) -> int:
    """What `prepare` holds at its highest, the libraries aside; 0 where it runs no model.

    Args:
        method: with its settings decided.
        matching: what is edited: the matrices that are measured or trained.
        finetuned: whose layout counts.
        used: the checkpoints that the method reads beside it, by role.
        offload: whether a model that is measured or asked is read block by block.
        texts: those that the method reads.
        anchors: those that the aligned model answers.
    """
    if not method.prepares() or method.reads_weights_only():
        return 0
    models = {"finetuned": finetuned, **used}
    size = model_size(matching, finetuned, texts=texts, anchors=anchors)
    held = [
        measuring_bytes(models[each.role], matching, finetuned, each, size=size, offload=offload)
        for each in method.measures()
    ]
    asked = 0
    if anchors is not None or any(each.unanswered for each in texts.values()):
        runs = models["aligned"] if anchors is not None else finetuned
        asked = weight_bytes(runs, offload=offload) + RUN_BYTES
        held.append(asked)
    if method.trains:
        held.append(method.training_bytes(size) + RUN_BYTES)
        # Refusals are asked for while another model waits to be trained.
        held.append(4 * size.model + asked)
    return max(held, default=0)


def models_run(
    method: Method,
    finetuned: Checkpoint,
    used: Mapping[str, Checkpoint],
    *,
    anchors: PlannedAnchors | None,
) -> list[Checkpoint]:
    """The checkpoints that are loaded as models, each once.

    Args:
        method: with its settings decided.
        finetuned: the fine-tune.
        used: the checkpoints that the method reads beside it, by role.
        anchors: those that the aligned model answers.
    """
    roles = {each.role for each in method.measures()}
    if anchors is not None:
        roles.add("aligned")
    if method.trains:
        roles.add("finetuned")
    return [{"finetuned": finetuned, **used}[role] for role in sorted(roles)]


def model_size(
    matching: Matching,
    finetuned: Checkpoint,
    *,
    texts: Mapping[Data, PlannedTexts],
    anchors: PlannedAnchors | None,
) -> ModelSize:
    """The sizes of a run's model and texts."""
    slots = _slots(matching, finetuned)
    shapes = [shape for _, shape in slots]
    config = text_config(finetuned.config)
    hidden = _width(config, "hidden_size", "n_embd", "d_model")
    inner = _width(config, "intermediate_size", "n_inner", "ffn_dim")
    blocks = {role_of(info).layer for info in finetuned.tensors.values()} - {None}
    sizes: dict[str, TextSize] = {data: _text_size(each) for data, each in texts.items()}
    if anchors is not None:
        count = anchors.count
        sizes["anchors"] = TextSize(count, _ANCHOR.tokens * count, _ANCHOR.longest)
    return ModelSize(
        model=sum(info.numel for info in finetuned.tensors.values()),
        edited=sum(map(math.prod, shapes)),
        rows=sum(rows for rows, _ in shapes),
        blocks=len(blocks),
        hidden=hidden or max((min(shape) for shape in shapes), default=0),
        inner=inner or 4 * hidden,
        vocabulary=_width(config, "vocab_size"),
        texts=sizes,
    )


def measuring_bytes(
    running: Checkpoint,
    matching: Matching,
    finetuned: Checkpoint,
    asked: Measurement,
    *,
    size: ModelSize,
    offload: bool,
) -> int:
    """What one pass holds that measures a model block by block.

    Args:
        running: the checkpoint that runs.
        matching: what is edited: the matrices that are measured.
        finetuned: whose layout counts.
        asked: what is measured.
        size: of the model and of the texts.
        offload: whether weights are read when a block is entered.
    """
    model = weight_bytes(running, offload=offload)
    tokens = sum(each.tokens for each in size.texts.values())
    longest = max((each.longest for each in size.texts.values()), default=0)
    if asked.kind == "gradients":
        waiting = 8 * size.hidden * size.blocks * tokens
        passing = 4 * longest * max(size.block_entries(), 5 * size.vocabulary)
        sums = _gradient_bytes(running, matching, finetuned)
        return model + sums + min(HELD_BYTES, waiting) + passing + RUN_BYTES
    waiting = 16 * size.hidden * tokens
    # What is summed is widened to float64 first.
    passing = _BATCH * longest * (4 * size.block_entries() + 16 * max(size.hidden, size.inner))
    sums = _moment_bytes(matching, finetuned, asked)
    return model + sums + min(HELD_BYTES, waiting) + passing + RUN_BYTES


def weight_bytes(running: Checkpoint, *, offload: bool) -> int:
    """The weights of a model that runs, as they are stored, or of what stands in memory of it."""
    model = sum(info.nbytes for info in running.tensors.values())
    if not offload:
        return model
    blocks = _by_block(running)
    outside = blocks.pop(None, 0)
    # A block twice while the library makes it of what it reads; the embeddings come alone.
    return min(model, max(2 * max(blocks.values(), default=0), 2 * outside))


def _by_block(checkpoint: Checkpoint) -> dict[int | None, int]:
    blocks: dict[int | None, int] = {}
    for info in checkpoint.tensors.values():
        layer = role_of(info).layer
        blocks[layer] = blocks.get(layer, 0) + info.nbytes
    return blocks


def _moment_bytes(matching: Matching, finetuned: Checkpoint, asked: Measurement) -> int:
    """Float64 sums of every matrix of one block, and the finished copies of one."""
    sums: dict[int | None, dict[object, int]] = {}
    for slot, (d_out, d_in) in _slots(matching, finetuned):
        if asked.kind == "diagonal":
            cost = 8 * d_in
        else:
            cost = 8 * (min(d_out, d_in) if asked.kind == "smaller" else d_in) ** 2
        shared = None
        if asked.kind != "smaller":
            shared = _SHARED.get(slot.key.removesuffix(".weight").rpartition(".")[2])
        if shared is None:
            name: object = slot.key
        else:
            parent = slot.key.removesuffix(".weight").rpartition(".")[0]
            name = (parent, shared, slot.expert)
        sums.setdefault(slot.layer, {})[name] = cost
    # While one is finished, its transpose and the halved sum stand beside it.
    return max((sum(each.values()) + 2 * max(each.values()) for each in sums.values()), default=0)


def _gradient_bytes(running: Checkpoint, matching: Matching, finetuned: Checkpoint) -> int:
    """One block in float32, the gradients and sums of its matrices, and one on its way to disk."""
    entries: dict[int | None, int] = {}
    for info in running.tensors.values():
        if not info.dtype.endswith("32"):  # held in float32 already
            layer = role_of(info).layer
            entries[layer] = entries.get(layer, 0) + info.numel
    outside = 4 * entries.pop(None, 0)
    measured: dict[int | None, int] = {}
    largest = 0
    for slot, shape in _slots(matching, finetuned):
        measured[slot.layer] = measured.get(slot.layer, 0) + math.prod(shape)
        largest = max(largest, math.prod(shape))
    widened = 4 * max(entries.values(), default=0)
    return max(outside, widened + 8 * max(measured.values(), default=0) + 8 * largest)


def _slots(matching: Matching, finetuned: Checkpoint) -> list[tuple[Slot, tuple[int, int]]]:
    """The logical matrices that are edited, with their shapes."""
    return [
        (slot, slot_shape(finetuned.tensors[slot.tensor].shape, slot))
        for pair in matching.pairs
        if pair.action == "edit" and len(finetuned.tensors[pair.role.name].shape) >= 2
        for slot in pair.slots
    ]


def _text_size(planned: PlannedTexts) -> TextSize:
    template = _TEMPLATE + (_REPLY if planned.unanswered else 0)
    return TextSize(
        planned.count,
        planned.characters // _CHARACTERS + _TEMPLATE * planned.count + _REPLY * planned.unanswered,
        planned.longest // _CHARACTERS + template,
    )


def _width(config: Mapping[str, object], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)
