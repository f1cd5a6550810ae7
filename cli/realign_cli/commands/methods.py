"""`realign methods`: what can repair a model, and the card of each method."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realign_cli.command import Example, command
from realign_cli.imports import swift_imports
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from rich.console import RenderableType

    from realign.repair.method import Method

EXAMPLES = (
    Example("realign methods", "the list: paper, cost, form of the edit, deviations, needs"),
    Example("realign methods lssf", "equations, parameters with their ranges, cautions"),
)


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "methods", examples=EXAMPLES)(methods)


def methods(
    sink: Sink,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A method; without it, the list.")
    ] = None,
) -> int | None:
    """List the repair methods, or show the card of one."""
    with swift_imports():
        from realign.repair.registry import find_method, method_names

    if name is None:
        classes = [find_method(each) for each in method_names()]
        sink.document([_facts(each) for each in classes])
        sink.show(*_list(classes))
    else:
        method = find_method(name)
        sink.document(_facts(method))
        sink.show(*_card(method))
    return None


def _facts(method: type[Method]) -> dict[str, Any]:
    from realign.repair.cards import edit_word
    from realign.repair.needs import needs_of

    return {
        "name": method.name,
        "paper": paper_of(method),
        "needs": [list(each) for each in needs_of(method)],
        "data": sorted(method.data),
        "edit": edit_word(method),
        "cost": method.cost_class,
        "deviations": len(method.card.deviations),
        "safety_vector": method.paper_vector,
        "needs_anchors": method.needs_anchors,
        "scope": method.default_scope,
        "parameters": [
            {
                "name": each.name,
                "default": each.default,
                "range": each.domain.describe(),
                "symbol": each.symbol,
                "source": each.source,
                "description": each.description,
            }
            for each in method.parameters()
        ],
        "card": asdict(method.card),
    }


def _list(classes: list[type[Method]]) -> tuple[RenderableType, ...]:
    """A block for each method: a line of facts, what it does, what it needs."""
    from rich.padding import Padding
    from rich.text import Text

    from realign.repair.cards import edit_word
    from realign.repair.needs import in_words, needs_of

    indent = max(len(each.name) for each in classes) + 2
    parts: list[RenderableType] = []
    for each in classes:
        count = len(each.card.deviations)
        deviations = "no deviations" if not count else f"{count} deviation{'s'[: count > 1]}"
        facts = f"{paper_of(each):12}{each.cost_class:15}{edit_word(each):19}{deviations}"
        needs = ", ".join(map(in_words, needs_of(each))) or "nothing beside the fine-tune"
        below = (0, 0, 1, indent)
        parts += [
            Text.assemble((f"{each.name:{indent}}", "bold"), (facts, "dim")),
            Padding(Text(f"{each.card.summary}\nneeds {needs}"), below),
        ]
    return tuple(parts)


def paper_of(method: type[Method]) -> str:
    """Return the arXiv id of the method's source, "ours" where there is none."""
    found = re.search(r"\d{4}\.\d{4,5}", method.card.source)
    ours = method.card.source.startswith("ours")
    return "ours" if ours or found is None else found.group()


def _card(method: type[Method]) -> tuple[RenderableType, ...]:
    from rich.padding import Padding
    from rich.text import Text

    from realign.report.tables import plain_table

    card = method.card
    parts: list[RenderableType] = [
        Text(f"{method.name}: {card.title}", style="bold"),
        Text(card.source, style="dim"),
        "",
        Text(" ".join(card.idea.split())),
        "",
        Padding(Text(card.equations.strip("\n")), (0, 0, 0, 4)),
        "",
    ]
    for title, text in (
        ("needs", card.inputs),
        ("touches", card.touches),
        ("edit", card.edit_kind),
        ("cost", card.cost),
    ):
        parts.append(Text.assemble((f"{title:9}", "bold"), " ".join(text.split())))
    table = plain_table()
    table.add_column("--set", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("range")
    table.add_column("meaning", ratio=1)
    for each in method.parameters():
        table.add_row(
            Text(each.name),
            Text(str(each.default)),
            Text(each.domain.describe().replace("`", "")),
            Text(" ".join(each.description.replace("`", "").split())),
        )
    parts += ["", table]
    for title, lines in (
        ("deviations", card.deviations),
        ("known defects of public code that we avoid", card.defects),
        ("cautions", card.cautions),
    ):
        if lines:
            parts += ["", Text(title, style="bold")]
            parts += [Padding(Text(f"- {' '.join(line.split())}"), (0, 0, 0, 2)) for line in lines]
    return tuple(parts)
