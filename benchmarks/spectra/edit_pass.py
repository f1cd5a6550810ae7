"""The LSSF edit pass against a naive full-SVD script, and against a dense float64 reference.

    python -m benchmarks.spectra.edit_pass [--tokens N] [--shapes 2048x2048 ...] [--repeats N]

Ours is the method as the engine runs it: from the moments that it gets to the edited matrix in the
dtype of the file. The script starts from the recorded outputs. Both have run the model before that;
what accumulating moments adds to it is measured as well.
"""

from __future__ import annotations

from benchmarks.spectra.alone import one_thread

if __name__ == "__main__":
    one_thread()

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.spectra import naive
from benchmarks.spectra.synthetic import Weights, activations, weights
from benchmarks.spectra.timing import Times, in_turns, ratio, spoken
from realign.model.accumulate import Sums
from realign.model.moments import Moments
from realign.repair.apply import apply_edit
from realign.repair.edit import Dense, Layer, LowRank
from realign.repair.methods.lssf import Lssf
from realign.repair.preparation import Statistics

BLOCK = {"2048x2048": 2, "256x2048": 2, "5632x2048": 2, "2048x5632": 1}
"""The matrices of a decoder block of a 1.1 B model: q and o, k and v, gate and up, down."""

ETA = 0.85
SLOW = 20.0
"""A script that takes longer than this, in seconds, is timed once."""

METHOD = Lssf(eta=ETA, safety_vector="unaligned")


class Case:
    """One matrix with everything that either way starts from."""

    def __init__(self, d_out: int, d_in: int, *, tokens: int, seed: int = 0) -> None:
        self.weights: Weights = weights(d_out, d_in, seed=seed)
        self.x: Tensor = activations(tokens, d_in, seed=seed + 9)
        self.outputs: Tensor = self.x @ self.weights.aligned.float().T
        self.kind = "output" if d_out <= d_in else "input"
        self.moments = self.accumulate()

    def accumulate(self) -> Moments:
        """The moments of the smaller side, as the hooks accumulate them, in batches of tokens."""
        rows = self.outputs if self.kind == "output" else self.x
        sums = Sums(rows.shape[1], torch.device("cpu"), "float64")
        for batch in rows.split(512):
            sums.add(batch)
        n, first, second = sums.finish()
        return Moments(n, first, second, self.kind)

    def ours(self) -> tuple[Tensor, LowRank | Dense]:
        """The edited matrix by the method and the engine's arithmetic."""
        each = self.weights
        layer = Layer(
            key="w",
            module="w",
            layer=0,
            finetuned=each.finetuned,
            aligned=each.aligned,
            unaligned=each.unaligned,
        )
        edit = METHOD.edit(layer, Statistics({"w": self.moments}))
        assert isinstance(edit, LowRank | Dense), edit
        edited, _ = apply_edit(
            each.finetuned, edit, strength=1.0, aligned=each.aligned, other=each.unaligned
        )
        return edited, edit

    def naive(self) -> Tensor:
        """The edited matrix by the script."""
        return naive.lssf(self.outputs, self.weights, eta=ETA)[0]

    def reference(self) -> tuple[int, Tensor, Tensor]:
        """Rank, W' and E by a full float64 SVD of the standardised outputs, nothing rounded."""
        w = self.weights
        z = self.x.double() @ w.aligned.double().T
        z = (z - z.mean(dim=0)) / z.std(dim=0, correction=0)
        u, s, _ = torch.linalg.svd(z.T, full_matrices=False)
        rank = naive.entropy_rank(s, ETA)
        safety = w.aligned.double() - w.unaligned.double()
        edit = u[:, :rank] @ (u[:, :rank].T @ safety)
        return rank, w.finetuned.double() + edit, edit


def ulp(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours in `dtype` at every entry, float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(reference.abs().clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps


def agreement(case: Case) -> dict[str, Any]:
    """How far our output is from the dense float64 reference, in units of what is allowed."""
    rank, expected, edit = case.reference()
    edited, ours = case.ours()
    allowed = ulp(expected, edited.dtype) + 1e-6 * float(edit.abs().max())
    excess = float(((edited.double() - expected).abs() / allowed).max())
    relative = float((ours.dense().double() - edit).norm() / edit.norm())
    return {
        "rank": ours.facts["rank"],
        "rank_of_reference": rank,
        "worst_over_allowed": excess,
        "relative_error_of_edit": relative,
        "within": excess <= 1.0 and ours.facts["rank"] == rank,
    }


def measure(
    shapes: Sequence[str], *, tokens: int, repeats: int, check: bool
) -> dict[str, dict[str, Any]]:
    """Times, ratio and agreement of every shape."""
    found: dict[str, dict[str, Any]] = {}
    for text in shapes:
        d_out, d_in = (int(part) for part in text.split("x"))
        case = Case(d_out, d_in, tokens=tokens)
        case.ours()
        once = in_turns({"naive": case.naive}, repeats=1, warm_up=False)["naive"]
        times = {"naive": once, **in_turns({"ours": case.ours}, repeats=1, warm_up=False)}
        if once.median < SLOW:
            times = in_turns({"naive": case.naive, "ours": case.ours}, repeats=repeats)
        times |= in_turns({"moments": case.accumulate}, repeats=1)
        found[text] = _row(times) | {"tokens": tokens, "seconds_of": _seconds(times)}
        if check:
            found[text]["agreement"] = agreement(case)
        print(_line(text, found[text]), file=sys.stderr)
    return found


def _row(times: dict[str, Times]) -> dict[str, Any]:
    with_moments = times["naive"].median / (times["ours"].median + times["moments"].median)
    return {**ratio(times["naive"], times["ours"]), "with_moments": with_moments}


def _seconds(times: dict[str, Times]) -> dict[str, float]:
    return {name: each.median for name, each in times.items()}


def block_ratio(found: dict[str, dict[str, Any]], *, moments: bool = False) -> float | None:
    """The ratio over a whole decoder block; None where a shape of it was not measured."""
    if not found.keys() >= BLOCK.keys():
        return None
    total = {
        way: sum(count * found[shape]["seconds_of"][way] for shape, count in BLOCK.items())
        for way in ("naive", "ours", "moments")
    }
    return total["naive"] / (total["ours"] + (total["moments"] if moments else 0.0))


def _line(text: str, row: dict[str, Any]) -> str:
    seconds = row["seconds_of"]
    line = f"{text}: {spoken(row)}, {seconds['naive']:.2f} s against {seconds['ours']:.2f} s"
    line += f" (with accumulating moments {row['with_moments']:.1f}x)"
    if "agreement" in row:
        found = row["agreement"]
        line += f"; worst entry at {found['worst_over_allowed']:.2f} of what is allowed"
        line += f", rank {found['rank']} of {found['rank_of_reference']}"
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print one line per shape and the ratio of the block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(BLOCK), metavar="OUTxIN")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-check", action="store_true", help="leave the float64 reference out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(
        options.shapes, tokens=options.tokens, repeats=options.repeats, check=not options.no_check
    )
    whole = block_ratio(found)
    print(
        json.dumps(
            {"shapes": found, "block": whole, "with_moments": block_ratio(found, moments=True)}
        )
    )
    if whole is not None:
        print(f"LSSF edit pass, decoder block: {whole:.1f}x", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
