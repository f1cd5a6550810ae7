"""Options that two commands share stand once, and reach both as they were given."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from typer.main import get_command

from realign_cli.main import app
from realign_cli.repair_options import MachineOptions, RepairOptions


def parameters(name: str) -> dict[str, Any]:
    whole: Any = get_command(app)
    return {each.name: each for each in whole.commands[name].params}


@pytest.mark.parametrize("group", [RepairOptions, MachineOptions])
def test_repair_and_tune_have_the_same_options(group: Any) -> None:
    repair, tune = parameters("repair"), parameters("tune")
    for field in dataclasses.fields(group):
        one, other = repair[field.name], tune[field.name]
        assert (one.opts, one.help, one.default) == (other.opts, other.help, other.default)
        assert one.help and one.default == field.default


def test_values_reach_the_request() -> None:
    machine = MachineOptions(device="cpu", seed=3, offline=True)
    options = RepairOptions(
        aligned="a", safety_model="s", settings=["eta=0.9"], safety_vector="base", also=["x"]
    )
    request = options.request("f", machine, patch=True)
    assert (request.finetuned, request.aligned, request.safety) == ("f", "a", "s")
    assert list(request.settings) == ["eta=0.9", "safety_vector=base"]
    assert (request.device, request.seed, request.offline, request.offload) == (
        "cpu",
        3,
        True,
        False,
    )
    assert request.patch and request.also == ("x",)


def test_a_group_is_not_an_option() -> None:
    names = parameters("tune")
    assert not {"options", "machine"} & set(names)
