"""The one training loop: AdamW, warm-up, cosine, clipping, masked loss, resumable, deterministic.

Batches are a pure function of the step, so resuming needs no generator state: the state file holds
the trained tensors, the optimizer and the step, and an interrupted run ends with the same bytes as
an uninterrupted one. What is trained on is the caller's affair; nothing here knows a data format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from realign.errors import NonFiniteError, OutputError, UsageError
from realign.progress import SILENT, Progress

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How to train."""

    steps: int
    """Optimizer steps, at least 1."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled decay on every trained matrix; vectors (norms) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW moments."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly."""
    floor: float = 0.05
    """The cosine ends at this share of the peak rate."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    def validate(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of range.
        """
        if self.steps < 1:
            raise UsageError(f"steps = {self.steps}", "at least one training step is needed")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UsageError(f"learning_rate = {self.learning_rate}", "it must be above 0")
        for name, value in (("warmup", self.warmup), ("floor", self.floor)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} = {value}", "it must lie in [0, 1]")

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (0-based)."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        share = (step - rising) / max(1, self.steps - 1 - rising)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
        return self.learning_rate * (self.floor + (1.0 - self.floor) * cosine)


@dataclass(frozen=True)
class Example:
    """Token ids, and from which position on they count in the loss (0: all but the first)."""

    ids: tuple[int, ...]
    loss_from: int = 0


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    `input_ids` [batch, length]; `labels` the same shape, `IGNORED` where no loss is taken.
    """

    input_ids: Tensor
    labels: Tensor


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Pad examples on the right.

    No attention mask is needed: attention is causal, so nothing before the padding sees it, and no
    loss is taken on it.
    """
    length = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids, dtype=torch.long)
        input_ids[row, : len(ids)] = ids
        labels[row, example.loss_from : len(ids)] = ids[example.loss_from :]
    return Batch(input_ids, labels)


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of predicting token t+1 at t, over the positions that count.

    Args:
        logits: [batch, length, vocabulary].
        labels: [batch, length], `IGNORED` where no loss is taken.
    """
    predicted = logits[:, :-1].flatten(0, 1).float()
    wanted = labels[:, 1:].flatten()
    return nn.functional.cross_entropy(predicted, wanted, ignore_index=IGNORED)


@dataclass(frozen=True)
class TrainingResult:
    """What a run did."""

    steps: int
    resumed_at: int
    losses: tuple[float, ...]
    """Loss of every step run in this process."""


@contextmanager
def deterministic(threads: int = 1) -> Generator[None]:
    """Fixed thread count and deterministic kernels inside, the caller's settings afterwards.

    Bytes are equal on one machine and one torch version; another processor may round otherwise.
    """
    before = torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads)
    # cuBLAS refuses deterministic mode without a fixed workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warn_only)


def train(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    plan: TrainingPlan,
    *,
    trainable: Callable[[str], bool] | None = None,
    state_file: Path | None = None,
    save_every: int = 200,
    label: str = "training",
    stop_at: int | None = None,
    progress: Progress = SILENT,
) -> TrainingResult:
    """Train `model` in place.

    Args:
        model: a causal model whose call returns an object with `logits`.
        batch_at: the batch of a step; must be a pure function of it.
        plan: steps, rates, decay.
        trainable: which parameters learn, by name; None: those that require a gradient now.
        state_file: where to keep the state for resuming; read if it exists, removed by the caller.
        save_every: steps between two states; a Ctrl-C writes one as well.
        label: what the progress shows.
        stop_at: stop before this step with the state written (for tests of resuming).
        progress: where progress is shown.

    Raises:
        UsageError: a value of the plan is out of range, or nothing is trainable.
        NonFiniteError: the loss became NaN or infinite.
        OutputError: the state file belongs to another plan.
    """
    plan.validate()
    if trainable is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable(name))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not learning:
        raise UsageError("nothing to train", "no parameter of the model is trainable")
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in learning.values() if p.ndim >= 2],
                "weight_decay": plan.weight_decay,
            },
            {"params": [p for p in learning.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=plan.learning_rate,
        betas=plan.betas,
    )
    start = 0
    if state_file is not None and state_file.exists():
        start = _restore(state_file, learning, optimizer, plan)
        progress.note(f"{label}: resumed at step {start}")
    device = next(iter(learning.values())).device
    losses: list[float] = []
    updating = False
    model.train()
    try:
        with progress.task(label, total=plan.steps) as task:
            task.advance(start)
            for step in range(start, plan.steps):
                if step == stop_at:
                    raise KeyboardInterrupt
                loss = _backward(model, batch_at(step), step, device)
                updating = True
                _update(optimizer, plan, step)
                updating = False
                losses.append(loss)
                if state_file is not None and (step + 1) % save_every == 0:
                    _save(state_file, learning, optimizer, plan, step + 1)
                task.advance()
    except KeyboardInterrupt:
        # In the middle of an update the tensors belong to no step: the last state stays.
        if state_file is not None and not updating:
            _save(state_file, learning, optimizer, plan, start + len(losses))
        raise
    model.eval()
    return TrainingResult(plan.steps, start, tuple(losses))


def _backward(model: nn.Module, batch: Batch, step: int, device: torch.device) -> float:
    """Loss and gradients of one batch; the parameters stay."""
    model.zero_grad(set_to_none=True)
    logits: Tensor = model(input_ids=batch.input_ids.to(device), use_cache=False).logits
    loss = masked_loss(logits, batch.labels.to(device))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(f"the loss is {value} at step {step}", "lower the learning rate")
    loss.backward()
    return value


def _update(optimizer: torch.optim.Optimizer, plan: TrainingPlan, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = plan.rate(step)
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], plan.clip)
    optimizer.step()


def _save(
    file: Path,
    learning: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    plan: TrainingPlan,
    step: int,
) -> None:
    tensors = {f"parameters.{name}": p.detach().contiguous() for name, p in learning.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    # Not torch.save: what was saved as a pickle could only be loaded as one.
    facts = {"plan": json.dumps(asdict(plan)), "step": str(step)}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial, metadata=facts)
    partial.replace(file)


def _restore(
    file: Path,
    learning: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    plan: TrainingPlan,
) -> int:
    hint = "delete it to train from the start"
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
            names: list[str] = list(opened.keys())
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
        saved_plan, step = json.loads(facts["plan"]), int(facts["step"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise OutputError(f"{file}: not a training state ({error})", hint) from error
    parameters = {
        key.removeprefix("parameters."): tensor
        for key, tensor in tensors.items()
        if key.startswith("parameters.")
    }
    if saved_plan != json.loads(json.dumps(asdict(plan))) or set(parameters) != set(learning):
        raise OutputError(f"{file}: the state of another training run", hint)
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(parameters[name])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, kind = key.split(".")
            moments.setdefault(int(index), {})[kind] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return step
