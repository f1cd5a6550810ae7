"""Adapters read as merged checkpoints, against peft's own merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from realign.checkpoint import lora as lora_module
from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.reader import open_checkpoint
from realign.errors import CheckpointError, MismatchError, NotFoundError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.other.PeftWarning")
    if hasattr(peft.utils.other, "PeftWarning")
    else pytest.mark.filterwarnings("ignore::UserWarning"),
]

Saved = Callable[[str], Path]
ATTENTION = ["q_proj", "v_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "rank-stabilised": (
        "llama",
        {"r": 4, "lora_alpha": 7, "target_modules": ATTENTION, "use_rslora": True},
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"q_proj": 5, "layers.0.mlp.down_proj": 1},
        },
    ),
    "all-linear": ("qwen2", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "bias all": ("qwen2", {"r": 2, "target_modules": ATTENTION, "bias": "all"}),
    "bias lora_only": ("qwen2", {"r": 2, "target_modules": ATTENTION, "bias": "lora_only"}),
    "lora_bias": ("qwen2", {"r": 2, "target_modules": ATTENTION, "lora_bias": True}),
    "modules_to_save": (
        "llama",
        {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "trained norms": (
        "llama",
        {"r": 2, "target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "norm"]},
    ),
    "embeddings": ("llama", {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tokens": ("llama", {"r": 2, "target_modules": ATTENTION, "trainable_token_indices": [5, 2]}),
    "dora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_dora": True}),
    "dora embeddings": ("llama", {"r": 2, "target_modules": ["embed_tokens"], "use_dora": True}),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d dora": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "tied embeddings": ("llama-tied", {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("llama-tied", {"r": 2, "target_modules": ["lm_head", "q_proj"]}),
    "fused": ("phi3", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}


def train_like(model: Any, *, seed: int = 3) -> None:
    """Give every trainable parameter some other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.add_(noise.to(parameter.dtype))


def make_adapter(base: Path, out: Path, **config: Any) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    train_like(wrapped)
    wrapped.save_pretrained(out)
    return out


def merged_by_peft(base: Path, adapter: Path) -> tuple[dict[str, Tensor], Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return dict(merged.state_dict()), merged


@pytest.mark.parametrize("case", CASES)
def test_the_merge_is_pefts_bit_for_bit(saved_model: Saved, tmp_path: Path, case: str) -> None:
    family, config = CASES[case]
    base = saved_model(family)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    theirs, _ = merged_by_peft(base, adapter)
    plain = load_file(base / "model.safetensors")
    with open_checkpoint(adapter) as checkpoint:
        assert checkpoint.kind == "adapter" and isinstance(checkpoint, AdapterCheckpoint)
        changed: set[str] = set()
        for name, info in checkpoint.tensors.items():
            whole = checkpoint.read(name)
            assert (tuple(whole.shape), whole.dtype) == (info.shape, info.torch_dtype)
            assert torch.equal(whole, theirs[name]), name
            assert torch.equal(checkpoint.read(name, (0, info.shape[0])), whole)
            middle = (info.shape[0] // 3, info.shape[0] // 2)
            assert torch.equal(checkpoint.read(name, middle), whole[middle[0] : middle[1]])
            if name not in plain or not torch.equal(whole, plain[name]):
                changed.add(name)
        assert bool(checkpoint.remarks) == case.startswith("tied")
        assert changed, "the adapter changed nothing: the test shows nothing"
        missing = set(theirs) - set(checkpoint.tensors)
        assert missing <= {"lm_head.weight"}  # tied


@pytest.mark.parametrize("case", ["plain", "dora", "conv1d", "embeddings"])
def test_block_by_block_is_the_same_as_at_once(
    saved_model: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    family, config = CASES[case]
    adapter = make_adapter(saved_model(family), tmp_path / "adapter", **config)
    with open_checkpoint(adapter) as checkpoint:
        whole = {name: checkpoint.read(name) for name in checkpoint.tensors}
    monkeypatch.setattr(lora_module, "BLOCK_ELEMENTS", 16 * 5)
    with open_checkpoint(adapter) as checkpoint:
        for name, tensor in whole.items():
            parts = [
                checkpoint.read(name, (at, min(at + 3, len(tensor))))
                for at in range(0, len(tensor), 3)
            ]
            assert torch.allclose(torch.cat(parts), tensor, rtol=1e-6, atol=1e-7)
            assert torch.equal(torch.cat(parts), checkpoint.read(name))


def test_a_bfloat16_base_is_rounded_once(saved_model: Saved, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved_model("llama"), dtype=torch.bfloat16
    )
    model.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", r=4, target_modules=ATTENTION)
    theirs, _ = merged_by_peft(base, adapter)
    with open_checkpoint(adapter) as checkpoint:
        for name in checkpoint.tensors:
            assert checkpoint.read(name).dtype == torch.bfloat16
            assert torch.equal(checkpoint.read(name), theirs[name]), name


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 3]])).logits


