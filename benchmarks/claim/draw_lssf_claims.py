"""Tables and picture of docs/lssf-claims.md from the files that `realign lab claims -o` wrote.

    python benchmarks/claim/draw_lssf_claims.py docs/data/lssf-claims-*.json docs/lssf-claims.md

Text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in the page is replaced; the picture goes
to docs/pictures/lssf-claims.svg. A file's `matrices` are not read and may be left out.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Same bytes from the same numbers.
plt.rcParams.update({"svg.hashsalt": "realign", "svg.fonttype": "none", "font.size": 9})

Means = dict[str, Any]
DELTAS = {
    "general": "general skills",
    "safe_unaligned": "aligned - unaligned",
    "safe_base": "aligned - base",
}


def cell(mean: Means | None) -> str:
    return "" if mean is None else f"{mean['value']:.2f} ({mean['low']:.2f}-{mean['high']:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def delta_name(name: str) -> str:
    return DELTAS.get(name, f"task vector, `{name.removeprefix('task_')}`")


def tables(found: Means) -> dict[str, str]:
    whole = found["whole"]
    stability = [
        [f"`{name}`", cell(whole["same_text"].get(name)), cell(mean)]
        for name, mean in whole["other_half"].items()
    ]
    shares = whole["share"]
    isolated = [
        [
            delta_name(name),
            cell(shares[name]),
            cell(whole["excess"][name]),
            cell(whole["over_general"].get(name)),
        ]
        for name in [*[n for n in DELTAS if n in shares], *[n for n in shares if n not in DELTAS]]
    ]
    layers = [
        [
            layer,
            cell(each["chance"]),
            cell(each["other_half"]["aligned"]),
            *(cell(each["same_text"].get(name)) for name in ("both_p5", "howto")),
            *(cell(each["excess"].get(name)) for name in DELTAS),
        ]
        for layer, each in found["layers"].items()
    ]
    chance = f"Chance level r / d_out: {cell(whole['chance'])}.\n\n"
    by_layer = ["layer", "chance", "ceiling", "`both_p5`, overlap", "`howto`, overlap"]
    return {
        "stability": chance + table(["model", "same texts", "disjoint halves"], stability),
        "isolation": table(["delta", "share", "excess", "excess / general's"], isolated),
        "layers": table([*by_layer, *(f"{name}, excess" for name in DELTAS.values())], layers),
    }


def draw(families: list[Means], file: Path) -> None:
    """Overlaps against their ceiling and chance; excesses against 1."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for i, found in enumerate(families):
        whole, style = found["whole"], {"marker": "os"[i], "color": f"C{i}", "linestyle": "none"}
        overlap = {
            "aligned, other half (ceiling)": whole["other_half"]["aligned"],
            "general, same texts": whole["same_text"]["general"],
            "both_p5, same texts": whole["same_text"]["both_p5"],
            "both_p5, other half": whole["other_half"]["both_p5"],
            "unaligned, same texts": whole["same_text"]["unaligned"],
            "unaligned, other half": whole["other_half"]["unaligned"],
            "base, same texts": whole["same_text"]["base"],
            "chance": whole["chance"],
        }
        names = [*DELTAS, "task_both_p5", "task_howto"]
        excess = {
            delta_name(name).replace("`", ""): whole["excess"][name]
            for name in names
            if name in whole["excess"]
        }
        for axis, values in ((left, overlap), (right, excess)):
            points = [mean["value"] for mean in values.values()]
            errors = [
                [mean["value"] - mean["low"] for mean in values.values()],
                [mean["high"] - mean["value"] for mean in values.values()],
            ]
            places = [row + 0.22 * (i - 0.5) for row in range(len(values))]
            axis.errorbar(points, places, xerr=errors, label=found["preset"], capsize=2, **style)
            axis.set_yticks(range(len(values)), list(values))
            axis.set_ylim(len(values) - 0.4, -0.6)
            axis.grid(axis="x", alpha=0.25)
    left.set_xlim(0, 1)
    left.set_title("Stability: overlap with the aligned model", fontsize=9)
    right.axvline(1, color="0.4", linewidth=0.9, linestyle="--")
    right.set_xlim(0, None)
    right.set_title("Isolation: share over chance (dashed: 1)", fontsize=9)
    left.legend(frameon=False, loc="center left")
    fig.tight_layout()
    fig.savefig(file, metadata={"Date": None})


def main() -> None:
    *files, page = map(Path, sys.argv[1:])
    families = [json.loads(file.read_text("utf-8")) for file in files]
    families.sort(key=lambda found: found["preset"] != "small")
    text = page.read_text("utf-8")
    for found in families:
        for name, made in tables(found).items():
            mark = f"{found['preset']}-{name}"
            new = f"<!-- {mark}:begin -->\n\n{made}\n\n<!-- {mark}:end -->"
            pattern = re.compile(rf"<!-- {mark}:begin -->.*?<!-- {mark}:end -->", re.DOTALL)
            text, count = pattern.subn(lambda _: new, text)  # noqa: B023 - used at once
            if count != 1:
                raise SystemExit(f"{page} has {count} places for {mark}")
    page.write_text(text, "utf-8")
    draw(families, page.parent / "pictures" / "lssf-claims.svg")


if __name__ == "__main__":
    main()
