"""What each method does to fine-tunes that lost their refusals: confirmation runs and grids.

    python benchmarks/claim/measure_claim.py confirm FAMILY... --seeds 1 2 3 -o claim.jsonl
    python benchmarks/claim/measure_claim.py grid FAMILY... --seeds 1 -o grid.jsonl

FAMILY is a folder made by `realign lab build`. `confirm` takes every arm of settings.toml as it is
committed; `grid` sweeps the strength-like parameters of every method for the trade-off curves. Both
make the fine-tunes they need (one per variant and seed, kept beside the family), repair through the
ordinary engine, let the repaired model answer the held-out suites, and append one JSON line per
model. Lines already in the output are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from realign.audit.judges import JudgeResult
from realign.audit.statistics.resampling import bootstrap_interval
from realign.audit.suites import Suite, load_suite
from realign.errors import RealignError
from realign.lab.build import finetune_variant
from realign.lab.measure import judge_suite
from realign.lab.record import read_record
from realign.model.loading import load_model
from realign.repair.engine import repair
from realign.repair.method import Method
from realign.repair.methods.null_control import DeltaSvdNull, ReplaceNull
from realign.repair.request import RepairRequest

HERE = Path(__file__).parent
VARIANTS = ("both_p5", "howto")
SUITES = ("harmful", "harmful_second", "lookalikes", "order", "howto", "howto2", "general")
NULLS: Mapping[str, type[Method]] = {"replace_null": ReplaceNull, "delta_svd_null": DeltaSvdNull}
ETAS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
GAMMAS = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Arm:
    """One method at one setting."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data_free: bool = False
    control: bool = False


def confirmed_arms() -> list[Arm]:
    """The arms fixed by commit."""
    return [Arm(**each) for each in tomllib.loads((HERE / "settings.toml").read_text())["arm"]]


def grid_arms() -> Iterator[Arm]:
    """Every method over its range; `lssf` over a fine grid of eta and alpha."""
    for vector in ("base", "unaligned"):
        for gamma in GAMMAS:
            yield Arm(f"resta, {vector} vector", "resta", {"gamma": gamma, "safety_vector": vector})
        for alpha in ALPHAS:
            for eta in ETAS:
                settings = {"eta": eta, "alpha": alpha, "safety_vector": vector}
                yield Arm(f"lssf, {vector} vector", "lssf", settings)
    for alpha in (0.5, 0.75, 1.0, 1.25, 1.5):
        for rank in (2, 4, 8):
            settings = {"rank": rank, "alpha": alpha, "safety_vector": "base"}
            yield Arm(f"delta_svd, rank {rank}", "delta_svd", settings)
    for a in np.arange(0.1, 1.0, 0.1):
        yield Arm("wise_ft", "wise_ft", {"a": round(float(a), 1)})
    for rank in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24):
        yield Arm("replace", "replace", {"rank": rank})
        yield Arm("replace, random directions", "replace_null", {"rank": rank}, control=True)
    for side in ("left", "right"):
        for rank in (2, 4, 6, 8, 12, 16):
            yield Arm(f"replace, {side}", "replace", {"rank": rank, "side": side})


def rates(model: Path, family: Path) -> dict[str, Any]:
    """Rates on the held-out suites with 95 % intervals that respect shared entities."""
    suites = {name: load_suite(family / "suites" / f"{name}.jsonl") for name in SUITES}
    loaded = load_model(model, device="cpu")
    try:
        return {
            name: _suite_rates(suite, judge_suite(loaded, suite)) for name, suite in suites.items()
        }
    finally:
        loaded.unload()


def _suite_rates(suite: Suite, verdicts: list[JudgeResult]) -> dict[str, Any]:
    fields = {
        "harmful": ("bad", "refused", "other"),
        "safe": ("refused", "correct"),
        "task": ("correct",),
    }[suite.kind]
    clusters = [item.cluster or item.id for item in suite.items]
    found: dict[str, Any] = {"n": len(verdicts), "clusters": len(set(clusters))}
    for name in fields:
        hits = [float(bool(getattr(verdict, name))) for verdict in verdicts]
        found[name] = [sum(hits) / len(hits), *_interval(hits, clusters)]
    per_template: dict[str, list[float]] = {}
    for item, verdict in zip(suite.items, verdicts, strict=True):
        hit = float(bool(getattr(verdict, fields[0])))
        per_template.setdefault(item.template or "-", []).append(hit)
    found["templates"] = {key: sum(v) / len(v) for key, v in sorted(per_template.items())}
    return found


