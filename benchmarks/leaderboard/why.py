"""Why published methods fail in the laboratory: sweeps, controls and decompositions, one at a time.

    realign lab compare FAMILY -o DIR
    python benchmarks/leaderboard/why.py FAMILY DIR docs/data/why-methods-fail.json

Asked of fine-tunes that the comparison in DIR has made. The file is written after every answer and
what it holds is not asked again. docs/why-methods-fail.md is filled by `publish.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from why_bench import KINDS, Bench, Weights, flat

from realign.errors import EmptyEditError
from realign.lab.places import Place
from realign.lab.record import write_json
from realign.lab.scenarios import SCENARIOS
from realign.repair.registry import build_method
from realign.subspace.spectrum import decompose

Row = dict[str, Any]
Question = tuple[str, str, Callable[[], Row]]
"""Method, what is asked, and how."""
HALF, FEW = 10, 5
"""How many of the 21 matrices are put back."""
LEADING = 8


def questions(bench: Bench) -> Iterator[Question]:
    """Every question about one fine-tune, cheap ones first."""
    yield "geometry", "vectors", lambda: geometry(bench)
    yield "selection", "matrices", lambda: {"matrices": by_matrix(bench)}
    yield "all", "no repair", lambda: bench.ask(bench.wf)
    yield "all", "the aligned model", lambda: bench.ask(bench.wa)
    yield from places(bench)
    yield from interpolation(bench)
    yield from selections(bench)
    yield from filters(bench)
    yield from additions(bench)
    yield from pruning(bench)
    yield from prices(bench)
    yield from ascents(bench)
    yield from single_examples(bench)
    yield from regions(bench)
    yield from rounding(bench)


def geometry(bench: Bench) -> Row:
    """Where the fine-tune's update D = Wf - Wa lies, all matrices as one vector."""
    names = bench.names
    d = flat(bench.wf, names) - flat(bench.wa, names)
    v = flat(bench.wa, names) - flat(bench.w0, names)
    h = flat(bench.wu, names) - flat(bench.wa, names)
    inside, chance, gains, energy = [], [], [], []
    for name in names:
        own, vector = bench.wf[name] - bench.wa[name], bench.wa[name] - bench.w0[name]
        left = decompose(vector).triplets(LEADING).u.to(own)
        inside.append(float((left.T @ own).square().sum() / own.square().sum()))
        chance.append(LEADING / own.shape[0])
        pushed = vector @ (vector.T @ own) / vector.norm()
        gains.append(float(pushed.norm() / own.norm()))
        energy.append(float(own.square().mean().sqrt()))
    return {
        # 1 would mean that the fine-tune still has all of what alignment wrote.
        "dose_of_v_left": float((d + v) @ v / (v @ v)),
        "norm_d_over_v": float(d.norm() / v.norm()),
        "norm_h_over_v": float(h.norm() / v.norm()),
        "cos_d_v": _cos(d, v),
        "cos_d_h": _cos(d, h),
        "cos_v_h": _cos(v, h),
        "h_in_d": float(d @ h / (h @ h)),  # how much of the un-alignment the fine-tune holds
        "share_in_leading": sum(inside) / len(inside),
        "chance_in_leading": sum(chance) / len(chance),
        "safe_lora_gain": sum(gains) / len(gains),
        "safe_lora_gain_most": max(gains),
        "rms_entry": sum(energy) / len(energy),
    }


def by_matrix(bench: Bench) -> list[Row]:
    """Per matrix: Safe LoRA's score, and what putting the aligned weight back does."""
    method = build_method("safe_lora", {"tau": 0.5})
    _, manifest = bench.repaired(method)
    scores = {row["key"]: row["facts"] for row in manifest["tensors"]}
    before = bench.scores(bench.wf)
    found: list[Row] = []
    for name in bench.names:
        refusal, task = bench.scores(bench.with_aligned([name]))
        own = scores[name]
        found.append(
            {
                "matrix": name,
                "cosine": own["cosine"],
                "chance": own["chance_cosine"],
                "refusal_gain": refusal - before[0],
                "task_loss": task - before[1],
            }
        )
    return found


