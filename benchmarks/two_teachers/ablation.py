"""What every part of `two_teachers` does: variants of it on one fine-tune, by the real engine.

    realign lab compare FAMILY -o DIR
    python benchmarks/two_teachers/ablation.py FAMILY DIR docs/data/two-teachers-ablation.json

A variant is a setting of the method or a part of it replaced (`PARTS`); the package is not changed.
The file is written after every variant, and what it holds is not run again; a file of other code,
models or questions is refused. docs/two-teachers.md is filled by `page.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign.audit.canonical import sha256_json
from realign.lab.compare import given_to
from realign.lab.marking import interpolated, read_weights
from realign.lab.places import Place
from realign.lab.record import write_json
from realign.lab.resources import measured
from realign.lab.scenarios import SCENARIOS
from realign.repair.engine import repair
from realign.repair.methods.two_teachers import TwoTeachers
from realign.repair.registry import build_method
from realign.repair.request import RepairRequest
from realign.subspace.keyed import generator

# The module by name: `realign.repair.methods.two_teachers` is also the name of a method.
texts = import_module("realign.repair.methods.two_teachers_texts")
training = import_module("realign.repair.methods.two_teachers_training")

SCHEMA = "realign/two-teachers-ablation/1"
STRENGTHS = (1.0, 0.75)


@dataclass(frozen=True)
class Variant:
    """One way to run the method."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    """Of the repair, not of the fine-tune."""
    part: str | None = None
    """Which part is replaced, of `PARTS`."""

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "variant": self.name,
            "settings": dict(self.settings),
            "seed": self.seed,
            "part": self.part,
        }


VARIANTS = (
    Variant("default"),
    Variant("no written prompts", {"self_prompts": 0}),
    Variant("no exchanged tokens", part="exchange"),
    Variant("random subspaces", part="subspace"),
    Variant("rank 2", {"rank": 2}),
    Variant("rank 32", {"rank": 32}),
    Variant("keep weight 1", {"keep_weight": 1.0}),
    Variant("keep weight 20", {"keep_weight": 20.0}),
    Variant("40 steps", {"steps": 40}),
    Variant("subspaces of the unaligned vector", {"safety_vector": "unaligned"}),
    Variant("default, repair seed 1", seed=1),
    Variant("default, repair seed 2", seed=2),
    Variant("the aligned model teaches no written prompts", part="taught"),
    Variant("the base model writes", {"author": "base"}),
    Variant("rank 16", {"rank": 16}),
    Variant("rank 4", {"rank": 4}),
)
"""The most telling ones first."""


def no_exchange(*_prompts: Any, **_how: Any) -> list[Any]:
    """In place of `exchanged`: no prompt of the task is varied."""
    return []


def random_subspaces(workbench: Any, student: Any, *, kind: Any, rank: int) -> dict[str, Any]:
    """In place of `subspaces`: orthonormal directions that know nothing of alignment."""
    found: dict[str, Any] = _OWN["subspaces"](workbench, student, kind=kind, rank=rank)
    return {
        key: training.Subspace(
            _orthonormal(each.u_ok, seed=workbench.seed, key=key, role="left"),
            _orthonormal(each.r_ik, seed=workbench.seed, key=key, role="right"),
            each.a_ki,
            each.b_ok,
        )
        for key, each in found.items()
    }


def _orthonormal(like: Tensor, *, seed: int, key: str, role: str) -> Tensor:
    """Random orthonormal columns of the same shape."""
    drawn = generator(seed=seed, method="ablation", key=key, role=role)
    gaussian = torch.from_numpy(drawn.standard_normal(tuple(like.shape)))
    return torch.linalg.qr(gaussian).Q.to(like)


def given_anchors_only(method: Any, workbench: Any) -> Any:
    """In place of `gather`: what was written and is refused is taught by nobody."""
    made = _OWN["gather"](method, workbench)
    with workbench.running("aligned"):
        given = {text.ids for text in workbench.examples("safe", role="aligned")}
    return texts.Texts([each for each in made.anchors if each.ids in given], made.keep)


PARTS: Mapping[str, tuple[Any, str, Callable[..., Any]]] = {
    "exchange": (texts, "exchanged", no_exchange),
    "subspace": (training, "subspaces", random_subspaces),
    "taught": (training, "gather", given_anchors_only),
}
"""By name of a part: the module that uses it, what it is called there, and what replaces it."""
_OWN = {name: getattr(module, name) for module, name, _ in PARTS.values()}


@contextmanager
def replaced(part: str | None) -> Generator[None]:
    """Run with a part of the method replaced; afterwards it is as before."""
    if part is None:
        yield
        return
    module, name, other = PARTS[part]
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, _OWN[name])


def run(place: Place, variant: Variant) -> dict[str, Any]:
    """Repair as the leaderboard does, and ask the exam at every strength."""
    method = build_method("two_teachers", variant.settings)
    with tempfile.TemporaryDirectory(prefix="realign-ablation-") as work:
        given, out = given_to(place, method), Path(work) / "out"
        with replaced(variant.part), measured() as cost:
            repair(
                RepairRequest(
                    finetuned=place.subject,
                    output=out,
                    method=method,
                    anchors=place.family / "suites" / "anchors.jsonl",
                    suites=place.withheld,
                    device="cpu",
                    offline=True,
                    cache_dir=Path(work) / "cache",
                    seed=variant.seed,
                    **given,
                )
            )
        end = read_weights(out)
        manifest = json.loads((out / "realign.json").read_text("utf-8"))
    points = [
        {"strength": t, "marks": place.ask(interpolated(place.start, end, t))} for t in STRENGTHS
    ]
    facts = {
        key: round(value, 6)
        for key, value in manifest["method_facts"].items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return {
        **variant.told(),
        "points": points,
        "facts": facts,
        "processor_seconds": round(cost.processor, 1),
    }


def code() -> str:
    """Hash of the method's files."""
    own = Path(inspect.getfile(TwoTeachers))
    files = sorted(own.parent.glob(f"{own.stem}*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key_of(place: Place) -> str:
    """What the answers depend on beside the variant: code, models, questions, texts."""
    kinds = build_method("two_teachers", {}).data
    told = [code(), place.digest, place.texts_digest(kinds)]
    return sha256_json({"told": told})


def chosen(names: Sequence[str]) -> list[Variant]:
    """The variants of those names; none named: all."""
    known = {each.name: each for each in VARIANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"there is no variant {unknown[0]}; choose from: {'; '.join(known)}")
    return [known[name] for name in names] or list(VARIANTS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line; run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("board", type=Path, help="where the comparison keeps its fine-tunes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenario", default="poison5", choices=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=1, help="of the fine-tune")
    parser.add_argument("--only", action="append", default=[], metavar="VARIANT")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    place = Place(args.family, SCENARIOS[args.scenario], args.seed, args.board)
    head = {
        "schema": SCHEMA,
        "key": key_of(place),
        "family": args.family.name,
        "scenario": args.scenario,
        "tasks": list(place.scenario.tasks),
        "seed": args.seed,
    }
    told: dict[str, Any] = {}
    if args.out.is_file():
        told = json.loads(args.out.read_text("utf-8"))
    if told and {name: told.get(name) for name in head} != head:
        raise SystemExit(f"{args.out} has answers of other code, models or questions: move it away")
    if not told:
        told = {
            **head,
            "aligned": place.ask(read_weights(place.role("aligned"))),
            "finetuned": place.ask(place.start),
            "rows": [],
        }
    for variant in chosen(args.only):
        if any(variant.told().items() <= row.items() for row in told["rows"]):
            continue
        told["rows"].append(run(place, variant))
        write_json(args.out, told)


if __name__ == "__main__":
    main()
