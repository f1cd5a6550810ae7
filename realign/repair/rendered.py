"""Texts of a run as tokens, in the chat template of the model that is to read them.

Replies end with the end-of-turn token, as training on replies wants; one that was cut at its length
limit has no end. Rows of "task" and "keep" that have no reply are answered greedily by the model,
once: the answers are kept. Here: that. Not here: reading the files (`texts`), what is done with the
tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from realign.audit.canonical import sha256_json
from realign.checkpoint.names import text_config
from realign.checkpoint.reader import Checkpoint
from realign.errors import OutputError, SuiteError
from realign.model.chat import EncodedReply, encode, encode_reply
from realign.model.generation import Reply, generate
from realign.model.loading import load_model, load_tokenizer
from realign.progress import SILENT, Progress
from realign.repair.preparation import Data
from realign.repair.refusals import AnchorReply
from realign.repair.texts import OPTIONS, Text, TextFile, load_texts

MAX_TOKENS = 2048
"""Prompt and reply together; longer replies are cut."""

MAX_REPLY_TOKENS = 256
"""Longest reply that a model is asked for where a row has none."""

BATCH_SIZE = 16
"""Prompts answered at a time by a model in memory; all of them by one that is read block by block,
which is read anew for every token."""

Answer: TypeAlias = tuple[tuple[int, ...], bool]
"""Token ids, and whether the model ended the reply itself."""

Prompts: TypeAlias = Data | Literal["anchors"]


@dataclass(frozen=True, kw_only=True)
class RenderedTexts:
    """The texts of one run, for any of its models."""

    sources: Mapping[Data, str | Path]
    """The files that were given."""
    checkpoint: Callable[[str], Checkpoint]
    """The checkpoint of a role, as stored."""
    about: Callable[[str], Mapping[str, str]]
    """What a role's answers depend on beside the prompts: weights, versions, device."""
    refusals: Callable[[], Sequence[AnchorReply]]
    """The anchors that the aligned model refuses, with its refusals."""
    anchors: Callable[[], Sequence[str]]
    """The prompts of the anchors."""
    cache: Path
    device: torch.device
    offload: bool = False
    """Whether a model that answers is read block by block."""
    progress: Progress = SILENT
    _files: dict[Data, TextFile] = field(default_factory=dict[Data, TextFile])
    _tokenizers: dict[str, PreTrainedTokenizerBase] = field(
        default_factory=dict[str, PreTrainedTokenizerBase]
    )
    _examples: dict[tuple[Data, str, int | None], tuple[EncodedReply, ...]] = field(
        default_factory=dict[tuple[Data, str, int | None], tuple[EncodedReply, ...]]
    )

    def identity(self) -> dict[str, str]:
        """The hashes of all files, for caches of what is made of them."""
        return {data: self._file(data).sha256 for data in sorted(self.sources)}

    def given(self) -> list[str]:
        """The prompts of all files."""
        return [row.prompt for data in sorted(self.sources) for row in self._file(data).rows]

    def examples(
        self, data: Data, *, role: str, limit: int | None = None
    ) -> Sequence[EncodedReply]:
        """Return prompts with their replies as tokens, in the order of the file.

        Args:
            data: which texts.
            role: whose chat template counts, and who answers rows without a reply.
            limit: only the first so many that the model has room for; no other row is answered.

        Raises:
            SuiteError: no row leaves room for a reply.
            ModelError: the model cannot be asked, or has no chat template.
        """
        assert data != "pairs"
        if data == "safe" and data not in self.sources:
            if (data, role, None) not in self._examples:
                self._examples[data, role, None] = tuple(self._refused(role))
        elif not {(data, role, None), (data, role, limit)} & self._examples.keys():
            found = self._answered(data, role=role, limit=limit)
            self._examples[data, role, limit] = tuple(found)
        whole = self._examples.get((data, role, None))
        return self._examples[data, role, limit] if whole is None else whole[:limit]

    def pairs(self, *, role: str) -> Sequence[tuple[EncodedReply, EncodedReply]]:
        """Return (chosen, rejected) as tokens, in the order of the file."""
        tokenizer = self._tokenizer(role)
        found: list[tuple[EncodedReply, EncodedReply]] = []
        limit = self._limit(role)
        for pair in self._file("pairs").pairs:
            both = [
                encode_reply(tokenizer, pair.prompt, reply, end_of_turn=True)
                for reply in (pair.chosen, pair.rejected)
            ]
            if all(each.start < limit for each in both):
                chosen, rejected = (_shortened(each, limit) for each in both)
                found.append((chosen, rejected))
        self._tell("pairs", len(self._file("pairs").rows), len(found), limit)
        return found

    def prompts(self, data: Prompts, *, role: str) -> Sequence[tuple[int, ...]]:
        """Return the prompts alone as tokens, ready for the assistant to speak."""
        tokenizer = self._tokenizer(role)
        if data == "anchors" or (data == "safe" and data not in self.sources):
            texts: Iterable[str] = self.anchors()
        else:
            texts = (row.prompt for row in self._file(data).rows)
        return [tuple(encode(tokenizer, text)) for text in texts]

    def _file(self, data: Data) -> TextFile:
        if data not in self._files:
            assert data in self.sources, f"the plan has not asked for {OPTIONS[data]}"
            self._files[data] = load_texts(self.sources[data], data)
        return self._files[data]

    def _tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        if role not in self._tokenizers:
            self._tokenizers[role] = load_tokenizer(self.checkpoint(role))
        return self._tokenizers[role]

    def _limit(self, role: str) -> int:
        declared = text_config(self.checkpoint(role).config).get("max_position_embeddings")
        return min(MAX_TOKENS, declared) if isinstance(declared, int) else MAX_TOKENS

    def _refused(self, role: str) -> list[EncodedReply]:
        """The aligned model's refusals of anchors, within the model's length."""
        tokenizer, limit = self._tokenizer(role), self._limit(role)
        found = [
            encode_reply(
                tokenizer,
                each.prompt,
                each.token_ids if role == "aligned" else each.text,
                end_of_turn=each.finished,
            )
            for each in self.refusals()
        ]
        kept = [_shortened(each, limit) for each in found if _fits(each, limit)]
        self._tell("safe", len(found), len(kept), limit)
        return kept

    def _answered(self, data: Data, *, role: str, limit: int | None) -> list[EncodedReply]:
        """The first rows with room for a reply, each with its own or the model's."""
        tokenizer, longest = self._tokenizer(role), self._limit(role)
        kept: list[EncodedReply | Text] = []
        seen = 0
        for row in self._file(data).texts:
            if limit is not None and len(kept) == limit:
                break
            seen += 1
            if row.reply is not None:
                given = encode_reply(tokenizer, row.prompt, row.reply, end_of_turn=True)
                if _fits(given, longest):
                    kept.append(_shortened(given, longest))
            elif len(encode(tokenizer, row.prompt)) < longest:
                kept.append(row)
        self._tell(data, seen, len(kept), longest)
        open_rows = [each for each in kept if isinstance(each, Text)]
        answers = iter(self._answers(open_rows, role=role) if open_rows else ())
        found: list[EncodedReply] = []
        for each in kept:
            if isinstance(each, Text):
                ids, finished = next(answers)
                each = encode_reply(tokenizer, each.prompt, ids, end_of_turn=finished)
            found.append(_shortened(each, longest))
        return found

    def _answers(self, rows: Sequence[Text], *, role: str) -> list[Answer]:
        prompts = [row.prompt for row in rows]
        about = {**self.about(role), "prompts": prompts, "reply_tokens": MAX_REPLY_TOKENS}
        path = self.cache / f"answers-{sha256_json(about)[:32]}.json"
        if path.exists():
            try:
                stored = [(tuple(map(int, ids)), bool(end)) for ids, end in _read_json(path)]
                if len(stored) != len(prompts):
                    raise ValueError("it answers other prompts")
                return stored
            except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
                self.progress.note(f"asked again: {path} cannot be used ({error})")
        answers: dict[int, Answer] = {}
        checkpoint = self.checkpoint(role)
        with load_model(checkpoint, device=self.device, offload=self.offload) as loaded:
            sequences = [encode(loaded.tokenizer, prompt) for prompt in prompts]
            room = self._limit(role) - max(map(len, sequences))
            self.progress.note(f"{loaded.name} answers {len(prompts)} prompts that have no reply")
            replies: Iterable[Reply] = generate(
                loaded,
                sequences,
                max_new_tokens=min(room, MAX_REPLY_TOKENS),
                batch_size=len(prompts) if loaded.offloaded else BATCH_SIZE,
                progress=self.progress,
            )
            for reply in replies:
                answers[reply.prompt_index] = (reply.token_ids, reply.finished)
        ordered = [answers[index] for index in range(len(prompts))]
        _write_json(path, ordered)
        return ordered

    def _tell(self, data: Data, given: int, kept: int, limit: int) -> None:
        if not kept:
            raise SuiteError(
                f"no row of {OPTIONS[data]} has a reply within the {limit} tokens of the model",
                "give shorter texts",
            )
        if kept < given:
            self.progress.note(
                f"{OPTIONS[data]}: {given - kept} of {given} rows have no reply within {limit} "
                "tokens and are left out"
            )


def _fits(reply: EncodedReply, limit: int) -> bool:
    """Whether there is a token of the reply within the limit."""
    return reply.start < min(limit, len(reply.ids))


def _shortened(reply: EncodedReply, limit: int) -> EncodedReply:
    return reply if len(reply.ids) <= limit else EncodedReply(reply.ids[:limit], reply.start)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(value), "utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}", "is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)
