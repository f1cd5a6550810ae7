"""Several fine-tunes in one run: the same bytes as alone, decomposed once, failures apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_support import realign
from support.repair_support import Trio, drift, read_folder

from realign.checkpoint.manifest import content_digest
from realign.errors import NothingToDoError, OutputError, UsageError
from realign.repair import decompositions
from realign.repair.decompositions import Decompositions
from realign.repair.engine import repair
from realign.repair.request import RepairRequest
from realign.repair.several import output_names, plan_several, repair_several
from realign.subspace.spectrum import decompose


def _second(trio: Trio, folder: Path) -> Path:
    """Another fine-tune of the same family."""
    shutil.copytree(trio.finetuned, folder)
    file = folder / "model.safetensors"
    save_file(drift(load_file(file), seed=29, size=0.02), file, metadata={"format": "pt"})
    return folder


def _request(trio: Trio, **options: object) -> RepairRequest:
    usual = {"aligned": trio.aligned, "base": trio.base, "method": "delta_svd"}
    return RepairRequest(finetuned="unused", **{**usual, **options})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("delta_svd", {"rank": 3}),
        ("delta_svd", {"rank": "energy"}),
        ("lox", {}),
        ("replace", {"rank": 2}),
        ("wise_ft", {}),
    ],
)
def test_the_same_bytes_as_alone(
    trio_of, tmp_path: Path, method: str, settings: dict[str, object]
) -> None:
    trio = trio_of("llama", torch.bfloat16)
    other = _second(trio, tmp_path / "other")
    options = {"method": method, "settings": settings}
    request = _request(trio, output=tmp_path / "all", cache_dir=tmp_path / "cache", **options)
    outcomes = repair_several(request, [trio.finetuned, other])
    assert [each.error for each in outcomes] == [None, None]
    for source in (trio.finetuned, other):
        alone = tmp_path / f"alone-{source.name}"
        roles = {"aligned": trio.aligned, "base": trio.base, **options}
        repair(RepairRequest(finetuned=source, output=alone, **roles))
        assert content_digest(alone) == content_digest(tmp_path / "all" / source.name)
    assert not list((tmp_path / "cache").glob("family-*"))


@pytest.mark.parametrize("method", ["delta_svd", "lox", "replace"])
def test_every_matrix_is_decomposed_once(
    trio_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    trio = trio_of("llama")
    count = 0

    def counted(matrix: torch.Tensor):
        nonlocal count
        count += 1
        return decompose(matrix)

    monkeypatch.setattr(decompositions, "decompose", counted)
    names = ["one", "two"]
    finetunes = [_second(trio, tmp_path / name) for name in names]
    request = _request(trio, output=tmp_path / "all", method=method)
    repair_several(request, [trio.finetuned, *finetunes])
    assert count == 14  # of one fine-tune, for three


def test_what_is_kept_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in ((24, 40), (40, 24), (16, 16)):
        matrix = torch.randn(shape, generator=generator)
        plain = decompose(matrix)
        first, second = Decompositions(tmp_path), Decompositions(tmp_path)
        for store in (first, second):
            found = store.decompose(matrix)
            assert torch.equal(found.energies, plain.energies)
            assert torch.equal(found.left(5), plain.left(5))
            assert torch.equal(found.right(5), plain.right(5))
            assert found.pairs.top(5).stride() == plain.pairs.top(5).stride()
        assert (first.computed, second.computed) == (1, 0)
    changed = matrix.clone()
    changed[0, 0] += 1.0
    store = Decompositions(tmp_path)
    assert not torch.equal(store.decompose(changed).energies, plain.energies)
    assert store.computed == 1


def test_a_failure_leaves_the_others_whole(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    broken = _second(trio, tmp_path / "broken")
    file = broken / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    last = _second(trio, tmp_path / "last")
    models = ["--aligned", trio.aligned, "--base", trio.base, "--method", "delta_svd"]
    result = realign(
        "repair", trio.finetuned, broken, last, *models, "-o", tmp_path / "all", "--quiet"
    )
    assert result.exit_code == 2
    assert "broken was not repaired" in result.stderr and "up_proj" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["finetuned", "last"]
    assert len(read_folder(tmp_path / "all" / "last")) == 20


def test_two_of_one_name_are_refused(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    twin = _second(trio, tmp_path / "elsewhere" / "finetuned")
    with pytest.raises(UsageError, match="the folder finetuned"):
        plan_several(_request(trio), [trio.finetuned, twin])
    (tmp_path / "poems").mkdir()
    names = output_names(["org/law", "org/code@main", f"org/base+{tmp_path}/poems"])
    assert names == ["law", "code", "poems"]


def test_what_headers_refuse_is_refused_before_anything_is_written(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    same = shutil.copytree(trio.aligned, tmp_path / "unmoved")
    request = _request(trio, output=tmp_path / "all")
    with pytest.raises(NothingToDoError, match=r"unmoved: .* hold the same weights"):
        repair_several(request, [trio.finetuned, same])
    assert not (tmp_path / "all").exists()
    (tmp_path / "all" / "finetuned").mkdir(parents=True)
    with pytest.raises(OutputError, match="exists"):
        repair_several(request, [trio.finetuned, _second(trio, tmp_path / "x")])


def test_the_plans_of_all_are_shown(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    other = _second(trio, tmp_path / "other")
    models = ["--aligned", trio.aligned, "--base", trio.base, "--method", "delta_svd"]
    shown = realign("repair", trio.finetuned, other, *models, "--dry-run", "--json").json
    assert list(shown["plans"]) == ["finetuned", "other"]
    words = realign("repair", trio.finetuned, other, *models, "--dry-run").stdout
    assert words.count("Inputs") == 2
    refused = realign("repair", trio.finetuned, other, *models, "--audit", "-o", tmp_path / "o")
    assert refused.exit_code == 2 and "one fine-tune" in refused.stderr
