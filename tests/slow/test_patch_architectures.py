"""Patches over more architectures and strengths than every change can wait for."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.expert_support import CONFIGS, make_experts
from support.patch_support import check_patch, roles_of
from support.repair_support import make_trio


@pytest.mark.parametrize("arch", CONFIGS)
def test_experts(tmp_path: Path, arch: str) -> None:
    check_patch(make_experts(tmp_path, arch), tmp_path, strength=0.3)


@pytest.mark.parametrize("shards", ["50GB", "20KB"])
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "qwen2"])
def test_dense_models(tmp_path: Path, arch: str, strength: float, shards: str) -> None:
    trio = make_trio(tmp_path / "family", arch, max_shard_size=shards)
    check_patch(roles_of(trio), tmp_path, strength=strength)
