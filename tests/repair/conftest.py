from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.repair_support import Trio, make_trio

TrioOf = Callable[..., Trio]


@pytest.fixture(scope="session")
def trio_of(tmp_path_factory: pytest.TempPathFactory) -> TrioOf:
    """Families made once per run; nobody writes into them."""
    made: dict[tuple[object, ...], Trio] = {}

    def make(arch: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "50GB") -> Trio:
        key = (arch, dtype, max_shard_size)
        if key not in made:
            folder: Path = tmp_path_factory.mktemp(arch)
            made[key] = make_trio(folder, arch, dtype=dtype, max_shard_size=max_shard_size)
        return made[key]

    return make
