from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.repair_support import Trio, make_trio, read_folder
from torch import Tensor

from realign.audit import family_scan
from realign.audit.family_scan import FamilyScan, scan_family
from realign.audit.subspace_file import SubspaceFile, read_subspace
from realign.checkpoint.reader import FolderCheckpoint
from realign.checkpoint.slots import logical_matrix, slots_of, stored_rows
from realign.errors import CheckpointError, MismatchError, NonFiniteError
from realign.repair.subspace_file import SubspaceRequest, write_subspace


class Counting(FolderCheckpoint):
    """Counts the bytes that are read of every tensor."""

    def __init__(self, folder: Path, *, commit: str | None = None) -> None:
        super().__init__(folder, source=str(folder), commit=commit)
        self.bytes_read: Counter[str] = Counter()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = super().read(name, rows)
        self.bytes_read[name] += tensor.nbytes
        return tensor


def family(trio: Trio, path: Path, *, rank: int = 2) -> SubspaceFile:
    request = SubspaceRequest(aligned=trio.aligned, base=trio.base, output=path, rank=rank)
    return write_subspace(request)


def scan(file: SubspaceFile, reference: Path, subject: Path) -> FamilyScan:
    with Counting(reference) as one, Counting(subject) as two:
        return scan_family(file, reference=one, subject=two)


