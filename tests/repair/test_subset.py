"""--layers and --modules: what is left is edited as without them, the rest is the fine-tune's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.repair_support import Trio, read_folder

from realign.checkpoint.slots import Slot
from realign.errors import NothingToDoError, UsageError
from realign.repair.engine import repair
from realign.repair.method import Given
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.plan import plan
from realign.repair.request import RepairRequest
from realign.repair.subset import kinds_of, parse_layers, parse_modules


def _request(trio: Trio, **options: object) -> RepairRequest:
    usual = {"aligned": trio.aligned, "base": trio.base, "method": "delta_svd"}
    return RepairRequest(finetuned=trio.finetuned, **{**usual, **options})


class OnlyQueries(DeltaSvd):
    """A method that leaves most of a model alone by itself."""

    def target_modules(self, given: Given) -> frozenset[str]:
        return frozenset({"q_proj"})


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9)), min_size=1))
def test_layers_are_read_as_they_are_written(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in ranges)
    expected = {layer for first, more in ranges for layer in range(first, first + more + 1)}
    assert parse_layers(text) == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-2-3"])
def test_what_is_no_list_of_layers(text: str) -> None:
    with pytest.raises(UsageError, match="--layers takes"):
        parse_layers(text)


def test_what_is_no_list_of_modules() -> None:
    assert parse_modules("q_proj, v_proj") == {"q_proj", "v_proj"}
    with pytest.raises(UsageError, match="--modules takes"):
        parse_modules("q_proj,")


@pytest.mark.parametrize(
    ("tensor", "kinds"),
    [
        ("model.layers.0.self_attn.q_proj.weight", {"q_proj"}),
        ("transformer.h.0.attn.c_proj.weight", {"c_proj", "o_proj"}),
        ("transformer.h.0.mlp.c_proj.weight", {"c_proj", "down_proj"}),
        ("transformer.h.0.mlp.c_fc.weight", {"c_fc", "up_proj"}),
        ("gpt_neox.layers.0.attention.dense.weight", {"dense", "o_proj"}),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", {"w2", "down_proj"}),
        (
            "gpt_neox.layers.0.attention.query_key_value.weight",
            {"query_key_value", "q_proj", "k_proj", "v_proj"},
        ),
    ],
)
def test_one_name_for_the_same_thing(tensor: str, kinds: set[str]) -> None:
    module = tensor.split(".")[-2]
    assert kinds_of(Slot(tensor, tensor, module, 0)) == kinds


@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("method", ["delta_svd", "wise_ft"])
def test_what_is_left_is_edited_as_without_the_options(
    trio_of, tmp_path: Path, arch: str, method: str
) -> None:
    """Fused, transposed and stacked tensors are edited in part, entry by entry, too."""
    trio = trio_of(arch)
    options = {"method": method, "scope": "block_linear"}
    repair(_request(trio, output=tmp_path / "all", **options))
    repair(_request(trio, output=tmp_path / "part", modules="v_proj,down_proj", **options))
    whole, part = read_folder(tmp_path / "all"), read_folder(tmp_path / "part")
    finetuned = read_folder(trio.finetuned)
    found = plan(_request(trio, modules="v_proj,down_proj", **options))
    chosen = {slot.key: slot for pair in found.edits for slot in pair.slots}
    assert chosen
    for slot in chosen.values():
        assert not kinds_of(slot).isdisjoint({"v_proj", "down_proj"})
    for name, tensor in part.items():
        slots = [slot for slot in chosen.values() if slot.tensor == name]
        expected = finetuned[name].clone()
        for slot in slots:
            at = expected[slot.expert] if slot.expert is not None else expected
            new = whole[name][slot.expert] if slot.expert is not None else whole[name]
            rows = slice(None) if slot.rows is None else slice(*slot.rows)
            index = (slice(None), rows) if slot.transposed else rows
            at[index] = new[index]
        assert torch.equal(tensor, expected), name


def test_layers_leave_the_others(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    result = repair(_request(trio, output=tmp_path / "out", layers="1"))
    assert {row.layer for row in result.rows} == {1}
    copied = result.manifest["copied"]
    assert copied["model.layers.0.mlp.up_proj.weight"] == "not in --layers"
    assert result.manifest["subset"] == {"layers": [1], "modules": None}
    out, finetuned = read_folder(tmp_path / "out"), read_folder(trio.finetuned)
    changed = {name for name in out if not torch.equal(out[name], finetuned[name])}
    assert changed == {row.tensor for row in result.rows}


def test_a_method_chooses_by_itself_and_the_user_over_it(trio_of) -> None:
    trio = trio_of("llama")
    own = plan(_request(trio, method=OnlyQueries()))
    assert {pair.role.module for pair in own.edits} == {"q_proj"}
    reasons = {pair.reason for pair in own.copies if pair.role.kind == "block_linear"}
    assert reasons == {"delta_svd edits q_proj only"}
    asked = plan(_request(trio, method=OnlyQueries(), modules="o_proj"))
    assert {pair.role.module for pair in asked.edits} == {"o_proj"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "0-2"}, "--layers names 2"),
        ({"modules": "q_prj"}, "--modules names q_prj"),
        ({"modules": "embed_tokens"}, "--modules names embed_tokens"),
    ],
)
def test_what_no_edit_has(trio_of, options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(_request(trio_of("llama"), **options))


def test_nothing_is_left(trio_of) -> None:
    """Layer 0 has q_proj, but the head, which alone is chosen, is in no layer."""
    trio = trio_of("qwen2")
    with pytest.raises(NothingToDoError, match="no tensor is left to edit: --layers 0; --modules"):
        plan(_request(trio, scope="matrices", layers="0", modules="lm_head"))


def test_dials_of_layers(trio_of, tmp_path: Path) -> None:
    """W(t) of every layer is that of a run at its strength; a layer at 0 is copied."""
    trio = trio_of("llama")
    for strength in (0.5, 1.0):
        repair(_request(trio, output=tmp_path / f"{strength}", strength=strength))
    result = repair(_request(trio, output=tmp_path / "own", strengths={0: 0.5}))
    half, full, own = (read_folder(tmp_path / name) for name in ("0.5", "1.0", "own"))
    for name, tensor in own.items():
        assert torch.equal(tensor, half[name] if ".layers.0." in name else full[name]), name
    assert result.manifest["strengths"] == {"0": 0.5}
    assert {row.strength for row in result.rows} == {0.5, 1.0}
    off = plan(_request(trio, strengths={0: 0.0}))
    assert {pair.role.layer for pair in off.edits} == {1}
    with pytest.raises(UsageError, match="every layer"):
        plan(_request(trio, strengths={0: 0.0, 1: 0.0}))


def test_dials_reach_a_patch(trio_of, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    trio = trio_of("llama")
    own = {"strengths": {0: 0.5}, "strength": 0.8, "settings": {"rank": 2}}
    repair(_request(trio, output=tmp_path / "whole", **own))
    repair(_request(trio, output=tmp_path / "patch", patch=True, **own))
    model = transformers.AutoModelForCausalLM.from_pretrained(trio.finetuned)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "patch").merge_and_unload()
    state = merged.state_dict()
    for name, tensor in read_folder(tmp_path / "whole").items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)