def written(checkpoint: AdapterCheckpoint, folder: Path) -> Any:
    """The merged checkpoint saved by hand and loaded by transformers."""
    folder.mkdir()
    save_file(
        {name: checkpoint.read(name) for name in checkpoint.tensors},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, content in checkpoint.sidecars().items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
def test_training_one_side_of_a_tie_unties_it(
    saved_model: Saved, tmp_path: Path, modules: list[str]
) -> None:
    base = saved_model("llama-tied")
    adapter = make_adapter(
        base, tmp_path / "adapter", r=2, target_modules=["q_proj"], modules_to_save=modules
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    running = logits_of(peft.PeftModel.from_pretrained(model, adapter))
    with open_checkpoint(adapter) as checkpoint:
        assert isinstance(checkpoint, AdapterCheckpoint)
        assert checkpoint.config["tie_word_embeddings"] is False
        assert "lm_head.weight" in checkpoint.tensors
        loaded = written(checkpoint, tmp_path / "merged")
    assert torch.allclose(logits_of(loaded), running, atol=1e-5)


def test_a_resized_vocabulary_shows_in_shapes_and_config(
    saved_model: Saved, tmp_path: Path
) -> None:
    base = saved_model("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(35, mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=ATTENTION))
    train_like(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merged = wrapped.merge_and_unload()
    with open_checkpoint(tmp_path / "adapter") as checkpoint:
        assert isinstance(checkpoint, AdapterCheckpoint)
        assert checkpoint.config["vocab_size"] == 35
        assert checkpoint.tensors["lm_head.weight"].shape == (35, 16)
        for name, tensor in merged.state_dict().items():
            assert torch.equal(checkpoint.read(name), tensor), name
        loaded = written(checkpoint, tmp_path / "merged")
    assert torch.equal(logits_of(loaded), logits_of(merged))


def test_the_base_may_be_saved_without_its_prefix(saved_model: Saved, tmp_path: Path) -> None:
    adapter = make_adapter(saved_model("gpt2"), tmp_path / "adapter", **CASES["conv1d"][1])
    bare = tmp_path / "bare"
    bare.mkdir()
    tensors = load_file(saved_model("gpt2") / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        bare / "model.safetensors",
    )
    (bare / "config.json").write_bytes((saved_model("gpt2") / "config.json").read_bytes())
    with open_checkpoint(adapter) as one, open_checkpoint(f"{bare}+{adapter}") as two:
        for name in two.tensors:
            assert torch.equal(two.read(name), one.read(f"transformer.{name}"))


def test_where_the_base_is_looked_for(saved_model: Saved, tmp_path: Path) -> None:
    adapter = make_adapter(saved_model("llama"), tmp_path / "adapter", **CASES["plain"][1])
    config = adapter / "adapter_config.json"

    def name_base(value: Any) -> None:
        text = json.loads(config.read_text())
        config.write_text(json.dumps({**text, "base_model_name_or_path": value}))

    (tmp_path / "the base").symlink_to(saved_model("llama"))
    name_base("../the base")
    with open_checkpoint(adapter) as checkpoint:
        assert checkpoint.source == str(adapter)
        assert len(checkpoint.weight_files) == 2
    name_base(str(tmp_path / "gone"))
    with pytest.raises(NotFoundError) as caught:
        open_checkpoint(adapter)
    assert "the base of the adapter" in caught.value.message and "gone" in caught.value.message
    assert f"BASE+{adapter}" in caught.value.hint
    with open_checkpoint(saved_model("llama")) as base:  # given, so the config is not asked
        assert open_checkpoint(adapter, adapter_base=base).tensors
    name_base(None)
    with pytest.raises(NotFoundError, match="names no base model"):
        open_checkpoint(adapter)
    name_base(str(adapter))
    with pytest.raises(CheckpointError, match="names the adapter itself"):
        open_checkpoint(adapter)


def test_an_adapter_for_another_base(saved_model: Saved, tmp_path: Path) -> None:
    adapter = make_adapter(saved_model("llama"), tmp_path / "adapter", **CASES["plain"][1])
    with pytest.raises(MismatchError, match="does not have"):
        open_checkpoint(f"{saved_model('gpt2')}+{adapter}")
    wide = tmp_path / "wide"
    wide.mkdir()
    tensors = load_file(saved_model("llama") / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(16, 20)
    save_file(tensors, wide / "model.safetensors")
    (wide / "config.json").write_bytes((saved_model("llama") / "config.json").read_bytes())
    with pytest.raises(MismatchError, match=r"\[16, 16\].*\[16, 20\]"):
        open_checkpoint(f"{wide}+{adapter}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"peft_type": "PREFIX_TUNING"}, "type PREFIX_TUNING"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer replication"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": "many"}, "malformed"),
        ({"lora_alpha": None}, "malformed"),
        ({"r": 5}, "the config says rank 5"),
        ({"use_dora": True}, "magnitude is missing"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    saved_model: Saved, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    adapter = make_adapter(saved_model("llama"), tmp_path / "adapter", **CASES["plain"][1])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(adapter)
    assert message in caught.value.message and caught.value.hint


def test_damaged_adapter_files(saved_model: Saved, tmp_path: Path) -> None:
    adapter = make_adapter(saved_model("llama"), tmp_path / "adapter", **CASES["plain"][1])
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    some = next(name for name in tensors if "lora_A" in name)
    save_file({name: t for name, t in tensors.items() if name != some}, weights)
    with pytest.raises(CheckpointError, match="only one of lora_A and lora_B"):
        open_checkpoint(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(NotFoundError, match="only as a pickle"):
        open_checkpoint(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(NotFoundError, match=r"has no adapter_model\.safetensors"):
        open_checkpoint(adapter)


def test_sidecars_of_a_merge(saved_model: Saved, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in saved_model("llama").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (base / name).write_text("{}")
    (base / "chat_template.jinja").write_text("base")
    (base / "README.md").write_text("the base's card")
    adapter = make_adapter(base, tmp_path / "adapter", **CASES["plain"][1])
    (adapter / "README.md").unlink(missing_ok=True)

    def sources() -> dict[str, str]:
        with open_checkpoint(adapter) as checkpoint:
            found = checkpoint.sidecars()
        return {n: p.parent.name for n, p in found.items() if isinstance(p, Path)}

    expected = dict.fromkeys(
        ["chat_template.jinja", "config.json", "generation_config.json",
         "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"], "base",
    )  # fmt: skip
    assert sources() == expected
    (adapter / "README.md").write_text("card")
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates" / "tool.jinja").write_text("tool")
    found = sources()
    assert found.pop("README.md") == "adapter"
    assert found.pop("additional_chat_templates/tool.jinja") == "additional_chat_templates"
    assert "chat_template.jinja" not in found  # templates come from one side
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "tokenizer_config.json").write_text("{}")
    found = sources()
    assert found["tokenizer.json"] == "adapter" and "special_tokens_map.json" not in found
    assert found["config.json"] == "base"


def test_hashes_cover_both_sides(saved_model: Saved, tmp_path: Path) -> None:
    adapter = make_adapter(saved_model("llama"), tmp_path / "adapter", **CASES["plain"][1])
    with open_checkpoint(adapter) as checkpoint:
        hashes = checkpoint.file_hashes()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(hashes)
    assert {"base/model.safetensors", "base/config.json"} <= set(hashes)
