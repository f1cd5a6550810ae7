"""Gradient statistics of logical matrices: mean g, mean g^2 or mean |W (.) g| over single examples.

All examples pass through one decoder block before the next, forwards and then backwards. Forwards
only what enters each block is kept; backwards a block runs again, with gradients of its own weights
alone. So the gradients and sums of one block are held at a time, whatever the model's size, and the
weights of one block in float32. Here: that pass. Not here: the loss (`training`), which matrices
there are (`slot_views`), what is made of the statistics.

Blocks that hand something on aside, past what they return, and matrices outside of all blocks are
measured by plain backward passes through the whole model, a few matrices at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from realign.errors import ModelError, NonFiniteError, UsageError
from realign.model.batching import explained
from realign.model.chat import EncodedReply
from realign.model.generation import check_lengths
from realign.model.loading import LoadedModel
from realign.model.lockstep import decoder_blocks, run_in_lockstep
from realign.model.slot_views import SlotViews
from realign.model.training import IGNORED, masked_loss
from realign.progress import SILENT, Progress

GradientKind = Literal["mean", "fisher", "snip"]

HELD_BYTES = 512 * 2**20
"""What enters the blocks, of all examples that are under way together, about."""

GROUP_BYTES = 512 * 2**20
"""Sums held at a time by plain passes."""


class GradientSink(Protocol):
    """Where finished sums go; `growing_file.GrowingFile` is one."""

    def __contains__(self, name: str) -> bool: ...

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a sum [d_out, d_in], float32 on the CPU."""
        ...

    def get(self, name: str) -> Tensor:
        """Return what was taken."""
        ...

    def replace(self, name: str, tensor: Tensor) -> None:
        """Take another sum in its stead."""
        ...


class _Aside(BaseException):  # no `except Exception` of a model's code is to stop it
    """A block changed something that it was given."""


@dataclass(eq=False)
class _Crossing:
    """One example at one block."""

    block: Any
    call: tuple[tuple[Any, ...], dict[str, Any]]
    leaves: list[Tensor]
    """What the block gave, cut off from how it came about."""


def collect_gradients(
    loaded: LoadedModel,
    examples: Sequence[EncodedReply],
    *,
    views: SlotViews,
    keys: Sequence[str],
    kind: GradientKind,
    sink: GradientSink,
    held_bytes: int = HELD_BYTES,
    progress: Progress = SILENT,
) -> None:
    """Average a gradient statistic over examples, in float32 whatever the model's dtype.

    Args:
        loaded: the model; its weights are unchanged afterwards.
        examples: the loss of each is the mean cross-entropy of its reply tokens.
        views: of the model.
        keys: the matrices to measure.
        kind: "mean" g, "fisher" g^2, "snip" |W (.) g|, each taken per example, then averaged.
        sink: takes one tensor [d_out, d_in] per key.
        held_bytes: see `HELD_BYTES`; more examples than fit go through in several passes.
        progress: counts examples.

    Raises:
        UsageError: no examples, or one without a reply.
        ModelError: a matrix is not at hand, or the model cannot be run.
        NonFiniteError: the loss of an example is NaN or infinite.
    """
    if not examples or any(len(each.ids) <= max(each.start, 1) for each in examples):
        raise UsageError("gradients need examples with replies", "give texts that have an answer")
    check_lengths(loaded, [len(each.ids) for each in examples])
    views.require(keys)
    blocks = decoder_blocks(loaded.model)
    within = _by_block(loaded.model, blocks, views, keys)
    outside = [key for key in keys if not any(key in each for each in within.values())]
    run = _Run(loaded, views, kind, sink, len(examples))
    with progress.task("collecting gradients", total=len(examples), unit="examples") as task:
        if within:
            try:
                for wave in _waves(loaded, examples, len(blocks), held_bytes):
                    run.through_blocks(wave, blocks, within)
                    task.advance(len(wave))
            except _Aside as error:
                if run.begun:
                    raise ModelError(f"{loaded.name}: its blocks differ between texts") from error
                outside = list(keys)
        if outside and loaded.offloaded:
            raise ModelError(
                f"{loaded.name}: {outside[0]} needs a backward pass through the whole model, which "
                "is not in memory",
                "leave --offload out, or leave the matrix out with --modules",
            )
        if outside:
            run.plainly(examples, outside)
    run.average(keys)


