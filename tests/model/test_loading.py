"""Folders and adapters as running models, and the ways they fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.model_support import TEMPLATE, WORDS, llama, save, word_tokenizer
from transformers.utils import logging as transformers_logging

from realign.checkpoint.reader import open_checkpoint
from realign.errors import CheckpointError, ModelError, NotFoundError, UsageError
from realign.model.batching import forward, pad_left
from realign.model.devices import pick_device
from realign.model.loading import load_model, read_chat_template


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("original") / "model", llama())


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_load_gives_the_saved_model(original: Path) -> None:
    loaded = load_model(original, device="cpu")
    assert loaded.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.device == torch.device("cpu")
    tokenizer = word_tokenizer()
    assert loaded.stop_ids == tuple(sorted(tokenizer.convert_tokens_to_ids(["<eos>", "<end>"])))
    ids = torch.tensor([[2, 8, 9]])
    assert torch.equal(loaded.model(ids).logits, llama()(ids).logits)


def test_dtype_on_disk_wins_over_what_the_config_says(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", llama().to(torch.bfloat16))
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder, device="cpu").dtype == torch.bfloat16
    assert load_model(folder, device="cpu", dtype=torch.float32).dtype == torch.float32


def test_stop_ids_are_the_union(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    assert load_model(folder, device="cpu").stop_ids == (3, 6, 9, 11)


def test_an_unreadable_generation_config_is_ignored(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    assert load_model(folder, device="cpu").stop_ids == (3, 6)


def test_template_from_another_folder(folder: Path, original: Path) -> None:
    word_tokenizer(template=None).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert load_model(folder, device="cpu").chat_template_sha256 is None
    with pytest.raises(ModelError, match="no chat template"):
        read_chat_template(folder)
    given = load_model(folder, device="cpu", template_from=original)
    assert given.tokenizer.chat_template == TEMPLATE
    assert given.chat_template_sha256 == load_model(original, device="cpu").chat_template_sha256


def test_unload_frees_the_weights(original: Path) -> None:
    with load_model(original, device="cpu") as loaded:
        assert next(loaded.model.parameters()).device.type == "cpu"
    assert {p.device.type for p in loaded.model.parameters()} == {"meta"}


def test_loading_is_silent_and_leaves_the_loggers_alone(
    original: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    try:
        load_model(original, device="cpu")
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_not_a_folder_and_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        load_model(tmp_path / "absent", device="cpu")
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load_model(tmp_path, device="cpu")


def test_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="no-such-model"):
        load_model(folder, device="cpu")


def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(folder, device="cpu")
    assert not marker.exists()


def test_corrupt_and_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{ broken")
    with pytest.raises(ModelError, match="tokenizer in"):
        load_model(folder, device="cpu")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_model(folder, device="cpu")


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(folder, device="cpu")


def test_missing_weights_never_run_as_random_numbers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"layers\.2\..*more"):
        load_model(folder, device="cpu")


def test_misshapen_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 44
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, device="cpu")


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load_model(folder, device="cpu")


def _adapter(folder: Path, base: Path, *, seed: int = 3) -> Path:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(folder)
    return _name_base(folder, str(base))


def _name_base(adapter: Path, base: str) -> Path:
    # set afterwards: peft asks the Hub about a base that it does not find
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def test_an_adapter_runs_unmerged_on_its_base(original: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = _adapter(tmp_path / "adapter", original)
    loaded = load_model(adapter, device="cpu")
    ids = torch.tensor([[2, 8, 9, 10]])
    expected = peft.PeftModel.from_pretrained(llama(), adapter).eval()(ids).logits
    assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-6)
    assert not torch.allclose(llama()(ids).logits, expected, atol=1e-2)
    # module names are those of the base, so that statistics find them
    module = loaded.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert hasattr(module, "base_layer")


def test_an_adapter_without_a_local_base(original: Path, tmp_path: Path) -> None:
    adapter = _name_base(_adapter(tmp_path / "adapter", original), "somebody/something")
    with pytest.raises(NotFoundError, match="somebody/something"):
        load_model(adapter, device="cpu")
    # named in the address, or opened by the caller
    by_name = load_model(f"{original}+{adapter}", device="cpu")
    with open_checkpoint(original) as base, open_checkpoint(adapter, adapter_base=base) as both:
        by_checkpoint = load_model(both, device="cpu")
    ids = torch.tensor([[2, 8, 9, 10]])
    assert torch.equal(by_name.model(ids).logits, by_checkpoint.model(ids).logits)


def test_an_adapter_and_its_merged_reading_agree(original: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", original)
    with open_checkpoint(adapter) as checkpoint:
        running = load_model(checkpoint, device="cpu")
        merged = llama()
        merged.load_state_dict({name: checkpoint.read(name) for name in checkpoint.tensors})
    ids = torch.tensor([[2, 8, 9, 10]])
    assert torch.allclose(running.model(ids).logits, merged(ids).logits, atol=1e-5)


def test_an_adapter_on_an_adapter(original: Path, tmp_path: Path) -> None:
    first = _adapter(tmp_path / "first", original)
    second = _adapter(tmp_path / "second", first)
    with (
        open_checkpoint(first) as base,
        open_checkpoint(second, adapter_base=base) as both,
        pytest.raises(ModelError, match="adapter on an adapter"),
    ):
        load_model(both, device="cpu")


def test_an_adapter_that_extends_the_vocabulary(original: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    model.resize_token_embeddings(50, mean_resizing=False)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter += torch.randn_like(parameter) * 0.1 * parameter.requires_grad
    wrapped.save_pretrained(tmp_path / "adapter")
    _name_base(tmp_path / "adapter", str(original))
    word_tokenizer(words=(*WORDS, "new1", "new2")).save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[2, 8, 48, 49]])
    expected = wrapped.eval()(ids).logits
    loaded = load_model(tmp_path / "adapter", device="cpu")
    assert loaded.vocabulary_rows == 50
    assert len(loaded.tokenizer) == 50
    assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-5)


def test_an_adapter_with_missing_weights(original: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = _adapter(tmp_path / "adapter", original)
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks adapter weights"):
        load_model(adapter, device="cpu")


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(UsageError, match="not available"):
        pick_device("cuda:99")
    with pytest.raises(UsageError, match="unknown device"):
        pick_device("gpu")


def test_padding_leaves_the_real_positions_alone() -> None:
    model = llama()
    sequences = [[2, 8, 9, 10, 11], [2, 12]]
    batch = pad_left(sequences, [0, 1], pad_id=0, device=torch.device("cpu"))
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    together = forward(model, batch, last=1).logits[:, -1]
    alone = [model(torch.tensor([s])).logits[0, -1] for s in sequences]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_a_merged_adapter_is_part_of_the_weights(original: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", original)
    merged = load_model(adapter, device="cpu", merge=True).model
    beside = load_model(adapter, device="cpu").model
    names = [name for name, _ in merged.named_parameters()]
    assert names == [name for name, _ in llama().named_parameters()]
    ids = torch.arange(4, 12)[None]
    assert torch.allclose(merged(ids).logits, beside(ids).logits, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in merged.parameters())
