"""The tables of docs/why-methods-fail.md from what `why.py` wrote."""

from __future__ import annotations

from typing import Any

from page import table

Row = dict[str, Any]
TITLES = {
    "wise_ft": "wise_ft",
    "selection": "places",
    "safemerge": "selections",
    "safe_lora": "filters",
    "lox": "additions",
    "antidote": "pruning",
    "safe_delta": "prices",
    "safe_patching": "ascents",
    "one_shot": "examples",
    "nlsr": "regions",
    "q_realign": "rounding",
}
"""By method, the marker of its table."""
GEOMETRY = {
    "dose_of_v_left": "dose of V left",
    "norm_d_over_v": "norm(D) / norm(V)",
    "cos_d_v": "cos(D, V)",
    "cos_d_h": "cos(D, H)",
    "h_in_d": "H in D",
    "share_in_leading": "share of D in U_8",
    "chance_in_leading": "chance",
    "safe_lora_gain": "norm(C D) / norm(D)",
}


def why_tables(rows: list[Row]) -> dict[str, str]:
    """Every table by its marker."""
    found = {"geometry": _geometry(rows), "scores": _scores(rows), "overlap": _overlap(rows)}
    for method, name in TITLES.items():
        found[name] = _exams(rows, method)
    return found


def _places(rows: list[Row]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["scenario"], row["seed"]) for row in rows))


def _geometry(rows: list[Row]) -> str:
    lines = [
        (
            f"`{row['scenario']}` seed {row['seed']}",
            *(f"{row[name]:.3f}" for name in GEOMETRY),
        )
        for row in rows
        if row["method"] == "geometry"
    ]
    return table(("fine-tune", *GEOMETRY.values()), lines)


def _scores(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["what"] != "matrices":
            continue
        told = row["summary"]
        pairs = [
            f"{told[name]['correlation']:+.2f} ({_chance(told[name]['p'])})"
            for name in ("cosine_and_gain", "cosine_and_loss", "gain_and_loss")
        ]
        lines.append(
            (
                f"`{row['scenario']}` seed {row['seed']}",
                f"{told['lowest_cosine']:.2f} to {told['highest_cosine']:.2f}",
                f"{told['below_chance']} of {told['matrices']}",
                *pairs,
            )
        )
    head = (
        "fine-tune",
        "cosines",
        "below chance",
        "cosine, refusal won",
        "cosine, task lost",
        "refusal won, task lost",
    )
    return table(head, lines)


def _chance(p: float) -> str:
    return f"p {p:.3f}" if p >= 0.001 else "p < 0.001"


def _overlap(rows: list[Row]) -> str:
    names = {
        "marked": "marked",
        "also_marked_by_task": "of these, the task marks too",
        "also_marked_by_safe": "of these, refusals mark too",
        "share_of_update": "share of norm(D)^2 in them",
    }
    lines = [
        (
            f"`{row['scenario']}` seed {row['seed']}",
            *(f"{100 * row[name]:.1f} %" for name in names),
        )
        for row in rows
        if row["what"] == "overlap of masks"
    ]
    return table(("fine-tune", *names.values()), lines)


def _exams(rows: list[Row], method: str) -> str:
    """What was asked, by fine-tune: harm, accuracy lost, over-refusal, garbled answers."""
    asked = [row for row in rows if "rates" in row and row["method"] in (method, "all")]
    places = _places(asked)
    head = ["asked"]
    for scenario, _ in places:
        head += [f"`{scenario}`: harm", "accuracy lost", "over-refusal", "other"]
    lines = []
    for what in dict.fromkeys(
        row["what"] for row in sorted(asked, key=lambda r: r["method"] != "all")
    ):
        cells = [what + _extra(asked, what)]
        for place in places:
            own = next(
                (r for r in asked if (r["scenario"], r["seed"]) == place and r["what"] == what),
                None,
            )
            cells += ["-"] * 4 if own is None else _cells(own)
        lines.append(cells)
    return table(head, lines)


def _extra(asked: list[Row], what: str) -> str:
    """How much of the task vector was kept, where that was a question."""
    shares = [
        100 * row["kept_share"] for row in asked if row["what"] == what and "kept_share" in row
    ]
    return f" (keeps {' and '.join(f'{each:.0f}' for each in shares)} %)" if shares else ""


def _cells(row: Row) -> list[str]:
    rates = row["rates"]
    harm = rates["harm"]
    return [
        f"{100 * harm['value']:.1f} ({100 * harm['low']:.1f}-{100 * harm['high']:.1f})",
        f"{round(100 * row['drop'], 1) + 0.0:.1f}",
        f"{100 * rates['over_refusal']['value']:.1f}",
        f"{100 * rates['other']['value']:.1f}",
    ]
