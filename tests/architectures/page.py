"""docs/architectures.md from the records of a sweep: the same records, the same bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REASONS = ("missing dependency", "needs an accelerator", "not autoregressive", "upstream error")
"""The closed list: why an architecture is not repaired."""

_TEXT = """\
# Architectures

Every causal language model that the installed transformers lists, and some vision-language ones, as
a tiny random model: repaired end to end through the command line, loaded again, and checked tensor
by tensor. `make sweep` makes this page; nothing in it is typed by hand.

## How it was made

For each entry of the library's own `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` a config is reduced to a few
layers of width {width} (`tests/architectures/tiny.py`; where naming habits fail,
`tests/architectures/overrides.py` says what is set and why), and three checkpoints are saved with
`save_pretrained`: a random base; an "aligned" model, which is the base moved in every parameter by
noise and, for matrices, by a part of rank 2; a "fine-tune", which is the aligned model moved once
more. Two thirds are stored in float32, one third in bfloat16; a quarter is sharded. Then

    realign repair FINETUNED --aligned ALIGNED --base BASE --method resta -o OUT
    realign repair FINETUNED --aligned ALIGNED --base BASE --method lssf -o OUT \\
        --anchors ANCHORS --set tokens=all --set min_tokens=48

and, where `lssf` cannot be calibrated, `delta_svd` in its place, with the reason in the table. A
random model refuses nothing, so the tokenizer of the sweep puts the words of a refusal before
whatever is decoded: the anchors' answers count as refusals, and `lssf` runs on the same code as on
a trained model. That says something about the plumbing, and nothing about safety. Prompt tokens
count too (`tokens=all`), since random models repeat themselves; of eight seeds the first is taken
whose model says something. The command runs in the process of the sweep, without drawing its
picture. Which part of a stored tensor a logical matrix is, is told by the product's own geometry
(`realign/checkpoint/slots.py`, tested apart).

## What "repaired" means

For both methods, all of this holds:

1. the output stores exactly the fine-tune's tensors; those outside the plan's edit list are
   identical to the fine-tune's, bit for bit;
2. every edited tensor meets |W' - ref| <= 1 ulp(ref) + 1e-6 max|E|, entry by entry, against a dense
   float64 reference written apart from the product (`tests/architectures/reference.py`). For
   `lssf` the reference starts from the measured sums of activations and the recorded rank; the sums
   themselves are compared with those of plain hooks, one conversation at a time without padding
   (relative difference at most 1e-3, in bfloat16 5e-2; matrices of routed experts have a reference
   of their own in `tests/model/test_moments_experts.py`). Cuts between eigenvalues closer than
   1e-6 are not compared, and the table says so;
3. transformers loads the output without a missing, unexpected or misshapen weight;
4. its forward pass is finite, and is not the fine-tune's.

*Edited* and *copied* count the tensors of the `resta` run, whose scope is everything but routers,
buffers and what is no weight of a language model's layers. *Matrices* counts the logical matrices
of the low-rank run (each expert's, each part of a fused projection), *left alone* those for which
it recorded a reason not to act; the remarks give the reasons, of copies too.
"""


def write_page(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the page for all records, in the mapping's order."""
    path.write_text(page(results), encoding="utf-8")


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page as text."""
    import torch
    import transformers
    from architectures.tiny import HIDDEN
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MAPPING

    causal = [each for each in results if each["model_type"] in MAPPING]
    vision = [each for each in results if each["model_type"] not in MAPPING]
    lines = [_TEXT.format(width=HIDDEN)]
    lines += ["## Totals", ""]
    lines += [f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}."]
    lines += ["", "| | entries | repaired | of these with `lssf` | not repaired |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for title, rows in (("causal language models", causal), ("vision-language models", vision)):
        repaired = [each for each in rows if each["status"] == "repaired"]
        measured = [each for each in repaired if "delta_svd" not in each["methods"]]
        lines.append(
            f"| {title} | {len(rows)} | {len(repaired)} | {len(measured)} "
            f"| {len(rows) - len(repaired)} |"
        )
    reasons = Counter(each["status"] for each in results if each["status"] != "repaired")
    if reasons:
        counted = ", ".join(f"{reasons[name]} {name}" for name in sorted(reasons))
        lines += ["", f"Not repaired, by reason: {counted}."]
    for title, rows in (("Causal language models", causal), ("Vision-language models", vision)):
        lines += ["", f"## {title}", "", *_table(rows)]
    missing = [each for each in results if each["status"] != "repaired"]
    if missing:
        lines += ["", "## Not repaired", "", "| architecture | reason | particulars |"]
        lines += ["|---|---|---|"]
        lines += [
            f"| {each['model_type']} | {each['status']} | {_clean(each['reason'])} |"
            for each in missing
        ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| architecture | class | stored as | edited | copied | methods | matrices | left alone "
        "| remarks |",
        "|---|---|---|--:|--:|---|--:|--:|---|",
    ]
    for each in rows:
        if each["status"] != "repaired":
            lines.append(f"| {each['model_type']} | | | | | | | | not repaired: {each['status']} |")
            continue
        remarks = "; ".join([*_copied(each), *_remarks(each["remarks"])])
        lines.append(
            f"| {each['model_type']} | {each['class_name']} | {each['dtype']}, {each['files']} "
            f"| {each['edited']} | {each['copied']} | {', '.join(each['methods'])} "
            f"| {each['matrices']} | {each['refused']} | {remarks} |"
        )
    return lines


def _copied(each: Mapping[str, Any]) -> list[str]:
    counted = [f"{count} x {reason}" for reason, count in each.get("reasons", {}).items()]
    return [f"copied: {', '.join(counted)}"] if counted else []


def _remarks(texts: Sequence[str]) -> list[str]:
    """One remark per reason, not one per module."""
    unmeasured: dict[str, list[str]] = {}
    others: list[str] = []
    for text in dict.fromkeys(texts):
        path, colon, reason = text.removeprefix("not measured: ").partition(": ")
        if not text.startswith("not measured: "):
            others.append(_clean(text))
        elif colon:
            unmeasured.setdefault(reason, []).append(".".join(path.split(".")[-2:]))
        else:
            unmeasured.setdefault(path, [])
    return [
        *others,
        *(
            f"not measured: {', '.join(names)}{': ' if names else ''}{_clean(reason)}"
            for reason, names in unmeasured.items()
        ),
    ]


def _clean(text: str) -> str:
    """Without the run's folders, in one line, harmless in a table."""
    text = re.sub(r"/\S*?/sweep-\w+/", "", text)
    text = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
    text = re.sub(r"exit \d: error: ", "", text)
    # The hints of our own messages are for the user at the terminal.
    text = re.split(r" (?:check that|use a method|methods that need|You can install it)\b", text)[0]
    return text[:260] + ("..." if len(text) > 260 else "")