class _Run:
    """One collection under way."""

    def __init__(
        self,
        loaded: LoadedModel,
        views: SlotViews,
        kind: GradientKind,
        sink: GradientSink,
        count: int,
    ) -> None:
        self._loaded, self._views, self._kind, self._sink = loaded, views, kind, sink
        self._count = count
        self.begun = False

    def through_blocks(
        self,
        examples: Sequence[EncodedReply],
        blocks: Sequence[Any],
        within: Mapping[int, Sequence[str]],
    ) -> None:
        """All examples through block after block, and back."""
        tapes: list[list[_Crossing]] = [[] for _ in examples]
        current: list[_Crossing] = tapes[0]

        def turn(number: int) -> None:
            nonlocal current
            current = tapes[number]

        def cross(block: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
            output, crossing = _crossed(block, forward, args, kwargs)
            current.append(crossing)
            return output

        with self._loaded.held_weights(dtype=torch.float32) as let_go:
            with _replaced_forwards(blocks, cross):
                run_in_lockstep(
                    [partial(self._forwards, each) for each in examples],
                    blocks=blocks,
                    resumed=turn,
                    stage_done=let_go,
                )
            self.begun = True
            lowest = min(at for at, each in enumerate(tapes[0]) if within.get(id(each.block)))
            for at in range(len(tapes[0]) - 1, lowest - 1, -1):
                crossings = [tape.pop() for tape in tapes]
                keys = within.get(id(crossings[0].block), ())
                self._add(self._back(crossings, keys, onwards=at > lowest))
                let_go()

    def plainly(self, examples: Sequence[EncodedReply], keys: Sequence[str]) -> None:
        """Backward passes through the whole model, of a few matrices at a time."""
        for group in self._groups(keys):
            with self._loaded.held_weights(dtype=torch.float32) as let_go:
                sums: dict[str, Tensor] = {}
                with self._learning_when_entered(group) as learning:
                    for example in examples:
                        with torch.enable_grad(), explained(self._loaded.name):
                            self._loss(example).backward()
                        for key in group:
                            self._count_in(sums, key)
                        for parameter in learning():
                            parameter.grad = None
                self._add(sums)
                let_go()

    def average(self, keys: Sequence[str]) -> None:
        """Divide the sums by the number of examples."""
        for key in keys:
            self._sink.replace(key, self._sink.get(key) / self._count)

    def _forwards(self, example: EncodedReply) -> None:
        with torch.enable_grad(), explained(self._loaded.name):
            loss = self._loss(example)
            if loss.requires_grad:
                loss.backward(retain_graph=True)

    def _loss(self, example: EncodedReply) -> Tensor:
        model: Any = self._loaded.model
        ids = torch.tensor([example.ids], device=self._loaded.device)
        labels = ids.clone()
        labels[:, : max(example.start, 1)] = IGNORED
        loss = masked_loss(model(input_ids=ids, use_cache=False).logits, labels)
        if not bool(torch.isfinite(loss.detach())):
            raise NonFiniteError(
                f"{self._loaded.name}: the loss of an example is not finite",
                "check the texts and the model",
            )
        return loss

    def _back(
        self, crossings: Sequence[_Crossing], keys: Sequence[str], *, onwards: bool
    ) -> dict[str, Tensor]:
        """The sums of one block's matrices; what flows back is left at the block before."""
        sums: dict[str, Tensor] = {}
        parameters: list[torch.nn.Parameter] = []

        def learn(*_: Any) -> None:  # once the weights are in place
            parameters[:] = self._views.parameters(keys).values()
            for parameter in parameters:
                parameter.requires_grad_(True)

        handle = crossings[0].block.register_forward_pre_hook(learn)
        try:
            for crossing in crossings:
                with torch.enable_grad(), explained(self._loaded.name):
                    _backwards(crossing, onwards=onwards)
                for key in keys:
                    self._count_in(sums, key)
                for parameter in parameters:
                    parameter.grad = None
        finally:
            handle.remove()
            for parameter in parameters:
                parameter.requires_grad_(False)
        return sums

    def _count_in(self, sums: dict[str, Tensor], key: str) -> None:
        gradient = self._views.gradient(key)
        weight = self._views.weight(key)
        if key not in sums:
            sums[key] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        if gradient is None:  # an expert module that no token came to
            return
        if self._kind == "mean":
            sums[key] += gradient
        elif self._kind == "fisher":
            sums[key].addcmul_(gradient, gradient)
        else:
            sums[key] += (weight * gradient).abs_()

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for key, value in sums.items():
            value = value.cpu()
            if key in self._sink:
                self._sink.replace(key, self._sink.get(key) + value)
            else:
                self._sink.add(key, value)

    def _groups(self, keys: Sequence[str]) -> Iterator[list[str]]:
        group: list[str] = []
        held = 0
        for key in keys:
            cost = 8 * self._views.weight(key).numel()
            if group and held + cost > GROUP_BYTES:
                yield group
                group, held = [], 0
            group.append(key)
            held += cost
        yield group

    @contextmanager
    def _learning_when_entered(
        self, keys: Sequence[str]
    ) -> Generator[Callable[[], list[torch.nn.Parameter]]]:
        """Let only these matrices' parameters take gradients, once their weights are in place."""
        model: Any = self._loaded.model
        owners = {
            view.parameter.rpartition(".")[0] for view in (self._views.views[k] for k in keys)
        }

        def learning() -> list[torch.nn.Parameter]:
            return list(self._views.parameters(keys).values())

        def learn(*_: Any) -> None:
            for parameter in learning():
                if not parameter.requires_grad:
                    parameter.requires_grad_(True)

        with ExitStack() as stack:
            for owner in owners:
                handle = model.get_submodule(owner).register_forward_pre_hook(learn)
                stack.callback(handle.remove)
            try:
                yield learning
            finally:
                for parameter in learning():
                    parameter.requires_grad_(False)
                    parameter.grad = None


def _by_block(
    model: Any, blocks: Sequence[Any], views: SlotViews, keys: Sequence[str]
) -> dict[int, list[str]]:
    """Matrices by the id of the block that holds their parameter."""
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = [(f"{names[id(block)]}.", id(block)) for block in blocks]
    found: dict[int, list[str]] = {}
    for key in keys:
        parameter = views.views[key].parameter
        for prefix, block in prefixes:
            if parameter.startswith(prefix):
                found.setdefault(block, []).append(key)
                break
    return found


def _waves(
    loaded: LoadedModel, examples: Sequence[EncodedReply], blocks: int, held_bytes: int
) -> Iterator[list[EncodedReply]]:
    width = loaded.position_bytes // loaded.dtype.itemsize  # four hidden states
    wave: list[EncodedReply] = []
    held = 0
    for example in examples:
        cost = 2 * width * len(example.ids) * blocks  # float32: what a block gives, its gradient
        if wave and held + cost > held_bytes:
            yield wave
            wave, held = [], 0
        wave.append(example)
        held += cost
    yield wave


def _crossed(
    block: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, _Crossing]:
    """Run a block without gradients; what it gives begins a new graph."""
    before = pytree.tree_structure((args, kwargs))
    with torch.no_grad():
        output = forward(*args, **kwargs)
    if pytree.tree_structure((args, kwargs)) != before:
        raise _Aside
    flat, shape = pytree.tree_flatten(output)
    cut = [each.detach().requires_grad_() if _differentiable(each) else each for each in flat]
    leaves = [each for each in cut if _differentiable(each)]
    return pytree.tree_unflatten(cut, shape), _Crossing(block, (args, kwargs), leaves)


def _backwards(crossing: _Crossing, *, onwards: bool) -> None:
    """Run a block again with gradients, and hand them to what came into it."""
    flat, shape = pytree.tree_flatten(crossing.call)
    inputs = [each for each in flat if isinstance(each, Tensor) and each.requires_grad]
    copies = {id(each): each.detach().requires_grad_(onwards) for each in inputs}
    args, kwargs = pytree.tree_unflatten([copies.get(id(each), each) for each in flat], shape)
    output = crossing.block(*args, **kwargs)
    given = [each for each in pytree.tree_leaves(output) if _differentiable(each)]
    pairs = [
        (out, leaf.grad)
        for out, leaf in zip(given, crossing.leaves, strict=True)
        if leaf.grad is not None and out.requires_grad
    ]
    if pairs:
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    back = [(each, copies[id(each)].grad) for each in inputs if onwards]
    back = [(each, gradient) for each, gradient in back if gradient is not None]
    if back:
        torch.autograd.backward(
            [each for each, _ in back], [grad for _, grad in back], retain_graph=True
        )


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _replaced_forwards(blocks: Sequence[Any], cross: Any) -> Generator[None]:
    for block in blocks:
        block.forward = partial(cross, block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
