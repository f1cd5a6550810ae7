"""Questions about methods: sweeps, controls in place of a choice, where an edit points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from why_bench import Bench, Question, Row, Weights, cosine_of, flat

from realign.errors import EmptyEditError
from realign.repair.registry import build_method
from realign.subspace.spectrum import decompose


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
        "cos_to_aligned": cosine_of(edit, back),
        "norm_over_way_back": float(edit.norm() / back.norm()),
    }
