"""How many threads one operation of torch may use, for work that has threads of its own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Let torch use so many threads per operation; threads started inside inherit it.

    Small operations on many threads wait for each other more than they compute.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