def matrices(folder: Path) -> dict[str, Tensor]:
    """Every logical matrix of a folder in float64, by key."""
    tensors = read_folder(folder)
    with Counting(folder) as checkpoint:
        return {
            slot.key: logical_matrix(
                tensors[name][slice(*stored_rows(slot, tuple(tensors[name].shape)))], slot
            ).double()
            for name in checkpoint.tensors
            if tensors[name].dim() >= 2
            for slot in slots_of(checkpoint, name)
        }


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "gpt_oss"])
@pytest.mark.parametrize("chunk", [1500, 2**23])
def test_every_matrix_is_what_dense_float64_projectors_give(
    trio_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, chunk: int
) -> None:
    monkeypatch.setattr(family_scan, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(family_scan, "READ_BYTES", min(chunk // 3, family_scan.READ_BYTES))
    trio = trio_of(arch)
    file = family(trio, tmp_path / "safety.safetensors")
    found = scan(file, trio.aligned, trio.finetuned)
    base, reference, subject = (
        matrices(path) for path in (trio.base, trio.aligned, trio.finetuned)
    )
    rows = {row.key: row.terms for row in found.rows}
    assert set(file.rows) <= set(rows)
    sums = torch.zeros(4, dtype=torch.float64)
    for key in file.rows:
        a, t = reference[key] - base[key], subject[key] - reference[key]
        u, s, vt = torch.linalg.svd(a, full_matrices=False)
        p, kept = u[:, :2] @ u[:, :2].T, (u[:, :2] * s[:2]) @ vt[:2]
        terms = rows[key]
        assert terms.task == pytest.approx(float(t.square().sum()), rel=1e-6)
        assert terms.reference == pytest.approx(float(reference[key].square().sum()), rel=1e-6)
        projected = float((p @ t).square().sum())
        assert terms.projected == pytest.approx(projected, rel=1e-4, abs=1e-6 * terms.task)
        scale = float(t.norm() * kept.norm())
        assert terms.cross == pytest.approx(float((t * kept).sum()), abs=1e-5 * scale)
        sums += torch.tensor([terms.task, projected, terms.cross, float(kept.square().sum())])
    total = found.total
    assert total is not None
    assert total.energy == pytest.approx(math.sqrt(sums[1] / sums[0]), rel=1e-4)
    assert total.retained_k == pytest.approx(1 + float(sums[2] / sums[3]), rel=1e-4)
    assert found.line == "weight screening: NOT validated"
    assert sum(table.known for table in found.per_module.values()) == len(file.rows)
    assert sum(table.known for table in found.per_layer.values()) == len(file.rows)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_oss"])
def test_the_number_of_threads_changes_no_bit(
    trio_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr(family_scan, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(family_scan, "READ_BYTES", 1000)
    trio = trio_of(arch)
    file = family(trio, tmp_path / "safety.safetensors")
    found: list[FamilyScan] = []
    for workers in (1, 4):
        monkeypatch.setattr(family_scan, "MOST_WORKERS", workers)
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        found.append(scan(file, trio.aligned, trio.finetuned))
    assert found[0] == found[1]


def test_norms_count_in_the_distance_and_vocabularies_stand_apart(trio_of, tmp_path: Path) -> None:
    trio = trio_of("qwen2")
    found = scan(family(trio, tmp_path / "s"), trio.aligned, trio.finetuned)
    one, two = (read_folder(path) for path in (trio.aligned, trio.finetuned))
    names = [n for n in one if "embed" not in n and "lm_head" not in n]
    task = sum(float((two[n].double() - one[n].double()).square().sum()) for n in names)
    size = sum(float(one[n].double().square().sum()) for n in names)
    assert found.total is not None
    assert found.total.relative_distance == pytest.approx(math.sqrt(task / size), rel=1e-6)
    head = float((two["lm_head.weight"] - one["lm_head.weight"]).double().norm())
    expected = head / float(one["lm_head.weight"].double().norm())
    assert found.per_module["head"].relative_distance == pytest.approx(expected, rel=1e-6)
    assert found.per_module["head"].retained_k is None
    assert "norm" in found.per_module and "embed" in found.per_module


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_oss"])
def test_both_models_are_read_once_and_the_base_not_at_all(tmp_path: Path, arch: str) -> None:
    trio = make_trio(tmp_path, arch)
    file = family(trio, tmp_path / "s")
    shutil.rmtree(trio.base)
    with Counting(trio.aligned) as reference, Counting(trio.finetuned) as subject:
        scan_family(read_subspace(file.path), reference=reference, subject=subject)
        for each in (reference, subject):
            skipped = {n for n in each.tensors if "router" in n or "sinks" in n}
            expected = {n: i.nbytes for n, i in each.tensors.items() if n not in skipped}
            assert each.bytes_read == expected


def test_the_reference_against_itself_has_kept_everything(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    found = scan(family(trio, tmp_path / "s"), trio.aligned, trio.aligned).total
    assert found is not None
    assert (found.relative_distance, found.retained_k, found.energy) == (0.0, 1.0, None)


def test_the_base_as_subject_has_kept_nothing(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    found = scan(family(trio, tmp_path / "s", rank=32), trio.aligned, trio.base).total
    assert found is not None
    assert found.retained_k == pytest.approx(0.0, abs=1e-6)
    assert found.energy_squared == pytest.approx(1.0, abs=1e-6)


def test_another_reference_is_refused_by_its_weights(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    file = family(trio, tmp_path / "s")
    for wrong in (trio.base, trio.unaligned, trio.finetuned):
        with pytest.raises(MismatchError, match="was not made from"):
            scan(file, wrong, trio.finetuned)


def test_another_commit_is_refused_and_both_are_named(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    file = family(trio, tmp_path / "s")
    file.aligned = type(file.aligned)("org/model", "1" * 40, file.aligned.content_digest)
    with (
        Counting(trio.aligned, commit="2" * 40) as reference,
        Counting(trio.finetuned) as subject,
        pytest.raises(MismatchError) as caught,
    ):
        scan_family(file, reference=reference, subject=subject)
    assert "1" * 40 in caught.value.message and "2" * 40 in caught.value.message
    assert not reference.bytes_read
    assert f"org/model@{'1' * 40}" in (caught.value.hint or "")


def test_a_subject_in_another_layout_gives_the_same_numbers(trio_of, tmp_path: Path) -> None:
    trio = trio_of("phi3")
    file = family(trio, tmp_path / "s")
    folder = tmp_path / "split"
    folder.mkdir()
    shutil.copy(trio.finetuned / "config.json", folder)
    parts: dict[str, Tensor] = {}
    for name, value in read_folder(trio.finetuned).items():
        for fused, sizes in (
            ("qkv_proj", {"q_proj": 32, "k_proj": 16, "v_proj": 16}),
            ("gate_up_proj", {"gate_proj": 48, "up_proj": 48}),
        ):
            if fused in name:
                pieces = value.split(list(sizes.values()))
                for part, piece in zip(sizes, pieces, strict=True):
                    parts[name.replace(fused, part)] = piece.clone()
                break
        else:
            parts[name] = value
    save_file(parts, folder / "model.safetensors")
    found, plain = (scan(file, trio.aligned, each) for each in (folder, trio.finetuned))
    assert found.unmatched == () and found.rows == plain.rows and found.total == plain.total


def edited(trio: Trio, folder: Path, change: dict[str, Tensor | None]) -> Path:
    folder.mkdir()
    shutil.copy(trio.finetuned / "config.json", folder)
    tensors = read_folder(trio.finetuned)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_what_does_not_match_is_listed_and_withholds_the_total(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    file = family(trio, tmp_path / "s")
    name = "model.layers.1.mlp.up_proj.weight"
    found = scan(file, trio.aligned, edited(trio, tmp_path / "less", {name: None}))
    assert found.unmatched == (name,)
    assert found.total is None and found.total_reason is not None
    assert "of the parameters do not match" in found.total_reason
    assert name not in {row.key for row in found.rows} and found.per_module["up_proj"].known == 1
    longer = torch.cat(
        [read_folder(trio.finetuned)["model.embed_tokens.weight"], torch.ones(3, 32)]
    )
    grown = edited(trio, tmp_path / "more", {"model.embed_tokens.weight": longer})
    found = scan(file, trio.aligned, grown)
    assert found.unmatched == () and found.total is not None
    rows = {row.module: row.terms for row in found.rows}
    plain = {row.module: row.terms for row in scan(file, trio.aligned, trio.finetuned).rows}
    assert rows["embed"] == plain["embed"]


@pytest.mark.parametrize(("other", "key"), [("gpt2", "model_type"), ("qwen2", "model_type")])
def test_another_architecture_is_refused_before_a_tensor_is_read(
    trio_of, tmp_path: Path, other: str, key: str
) -> None:
    trio = trio_of("llama")
    file = family(trio, tmp_path / "s")
    with (
        Counting(trio.aligned) as reference,
        Counting(trio_of(other).finetuned) as subject,
        pytest.raises(MismatchError, match=key) as caught,
    ):
        scan_family(file, reference=reference, subject=subject)
    assert subject.source in caught.value.message and reference.source in caught.value.message
    assert not reference.bytes_read and not subject.bytes_read


def test_another_size_is_refused(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    other = edited(trio, tmp_path / "deep", {})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(MismatchError, match="num_hidden_layers = 3"):
        scan(family(trio, tmp_path / "s"), trio.aligned, other)


def test_a_subject_or_reference_with_no_matrix_of_the_file_is_refused(
    trio_of, tmp_path: Path
) -> None:
    trio = trio_of("llama")
    file = family(trio, tmp_path / "s")
    lost = {row.tensor: None for row in file.rows.values()}
    other = edited(trio, tmp_path / "other", lost)
    first = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(MismatchError, match="none of the 14 matrices") as caught:
        scan(file, trio.aligned, other)
    assert str(other) in caught.value.message and first in caught.value.message
    with pytest.raises(MismatchError, match="was not made from") as caught:
        scan(file, other, trio.finetuned)
    assert first in caught.value.message


def test_a_nan_is_named(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    bad = read_folder(trio.finetuned)[name]
    bad[1, 2] = math.nan
    with pytest.raises(NonFiniteError, match=name):
        scan(
            family(trio, tmp_path / "s"), trio.aligned, edited(trio, tmp_path / "bad", {name: bad})
        )


def test_a_file_with_wrong_factors_is_refused(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    file = family(trio, tmp_path / "s")
    tensors = load_file(file.path)
    metadata = json.loads(json.dumps(dict(_metadata(file.path))))
    key = next(iter(file.rows))
    for change in ({f"{key}.S": torch.ones(3)}, {f"{key}.U": torch.ones(5, 2)}):
        save_file(tensors | change, tmp_path / "bad", metadata=metadata)
        with pytest.raises(CheckpointError, match="cannot be read as a subspace file"):
            read_subspace(tmp_path / "bad")
    save_file({n: v for n, v in tensors.items() if n != f"{key}.V"}, tmp_path / "bad", metadata)
    with pytest.raises(CheckpointError, match="cannot be read as a subspace file"):
        read_subspace(tmp_path / "bad")


def _metadata(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header["__metadata__"]
