"""Hub ids that lead nowhere, through the real command and a real server on the loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli_support import model
from support.hub_server import Hub, Repository, serve
from support.refusal_support import refused, repair, untouched

COMMIT = "c" * 40
SECRET = "hf_thisisasecrettoken"


def _files(**changes: bytes) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in model("aligned").iterdir()}
    return found | {name.replace("__", "."): content for name, content in changes.items()}


def _only(*names: str) -> dict[str, bytes]:
    return {"config.json": b"{}", **dict.fromkeys(names, b"")}


def _fp8() -> bytes:
    config = json.loads((model("aligned") / "config.json").read_text())
    return json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    def repository(files: dict[str, bytes], **access: object) -> Repository:
        return Repository({COMMIT: files}, {"main": COMMIT}, **access)  # type: ignore[arg-type]

    content = Hub(
        {
            "org/aligned": repository(_files()),
            "org/private": repository(_files(), token="hf_other"),
            "org/gated": repository(_files(), token="hf_other", gated=True),
            "org/gguf": repository(_only("model-Q4.gguf")),
            "org/pickle": repository(_only("pytorch_model.bin")),
            "org/flax": repository(_only("flax_model.msgpack")),
            "org/mistral": repository(_only("consolidated.safetensors", "params.json")),
            "org/fp8": repository(_files(config__json=_fp8())),
            "org/cut": repository(_files(model__safetensors=_files()["model.safetensors"][:-9])),
        }
    )
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with serve(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


CASES: dict[str, tuple[str, str]] = {
    "org/none": ("no model org/none on the Hub that you can see", "HF_TOKEN"),
    "org/private": ("no model org/private on the Hub that you can see", "HF_TOKEN"),
    "org/gated": ("org/gated is gated and this token has no access", "request access"),
    "org/aligned@v9": ("org/aligned has no revision v9", "branch, tag or commit"),
    f"org/aligned@{'d' * 40}": (f"org/aligned has no revision {'d' * 40}", "branch"),
    "hf://org/aligned/sub": ("holds no safetensors weights", "subfolder"),
    "org/gguf": ("org/gguf holds GGUF weights", "original checkpoint"),
    "org/pickle": ("RA040: org/pickle holds only pickle weights", "isolated"),
    "org/flax": ("org/flax holds Flax weights", "save_pretrained"),
    "org/mistral": ("org/mistral holds its weights as consolidated", "Hugging Face layout"),
    "org/fp8": ("is quantised (FP8", "dequantize=True"),
    "org/cut": ("RA013", "download"),
    "no-such-model": ("no-such-model does not exist", "org/name"),
    "org/a/b": ("org/a/b does not exist", ""),
    "hf://nothing": ("hf://nothing does not exist", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_an_id_that_leads_nowhere(hub: Hub, tmp_path: Path, name: str) -> None:
    message, hint = CASES[name]
    with untouched():
        result = repair(tmp_path / "work" / "out", aligned=name)
    refused(result, message, hint)
    assert SECRET not in result.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("status", "says"), [(401, "denied"), (403, "denied"), (500, "HTTP 500"), (503, "HTTP 503")]
)
def test_a_hub_that_refuses_everything(hub: Hub, tmp_path: Path, status: int, says: str) -> None:
    hub.broken = status
    refused(repair(tmp_path / "out", aligned="org/aligned"), "org/aligned", says)


def test_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    result = repair(tmp_path / "out", aligned="org/aligned")
    refused(result, "cannot be reached for org/aligned", "HF_HUB_OFFLINE=1")


def test_offline_and_not_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    result = repair(tmp_path / "out", None, "--offline", aligned="org/aligned")
    refused(result, "org/aligned is not in the local cache", "hf download org/aligned")
    assert hub.requests == []


def test_a_cached_repair_by_id_equals_the_one_by_path(hub: Hub, tmp_path: Path) -> None:
    """The cache holds links to blobs; and a fetched model is found again without a network."""
    for name, options in (("one", ()), ("two", ("--offline",))):
        result = repair(tmp_path / name, None, *options, aligned="org/aligned")
        assert result.exit_code == 0, result.stderr
    repair(tmp_path / "plain")
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == plain
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == plain