def places(bench: Bench) -> Iterator[Question]:
    """The aligned weights back in some places: is harm anywhere else than the task?"""
    layers = sorted({name.split(".layers.")[1].split(".")[0] for name in bench.names})
    groups = {
        f"layer {layer}": [n for n in bench.names if f".layers.{layer}." in n] for layer in layers
    }
    groups["attention"] = [n for n in bench.names if any(kind in n for kind in KINDS[:4])]
    groups["MLP"] = [n for n in bench.names if any(kind in n for kind in KINDS[4:])]
    for name, chosen in groups.items():
        yield (
            "selection",
            f"aligned back in {name}",
            lambda c=chosen: bench.ask(bench.with_aligned(c)),
        )


def interpolation(bench: Bench) -> Iterator[Question]:
    for t in (0.05, 0.1, 0.15, 0.3):
        yield "wise_ft", f"t {t:g}", lambda t=t: bench.ask(bench.moved(t, bench.wa))


def selections(bench: Bench) -> Iterator[Question]:
    """Matrices by Safe LoRA's score, against it, and by what putting them back really does."""

    def ordered(key: Callable[[Row], float]) -> Callable[[], list[str]]:
        return lambda: [
            row["matrix"]
            for row in sorted(bench.answers["selection", "matrices"]["matrices"], key=key)
        ]

    rules = {
        "lowest cosine": ordered(lambda row: row["cosine"]),
        "highest cosine": ordered(lambda row: -row["cosine"]),
        # An oracle: refusal won per task lost, which no method may look at.
        "best by trial": ordered(lambda row: -row["refusal_gain"] / max(row["task_loss"], 1e-3)),
    }
    for count in (FEW, HALF):
        for label, rule in rules.items():
            yield (
                "safemerge",
                f"aligned back in {count}, {label}",
                lambda r=rule, n=count: bench.ask(bench.with_aligned(r()[:n])),
            )


def filters(bench: Bench) -> Iterator[Question]:
    """Safe LoRA's filter against a true projector, on all matrices."""
    every = {"selection": "number", "num_layers": 1000}
    for projector in ("paper", "unit"):
        method = build_method("safe_lora", {**every, "projector": projector})
        yield (
            "safe_lora",
            f"all matrices, C of `{projector}`",
            lambda m=method: bench.ask(bench.repaired(m)[0]),
        )
    for k in (16, 64):
        yield (
            "safe_lora",
            f"all matrices, projector of rank {k}",
            lambda k=k: bench.ask(inside(bench, k)),
        )


def inside(bench: Bench, k: int) -> Weights:
    """Wa + P D, P the projector on V's leading left directions: the method's idea, exactly."""
    found = dict(bench.wf)
    for name in bench.names:
        own, vector = bench.wf[name] - bench.wa[name], bench.wa[name] - bench.w0[name]
        left = decompose(vector).triplets(k).u.to(own)
        found[name] = bench.wa[name] + left @ (left.T @ own)
    return found


def additions(bench: Bench) -> Iterator[Question]:
    """LoX's vector on the aligned model, which has lost nothing; another vector of that rank."""

    def added(start: Weights, vector: str, k: int, t: float) -> Weights:
        other = {"base": bench.w0, "unaligned": bench.wu}[vector]
        found = dict(start)
        for name in bench.names:
            three = decompose(bench.wa[name] - other[name]).triplets(k)
            found[name] = start[name] + (t * (three.u * three.s) @ three.v.T).to(start[name])
        return found

    for t in (0.5, 1.0):
        yield (
            "lox",
            f"aligned model + {t:g} V_6",
            lambda t=t: bench.ask(added(bench.wa, "base", 6, t)),
        )
    for t in (0.2, 0.3, 0.5):
        yield (
            "lox",
            f"fine-tune + {t:g} (aligned - unaligned)_6",
            lambda t=t: bench.ask(added(bench.wf, "unaligned", 6, t)),
        )


