"""Activations of a model that is stored in another layout than the fine-tune."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.layouts_support import Respell, make_family, nested, respelled, split_phi3
from support.repair_support import read_folder
from torch import Tensor

from realign.checkpoint.slots import slot_shape
from realign.model.moments import MomentRequest
from realign.repair.engine import repair
from realign.repair.measured import moment_requests
from realign.repair.plan import plan_repair
from realign.repair.request import RepairRequest, open_inputs

FAMILY = Path(__file__).parents[2] / "fixtures" / "small"


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Llama as Phi-3 stores it."""
    whole = {"q_proj": ("qkv_proj", "qkv"), "gate_proj": ("gate_up_proj", ("gate", "up"))}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        if module in whole:
            target, parts = whole[module]
            rows = [tensors[name.replace(module, f"{part}_proj")] for part in parts]
            found[name.replace(module, target)] = torch.cat(rows)
        elif module not in {"k_proj", "v_proj", "up_proj"}:
            found[name] = tensor
    return found


def repaired(finetuned: Path, out: Path, cache: Path) -> None:
    done = repair(
        RepairRequest(
            finetuned=finetuned,
            aligned=FAMILY / "aligned",
            base=FAMILY / "base",
            output=out,
            method="lssf",
            cache_dir=cache.parent / "cache",
        )
    )
    assert all(row.outcome == "edited" for row in done.rows)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family repaired in its own layout."""
    out = tmp_path_factory.mktemp("lssf") / "plain"
    repaired(FAMILY / "howto", out, out)
    return out


@pytest.mark.parametrize(
    ("respell", "changes"), [(nested, {}), (fused, {"model_type": "phi3"})], ids=["nested", "fused"]
)
def test_lssf_across_layouts_is_lssf_in_one(
    tmp_path: Path, plain: Path, respell: Respell, changes: Mapping[str, str]
) -> None:
    """The aligned model runs in its own layout; what it shows serves the fine-tune's."""
    other = tmp_path / "other"
    other.mkdir()
    settings = json.loads((FAMILY / "howto" / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps(settings | dict(changes)), "utf-8")
    tensors = {n: t.contiguous() for n, t in respell(read_folder(FAMILY / "howto")).items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    repaired(other, tmp_path / "out", plain)
    expected = respell(read_folder(plain))
    found = read_folder(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def requests_of(root: Path, respell: Respell, *, turned: bool) -> dict[str, MomentRequest]:
    """What LSSF asks of the aligned model; `turned`: the fine-tune is the one respelled."""
    trio = make_family(root / "saved", "phi3")
    other = respelled(trio, root / "other", respell)
    one, two = (other, trio) if turned else (trio, other)
    family = replace(one, aligned=two.aligned)
    for path in (FAMILY / "aligned").iterdir():  # a plan asks whether the model can be asked
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, family.aligned)
    request = RepairRequest(
        finetuned=family.finetuned, aligned=family.aligned, base=family.base, method="lssf"
    )
    with open_inputs(request) as inputs:
        plan = plan_repair(request, inputs)
        shown = inputs.others["aligned"]
        found = moment_requests(plan, inputs.finetuned, running=shown, standardize="token")
        shapes = {slot.key: slot_shape(inputs.finetuned.tensors[slot.tensor].shape, slot)
                  for pair in plan.edits for slot in pair.slots}  # fmt: skip
    assert found.keys() == shapes.keys()
    for key, each in found.items():
        assert each.rows is None or each.rows[1] - each.rows[0] == shapes[key][0]
    return found


def test_a_split_model_is_asked_for_its_own_modules(tmp_path: Path) -> None:
    found = requests_of(tmp_path, split_phi3, turned=False)
    attention = "model.layers.0.self_attn."
    for part in ("q_proj", "k_proj", "v_proj"):
        each = found[f"{attention}qkv_proj.weight[{part}]"]
        assert (each.module_path, each.rows) == (f"{attention}{part}", None)


def test_a_fused_model_is_asked_for_rows(tmp_path: Path) -> None:
    found = requests_of(tmp_path, split_phi3, turned=True)
    attention = "model.layers.0.self_attn."
    rows = {part: found[f"{attention}{part}_proj.weight"].rows for part in "qkv"}
    assert rows == {"q": (0, 32), "k": (32, 48), "v": (48, 64)}
    assert {each.module_path for key, each in found.items() if "self_attn" in key} == {
        f"{attention}qkv_proj", f"{attention}o_proj",
    }  # fmt: skip


def test_a_wrapped_model_is_asked_by_its_own_names(tmp_path: Path) -> None:
    found = requests_of(tmp_path, nested, turned=False)
    assert {each.module_path.partition(".layers")[0] for each in found.values()} == {
        "model.language_model"
    }
    assert json.loads((tmp_path / "other/aligned/config.json").read_text())["model_type"] == "phi3"
