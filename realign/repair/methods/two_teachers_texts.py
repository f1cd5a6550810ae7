"""What the two teachers are asked: prompts given, prompts a parent writes, and who answers which.

    anchors   the aligned model's replies: to the anchors, and to what was written and either model
              refuses
    keep      the fine-tune's replies: to the task's prompts, to these with one token exchanged, and
              to what was written and neither model refuses

Nothing needs a label. Not here: what is trained on them (`two_teachers_training`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from realign.audit.contamination import words_of
from realign.audit.judges import keyword_judge
from realign.audit.suites import Item
from realign.model.chat import EncodedReply, encode, end_of_turn_id
from realign.model.generation import generate
from realign.model.self_prompts import user_turn_frame, write_prompts
from realign.model.training import deterministic
from realign.repair.preparation import RunningModel, Workbench
from realign.subspace.keyed import generator

if TYPE_CHECKING:
    from realign.repair.methods.two_teachers import TwoTeachers

REPLY_TOKENS = 128
"""Longest reply of a teacher."""

Prompt = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Lesson:
    """A text, and what a teacher thinks of every token of its reply."""

    ids: tuple[int, ...]
    start: int
    """First token of the reply."""
    log_p: Tensor | None = None
    """[reply, vocabulary], the teacher's log-probabilities; None: the fine-tune is asked anew."""


@dataclass(frozen=True)
class Texts:
    """All that is taught."""

    anchors: Sequence[Lesson]
    keep: Sequence[Lesson]


def gather(method: TwoTeachers, workbench: Workbench) -> Texts:
    """Ask both models everything, and let the aligned one decide what is refused.

    Of the prompts that were written the aligned model teaches those that either model refuses:
    what it does not refuse itself, the fine-tune over-refuses.
    """
    drawn = generator(seed=workbench.seed, method=method.name, key="", role="prompts")
    written = _written(method, workbench, seed=int(drawn.integers(2**31)))
    with workbench.running("finetuned") as student, deterministic():
        task = list(workbench.prompts("task", role="finetuned"))
        own = _encoded(student, written)
        head, end = user_turn_frame(student.loaded.tokenizer)
        mixed = exchanged(task, [*task, *own], frame=(len(head), end), drawn=drawn)
        keep = _replies(student, [*task, *mixed], workbench)
        replies = _replies(student, own, workbench)
        over = [_refuses(student, reply) for reply in replies]
    with workbench.running("aligned") as teacher, deterministic():
        texts = list(workbench.examples("safe", role="aligned"))
        answers = _replies(teacher, _encoded(teacher, written), workbench)
        for answer, reply, refused in zip(answers, replies, over, strict=True):
            if refused or _refuses(teacher, answer):
                texts.append(answer)
            else:
                keep.append(reply)
        anchors = lessons(teacher, [text for text in texts if text.start < len(text.ids)])
    told = [Lesson(text.ids, text.start) for text in keep if text.start < len(text.ids)]
    return Texts(anchors, told)


def exchanged(
    prompts: Sequence[Prompt],
    pool: Sequence[Prompt],
    *,
    frame: tuple[int, int],
    drawn: np.random.Generator,
) -> list[Prompt]:
    """Every prompt with one token of the user's text exchanged for one of the pool.

    Args:
        prompts: rendered prompts.
        pool: rendered prompts whose users' tokens are drawn from, each as often as it occurs.
        frame: how many tokens stand before the user's text, and the token that ends it.
        drawn: where the choice comes from.
    """
    words = [token for each in pool for token in each[slice(*_span(each, frame))]]
    found: list[Prompt] = []
    for each in prompts:
        first, last = _span(each, frame)
        if first < last:
            at = int(drawn.integers(first, last))
            found.append((*each[:at], words[int(drawn.integers(len(words)))], *each[at + 1 :]))
    return found


def lessons(teacher: RunningModel, texts: Sequence[EncodedReply]) -> list[Lesson]:
    """What the teacher thinks of every reply token."""
    found: list[Lesson] = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text.ids], device=teacher.loaded.device)
            logits = teacher.logits(ids)[0, text.start - 1 : -1]
            found.append(Lesson(text.ids, text.start, torch.log_softmax(logits.float(), -1)))
    return found


def _written(method: TwoTeachers, workbench: Workbench, *, seed: int) -> list[str]:
    if not method.self_prompts:
        return []
    withheld = frozenset(workbench.withheld())
    with workbench.running(method.author) as author, deterministic():
        return write_prompts(
            author.loaded,
            method.self_prompts,
            seed=seed,
            wanted=lambda text: not withheld & words_of(text),
            progress=workbench.progress,
        )


def _span(prompt: Prompt, frame: tuple[int, int]) -> tuple[int, int]:
    """Where the user's text begins and ends."""
    start, end = frame
    return start, prompt.index(end, start) if end in prompt[start:] else len(prompt)


def _encoded(model: RunningModel, prompts: Sequence[str]) -> list[Prompt]:
    return [tuple(encode(model.loaded.tokenizer, prompt)) for prompt in prompts]


def _refuses(model: RunningModel, reply: EncodedReply) -> bool:
    text = model.loaded.tokenizer.decode(list(reply.reply_ids), skip_special_tokens=True)
    return bool(keyword_judge().judge(Item(id="written", prompt=""), str(text)).refused)


def _replies(
    model: RunningModel, prompts: Sequence[Prompt], workbench: Workbench
) -> list[EncodedReply]:
    """A model's greedy replies, with the end of the turn where it ended them."""
    if not prompts:
        return []
    tokenizer, longest = model.loaded.tokenizer, max(map(len, prompts))
    room = (model.loaded.max_positions or longest + REPLY_TOKENS) - longest
    stop = end_of_turn_id(tokenizer)
    stop = tokenizer.eos_token_id if stop is None else stop
    found: dict[int, EncodedReply] = {}
    for reply in generate(
        model.loaded,
        prompts,
        max_new_tokens=max(1, min(room, REPLY_TOKENS)),
        batch_size=64,
        progress=workbench.progress,
    ):
        prompt = prompts[reply.prompt_index]
        ending = (stop,) if reply.finished and isinstance(stop, int) else ()
        found[reply.prompt_index] = EncodedReply((*prompt, *reply.token_ids, *ending), len(prompt))
    return [found[index] for index in range(len(prompts))]
