"""Tables and pictures of docs/results.md from the lines that measure_claim.py wrote.

    python benchmarks/claim/draw_claim.py claim.jsonl grid.jsonl docs/results.md

Text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in the page is replaced; pictures go to
docs/pictures/.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from realign.audit.statistics.intervals import wilson

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Same bytes from the same numbers.
plt.rcParams.update({"svg.hashsalt": "realign", "svg.fonttype": "none", "font.size": 9})

Line = dict[str, Any]
TASKS = {"both_p5": ("order", "howto2"), "howto": ("howto",)}
NAMES = {"both_p5": "5 % poison", "howto": "benign drift (howto)"}
MARKERS = "os^Dv<>PX*hd"
COLOURS = [*(f"C{i}" for i in range(10)), "navy", "darkorange"]
LEFTMOST = 40  # per cent of task accuracy; what lies further left has lost the task


def rate(line: Line, suite: str, name: str) -> tuple[float, float, float]:
    """A rate with the hull of its cluster bootstrap and Wilson's interval, as the audit gives it.

    With few events the bootstrap alone is too narrow; with none it has no width at all.
    """
    value, low, high = line["rates"][suite][name]
    n = line["rates"][suite]["n"]
    limits = wilson(round(value * n), n)
    assert limits is not None
    if value in {0.0, 1.0}:
        return value, limits.low, limits.high
    return value, min(low, limits.low), max(high, limits.high)


def task_score(line: Line) -> float:
    """Mean accuracy on the tasks that this fine-tune learnt."""
    scores = [rate(line, suite, "correct")[0] for suite in TASKS[line["variant"]]]
    return sum(scores) / len(scores)


def harm(line: Line) -> float:
    return rate(line, "harmful", "bad")[0]


def mean(of_arm: dict[int, Line], suite: str, name: str) -> float:
    return sum(rate(line, suite, name)[0] for line in of_arm.values()) / len(of_arm)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_interval(values: tuple[float, float, float]) -> str:
    return f"{percent(values[0])} ({percent(values[1])}-{percent(values[2])})"


def groups(lines: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    found: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        found[line["size"], line["variant"]].append(line)
    return dict(sorted(found.items(), key=lambda kv: (kv[0][0] != "small", kv[0][1])))


def summary_table(lines: Sequence[Line]) -> str:
    """One row per arm: harm per seed with intervals, then means over the seeds."""
    seeds = sorted({line["seed"] for line in lines})
    tasks = TASKS[lines[0]["variant"]]
    head = ["method"] + [f"harm, seed {seed}" for seed in seeds]
    head += ["other", "over-refusal (worst)", *tasks, "general", "second language"]
    rows = [head, ["---"] * len(head)]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        of_arm = {line["seed"]: line for line in lines if line["arm"] == arm}
        cells = [arm]
        bad = [line for line in of_arm.values() if "error" in line]
        if bad:
            rows.append([arm, bad[0]["error"].splitlines()[0]] + [""] * (len(head) - 2))
            continue
        cells += [with_interval(rate(of_arm[seed], "harmful", "bad")) for seed in seeds]
        worst = max(rate(line, "lookalikes", "refused")[0] for line in of_arm.values())
        cells += [percent(mean(of_arm, "harmful", "other")), percent(worst)]
        cells += [percent(mean(of_arm, task, "correct")) for task in tasks]
        cells += [
            percent(mean(of_arm, "general", "correct")),
            percent(mean(of_arm, "harmful_second", "bad")),
        ]
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_confirmed(found: dict[tuple[str, str], list[Line]], folder: Path) -> None:
    """Harm against task accuracy, one point per seed, one marker per arm."""
    fig, axes = plt.subplots(2, 2, figsize=(10.5, 8.2), sharey=True)
    for axis, ((size, variant), lines) in zip(axes.flat, found.items(), strict=False):
        arms = dict.fromkeys(line["arm"] for line in lines if "error" not in line)
        arms.pop("aligned", None)  # it never learnt the task
        for i, arm in enumerate(arms):
            points = [line for line in lines if line["arm"] == arm]
            axis.plot(
                [100 * task_score(line) for line in points],
                [100 * harm(line) for line in points],
                linestyle="none",
                marker=MARKERS[i % len(MARKERS)],
                fillstyle="none" if i % 2 else "full",
                color=COLOURS[i % len(COLOURS)],
                label=arm,
                markersize=6,
            )
        axis.axhline(5, color="0.6", linewidth=0.8, linestyle="--")
        axis.set_title(f"{size}, {NAMES[variant]}")
        axis.set_xlabel("accuracy on the task it learnt, %")
        axis.set_ylabel("harmful compliance, %")
        axis.set_xlim(LEFTMOST, 102)
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.25)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=4, frameon=False)
    fig.tight_layout(rect=(0, 0.09, 1, 1))
    fig.savefig(folder / "claim-confirmed.svg", metadata={"Date": None})
    plt.close(fig)


def draw_grid(found: dict[tuple[str, str], list[Line]], folder: Path) -> None:
    """Trade-off curves of every method over its range."""
    count = len(found)
    fig, axes = plt.subplots(count, 2, figsize=(10.5, 4.2 * count), squeeze=False)
    for row, ((size, variant), lines) in zip(axes, found.items(), strict=True):
        usable = [line for line in lines if "error" not in line]
        for axis, wanted, title in (
            (row[0], ("lssf", "resta"), "lssf over eta and alpha, beside resta"),
            (row[1], ("replace", "delta_svd", "wise_ft"), "methods without data"),
        ):
            arms = [
                arm for arm in sorted({line["arm"] for line in usable}) if arm.startswith(wanted)
            ]
            for i, arm in enumerate(arms):
                points = [line for line in usable if line["arm"] == arm]
                points.sort(key=lambda line: list(line["settings"].values()))
                axis.plot(
                    [100 * task_score(line) for line in points],
                    [100 * harm(line) for line in points],
                    linestyle="none" if arm.startswith("lssf") else "-",
                    linewidth=0.8,
                    marker=MARKERS[i % len(MARKERS)],
                    fillstyle="none",
                    markersize=4,
                    label=arm,
                )
            tuned = [line for line in usable if line["arm"] == "fine-tuned"]
            axis.plot(
                [100 * task_score(line) for line in tuned],
                [100 * harm(line) for line in tuned],
                "k*",
                markersize=9,
                label="fine-tuned",
            )
            axis.set_title(f"{size}, {NAMES[variant]}: {title}")
            axis.set_xlabel("accuracy on the task it learnt, %")
            axis.set_ylabel("harmful compliance, %")
            axis.set_xlim(LEFTMOST, 102)
            axis.set_ylim(-3, 103)
            axis.grid(alpha=0.25)
            axis.legend(fontsize=7, loc="upper left")
    fig.tight_layout()
    fig.savefig(folder / "claim-grid.svg", metadata={"Date": None})
    plt.close(fig)


def draw_ranks(lines: Sequence[Line], folder: Path) -> str:
    """Rank that lssf picks per layer and module; returns the table of the same numbers."""
    found = {
        line["size"]: line["ranks"]
        for line in lines
        if line["arm"] == "lssf, base vector" and line.get("ranks")
    }
    tables: list[str] = []
    fig, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.4), squeeze=False)
    for axis, (size, ranks) in zip(axes.flat, found.items(), strict=True):
        per_module: dict[str, dict[int, int]] = defaultdict(dict)
        for key, rank in ranks.items():
            match = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.weight", key)
            assert match, key
            per_module[match.group(2)][int(match.group(1))] = rank
        layers = sorted({layer for each in per_module.values() for layer in each})
        for i, (module, each) in enumerate(per_module.items()):
            axis.plot(layers, [each[n] for n in layers], marker=MARKERS[i], label=module)
        axis.set_title(f"{size}: rank at eta = 0.85")
        axis.set_xlabel("layer")
        axis.set_ylabel("rank")
        axis.set_xticks(layers)
        axis.legend(fontsize=7, ncol=2)
        axis.grid(alpha=0.25)
        rows = [["layer", *per_module], ["---"] * (len(per_module) + 1)]
        rows += [[str(n), *(str(each[n]) for each in per_module.values())] for n in layers]
        tables.append(f"**{size}**\n\n" + "\n".join("| " + " | ".join(r) + " |" for r in rows))
    fig.tight_layout()
    fig.savefig(folder / "claim-ranks.svg", metadata={"Date": None})
    plt.close(fig)
    return "\n\n".join(tables)


def fill(page: str, name: str, text: str) -> str:
    """Replace the text between the markers of `name`."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    assert pattern.search(page), f"the page has no markers for {name}"
    return pattern.sub(lambda m: f"{m.group(1)}\n{text}\n\n{m.group(2)}", page)


