"""Roles and logical matrices on models that transformers itself has saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoint_support import LLAMA, write_model

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.names import TensorRole, classify, find_head, role_of
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.slots import Slot, fusion_remark, slots_of

Saved = Callable[[str], Path]


def roles_in(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Kind and module by name, the second layer left out."""
    roles: Mapping[str, TensorRole] = classify(checkpoint)
    return {
        name: (role.kind, role.module) for name, role in roles.items() if role.layer in {None, 0}
    }


def linear_modules(checkpoint: Checkpoint) -> set[str]:
    return {m for kind, m in roles_in(checkpoint).values() if kind == "block_linear"}


def test_llama(saved_model: Saved) -> None:
    with open_checkpoint(saved_model("llama")) as checkpoint:
        roles = roles_in(checkpoint)
        assert roles["model.embed_tokens.weight"] == ("embedding", "embed_tokens")
        assert roles["lm_head.weight"] == ("head", "lm_head")
        assert roles["model.norm.weight"] == ("norm", "norm")
        assert roles["model.layers.0.input_layernorm.weight"] == ("norm", "input_layernorm")
        assert linear_modules(checkpoint) == {
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        }  # fmt: skip
        assert {role.layer for role in classify(checkpoint).values()} == {None, 0, 1}


def test_tied_models_store_no_head(saved_model: Saved) -> None:
    with open_checkpoint(saved_model("llama-tied")) as checkpoint:
        assert "head" not in {kind for kind, _ in roles_in(checkpoint).values()}


def test_qwen2_biases(saved_model: Saved) -> None:
    with open_checkpoint(saved_model("qwen2")) as checkpoint:
        roles = roles_in(checkpoint)
        assert roles["model.layers.0.self_attn.q_proj.bias"] == ("bias", "q_proj")
        assert roles["model.layers.0.self_attn.q_proj.weight"] == ("block_linear", "q_proj")


def test_gpt2_is_stored_transposed(saved_model: Saved) -> None:
    with open_checkpoint(saved_model("gpt2")) as checkpoint:
        assert linear_modules(checkpoint) == {"c_attn", "c_proj", "c_fc"}
        roles = roles_in(checkpoint)
        assert (
            roles["transformer.wte.weight"][0] == roles["transformer.wpe.weight"][0] == "embedding"
        )
        assert roles["transformer.h.0.ln_1.weight"] == ("norm", "ln_1")
        assert roles["transformer.ln_f.weight"] == ("norm", "ln_f")
        assert roles["transformer.h.0.ln_1.bias"][0] == "bias"
        name = "transformer.h.0.mlp.c_fc.weight"
        assert slots_of(checkpoint, name) == (Slot(name, name, "c_fc", 0, transposed=True),)
        name = "transformer.h.0.attn.c_attn.weight"
        assert checkpoint.tensors[name].shape == (16, 48)
        assert slots_of(checkpoint, name) == tuple(
            Slot(f"{name}[{part}]", name, part, 0, rows=rows, transposed=True)
            for part, rows in (("q_proj", (0, 16)), ("k_proj", (16, 32)), ("v_proj", (32, 48)))
        )


def test_phi3_is_split_as_its_own_code_splits_it(saved_model: Saved) -> None:
    with open_checkpoint(saved_model("phi3")) as checkpoint:
        name = "model.layers.1.self_attn.qkv_proj.weight"
        assert slots_of(checkpoint, name) == tuple(
            Slot(f"{name}[{part}]", name, part, 1, rows=rows)
            for part, rows in (("q_proj", (0, 16)), ("k_proj", (16, 24)), ("v_proj", (24, 32)))
        )
        name = "model.layers.0.mlp.gate_up_proj.weight"
        assert [(slot.module, slot.rows) for slot in slots_of(checkpoint, name)] == [
            ("gate_proj", (0, 24)),
            ("up_proj", (24, 48)),
        ]


def test_an_interleaved_projection_stays_whole_and_says_so(saved_model: Saved) -> None:
    with open_checkpoint(saved_model("gpt_neox")) as checkpoint:
        name = "gpt_neox.layers.0.attention.query_key_value.weight"
        slots = slots_of(checkpoint, name)
        assert [slot.rows for slot in slots] == [None]
        assert "interleaved" in fusion_remark(role_of(checkpoint.tensors[name]), slots)
        assert roles_in(checkpoint)["embed_out.weight"][0] == "head"
        assert roles_in(checkpoint)["gpt_neox.embed_in.weight"][0] == "embedding"


def test_mixtral_routers_are_no_linear_layers(saved_model: Saved) -> None:
    with open_checkpoint(saved_model("mixtral")) as checkpoint:
        kinds = {name: kind for name, (kind, _) in roles_in(checkpoint).items()}
        routers = [name for name, kind in kinds.items() if kind == "router"]
        assert len(routers) == 1 and "gate.weight" in routers[0]
        experts = [name for name in kinds if ".experts." in name]
        assert experts and all(kinds[name] == "block_linear" for name in experts)


