"""What may be put beside an output, and what a loader would take up in place of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoint_support import llama_tensors, write_model

from realign.checkpoint.hub import wanted_files
from realign.checkpoint.manifest import MANIFEST_NAME, MANIFEST_SCHEMA, sha256_file
from realign.checkpoint.sidecars import has_vocabulary, is_tokenizer
from realign.checkpoint.verification import verify_output


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "out", llama_tensors())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ 1 }}")
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in folder.rglob("*")
        if path.is_file()
    }
    manifest = {"schema": MANIFEST_SCHEMA, "output": {"files": files}}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


def problems(output: Path) -> list[str]:
    return [str(problem) for problem in verify_output(output).problems]


TOKENIZERS = [
    "tekken.json", "qwen.tiktoken", "source.spm", "spm.model", "spiece.model",
    "tokenizer.model.v3", "tokenizer.model.v11m1", "tokenizer.mm.model", "vocab.bpe", "bpe.codes",
    "vocab.json", "entity_vocab.json", "vocab-src.json", "vocab.txt", "merges.txt", "dict.txt",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "prophetnet.tokenizer", "byte_maps.json",
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *TOKENIZERS, "Tokenizer.JSON", "params.json", "generation_config.json",
        "adapter_config.json", "preprocessor_config.json", "quantize_config.json",
        "config_sentence_transformers.json", "configuration.json", "modules.json",
        "chat_template.jinja", "chat_template.json", "additional_chat_templates/evil.jinja",
        "custom_generate/generate.py", "custom_generate/requirements.txt", "modeling_evil.py",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.json", "model-00003-of-00003.safetensors", "model.Q4_K_M.gguf",
        "pytorch_model.bin", "consolidated.00.pth", "weights.npz", "rust_model.ot",
        "tf_model.h5", "adapter_model.safetensors", "original/params.json",
    ],
)  # fmt: skip
def test_an_added_file_that_a_loader_takes_up_is_a_problem(output: Path, name: str) -> None:
    assert problems(output) == []
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("x")
    assert problems(output) == [f"{name} was added since"]


@pytest.mark.parametrize(
    "name",
    ["README.md", "audit.json", "report.html", "items.jsonl", "notes.txt", "model.sig",
     "pictures/rates.png", "vocabulary.md", ".git/config.json", "realign-audit/config.json",
     ".cache/huggingface/download/config.json"],
)  # fmt: skip
def test_what_no_loader_takes_up_may_be_added(output: Path, name: str) -> None:
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("x")
    assert problems(output) == []


@pytest.mark.parametrize("name", ["additional_chat_templates", "custom_generate", "notes"])
def test_a_link_to_a_folder_is_a_problem(output: Path, name: str) -> None:
    elsewhere = output.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tool.jinja").write_text("{{ 1 }}")
    replaced = (output / name).is_dir()
    if replaced:  # even where the files behind the link are the same
        (output / name / "tool.jinja").unlink()
        (output / name).rmdir()
    (output / name).symlink_to(elsewhere, target_is_directory=True)
    link = f"{name} is a link to a folder, which realign never writes"
    assert link in problems(output)
    assert problems(output) == ([f"{name}/tool.jinja is missing"] if replaced else []) + [link]


def test_a_link_inside_of_a_folder_and_an_added_link_to_a_file(output: Path) -> None:
    (output.parent / "evil.jinja").write_text("x")
    (output / "chat_template.jinja").symlink_to(output.parent / "evil.jinja")
    (output / "additional_chat_templates" / "more").symlink_to(output.parent)
    (output / ".git").symlink_to(output.parent)
    assert problems(output) == [
        "chat_template.jinja was added since",
        "additional_chat_templates/more is a link to a folder, which realign never writes",
    ]


def test_one_list_says_what_a_tokenizer_is() -> None:
    assert all(map(is_tokenizer, TOKENIZERS))
    assert not any(map(is_tokenizer, ["config.json", "notes.txt", "README.md", "modeling_x.py"]))
    assert has_vocabulary(["config.json", "tokenizer.model.v3"])
    assert has_vocabulary(["tokenization_x.py"])
    assert not has_vocabulary(["config.json", "tokenizer_config.json", "modeling_x.py"])


def test_every_tokenizer_is_downloaded_with_its_model() -> None:
    files = ["config.json", "model.safetensors", "tokenization_x.py", *TOKENIZERS]
    assert set(wanted_files([*files, "pytorch_model.bin"]).all) == set(files)
