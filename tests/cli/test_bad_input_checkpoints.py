"""Checkpoints that cannot be repaired, through the real command: one row per kind of fault.

Each row damages a copy of a model of the tiny family and gives it in one of the roles. Whatever the
fault: exit code 2, one message of at most three lines that names the file and the next step, no
byte of an input changed, nothing in the folder of the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_support import raw_safetensors
from support.cli_support import damaged
from support.refusal_support import refused, repair, untouched

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj"
Damage = Callable[[Path], None]


def _header(change: Callable[[dict[str, Any]], None], data: Callable[[bytes], bytes]) -> Damage:
    """Rewrite the header and the bytes after it."""

    def damage(folder: Path) -> None:
        file = folder / WEIGHTS
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        file.write_bytes(raw_safetensors(header, data(content[8 + length :])))

    return damage


def _same(data: bytes) -> bytes:
    return data


def _nothing(_: dict[str, Any]) -> None:
    pass


def _entry(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[f"{Q}.weight"].update(fields)


def _overlap(header: dict[str, Any]) -> None:
    header["again"] = dict(header[f"{Q}.weight"])


def _twice(folder: Path) -> None:
    file = folder / WEIGHTS
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].decode()
    first = json.dumps({Q: json.loads(text)[f"{Q}.weight"]})[1:-1].replace(Q, f"{Q}.weight")
    file.write_bytes(raw_safetensors("{" + first + "," + text.lstrip()[1:], content[8 + length :]))


def _bytes(content: bytes) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(content) and None


def _sharded(change: Callable[[Path, dict[str, Any]], None]) -> Damage:
    """Split the weights into two shards with an index, then change these."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for i, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-{i:05}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
        change(folder, index)
        if index:
            (folder / INDEX).write_text(json.dumps(index))

    return damage


def _shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05}-of-00002.safetensors"


def _missing_shard(folder: Path, _: dict[str, Any]) -> None:
    _shard(folder, 2).unlink()


def _no_index(_: Path, index: dict[str, Any]) -> None:
    index.clear()


def _stale_shard(folder: Path, _: dict[str, Any]) -> None:
    second = load_file(_shard(folder, 2))
    first = load_file(_shard(folder, 1))
    name = sorted(first)[0]
    save_file(second | {name: first[name]}, _shard(folder, 2))


def _ghost(_: Path, index: dict[str, Any]) -> None:
    index["weight_map"]["ghost"] = _shard(Path(), 1).name


def _outside(_: Path, index: dict[str, Any]) -> None:
    index["weight_map"]["ghost"] = "../secret.safetensors"


def _gap(_: Path, index: dict[str, Any]) -> None:
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "00001-of" in v}


def _mixed(folder: Path, index: dict[str, Any]) -> None:
    other = "model-00002-of-00003.safetensors"
    _shard(folder, 2).rename(folder / other)
    text = json.dumps(index["weight_map"]).replace(_shard(Path(), 2).name, other)
    index["weight_map"] = json.loads(text)


def _no_map(_: Path, index: dict[str, Any]) -> None:
    index["weight_map"] = []


