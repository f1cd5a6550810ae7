"""The probes of one pass: which there are for what was asked, and handing on what they summed.

Here: one probe for everything distinct, and finishing all that was fed since the last block was
left. Not here: what a probe does when its layer runs (`moments_hooks`, `moments_experts`), the pass
itself (`moments`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from realign.errors import NonFiniteError
from realign.model.accumulate import MomentKind, Moments, Precision, Sums
from realign.model.modules import ModuleFinder
from realign.model.moments_experts import ExpertWatch, share_rows
from realign.model.moments_hooks import Probe


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


class MomentSink(Protocol):
    """Where finished moments go, one after the other."""

    def put(self, keys: Sequence[str], moments: Moments) -> None:
        """Take the moments that `keys` share, and merge them with those that they have."""
        ...


class Stage:
    """Hands on what was summed since the last block was left."""

    def __init__(
        self, probes: Sequence[Probe], watches: Sequence[ExpertWatch], sink: MomentSink
    ) -> None:
        self._probes = probes
        self._watches = watches
        self._sink = sink
        self._done: set[str] = set()

    def finish(self) -> None:
        """Give every sum that was fed to the sink, once for all that share it."""
        for probe in self._probes:
            if probe.sums is None or probe.failure:
                continue
            sums, probe.sums = probe.sums, None
            followers = [each for each in self._probes if each.leader is probe]
            keys = list(probe.keys)
            for each in followers:
                keys += [key for key in each.keys if key not in keys]
            self._put(keys, sums, probe.kind, probe.path)
        for watch in self._watches:
            for each in watch.probes.values():
                sums, each.sums = each.sums, None
                if sums is not None and not watch.failure:
                    self._put(each.keys, sums, each.kind, f"{watch.path}.{each.expert}")

    def missing(self) -> dict[str, str]:
        """What was not measured, and why."""
        found: dict[str, str] = {}
        for probe in self._probes:
            failure = probe.failure or (probe.leader or probe).failure
            self._note(found, probe.keys, probe.path, failure)
        for watch in self._watches:
            for each in watch.probes.values():
                self._note(found, each.keys, watch.path, watch.failure)
        return found

    def _note(self, found: dict[str, str], keys: Sequence[str], path: str, failure: str) -> None:
        if not failure and keys[0] not in self._done:
            failure = "the module never ran"
        if failure:
            found.update(dict.fromkeys(keys, f"{path}: {failure}"))

    def _put(self, keys: Sequence[str], sums: Sums, kind: MomentKind, path: str) -> None:
        self._sink.put(keys, _finish(sums, kind, path))
        self._done.update(keys)


def plan_probes(
    model: Any,
    requests: Mapping[str, MomentRequest],
    *,
    precision: Precision,
    diagonal: bool,
) -> tuple[list[Probe], list[ExpertWatch], dict[str, str]]:
    """One probe for everything distinct, the experts' by module, and why some have none."""
    finder = ModuleFinder(model)
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
            watch = watches.setdefault(
                home.path, ExpertWatch(home.path, module, precision, diagonal=diagonal)
            )
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
            Probe(
                request.kind,
                home.path,
                module,
                rows,
                request.transposed,
                precision,
                keys=[],
                diagonal=diagonal,
            ),
        )
        probe.keys.append(key)
    return list(probes.values()), [each for each in watches.values() if each.probes], missing


def _finish(sums: Sums, kind: MomentKind, path: str) -> Moments:
    result = Moments(*sums.finish(), kind)
    if not bool(torch.isfinite(result.s2).all()):
        raise NonFiniteError(
            f"{path}: its activations are not finite",
            "the model may overflow in its dtype: load it in bfloat16 or float32",
        )
    return result
