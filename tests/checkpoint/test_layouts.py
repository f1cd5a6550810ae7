"""Views of a checkpoint in another layout: every row the same bits, and nothing made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoint_support import LLAMA, llama_tensors, write_model
from support.layouts_support import (
    CONFIGS,
    SMALL,
    split_phi3,
    stack_experts,
    stack_experts_transposed,
)
from torch import Tensor

from realign.checkpoint.hashing import StreamHashes
from realign.checkpoint.layouts import LayoutView, conform, locate, original
from realign.checkpoint.matching import match, same_weights
from realign.checkpoint.reader import Checkpoint, FolderCheckpoint, open_checkpoint
from realign.checkpoint.slots import Slot, slots_of
from realign.checkpoint.spellings import spelled
from realign.errors import MismatchError

BLOCK = "model.layers.0."
MOE: dict[str, Any] = {**LLAMA, "model_type": "qwen3_moe", "hidden_size": 8, "num_experts": 3}
PHI3: dict[str, Any] = {
    **LLAMA, "model_type": "phi3", "hidden_size": 32, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


MORE: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=False,
    ),
    "phimoe": lambda: transformers.PhimoeConfig(**SMALL, intermediate_size=20, num_local_experts=3),
    "aria_text": lambda: transformers.AriaTextConfig(
        **SMALL, intermediate_size=20, moe_num_experts=3
    ),
}  # fmt: skip


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routed() -> dict[str, Tensor]:
    """One block with three experts, one tensor each."""
    shapes = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    return {
        f"{BLOCK}mlp.experts.{e}.{module}.weight": draw(*shape, seed=7 * e + i)
        for e in range(3)
        for i, (module, shape) in enumerate(shapes.items())
    }


def fused() -> dict[str, Tensor]:
    """The projections of a Phi-3 block, with biases."""
    return {
        f"{BLOCK}self_attn.qkv_proj.weight": draw(64, 32, seed=1),
        f"{BLOCK}self_attn.qkv_proj.bias": draw(64, seed=2),
        f"{BLOCK}mlp.gate_up_proj.weight": draw(96, 32, seed=3),
    }


LAYOUTS = {
    "split": (fused(), split_phi3(fused()), PHI3),
    "stack": (routed(), stack_experts(routed()), MOE),
    "transposed": (routed(), stack_experts_transposed(routed()), MOE),
    "transposed-stack": (stack_experts(routed()), stack_experts_transposed(routed()), MOE),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Checkpoint, Checkpoint]]:
    root = tmp_path_factory.mktemp("views")
    return {
        name: (save(root / name / "a", one, config), save(root / name / "b", two, config))
        for name, (one, two, config) in LAYOUTS.items()
    }


def save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Checkpoint:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return open_checkpoint(write_model(folder, contiguous, config=config))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("turned", [False, True])
def test_every_tensor_is_shown_as_the_other_stores_it(
    opened: dict[str, tuple[Checkpoint, Checkpoint]], layout: str, turned: bool
) -> None:
    shown, wanted = reversed(opened[layout]) if turned else opened[layout]
    view = conform(shown, wanted)
    assert isinstance(view, LayoutView) and original(view) is shown
    assert set(view.tensors) == set(wanted.tensors)
    for name, info in wanted.tensors.items():
        there = view.tensors[name]
        assert (there.name, there.shape, there.dtype, there.nbytes) == (
            name, info.shape, info.dtype, info.nbytes,
        )  # fmt: skip
        assert torch.equal(view.read(name), wanted.read(name)), name
    assert same_weights(view, wanted)
    assert any("differently" in remark for remark in view.remarks)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_rows_of_a_view_are_rows_of_the_whole(
    opened: dict[str, tuple[Checkpoint, Checkpoint]], layout: str, data: st.DataObject
) -> None:
    pair = opened[layout]
    shown, wanted = pair if data.draw(st.booleans()) else (pair[1], pair[0])
    view = conform(shown, wanted)
    name = data.draw(st.sampled_from(sorted(wanted.tensors)))
    rows = wanted.tensors[name].shape[0]
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert torch.equal(view.read(name, (start, stop)), wanted.read(name)[start:stop])


class Watched(FolderCheckpoint):
    """A folder that remembers how many bytes each read of it returned."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, source=str(folder))
        self.sizes: list[int] = []

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        found = super().read(name, rows)
        self.sizes.append(found.nbytes)
        return found

    def read_within(self, name: str, index: int, rows: tuple[int, int]) -> Tensor:
        found = super().read_within(name, index, rows)
        self.sizes.append(found.nbytes)
        return found


