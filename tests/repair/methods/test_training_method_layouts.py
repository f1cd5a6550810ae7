"""Fine-tunes in any layout are repaired as plain ones by the methods that train.

SOMF draws its masks by the names of the matrices, so a fused fine-tune trains with other draws: of
it the form of the result is checked, which is exact, instead of its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.adapter_support import tune, with_adapter
from support.layouts_support import (
    as_phi3,
    copied,
    fuse_llama,
    in_shards,
    split_llama,
    stack_experts,
)
from support.repair_support import drift, read_folder
from support.training_layouts_support import SETTINGS, Bench, check_adapter, make_bench, near
from support.training_support import (
    DRIFTED,
    TINY,
)
from torch import Tensor

from realign.errors import ModelError, UsageError

every_method = pytest.mark.parametrize("method", SETTINGS)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("training-layouts"))


def masked_rows(after: Tensor, before: Tensor, aligned: Tensor) -> None:
    """W' = W_a + m (W_f - W_a) / mean(m), with m 0 or 1 for each row of this matrix alone."""
    vector = before.double() - aligned.double()
    # The reverted part is taken off in float32: what is left of a row is rounding.
    kept = (after.double() - aligned.double()).norm(dim=1) > 0.1 * vector.norm(dim=1)
    share = kept.double().mean()
    assert 0 < float(share) < 1, "the mask keeps everything or nothing, and shows nothing"
    expected = aligned.double() + kept[:, None] * vector / share
    assert torch.allclose(after.double(), expected, rtol=0, atol=1e-6)