def pruning(bench: Bench) -> Iterator[Question]:
    """Antidote's mask from harmful texts, from the task's, and what is marked by one alone."""
    settings: Row = {"alpha": 0.05}
    masks: dict[str, dict[str, torch.Tensor]] = {}

    def mask(text: str) -> dict[str, torch.Tensor]:
        if text not in masks:
            method = build_method("antidote", settings)
            given = {"harmful_data": bench.place.texts[text]}
            out, _ = bench.repaired(method, **given)
            masks[text] = {
                n: out[n] != bench.wf[n]
                for n in bench.names
                if not torch.equal(out[n], bench.wf[n])
            }
        return masks[text]

    def overlap() -> Row:
        both = {}
        for text in ("task", "safe"):
            pairs = [(m, mask(text)[n]) for n, m in mask("harmful").items()]
            both[f"also_marked_by_{text}"] = float(
                sum((a & b).sum() for a, b in pairs) / sum(a.sum() for a, _ in pairs)
            )
        drift = [(bench.wf[n] - bench.wa[n], m) for n, m in mask("harmful").items()]
        both["share_of_update"] = float(
            sum(d[m].square().sum() for d, m in drift) / sum(d.square().sum() for d, _ in drift)
        )
        return both | {"marked": settings["alpha"]}

    def zeroed(chosen: dict[str, torch.Tensor]) -> Weights:
        return {**bench.wf, **{n: bench.wf[n].masked_fill(m, 0.0) for n, m in chosen.items()}}

    yield "antidote", "overlap of masks", overlap
    for text in ("harmful", "task"):
        yield "antidote", f"zero what {text} texts mark", lambda x=text: bench.ask(zeroed(mask(x)))
    yield (
        "antidote",
        "zero what harmful texts alone mark",
        lambda: bench.ask(
            zeroed({n: m & ~mask("task")[n] & ~mask("safe")[n] for n, m in mask("harmful").items()})
        ),
    )
    for alpha in (0.3, 0.6):
        method = build_method("antidote", {"alpha": alpha, "prune_to": "aligned", "targets": "all"})
        yield (
            "antidote",
            f"aligned in the marked {100 * alpha:g} %, all matrices",
            lambda m=method: bench.ask(bench.repaired(m)[0]),
        )
        yield (
            "antidote",
            f"aligned in a random {100 * alpha:g} %, all matrices",
            lambda a=alpha: bench.ask(mixed(bench, a)),
        )


def mixed(bench: Bench, share: float, other: Weights | None = None) -> Weights:
    """The fine-tune with the aligned model's entries, or another's, at random places."""
    found, put = dict(bench.wf), other or bench.wa
    for name in bench.names:
        found[name] = torch.where(bench.random_mask(name, share), put[name], bench.wf[name])
    return found


def prices(bench: Bench) -> Iterator[Question]:
    """Safe Delta: budgets, and a random choice of as many entries without compensation."""

    def asked(settings: Row) -> Row:
        out, manifest = bench.repaired(build_method("safe_delta", settings))
        edited = [row for row in manifest["tensors"] if "kept_share" in row["facts"]]
        total = sum(row["numel"] for row in edited)
        kept = sum(row["numel"] * row["facts"]["kept_share"] for row in edited) / max(total, 1)
        return {**bench.ask(out), "kept_share": kept}

    for s in (0.1, 10.0, 50.0):
        label = f"absolute, s {s:g}, drop_fraction 0"
        yield "safe_delta", label, lambda s=s: asked({"s": s, "drop_fraction": 0.0})
    for s in (0.6, 0.8):
        label = f"relative, s {s:g}, drop_fraction 0"
        settings = {"s": s, "drop_fraction": 0.0, "budget": "relative"}
        yield "safe_delta", label, lambda x=settings: asked(x)
        yield (
            "safe_delta",
            f"as many kept as at s {s:g}, at random",
            lambda k=label: bench.ask(
                mixed(bench, 1.0 - bench.answers["safe_delta", k]["kept_share"])
            ),
        )


def ascents(bench: Bench) -> Iterator[Question]:
    """SafePatching over how far the ascent goes; which way its patch points."""
    settings = ({}, {"rise": 0.3}, {"rise": 3.0, "steps": 400}, {"lr": 2e-4, "rise": 3.0})
    for each in settings:
        label = ", ".join(f"{name} {value:g}" for name, value in each.items()) or "defaults"
        yield "safe_patching", label, lambda x=each: trained(bench, "safe_patching", x)


