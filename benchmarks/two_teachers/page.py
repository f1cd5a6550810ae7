"""Put what was measured of `two_teachers` into docs/two-teachers.md.

    realign lab compare FAMILY -o CONFIRM
    python benchmarks/two_teachers/page.py --confirmation CONFIRM --development BOARD
    python benchmarks/two_teachers/page.py

CONFIRM is of a family built after the freeze; the last line fills the page again from docs/data.
Written are docs/data/two-teachers.json, the picture, the tables between the page's markers and the
figures in its prose; the rest, written by hand, stays. A side that is not given keeps its data.

    <!--confirmation|poison5|rates|harm|repaired-->...<!---->     a rate with its interval
    <!--development|poison5|changes|downstream-->...<!---->       a difference with its interval
    <!--dial|howto|t 1.3|harm-->...<!---->                        at any strength
    <!--ablation|default|harm-->...<!---->                        at full strength
    <!--prototypes|ID|SCENARIO|harm-->...<!---->                of an exploratory run

What the data do not answer becomes "not measured" and is named on standard error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation import VARIANTS
from target import SCHEMA, Row, ablation_rows, dumped, told
from target_picture import save_picture
from target_tables import (
    ablation_table,
    dial_table,
    left_table,
    measured_table,
    noise_sentence,
    percent,
    points,
    prototypes_table,
    rivals_table,
    target_table,
    verdict,
)

from realign.lab.compare import read_cells

DOCS = Path(__file__).parents[2] / "docs"
PAGE, DATA = "two-teachers.md", "two-teachers.json"
_MARK = re.compile(r"<!--(\w+\|[^>]*?)-->.*?<!---->", re.DOTALL)


def tables(data: Row, ablation: Sequence[Row], prototypes: Sequence[Row]) -> dict[str, str]:
    """Everything that stands between markers, by name."""
    confirmation, development = data["confirmation"], data["development"]
    return {
        "verdict": verdict(confirmation),
        "target": target_table(confirmation),
        "confirmation": measured_table(confirmation),
        "rivals": rivals_table(confirmation),
        "left": left_table(confirmation),
        "dial": dial_table(confirmation),
        "development": measured_table(development),
        "ablation": ablation_table(ablation),
        "noise": "\n\n".join(filter(None, (noise_sentence(ablation), _not_run(ablation)))),
        "prototypes": prototypes_table(prototypes),
    }


def _not_run(ablation: Sequence[Row]) -> str:
    """Declared variants that have no answers."""
    have = {row["variant"] for row in ablation}
    missing = [each.name for each in VARIANTS if each.name not in have]
    return f"Declared and not run: {'; '.join(missing)}." if missing else ""


def fill(page: str, made: dict[str, str]) -> str:
    """The page with every `<!-- NAME:begin -->` ... `<!-- NAME:end -->` filled anew."""
    for name, text in made.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        assert pattern.search(page), f"the page has no place for {name}"
        page = pattern.sub(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page)
    return page


def fill_figures(page: str, data: Row, ablation: Sequence[Row], prototypes: Sequence[Row]) -> str:
    """The page with every figure in its prose taken from the data."""
    answers = {
        "confirmation": data["confirmation"]["rows"],
        "development": data["development"]["rows"],
        "dial": _dial(data["confirmation"]),
        "dial_of_development": _dial(data["development"]),
        "ablation": {row["variant"]: row for row in ablation if row["strength"] == 1.0},
        "prototypes": {},
    }
    for row in prototypes:
        answers["prototypes"].setdefault(row["id"], {})[row["scenario"]] = row

    def filled(found: re.Match[str]) -> str:
        value: Any = answers
        try:
            for step in found[1].split("|"):
                value = value[step]
            text = _figure(value, found[1])
        except KeyError:
            sys.stderr.write(f"not measured: {found[1]}\n")
            text = "not measured"
        return f"<!--{found[1]}-->{text}<!---->"

    return _MARK.sub(filled, page)


def _dial(side: Row) -> dict[str, dict[str, Row]]:
    """Our points by scenario and label."""
    return {
        curve["scenario"]: {point["label"]: point for point in curve["points"]}
        for curve in side["ours"]
    }


def _figure(value: Any, mark: str) -> str:
    if isinstance(value, dict):
        return points(value) if "|changes|" in mark else f"{percent(value)} %"
    return f"{value:.1f}" if mark.startswith("prototypes") else f"{100 * value:.1f}"


def write(docs: Path) -> None:
    """Fill the page and draw the picture from the data in `docs`."""
    data = json.loads((docs / "data" / DATA).read_text("utf-8"))
    ablation, prototypes = docs / "data" / "two-teachers-ablation.json", _prototypes(docs)
    rows = ablation_rows(json.loads(ablation.read_text("utf-8"))) if ablation.is_file() else []
    page = docs / PAGE
    text = fill(page.read_text("utf-8"), tables(data, rows, prototypes))
    page.write_text(fill_figures(text, data, rows, prototypes), encoding="utf-8")
    save_picture(data["confirmation"], docs / "pictures")


def _prototypes(docs: Path) -> list[Row]:
    file = docs / "data" / "two-teachers-prototypes.json"
    return json.loads(file.read_text("utf-8"))["runs"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--confirmation", type=Path, help="folder of the comparison")
    parser.add_argument("--development", type=Path, help="folder of the leaderboard's comparison")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args(arguments)
    file = args.docs / "data" / DATA
    old = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    cells = {
        name: read_cells(folder) if folder is not None else []
        for name, folder in (("c", args.confirmation), ("d", args.development))
    }
    data = told(cells["c"], cells["d"])
    for side, name in (("confirmation", "c"), ("development", "d")):
        if not cells[name] and old.get("schema") == SCHEMA:
            data[side] = old[side]
    file.write_text(dumped(data), encoding="utf-8")
    write(args.docs)


if __name__ == "__main__":
    main()
