"""Greedy replies, batch by batch, each tagged with the index of its prompt.

One beam, no sampling, no penalty, bias, suppression or forced token: whatever the checkpoint's
generation configuration asks for is not obeyed. What ends a reply is `LoadedModel.stop_ids`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from realign.errors import ModelError, UsageError
from realign.model.batching import (
    TOKEN_BUDGET,
    explained,
    pad_left,
    padding_matters,
    plan_batches,
)
from realign.model.chat import encode
from realign.model.loading import LoadedModel
from realign.model.quiet import quiet_libraries
from realign.progress import SILENT, Progress


class Reply(NamedTuple):
    """One finished reply."""

    prompt_index: int
    """Which of the prompts given it answers."""
    text: str
    """Without special tokens."""
    token_ids: tuple[int, ...]
    """As generated, without the stop token."""
    finished: bool
    """The model ended the reply itself; False: it was cut at `max_new_tokens`."""


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    token_budget: int = TOKEN_BUDGET,
    prefix: str = "",
    progress: Progress = SILENT,
) -> Iterator[Reply]:
    """Greedy replies to `prompts`, yielded as their batches finish (longest prompts first).

    Args:
        loaded: the model.
        prompts: user turns, rendered with the model's chat template; or token ids, fed as given.
        max_new_tokens: longest reply in tokens.
        batch_size: most prompts at a time.
        token_budget: most padded positions (prompt and new tokens) at a time.
        prefix: text appended to each rendered prompt; it is not part of the reply.
        progress: counts prompts.

    Raises:
        ModelError: a prompt cannot be rendered, or does not fit into the model with its reply.
        UsageError: a limit below 1.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}", "it must be at least 1")
    sequences = [
        encode(loaded.tokenizer, prompt, prefix=prefix) if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    check_lengths(loaded, [len(tokens) + max_new_tokens for tokens in sequences])
    plan = plan_batches(
        [len(tokens) for tokens in sequences],
        batch_size=batch_size,
        extra=max_new_tokens,
        token_budget=token_budget,
        padded=not padding_matters(
            loaded.model, sequences, pad_id=loaded.pad_id, device=loaded.device
        ),
    )
    # Everything above runs at the call, not at the first item.
    return _run(loaded, sequences, plan, max_new_tokens=max_new_tokens, progress=progress)


def check_lengths(loaded: LoadedModel, lengths: Sequence[int]) -> None:
    """Refuse sequences longer than the architecture declares.

    Raises:
        ModelError: naming the first prompt that does not fit.
    """
    limit = loaded.max_positions
    for index, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise ModelError(
                f"prompt {index} needs {length} positions with its reply, "
                f"but {loaded.name} has {limit}",
                "ask for fewer new tokens, or leave the prompt out",
            )


def _run(
    loaded: LoadedModel,
    sequences: list[list[int]],
    plan: list[list[int]],
    *,
    max_new_tokens: int,
    progress: Progress,
) -> Iterator[Reply]:
    stops = [token for token in loaded.stop_ids if token < loaded.vocabulary_rows]
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=loaded.pad_id,
        use_cache=True,
    )
    model: Any = loaded.model
    with progress.task("generating", total=len(sequences), unit="prompts") as task:
        for indices in plan:
            batch = pad_left(sequences, indices, pad_id=loaded.pad_id, device=loaded.device)
            with (
                torch.no_grad(),
                quiet_libraries(),
                own_configuration(model, settings),
                explained(loaded.name),
            ):
                output = model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_config=settings,
                )
            rows: list[list[int]] = output[:, batch.length :].tolist()
            for index, row in zip(indices, rows, strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), None)
                tokens = tuple(row[:end])
                text = str(loaded.tokenizer.decode(list(tokens), skip_special_tokens=True))
                yield Reply(index, text, tokens, end is not None)
            task.advance(len(indices))


@contextmanager
def own_configuration(model: Any, settings: GenerationConfig) -> Generator[None]:
    """Hide the model's generation configuration: transformers fills unset fields from it."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before