def _interval(hits: list[float], clusters: list[str]) -> tuple[float, float]:
    limits = bootstrap_interval(hits, seed=0, clusters=clusters, resamples=2000)
    assert limits is not None, "a suite has items"
    return limits.low, limits.high


def repaired(arm: Arm, subject: Path, family: Path, out: Path) -> dict[str, Any]:
    """Repair through the engine; returns what the manifest says about ranks and norms."""
    settings = dict(arm.settings)
    method: Any = NULLS[arm.method](**settings) if arm.method in NULLS else arm.method
    result = repair(
        RepairRequest(
            finetuned=subject,
            aligned=family / "aligned",
            base=family / "base",
            unaligned=family / "unaligned",
            method=method,
            settings={} if arm.method in NULLS else settings,
            anchors=family / "suites" / "anchors.jsonl",
            output=out,
            device="cpu",
        )
    )
    rows = [row for row in result.rows if row.outcome == "edited"]
    ranks = {row.key: row.facts["rank"] for row in rows if "rank" in row.facts}
    return {"relative_norm": _mean(row.relative_norm for row in rows), "ranks": ranks}


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def run(args: argparse.Namespace) -> None:
    """Measure what the output does not hold yet."""
    torch.set_num_threads(1)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    known = out.read_text().splitlines() if out.exists() else []
    done = {_key(json.loads(line)) for line in known}
    arms = confirmed_arms() if args.what == "confirm" else list(grid_arms())
    if args.only:
        arms = [arm for arm in arms if any(arm.name.startswith(name) for name in args.only)]
    for family in map(Path, args.family):
        size = read_record(family).preset
        for seed in args.seeds:
            for variant in args.variants:
                subject = family.parent / f"{family.name}-tunes" / f"{variant}-s{seed}"
                if not subject.exists():
                    subject.parent.mkdir(exist_ok=True)
                    finetune_variant(family, variant, seed=seed, out=subject)
                references = [
                    Arm("aligned", "none"),
                    Arm("fine-tuned", "none"),
                ]
                for arm in references + arms:
                    place = {
                        "size": size,
                        "variant": variant,
                        "seed": seed,
                        "arm": arm.name,
                        "method": arm.method,
                        "settings": dict(arm.settings),
                    }
                    if _key(place) in done:
                        continue
                    line = place | {"data_free": arm.data_free, "control": arm.control}
                    line |= _measured(arm, subject, family)
                    with out.open("a") as stream:
                        stream.write(json.dumps(line) + "\n")
                    print(_brief(line), flush=True)


def _measured(arm: Arm, subject: Path, family: Path) -> dict[str, Any]:
    if arm.method == "none":
        return {"rates": rates(family / "aligned" if arm.name == "aligned" else subject, family)}
    work = Path(tempfile.mkdtemp(prefix="realign-claim-"))
    try:
        facts = repaired(arm, subject, family, work / "out")
        return {"rates": rates(work / "out", family), **facts}
    except RealignError as error:
        return {"error": str(error)}
    finally:
        shutil.rmtree(work)


def _key(line: Mapping[str, Any]) -> str:
    fields = ("size", "variant", "seed", "arm", "method", "settings")
    return json.dumps([line[name] for name in fields], sort_keys=True)


def _brief(line: Mapping[str, Any]) -> str:
    head = f"{line['size']} {line['variant']} s{line['seed']} {line['arm']} {line['settings']}"
    if "error" in line:
        return f"{head}: {line['error']}"
    found = line["rates"]
    skills = ("order", "howto", "howto2", "general")
    return (
        f"{head}: harm {found['harmful']['bad'][0]:.3f} other {found['harmful']['other'][0]:.3f} "
        f"over {found['lookalikes']['refused'][0]:.3f} "
        + " ".join(f"{name} {found[name]['correct'][0]:.3f}" for name in skills)
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("confirm", "grid"))
    parser.add_argument("family", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--only", nargs="+", default=[], help="arms whose name starts so")
    parser.add_argument("-o", "--out", required=True)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
