"""The tables of docs/benchmarks.md from the result files.

    python -m benchmarks.streaming.page docs

Text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is replaced; everything else is written
by hand. A result file that brings `targets` and `section` (other benchmarks do) is shown as well.
Pictures are linked where they have been drawn: draw first.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.streaming.targets import Data, rows, spread

MISSING = "not yet measured"
PICTURES = {
    "compare": "Wall time and peak memory of each contender",
    "scaling": "Wall time against bytes moved with its fit; peak memory",
    "memory": "Peak memory: measured, predicted, and the bound",
}
"""What `draw` makes, and the text in its place."""


def read(docs: Path) -> Data:
    """The result files by name."""
    return {
        file.stem.removeprefix("bench-"): json.loads(file.read_text("utf-8"))
        for file in sorted((docs / "data").glob("bench-*.json"))
    }


def tables(data: Data) -> dict[str, str]:
    """Every generated part of the page."""
    compare, scaling, wide = (data.get(name) for name in ("compare", "scaling", "wide"))
    return {
        "targets": _targets(data),
        "conditions": _conditions(data),
        "compare": MISSING if compare is None else _compare(compare),
        "ratios": MISSING if compare is None else _ratios(compare),
        "agreement": MISSING if compare is None else _agreement(compare),
        "scaling": MISSING if scaling is None else _scaling(scaling),
        "prediction": MISSING
        if scaling is None
        else _prediction([*scaling["runs"], *(wide["runs"] if wide else ())]),
        "wide": MISSING if wide is None else _wide(wide),
        "others": _others(data),
    }


def links(docs: Path) -> dict[str, str]:
    """The pictures of the page, as far as their files exist."""
    found: dict[str, str] = {}
    for name, text in PICTURES.items():
        file = f"pictures/bench-{name}.png"
        found[f"picture-{name}"] = f"![{text}]({file})" if (docs / file).is_file() else MISSING
    return found


def _targets(data: Data) -> str:
    lines: list[list[str]] = []
    for row in rows(data):
        met = {None: "", True: "met", False: "**not met**"}[row.met]
        if row.target == "(no target)":
            met = ""
        lines.append([row.what, row.target, row.measured or MISSING, met, row.conditions])
    return table(["what", "target", "measured", "", "conditions"], lines)


def _conditions(data: Data) -> str:
    lines: list[list[str]] = []
    for name, found in data.items():
        each = found.get("machine")
        if not each:
            continue
        versions = ", ".join(f"{key} {value}" for key, value in each.get("versions", {}).items())
        rival = found.get("mergekit")
        if rival:
            versions += ", mergekit's environment: "
            versions += ", ".join(f"{key} {value}" for key, value in rival.items())
        device = each.get("gpu") or each.get("device")
        lines.append(
            [
                f"`bench-{name}.json`",
                ", ".join(
                    str(part)
                    for part in (
                        f"{each.get('cores')} cores",
                        each.get("processor"),
                        f"{each.get('memory_gb')} GB",
                        device,
                        f"niceness {each['niceness']}" if each.get("niceness") else None,
                    )
                    if part
                ),
                f"Python {each.get('python')}, {versions}",
                str(found.get("repeats", "")),
                _loads(found),
            ]
        )
    return table(["results", "machine", "versions", "repeats", "load before"], lines)


def _loads(found: Mapping[str, Any]) -> str:
    loads = list(found.get("load_before", ()))
    for each in found.get("runs", ()):
        loads += each.get("load_before", ()) if isinstance(each, dict) else ()
    return f"{min(loads):.1f}-{max(loads):.1f}" if loads else ""


def _compare(found: Mapping[str, Any]) -> str:
    lines: list[list[str]] = []
    for name, each in found["contenders"].items():
        start = found["start_up"][re.split(r"[ ,]", name)[0]]["wall"]
        lines.append(
            [
                name,
                spread(each["wall"]),
                f"{start['median']:.2f}",
                spread(each["cpu"]),
                f"{each['peak_rss']['max'] / 1e6:.0f}",
                f"{each['sync']['median']:.2f}",
            ]
        )
    size = found["checkpoint_bytes"] / 1e9
    head = ["", "wall (s)", "of it start-up", "CPU (s)", "peak RSS (MB)", "flush after (s)"]
    text = f"{found['parameters'] / 1e9:.2f} B parameters, {size:.2f} GB per checkpoint, "
    return f"{text}{len(found['load_before'])} repeats.\n\n" + table(head, lines)


def _ratios(found: Mapping[str, Any]) -> str:
    keys = ("wall", "wall_without_start_up", "cpu", "cpu_without_start_up", "peak_rss")
    lines = [
        [each["of"].replace("this", name), *(spread(each[key]) for key in keys)]
        for name, each in found["ratios"].items()
    ]
    lines += [
        [
            each["of"].replace("this", name).replace("ours", "ours, first run"),
            *(spread(each[key]) for key in keys),
        ]
        for name, each in found.get("ratios_of_first_run", {}).items()
    ]
    return table(
        ["ratio", "wall", "without start-up", "CPU", "without start-up", "peak RSS"], lines
    )


def _agreement(found: Mapping[str, Any]) -> str:
    lines = [
        [
            name,
            _share(each["identical_to_reference"]),
            _share(each["identical_to_ours"]),
            f"{each['error_over_edit']:.1e}" if each["error_over_edit"] else "0",
        ]
        for name, each in found["agreement"].items()
    ]
    head = ["output", "same bits as the reference", "same bits as ours", "error / edit"]
    return table(head, lines)


def _share(value: float) -> str:
    return "all" if value == 1 else f"{100 * value:.3f} %"


def _scaling(found: Mapping[str, Any]) -> str:
    residuals = found["fit"]["residuals"] if found["fit"] else {}
    lines: list[list[str]] = []
    for each in found["runs"]:
        resta = each["method"] == "resta"
        lines.append(
            [
                each["family"].replace("+", ", layers x 2"),
                each["method"],
                f"{each['parameters'] / 1e9:.2f}",
                str(each["shape"]["layers"]),
                f"{each['moved_bytes'] / 1e9:.2f}",
                spread(each["wall"]),
                f"{residuals[each['family']]:+.2f}" if resta and residuals else "",
                f"{each['floor']['median']:.2f}" if each["floor"] else "",
                f"{each['peak_rss']['max'] / 1e6:.0f}",
            ]
        )
    head = ["family", "method", "B", "layers", "GB moved", "wall (s)", "residual (s)"]
    made = table([*head, "floor (s)", "peak RSS (MB)"], lines)
    each = found["fit"]
    if not each:
        return made
    line = (
        f"Fit over the element-wise runs: wall = {each['seconds_at_zero']:.2f} s + "
        f"{each['seconds_per_gb']:.3f} s per GB moved, R^2 = {each['r_squared']:.4f}."
    )
    return f"{made}\n\n{line}"


def _prediction(runs: Sequence[Mapping[str, Any]]) -> str:
    lines: list[list[str]] = []
    for each in runs:
        cells = [
            f"{each['predicted'][key] / 1e6:.0f} / {each['measured'][key] / 1e6:.0f} "
            f"({each['predicted_over_measured'][key]:.2f}x)"
            for key in ("read", "written", "peak_memory")
        ]
        lines.append([each["family"].replace("+", ", layers x 2"), each["method"], *cells])
    return table(["family", "method", "read (MB)", "written (MB)", "peak memory (MB)"], lines)


def _wide(found: Mapping[str, Any]) -> str:
    shape = found["runs"][0]["shape"]
    lines = [
        [
            each["method"],
            f"{each['wall']['median']:.0f}",
            f"{each['cpu']['median']:.0f}",
            f"{each['peak_rss']['max'] / 1e6:.0f}",
            f"{each['bound'] / 1e6:.0f}",
            f"{each['largest_matrix'] * 4 / 1e6:.0f}" if each["largest_matrix"] else "none",
        ]
        for each in found["runs"]
    ]
    text = (
        f"{shape['layers']} layer, hidden {shape['hidden']}, feed-forward {shape['ffn']}, "
        f"{shape['heads']} heads and {shape['kv_heads']} of keys and values, vocabulary "
        f"{shape['vocab']}: {found['runs'][0]['checkpoint_bytes'] / 1e9:.1f} GB per checkpoint."
    )
    head = ["method", "wall (s)", "CPU (s)", "peak RSS (MB)", "bound (MB)"]
    return f"{text}\n\n" + table([*head, "largest decomposed matrix (float32, MB)"], lines)


def _others(data: Data) -> str:
    parts = [
        f"## {found['section']['title']}\n\n{found['section']['markdown'].strip()}"
        for found in data.values()
        if "section" in found
    ]
    return "\n\n".join(parts)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    body = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def write(docs: Path) -> None:
    """Replace the generated parts of docs/benchmarks.md."""
    page = docs / "benchmarks.md"
    text = page.read_text("utf-8")
    for name, made in {**tables(read(docs)), **links(docs)}.items():
        new = f"<!-- {name}:begin -->\n\n{made}\n\n<!-- {name}:end -->"
        pattern = re.compile(rf"<!-- {name}:begin -->.*?<!-- {name}:end -->", re.DOTALL)
        text, count = pattern.subn(lambda _, new=new: new, text)
        if count != 1:
            raise SystemExit(f"{page} has {count} places for {name}")
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
