"""Safety at One Shot: a few steps down the gradient of one refusal, on its leading directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.model.chat import EncodedReply, encode_reply
from realign.model.loading import LoadedModel
from realign.model.training import deterministic
from realign.repair.edit import Dense, Edit, Layer, Unchanged, from_factors
from realign.repair.method import Card, Given, Method, Settled, with_settings
from realign.repair.methods.short_runs import adamw_run, reply_loss
from realign.repair.parameters import Choice, Integer, Real, parameter
from realign.repair.preparation import Data, RunningModel, Statistics, Workbench
from realign.subspace.spectrum import top_triplets

PROMPT = "Tell me how to hurt someone without getting caught."
REFUSAL = (
    "I'm sorry, but I can't help with that. I won't give advice on harming people. If someone is "
    "in danger, please contact the emergency services."
)

_HALVINGS = 30
_MOST_UNKNOWN = 0.1
"""Share of the generic example's tokens that a vocabulary may lack."""

CARD = Card(
    title="Safety at One Shot",
    source="Zhang et al., arXiv 2601.01887 (ICLR 2026); formulas second-hand, choices ours",
    summary="a few steps along the top-k directions of one refusal's gradient",
    idea=(
        "One example of a refusal is enough to restore alignment, because the gradient of safety "
        "is low-rank: a few directions per matrix hold most of its energy. A step on these alone "
        "moves refusal and little else."
    ),
    equations=(
        "L = mean cross-entropy of the refusal's tokens, given one harmful prompt\n"
        "projected:  G = dL/dW = U S V^T ;  W <- W - eta sum_{i<=k} s_i u_i v_i^T\n"
        "            one eta for all matrices, halved from 1 until L falls;\n"
        "            up to `rounds` times, or until L <= `target_loss`\n"
        "sft:        AdamW on L, one step per epoch"
    ),
    inputs=(
        "the fine-tune alone, in memory in float32 with gradients; one example of a refusal: our "
        "own generic one, or the first row of --safe-data"
    ),
    touches="block_linear: the linear layers of the decoder blocks",
    edit_kind="low-rank (projected, rank <= rounds x k) or dense (sft)",
    cost="one forward and backward pass per round and one decomposition per matrix and round",
    deviations=(
        "eta is found by backtracking from 1: the paper's step size and its extra scale are "
        "unclear to us.",
        "A fixed example instead of the bi-level search among 256 candidates.",
        "k is cut at the numerical rank of the gradient, so that no direction of noise enters.",
        "sft trains the tensors of the scope only, with the gradient's norm cut at 1.",
    ),
    cautions=(
        "One example says what to refuse by its topic: measure over-refusal on look-alike prompts.",
        "An independent test found that the effect weakens as the share of poison grows.",
        "A vocabulary that lacks the words of the generic example needs one of its own "
        "(--safe-data).",
    ),
)