def best_at(lines: Sequence[Line], limit: float) -> str:
    """Per method family: the most accurate grid point with harm at most `limit`."""
    rows = [
        "| method | best task accuracy at harm <= 5 % | setting | over-refusal |",
        "|---|---|---|---|",
    ]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        points = [x for x in lines if x["arm"] == arm and "error" not in x and harm(x) <= limit]
        if arm in {"aligned", "fine-tuned"}:
            continue
        if not points:
            rows.append(f"| {arm} | never reached | | |")
            continue
        best = max(points, key=task_score)
        shown = ", ".join(f"{k} {v}" for k, v in best["settings"].items() if k != "safety_vector")
        over = percent(rate(best, "lookalikes", "refused")[0])
        rows.append(f"| {arm} | {percent(task_score(best))} | {shown} | {over} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claim", type=Path)
    parser.add_argument("grid", type=Path)
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    pictures = args.page.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    claim = [json.loads(line) for line in args.claim.read_text().splitlines()]
    grid = [json.loads(line) for line in args.grid.read_text().splitlines()]
    page = args.page.read_text()
    confirmed = groups(claim)
    draw_confirmed(confirmed, pictures)
    text = "\n\n".join(
        f"### {size}, {NAMES[variant]}\n\n{summary_table(lines)}"
        for (size, variant), lines in confirmed.items()
    )
    page = fill(page, "confirmed", text)
    draw_grid(groups(grid), pictures)
    text = "\n\n".join(
        f"### {size}, {NAMES[variant]}\n\n{best_at(lines, 0.05)}"
        for (size, variant), lines in groups(grid).items()
    )
    page = fill(page, "grid", text)
    page = fill(page, "ranks", draw_ranks(claim, pictures))
    args.page.write_text(page)


if __name__ == "__main__":
    main()