@every_method
def test_shards_and_a_stored_head_do_not_matter(bench: Bench, tmp_path: Path, method: str) -> None:
    plain = read_folder(DRIFTED)
    assert "lm_head.weight" not in plain, "tied"
    stored = {**plain, "lm_head.weight": plain["model.embed_tokens.weight"].clone()}
    bench.repair(method, tmp_path / "out", finetuned=in_shards(DRIFTED, tmp_path / "in", stored))
    expected, found = read_folder(bench.plain(method)), read_folder(tmp_path / "out")
    head = found.pop("lm_head.weight", expected["model.embed_tokens.weight"])
    assert torch.equal(head, expected["model.embed_tokens.weight"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert sum(not torch.equal(expected[name], plain[name]) for name in plain) >= 14


@every_method
def test_fused_projections_are_repaired_as_their_parts(
    bench: Bench, tmp_path: Path, method: str
) -> None:
    before = read_folder(DRIFTED)
    result = bench.repair(method, tmp_path / "out", finetuned=as_phi3(DRIFTED, tmp_path / "in"))
    found = read_folder(tmp_path / "out")
    if method != "somf":
        expected = read_folder(bench.plain(method))
        near(found, fuse_llama(expected), fuse_llama(before))
        return
    aligned = read_folder(TINY / "aligned")
    assert result.manifest["method_facts"]["best_step"] > 0
    whole = split_llama(found, before)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"model.layers.0.self_attn.{name}.weight"
        masked_rows(whole[key], before[key], aligned[key])


@pytest.mark.parametrize("method", [name for name in SETTINGS if name != "q_realign"])
def test_an_adapter_is_repaired_as_the_model_that_peft_merges(
    bench: Bench, tmp_path: Path, method: str
) -> None:
    """`q_realign` takes longer: tests/slow/test_interrupted_training.py."""
    check_adapter(bench, tmp_path, method)


def test_factors_of_an_adapter_are_masked_alike_over_any_base(bench: Bench, tmp_path: Path) -> None:
    """In adapter space; the result is an adapter that peft runs, or what that one makes."""
    adapter = tune(
        TINY / "aligned", tmp_path / "adapter", r=3, size=0.05, target_modules=["q_proj"]
    )
    shards = in_shards(TINY / "aligned", tmp_path / "shards", read_folder(TINY / "aligned"))
    options: dict[str, Any] = {"settings": {"space": "adapter", "lr": 1.0}}
    bench.repair("somf", tmp_path / "whole", finetuned=adapter, **options)
    bench.repair(
        "somf", tmp_path / "sharded", finetuned=f"{shards}+{adapter}", aligned=shards, **options
    )
    bench.repair("somf", tmp_path / "patch", finetuned=adapter, patch=True, **options)
    found = read_folder(tmp_path / "whole")
    running = with_adapter(TINY / "aligned", tmp_path / "patch").merge_and_unload().state_dict()
    before = with_adapter(TINY / "aligned", adapter).merge_and_unload().state_dict()
    for name, tensor in read_folder(tmp_path / "sharded").items():
        assert torch.equal(found[name], tensor), name
        assert torch.allclose(running[name], tensor, rtol=0, atol=1e-6), name
        assert torch.equal(tensor, before[name]) is not name.endswith("q_proj.weight"), name


@pytest.mark.parametrize("method", ["one_shot", "safe_patching"])
def test_adapter_space_is_refused_where_there_is_none(
    bench: Bench, tmp_path: Path, method: str
) -> None:
    with pytest.raises(UsageError, match=f"{method} has no parameter space"):
        bench.repair(method, tmp_path / "out", settings={"space": "adapter"})
    assert not (tmp_path / "out").exists()


# --- mixtures of experts ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A mixture of experts that speaks the tokens of the tiny family, in two layouts."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(7)
    config = transformers.MixtralConfig(
        vocab_size=590,
        hidden_size=32,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = transformers.MixtralForCausalLM(config)
    aligned = {name: value.clone() for name, value in model.state_dict().items()}
    found: dict[str, Path] = {}
    for role, state in {"aligned": aligned, "apart": drift(aligned, seed=3, size=0.02)}.items():
        found[role] = folder / role
        model.load_state_dict(state)
        model.save_pretrained(found[role])
        for file in TINY.glob("aligned/*token*"):
            (found[role] / file.name).write_bytes(file.read_bytes())
        template = (TINY / "aligned" / "chat_template.jinja").read_bytes()
        (found[role] / "chat_template.jinja").write_bytes(template)
    tensors = stack_experts(read_folder(found["apart"]))
    found["stacked"] = copied(found["apart"], folder / "stacked", model=tensors)
    return found


@pytest.mark.parametrize("method", ["one_shot", "safe_patching", "somf"])
def test_stacked_experts_are_repaired_as_single_ones(
    bench: Bench, experts: Mapping[str, Path], tmp_path: Path, method: str
) -> None:
    for name in ("apart", "stacked"):
        options = {"finetuned": experts[name], "aligned": experts["aligned"]}
        settings = {"epochs": 1} if method == "somf" else {}
        bench.repair(method, tmp_path / name, settings=settings, **options)
    before = stack_experts(read_folder(experts["apart"]))
    expected = stack_experts(read_folder(tmp_path / "apart"))
    found = read_folder(tmp_path / "stacked")
    if method != "somf":
        near(found, expected, before)
        stacks = [name for name, tensor in before.items() if tensor.dim() == 3]
        assert len(stacks) == 2
        assert all(not torch.equal(found[name], before[name]) for name in stacks)
        return
    aligned = stack_experts(read_folder(experts["aligned"]))
    for result in (found, expected):
        for name, tensor in before.items():
            if tensor.dim() != 3:
                continue
            halves = 2 if "gate_up" in name else 1
            for e in range(3):
                parts = (each[e].chunk(halves) for each in (result[name], tensor, aligned[name]))
                for after, half, start in zip(*parts, strict=True):
                    masked_rows(after, half, start)


def test_quantising_experts_is_refused(
    bench: Bench, experts: Mapping[str, Path], tmp_path: Path
) -> None:
    for name in ("apart", "stacked"):
        with pytest.raises(ModelError, match="not experts"):
            options = {"finetuned": experts[name], "aligned": experts["aligned"]}
            bench.repair("q_realign", tmp_path / name, **options)
        assert not (tmp_path / name).exists()
