"""Pairing: every tensor gets an action and a reason, and what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoint_support import LLAMA, llama_tensors, write_model
from torch import Tensor

from realign.checkpoint.matching import Matching, Scope, match, same_weights
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.errors import MismatchError

TIED = {**LLAMA, "tie_word_embeddings": True}
Q = "model.layers.0.self_attn.q_proj.weight"


class Maker:
    def __init__(self, root: Path) -> None:
        self.root, self.made = root, 0

    def __call__(
        self, tensors: dict[str, Tensor], config: dict[str, object] = LLAMA, **rest: object
    ) -> Checkpoint:
        self.made += 1
        shards = rest.get("shards")
        folder = self.root / str(rest.get("name", self.made))
        write_model(folder, tensors, config=config, shards=shards)  # type: ignore[arg-type]
        return open_checkpoint(folder)


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def edited(matching: Matching) -> set[str]:
    return {pair.role.name for pair in matching.pairs if pair.action == "edit"}


def pair_of(matching: Matching, name: str):
    return next(pair for pair in matching.pairs if pair.role.name == name)


def test_scopes_widen_and_everything_has_a_reason(make: Maker) -> None:
    finetuned, aligned = make(llama_tensors(seed=1)), make(llama_tensors())
    found: dict[Scope, set[str]] = {}
    for scope in ("block_linear", "matrices", "all"):
        matching = match(finetuned, {"aligned": aligned}, scope=scope)
        assert [pair.role.name for pair in matching.pairs] == list(finetuned.tensors)
        assert all(pair.reason for pair in matching.pairs)
        assert all(bool(pair.slots) == (pair.action == "edit") for pair in matching.pairs)
        found[scope] = edited(matching)
    assert len(found["block_linear"]) == 7 and Q in found["block_linear"]
    assert found["matrices"] - found["block_linear"] == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert found["all"] == set(finetuned.tensors)


def test_another_sharding_and_order_changes_nothing(make: Maker) -> None:
    tensors = llama_tensors()
    names = sorted(tensors, reverse=True)
    split = make(tensors, shards=[names[:4], names[4:9], names[9:]])
    one = match(make(llama_tensors(seed=1)), {"aligned": split}, scope="all")
    two = match(make(llama_tensors(seed=1)), {"aligned": make(tensors)}, scope="all")
    assert one.pairs == two.pairs


def test_routers_buffers_and_the_rest_are_never_edited(make: Maker) -> None:
    extra = {
        "model.layers.0.mlp.gate.weight": torch.ones(3, 8),
        "model.layers.0.mixer.A_log": torch.ones(8, 4),
    }
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    finetuned = make({**llama_tensors(seed=1), **extra, **buffer})
    matching = match(finetuned, {"aligned": make({**llama_tensors(), **extra})}, scope="all")
    for name in (*extra, *buffer):  # the aligned model lacks the buffer: no matter
        assert pair_of(matching, name).action == "copy"
    assert "router" in pair_of(matching, "model.layers.0.mlp.gate.weight").reason


def test_missing_and_extra_tensors_are_named_on_both_sides(make: Maker) -> None:
    finetuned, tensors = make(llama_tensors(seed=1), name="tuned"), llama_tensors()
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4)
    del tensors["model.norm.weight"]
    with pytest.raises(MismatchError) as caught:
        match(finetuned, {"aligned": make(tensors, name="other")}, scope="block_linear")
    message = caught.value.message
    assert "1 only in" in message and "model.norm.weight" in message and "tuned" in message
    assert "only in the aligned model" in message and "q_norm" in message and "other" in message


def test_heads_that_predict_ahead_may_be_missing_on_either_side(make: Maker) -> None:
    ahead = {
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(12, 8),
        "model.layers.1.eh_proj.weight": torch.ones(8, 16),  # the config counts one block
    }
    with_them = make({**llama_tensors(), **ahead}, name="more")
    matching = match(make(llama_tensors(seed=1)), {"aligned": with_them}, scope="block_linear")
    assert {pair.role.name for pair in matching.pairs} == set(llama_tensors())
    assert any("2 tensors" in note and "more" in note for note in matching.notes)
    matching = match(with_them, {"base": make(llama_tensors(seed=1))}, scope="all")
    for name in ahead:
        pair = pair_of(matching, name)
        assert pair.action == "copy" and "base model stores none" in pair.reason
    assert edited(match(with_them, {"base": with_them}, scope="block_linear")) >= set(ahead)


def test_a_model_of_language_pairs_with_one_that_sees(make: Maker) -> None:
    """As where a fine-tune was loaded and saved by its causal class alone."""
    eyes = {
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": torch.ones(8, 8),
        "model.vision_tower.encoder.layers.0.norm.bias": torch.ones(8),
        "model.multi_modal_projector.norm.weight": torch.ones(8),
        "model.image_newline": torch.ones(8),
    }
    seeing = make({**llama_tensors(), **eyes}, name="seeing")
    matching = match(make(llama_tensors(seed=1)), {"aligned": seeing}, scope="all")
    assert {pair.role.name for pair in matching.pairs} == set(llama_tensors())
    assert any("4 tensors for images and sound" in note for note in matching.notes)
    matching = match(seeing, {"base": make(llama_tensors(seed=1))}, scope="all")
    for name in eyes:
        assert pair_of(matching, name).action == "copy"
        assert "outside the language model" in pair_of(matching, name).reason


def test_a_differing_prefix_is_recognised(make: Maker) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    with pytest.raises(MismatchError) as caught:
        match(make(llama_tensors()), {"base": make(bare)}, scope="block_linear")
    assert "prefix 'model.'" in caught.value.hint


@pytest.mark.parametrize("scope", ["block_linear", "all"])
@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
def test_shapes_that_differ_are_printed(make: Maker, name: str, scope: Scope) -> None:
    tensors = llama_tensors()
    tensors[name] = torch.ones(6, *tensors[name].shape[1:])
    with pytest.raises(MismatchError) as caught:
        match(make(llama_tensors()), {"aligned": make(tensors)}, scope=scope)
    assert name in caught.value.message and "[8" in caught.value.message
    assert "[6" in caught.value.message and "aligned" in caught.value.message


def test_embeddings_of_another_width_are_no_vocabulary(make: Maker) -> None:
    tensors = llama_tensors()
    tensors["model.embed_tokens.weight"] = torch.ones(10, 6)
    with pytest.raises(MismatchError, match=r"\[10, 6\]"):
        match(make(llama_tensors()), {"aligned": make(tensors)}, scope="block_linear")


def test_integers_do_not_pair_with_floats(make: Maker) -> None:
    name = "model.layers.0.mixer.table"
    floats = {**llama_tensors(), name: torch.ones(2, 3)}
    whole = {**llama_tensors(), name: torch.ones(2, 3, dtype=torch.int8)}
    with pytest.raises(MismatchError) as caught:
        match(make(floats), {"aligned": make(whole)}, scope="block_linear")
    assert name in caught.value.message


def test_float_types_may_differ_and_it_is_noted(make: Maker) -> None:
    aligned = make(llama_tensors(dtype=torch.bfloat16))
    matching = match(make(llama_tensors(seed=1)), {"aligned": aligned}, scope="block_linear")
    assert any("F32" in note and "BF16" in note for note in matching.notes)


@pytest.mark.parametrize(
    "change", [{"model_type": "qwen2"}, {"hidden_size": 16}, {"num_hidden_layers": 2}]
)
def test_architectures_are_compared_by_config(make: Maker, change: dict[str, object]) -> None:
    other = make(llama_tensors(), {**LLAMA, **change})
    with pytest.raises(MismatchError, match=next(iter(change))):
        match(make(llama_tensors()), {"base": other}, scope="block_linear")


def test_an_extended_vocabulary_shares_its_leading_rows(make: Maker) -> None:
    finetuned = make(llama_tensors(seed=1, vocabulary=14))
    others = {"aligned": make(llama_tensors(vocabulary=12)), "base": make(llama_tensors())}
    matching = match(finetuned, others, scope="matrices")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        pair = pair_of(matching, name)
        assert (pair.action, pair.common_rows) == ("edit", 10)
    assert pair_of(matching, Q).common_rows is None
    assert sum("rows from 10 on" in note for note in matching.notes) == 2
    narrow = match(make(llama_tensors()), {"aligned": finetuned}, scope="matrices")
    assert pair_of(narrow, "lm_head.weight").common_rows is None  # all of its rows are shared
    assert edited(match(finetuned, others, scope="block_linear")) <= {
        name for name in finetuned.tensors if ".layers." in name
    }


def test_a_head_that_one_side_ties_is_copied(make: Maker) -> None:
    tied = llama_tensors()
    del tied["lm_head.weight"]
    matching = match(make(llama_tensors(seed=1)), {"aligned": make(tied, TIED)}, scope="matrices")
    pair = pair_of(matching, "lm_head.weight")
    assert pair.action == "copy" and "aligned model ties" in pair.reason
    matching = match(make(tied, TIED), {"aligned": make(llama_tensors())}, scope="matrices")
    assert "tied to the output head" in pair_of(matching, "model.embed_tokens.weight").reason
    with pytest.raises(MismatchError, match=r"lm_head\.weight"):  # missing, and nobody ties it
        match(make(llama_tensors()), {"aligned": make(tied)}, scope="block_linear")


def test_real_models_match_themselves_in_every_scope(saved_model: Callable[[str], Path]) -> None:
    for family in ("llama", "llama-tied", "qwen2", "gpt2", "phi3", "mixtral", "gpt_neox"):
        with (
            open_checkpoint(saved_model(family)) as one,
            open_checkpoint(saved_model(family)) as two,
        ):
            matching = match(one, {"aligned": two, "base": two}, scope="all")
            copied = {pair.role.kind for pair in matching.pairs if pair.action == "copy"}
            assert copied <= {"router", "buffer"}
            assert not matching.notes


def test_same_weights(make: Maker, tmp_path: Path) -> None:
    tensors = llama_tensors()
    names = list(tensors)
    one = make(tensors, name="one")
    assert same_weights(one, open_checkpoint(tmp_path / "one"))
    assert same_weights(one, make(tensors)) and same_weights(
        one, make(tensors, shards=[names[:6], names[6:]])
    )
    assert not same_weights(one, make(llama_tensors(seed=1)))
    assert not same_weights(one, make(llama_tensors(dtype=torch.bfloat16)))
    late = {name: tensor.clone() for name, tensor in tensors.items()}
    late["lm_head.weight"][-1, -1] += 1
    assert not same_weights(one, make(late))
    # A NaN is the same as itself here, and -0 is not 0: bytes are compared.
    nan = {"a": torch.tensor([float("nan"), 0.0])}
    assert same_weights(make(nan), make(dict(nan)))
    assert not same_weights(make(nan), make({"a": torch.tensor([float("nan"), -0.0])}))
