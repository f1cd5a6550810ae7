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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from realign.errors import MismatchError, NonFiniteError, UsageError
from realign.model.accumulate import MomentKind, Precision, Sums
from realign.model.batching import (
    TOKEN_BUDGET,
    explained,
    forward,
    pad_flags,
    pad_left,
    padding_matters,
    plan_batches,
)
from realign.model.generation import check_lengths
from realign.model.loading import LoadedModel
from realign.model.modules import ModuleFinder
from realign.model.moments_experts import ExpertWatch, share_rows
from realign.model.moments_hooks import Probe, Run, hook
from realign.progress import SILENT, Progress

Tokens = Literal["response", "prompt", "all"]


@dataclass(frozen=True)
class Moments:
    """Sums over n token positions of vectors of width d; float64, on the CPU."""

    n: int
    s1: Tensor
    """[d], sum of v."""
    s2: Tensor
    """[d, d], sum of v v^T."""
    kind: MomentKind
    """v: a layer's input; its output without bias; or that output standardised per token."""

    @property
    def mean(self) -> Tensor:
        """[d], the mean of v; needs n > 0."""
        return self.s1 / self.n

    def covariance(self) -> Tensor:
        """[d, d], the population covariance of v, symmetric; needs n > 0."""
        mean = self.mean
        covariance = self.s2 / self.n - torch.outer(mean, mean)
        return (covariance + covariance.T) / 2

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of positions together.

        Raises:
            MismatchError: of different kinds or widths.
        """
        if self.kind != other.kind or self.s1.shape != other.s1.shape:
            raise MismatchError(
                f"moments of {self.kind} vectors of width {len(self.s1)} and of {other.kind} "
                f"vectors of width {len(other.s1)} cannot be merged"
            )
        return Moments(self.n + other.n, self.s1 + other.s1, self.s2 + other.s2, self.kind)

    def through(self, weight: Tensor) -> Moments:
        """Output moments from input moments: n, W s1, W s2 W^T for weight W [d_out, d_in].

        Raises:
            MismatchError: these are not input moments of a layer with this weight.
        """
        if self.kind != "input" or weight.shape[1] != self.s1.shape[0]:
            raise MismatchError(
                f"{self.kind} moments of width {len(self.s1)} do not feed a weight of shape "
                f"{tuple(weight.shape)}"
            )
        w = weight.to(torch.float64)
        return Moments(self.n, w @ self.s1, w @ self.s2 @ w.T, "output")


@dataclass(frozen=True)
class MomentRequest:
    """Which moments to collect for one logical matrix."""

    kind: MomentKind
    module_path: str
    """The module that holds the weight: the weight tensor's name without ".weight"."""
    rows: tuple[int, int] | None = None
    """Output features [start, stop) of a fused projection; None: all. No matter for inputs."""
    transposed: bool = False
    """The weight is stored [d_in, d_out] (GPT-2's Conv1D)."""
    expert: int | None = None
    """Index in a stored stack of experts; its tokens are those that are routed to it."""


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
    progress: Progress = SILENT,
) -> MomentSet:
    """One teacher-forced pass over `sequences`; padding never counts.

    Args:
        loaded: the model, in evaluation mode.
        sequences: token ids with the positions to keep.
        requests: what to collect, by key (the slot's).
        batch_size: most sequences at a time.
        token_budget: most padded positions at a time.
        precision: "float64"; "float32" around a pivot with pairwise merging (Chan et al. 1983) on
            devices where float64 is slow; "auto": float64 wherever the device has it.
        progress: counts sequences.

    Returns:
        Moments by key. A request whose module the model does not have, never runs, or feeds with
        something else than one vector per position is in `.missing` with the reason.

    Raises:
        ModelError: a sequence longer than the model's positions.
        NonFiniteError: an activation was NaN or infinite; names the module.
        UsageError: a batch size below 1.
    """
    if precision == "auto":
        precision = "float32" if loaded.device.type == "mps" else "float64"
    check_lengths(loaded, [len(sequence.ids) for sequence in sequences])
    ids = [sequence.ids for sequence in sequences]
    probes, watches, missing = _plan_probes(loaded, requests, precision)
    model: Any = loaded.model
    body: Any = _smallest_body(model, [each.module for each in (*probes, *watches)])
    plan = plan_batches(
        [len(sequence.ids) for sequence in sequences],
        batch_size=batch_size,
        token_budget=token_budget,
        padded=not padding_matters(body, ids, pad_id=loaded.pad_id, device=loaded.device),
    )
    keeps = [sequence.keep for sequence in sequences]
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
            for indices in plan:
                batch = pad_left(ids, indices, pad_id=loaded.pad_id, device=loaded.device)
                run.start(batch, pad_flags(keeps, indices, batch=batch))
                with torch.no_grad(), explained(loaded.name):
                    forward(body, batch)
                task.advance(len(indices))
    finally:
        run.recent.clear()
        for handle in handles:
            handle.remove()
    return _results(probes, watches, missing)


