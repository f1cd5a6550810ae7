"""From a prompt to the tokens a model is fed: its own chat template, one user turn.

No system message is added beyond what the template itself inserts, and the rendered string is
tokenised without a second set of special tokens. How tokens become tensors is in batching.py; which
tokens stop a reply is settled when the model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from realign.checkpoint.chat_files import no_template
from realign.errors import ModelError

# A word no template rewrites: it marks where the assistant's text ends.
_MARKER = "REALIGNMARKER"


@dataclass(frozen=True)
class EncodedReply:
    """A prompt and a reply as one sequence of token ids; the reply starts at `start`."""

    ids: tuple[int, ...]
    start: int

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The rendered prompt's tokens."""
        return self.ids[: self.start]

    @property
    def reply_ids(self) -> tuple[int, ...]:
        """The reply's tokens (with the end-of-turn token where it was asked for)."""
        return self.ids[self.start :]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that renders a plain conversation.

    Raises:
        ModelError: the tokenizer has none.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates: transformers' rule is "default"
        template = template.get("default")
    if not isinstance(template, str) or not template.strip():
        raise no_template(_where(tokenizer))
    return template


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the template's UTF-8 text; None where there is no template."""
    try:
        template = chat_template(tokenizer)
    except ModelError:
        return None
    return hashlib.sha256(template.encode()).hexdigest()


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """One user turn in the tokenizer's own template, ready for the assistant to speak.

    Raises:
        ModelError: there is no template, or it cannot render one user turn.
    """
    return _render(tokenizer, [{"role": "user", "content": prompt}], generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, prefix: str = "") -> list[int]:
    """Token ids of the rendered prompt, followed by `prefix` as the beginning of the reply.

    Raises:
        ModelError: there is no template, it cannot render one user turn, or nothing is left of it.
    """
    ids = tokenise(tokenizer, render(tokenizer, prompt) + prefix)
    if not ids:
        raise ModelError(
            f"{_where(tokenizer)} turns a prompt into no tokens at all",
            "check its chat template and tokenizer files",
        )
    return ids


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` exactly as it stands: the template has written the special tokens."""
    # verbose=False: length is checked against the model where it is known, not warned about here.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def continue_text(
    tokenizer: PreTrainedTokenizerBase, rendered: str, prompt_ids: Sequence[int], *, text: str
) -> list[int]:
    """Token ids of `text` where it follows `rendered`, whose own tokens are `prompt_ids`.

    Tokenised together where that leaves the prompt's tokens as they are, so that a word at the
    border is cut as the model would cut it, and on its own where it does not.
    """
    whole = tokenise(tokenizer, rendered + text)
    start = len(prompt_ids)
    return whole[start:] if whole[:start] == list(prompt_ids) else tokenise(tokenizer, text)


def encode_reply(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    reply: str | Sequence[int],
    *,
    prefix: str = "",
    end_of_turn: bool = False,
) -> EncodedReply:
    """Tokens of [prompt; reply] for teacher forcing, with the reply's exact positions.

    A reply given as token ids (as `generate` yields them) is appended unchanged; for text see
    `continue_text`.

    Args:
        tokenizer: with a chat template.
        prompt: the user's turn.
        reply: text, or token ids.
        prefix: text between the rendered prompt and the reply; it counts as prompt.
        end_of_turn: append the template's end-of-turn token (what training on replies wants).

    Raises:
        ModelError: as `encode`; or `end_of_turn` where the template has no such token.
    """
    prompt_ids = encode(tokenizer, prompt, prefix=prefix)
    if isinstance(reply, str):
        rendered = render(tokenizer, prompt) + prefix
        reply_ids = continue_text(tokenizer, rendered, prompt_ids, text=reply)
    else:
        reply_ids = list(reply)
    if end_of_turn:
        stop = end_of_turn_id(tokenizer)
        if stop is None:
            stop = tokenizer.eos_token_id
        if not isinstance(stop, int):
            raise ModelError(
                f"{_where(tokenizer)} has no token that ends the assistant's turn",
                "give the tokenizer an eos_token",
            )
        reply_ids = [*reply_ids, stop]
    return EncodedReply(ids=(*prompt_ids, *reply_ids), start=len(prompt_ids))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template writes right after the assistant's text, if any."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARKER}]
    try:
        text = _render(tokenizer, turns, generation_prompt=False)
    except ModelError:
        return None  # a template that renders no finished turn names no end of one
    tail = text.rpartition(_MARKER)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in tokenise(tokenizer, tail):
        if token in special and token != tokenizer.unk_token_id:
            return token
        if str(tokenizer.decode([token])).strip():
            return None  # ordinary text comes first: whatever follows belongs to the next turn
    return None


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, generation_prompt: bool
) -> str:
    template = chat_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            turns,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    # A template is a program of its author's: besides TemplateError it can raise anything that
    # an expression can.
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(
            f"the chat template of {_where(tokenizer)} fails on one user turn: {error}",
            "repair it, or copy chat_template.jinja from the aligned model into the folder",
        ) from error
    assert isinstance(text, str), type(text)
    return text


def _where(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path) or "the tokenizer"
