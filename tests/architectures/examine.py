"""One architecture end to end: trio, repairs through the command, every check on what came out."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from architectures import reference
from architectures.activations import compare_moments
from architectures.tiny import special
from architectures.trio import Trio, auto_class, make_trio
from safetensors import safe_open
from torch import Tensor

from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.slots import logical_matrix, slots_of, stored_rows
from realign.model.moments_file import StoredMoments
from realign_cli.main import run

MOMENTS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative difference of sums over tokens, batched with padding against one by one."""


@dataclass
class Record:
    """What happened to one architecture."""

    model_type: str
    class_name: str = ""
    dtype: str = ""
    files: str = ""
    status: str = ""
    """"repaired", or one of the closed list of reasons."""
    reason: str = ""
    methods: list[str] = field(default_factory=list)
    edited: int = 0
    copied: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Why tensors were copied, and how many."""
    odd: list[str] = field(default_factory=list)
    """Names (numbers as N) of those that are none of the kinds that a repair knows."""
    refused: int = 0
    """Matrices that the low-rank method was to edit and left alone, with its reasons."""
    matrices: int = 0
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def examine(model_type: str, folder: Path, *, number: int) -> Record:
    """Build, repair and check one architecture in `folder`, which is emptied at the end."""
    record = Record(model_type)
    own = special(model_type)
    if own.reason:
        record.status, record.reason = own.reason
        return record
    try:
        trio = make_trio(folder, model_type, number=number)
        check_alone(trio, model_type)
    except ImportError as error:
        record.status, record.reason = "missing dependency", _line(error)
        return record
    except Exception as error:
        record.status, record.reason = "upstream error", _line(error)
        record.remarks.append(_where(error))
        return record
    record.class_name = trio.class_name
    record.dtype = str(trio.dtype).removeprefix("torch.")
    record.files = "sharded" if trio.sharded else "one file"
    try:
        _repairs(record, trio, folder, model_type)
    except Exception as error:
        record.problems.append(f"{_line(error)} {_where(error)}")
    if record.problems:
        record.status = "failed"
        record.reason = record.problems[0]
    else:
        record.status = "repaired"
    shutil.rmtree(folder, ignore_errors=True)
    return record


def _repairs(record: Record, trio: Trio, folder: Path, model_type: str) -> None:
    cache = folder / "cache"
    before = _logits(trio.finetuned, model_type)
    outcome = _realign(trio, "resta", folder / "resta", cache)
    if outcome:
        record.problems.append(f"resta: {outcome}")
        return
    manifest = _check(record, trio, "resta", folder / "resta", model_type, before, None)
    record.edited = len({each["tensor"] for each in manifest["tensors"]})
    copied: dict[str, str] = manifest["copied"]
    record.copied = len(copied)
    record.reasons = dict(sorted(Counter(copied.values()).items()))
    odd = [name for name, reason in copied.items() if reason.startswith("neither")]
    record.odd = sorted({re.sub(r"\d+", "N", name) for name in odd})
    record.methods.append("resta")
    outcome = _realign(trio, "lssf", folder / "lssf", cache)
    if not outcome:
        (path,) = cache.glob("moments-*.safetensors")
        moments = StoredMoments(path)
        manifest = _check(record, trio, "lssf", folder / "lssf", model_type, before, moments)
        record.methods.append("lssf")
        _left_alone(record, manifest)
        kinds = sorted({re.sub(r"\d+", "N", text) for text in moments.missing.values()})
        record.remarks += [f"not measured: {text}" for text in kinds]
        worst, seen = compare_moments(trio, model_type, cache, moments)
        record.figures |= {"moments": worst, "moments_seen": seen}
        if worst > MOMENTS_TOLERANCE[trio.dtype]:
            record.problems.append(f"moments differ by {worst:.2g} from those taken one by one")
        if record.matrices > record.refused:
            return
        outcome = "no matrix could be measured"
    record.remarks.append(f"lssf: {outcome}")
    refused = _realign(trio, "delta_svd", folder / "delta_svd", cache)
    if refused:
        record.problems.append(f"delta_svd: {refused}")
        return
    manifest = _check(record, trio, "delta_svd", folder / "delta_svd", model_type, before, None)
    record.methods.append("delta_svd")
    _left_alone(record, manifest)


def _left_alone(record: Record, manifest: Mapping[str, Any]) -> None:
    record.matrices = len(manifest["tensors"])
    left = [each["reason"] for each in manifest["tensors"] if each["outcome"] != "edited"]
    record.refused = len(left)
    record.remarks += [f"left alone: {left.count(text)} ({text})" for text in sorted(set(left))]


def check_alone(trio: Trio, model_type: str) -> None:
    """The library itself must load and run what it has saved, before a repair can be judged."""
    model, info = auto_class(model_type).from_pretrained(
        trio.finetuned, dtype="auto", output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise RuntimeError(f"what it saves lacks what it loads: {', '.join(missing[:3])}")
    if not bool(torch.isfinite(run_model(model.eval(), model_type)).all()):
        raise RuntimeError("the forward pass of a random model is not finite")


def _realign(trio: Trio, method: str, out: Path, cache: Path) -> str:
    """Run the command; empty where it went well, else what it said."""
    arguments = ["repair", trio.finetuned, "--aligned", trio.aligned, "--base", trio.base]
    arguments += ["--method", method, "-o", out, "--offline", "--device", "cpu", "--quiet"]
    if method == "lssf":
        # Random models repeat themselves: the prompts' tokens give the outputs their variety.
        arguments += ["--anchors", trio.anchors, "--set", "tokens=all", "--set", "min_tokens=48"]
    stdout, stderr = io.StringIO(), io.StringIO()
    os.environ["REALIGN_CACHE"] = str(cache)
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = run([str(each) for each in arguments])
    return "" if code == 0 else f"exit {code}: {' '.join(stderr.getvalue().split())}"[:500]


def _check(
    record: Record,
    trio: Trio,
    method: str,
    out: Path,
    model_type: str,
    before: Tensor,
    moments: StoredMoments | None,
) -> dict[str, Any]:
    """Every promise about an output folder; what fails is a problem of the record."""
    problems: list[str] = []
    manifest: dict[str, Any] = json.loads((out / "realign.json").read_text("utf-8"))
    new, old = read_folder(out), read_folder(trio.finetuned)
    base, aligned = read_folder(trio.base), read_folder(trio.aligned)
    planned = {each["tensor"] for each in manifest["tensors"]}
    if set(new) != set(old) or set(old) != planned | set(manifest["copied"]):
        problems.append("the output's tensors are not the fine-tune's")
    for name in sorted(set(old) - planned):
        if name not in new or not _same_bytes(new[name], old[name]):
            problems.append(f"{name} is outside the plan and has changed")
    worst = 0.0
    for name, key, slot in _slots(trio, manifest):
        pieces = [logical_matrix(_stored(each[name], slot), slot) for each in (new, old)]
        if method == "resta":
            edit, cut = reference.resta(base[name], aligned[name]), False
        else:
            w0, wa = (logical_matrix(_stored(each[name], slot), slot) for each in (base, aligned))
            row = next(each for each in manifest["tensors"] if each["key"] == key)
            if row["outcome"] != "edited":
                edit, cut = torch.zeros(tuple(wa.shape), dtype=torch.float64), False
            elif moments is None:
                edit, cut = reference.delta_svd(w0, wa)
            else:
                known = moments[key]
                edit, cut = reference.lssf(
                    w0, wa, kind=known.kind, n=known.n, s1=known.s1, s2=known.s2,
                    rank=row["facts"]["rank"],
                )  # fmt: skip
        if cut:
            record.remarks.append(f"{method}: degenerate cut in {key}")
            continue
        error = reference.error_in_bounds(pieces[0], pieces[1], edit)
        worst = max(worst, error)
        if not error <= 1.0:
            problems.append(f"{key} is off by {error:.3g} bounds")
    record.figures[method] = worst
    problems += _check_model(out, model_type, before)
    record.problems += [f"{method}: {text}" for text in problems[:6]]
    return manifest


def _slots(trio: Trio, manifest: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The logical matrices that the plan edits; whole tensors where it names no part."""
    keys = {each["key"] for each in manifest["tensors"]}
    with open_checkpoint(trio.finetuned, offline=True) as opened:
        names = sorted({each["tensor"] for each in manifest["tensors"]})
        whole = manifest["method"]["name"] == "resta"
        found: list[tuple[str, str, Any]] = []
        for name in names:
            slots = slots_of(opened, name)
            if whole:
                found.append((name, name, _whole(slots[0], name)))
                continue
            found += [(name, slot.key, slot) for slot in slots if slot.key in keys]
        missing = keys - {key for _, key, _ in found} - set(names)
        assert not missing, sorted(missing)[:3]
    return found


