"""Activation moments: what the layers of a running model see and say at chosen token positions.

For each linear layer z = W x (bias excluded), one streaming pass accumulates n, sum v and
sum v v^T in float64, of the inputs (v = x), of the outputs (v = z), or of the outputs standardised
token by token. Input moments serve every method that weighs directions by activations, because
sum z z^T = W (sum x x^T) W^T exactly. Layers that are fed the same tensor (q, k, v; gate, up) share
one set. Nothing else is kept: memory does not grow with the number of tokens.

How the sums stay exact is in accumulate.py, how layers are watched in moments_hooks.py, the file
format in moments_file.py. What is made of the moments (spectra, ranks, projectors) belongs to
`realign.subspace`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.model.accumulate import Moments, Precision
from realign.model.batching import (
    TOKEN_BUDGET,
    Batch,
    explained,
    forward,
    pad_flags,
    pad_left,
    padding_matters,
    plan_batches,
    waves_of,
)
from realign.model.generation import check_lengths
from realign.model.loading import LoadedModel
from realign.model.lockstep import decoder_blocks, run_in_lockstep
from realign.model.moments_hooks import Run, hook
from realign.model.moments_stage import MomentRequest, MomentSink, Stage, plan_probes
from realign.progress import SILENT, Progress

Tokens = Literal["response", "prompt", "all"]

HELD_BYTES = 512 * 2**20
"""Hidden states of all sequences that wait between two blocks, about."""


@dataclass(frozen=True)
class TokenSequence:
    """One token sequence and the positions of it that count."""

    ids: tuple[int, ...]
    keep: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.keep):
            raise UsageError(f"{len(self.ids)} tokens with a mask of {len(self.keep)} positions")


class MomentSet(Mapping[str, Moments]):
    """Collected moments by key, and why the rest is `missing`. Shared sets are one object."""

    def __init__(
        self, moments: Mapping[str, Moments], missing: Mapping[str, str] | None = None
    ) -> None:
        self._moments = dict(moments)
        self.missing: Mapping[str, str] = MappingProxyType(dict(missing or {}))

    def __getitem__(self, key: str) -> Moments:
        return self._moments[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


class _InMemory:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}

    def put(self, keys: Sequence[str], moments: Moments) -> None:
        """See `MomentSink.put`."""
        before = self.moments.get(keys[0])
        together = moments if before is None else before.merge(moments)
        self.moments.update(dict.fromkeys(keys, together))


def token_sequence(
    prompt_ids: Sequence[int], reply_ids: Sequence[int], *, tokens: Tokens = "response"
) -> TokenSequence:
    """[prompt; reply] with the positions that count.

    Args:
        prompt_ids: the rendered prompt.
        reply_ids: the reply.
        tokens: "response": positions whose own input token belongs to the reply; "prompt": to the
            prompt; "all": both.

    Raises:
        UsageError: another value of `tokens`.
    """
    if tokens not in ("response", "prompt", "all"):
        raise UsageError(f"tokens is {tokens!r}", "use response, prompt or all")
    keep = [tokens != "response"] * len(prompt_ids) + [tokens != "prompt"] * len(reply_ids)
    return TokenSequence((*prompt_ids, *reply_ids), tuple(keep))


def collect_moments(
    loaded: LoadedModel,
    sequences: Sequence[TokenSequence],
    *,
    requests: Mapping[str, MomentRequest],
    batch_size: int = 8,
    token_budget: int = TOKEN_BUDGET,
    precision: Precision | Literal["auto"] = "auto",
    diagonal: bool = False,
    sink: MomentSink | None = None,
    held_bytes: int = HELD_BYTES,
    progress: Progress = SILENT,
) -> MomentSet:
    """One teacher-forced pass over `sequences`; padding never counts.

    All sequences go through one decoder block before the next is begun, and what was measured in it
    is handed on: only the sums of one block are held at a time.

    Args:
        loaded: the model, in evaluation mode.
        sequences: token ids with the positions to keep.
        requests: what to collect, by key (the slot's).
        batch_size: most sequences at a time.
        token_budget: most padded positions at a time.
        precision: "float64"; "float32" around a pivot with pairwise merging (Chan et al. 1983) on
            devices where float64 is slow; "auto": float64 wherever the device has it.
        diagonal: keep only the diagonal of S2.
        sink: takes the moments of a block when they are finished; None: they are kept in memory.
        held_bytes: hidden states held between two blocks, about; more sequences than that go
            through the model in several passes.
        progress: counts sequences.

    Returns:
        Moments by key (none with a `sink`). A request whose module the model does not have, never
        runs, or feeds with something else than one vector per position is in `.missing` with the
        reason.

    Raises:
        ModelError: a sequence longer than the model's positions.
        NonFiniteError: an activation was NaN or infinite; names the module.
        UsageError: a batch size below 1.
    """
    if precision == "auto":
        precision = "float32" if loaded.device.type == "mps" else "float64"
    check_lengths(loaded, [len(sequence.ids) for sequence in sequences])
    ids = [sequence.ids for sequence in sequences]
    probes, watches, missing = plan_probes(
        loaded.model, requests, precision=precision, diagonal=diagonal
    )
    model: Any = loaded.model
    body: Any = _smallest_body(model, [each.module for each in (*probes, *watches)])
    plan = plan_batches(
        [len(sequence.ids) for sequence in sequences],
        batch_size=batch_size,
        token_budget=token_budget,
        padded=not padding_matters(body, ids, pad_id=loaded.pad_id, device=loaded.device),
    )
    waves = list(waves_of(plan, ids, position_bytes=loaded.position_bytes, held_bytes=held_bytes))
    kept = _InMemory()
    stage = Stage(probes, watches, kept if sink is None else sink)
    run = Run()
    handles = [
        probe.module.register_forward_hook(hook(probe, run), with_kwargs=True) for probe in probes
    ]
    handles += [
        watch.module.register_forward_pre_hook(watch.hook(lambda: run.keep), with_kwargs=True)
        for watch in watches
    ]
    try:
        with progress.task("collecting activations", total=len(ids), unit="sequences") as task:
            for wave in waves:
                batches = [
                    pad_left(ids, indices, pad_id=loaded.pad_id, device=loaded.device)
                    for indices in wave
                ]
                keeps = [
                    pad_flags([each.keep for each in sequences], indices, batch=batch)
                    for indices, batch in zip(wave, batches, strict=True)
                ]
                with loaded.held_weights() as let_go:
                    run_in_lockstep(
                        [partial(_pass, loaded, body, batch) for batch in batches],
                        blocks=decoder_blocks(body),
                        resumed=partial(_turn, run, keeps),
                        stage_done=partial(_leave, stage, let_go),
                    )
                task.advance(sum(map(len, wave)))
    finally:
        run.recent.clear()
        for handle in handles:
            handle.remove()
    missing.update(stage.missing())
    found = {key: value for key, value in kept.moments.items() if key not in missing}
    return MomentSet(found, missing)


def _pass(loaded: LoadedModel, body: Any, batch: Batch) -> None:
    with torch.no_grad(), explained(loaded.name):  # no_grad holds in its own thread only
        forward(body, batch)


def _turn(run: Run, keeps: Sequence[Tensor], number: int) -> None:
    run.turn_to(keeps[number])


def _leave(stage: Stage, let_go: Callable[[], None]) -> None:
    stage.finish()
    let_go()


def _smallest_body(model: Any, modules: list[Any]) -> Any:
    """The decoder without its head where that runs all of `modules`: logits are not needed."""
    body = model.base_model
    inside = {id(module) for module in body.modules()}
    return body if all(id(module) in inside for module in modules) else model