def _cut_shard(folder: Path, _: dict[str, Any]) -> None:
    with _shard(folder, 2).open("rb+") as stream:
        stream.truncate(_shard(folder, 2).stat().st_size // 2)


def _config(text: str | None) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.unlink()
        if text is not None:
            path.write_text(text)

    return damage


def _setting(**settings: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return damage


def _only(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(b"\x80\x02.")

    return damage


def _layer(**parts: torch.Tensor) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[f"{Q}.weight"]
        named = {f"{Q}.{part.replace('__', '.')}": tensor for part, tensor in parts.items()}
        save_file(tensors | named, folder / WEIGHTS)

    return damage


def _broken_link(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "blob that is gone")


def _a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _an_adapter_too(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


INTEGERS = torch.zeros(16, 8, dtype=torch.int32)
ONES = torch.ones(8)

# What is done to a copy, and what the message must say beside the name of the copy's folder.
DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "zero bytes": (_bytes(b""), ("RA001", WEIGHTS)),
    "git lfs pointer": (_bytes(b"version https://git-lfs.github.com/spec/v1\n"), ("git lfs pull",)),
    "huge header": (_bytes(b"\xff" * 64), ("RA002", WEIGHTS)),
    "cut header": (_bytes((500).to_bytes(8, "little") + b"{}"), ("RA004", WEIGHTS)),
    "web page": (_bytes(raw_safetensors("<html>")), ("RA005", WEIGHTS)),
    "not utf-8": (_bytes(raw_safetensors(b"{\xff}")), ("RA006", WEIGHTS)),
    "no json": (_bytes(raw_safetensors("{]")), ("RA007", WEIGHTS)),
    "a name twice": (_twice, ("RA008", WEIGHTS, Q)),
    "unknown type": (_header(_entry(dtype="Q4"), _same), ("RA010", Q)),
    "lying shape": (_header(_entry(shape=[1, 1]), _same), ("RA011", Q)),
    "overflow": (_header(_entry(shape=[2**40, 2**40]), _same), ("RA011", Q)),
    "overlap": (_header(_overlap, _same), ("RA012", WEIGHTS)),
    "hole": (
        _header(lambda header: header.pop(f"{Q}.weight") and None, _same),
        ("RA012", WEIGHTS),
    ),
    "truncated": (_header(_nothing, lambda data: data[:-1]), ("RA013", WEIGHTS, "download")),
    "appended": (_header(_nothing, lambda data: data + b"PK\x03\x04"), ("RA014", WEIGHTS)),
    "metadata": (
        _header(lambda header: header.update(__metadata__={"a": 1}), _same),
        ("RA015", WEIGHTS),
    ),
    "index without map": (_sharded(_no_map), ("RA020", INDEX)),
    "missing shard": (_sharded(_missing_shard), ("RA021", INDEX, "model-00002-of-00002")),
    "ghost tensor": (_sharded(_ghost), ("RA022", "ghost")),
    "stale shard": (_sharded(_stale_shard), ("RA023", "model-00002-of-00002")),
    "gap": (_sharded(_gap), ("RA026", "number 2")),
    "two exports": (_sharded(_mixed), ("RA026", "3 files")),
    "outside": (_sharded(_outside), ("RA028", "../secret.safetensors")),
    "cut shard": (_sharded(_cut_shard), ("RA013", "model-00002-of-00002")),
    "no index": (_sharded(_no_index), ("2 of 2 shards", INDEX)),
    "no config": (_config(None), ("config.json",)),
    "empty config": (_config(""), ("config.json", "not valid JSON")),
    "config is a list": (_config("[]"), ("config.json", "JSON object")),
    "config without a model's name": (
        _setting(model_type=["llama"]),
        ("config.json", "model_type"),
    ),
    "config of bytes": (_config("\0\0"), ("config.json", "not valid JSON")),
    "broken link": (_broken_link, (WEIGHTS, "leads nowhere")),
    "a folder as weights": (_a_folder, (WEIGHTS, "is no file")),
    "an adapter and a model": (_an_adapter_too, ("adapter",)),
    "pickle": (_only("pytorch_model.bin"), ("RA040", "never unpickles", "isolated")),
    "torch file": (_only("consolidated.00.pth"), ("RA040", "never unpickles", "isolated")),
    "gguf": (_only("model.gguf"), ("GGUF", "original checkpoint")),
    "consolidated": (_only("consolidated.safetensors"), ("consolidated", "Hugging Face layout")),
    "gptq": (_setting(quantization_config={"quant_method": "gptq"}), ("GPTQ", "quantised")),
    "fp8": (
        _setting(quantization_config={"quant_method": "fp8"}),
        ("FP8", "FineGrainedFP8Config(dequantize=True)"),
    ),
    "float8 tensors": (
        _layer(weight=ONES.to(torch.float8_e4m3fn)),
        ("RA035", f"{Q}.weight", "unquantised"),
    ),
    "gptq tensors": (
        _layer(qweight=INTEGERS, qzeros=INTEGERS.clone(), scales=ONES, g_idx=INTEGERS.clone()),
        ("GPTQ", f"{Q}.qweight"),
    ),
    "bitsandbytes tensors": (
        _layer(weight=INTEGERS.to(torch.uint8), weight__absmax=ONES),
        ("bitsandbytes", f"{Q}.weight.absmax"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_fine_tune(tmp_path: Path, name: str) -> None:
    damage, says = DAMAGES[name]
    copy = damaged("howto2_p5", tmp_path)
    damage(copy)
    work = tmp_path / "work"
    work.mkdir()
    with untouched(copy):
        refused(repair(work / "out", copy), copy, *says)
    assert list(work.iterdir()) == []


# Headers and indices are read by the same code in every role and in every command that opens one.
@pytest.mark.parametrize("role", ["aligned", "base"])
@pytest.mark.parametrize("name", ["truncated", "a name twice", "missing shard", "fp8", "pickle"])
def test_a_damaged_reference(tmp_path: Path, name: str, role: str) -> None:
    damage, says = DAMAGES[name]
    copy = damaged(role, tmp_path)
    damage(copy)
    with untouched(copy):
        refused(repair(tmp_path / "out", None, "--dry-run", **{role: copy}), copy, *says)
    assert not (tmp_path / "out").exists()


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    copy = damaged("howto2_p5", tmp_path)
    _header(lambda header: header.update({"a\x1b[2J\nb": []}), _same)(copy)
    folder = copy.rename(tmp_path / "new\nline\x1b[31m")
    result = repair(tmp_path / "out", folder)
    assert "\x1b" not in result.stderr
    refused(result, "RA007", "new\\nline\\x1b[31m")


ODD: list[Any] = [None, 5, -1.5, "x", [], [1], {}, {"a": []}, True, 1e300]
SMALL_FILES = {
    "tokenizer_config.json": b'{"chat_template": 5}',
    "generation_config.json": b"[",
    "chat_template.jinja": b"\xff\xfe",
    "README.md": b"---\n&a [*a]\n---\n",
    "realign.json": b'{"method": {"name": []}}',
    INDEX: b"{",
}


def test_no_content_of_small_files_is_a_fault_of_ours(tmp_path: Path) -> None:
    """Keys of the config with values of another kind; other files with odd content."""
    copy = damaged("howto2_p5", tmp_path)
    path = copy / "config.json"
    config = json.loads(path.read_text())
    keys = [*config, "text_config", "quantization_config", "quantization", "transformers_weights",
            "auto_map", "num_experts", "_name_or_path"]  # fmt: skip
    changed = [{**config, key: ODD[i % len(ODD)]} for i, key in enumerate(keys)]
    for each in changed:
        path.write_text(json.dumps(each))
        _read_or_refused(tmp_path, copy)
    path.write_text(json.dumps(config))
    for name, content in SMALL_FILES.items():
        (copy / name).write_bytes(content)
        _read_or_refused(tmp_path, copy)


def _read_or_refused(tmp_path: Path, copy: Path) -> None:
    result = repair(tmp_path / "out", copy, "--dry-run")
    if result.exit_code != 0:
        refused(result, copy)
