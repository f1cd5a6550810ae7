"""Statistics of a run's models through the workbench: what is shared, kept, and read in parts."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_support import llama, word_tokenizer

from realign.repair import workbench
from realign.repair.engine import repair
from realign.repair.plan import plan_repair
from realign.repair.request import RepairRequest, open_inputs
from realign.repair.workbench import ModelWorkbench


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models; the anchors bring their refusals along, for random models refuse nothing."""
    folder = tmp_path_factory.mktemp("measured")
    found = {role: folder / role for role in ("base", "aligned", "finetuned")}
    for seed, path in enumerate(found.values()):
        llama(seed=seed).save_pretrained(path)
        word_tokenizer().save_pretrained(path)
    rows = [
        {"id": f"a{i}", "prompt": f"w{i} w{i + 1}", "response": f"w{i + 2} w3 w{i + 5}"}
        for i in range(20)
    ]
    found["anchors"] = folder / "anchors.jsonl"
    found["anchors"].write_text("\n".join(map(json.dumps, rows)))
    return found


@contextmanager
def _bench(family: dict[str, Path], cache: Path, **options: Any) -> Generator[ModelWorkbench]:
    request = RepairRequest(**{**family, "method": "lssf", "cache_dir": cache, **options})
    with open_inputs(request) as inputs:
        yield ModelWorkbench(request, plan_repair(request, inputs), inputs)


def _no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was loaded")


ASKED: dict[str, Any] = {"role": "aligned", "data": "safe", "tokens": "response"}


def test_what_one_method_measured_another_finds(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _bench(family, tmp_path) as bench:
        whole = bench.input_moments(**ASKED)
        fisher = bench.gradients(role="aligned", data="safe", kind="fisher")
        assert set(whole.by_key) == set(fisher) == set(bench.slots)
        assert whole.moments("model.layers.0.mlp.up_proj.weight").n == 20 * 4
        files = sorted(each.name for each in tmp_path.iterdir())
        assert [name.split("-")[0] for name in files] == ["gradients", "inputs"]
        assert all(each.stat().st_mode & 0o777 == 0o600 for each in tmp_path.iterdir())
    # Refusals are rendered anew, which takes a tokenizer and a model; measuring must not.
    with _bench(family, tmp_path, layers="1", method="replace") as bench:
        texts = bench._texts.examples("safe", role="aligned")
        bench._texts._examples["safe", "aligned", None] = tuple(texts)
        monkeypatch.setattr(workbench, "load_model", _no_model)
        again = bench.input_moments(**ASKED)
        slim = bench.input_moments(**ASKED, diagonal=True)
        for key in bench.slots:
            full, same, diagonal = (each.moments(key) for each in (whole, again, slim))
            assert torch.equal(full.s2, same.s2)
            assert torch.equal(diagonal.s2, full.s2.diagonal())
        found = bench.gradients(role="aligned", data="safe", kind="fisher")
        assert 0 < len(found) < len(fisher)
        assert all(torch.equal(value, fisher[key]) for key, value in found.items())
        for other in (
            lambda: bench.input_moments(**{**ASKED, "tokens": "all"}),
            lambda: bench.input_moments(**ASKED, limit=7),
            lambda: bench.input_moments(**{**ASKED, "role": "finetuned"}),
            lambda: bench.gradients(role="aligned", data="safe", kind="mean"),
        ):
            with pytest.raises(AssertionError, match="a model was loaded"):
                other()


def test_a_part_of_what_lssf_measured_serves_a_part_of_the_model(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes as without a cache; what was not measured is measured."""
    asked: dict[str, Any] = {"method": "lssf", "settings": {"min_tokens": 16}, "device": "cpu"}

    def run(name: str, cache: str, **options: Any) -> bytes:
        out = tmp_path / name
        request = {**family, **asked, "cache_dir": tmp_path / cache, "output": out, **options}
        repair(RepairRequest(**request))
        return (out / "model.safetensors").read_bytes()

    parts: list[dict[str, str]] = [{"layers": "1"}, {"modules": "q_proj,down_proj"}]
    alone = [run(f"alone{i}", f"own{i}", **part) for i, part in enumerate(parts)]
    assert alone[0] != alone[1]
    run("layer0", "shared", layers="0")
    whole = run("whole", "shared")
    assert len(list((tmp_path / "shared").glob("moments-*"))) == 2, "layer 0 is not the whole"
    assert run("whole-alone", "own") == whole
    monkeypatch.setattr(workbench, "load_model", _no_model)
    assert [run(f"part{i}", "shared", **part) for i, part in enumerate(parts)] == alone


def test_block_by_block_gives_what_memory_gives(family, tmp_path: Path) -> None:
    found: list[Any] = []
    for offload in (False, True):
        with _bench(family, tmp_path / str(offload), offload=offload) as bench:
            moments = bench.moments(role="aligned", standardize="neuron", tokens="response")
            snip = bench.gradients(role="aligned", data="safe", kind="snip", limit=3)
            found.append((moments.by_key, snip))
    (one, first), (two, second) = found
    assert one.keys() == two.keys()
    for key, moments in one.items():
        assert torch.allclose(moments.s2, two[key].s2, rtol=1e-5, atol=1e-6)
    for key, value in first.items():
        assert torch.allclose(value, second[key], rtol=1e-4, atol=1e-7)


def test_a_damaged_file_is_measured_again(family, tmp_path: Path) -> None:
    with _bench(family, tmp_path) as bench:
        before = dict(bench.gradients(role="aligned", data="safe", kind="mean", limit=2))
        (file,) = tmp_path.glob("gradients-*")
        file.write_bytes(file.read_bytes()[:-9])
        after = bench.gradients(role="aligned", data="safe", kind="mean", limit=2)
        assert all(torch.equal(value, after[key]) for key, value in before.items())
