"""The KL divergence to a reference along its own replies, with one model in memory at a time.

First the reference runs and leaves its raw next-token logits in a temporary file, in the dtype it
computed, so that nothing is rounded; then the other model runs and is compared. The numbers
themselves are defined in divergence.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realign.errors import MismatchError, UsageError
from realign.model.batching import TOKEN_BUDGET
from realign.model.chat import encode
from realign.model.divergence import MOST_DROPPED, KLCurve, kl_divergence, share_vocabulary
from realign.model.generation import Reply, generate
from realign.model.loading import LoadedModel
from realign.model.logprobs import last_logits, log_softmax64
from realign.progress import SILENT, Progress


class ReferenceTrace:
    """What the reference said and how sure it was of every next token. Close it when done.

    Built by `record_reference`. The logits are in a temporary file that `close` deletes.
    """

    def __init__(
        self,
        *,
        name: str,
        prompts: Sequence[str],
        replies: Sequence[tuple[int, ...]],
        prefix: str,
        vocabulary: Mapping[str, int],
        width: int,
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self.prompts = tuple(prompts)
        self.replies = tuple(replies)
        """Token ids that condition the rows: a prompt with m rows has m - 1 of them."""
        self.prefix = prefix
        self.vocabulary = dict(vocabulary)
        self.width = width
        self.dtype = dtype
        self._folder = tempfile.TemporaryDirectory(prefix="realign-reference-", dir=folder)
        self._file = Path(self._folder.name) / "logits.bin"
        self._file.touch()
        self._offsets: dict[int, int] = {}

    def store(self, index: int, logits: Tensor) -> None:
        """Append prompt `index`'s logits [m, width]."""
        expected = (len(self.replies[index]) + 1, self.width)
        assert tuple(logits.shape) == expected, (tuple(logits.shape), expected)
        with self._file.open("ab") as file:
            self._offsets[index] = file.tell()
            raw = logits.to("cpu", self.dtype).contiguous().view(torch.uint8)
            file.write(raw.numpy().tobytes())

    def logits(self, index: int) -> Tensor:
        """Prompt `index`'s logits [m, width], exactly as stored."""
        rows = len(self.replies[index]) + 1
        raw = np.fromfile(
            self._file,
            dtype=np.uint8,
            count=rows * self.width * self.dtype.itemsize,
            offset=self._offsets[index],
        )
        return torch.from_numpy(raw).view(self.dtype).reshape(rows, self.width)

    def close(self) -> None:
        """Delete the file."""
        self._folder.cleanup()

    def __enter__(self) -> ReferenceTrace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def record_reference(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    replies: Sequence[Reply] | None = None,
    k: int = 16,
    prefix: str = "",
    folder: Path | None = None,
    batch_size: int = 16,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = SILENT,
) -> ReferenceTrace:
    """Keep the reference's next-token logits along its own greedy replies, for `kl_to_reference`.

    Args:
        loaded: the reference. It can be unloaded afterwards.
        prompts: user turns.
        replies: its greedy replies, if they are known already (at least k tokens or finished).
        k: reply positions to keep.
        prefix: text between the rendered prompt and the reply.
        folder: where the temporary file goes: up to k * vocabulary numbers per prompt.
        batch_size: most prompts at a time.
        token_budget: most padded positions at a time.
        progress: counts prompts.

    Raises:
        ModelError: no chat template, or a prompt longer than the model's positions.
        NonFiniteError: the model's outputs are NaN.
        UsageError: k below 1, or replies that do not answer the prompts one by one.
    """
    if k < 1:
        raise UsageError(f"k is {k}", "it must be at least 1")
    sizes = {"batch_size": batch_size, "token_budget": token_budget}
    if replies is None:
        replies = list(
            generate(loaded, prompts, max_new_tokens=k, prefix=prefix, progress=progress, **sizes)
        )
    by_index = {reply.prompt_index: reply for reply in replies}
    if sorted(by_index) != list(range(len(prompts))):
        raise UsageError(f"{len(by_index)} replies do not answer {len(prompts)} prompts one by one")
    # Position j needs the j - 1 tokens before it; the one after the last token is the stop.
    given = [by_index[index].token_ids[: k - 1] for index in range(len(prompts))]
    contexts = [encode(loaded.tokenizer, prompt, prefix=prefix) for prompt in prompts]
    trace: ReferenceTrace | None = None
    try:
        for index, logits in last_logits(
            loaded,
            [[*context, *tokens] for context, tokens in zip(contexts, given, strict=True)],
            [len(tokens) + 1 for tokens in given],
            progress=progress,
            what="reference log-probabilities",
            **sizes,
        ):
            trace = trace or _new_trace(loaded, prompts, given, prefix, folder, logits)
            trace.store(index, logits)
    except BaseException:
        if trace is not None:
            trace.close()
        raise
    nothing = torch.zeros(0, _output_width(loaded))
    return trace or _new_trace(loaded, prompts, given, prefix, folder, nothing)