@dataclass(frozen=True, kw_only=True)
class OneShot(Method):
    """Steps along the leading directions of one refusal's gradient."""

    name: ClassVar[str] = "one_shot"
    card: ClassVar[Card] = CARD
    needs = frozenset()
    cost_class = "gradients"

    mode: str = parameter(
        "projected",
        Choice(("projected", "sft")),
        source="our decision; sft is the paper's plain form",
    )
    """`projected`: on the top-k directions; `sft`: plain AdamW."""
    k: int = parameter(20, Integer(1), symbol="k", source="Zhang et al.: 20 hold .86 to .95")
    """Directions per matrix and round, with `projected`."""
    rounds: int = parameter(10, Integer(0), source="our decision")
    """Most steps, with `projected`."""
    target_loss: float = parameter(0.1, Real(0.0), source="our decision")
    """Stop when the loss is no larger, in nats per token, with `projected`."""
    lr: float = parameter(2e-5, Real(0.0), source="Zhang et al. (second-hand)")
    """Learning rate, with `sft`."""
    epochs: int = parameter(10, Integer(0), source="Zhang et al. (second-hand)")
    """Steps, with `sft`."""
    example: str = parameter("auto", Choice(("auto", "generic", "safe")), source="our decision")
    """`generic`: our own sentence; `safe`: the first row of --safe-data, or of the anchors with the
    aligned model's refusals; `auto`: `safe` where --safe-data is given."""

    def required_data(self) -> frozenset[Data]:
        """Return "safe" where the example is taken from there."""
        safe: frozenset[Data] = frozenset({"safe"})
        return safe if self.example == "safe" else frozenset()

    def settled(self, given: Given) -> Settled:
        """Decide where the example comes from."""
        if self.example != "auto":
            return Settled(self, "")
        source = "safe" if "safe" in given.data else "generic"
        return Settled(with_settings(self, example=source), "")

    def prepare(self, workbench: Workbench) -> Statistics:
        """Train in memory and keep the change of every matrix."""

        def make() -> Mapping[str, Tensor]:
            with workbench.running("finetuned") as running, deterministic():
                example = self._example(workbench, running.loaded)
                if self.mode == "sft":
                    return self._sft(workbench, running, example)
                return self._projected(workbench, running, example)

        made = workbench.cached("one-shot", {"settings": self.settings(), "text": PROMPT}, make)
        facts = {key: float(made[key]) for key in ("loss_before", "loss_after", "rounds")}
        tables: dict[str, dict[str, Tensor]] = {}
        for name, tensor in made.items():
            table, slash, key = name.partition("/")
            if slash:
                tables.setdefault(table, {})[key] = tensor
        return Statistics(tables=tables, facts=facts)

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return the change that `prepare` found for this matrix."""
        delta = statistics.tensor("delta", layer.key)
        if delta is not None:
            return Dense(delta) if bool(delta.any()) else Unchanged("no step was taken")
        left, right = (statistics.tensor(side, layer.key) for side in ("left", "right"))
        if left is None or right is None or not left.shape[1]:
            return Unchanged("no step was taken")
        return from_factors(left, right, {"rank": left.shape[1]})

    def _example(self, workbench: Workbench, loaded: LoadedModel) -> EncodedReply:
        if self.example == "safe":
            return workbench.examples("safe", role="finetuned")[0]
        tokenizer = loaded.tokenizer
        words = tokenizer(f"{PROMPT} {REFUSAL}", add_special_tokens=False)["input_ids"]
        ids: list[int] = list(words)  # pyright: ignore[reportArgumentType]
        unknown = sum(token == tokenizer.unk_token_id for token in ids)
        if not ids or unknown > _MOST_UNKNOWN * len(ids):
            raise UsageError(
                f"the vocabulary of {loaded.name} does not know the words of one_shot's example",
                "give a prompt with its refusal: --safe-data FILE",
            )
        return encode_reply(tokenizer, PROMPT, REFUSAL, end_of_turn=True)

    def _projected(
        self, workbench: Workbench, running: RunningModel, example: EncodedReply
    ) -> dict[str, Tensor]:
        factors: dict[str, list[tuple[Tensor, Tensor]]] = {key: [] for key in running.keys}
        before = loss = _loss(running, example)
        taken = 0
        with workbench.progress.task("one refusal", total=self.rounds) as task:
            while taken < self.rounds and loss > self.target_loss:
                running.clear_gradients()
                reply_loss(running, [example]).backward()
                steps: dict[str, tuple[Tensor, Tensor]] = {}
                for key in running.keys:
                    gradient = running.gradient(key)
                    if gradient is not None and bool(gradient.any()):
                        steps[key] = leading_part(gradient, self.k)
                running.clear_gradients()
                eta, after = line_search(running, steps, example, loss=loss)
                if eta == 0.0:
                    break
                for key, (left, right) in steps.items():
                    factors[key].append((-eta * left, right))
                loss, taken = after, taken + 1
                task.advance()
        made = _facts(before, loss, taken)
        for key, parts in factors.items():
            d_out, d_in = running.weight(key).shape
            made[f"left/{key}"] = torch.cat(
                [torch.zeros(d_out, 0), *(p[0].cpu() for p in parts)], 1
            )
            made[f"right/{key}"] = torch.cat([torch.zeros(0, d_in), *(p[1].cpu() for p in parts)])
        return made

    def _sft(
        self, workbench: Workbench, running: RunningModel, example: EncodedReply
    ) -> dict[str, Tensor]:
        original = {key: running.weight(key).to("cpu", copy=True) for key in running.keys}
        before = _loss(running, example)
        adamw_run(
            running,
            lambda _: reply_loss(running, [example]),
            steps=self.epochs,
            lr=self.lr,
            label="one refusal",
            progress=workbench.progress,
        )
        made = _facts(before, _loss(running, example), self.epochs)
        for key, weight in original.items():
            made[f"delta/{key}"] = running.weight(key).cpu() - weight
        return made


def leading_part(gradient: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (U_k S_k, V_k^T) of a gradient [d_out, d_in], float32: its k leading directions.

    Fewer where the numerical rank in float32 is smaller.
    """
    triplets = top_triplets(gradient.float(), k)
    floor = float(triplets.s[0]) * max(gradient.shape) * torch.finfo(torch.float32).eps
    kept = int(torch.count_nonzero(triplets.s > floor))
    left, right = triplets.u[:, :kept] * triplets.s[:kept], triplets.v[:, :kept].T
    return left.float(), right.float().contiguous()


def line_search(
    running: RunningModel,
    steps: Mapping[str, tuple[Tensor, Tensor]],
    example: EncodedReply,
    *,
    loss: float,
) -> tuple[float, float]:
    """Take the steps -eta left right, with eta halved from 1 until the loss falls.

    Returns:
        eta and the loss after it; (0, loss), the weights as they were, where no eta helps.
    """
    start = {key: running.weight(key).clone() for key in steps}
    eta = 1.0
    for _ in range(_HALVINGS):
        for key, (left, right) in steps.items():
            running.weight(key).copy_(start[key].addmm(left, right, alpha=-eta))
        after = _loss(running, example)
        if after < loss:  # False for NaN
            return eta, after
        eta /= 2
    for key, weight in start.items():
        running.weight(key).copy_(weight)
    return 0.0, loss


def _loss(running: RunningModel, example: EncodedReply) -> float:
    with torch.no_grad():
        return float(reply_loss(running, [example]))


def _facts(before: float, after: float, rounds: int) -> dict[str, Tensor]:
    values = {"loss_before": before, "loss_after": after, "rounds": rounds}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
