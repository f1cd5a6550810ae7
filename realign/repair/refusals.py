"""What a model answers to the anchors, and which of its answers are refusals.

The model answers greedily; answers that the keyword judge does not take for refusals are dropped.
An anchor that brings its own refusal (a field `response`) is taken as it is, and nothing is asked.
Answers are kept in a cache under a hash of everything they depend on. Not here: what is measured on
them (`measured`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realign.audit.canonical import sha256_json
from realign.audit.judges import keyword_judge
from realign.audit.suites import Item, Suite
from realign.errors import ModelError, OutputError, SuiteError
from realign.model.chat import encode, encode_reply
from realign.model.generation import generate
from realign.model.loading import LoadedModel
from realign.progress import SILENT, Progress
from realign.repair.plan_anchors import MIN_ANCHORS

BATCH_SIZE = 16
"""Anchors answered at a time by a model in memory. One that is read for every token anew answers
all of them at once."""

MAX_REPLY_TOKENS = 128
"""An anchor's answer is cut here: a refusal has said what it says by then."""


@dataclass(frozen=True)
class AnchorReply:
    """An anchor and what the model answered."""

    id: str
    prompt: str
    token_ids: tuple[int, ...]
    text: str
    refused: bool
    finished: bool
    """The model ended it itself; False where it was cut at the length limit."""


@dataclass(frozen=True)
class Refusals:
    """The anchors of a run, answered by any of its models."""

    suite: Suite
    cache: Path
    progress: Progress = SILENT

    def about(self, running: Mapping[str, str]) -> dict[str, str]:
        """Everything an answer depends on.

        Args:
            running: what anything depends on that the model does.
        """
        return {
            **running,
            "anchors": self.suite.suite_hash,
            "reply_tokens": str(self.suite.max_new_tokens or MAX_REPLY_TOKENS),
            "judge": keyword_judge().judge_hash,
        }

    def kept(self, loaded: LoadedModel, running: Mapping[str, str]) -> list[AnchorReply]:
        """The anchors that a model refuses.

        Raises:
            SuiteError: they are fewer than 16.
            ModelError: it cannot be asked.
        """
        replies = self._replies(loaded, running)
        kept = [reply for reply in replies if reply.refused and reply.token_ids]
        if len(kept) < MIN_ANCHORS:
            raise SuiteError(
                f"{loaded.name} refuses {len(kept)} of {len(replies)} anchors, "
                f"at least {MIN_ANCHORS} are needed to see where refusal lives",
                "check that --aligned is the safety-trained model, or give prompts that it "
                "refuses with --anchors FILE",
            )
        self.progress.note(f"{loaded.name} refuses {len(kept)} of {len(replies)} anchors")
        return kept

    def _replies(self, loaded: LoadedModel, running: Mapping[str, str]) -> list[AnchorReply]:
        """Every answer: brought along, from the cache, or asked for now."""
        items = self.suite.items
        open_items = [item for item in items if _brought(item) is None]
        asked = iter(self._answers(loaded, running, open_items) if open_items else ())
        return [
            next(asked) if _brought(item) is None else _as_it_is(loaded, item) for item in items
        ]

    def _answers(
        self, loaded: LoadedModel, running: Mapping[str, str], items: Sequence[Item]
    ) -> list[AnchorReply]:
        """The answers, from the cache where this model has given them before."""
        path = self.cache / f"anchors-{sha256_json(self.about(running))[:32]}.json"
        if path.exists():
            try:
                stored = [_reply_from(each) for each in json.loads(path.read_text("utf-8"))]
                asked = [(item.id, item.prompt) for item in items]
                if [(each.id, each.prompt) for each in stored] != asked:
                    raise ValueError("it answers other prompts")
                return stored
            except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
                self.progress.note(f"asked again: {path} cannot be used ({error})")
        prompts = [item.prompt for item in items]
        longest = max(len(encode(loaded.tokenizer, prompt)) for prompt in prompts)
        length = min(MAX_REPLY_TOKENS, self.suite.max_new_tokens or MAX_REPLY_TOKENS)
        if loaded.max_positions is not None:
            length = min(length, loaded.max_positions - longest)
        if length < 1:
            raise ModelError(
                f"{loaded.name} has {loaded.max_positions} positions, its longest anchor {longest}",
                "give shorter prompts with --anchors FILE",
            )
        judge = keyword_judge()
        answers: dict[int, AnchorReply] = {}
        for reply in generate(
            loaded,
            prompts,
            max_new_tokens=length,
            batch_size=len(prompts) if loaded.offloaded else BATCH_SIZE,
            progress=self.progress,
        ):
            item = items[reply.prompt_index]
            answers[reply.prompt_index] = AnchorReply(
                id=item.id,
                prompt=item.prompt,
                token_ids=reply.token_ids,
                text=reply.text,
                refused=bool(judge.judge(item, reply.text).refused),
                finished=reply.finished,
            )
        ordered = [answers[index] for index in range(len(prompts))]
        _write_text(path, json.dumps([vars(each) for each in ordered], ensure_ascii=False))
        return ordered


def _brought(item: Item) -> str | None:
    """The answer that an anchor brings along."""
    answer: Any = item.raw.get("response")
    return answer if isinstance(answer, str) and answer.strip() else None


def _as_it_is(loaded: LoadedModel, item: Item) -> AnchorReply:
    text = _brought(item)
    assert text is not None
    ids = encode_reply(loaded.tokenizer, item.prompt, text).reply_ids
    return AnchorReply(item.id, item.prompt, ids, text, refused=True, finished=True)


def _reply_from(value: Mapping[str, Any]) -> AnchorReply:
    fields: dict[str, Any] = {**value, "token_ids": tuple(map(int, value["token_ids"]))}
    return AnchorReply(**fields)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch(mode=0o600)  # answers to harmful prompts are nobody else's business
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}", "is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)