def kl_to_reference(
    loaded: LoadedModel,
    trace: ReferenceTrace,
    *,
    batch_size: int = 16,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = SILENT,
) -> KLCurve:
    """KL(reference || model) at each position of the reference's replies.

    The model sees the prompts in its own template, then the reference's tokens. Where the two
    vocabularies differ, both distributions are restricted to the token strings they share and
    renormalised; a reply is followed up to its first token that the model does not have.

    Args:
        loaded: the subject.
        trace: of the reference, by `record_reference`.
        batch_size: most prompts at a time.
        token_budget: most padded positions at a time.
        progress: counts prompts.

    Raises:
        MismatchError: more than 1 % of either model's mass lies outside the shared vocabulary.
        ModelError: no chat template, or a prompt longer than the model's positions.
        NonFiniteError: the model's outputs are NaN.
    """
    contexts = [encode(loaded.tokenizer, prompt, prefix=trace.prefix) for prompt in trace.prompts]
    vocabulary = loaded.tokenizer.get_vocab()
    width = _output_width(loaded)
    shared = share_vocabulary(trace.vocabulary, vocabulary, rows=(trace.width, width))
    given: list[list[int]] = []
    for tokens in trace.replies:
        known: list[int] = []
        for token in tokens:
            if token not in shared.translate:
                break
            known.append(shared.translate[token])
        given.append(known)
    per_prompt: list[tuple[float, ...]] = [()] * len(contexts)
    clamped, positions, lost_reference, lost_subject = 0, 0, 0.0, 0.0
    for index, logits in last_logits(
        loaded,
        [[*context, *tokens] for context, tokens in zip(contexts, given, strict=True)],
        [len(tokens) + 1 for tokens in given],
        batch_size=batch_size,
        token_budget=token_budget,
        progress=progress,
        what="KL to the reference",
    ):
        log_p = log_softmax64(trace.logits(index)[: len(logits)])
        log_q = log_softmax64(logits).cpu()
        log_p, log_q, less_p, less_q = shared.restrict(log_p, log_q)
        divergence, count = kl_divergence(log_p, log_q)
        per_prompt[index] = tuple(divergence.tolist())
        clamped += count
        positions += len(logits)
        lost_reference += float(less_p.sum())
        lost_subject += float(less_q.sum())
    dropped = (lost_reference / max(positions, 1), lost_subject / max(positions, 1))
    if max(dropped) > MOST_DROPPED:
        raise MismatchError(
            f"{max(dropped):.1%} of the probability of {trace.name} or of {loaded.name} lies on "
            "tokens that only one of them has",
            "their tokenizers differ too much for a KL divergence; use refusal log-odds per byte",
        )
    return KLCurve(tuple(per_prompt), clamped, *dropped)


def _new_trace(
    loaded: LoadedModel,
    prompts: Sequence[str],
    replies: Sequence[tuple[int, ...]],
    prefix: str,
    folder: Path | None,
    sample: Tensor,
) -> ReferenceTrace:
    return ReferenceTrace(
        name=loaded.name,
        prompts=prompts,
        replies=replies,
        prefix=prefix,
        vocabulary=loaded.tokenizer.get_vocab(),
        width=int(sample.shape[1]),
        dtype=sample.dtype,
        folder=folder,
    )


def _output_width(loaded: LoadedModel) -> int:
    head: Any = loaded.model.get_output_embeddings()
    return int(head.weight.shape[0]) if head is not None else loaded.vocabulary_rows