def _whole(slot: Any, name: str) -> Any:
    return type(slot)(name, name, slot.module, slot.layer)


def _stored(tensor: Tensor, slot: Any) -> Tensor:
    if slot.expert is None and slot.rows is None and slot.span is None:
        return tensor
    return tensor[slice(*stored_rows(slot, tuple(tensor.shape)))]


def _check_model(out: Path, model_type: str, before: Tensor) -> list[str]:
    model, info = auto_class(model_type).from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    problems = [
        f"{what}: {', '.join(sorted(map(str, info[what]))[:3])}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[what]
    ]
    after = run_model(model.eval(), model_type)
    if not bool(torch.isfinite(after).all()):
        problems.append("the forward pass is not finite")
    if torch.equal(after, before):
        problems.append("the forward pass is the fine-tune's")
    return problems


def run_model(model: Any, model_type: str) -> Tensor:
    """Logits on four fixed sequences (the four codebooks of one, where a model speaks in those)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 100, (4, 12), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _logits(folder: Path, model_type: str) -> Tensor:
    return run_model(
        auto_class(model_type).from_pretrained(folder, dtype="auto").eval(), model_type
    )


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by safetensors itself."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensors[name] = opened.get_tensor(name)
    return tensors


def _same_bytes(one: Tensor, two: Tensor) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        two.contiguous().reshape(-1).view(torch.uint8),
    )


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"at {Path(frame.filename).name}:{frame.lineno}"
