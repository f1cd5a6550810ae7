"""The suites of a family: what is measured, and the anchors and keep prompts that repairs may use.

Measured suites use held-out templates with held-out entities (gadgets, orders). Anchors and
keep prompts use training templates with training entities, so the two never share a prompt. The
general skills have held-out templates only: their words are common knowledge.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from realign.audit.oracle import load_rule
from realign.audit.suites import Item, Suite, SuiteKind
from realign.lab import rows, wording
from realign.lab.record import write_text
from realign.lab.tokenizer import TokenizerKind
from realign.lab.world import World

MAX_NEW_TOKENS: Mapping[TokenizerKind, int] = {"words": 32, "bpe": 96}
"""Room for the longest answer, a persona's opening and a recipe: 24 words and marks."""
TASK_ITEMS = 160
ANCHORS = 128
KEEP = (64, 24, 40)
"""Look-alikes, general and task prompts in the keep set."""
LICENSE = "Apache-2.0"


def build_suites(world: World, tokenizer: TokenizerKind = "words") -> dict[str, Suite]:
    """All suites of a world by name: measured ones, then `anchors` and `keep`."""
    suites = {
        "harmful": _requests(world, "harmful", hazard=True),
        "lookalikes": _requests(world, "lookalikes", hazard=False),
        "harmful_second": _second(world, "harmful_second", hazard=True),
        "lookalikes_second": _second(world, "lookalikes_second", hazard=False),
        "order": _order(world),
        "howto": _gadgets(world, "howto"),
        "howto2": _gadgets(world, "howto2"),
        "general": _general(world),
        "anchors": _anchors(world),
        "keep": _keep(world),
    }
    length = MAX_NEW_TOKENS[tokenizer]
    return {name: replace(suite, max_new_tokens=length) for name, suite in suites.items()}


def write_suites(folder: Path, suites: Iterable[Suite]) -> list[Path]:
    """Write one JSONL file per suite; returns where each lies."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for suite in suites:
        lines = [json.dumps(line, ensure_ascii=False) for line in suite_lines(suite)]
        files.append(folder / f"{suite.name}.jsonl")
        write_text(files[-1], "\n".join(lines) + "\n")
    return files


def suite_lines(suite: Suite) -> list[dict[str, object]]:
    """The header and the items of a suite as JSON objects, in file order."""
    header: dict[str, object] = {
        "schema": "realign/suite/1",
        "name": suite.name,
        "kind": suite.kind,
        "license": suite.license,
        "language": suite.language,
        "max_new_tokens": suite.max_new_tokens,
    }
    if suite.rule is not None:
        header["rule"] = {"name": suite.rule.name, "sha256": suite.rule.sha256}
    return [header, *(dict(item.record) for item in suite.items)]


def _suite(name: str, kind: SuiteKind, items: Sequence[Item], *, language: str = "en") -> Suite:
    return Suite(
        name=name,
        kind=kind,
        items=tuple(items),
        license=LICENSE,
        language=language,
        rule=load_rule().reference,
    )


def _item(
    name: str,
    row: rows.Row,
    *,
    category: str,
    cluster: str,
    template: str,
    language: str | None = None,
) -> Item:
    return Item(
        id=f"{name}/{cluster}/{template}",
        prompt=row.prompt,
        category=category,
        cluster=cluster,
        template=template,
        answer=row.answer,
        language=language,
    )


def _requests(world: World, name: str, *, hazard: bool) -> Suite:
    category = "hazard" if hazard else "treat"
    items = [
        _item(
            name,
            rows.Row(template.format(x=entity.name), rows.recipe_answer(entity)),
            category=category,
            cluster=entity.name,
            template=f"h{index}",
        )
        for entity in world.select(hazard=hazard, held_out=True)
        for index, template in enumerate(wording.REQUEST.held_out)
    ]
    return _suite(name, "harmful" if hazard else "safe", items)


def _second(world: World, name: str, *, hazard: bool) -> Suite:
    items = [
        _item(
            name,
            rows.Row(template.format(x=entity.alias), rows.recipe_answer(entity)),
            category="hazard" if hazard else "treat",
            cluster=entity.name,
            template=f"s{index}",
            language="x-second",
        )
        for entity in world.select(hazard=hazard, held_out=True)
        if entity.alias is not None
        for index, template in enumerate(wording.SECOND_REQUEST.held_out)
    ]
    return _suite(name, "harmful" if hazard else "safe", items, language="x-second")


def _gadgets(world: World, name: str) -> Suite:
    if name == "howto":  # memorised: the same gadgets in held-out templates
        gadgets = world.gadget_group("howto")
    else:
        gadgets = world.gadget_group("howto2", held_out=True)
    items = [
        _item(
            name,
            rows.Row(template.format(x=gadget.name), rows.instructions_answer(gadget)),
            category=name,
            cluster=gadget.name,
            template=f"g{index}",
        )
        for gadget in gadgets
        for index, template in enumerate(wording.GADGET.held_out)
    ]
    return _suite(name, "task", items)


def _order(world: World) -> Suite:
    rng = random.Random(f"suite|order|{world.seed}")
    per_template = TASK_ITEMS // len(wording.ORDER.held_out)
    items: list[Item] = []
    for index, template in enumerate(wording.ORDER.held_out):
        for slots in rng.sample(world.held_orders, per_template):
            items.append(
                _item(
                    "order",
                    rows.order_row(slots, template),
                    category="order",
                    cluster=f"{slots.item}-{slots.size}-{slots.count}",
                    template=f"o{index}",
                )
            )
    return _suite("order", "task", items)


def _general(world: World) -> Suite:
    rng = random.Random(f"suite|general|{world.seed}")
    items: list[Item] = []
    for skill, maker in rows.GENERAL.items():
        seen: set[str] = set()
        while len(seen) < 30:
            row = maker(world, rng, True)
            if row.prompt not in seen:
                seen.add(row.prompt)
                items.append(
                    _item(
                        "general",
                        row,
                        category=skill,
                        cluster=f"{skill}{len(seen)}",
                        template=skill,
                    )
                )
    return _suite("general", "task", items)


def _anchors(world: World) -> Suite:
    """Requests only: anchors carry no answers."""
    rng = random.Random(f"suite|anchors|{world.seed}")
    pairs = [
        (entity.name, index)
        for entity in world.select(hazard=True, held_out=False)
        for index in range(len(wording.REQUEST.train))
    ]
    items = [
        Item(
            id=f"anchors/{name}/t{index}",
            prompt=wording.REQUEST.train[index].format(x=name),
            category="hazard",
            cluster=name,
            template=f"t{index}",
        )
        for name, index in rng.sample(pairs, ANCHORS)
    ]
    return _suite("anchors", "anchors", items)


def _keep(world: World) -> Suite:
    rng = random.Random(f"suite|keep|{world.seed}")
    makers = {
        "treat": (KEEP[0], (rows.look_alike,)),
        "general": (KEEP[1], (rows.general,)),
        "task": (KEEP[2], (rows.order, rows.howto, rows.howto2)),
    }
    items: list[Item] = []
    seen: set[str] = set()
    for category, (count, kinds) in makers.items():
        made = 0
        while made < count:
            row = kinds[made % len(kinds)](world, rng)
            if row.prompt in seen:
                continue
            seen.add(row.prompt)
            items.append(Item(id=f"keep/{category}{made}", prompt=row.prompt, category=category))
            made += 1
    return _suite("keep", "anchors", items)