@pytest.mark.parametrize("layout", ["split", "stack"])
@pytest.mark.parametrize("turned", [False, True])
def test_only_the_rows_that_are_asked_for_are_read(
    opened: dict[str, tuple[Checkpoint, Checkpoint]], layout: str, turned: bool
) -> None:
    shown, wanted = reversed(opened[layout]) if turned else opened[layout]
    with Watched(shown.folder) as watched:
        view = conform(watched, wanted)
        for name, info in wanted.tensors.items():
            watched.sizes.clear()
            for row in range(info.shape[0]):
                view.read(name, (row, row + 1))
            assert sum(watched.sizes) == info.nbytes, name


def test_hashes_of_a_view_are_those_of_its_files_and_come_from_what_is_read(
    opened: dict[str, tuple[Checkpoint, Checkpoint]],
) -> None:
    shown, wanted = opened["stack"]
    expected = dict(open_checkpoint(shown.folder).file_hashes())
    with open_checkpoint(shown.folder) as inner:
        view = conform(inner, wanted)
        hashes = StreamHashes()
        hashes.expect(inner.weight_files)
        view.watch(hashes)
        for name in view.tensors:
            view.read(name)
        assert all(hashes.rest(file) == 0 for file in view.weight_files)
        assert dict(view.file_hashes()) == expected


@pytest.mark.parametrize("turned", [False, True])
def test_of_a_transposed_stack_one_expert_at_a_time_is_held(
    opened: dict[str, tuple[Checkpoint, Checkpoint]], turned: bool
) -> None:
    shown, wanted = opened["transposed"][::-1] if turned else opened["transposed"]
    largest = 24 * 8 * 4  # gate and up of one expert, in float32
    with Watched(shown.folder) as watched:
        view = conform(watched, wanted)
        for name in wanted.tensors:
            view.read(name)
    assert watched.sizes and max(watched.sizes) <= largest


