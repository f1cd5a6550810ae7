"""Prompts that a model writes itself: a user's turn, sampled after what a template puts before it.

A chat model that is fed the beginning of a conversation goes on with a likely request (Xu et al.,
arXiv 2406.08464). Nothing else is asked of it here: what is answered, and by whom, is the caller's
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from realign.errors import ModelError
from realign.model.batching import explained
from realign.model.chat import render, tokenise
from realign.model.generation import own_configuration
from realign.model.loading import LoadedModel
from realign.model.quiet import quiet_libraries
from realign.progress import SILENT, Progress

_BATCH = 64
_FRUITLESS = 8
"""Batches in a row without a new prompt, after which the model has no more to say."""


def user_turn_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Tokens before any user's text, and the first token after it that no text changes.

    Two texts are rendered that begin and end differently: a tokenizer may join the text's borders
    with what stands beside them, and what is joined belongs to the text.

    Raises:
        ModelError: there is no template, or it does not say where a user's turn begins and ends.
    """
    texts = _different(tokenizer)
    one, other = (tokenise(tokenizer, render(tokenizer, text)) for text in texts)
    first = _common(one, other)
    rest = _common(one[len(first) :][::-1], other[len(first) :][::-1])[::-1]
    seen = [token for token in rest if str(tokenizer.decode([token])).strip()]
    if not first or not seen:
        raise ModelError(
            "the chat template does not say where a user's turn begins and ends",
            "prompts cannot be taken from a model with such a template",
        )
    return first, seen[0]  # a blank would end the text at its first word


def _different(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Two users' texts that begin and end differently, in words that the tokenizer knows."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    known = (
        str(tokenizer.decode([token])).strip()
        for token in range(len(tokenizer))
        if token not in special
    )
    words = (word for word in known if word.isalpha() and word.isascii())
    first = next(words, "a")
    tokens = tokenise(tokenizer, first)
    other = next((word for word in words if tokenise(tokenizer, word)[:1] != tokens[:1]), "b")
    return f"{first}?", other


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The tokens that both begin with."""
    pairs = zip(one, other, strict=False)
    return [mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def write_prompts(
    loaded: LoadedModel,
    count: int,
    *,
    seed: int,
    longest: int = 64,
    wanted: Callable[[str], bool] | None = None,
    progress: Progress = SILENT,
) -> list[str]:
    """Sample different prompts at temperature 1; the same seed gives the same ones on one machine.

    Args:
        loaded: the model that writes.
        count: how many; fewer come back where the model repeats itself.
        seed: of the sampling.
        longest: prompts that have not ended after so many tokens are thrown away.
        wanted: says whether a prompt may be kept; None: all may.
        progress: counts prompts.

    Raises:
        ModelError: as `user_turn_frame`; or the model ends no prompt at all.
    """
    first, end = user_turn_frame(loaded.tokenizer)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        eos_token_id=sorted({end, *loaded.stop_ids}),
        pad_token_id=loaded.pad_id,
    )
    start = torch.tensor([first], device=loaded.device).repeat(_BATCH, 1)
    model: Any = loaded.model
    found: dict[str, None] = {}
    fruitless = 0
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with (
        progress.task("writing prompts", total=count, unit="prompts") as task,
        torch.random.fork_rng(devices),
        torch.no_grad(),
        quiet_libraries(),
        own_configuration(model, settings),
        explained(loaded.name),
    ):
        torch.manual_seed(seed)
        while len(found) < count and fruitless < _FRUITLESS:
            written = model.generate(
                input_ids=start, attention_mask=torch.ones_like(start), generation_config=settings
            )
            before = len(found)
            for row in written[:, len(first) :].tolist():
                text = _ended(loaded, row, end)
                if text and len(found) < count and (wanted is None or wanted(text)):
                    found.setdefault(text)
            fruitless = 0 if len(found) > before else fruitless + 1
            task.advance(len(found) - before)
    if found and len(found) < count:
        progress.note(f"{loaded.name} has written {len(found)} of {count} prompts")
    if not found:
        raise ModelError(
            f"{loaded.name} writes no prompt of its own that ends within {longest} tokens and asks "
            "about nothing that is measured in this run",
            "let another model write them (--set author=base), or none: --set self_prompts=0",
        )
    return list(found)


def _ended(loaded: LoadedModel, row: Sequence[int], end: int) -> str:
    """The text before the end of the turn; empty where there is no end or nothing before it."""
    if end not in row:
        return ""
    tokens = list(row[: list(row).index(end)])
    return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
