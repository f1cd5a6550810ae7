"""What is measured on an accelerator: decompositions, edits, whole passes, agreement with the CPU.

Every function takes the device, so that all of it but the device itself runs in the tests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import ROLES, Model
from realign.model.moments import Moments
from realign.repair.apply import apply_edit
from realign.repair.edit import Dense, Layer, LowRank
from realign.repair.engine import repair
from realign.repair.method import Method
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.methods.lssf import Lssf
from realign.repair.preparation import NO_STATISTICS, Statistics
from realign.repair.request import RepairRequest
from realign.subspace.spectrum import decompose, decompose_batch

CHUNK = 16 * 2**20
LSSF = Lssf(safety_vector="unaligned")
DELTA_SVD = DeltaSvd(safety_vector="base")


def seconds(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Median time after one run that does not count, the device's queue emptied around it."""

    def settled() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    work()
    taken: list[float] = []
    for _ in range(repeats):
        start = settled()
        work()
        taken.append(settled() - start)
    return median(taken)


def single_precision(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The alternative that is not taken: Gram and eigendecomposition in float32."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigh(short @ short.T)


def decompositions(
    model: Model, device: torch.device, *, batches: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Seconds per matrix of every shape, and for all layers of the model."""
    rows: dict[str, dict[str, Any]] = {}
    for (d_out, d_in), count in model.counts().items():
        generator = torch.Generator(device).manual_seed(d_out + d_in)
        batch = torch.randn(max(batches), d_out, d_in, generator=generator, device=device)
        row: dict[str, Any] = {"count": count}
        row["float64"] = seconds(lambda: decompose(batch[0]).left(8), device, repeats=repeats)  # noqa: B023
        row["float32"] = seconds(lambda: single_precision(batch[0]), device, repeats=repeats)  # noqa: B023
        for size in batches:
            each = seconds(lambda: decompose_batch(batch[:size]), device, repeats=repeats)  # noqa: B023
            row[f"float64, {size} at once"] = each / size
        rows[f"{d_out}x{d_in}"] = row
    ways = [name for name in next(iter(rows.values())) if name != "count"]
    totals = {way: sum(row["count"] * row[way] for row in rows.values()) for way in ways}
    return {"shapes": rows, "all_layers": totals}


def _layer(shape: tuple[int, int], device: torch.device, *, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    aligned = 0.02 * torch.randn(*shape, generator=generator)
    others = [aligned + 1e-3 * torch.randn(*shape, generator=generator) for _ in range(3)]
    base, unaligned, finetuned = (each.to(device, torch.bfloat16) for each in others)
    return Layer(
        key="w",
        module="w",
        layer=0,
        finetuned=finetuned,
        aligned=aligned.to(device, torch.bfloat16),
        base=base,
        unaligned=unaligned,
    )


def _moments(shape: tuple[int, int], *, tokens: int) -> Statistics:
    """Moments of the smaller side with a decaying spectrum; synthetic, on the CPU."""
    kind, width = ("output", shape[0]) if shape[0] <= shape[1] else ("input", shape[1])
    generator = torch.Generator().manual_seed(width)
    falling = torch.arange(1, width + 1, dtype=torch.float32) ** -0.6
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    v = (torch.randn(tokens, width, generator=generator) * falling) @ mixing
    s2 = (v.T @ v).double()
    moments = Moments(tokens, v.sum(dim=0).double(), (s2 + s2.T) / 2, kind)
    return Statistics({"w": moments})


def edited(method: Method, layer: Layer, statistics: Statistics) -> tuple[Tensor, float]:
    """W' as the engine computes it, and max|E|."""
    edit = method.edit(layer, statistics)
    assert isinstance(edit, LowRank | Dense), edit
    result, effect = apply_edit(
        layer.finetuned, edit, strength=1.0, aligned=layer.aligned, other=layer.base
    )
    return result, effect.max_edit


def edits(model: Model, device: torch.device, *, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds per matrix of an LSSF edit from its moments, uploaded each time; all layers."""
    rows: dict[str, float] = {}
    total = 0.0
    for shape, count in model.counts().items():
        layer, statistics = _layer(shape, device, seed=1), _moments(shape, tokens=tokens)
        taken = seconds(lambda: edited(LSSF, layer, statistics), device, repeats=repeats)  # noqa: B023
        rows[f"{shape[0]}x{shape[1]}"] = taken
        total += count * taken
    return {"shapes": rows, "all_layers": total, "tokens": tokens}


def agreement(
    shapes: Sequence[tuple[int, int]], device: torch.device, *, tokens: int
) -> dict[str, float]:
    """The largest difference of an output from the CPU's, over what is allowed, by method.

    Allowed is one ulp of the output's type and 1e-6 max|E|.
    """
    worst: dict[str, float] = {}
    for method in (LSSF, DELTA_SVD):
        for shape in shapes:
            statistics = _moments(shape, tokens=tokens) if method is LSSF else NO_STATISTICS
            here = torch.device("cpu")
            expected, size = edited(method, _layer(shape, here, seed=2), statistics)
            found, _ = edited(method, _layer(shape, device, seed=2), statistics)
            info = torch.finfo(expected.dtype)
            magnitude = expected.double().abs().clamp(min=info.tiny)
            ulp = torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps
            off = ((found.cpu().double() - expected.double()).abs() / (ulp + 1e-6 * size)).max()
            worst[method.name] = max(worst.get(method.name, 0.0), float(off))
    return worst


def read_write(folder: Path, target: Path) -> float:
    """Seconds to read all checkpoints and to write one, synced: what no repair can undercut."""
    start = time.perf_counter()
    for role in ROLES:
        for file in sorted((folder / role).glob("*.safetensors")):
            with file.open("rb", buffering=0) as source:
                if role == "finetuned":
                    with (target / file.name).open("wb", buffering=0) as out:
                        while block := source.read(CHUNK):
                            out.write(block)
                        os.fsync(out.fileno())
                else:
                    while source.read(CHUNK):
                        pass
    return time.perf_counter() - start


def whole_pass(
    folder: Path, work: Path, device: torch.device, *, in_flight: Sequence[int | None], repeats: int
) -> dict[str, Any]:
    """Seconds of a repair with delta_svd, end to end, against the read-write floor."""
    floor: list[float] = []
    taken: dict[str, list[float]] = {}
    for turn in range(repeats):
        place = work / f"floor-{turn}"
        place.mkdir()
        floor.append(read_write(folder, place))
        _remove(place)
        for flight in in_flight:
            out = work / "repaired"
            start = time.perf_counter()
            repair(
                RepairRequest(
                    finetuned=folder / "finetuned",
                    aligned=folder / "aligned",
                    base=folder / "base",
                    output=out,
                    method="delta_svd",
                    device=str(device),
                ),
                in_flight=flight,
            )
            name = "chosen by memory" if flight is None else f"{flight} in flight"
            taken.setdefault(name, []).append(time.perf_counter() - start)
            _remove(out)
    middle = median(floor)
    return {
        "floor": middle,
        "seconds": {name: median(each) for name, each in taken.items()},
        "over_floor": {name: median(each) / middle for name, each in taken.items()},
    }


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