def _plan_probes(
    loaded: LoadedModel, requests: Mapping[str, MomentRequest], precision: Precision
) -> tuple[list[Probe], list[ExpertWatch], dict[str, str]]:
    finder = ModuleFinder(loaded.model)
    probes: dict[tuple[MomentKind, str, tuple[int, int] | None], Probe] = {}
    watches: dict[str, ExpertWatch] = {}
    missing: dict[str, str] = {}
    for key, request in requests.items():
        home = finder.find(request.module_path)
        if home is None:
            missing[key] = f"the model has no module {request.module_path}"
            continue
        module = finder.module(home)
        expert = request.expert if home.expert is None else home.expert
        if expert is not None:
            watch = watches.setdefault(home.path, ExpertWatch(home.path, module, precision))
            if watch.failure:
                missing[key] = f"{home.path}: {watch.failure}"
                continue
            watch.request(
                key,
                expert=expert,
                parameter=home.parameter,
                kind=request.kind,
                rows=request.rows or share_rows(module, home.parameter, home.share),
            )
            continue
        if home.parameter != "weight":
            missing[key] = f"{home.path}.{home.parameter} is no module of its own"
            continue
        rows = None if request.kind == "input" else request.rows
        probe = probes.setdefault(
            (request.kind, home.path, rows),
            Probe(request.kind, home.path, module, rows, request.transposed, precision, keys=[]),
        )
        probe.keys.append(key)
    return list(probes.values()), [each for each in watches.values() if each.probes], missing


def _smallest_body(model: Any, modules: list[Any]) -> Any:
    """The decoder without its head where that runs all of `modules`: logits are not needed."""
    body = model.base_model
    inside = {id(module) for module in body.modules()}
    return body if all(id(module) in inside for module in modules) else model


def _results(probes: list[Probe], watches: list[ExpertWatch], missing: dict[str, str]) -> MomentSet:
    finished: dict[int, Moments] = {}
    moments: dict[str, Moments] = {}
    for probe in probes:
        source = probe.leader or probe
        failure = probe.failure or source.failure
        if not failure and id(source) not in finished:
            if source.sums is None:
                failure = "the module never ran"
            else:
                finished[id(source)] = _finish(source.sums, source.kind, source.path)
                source.sums = None  # one copy at a time
        if failure:
            missing.update(dict.fromkeys(probe.keys, f"{probe.path}: {failure}"))
            continue
        moments.update(dict.fromkeys(probe.keys, finished[id(source)]))
    for watch in watches:
        for each in watch.probes.values():
            sums, each.sums = each.sums, None
            if watch.failure or sums is None:
                reason = watch.failure or "the module never ran"
                missing.update(dict.fromkeys(each.keys, f"{watch.path}: {reason}"))
                continue
            path = f"{watch.path}.{each.expert}"
            moments.update(dict.fromkeys(each.keys, _finish(sums, each.kind, path)))
    return MomentSet(moments, missing)


def _finish(sums: Sums, kind: MomentKind, path: str) -> Moments:
    result = Moments(*sums.finish(), kind)
    if not bool(torch.isfinite(result.s2).all()):
        raise NonFiniteError(
            f"{path}: its activations are not finite",
            "the model may overflow in its dtype: load it in bfloat16 or float32",
        )
    return result
