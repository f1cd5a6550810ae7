"""A checkpoint that a method lacks is proposed from what the fine-tune's files name."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.errors import UsageError
from realign.repair.plan import plan
from realign.repair.request import RepairRequest

SMALL = Path(__file__).parents[2] / "fixtures" / "small"


def test_the_base_of_an_adapter_is_proposed_as_aligned(tmp_path: Path) -> None:
    request = RepairRequest(finetuned=SMALL / "lora_p5", method="wise_ft", output=tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        plan(request)
    assert f"--aligned {(SMALL / 'aligned').resolve()}" in caught.value.hint


def test_without_a_name_in_the_files_the_option_is_asked_for(tmp_path: Path) -> None:
    request = RepairRequest(finetuned=SMALL / "both_p5", method="wise_ft", output=tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        plan(request)
    assert caught.value.hint == "give its folder or Hub id: --aligned ..."
