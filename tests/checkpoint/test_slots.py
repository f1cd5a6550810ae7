"""The logical matrices of stored tensors: every entry in one of them, and in one only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_support import LLAMA, write_model

from realign.checkpoint.names import TensorRole, classify, role_of
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.slots import (
    Slot,
    fusion_remark,
    logical_matrix,
    slot_shape,
    slots_of,
    stored_rows,
)

Saved = Callable[[str], Path]


@pytest.mark.parametrize(
    ("model_type", "module", "shape", "transposed"),
    [
        ("qwen3_moe", "down_proj", (3, 8, 12), False),
        ("gpt_oss", "gate_up_proj", (3, 8, 24), True),
        ("gpt_oss", "down_proj", (3, 12, 8), True),
        ("gpt_oss", "down_proj", (3, 8, 8), True),
        ("qwen3_moe", "down_proj", (3, 8, 8), False),
    ],
)
def test_a_stack_of_experts_is_one_matrix_each(
    tmp_path: Path, model_type: str, module: str, shape: tuple[int, ...], transposed: bool
) -> None:
    name = f"model.layers.0.mlp.experts.{module}"
    with _opened(tmp_path, name, shape, model_type=model_type) as checkpoint:
        assert classify(checkpoint)[name] == TensorRole(name, "block_linear", module, 0)
        slots = slots_of(checkpoint, name)
        assert slots == tuple(
            Slot(f"{name}[e{e}]", name, module, 0, expert=e, transposed=transposed)
            for e in range(3)
        )
        remark = fusion_remark(role_of(checkpoint.tensors[name]), slots)
        assert ("interleaved" in remark) == (module == "gate_up_proj")


@pytest.mark.parametrize(
    ("model_type", "shape", "transposed"),
    [("qwen3_moe", (2, 24, 8), False), ("llama4_text", (2, 8, 24), True)],
)
def test_gate_and_up_of_an_expert_are_two_matrices(
    tmp_path: Path, model_type: str, shape: tuple[int, ...], transposed: bool
) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with _opened(tmp_path, name, shape, model_type=model_type) as checkpoint:
        slots = slots_of(checkpoint, name)
        assert [slot.key for slot in slots] == [
            f"{name}[e0.gate_proj]", f"{name}[e0.up_proj]",
            f"{name}[e1.gate_proj]", f"{name}[e1.up_proj]",
        ]  # fmt: skip
        assert slots[3] == Slot(
            slots[3].key, name, "up_proj", 1, expert=1, rows=(12, 24), transposed=transposed
        )
        assert fusion_remark(role_of(checkpoint.tensors[name]), slots) == ""


def test_granite_keeps_its_experts_in_linear_stacks(tmp_path: Path) -> None:
    block = "model.layers.0.block_sparse_moe."
    tensors = {
        f"{block}input_linear.weight": torch.ones(2, 24, 8),
        f"{block}output_linear.weight": torch.ones(2, 8, 12),
        f"{block}router.layer.weight": torch.ones(2, 8),
    }
    write_model(tmp_path, tensors, config={**LLAMA, "model_type": "granitemoe"})
    with open_checkpoint(tmp_path) as checkpoint:
        found = [slots_of(checkpoint, name) for name in tensors]
    assert [(s.expert, s.module) for s in found[0]] == [
        (0, "gate_proj"), (0, "up_proj"), (1, "gate_proj"), (1, "up_proj"),
    ]  # fmt: skip
    assert [(s.expert, s.module, s.transposed) for s in found[1]] == [
        (0, "output_linear", False), (1, "output_linear", False),
    ]  # fmt: skip


def test_dbrx_piles_experts_up_along_the_rows(tmp_path: Path) -> None:
    block = "transformer.blocks.0.ffn.experts.mlp."
    shape = (3 * 6, 8)
    tensors = {f"{block}{leaf}": torch.randn(shape) for leaf in ("w1", "v1", "w2")}
    config = {**LLAMA, "model_type": "dbrx", "ffn_config": {"moe_num_experts": 3}}
    write_model(tmp_path, tensors, config=config)
    with open_checkpoint(tmp_path) as checkpoint:
        for name, stored in tensors.items():
            slots = slots_of(checkpoint, name)
            down = name.endswith("w2")
            assert classify(checkpoint)[name].kind == "block_linear"
            for e, slot in enumerate(slots):
                assert slot_shape(shape, slot) == ((8, 6) if down else (6, 8))
                start, stop = stored_rows(slot, shape)
                matrix = logical_matrix(checkpoint.read(name, (start, stop)), slot)
                expert = stored.view(3, 6, 8)[e]
                assert torch.equal(matrix, expert.T if down else expert)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox", "llama", "mixtral"])
def test_slots_hold_every_entry_once(saved_model: Saved, family: str) -> None:
    with open_checkpoint(saved_model(family)) as checkpoint:
        _check_covered(checkpoint)


@pytest.mark.parametrize(
    ("model_type", "module", "shape"),
    [
        ("qwen3_moe", "gate_up_proj", (3, 24, 8)),
        ("llama4_text", "gate_up_proj", (3, 8, 24)),
        ("gpt_oss", "gate_up_proj", (3, 8, 24)),
        ("gpt_oss", "down_proj", (3, 12, 8)),
    ],
)
def test_slots_of_a_stack_hold_every_entry_once(
    tmp_path: Path, model_type: str, module: str, shape: tuple[int, ...]
) -> None:
    name = f"model.layers.0.mlp.experts.{module}"
    with _opened(tmp_path, name, shape, model_type=model_type) as checkpoint:
        _check_covered(checkpoint)


def _check_covered(checkpoint: Checkpoint) -> None:
    """Writing through the views of all slots counts every entry of a tensor exactly once."""
    keys: list[str] = []
    for name in classify(checkpoint):
        shape = checkpoint.tensors[name].shape
        counts = torch.zeros(shape)
        for slot in slots_of(checkpoint, name):
            keys.append(slot.key)
            view = logical_matrix(counts[slice(*stored_rows(slot, shape))], slot)
            if len(shape) >= 2:
                assert tuple(view.shape) == slot_shape(shape, slot)
            view += 1
        assert torch.equal(counts, torch.ones(shape)), name
    assert len(keys) == len(set(keys))


def _opened(folder: Path, name: str, shape: tuple[int, ...], **config: Any) -> Checkpoint:
    write_model(folder, {name: torch.ones(shape)}, config={**LLAMA, **config})
    return open_checkpoint(folder)
