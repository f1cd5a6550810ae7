"""Tables and pictures of docs/claims.md from the files that `realign lab claims -o` wrote.

    python benchmarks/claim/draw_claims.py docs/data/claims-*.json docs/claims.md

Text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in the page is replaced; the pictures go
to docs/pictures. A file's `matrices` are not read and may be left out, and so may `vectors` and
`moved`, which not every family has.
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


def vector_tables(found: Means) -> dict[str, str]:
    """LoX and AsFT."""
    vectors = found.get("vectors")
    if vectors is None:
        return {}
    rows = [
        [
            update_name(name),
            percent(each["complied"]),
            f"{each['distance']:.2f}",
            cell(each["ratio"]),
            span(each["cosines"], 3),
            span(each["excess"], 1),
        ]
        for name, each in vectors["directions"].items()
    ]
    head = ["update D", "harm, %", "norm(D) / norm(V)", "R_ft / R_align", "cos(D, V)", "excess"]
    pairs = {
        "R_ft / R_align and harm": vectors["ratio_and_harm"],
        "R_ft / R_align and norm(D)": vectors["ratio_and_distance"],
        "cos(D, V) and harm": vectors["cosine_and_harm"],
    }
    shown = [
        [name, f"{each['correlation']:+.2f}", f"{each['p']:.2g}", str(each["n"])]
        for name, each in pairs.items()
        if each is not None
    ]
    return {
        "vectors": table(head, rows),
        "associations": table(["over the models", "Spearman", "p", "models"], shown),
    }


def moved_table(found: Means) -> dict[str, str]:
    """The aligned model, moved."""
    if "moved" not in found:
        return {}
    rows = [
        [
            name,
            f"{each['norm']:.2f}",
            f"{each['cosine']:+.2f}".replace("-0.00", "0.00").replace("+0.00", "0.00"),
            rate(each["rates"]["harmful"]["complied"]),
            rate(each["rates"]["lookalikes"]["refused"]),
            rate(each["rates"]["general"]["correct"]),
        ]
        for name, each in found["moved"]["models"].items()
    ]
    head = ["moved by", "norm / norm(V)", "cos with V", "harm, %", "over-refusal, %", "general, %"]
    return {"moved": table(head, rows)}


def update_name(name: str) -> str:
    if name.startswith("poison_"):
        return f"`both_{name.removeprefix('poison_')}` less `both_p0`"
    return f"`{name}`"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def rate(value: Means) -> str:
    low, high = 100 * value["low"], 100 * value["high"]
    return f"{100 * value['rate']:.1f} ({low:.1f}-{high:.1f})"


def span(mean: Means, digits: int) -> str:
    shown = [f"{mean[part]:.{digits}f}" for part in ("value", "low", "high")]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def draw_vectors(families: list[Means], file: Path) -> None:
    """LoX's ratio against the size of the update; the models that were moved."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), width_ratios=(1, 1.1))
    for i, found in enumerate(families):
        named = found["vectors"]["directions"].items()
        points = [(n, e) for n, e in named if e["ratio"] is not None and e["complied"] is not None]
        shades = left.scatter(
            [each["distance"] for _, each in points],
            [each["ratio"]["value"] for _, each in points],
            c=[100 * each["complied"] for _, each in points],
            marker="os"[i],
            cmap="coolwarm",
            vmin=0,
            vmax=100,
            edgecolors="0.3",
            label=f"seed {found['seed']}",
        )
        moved = found.get("moved", {"models": {}})["models"]
        names = list(moved)
        rates = [each["rates"]["harmful"]["complied"] for each in moved.values()]
        places = [row + 0.22 * (i - 0.5) for row in range(len(names))]
        right.errorbar(
            [100 * each["rate"] for each in rates],
            places,
            xerr=[
                [100 * max(0.0, each["rate"] - each["low"]) for each in rates],
                [100 * max(0.0, each["high"] - each["rate"]) for each in rates],
            ],
            marker="os"[i],
            color=f"C{i}",
            linestyle="none",
            capsize=2,
        )
        if names:
            right.set_yticks(range(len(names)), names)
            right.set_ylim(len(names) - 0.4, -0.6)
    fig.colorbar(shades, ax=left, label="harmful compliance, %")
    left.set_xlabel("norm(D) / norm(V)")
    left.set_ylabel("R_ft / R_align")
    left.set_title("LoX: the ratio follows the size of the update", fontsize=9)
    left.legend(frameon=False)
    right.set_xlim(-3, 103)
    right.set_xlabel("harmful compliance, %")
    right.grid(axis="x", alpha=0.25)
    right.set_title("AsFT: the aligned model moved by ...", fontsize=9)
    fig.tight_layout()
    fig.savefig(file, metadata={"Date": None})


def draw(families: list[Means], file: Path) -> None:
    """Overlaps against their ceiling and chance; excesses against 1."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for i, found in enumerate(families):
        whole, style = found["whole"], {"marker": "os^"[i], "color": f"C{i}", "linestyle": "none"}
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
            places = [row + 0.22 * (i - 1) for row in range(len(values))]
            axis.errorbar(points, places, xerr=errors, label=label(found), capsize=2, **style)
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


def label(found: Means) -> str:
    return f"{found['preset']}, seed {found['seed']}"


def main() -> None:
    *files, page = map(Path, sys.argv[1:])
    families = [json.loads(file.read_text("utf-8")) for file in files]
    families.sort(key=lambda found: (found["preset"] != "small", found["seed"]))
    text = page.read_text("utf-8")
    for found in families:
        for name, made in {**tables(found), **vector_tables(found), **moved_table(found)}.items():
            mark = f"{found['preset']}-{found['seed']}-{name}"
            new = f"<!-- {mark}:begin -->\n\n{made}\n\n<!-- {mark}:end -->"
            pattern = re.compile(rf"<!-- {mark}:begin -->.*?<!-- {mark}:end -->", re.DOTALL)
            text, count = pattern.subn(lambda _: new, text)  # noqa: B023 - used at once
            if count != 1:
                raise SystemExit(f"{page} has {count} places for {mark}")
    page.write_text(text, "utf-8")
    pictures = page.parent / "pictures"
    draw(families, pictures / "lssf-claims.svg")
    draw_vectors([each for each in families if "vectors" in each], pictures / "vector-claims.svg")


if __name__ == "__main__":
    main()
