"""The decoder blocks of a running model as a chain that can be run one by one, with other weights.

A block is called exactly as its model calls it: what it gets beside the hidden states (rotary
tables, masks, positions) is captured once per sequence. Here: finding the blocks, capturing,
running, and which norm feeds which linear layer. Not here: what the weights are replaced by
(`realign.repair.quantise`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from realign.errors import ModelError

_CHAIN_TOLERANCE = 1e-4
_HIDDEN = "hidden_states"


@dataclass(frozen=True, eq=False)
class Call:
    """What a block is given beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: bool
    """The hidden states come by name."""


@dataclass(frozen=True, eq=False)
class Fed:
    """A norm and the linear weights that read its output, by name within their block."""

    norm: str
    weights: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Captured:
    """One sequence on its way in: hidden states [1, length, d] and the calls of all blocks."""

    hidden: Tensor
    calls: tuple[Call, ...]


class BlockChain:
    """The blocks of one model, in order."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        """Find the list of blocks that holds these modules.

        Args:
            model: in evaluation mode.
            paths: of modules inside of blocks, as "model.layers.0.mlp.up_proj".

        Raises:
            ModelError: they lie in no list of blocks, or in several.
        """
        self._model = model
        lists = {
            name: tuple(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
        }
        homes = {_outermost(path, lists) for path in paths}
        if len(homes) != 1 or None in homes:
            raise ModelError(
                "the decoder blocks of this model are not one list of modules",
                "use a method that needs no blocks (lssf, safe_delta, replace, wise_ft)",
            )
        (home,) = homes
        assert home is not None
        self.prefix: str = home
        self.blocks: tuple[nn.Module, ...] = lists[home]

    def capture(self, sequences: Sequence[Sequence[int]]) -> list[Captured]:
        """Run the whole model on each sequence and keep how its blocks were called.

        Raises:
            ModelError: a block is called several times or not at all, or feeding one block's output
                to the next is not what the model does.
        """
        found: list[Captured] = []
        for number, ids in enumerate(sequences):
            calls, inputs = self._calls(ids)
            if number == 0:
                self._check_chain(inputs, calls)
            found.append(Captured(inputs[0], tuple(calls)))
        return found

    def run(
        self,
        index: int,
        hidden: Tensor,
        call: Call,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the output of one block [1, length, d].

        Args:
            index: of the block.
            hidden: its input.
            call: what else it is given.
            weights: parameters by name within the block that stand for its own in this one call.
        """
        args = call.args if call.named else (hidden, *call.args)
        kwargs = {**call.kwargs, _HIDDEN: hidden} if call.named else dict(call.kwargs)
        block = self.blocks[index]
        found: Any = torch.func.functional_call(block, dict(weights or {}), args, kwargs)
        return _states(found)

    def outputs(self, ids: Sequence[int], *, position: int) -> list[Tensor]:
        """Return every block's output at one position of a sequence, [d] each, float32."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(_states(output)[0, position].detach().float().clone())

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_hook(keep).remove)
            self._forward(ids)
        return found

    def fed(self, index: int, hidden: Tensor, call: Call, weights: Sequence[str]) -> list[Fed]:
        """Return which of the named linear weights read the very output of which norm."""
        block = self.blocks[index]
        homes = {name.rpartition(".")[0]: name for name in weights}
        norms: dict[str, Any] = {}
        readers: dict[str, Any] = {}
        with ExitStack() as stack:
            for name, module in block.named_modules():
                if _is_norm(module):
                    stack.callback(_on_output(module, norms, name))
                if name in homes:
                    stack.callback(_on_input(module, readers, name))
            with torch.no_grad():
                self.run(index, hidden, call)
        return [
            Fed(norm, found)
            for norm, output in norms.items()
            if (found := tuple(homes[r] for r, value in readers.items() if value is output))
        ]

    def largest_input(self, index: int, weight: str, run: Callable[[], None]) -> Tensor:
        """Return max|x| of every channel that the linear layer of `weight` reads while `run`s."""
        module = self.blocks[index].get_submodule(weight.rpartition(".")[0])
        largest: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen = cast(Tensor, args[0]).detach().flatten(0, -2).abs().amax(dim=0)
            largest[:] = [seen if not largest else torch.maximum(largest[0], seen)]

        handle = module.register_forward_pre_hook(keep)
        try:
            run()
        finally:
            handle.remove()
        return largest[0]

    def _calls(self, ids: Sequence[int]) -> tuple[list[Call], list[Tensor]]:
        calls: list[Call] = []
        inputs: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = not args
            rest = dict(kwargs)
            hidden = rest.pop(_HIDDEN) if named else args[0]
            calls.append(Call(tuple(args[1:]), rest, named))
            inputs.append(hidden.detach())

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            self._forward(ids)
        if len(calls) != len(self.blocks):
            raise _not_a_chain(f"{len(self.blocks)} blocks are called {len(calls)} times")
        return calls, inputs

    def _check_chain(self, inputs: Sequence[Tensor], calls: Sequence[Call]) -> None:
        for index in range(len(self.blocks) - 1):
            with torch.no_grad():
                output = self.run(index, inputs[index], calls[index])
            wanted = inputs[index + 1]
            if output.shape != wanted.shape or not torch.allclose(
                output,
                wanted,
                rtol=_CHAIN_TOLERANCE,
                atol=_CHAIN_TOLERANCE * float(wanted.abs().max()),
            ):
                raise _not_a_chain(f"block {index + 1} does not read what block {index} writes")

    def _forward(self, ids: Sequence[int]) -> None:
        place = next(self._model.parameters()).device
        with torch.no_grad():
            self._model(input_ids=torch.tensor([list(ids)], device=place), use_cache=False)


def _outermost(path: str, lists: Mapping[str, Any]) -> str | None:
    """The outermost list of modules that a module lies in."""
    parts = path.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in lists), None)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
    )


def _on_output(module: nn.Module, into: dict[str, Any], name: str) -> Callable[[], None]:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        into[name] = output

    return module.register_forward_hook(keep).remove


def _on_input(module: nn.Module, into: dict[str, Any], name: str) -> Callable[[], None]:
    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        into[name] = args[0]

    return module.register_forward_pre_hook(keep).remove


def _states(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _not_a_chain(what: str) -> ModelError:
    return ModelError(
        f"this model's decoder blocks are not a plain chain: {what}",
        "use a method that needs no blocks (lssf, safe_delta, replace, wise_ft)",
    )
