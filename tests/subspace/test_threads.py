"""The number of threads is set inside and put back afterwards, also by an error."""

from __future__ import annotations

import pytest
import torch

from realign.subspace.threads import torch_threads


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="x"), torch_threads(2):
        raise ValueError("x")
    assert torch.get_num_threads() == before
