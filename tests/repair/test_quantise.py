"""A quantiser on real architectures: the control, the loss, what is trained and what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.model_support import gpt2, llama, qwen2
from support.quantise_support import FolderWorkbench, opened, save_pair
from support.repair_support import CONFIGS

from realign.errors import ModelError, SuiteError
from realign.model.block_chain import BlockChain
from realign.repair.quantise.blocks import block_matrices, smoothed_groups, smoothing_error
from realign.repair.quantise.calibration import choose_prompts, fit_probes, train_quantiser
from realign.repair.quantise.training import (
    BlockQuantiser,
    Recipe,
    example_loss,
    examples_of,
    train_block,
)
from realign.subspace.probe import Probe
from realign.subspace.threads import torch_threads

RECIPE = Recipe(
    bits=4,
    clip=True,
    smooth=True,
    quantise=True,
    epochs_first=1,
    epochs_rest=1,
    clip_rate=1e-2,
    smooth_rate=1e-3,
    dtype=torch.float32,
)
SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def built(config: transformers.PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "phi3": lambda: built(transformers.Phi3Config(**SHAPE, max_position_embeddings=64)),
    "gemma": lambda: built(transformers.GemmaConfig(**SHAPE, head_dim=6)),
}


def trained(bench: FolderWorkbench, recipe: Recipe = RECIPE) -> dict[str, torch.Tensor]:
    return train_quantiser(bench, recipe=recipe, prompts=16, share=0.75, length=128, penalty=1.0)


@pytest.mark.parametrize("name", MODELS)
def test_smoothing_without_rounding_moves_no_block(name: str, tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, MODELS[name]())) as bench:
        found = trained(bench, replace(RECIPE, quantise=False))
    assert float(found["fact/control_error"]) <= 1e-5
    smooth = {key: value for key, value in found.items() if key.startswith("smooth/")}
    assert smooth and all(not torch.equal(v, torch.ones_like(v)) for v in smooth.values())
    # Both norms of both blocks, each under the name of its stored weight.
    norms = [key.removeprefix("norm/") for key in found if key.startswith("norm/")]
    assert len(norms) == 4
    with opened({r: tmp_path / r for r in ("aligned", "finetuned")}) as bench:
        stored = bench._checkpoints["finetuned"].tensors
        assert all(norm in stored for norm in norms)
    assert {float(v) for k, v in found.items() if k.startswith("offset/")} == {
        1.0 if name == "gemma" else 0.0
    }


def test_the_same_seed_gives_the_same_bytes_and_another_draws_other_prompts(tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, llama())) as bench:
        first, second = trained(bench), trained(bench)
        assert {k: v.numpy().tobytes() for k, v in first.items()} == {
            k: v.numpy().tobytes() for k, v in second.items()
        }
        bench.seed = 1
        other = trained(bench)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_training_does_not_depend_on_the_callers_threads(tmp_path: Path) -> None:
    seen: set[tuple[int, bool]] = set()

    def look(*_: Any) -> None:
        seen.add((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        with opened(save_pair(tmp_path, llama())) as bench:
            found: list[dict[str, bytes]] = []
            for count in (1, 4):
                with torch_threads(count):
                    tensors = trained(bench)
                found.append({k: v.numpy().tobytes() for k, v in tensors.items()})
    finally:
        handle.remove()
    assert found[0] == found[1]
    assert seen == {(1, True)}


def test_training_reaches_factors_and_smoothing_and_nothing_else(tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, llama())) as bench, bench.running("finetuned") as running:
        model: Any = running.loaded.model
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        chain = BlockChain(model, ["model.layers.0.mlp.up_proj"])
        matrices = block_matrices(running, chain, bench.slots)
        examples = examples_of(chain.capture([(7, 8, 9), (10, 11)]), [1, 0])
        probe = Probe(torch.ones(24, dtype=torch.float64), 0.0, 1.0)
        with bench.progress.task("t", total=1) as task:
            _, found = train_block(
                chain, 0, matrices[0], examples, probe=probe, recipe=RECIPE, task=task
            )
        assert found is not None
        for table in (found.high, found.low):
            assert set(table) == {key for key in bench.slots if ".0." in key}
            start = torch.sigmoid(torch.tensor(4.0))
            assert all((v != start).any() and (v < 1).all() for v in table.values())
        # Query, key and value share one v, gate and up another; o and down have none.
        modules = {key.split(".")[-2] for key in found.smooth}
        assert modules == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) and parameter.grad is None, name


def test_query_and_key_are_scaled_by_the_norm_alone(tmp_path: Path) -> None:
    # The trap: a factor per channel between query and key does not commute with rotation.
    with opened(save_pair(tmp_path, llama())) as bench:
        found = trained(bench)
    for layer in (0, 1):
        q, k, v = (
            found[f"smooth/model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"
        )
        assert torch.equal(q, k) and torch.equal(q, v)


def test_benign_sequences_count_at_all_positions_and_malicious_ones_at_the_last() -> None:
    torch.manual_seed(0)
    target = torch.randn(1, 5, 3)
    weight, bias = torch.tensor([1.0, -2.0, 0.5]), 0.25
    for malicious in (False, True):
        output = torch.randn(1, 5, 3, requires_grad=True)
        loss = example_loss(output, target=target, malicious=malicious, weight=weight, bias=bias)
        loss.backward()
        assert output.grad is not None
        if malicious:
            score = output.detach()[0, -1] @ weight + bias
            assert loss.item() == pytest.approx(float(torch.log1p(torch.exp(-score))), rel=1e-5)
            expected = torch.zeros(1, 5, 3)
            expected[0, -1] = -torch.sigmoid(-score) * weight
        else:
            off = output.detach() - target
            assert loss.item() == pytest.approx(float(off.square().mean()), rel=1e-5)
            expected = 2 * off / 15
        assert torch.allclose(output.grad, expected, atol=1e-6)


def test_the_streams_are_those_of_the_paper(tmp_path: Path) -> None:
    # h_fp is the fine-tune's own; h_q comes through the blocks that are quantised already.
    with opened(save_pair(tmp_path, llama())) as bench, bench.running("finetuned") as running:
        model: Any = running.loaded.model
        chain = BlockChain(model, ["model.layers.0.mlp.up_proj"])
        matrices = block_matrices(running, chain, bench.slots)
        examples = examples_of(chain.capture([(7, 8, 9), (10, 11)]), [1, 0])
        own = chain.outputs((7, 8, 9), position=-1)
        probe = Probe(torch.ones(24, dtype=torch.float64), 0.0, 1.0)
        with bench.progress.task("t", total=1) as task:
            for index in range(2):
                examples, _ = train_block(
                    chain, index, matrices[index], examples, probe=probe, recipe=RECIPE, task=task
                )
                assert torch.allclose(examples[0].full[0, -1], own[index], atol=1e-5)
                assert not torch.allclose(examples[0].rounded, examples[0].full, atol=1e-3)


def test_training_lowers_the_loss_and_moves_malicious_prompts_across(tmp_path: Path) -> None:
    recipe = replace(RECIPE, bits=3, epochs_first=4, epochs_rest=4, clip_rate=0.1)
    with opened(save_pair(tmp_path, llama())) as bench, bench.running("finetuned") as running:
        model: Any = running.loaded.model
        chain = BlockChain(model, ["model.layers.0.mlp.up_proj"])
        matrices = block_matrices(running, chain, bench.slots)
        rows = [(7 + i, 8 + i, 9) for i in range(6)]
        examples = examples_of(chain.capture(rows), [1] * 6)
        direction = torch.randn(24, generator=torch.Generator().manual_seed(1)).double()
        with bench.progress.task("t", total=1) as task:
            _, found = train_block(
                chain,
                0,
                matrices[0],
                examples,
                probe=Probe(direction, -2.0, 1.0),
                recipe=recipe,
                task=task,
            )
    assert found is not None and found.loss[1] < found.loss[0]
    assert found.crossed[1] >= found.crossed[0]


@pytest.mark.parametrize("smooth", [True, False])
def test_a_block_whose_norms_come_last_is_refused_unless_nothing_is_smoothed(
    smooth: bool, tmp_path: Path
) -> None:
    model = built(transformers.Olmo2Config(**SHAPE))
    with opened(save_pair(tmp_path, model)) as bench:
        if smooth:
            with pytest.raises(ModelError, match="no norm stands directly before") as caught:
                trained(bench)
            assert "smooth=false" in caught.value.hint
        else:
            found = trained(bench, replace(RECIPE, smooth=False))
            assert not any(key.startswith("smooth/") for key in found)


def test_a_norm_that_something_else_reads_is_refused(tmp_path: Path) -> None:
    # Two of the three readers of the first norm: scaling it would change the third.
    with opened(save_pair(tmp_path, llama())) as bench, bench.running("finetuned") as running:
        chain = BlockChain(running.loaded.model, ["model.layers.0.mlp.up_proj"])
        matrices = block_matrices(running, chain, bench.slots)[0]
        fewer = [each for each in matrices if "v_proj" not in each.parameter]
        captured = chain.capture([(7, 8, 9)])[0]
        with pytest.raises(ModelError, match="something else reads it"):
            smoothed_groups(chain, 0, fewer, hidden=captured.hidden, call=captured.calls[0])


def test_the_check_of_the_control_sees_a_wrong_smoothing(tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, llama())) as bench, bench.running("finetuned") as running:
        chain = BlockChain(running.loaded.model, ["model.layers.0.mlp.up_proj"])
        matrices = block_matrices(running, chain, bench.slots)[0]
        captured = chain.capture([(7, 8, 9)])[0]
        at = {"hidden": captured.hidden, "call": captured.calls[0]}
        groups = smoothed_groups(chain, 0, matrices, **at)
        v = torch.full((24,), 2.0)
        assert smoothing_error(chain, 0, [(groups[0], v)], **at) <= 1e-5
        wrong = replace(groups[0], offset=1.0)  # a plain norm taken for Gemma's
        assert smoothing_error(chain, 0, [(wrong, v)], **at) > 1e-3


def test_experts_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CONFIGS["gpt_oss"]()
    config.eos_token_id, config.bos_token_id = 3, 2
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with (
        opened(save_pair(tmp_path, model)) as bench,
        pytest.raises(ModelError, match="not experts"),
    ):
        trained(bench)


def test_only_what_is_planned_is_quantised(tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, llama())) as bench:
        bench.slots = {key: slot for key, slot in bench.slots.items() if ".1." in key}
        found = trained(bench)
    assert {key.split("/")[1] for key in found if key.startswith("high/")} == set(bench.slots)


def test_prompts_are_cut_at_the_ratio_that_was_asked_for() -> None:
    found = choose_prompts(malicious=500, benign=500, count=200, share=0.75, seed=0)
    assert (len(found.malicious), sum(found.malicious)) == (200, 150)
    assert len(set(found.chosen)) == 200
    assert [kind == "anchors" for kind, _ in found.chosen] == list(found.malicious)
    fewer = choose_prompts(malicious=128, benign=20, count=200, share=0.75, seed=0)
    assert (len(fewer.malicious), sum(fewer.malicious)) == (80, 60)
    with pytest.raises(SuiteError, match="too few") as caught:
        choose_prompts(malicious=200, benign=2, count=200, share=0.75, seed=0)
    assert "--keep-data" in caught.value.hint


def test_probes_say_how_well_they_do_on_prompts_they_have_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [True] * 30 + [False] * 10
    told = torch.randn(40, 6, generator=generator)
    told[:30, 0] += 8.0
    noise = torch.randn(40, 400, generator=generator)
    probes, unseen = fit_probes([told, noise], labels, strength=10.0)
    assert unseen[0] == 1.0 and unseen[1] < probes[1].accuracy


def test_smoothing_never_comes_near_zero(tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, llama())) as bench, bench.running("finetuned") as running:
        chain = BlockChain(running.loaded.model, ["model.layers.0.mlp.up_proj"])
        matrices = block_matrices(running, chain, bench.slots)[0]
        captured = chain.capture([(7, 8, 9)])[0]
        groups = smoothed_groups(chain, 0, matrices, hidden=captured.hidden, call=captured.calls[0])
        quantiser = BlockQuantiser(matrices, groups, RECIPE)
        quantiser.start_smoothing([torch.full((24,), 4.0)] * 2)
        start = [each.detach().clone() for each in quantiser.smooth]
        for each in quantiser.smooth:
            each.data -= 100.0
        quantiser.keep_positive()
        for each, at in zip(quantiser.smooth, start, strict=True):
            assert torch.allclose(each, at / 100)