@pytest.mark.parametrize(
    ("config", "rows", "split"),
    [
        ({"model_type": "falcon", "multi_query": True}, 8 + 2 * 4, True),
        ({"model_type": "falcon", "multi_query": False}, 24, False),
        ({"model_type": "falcon", "new_decoder_architecture": True}, 24, False),
        ({"model_type": "bloom", "n_head": 2}, 24, False),
    ],
)
def test_fused_attention_of_other_families(
    tmp_path: Path, config: dict[str, object], rows: int, split: bool
) -> None:
    name = "transformer.h.0.self_attention.query_key_value.weight"
    plain = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    write_model(tmp_path, {name: torch.ones(rows, 8)}, config={**plain, **config})
    with open_checkpoint(tmp_path) as checkpoint:
        slots = slots_of(checkpoint, name)
    assert len(slots) == (3 if split else 1)
    if split:
        assert [slot.rows for slot in slots] == [(0, 8), (8, 12), (12, 16)]


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kind"),
    [
        ("model.layers.3.self_attn.rotary_emb.inv_freq", (4,), torch.float32, "buffer"),
        ("transformer.h.0.attn.bias", (1, 1, 8, 8), torch.float32, "buffer"),
        ("transformer.h.0.attn.masked_bias", (), torch.float32, "buffer"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (3, 8), torch.float32, "bias"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (3,), torch.float32, "router"),
        ("model.layers.0.block_sparse_moe.router.layer.weight", (3, 8), torch.float32, "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), torch.float32, "router"),
        ("model.layers.0.self_attn.q_norm.weight", (4,), torch.float32, "norm"),
        ("model.layers.0.mixer.A_log", (8, 4), torch.float32, "other"),
        ("model.layers.0.mixer.conv1d.weight", (8, 1, 4), torch.float32, "other"),
        ("model.layers.0.mixer.D", (8,), torch.float32, "other"),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), torch.int8, "buffer"),
        ("model.visual.blocks.0.attn.proj.weight", (8, 8), torch.float32, "other"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", (8, 8), torch.float32, "other"),
        ("model.language_model.layers.0.mlp.up_proj.weight", (8, 8), torch.float32, "block_linear"),
        ("score.weight", (2, 8), torch.float32, "other"),
        ("model.vision_tower.encoder.layers.0.norm1.weight", (8,), torch.float32, "other"),
        ("model.qformer.encoder.layer.0.output.dense.weight", (8, 8), torch.float32, "other"),
        ("model.layers.0.self_attn.indexer.wk.weight", (8, 8), torch.float32, "router"),
        ("model.layers.0.altup.modality_router.weight", (4, 8), torch.float32, "router"),
        ("model.layers.1.mlp.expert_bias", (4,), torch.float32, "router"),
        ("model.layers.0.mlp.e_score_correction_bias", (4,), torch.float32, "router"),
        ("transformer.attentions.0.q_lin.weight", (8, 8), torch.float32, "block_linear"),
        ("transformer.ffns.1.lin1.weight", (8, 8), torch.float32, "block_linear"),
        ("model.layers.0.mlp.shared_experts.up_proj", (2, 4, 8), torch.float32, "block_linear"),
        ("model.layers.0.mamba.x_proj_weight", (2, 4, 8), torch.float32, "block_linear"),
        ("backbone.layers.0.mixer.in_proj.weight", (8, 8), torch.float32, "block_linear"),
        ("backbone.layers.0.mixer.dt_proj.weight", (8, 2), torch.float32, "block_linear"),
        ("rwkv.blocks.0.attention.time_mix_key", (1, 1, 8), torch.float32, "other"),
        ("transformer.tokens_embed.weight", (9, 8), torch.float32, "embedding"),
        ("model.llm.embed.weight", (9, 8), torch.float32, "embedding"),
        ("model.audio_tower.embed_positions.weight", (9, 8), torch.float32, "other"),
        ("head.weight", (9, 8), torch.float32, "head"),
        ("model.llm.unembed.weight", (9, 8), torch.float32, "head"),
        ("cls.predictions.decoder.weight", (9, 8), torch.float32, "head"),
        ("bert.encoder.layer.0.output.dense.weight", (8, 8), torch.float32, "block_linear"),
    ],
)
def test_kinds_by_name(name: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    spelling = {torch.float32: "F32", torch.int8: "I8"}[dtype]
    assert role_of(TensorInfo(name, spelling, shape, Path(), 0, 0)).kind == kind


def test_the_outermost_head_is_the_models() -> None:
    def heads(*names: str) -> str | None:
        return find_head({n: TensorInfo(n, "F32", (9, 8), Path(), 0, 0) for n in names})

    assert heads("model.patcher.lm_head.weight", "lm_head.weight") == "lm_head.weight"
    assert heads("head.weight", "model.layers.0.attn.head.weight") == "head.weight"
    assert heads("a.lm_head.weight", "b.lm_head.weight") is None
    assert heads("model.norm.weight") is None
