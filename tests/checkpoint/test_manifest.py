"""Digests against fixed vectors, manifests that cannot be read, commands without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.checkpoint.manifest import (
    MANIFEST_NAME,
    content_digest,
    read_manifest,
    redact_command,
    sha256_file,
)
from realign.errors import CheckpointError


def test_the_digest_of_a_known_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}\n")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    digest = "6d03a9e7a8e9290ef9a7871fc098667150ad6dc0aeae42d4c0e5609e9f545a0a"
    assert content_digest(tmp_path) == digest
    for name in ("README.md", ".gitattributes", "model.sig", ".git/HEAD", ".cache/a/b",
                 "realign-audit/audit.json", ".eval_results/x.yaml"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left out")
    assert content_digest(tmp_path) == digest
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "README.md").write_text("counted")
    assert content_digest(tmp_path) != digest


def test_a_file_is_hashed_in_chunks(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    seen: list[float] = []
    assert sha256_file(path, seen.append).startswith("ba7816bf8f01cfea414140de5dae2223")
    assert sum(seen) == 3


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "realign/repair-manifest/9"}'])
def test_a_manifest_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"realign\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("repair ./m -o out", "repair ./m -o out"),
        ("--token abc x", "--token *** x"),
        ("--hub-token=abc x", "--hub-token=*** x"),
        ("HF_TOKEN=abc realign", "HF_TOKEN=*** realign"),
        ("--set api_key=abc", "--set api_key=***"),
        ("https://me:pa@ss@host:1/m?a=1", "https://host:1/m?a=1"),
        ("https://host/m?token=abc&a=1", "https://host/m?token=***&a=1"),
        ("--judge=https://me@host/m@v1", "--judge=https://host/m@v1"),
        (f"x/hf_{'a' * 34}/y", "x/***/y"),
        # What only looks alike stays.
        ("--max-new-tokens 40 --set tokens=all", "--max-new-tokens 40 --set tokens=all"),
        ("hf://gpt2@main hf://org/name@main org/name@main",) * 2,
        ("./token ./secret", "./token ./secret"),
        ("--token", "--token"),
    ],
)
def test_a_recorded_command_holds_no_secrets(typed: str, recorded: str) -> None:
    assert redact_command(typed.split()) == tuple(recorded.split())
