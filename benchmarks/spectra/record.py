"""From the figures of the spectral benchmarks to docs/data/bench-spectra.json: targets and section.

The section is text for docs/benchmarks.md; a figure stands in it only through the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.spectra.edit_pass import BLOCK
from benchmarks.spectra.scan import target_of
from benchmarks.spectra.timing import spoken

SCHEMA = "realign/bench-spectra/1"
Found = Mapping[str, Any]


def record(parts: Mapping[str, Found | None], machine: Mapping[str, Any]) -> dict[str, Any]:
    """The whole file; a part that is None has not been measured."""
    return {
        "schema": SCHEMA,
        "machine": dict(machine),
        "parts": dict(parts),
        "targets": [
            _edit_pass(parts.get("edit_pass")),
            _ranks(parts.get("ranks")),
            _scan(parts.get("scan")),
            _family(parts.get("family")),
        ],
        "section": {"title": "Spectra", "markdown": _section(parts)},
    }


def _target(
    what: str, target: str, script: str, measured: str | None, met: bool | None, conditions: str
) -> dict[str, Any]:
    return {
        "what": what,
        "target": target,
        "measured": measured,
        "met": met,
        "conditions": conditions,
        "script": f"benchmarks/spectra/{script}.py",
    }


def _edit_pass(found: Found | None) -> dict[str, Any]:
    measured = met = None
    shapes: Mapping[str, Any] = {} if found is None else found["shapes"]
    if found is not None and found["block"] is not None:
        least = min(row["ratio"] for row in shapes.values())
        agreed = all(row.get("agreement", {}).get("within", True) for row in shapes.values())
        measured = f"{found['block']:.1f}x (slowest shape {least:.1f}x)"
        met = least >= 3.0 and agreed
    return _target(
        "LSSF edit pass against a naive full-SVD script, CPU",
        "at least 3x",
        "edit_pass",
        measured,
        met,
        "matrices of a decoder block of a 1.1 B model, 4096 anchor tokens, bfloat16, one thread; "
        "every output entry against a dense float64 reference",
    )


def _ranks(found: Found | None) -> dict[str, Any]:
    measured = met = None
    if found is not None:
        measured = f"{found['identical']} of {found['matrices']} matrices"
        met = found["identical"] == found["matrices"] >= 96
    return _target(
        "Rank decisions identical to float64 SVD",
        "all, of at least 96 matrices",
        "ranks",
        measured,
        met,
        "8 kinds of spectra, 6 aspects, bfloat16 and float32; entropy, energy and stable rank",
    )


def _scan(found: Found | None) -> dict[str, Any]:
    measured = met = None
    if found is not None:
        judged = {shape: row for shape, row in found.items() if target_of(shape) is not None}
        measured = ", ".join(f"{shape} {spoken(row['scan'])}" for shape, row in judged.items())
        met = all(row["scan"]["ratio"] >= (target_of(s) or 0.0) for s, row in judged.items())
    return _target(
        "Weight-only scan against a full-SVD script",
        "at least 3.5x on square, 7x on 4:1 matrices",
        "scan",
        measured,
        met,
        "all drift metrics of one matrix, two decompositions, float64 against float32; one thread",
    )


def _family(found: Found | None) -> dict[str, Any]:
    measured = met = None
    if found is not None:
        measured = (
            f"{found['cold']['ratio']:.2f}x from disk, {found['warm']['ratio']:.2f}x from memory"
        )
        met = max(found[name]["ratio"] for name in ("cold", "warm")) <= 2.0
    return _target(
        "Scan of a further fine-tune of a known family over only reading both checkpoints",
        "at most 2x",
        "family",
        measured,
        met,
        "32 directions per matrix; the base is not there; wall time, one BLAS thread",
    )


def _section(parts: Mapping[str, Found | None]) -> str:
    blocks = [
        "Each script prints its ratio; `python -m benchmarks.spectra` runs all of them, each in a "
        "process with one thread per library, rivals in turns in the same process. Times are "
        "medians in seconds, ratios are followed by the extremes of single turns."
    ]
    edit, ranks, scan, family = (parts.get(n) for n in ("edit_pass", "ranks", "scan", "family"))
    if edit is not None:
        blocks += ["### LSSF edit pass", _edit_text(edit)]
    if ranks is not None:
        blocks += [
            "### Rank decisions",
            f"{ranks['decisions']} decisions on {ranks['matrices']} matrices (smaller side about "
            f"{ranks['scale']} to {3 * ranks['scale']}): {ranks['identical']} matrices without a "
            f"difference from the float64 SVD. The entropy agrees to {ranks['entropy_error']:.0e}.",
        ]
    if scan is not None:
        blocks += ["### Weight-only scan", _scan_text(scan)]
    if family is not None:
        blocks += ["### A further fine-tune of a known family", _family_text(family)]
    return "\n\n".join(blocks)


def _edit_text(found: Found) -> str:
    head = "| matrix | in a block | script | realign | ratio | with moments | worst entry | rank |"
    lines = [head, "|" + " --- |" * 8]
    for shape, row in found["shapes"].items():
        seconds, checked = row["seconds_of"], row.get("agreement")
        worst = rank = "-"
        if checked is not None:
            worst = f"{checked['worst_over_allowed']:.2f}"
            rank = f"{checked['rank']} = {checked['rank_of_reference']}"
        count = BLOCK.get(shape, "-")
        lines.append(
            f"| {shape} | {count} | {seconds['naive']:.2f} | {seconds['ours']:.2f} | "
            f"{spoken(row)} | {row['with_moments']:.1f}x | {worst} | {rank} |"
        )
    text = "\n".join(lines)
    if found["block"] is not None:
        text += (
            f"\n\nOver the matrices of a block: {found['block']:.1f}x, "
            f"{found['with_moments']:.1f}x with the time that accumulating moments in float64 adds "
            "to the forward pass, which a script that keeps whole activations does not spend."
        )
    return text + (
        "\n\n*Worst entry* is the largest |W' - reference| over what is allowed, 1 ulp of bfloat16 "
        "plus 1e-6 max|E|; half an ulp is the rounding of the output itself. A script that took "
        "longer than 20 seconds was run once."
    )


def _scan_text(found: Found) -> str:
    lines = [
        "| matrix | script | realign | ratio | spectrum against `svd` | against `svdvals` |",
        "|" + " --- |" * 6,
    ]
    for shape, row in found.items():
        seconds = row["seconds_of"]
        lines.append(
            f"| {shape} | {seconds['script']:.2f} | {seconds['ours']:.2f} | {spoken(row['scan'])} "
            f"| {spoken(row['spectrum'])} | {spoken(row['values_only'])} |"
        )
    return "\n".join(lines)


def _family_text(found: Found) -> str:
    lines = ["| | scan | only reading | ratio | reading, GB/s |", "|" + " --- |" * 5]
    for name, words in (("cold", "from disk"), ("warm", "from memory")):
        row = found[name]
        lines.append(
            f"| {words} | {row['seconds_of']['scan']:.2f} | {row['seconds_of']['read']:.2f} | "
            f"{spoken(row, 2)} | {row['gb_per_second']:.1f} |"
        )
    return "\n".join(lines) + (
        f"\n\n{found['bytes'] / 1e9:.1f} GB in two checkpoints, {found['matrices']} matrices with "
        "a subspace. Projecting on 32 directions takes 64 floating-point operations per entry of "
        "the model: from memory it is arithmetic that bounds the scan, from disk it is the disk."
    )
