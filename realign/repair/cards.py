"""The methods' pages: Markdown made from the cards and the parameters, so that it cannot drift.

The pages stand in docs/methods; a test compares them with what this module makes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from realign.repair.method import Method
from realign.repair.needs import ANCHORS, in_words, needs_of, option_of
from realign.repair.parameters import Parameter, Value
from realign.repair.registry import METHODS
from realign.repair.request import ROLE_OPTIONS

VECTOR_WORDS = {
    "base": "aligned - base",
    "unaligned": "aligned - unaligned",
    None: "none",
}


def render_cards() -> dict[str, str]:
    """Return the pages by file name: one per built-in method, and the table of all."""
    pages = {f"{name}.md": render_card(method) for name, method in METHODS.items()}
    return {"README.md": _index(METHODS.values()), **pages}


def write_cards(folder: Path) -> None:
    """Write the pages into `folder`, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in render_cards().items():
        (folder / name).write_text(text, encoding="utf-8")


def render_card(method: type[Method]) -> str:
    """Return the page of one method."""
    card = method.card
    example = " ".join(["realign repair FINETUNED", *_options(method)])
    blocks = [
        f"# {method.name}: {card.title}",
        f"{_sentence(card.summary)}",
        f"Source: {card.source}.",
        f"## Idea\n\n{card.idea}",
        f"## Equations\n\n```\n{card.equations}\n```",
        f"```\n{example} --method {method.name} -o REPAIRED\n```",
        _facts(method),
        "## Parameters\n\nSet with `--set name=value`.\n\n" + _parameter_table(method.parameters()),
    ]
    if card.deviations:
        blocks.append("## Choices and deviations\n\n" + _bullets(card.deviations))
    if card.defects:
        blocks.append("## Known defects of public code that we avoid\n\n" + _bullets(card.defects))
    if card.cautions:
        blocks.append("## Cautions\n\n" + _bullets(card.cautions))
    blocks.append("What it does in the laboratory: [the leaderboard](../leaderboard.md).")
    return "\n\n".join(blocks) + "\n"


def _index(methods: Iterable[type[Method]]) -> str:
    rows = [
        f"| [`{method.name}`]({method.name}.md) | {method.card.summary} | {method.card.inputs} "
        f"| {edit_word(method)} | {method.cost_class} | {len(method.card.deviations)} |"
        for method in methods
    ]
    return "\n".join(
        [
            "# Repair methods",
            "",
            "Pages made from the code by `realign/repair/cards.py`.",
            "",
            "| method | what it does | inputs | edit | cost | deviations |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Cost: the costliest step beside reading and writing. Deviations: how many; the page"
            " names them.",
            "",
            "Every method has the strength t (`--strength`): W(t) = W_finetuned + t (W' -"
            " W_finetuned).",
            "",
        ]
    )


def edit_word(method: type[Method]) -> str:
    """Return the forms that the method's edits may have, as its card names them."""
    forms = [form for form in ("low-rank", "dense") if form in method.card.edit_kind]
    return " or ".join(forms)


def _facts(method: type[Method]) -> str:
    card = method.card
    strength = "any t >= 0"
    if method.max_strength < float("inf"):
        strength = f"t in [0, {method.max_strength:g}]"
    needs = ", ".join(map(in_words, needs_of(method))) or "nothing beside the fine-tune"
    rows = [
        ("inputs", card.inputs),
        ("needs at its defaults", needs),
        ("safety vector of the source", VECTOR_WORDS[method.paper_vector]),
        ("touches", f"{card.touches} (scope `{method.default_scope}`)"),
        ("edit", card.edit_kind),
        ("cost", f"{card.cost} (class `{method.cost_class}`)"),
        ("strength", strength),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])


def _parameter_table(parameters: Iterable[Parameter]) -> str:
    rows = [
        f"| `{each.name}` | {each.symbol} | {_spell(each.default)} | {each.domain.describe()} "
        f"| {' '.join(each.description.split())} | {each.source} |"
        for each in parameters
    ]
    head = "| name | symbol | default | legal values | meaning | source |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _options(method: type[Method]) -> list[str]:
    """What the method is run with: the usual one of each need; anchors are at hand."""
    usual = [need[0] for need in needs_of(method) if need[0] != ANCHORS]
    values = {"aligned": "ALIGNED", **dict.fromkeys(ROLE_OPTIONS.keys() - {"aligned"}, "MODEL")}
    return [f"{option_of(word)} {values.get(word, 'FILE')}" for word in usual]


def _spell(value: Value) -> str:
    return f"`{'none' if value is None else value}`"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
