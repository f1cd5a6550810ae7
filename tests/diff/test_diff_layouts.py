"""The second checkpoint may be stored in another way: fused, stacked, under another prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.diff_support import difference
from support.layouts_support import (
    make_family,
    respelled,
    split_phi3,
    stack_experts,
    stack_experts_transposed,
    under,
)
from torch import Tensor


@pytest.mark.parametrize(
    ("arch", "respell"),
    [
        ("phi3", split_phi3),
        ("mixtral", stack_experts),
        ("mixtral", stack_experts_transposed),
        ("phi3", under("language_model.")),
    ],
    ids=["split", "stacked", "transposed", "prefix"],
)
def test_figures_do_not_depend_on_how_the_second_is_stored(
    tmp_path: Path, arch: str, respell: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    trio = make_family(tmp_path / "plain", arch)
    other = respelled(trio, tmp_path / "other", respell)
    plain = difference(trio.aligned, trio.finetuned)
    shown = difference(trio.aligned, other.finetuned)
    names = [row.name for row in plain.rows]
    assert [row.name for row in shown.rows] == names and set(shown.counts) == set(plain.counts)
    for one, two in zip(plain.rows, shown.rows, strict=True):
        # The same bits in the same pieces: the same sums, to the last digit.
        assert one.terms == two.terms and one.spectra == two.spectra, one.name
    assert any(str(other.finetuned) in remark for remark in shown.remarks), "how they pair is said"
