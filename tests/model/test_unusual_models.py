"""Models that padding disturbs, that say nothing without an image class, that cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_support import TEMPLATE, llama, loaded, word_tokenizer
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from realign.errors import ModelError
from realign.model.batching import padding_matters, plan_batches
from realign.model.generation import generate
from realign.model.loading import load_model
from realign.model.modules import ModuleFinder
from realign.model.moments import MomentRequest, TokenSequence, collect_moments

LENGTHS = (3, 7, 7, 12)


def sequences() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(3, 40, (n,), generator=generator).tolist()) for n in LENGTHS]


def roberta() -> PreTrainedModel:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        is_decoder=True,
        pad_token_id=1,
    )
    return RobertaForCausalLM(config).eval()


def rwkv() -> PreTrainedModel:
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=48, hidden_size=24, num_hidden_layers=2, context_length=40)
    return RwkvForCausalLM(config).eval()


def test_whether_padding_matters_is_found_out() -> None:
    device = torch.device("cpu")
    found = {
        kind: padding_matters(model.base_model, sequences(), pad_id=0, device=device)
        for kind, model in (("llama", llama()), ("roberta", roberta()), ("rwkv", rwkv()))
    }
    assert found == {"llama": False, "roberta": True, "rwkv": True}
    equal = [sequences()[1], sequences()[2]]
    assert not padding_matters(rwkv().base_model, equal, pad_id=0, device=device)


def test_only_equal_lengths_go_together_where_it_does() -> None:
    assert plan_batches(LENGTHS, batch_size=8, padded=False) == [[3], [1, 2], [0]]
    assert plan_batches((5, 5, 5), batch_size=2, padded=False) == [[0, 1], [2]]


def deepseek() -> PreTrainedModel:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
    )
    return DeepseekV3ForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (deepseek, "model.layers.0.self_attn.kv_b_proj"),  # fed [rows, 1, length, rank]
        (roberta, "roberta.encoder.layer.1.output.dense"),
        (rwkv, "rwkv.blocks.1.feed_forward.value"),
    ],
)
def test_moments_in_batches_are_those_taken_one_by_one(build: Any, path: str) -> None:
    model = build()
    items = [TokenSequence(ids, (True,) * len(ids)) for ids in sequences()]
    found = collect_moments(
        loaded(model), items, requests={"x": MomentRequest("input", path)}, batch_size=4
    )["x"]
    seen: list[torch.Tensor] = []
    module = dict(model.named_modules())[path]
    handle = module.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in sequences():
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    x = torch.cat(seen).double()
    assert found.n == len(x)
    torch.testing.assert_close(found.s2, x.T @ x, rtol=1e-4, atol=1e-6)


def test_replies_in_batches_are_those_given_one_by_one() -> None:
    subject = loaded(rwkv())
    asked = [sequences()[index] for index in (0, 1, 3)]  # the library's RWKV mixes equal lengths
    together = {r.prompt_index: r.token_ids for r in generate(subject, asked, max_new_tokens=6)}
    for index, ids in enumerate(asked):
        (alone,) = generate(subject, [ids], max_new_tokens=6)
        assert together[index] == alone.token_ids


def test_a_vision_language_model_is_loaded_and_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(template=TEMPLATE)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={
            **sizes, "model_type": "llama", "vocab_size": len(tokenizer), "intermediate_size": 32,
            "num_key_value_heads": 2,
        },
        vision_config={
            **sizes, "model_type": "clip_vision_model", "intermediate_size": 32,
            "image_size": 16, "patch_size": 8, "projection_dim": 24,
        },
        image_token_id=3,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with load_model(tmp_path, device="cpu") as subject:
        assert type(subject.model) is LlavaForConditionalGeneration
        (reply,) = generate(subject, ["hello"], max_new_tokens=3)
        assert len(reply.token_ids) <= 3
        # On disk the decoder has another name than in memory.
        home = ModuleFinder(subject.model).find("language_model.model.layers.0.mlp.down_proj")
        assert home is not None and home.path.endswith("layers.0.mlp.down_proj")


def test_a_model_that_cannot_run_is_named() -> None:
    model = llama()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError, match="cannot be run by transformers: RuntimeError"):
        list(generate(loaded(model), [(3, 4, 5)], max_new_tokens=2))