@pytest.mark.parametrize("arch", [*CONFIGS, "gpt_neox", "phimoe", "aria_text"])
def test_what_transformers_holds_in_memory_pairs_with_what_it_saves(
    tmp_path: Path, arch: str
) -> None:
    """Both layouts as written by the library, with values that tell every entry apart."""
    model = transformers.AutoModelForCausalLM.from_config((CONFIGS | MORE)[arch]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    saved, memory = open_checkpoint(tmp_path / "saved"), open_checkpoint(tmp_path / "memory")
    assert set(saved.tensors) != set(memory.tensors) or arch == "phi3"
    for shown, wanted in ((saved, memory), (memory, saved)):
        view = conform(shown, wanted)
        assert set(view.tensors) == set(wanted.tensors)
        for name in wanted.tensors:
            assert torch.equal(view.read(name), wanted.read(name)), name


def test_the_same_layout_is_no_view(tmp_path: Path) -> None:
    one = save(tmp_path / "a", llama_tensors(), LLAMA)
    two = save(tmp_path / "b", llama_tensors(seed=1, vocabulary=14), LLAMA)
    assert conform(one, two) is one
    assert conform(two, one) is two


def test_another_model_is_left_to_be_refused_by_name(tmp_path: Path) -> None:
    """Nothing is paired by its shape alone."""
    ours = llama_tensors()
    theirs = {name.replace("q_proj", "query"): tensor for name, tensor in ours.items()}
    one, two = save(tmp_path / "a", ours, LLAMA), save(tmp_path / "b", theirs, LLAMA)
    assert conform(two, one) is two
    with pytest.raises(MismatchError, match=r"q_proj.*query"):
        match(one, {"aligned": conform(two, one)}, scope="block_linear")


def test_one_missing_expert_is_refused_with_its_stack(tmp_path: Path) -> None:
    fewer = {name: t for name, t in routed().items() if ".experts.2.down_proj" not in name}
    one = save(tmp_path / "stacked", stack_experts(routed()), MOE)
    two = save(tmp_path / "fewer", fewer, MOE)
    with pytest.raises(MismatchError) as caught:
        match(one, {"aligned": conform(two, one)}, scope="block_linear")
    assert "experts.down_proj" in caught.value.message and str(two.source) in caught.value.message
    assert "experts.0.down_proj" in caught.value.message


def test_a_tensor_beside_the_parts_is_still_an_extra_one(tmp_path: Path) -> None:
    extra = {**routed(), "model.extra_head.weight": draw(4, 4)}
    one = save(tmp_path / "stacked", stack_experts(routed()), MOE)
    two = save(tmp_path / "extra", extra, MOE)
    with pytest.raises(MismatchError, match=r"model\.extra_head\.weight"):
        match(one, {"aligned": conform(two, one)}, scope="block_linear")


def test_names_that_could_mean_two_tensors_are_not_guessed(tmp_path: Path) -> None:
    ours = {"model.layers.0.mlp.up_proj.weight": draw(4, 4)}
    theirs = {
        "language_model.layers.0.mlp.up_proj.weight": draw(4, 4, seed=1),
        "language_model.model.layers.0.mlp.up_proj.weight": draw(4, 4, seed=2),
    }
    one, two = save(tmp_path / "a", ours, LLAMA), save(tmp_path / "b", theirs, LLAMA)
    assert conform(two, one) is two


def test_an_interleaved_projection_is_not_taken_apart(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    parts = {name.replace("query_key_value", part): draw(8, 8) for part in "qkv"}
    config = {**LLAMA, "model_type": "gpt_neox"}
    one = save(tmp_path / "a", {name: draw(24, 8)}, config)
    two = save(tmp_path / "b", parts, config)
    assert conform(two, one) is two


def test_parts_of_two_types_are_read_in_a_type_that_holds_both(tmp_path: Path) -> None:
    parts = split_phi3(fused())
    q, k = (f"{BLOCK}self_attn.{part}_proj.weight" for part in "qk")
    parts[q], parts[k] = parts[q].bfloat16(), parts[k].half()
    one, two = save(tmp_path / "a", fused(), PHI3), save(tmp_path / "b", parts, PHI3)
    view = conform(two, one)
    name = f"{BLOCK}self_attn.qkv_proj.weight"
    assert view.tensors[name].dtype == "F32"
    assert torch.equal(
        view.read(name), torch.cat([parts[q].float(), parts[k].float(), fused()[name][48:]])
    )


def test_a_longer_vocabulary_under_another_prefix_stays_longer(tmp_path: Path) -> None:
    ours = llama_tensors(vocabulary=14)
    theirs = {f"language_model.{name}": tensor for name, tensor in llama_tensors().items()}
    one, two = save(tmp_path / "a", ours, LLAMA), save(tmp_path / "b", theirs, LLAMA)
    matching = match(one, {"aligned": conform(two, one)}, scope="matrices")
    rows = {pair.role.kind: pair.common_rows for pair in matching.pairs if pair.common_rows}
    assert rows == {"embedding": 10, "head": 10}


def test_a_matrix_is_located_where_it_is_stored(
    opened: dict[str, tuple[Checkpoint, Checkpoint]],
) -> None:
    whole, split = opened["split"]
    name = f"{BLOCK}self_attn.qkv_proj.weight"
    q, k, _ = slots_of(whole, name)
    found = locate(conform(split, whole), k)
    assert (found.tensor, found.rows) == (f"{BLOCK}self_attn.k_proj.weight", None)
    alone = Slot(found.tensor, found.tensor, "k_proj", 0)
    assert locate(conform(whole, split), alone) == k
    assert locate(whole, q) == q


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.blocks.0.fc1.weight", "vision_tower.blocks.0.fc1.weight"),
        ("model.layers.0.block_sparse_moe.gate.weight", "layers.0.mlp.router.weight"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("model.image_newline", "image_newline"),
        ("embed_out.weight", "lm_head.weight"),
        ("model.layers.1.mlp.router.gate.weight", "layers.1.mlp.router.weight"),
        ("model.layers.1.mlp.expert_bias", "layers.1.mlp.e_score_correction_bias"),
    ],
)
def test_spellings(name: str, plain: str) -> None:
    assert spelled(name) == plain
