"""Hub ids against a real server on the loopback: pinned once, only what is needed, then offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support.checkpoint_support import LLAMA, Notes, llama_tensors
from support.hub_server import Hub, Repository, serve

from realign.checkpoint.hub import wanted_files
from realign.checkpoint.reader import open_checkpoint
from realign.errors import CheckpointError, NotFoundError

OLD, NEW = "a" * 40, "b" * 40
TENSORS = llama_tensors()
EXTRA = {
    "README.md": b"---\nbase_model: org/base\n---\n",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/tool.jinja": b"t",
    "modeling.py": b"raise SystemExit",
    ".gitattributes": b"",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"pickle",
    "consolidated.safetensors": b"other",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "picture.png": b"png",
}


def single(**metadata: str) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(LLAMA).encode(),
        "model.safetensors": save(TENSORS, metadata={"format": "pt", **metadata}),
        **EXTRA,
    }


def sharded() -> dict[str, bytes]:
    names = list(TENSORS)
    files: dict[str, bytes] = {"config.json": json.dumps(LLAMA).encode()}
    weight_map: dict[str, str] = {}
    for i, group in enumerate((names[:6], names[6:]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        files[file] = save({name: TENSORS[name] for name in group})
        weight_map.update(dict.fromkeys(group, file))
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files


def renamed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same with shards that bear no number, and a file that belongs to none."""
    text = files["model.safetensors.index.json"].decode()
    for i, name in enumerate(("left", "right"), start=1):
        old = f"model-0000{i}-of-00002.safetensors"
        files[f"{name}.safetensors"] = files.pop(old)
        text = text.replace(old, f"{name}.safetensors")
    files["stray.safetensors"] = b"not fetched"
    return {**files, "model.safetensors.index.json": text.encode()}


def named_by_config() -> dict[str, bytes]:
    config = json.dumps({**LLAMA, "transformers_weights": "other.safetensors"}).encode()
    return {
        **single(),
        "config.json": config,
        "other.safetensors": save(TENSORS),
        "model.safetensors": b"not fetched",
    }


def without_a_shard() -> dict[str, bytes]:
    files = sharded()
    del files["model-00002-of-00002.safetensors"]
    return files