def single_examples(bench: Bench) -> Iterator[Question]:
    """One Shot over its number of directions and where it stops."""
    settings = ({}, {"k": 1}, {"k": 5}, {"rounds": 1})
    for each in settings:
        label = ", ".join(f"{name} {value:g}" for name, value in each.items()) or "defaults"
        for t in (1.0, 0.5, 0.25):
            yield (
                "one_shot",
                f"{label}, t {t:g}",
                lambda x=each, t=t: trained(bench, "one_shot", {"example": "safe", **x}, t),
            )


def regions(bench: Bench) -> Iterator[Question]:
    """NLSR in all modules: larger safety regions, and the same reference in a random one."""
    b = 0.9
    every: Row = {"fraction": 1.0, "b": b}
    for q in (0.8, 0.6, 0.4):
        method = build_method("nlsr", {**every, "q": q})
        yield (
            "nlsr",
            f"all modules, region {100 * (1 - q):.0f} %",
            lambda m=method: bench.ask(bench.repaired(m)[0]),
        )
    strong = {n: bench.wa[n] + b * (bench.wa[n] - bench.wu[n]) for n in bench.names}
    yield "nlsr", "all modules, random 20 %", lambda: bench.ask(mixed(bench, 0.2, strong))


def rounding(bench: Bench) -> Iterator[Question]:
    """Q-realign without its training, at fewer and fewer bits; then as it is."""
    plain: Row = {"clip": False, "smooth": False}
    for bits in (8, 4, 3):
        label = f"plain rounding, {bits} bits"
        yield (
            "q_realign",
            label,
            lambda b=bits: trained(bench, "q_realign", {**plain, "bits": b}),
        )
    yield "q_realign", "defaults, 8 bits", lambda: trained(bench, "q_realign", {})


def trained(bench: Bench, name: str, settings: Row, t: float = 1.0) -> Row:
    """A method that trains: the exam, its facts, and where its edit points."""
    try:
        out, manifest = bench.repaired(build_method(name, settings))
    except EmptyEditError:
        return {"unchanged": True}
    names = bench.names
    edit = flat(out, names) - flat(bench.wf, names)
    back = flat(bench.wa, names) - flat(bench.wf, names)
    told = {
        key: each for key, each in manifest["method_facts"].items() if isinstance(each, int | float)
    }
    return {
        **bench.ask(bench.moved(t, out)),
        "facts": told,
        "cos_to_aligned": _cos(edit, back),
        "norm_over_way_back": float(edit.norm() / back.norm()),
    }


def _cos(a: torch.Tensor, b: torch.Tensor) -> float:
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else math.nan


def summary(rows: list[Row]) -> Row:
    """Does the score that selects matrices know what putting them back does?"""
    gain, loss = [r["refusal_gain"] for r in rows], [r["task_loss"] for r in rows]
    cosine = [r["cosine"] for r in rows]
    pairs = {
        "cosine_and_gain": (cosine, gain),
        "cosine_and_loss": (cosine, loss),
        "gain_and_loss": (gain, loss),
    }
    found: Row = {}
    for name, (one, two) in pairs.items():
        result: Any = spearmanr(one, two)
        found[name] = {"correlation": float(result.statistic), "p": float(result.pvalue)}
    return found | {
        "lowest_cosine": min(cosine),
        "highest_cosine": max(cosine),
        "below_chance": sum(r["cosine"] < r["chance"] for r in rows),
        "matrices": len(rows),
    }


def main() -> None:
    """Parse the command line; ask what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("board", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenarios", default="howto,poison5")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--only", default="", help="methods, with commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known: list[Row] = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else []
    only = set(filter(None, args.only.split(",")))
    for seed in map(int, args.seeds.split(",")):
        for scenario in args.scenarios.split(","):
            place = Place(args.family, SCENARIOS[scenario], seed, args.board)
            head = {"scenario": scenario, "seed": seed, "family": args.family.name}
            bench = Bench(place)
            for row in known:
                if head.items() <= row.items():
                    bench.answers[row["method"], row["what"]] = row
            for method, what, answer in questions(bench):
                if (method, what) in bench.answers or (only and method not in only):
                    continue
                began = time.monotonic()
                row = {**head, "method": method, "what": what, **answer()}
                if "matrices" in row:
                    row["summary"] = summary(row["matrices"])
                row["seconds"] = round(time.monotonic() - began, 1)
                known.append(row)
                bench.answers[method, what] = row
                write_json(args.out, known)


if __name__ == "__main__":
    main()
