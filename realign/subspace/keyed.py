"""Random numbers that belong to an entry of a tensor, not to the order in which it is visited.

Philox (Salmon et al. 2011) is a function of a key and a counter. The key is a hash of (seed,
method, tensor, role), the counter the entry's index, so that a mask is the same whatever the order
of shards, the size of chunks, the device or the number of threads.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_PER_COUNT = 4  # 64-bit words that Philox4x64 makes of one counter


def generator(*, seed: int, method: str, key: str, role: str) -> np.random.Generator:
    """Return the generator of one tensor in one role, at its beginning.

    Args:
        seed: of the run.
        method: whose draw it is.
        key: of the tensor or matrix.
        role: what is drawn, as "dare".
    """
    return np.random.Generator(_philox(seed, method, key, role))


def uniforms(count: int, *, seed: int, method: str, key: str, role: str, start: int = 0) -> Tensor:
    """Return U(0, 1) for the entries [start, start + count) of a tensor, float64 [count].

    Args:
        count: how many entries.
        seed: of the run.
        method: whose draw it is.
        key: of the tensor or matrix.
        role: what is drawn.
        start: entries before the first, in row-major order.
    """
    bits = _philox(seed, method, key, role)
    bits.advance(start // _PER_COUNT)
    skipped = start % _PER_COUNT
    drawn = np.random.Generator(bits).random(skipped + count)
    return torch.from_numpy(drawn[skipped:])


def _philox(seed: int, method: str, key: str, role: str) -> np.random.Philox:
    digest = hashlib.sha256(f"{seed}\0{method}\0{key}\0{role}".encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64).copy())
