"""Questions about the weights: the geometry of the update, its places, choices made by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from why_bench import KINDS, Bench, Question, Row, Weights, cosine_of, flat

from realign.repair.registry import build_method
from realign.subspace.spectrum import decompose

HALF, FEW = 10, 5
"""How many of the 21 matrices are put back."""
LEADING = 8


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
        "cos_d_v": cosine_of(d, v),
        "cos_d_h": cosine_of(d, h),
        "cos_v_h": cosine_of(v, h),
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