def quantised() -> dict[str, bytes]:
    config = {**LLAMA, "quantization_config": {"quant_method": "fp8"}}
    return {**sharded(), "config.json": json.dumps(config).encode()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    content = Hub(
        {
            "org/one": Repository({OLD: single(), NEW: single(v="2")}, {"main": NEW, "v1": OLD}),
            "org/many": Repository({NEW: sharded()}, {"main": NEW}),
            "org/secret": Repository({NEW: single()}, {"main": NEW}, token="hf_right"),
            "org/gated": Repository({NEW: single()}, {"main": NEW}, token="hf_right", gated=True),
            "org/gguf": Repository({NEW: {"m.gguf": b"", "README.md": b""}}, {"main": NEW}),
            "org/pickle": Repository(
                {NEW: {"config.json": b"{}", "pytorch_model.bin": b""}}, {"main": NEW}
            ),
            "org/odd": Repository({NEW: renamed(sharded())}, {"main": NEW}),
            "org/named": Repository({NEW: named_by_config()}, {"main": NEW}),
            "org/hole": Repository({NEW: without_a_shard()}, {"main": NEW}),
            "org/fp8": Repository({NEW: quantised()}, {"main": NEW}),
            "org/nested": Repository(
                {NEW: {f"sub/{name}": data for name, data in single().items()}}, {"main": NEW}
            ),
        }
    )
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serve(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_branch_is_pinned_once_and_only_what_is_needed_is_fetched(hub: Hub) -> None:
    progress = Notes()
    with open_checkpoint("org/one", progress=progress) as checkpoint:
        assert (checkpoint.commit, checkpoint.source) == (NEW, "org/one")
        assert torch.equal(checkpoint.read("lm_head.weight"), TENSORS["lm_head.weight"])
        names = {
            p.relative_to(checkpoint.folder).as_posix() for p in checkpoint.folder.rglob("*.*")
        }
    assert names == {
        "config.json", "model.safetensors", "README.md", "tokenizer.json", "chat_template.jinja",
        "additional_chat_templates/tool.jinja", "modeling.py",
    }  # fmt: skip
    lookups = [r for r in hub.requests if "api/models" in r]
    assert lookups == ["GET api/models/org/one"]
    # The client asks for other things of its own; what counts is what it asks of this repository.
    others = [r for r in hub.requests if "org/one" in r and r not in lookups]
    assert others and not [each for each in others if f"/resolve/{NEW}/" not in each]
    assert progress.done == sum(len(single(v="2")[name]) for name in names)
    assert progress.notes == [f"org/one: commit {NEW}"]


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision(hub: Hub, revision: str) -> None:
    with open_checkpoint(f"hf://org/one@{revision}") as checkpoint:
        assert checkpoint.commit == OLD
        assert checkpoint.folder.name == OLD


def test_shards(hub: Hub) -> None:
    with open_checkpoint("org/many") as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
        assert len(checkpoint.weight_files) == 2


@pytest.mark.parametrize("name", ["org/odd", "org/named"])
def test_weights_under_other_names(hub: Hub, name: str) -> None:
    with open_checkpoint(name) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
    assert not [r for r in hub.requests if "stray" in r or r.endswith("/model.safetensors")]


@pytest.mark.parametrize(
    ("name", "says"), [("org/hole", "RA021"), ("org/fp8", "FineGrainedFP8Config")]
)
def test_what_small_files_rule_out_is_refused_before_weights_are_fetched(
    hub: Hub, name: str, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(name)
    assert not [r for r in hub.requests if r.endswith(".safetensors")]


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file, where the cache's folder must be")
    with pytest.raises(CheckpointError, match="cannot be stored in the Hub's cache") as caught:
        open_checkpoint("org/one")
    assert "HF_HOME" in caught.value.hint


def test_a_download_that_breaks_off(hub: Hub) -> None:
    hub.cut = "model.safetensors"
    with pytest.raises(CheckpointError, match="org/one") as caught:
        open_checkpoint("org/one")
    assert caught.value.hint
    hub.cut = ""
    with open_checkpoint("org/one") as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)


def test_a_folder_in_a_repository(hub: Hub) -> None:
    with open_checkpoint("hf://org/nested/sub") as checkpoint:
        assert checkpoint.commit == NEW and checkpoint.folder.name == "sub"
        assert set(checkpoint.tensors) == set(TENSORS)
    with pytest.raises(CheckpointError, match="no safetensors weights") as caught:
        open_checkpoint("org/nested")
    assert "hf://org/nested/sub" in caught.value.hint


def test_offline_the_cache_answers_and_no_socket_is_opened(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_checkpoint("org/one").close()
    open_checkpoint("org/one@v1").close()
    hub.requests.clear()
    with open_checkpoint("org/one", offline=True) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with open_checkpoint(f"org/one@{OLD}") as checkpoint:
        assert checkpoint.commit == OLD
    with pytest.raises(NotFoundError, match="not in the local cache") as caught:
        open_checkpoint("org/many@main")
    assert "hf download org/many --revision main" in caught.value.hint
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("org/none", "no model org/none on the Hub", "spelling"),
        ("org/one@nope", "no revision nope", "branch"),
        ("org/secret", "no model org/secret", "HF_TOKEN"),
        ("org/gated", "gated", "request access"),
        ("org/gguf", "GGUF", "original"),
        ("org/pickle", "never unpickles", "isolated"),
    ],
)
def test_what_cannot_be_had(hub: Hub, name: str, message: str, hint: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    assert message in caught.value.message and hint in caught.value.hint


def test_a_token_opens_doors(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    for name in ("org/secret", "org/gated"):
        open_checkpoint(name).close()


@pytest.mark.parametrize(("status", "message"), [(403, "denied"), (418, "HTTP 418")])
def test_a_server_that_answers_oddly(hub: Hub, status: int, message: str) -> None:
    hub.broken = status
    with pytest.raises(NotFoundError, match=message):
        open_checkpoint("org/one")


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    with pytest.raises(NotFoundError, match="cannot be reached") as caught:
        open_checkpoint("org/one")
    assert "HF_HUB_OFFLINE=1" in caught.value.hint


def test_the_weights_that_a_loader_would_take() -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    both = ["model.safetensors", "model.safetensors.index.json", *shards]
    assert wanted_files(both).weights == ("model.safetensors",)
    index = "model.safetensors.index.json"
    assert wanted_files([index, *shards, "consolidated.safetensors"]).all == (index, *shards)
    adapter = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
    assert wanted_files(adapter).all == ("adapter_config.json", "adapter_model.safetensors")
