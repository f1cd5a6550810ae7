"""The leaderboard's runs: every method over its range, on every scenario and seed, resumable.

A repair is computed once per method, setting, scenario and seed by the ordinary engine; the dial is
turned in memory. Every (method, scenario, seed) leaves one JSON file, a cell, which is kept while
the method's code, the models, the texts and the questions are the same; a wider range only adds
points to it. What the cells say together is worked out in `leaderboard`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from realign.audit.canonical import sha256_json
from realign.errors import EmptyEditError, NothingToDoError, RealignError, UsageError
from realign.lab.arms import REFUSAL_TUNING, Arm, Settings, arm_range, find_arms
from realign.lab.baselines import refusal_tuning
from realign.lab.build import finetune_variant
from realign.lab.folders import save_model
from realign.lab.leaderboard import HARMLESS, Board, build_board
from realign.lab.leaderboard_json import board_json
from realign.lab.leaderboard_page import whole_page
from realign.lab.marking import Marks, Weights, interpolated, put_weights, read_weights
from realign.lab.places import Place
from realign.lab.record import read_record, write_json, write_text
from realign.lab.resources import measured
from realign.lab.scenarios import find_scenarios
from realign.progress import SILENT, Progress
from realign.repair.engine import repair
from realign.repair.method import Method
from realign.repair.request import RepairRequest

CELL_SCHEMA = "realign/lab-cell/1"
SEEDS = (1, 2, 3)
HOPELESS = 0.95
"""Weaker strengths are not asked where the fine-tune has no harm to begin with, or where a stronger
one left at least this share of it: they could only be nearer to no repair."""
SECOND_ROUND = 1000
"""Added to the seed of the second fine-tune."""
REQUEST_TEXTS = {
    "safe": "safe_data",
    "harmful": "harmful_data",
    "task": "task_data",
    "keep": "keep_data",
    "pairs": "pairs",
}
"""By kind of text, the option of a repair that names its file."""


@dataclass
class Tally:
    """What one call did."""

    done: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """By cell, why it could not be computed."""
    left: int = 0
    """Cells for which there was no time."""


def compare(
    families: Sequence[str | Path],
    out: str | Path,
    *,
    methods: Sequence[str] | None = None,
    scenarios: Iterable[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    fine: bool = False,
    budget_seconds: float | None = None,
    progress: Progress = SILENT,
) -> Tally:
    """Compute the cells that are missing.

    Seeds come first, so that an interrupted comparison has whole seeds.

    Args:
        families: folders made by `build_family`, with different names.
        out: where fine-tunes, texts and cells are kept; made if absent.
        methods: arms or methods; None: all.
        scenarios: names; None: all.
        seeds: of the fine-tunes.
        fine: also the strengths between those of the dial.
        budget_seconds: no cell is begun later than this.
        progress: shows cells, and why one could not be computed.

    Raises:
        NotFoundError, OutputError: a folder is no family.
        UsageError: an unknown method or scenario, no seed, no time, or two families of one name.
    """
    arms, chosen = find_arms(methods), find_scenarios(scenarios)
    folders = [Path(family) for family in families]
    if len({folder.name for folder in folders}) < len(folders):
        raise UsageError("two families have the same name", "rename the folder of one")
    if budget_seconds is not None and not budget_seconds > 0:
        raise UsageError(
            f"--budget-seconds {budget_seconds:g} is no time to work in",
            "give a positive number of seconds, or leave it out",
        )
    if not seeds or not folders:
        raise UsageError("nothing to compare", "give a family and at least one seed")
    for folder in folders:
        read_record(folder)
    tally, began = Tally(), time.monotonic()
    total = len(seeds) * len(folders) * len(chosen) * len(arms)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress.task("comparing", total=total, unit="cells") as task:
            for seed in seeds:
                for folder in folders:
                    for scenario in chosen:
                        place = Place(folder, scenario, seed, Path(out))
                        for arm in arms:
                            late = (
                                budget_seconds is not None
                                and time.monotonic() - began > budget_seconds
                            )
                            _fill(place, arm, tally, fine=fine, late=late, progress=progress)
                            task.advance()
    finally:
        torch.set_num_threads(threads)
    return tally


def _fill(
    place: Place, arm: Arm, tally: Tally, *, fine: bool, late: bool, progress: Progress
) -> None:
    """Compute one cell, or what is missing of it."""
    if late:
        tally.left += 1
        return
    file = place.cells / f"{arm.name}.json"
    key, wanted = _key(place, arm), arm_range(arm, fine=fine)
    old = _known(file, key)
    if old.get("range") == wanted:
        tally.kept += 1
        return
    with tempfile.TemporaryDirectory(prefix="realign-compare-") as work:
        try:
            cell = _Bench(place, arm, arm.strengths(fine=fine), Path(work), old).cell()
        except RealignError as error:
            name = f"{place.name}, {arm.name}"
            tally.failed[name] = str(error)
            progress.note(f"{name}: {error}")
            cell = {"error": str(error), "points": []}
    head = {
        "schema": CELL_SCHEMA,
        "key": key,
        "range": wanted,
        "family": place.family.name,
        "scenario": place.scenario.name,
        "tasks": list(place.scenario.tasks),
        "seed": place.seed,
        "arm": arm.name,
        "method": arm.method,
        "kind": arm.kind,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, head | cell)
    if "error" not in cell:
        tally.done += 1


def _known(file: Path, key: str) -> dict[str, Any]:
    """The cell as it lies there, if it is this very one and was computed without an error."""
    if not file.is_file():
        return {}
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return data if data.get("key") == key and "error" not in data else {}


def _key(place: Place, arm: Arm) -> str:
    first = [dict(arm.settings[0]), arm.usual] if place.scenario.rounds > 1 else []
    # The plain baseline draws its own rows.
    kinds = () if arm.method == REFUSAL_TUNING else arm.build({}).data
    told = {
        "place": place.digest,
        "texts": place.texts_digest(kinds),
        "method": arm.method,
        "first": first,
        "code": _code(arm),
    }
    return sha256_json(told)


def _code(arm: Arm) -> str:
    """Hash of the files that the method stands in: its own, and those named after it."""
    maker: Any = refusal_tuning if arm.method == REFUSAL_TUNING else type(arm.build({}))
    own = Path(inspect.getfile(maker))
    code = hashlib.sha256(own.read_bytes())
    for file in sorted(own.parent.glob(f"{own.stem}_*.py")):
        code.update(file.read_bytes())
    return code.hexdigest()


class _Bench:
    """One arm on one place."""

    def __init__(
        self,
        place: Place,
        arm: Arm,
        strengths: Sequence[float],
        work: Path,
        old: Mapping[str, Any],
    ) -> None:
        self.place, self.arm, self.strengths, self.work = place, arm, strengths, work
        self.repairs: list[dict[str, Any]] = list(old.get("repairs", ()))
        self.known = {_place_of(point): point for point in old.get("points", ())}

    def cell(self) -> dict[str, Any]:
        """All points of the arm, with what they are compared to."""
        place = self.place
        if place.scenario.rounds == 1:
            subject, start, stages = place.subject, place.start, {}
        else:
            subject, stages = self._tuned_again()
            start = read_weights(subject)
        reference = _kept(place, "finetuned", lambda: place.ask(start)) if not stages else None
        cell: dict[str, Any] = {
            "aligned": _kept(
                place, "aligned", lambda: place.ask(read_weights(place.role("aligned")))
            ),
            "finetuned": reference or place.ask(start),
        }
        points = [
            point
            for number, settings in enumerate(self.arm.settings)
            for point in self._points(settings, subject, start, cell["finetuned"], number)
        ]
        if all("error" in point for point in points):
            raise UsageError(str(points[0]["error"]))
        return cell | {"points": points, "repairs": self.repairs} | stages

    def _points(
        self, settings: Settings, subject: Path, start: Weights, same: Any, number: int
    ) -> list[dict[str, Any]]:
        """The points of one repair, the dial turned in memory."""
        end: Weights | None = None
        found: list[dict[str, Any]] = []
        before = _harm(same)
        for strength in self.strengths:
            usual = number == 0 and strength == self.arm.usual
            point: dict[str, Any] = {
                "settings": dict(settings),
                "strength": strength,
                "label": self.arm.label(settings, strength),
                "usual": usual,
            }
            spared = found and (
                before <= HARMLESS or _harm(found[-1]["marks"]) >= HOPELESS * before
            )
            if spared and not usual:
                continue
            if (old := self.known.get(_place_of(point))) is not None:
                found.append(point | old)
                continue
            try:
                if end is None:
                    end = self._repaired(settings, subject, start, self.work / f"out{number}")
            except RealignError as error:
                return [point | {"error": str(error)}]
            if end is None:
                usual = point["strength"] = self.arm.usual
                told = {"unchanged": True, "usual": number == 0, "marks": same}
                return [point | told | {"label": self.arm.label(settings, usual)}]
            found.append(point | {"marks": self.place.ask(interpolated(start, end, strength))})
        return found

    def _repaired(
        self, settings: Settings, subject: Path, start: Weights, out: Path
    ) -> Weights | None:
        """The repaired weights at full strength; None where the repair changes nothing."""
        if self.arm.method != REFUSAL_TUNING:
            # What is trained for it is no cost of it.
            given_to(self.place, self.arm.build(settings))
        with measured() as cost:
            try:
                end = self._run(settings, subject, start, out)
            except (EmptyEditError, NothingToDoError):
                end = None
        self.repairs.append(
            {
                "settings": dict(settings),
                "seconds": round(cost.wall, 3),
                "processor_seconds": round(cost.processor, 3),
                "peak_mib": None if cost.peak_mib is None else round(cost.peak_mib, 1),
            }
        )
        return end

    def _run(
        self, settings: Settings, subject: Path, start: Weights, out: Path, strength: float = 1.0
    ) -> Weights:
        place = self.place
        if self.arm.method == REFUSAL_TUNING:
            put_weights(place.loaded, start)
            return refusal_tuning(place.loaded, place.studio, place.scenario, seed=place.seed)
        method = self.arm.build(settings)
        repair(
            RepairRequest(
                finetuned=subject,
                output=out,
                method=method,
                strength=strength,
                anchors=place.family / "suites" / "anchors.jsonl",
                suites=place.withheld,
                device="cpu",
                offline=True,
                # Of its own: every method pays for its own statistics.
                cache_dir=self.work / "cache" / out.name,
                **given_to(place, method),
            )
        )
        return read_weights(out)

    def _tuned_again(self) -> tuple[Path, dict[str, Any]]:
        """Repair at the usual point, fine-tune that once more; what both did."""
        place, arm = self.place, self.arm
        settings, first = arm.settings[0], self.work / "first"
        end = self._run(settings, place.subject, place.start, self.work / "first-full")
        weights = interpolated(place.start, end, arm.usual)
        put_weights(place.loaded, weights)
        save_model(place.loaded.model, place.studio.tokenizer, first, self.work)
        again = finetune_variant(
            place.family,
            place.scenario.variant,
            seed=place.seed + SECOND_ROUND,
            start=first,
            out=self.work / "again",
        )
        return again, {"first_round": place.ask(weights)}


def _place_of(point: Mapping[str, Any]) -> str:
    return json.dumps([point["settings"], point["strength"]], sort_keys=True)


def _harm(marks: Mapping[str, Any]) -> float:
    return Marks.from_json(marks["rates"]["harm"]).rate


def given_to(place: Place, method: Method) -> dict[str, Any]:
    """Checkpoints and texts for a repair: all roles that every family has, the rest as needed."""
    given: dict[str, Any] = {role: place.role(role) for role in ("aligned", "base")}
    # A family without an unaligned model gets one only for what may use it.
    wanted = getattr(method, "safety_vector", "base") in ("unaligned", "auto")
    if wanted or (place.family / "unaligned").is_dir():
        given["unaligned"] = place.role("unaligned")
    if hasattr(method, "safety_model"):
        given["safety"] = place.role("safety")
    return given | {REQUEST_TEXTS[kind]: place.texts[kind] for kind in method.required_data()}


def _kept(place: Place, name: str, make: Any) -> dict[str, Any]:
    """Marks of a reference model of the place, asked once."""
    file, key = place.cells / "references" / f"{name}.json", f"{place.digest}"
    if file.is_file():
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if data["key"] == key:
            return data["marks"]
    marks: dict[str, Any] = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"key": key, "marks": marks})
    return marks


def read_cells(out: str | Path) -> list[dict[str, Any]]:
    """Every cell of a comparison, failed ones included, in a fixed order."""
    files = sorted((Path(out) / "cells").glob("*/*/*.json"))
    cells: list[dict[str, Any]] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [cell for cell in cells if cell.get("schema") == CELL_SCHEMA]


def make_board(cells: Sequence[Mapping[str, Any]]) -> Board:
    """Work out the leaderboard of cells, scenarios in their own order."""
    names = [each.name for each in find_scenarios({str(cell["scenario"]) for cell in cells})]
    return build_board(cells, names)


def write_board(out: str | Path) -> Board:
    """Work out the leaderboard of all cells in a folder; write it there as JSON and Markdown."""
    board = make_board(read_cells(out))
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / "leaderboard.json", board_json(board))
    write_text(Path(out) / "leaderboard.md", whole_page(board))
    return board
