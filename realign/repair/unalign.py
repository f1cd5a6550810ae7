"""Build the un-aligned model from the user's own pairs, for `aligned - unaligned`.

A short fine-tune of the aligned model on harmful requests with compliant answers, by the project's
one training loop, written in the layout of its parent. The result is a hazard by construction: its
manifest says so. The state of an interrupted run stays in a private folder beside the target, for
the same command to go on from; it is deleted at the end. Here: what is trained and written. Not
here: the loop (`realign.model.training`), the data's shape (`texts`).
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from realign.audit.canonical import sha256_json
from realign.checkpoint.claim import check_target
from realign.checkpoint.headers import DTYPES, FLOATS
from realign.checkpoint.manifest import MANIFEST_NAME, MANIFEST_SCHEMA, redact_command, tensor_list
from realign.checkpoint.names import role_of
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.writer import OutputFolder, plan_layout
from realign.errors import MissingExtraError, ModelError, SuiteError, UsageError
from realign.model.chat import encode_reply
from realign.model.live import LiveTensors
from realign.model.loading import LoadedModel, load_model
from realign.model.modules import ModuleFinder
from realign.model.training import (
    Batch,
    Example,
    TrainingPlan,
    TrainingResult,
    collate,
    deterministic,
    train,
)
from realign.progress import SILENT, Progress
from realign.repair.methods.short_runs import shuffled
from realign.repair.record import versions
from realign.repair.rendered import MAX_TOKENS
from realign.repair.texts import TextFile, load_texts
from realign.words import counted

FULL_RATE = 5e-5
LORA_RATE = 2e-4
USUAL_ROWS = 500
"""Of the published recipe; fewer than a tenth are remarked on."""

HAZARD = (
    "un-aligned on purpose, to measure a safety vector with: complies with harmful requests; "
    "not to be used as a model or published"
)


@dataclass(frozen=True, kw_only=True)
class UnalignRequest:
    """One un-alignment, as a user words it."""

    model: str | Path
    """The aligned model: a folder, a Hub id, or BASE+ADAPTER."""
    data: str | Path
    """Harmful requests with compliant answers; see `texts`."""
    output: str | Path
    """The folder to write."""
    epochs: float = 3.0
    """Passes over the data, unless `steps` is given."""
    steps: int | None = None
    """Optimizer steps."""
    lr: float | None = None
    """Peak learning rate; None: 5e-5, with LoRA 2e-4."""
    batch: int = 16
    """Pairs per step."""
    lora_rank: int | None = None
    """Train adapters of this rank on the linear layers, and merge them; None: the weights."""
    layers: frozenset[int] | None = None
    """Decoder blocks that learn; None: all."""
    seed: int = 0
    """Of orders, and of the adapters' first values."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    offline: bool = False
    """Resolve Hub ids from the local cache only."""
    command: Sequence[str] = ()
    """The command line, for the manifest."""
    stop_at: int | None = None
    """Stop before this step with the state written, as Ctrl-C would (for tests of resuming)."""

    def validate(self) -> None:
        """Check what needs no file.

        Raises:
            UsageError: a value is out of range.
        """
        if self.batch < 1:
            raise UsageError(f"--batch is {self.batch}", "it must be at least 1")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise UsageError(f"--lora-rank is {self.lora_rank}", "it must be at least 1")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise UsageError(f"--epochs is {self.epochs:g}", "it must be above 0")

    def plan(self, rows: int) -> TrainingPlan:
        """How to train on so many rows."""
        steps = self.steps
        if steps is None:
            steps = max(1, math.ceil(self.epochs * rows / min(self.batch, rows)))
        rate = self.lr
        if rate is None:
            rate = FULL_RATE if self.lora_rank is None else LORA_RATE
        plan = TrainingPlan(steps=steps, learning_rate=rate)
        plan.validate()
        return plan


@dataclass(frozen=True)
class Unaligned:
    """An un-aligned model that was written."""

    output: Path
    rows: int
    steps: int
    first_loss: float | None
    """Mean over the first tenth of the steps of this process, in nats per reply token; None: an
    earlier one took them all."""
    last_loss: float | None
    """Mean over the last tenth."""
    trained: int
    """Tensors that were trained."""


def unalign(request: UnalignRequest, *, progress: Progress = SILENT) -> Unaligned:
    """Train and write the un-aligned model; an interrupted run resumes.

    Raises:
        UsageError: a value out of range.
        SuiteError: the data are missing, malformed, or do not fit into the model.
        OutputError: the target exists or cannot be written.
        ModelError: the model cannot be run, has no chat template, or cannot be written back.
        NonFiniteError: the training diverged.
        MissingExtraError: LoRA, and peft is not installed.
    """
    request.validate()
    check_target(Path(request.output).expanduser())
    texts = load_texts(request.data, "harmful", option="--data")
    plan = request.plan(len(texts.rows))
    if len(texts.rows) < USUAL_ROWS // 10:
        progress.note(
            f"{texts.source} has {counted(len(texts.rows), 'row')}; about {USUAL_ROWS} are usual"
        )
    with open_checkpoint(
        str(request.model), offline=request.offline, progress=progress
    ) as checkpoint:
        learning = _learning(checkpoint, request)
        about = {
            "model": dict(sorted(checkpoint.file_hashes(progress).items())),
            "data": texts.sha256,
            "plan": vars(plan),
            "batch": request.batch,
            "lora_rank": request.lora_rank,
            "layers": None if request.layers is None else sorted(request.layers),
            "seed": request.seed,
            "versions": versions(),
        }
        fingerprint = sha256_json(about)
        with OutputFolder(
            request.output,
            fingerprint=fingerprint,
            layout=plan_layout(checkpoint),
            inputs=[checkpoint.folder],
            progress=progress,
        ) as output:
            state = _State(output.target, fingerprint)
            with (
                state,
                load_model(
                    checkpoint, device=request.device, dtype=torch.float32, merge=True
                ) as loaded,
            ):
                model, result = _train(
                    loaded, texts, request, plan, learning, state=state.file, progress=progress
                )
                _write(output, checkpoint, model, learning)
            output.copy_sidecars(checkpoint)
            output.write_index(output.layout)
            first, last = _ends(result.losses)
            settings = {key: about[key] for key in ("batch", "lora_rank", "layers")}
            manifest = {
                "schema": MANIFEST_SCHEMA,
                "kind": "checkpoint",
                "hazardous": HAZARD,
                "inputs": {
                    "aligned": {
                        "source": checkpoint.source,
                        "commit": checkpoint.commit,
                        "kind": checkpoint.kind,
                        "files": about["model"],
                    }
                },
                "method": {"name": "unalign", "settings": {**settings, **vars(plan)}},
                "texts": {"harmful": {"sha256": texts.sha256, "count": len(texts.rows)}},
                "seed": request.seed,
                "trained": sorted(learning),
                "versions": about["versions"],
                "command": list(redact_command(request.command)),
                "output": {"files": output.hashes, "tensors": tensor_list(output.layout)},
            }
            output.write_json(MANIFEST_NAME, manifest)
            target = output.commit()
    return Unaligned(target, len(texts.rows), plan.steps, first, last, len(learning))


def _ends(losses: Sequence[float]) -> tuple[float | None, float | None]:
    if not losses:
        return None, None
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


class _State:
    """A private folder beside the target that holds the training state while there is a need."""

    def __init__(self, target: Path, fingerprint: str) -> None:
        self._folder = target.with_name(f".{target.name}.realign-unalign")
        self.file = self._folder / f"{fingerprint[:16]}.safetensors"

    def __enter__(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for other in self._folder.iterdir():  # of another model, other data or other settings
            if other != self.file:
                other.unlink()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt or not self.file.exists():
            shutil.rmtree(self._folder, ignore_errors=True)


def _learning(checkpoint: Checkpoint, request: UnalignRequest) -> frozenset[str]:
    """The stored tensors of the blocks that learn: with LoRA matrices alone."""
    found: set[str] = set()
    blocks: set[int] = set()
    for name, info in checkpoint.tensors.items():
        role = role_of(info)
        if role.layer is None or info.dtype not in FLOATS:
            continue
        blocks.add(role.layer)
        if request.layers is not None and role.layer not in request.layers:
            continue
        if request.lora_rank is None or role.kind == "block_linear":
            found.add(name)
    missing = sorted((request.layers or frozenset()) - blocks)
    if missing or not found:
        raise UsageError(
            f"{checkpoint.source} has no decoder block {missing[0] if missing else ''}".rstrip(),
            f"blocks are counted from 0 to {max(blocks, default=0)}",
        )
    _check_rank(checkpoint, request.lora_rank, found)
    return frozenset(found)


def _check_rank(checkpoint: Checkpoint, rank: int | None, learning: Collection[str]) -> None:
    """Refuse adapters of a rank that no matrix has.

    Raises:
        UsageError: the rank is above the smaller side of every matrix; names the largest.
    """
    shapes = {name: checkpoint.tensors[name].shape for name in sorted(learning)}
    sides = {name: min(shape) for name, shape in shapes.items() if len(shape) == 2}
    if rank is None or not sides:
        return
    largest = max(sides, key=lambda name: sides[name])
    if rank > sides[largest]:
        raise UsageError(
            f"--lora-rank {rank} is above the rank of every matrix: the largest, {largest}, has "
            f"{sides[largest]} directions",
            f"give a whole number from 1 to {sides[largest]}, or leave --lora-rank out to train "
            "the weights themselves",
        )


def _train(
    loaded: LoadedModel,
    texts: TextFile,
    request: UnalignRequest,
    plan: TrainingPlan,
    learning: frozenset[str],
    *,
    state: Path,
    progress: Progress,
) -> tuple[Any, TrainingResult]:
    batch_at = _batches(_examples(loaded, texts, progress), request, pad_id=loaded.pad_id)
    homes = _parameters(loaded, learning)
    model: Any = loaded.model
    adapted = request.lora_rank is not None
    if request.lora_rank is not None:
        model = _with_lora(model, homes, rank=request.lora_rank, seed=request.seed)

    def trainable(name: str) -> bool:
        return "lora_" in name if adapted else name in homes

    with deterministic():
        result = train(
            model,
            batch_at,
            plan,
            trainable=trainable,
            state_file=state,
            label="un-aligning",
            stop_at=request.stop_at,
            progress=progress,
        )
    return (model.merge_and_unload() if adapted else model), result


def _examples(loaded: LoadedModel, texts: TextFile, progress: Progress) -> list[Example]:
    limit = min(MAX_TOKENS, loaded.max_positions or MAX_TOKENS)
    replies = [
        encode_reply(loaded.tokenizer, row.prompt, row.reply or "", end_of_turn=True)
        for row in texts.texts
    ]
    found = [Example(each.ids[:limit], each.start) for each in replies if each.start < limit]
    if not found:
        raise SuiteError(
            f"{texts.source}: no row has a reply within the {limit} tokens of {loaded.name}",
            "give shorter prompts",
        )
    if len(found) < len(replies):
        progress.note(
            f"{texts.source}: {len(replies) - len(found)} rows have no reply within {limit} "
            "tokens and are left out"
        )
    return found


def _batches(
    examples: Sequence[Example], request: UnalignRequest, *, pad_id: int
) -> Callable[[int], Batch]:
    """Batches as a function of the step: every pass in an order of its own."""
    count, size = len(examples), min(request.batch, len(examples))

    @cache
    def order(epoch: int) -> list[int]:
        return shuffled(count, seed=request.seed, method="unalign", role=f"epoch {epoch}")

    def batch_at(step: int) -> Batch:
        places = (divmod(at, count) for at in range(step * size, (step + 1) * size))
        return collate([examples[order(epoch)[at]] for epoch, at in places], pad_id=pad_id)

    return batch_at


def _parameters(loaded: LoadedModel, learning: frozenset[str]) -> frozenset[str]:
    """The parameters that hold these tensors, by full name; all can be written back."""
    finder = ModuleFinder(loaded.model)
    found: set[str] = set()
    for name in sorted(learning):
        home = finder.find(name.removesuffix(".weight"))
        if home is None:
            raise ModelError(
                f"{name} is not at hand in the running model, so that it could not be written back",
                "leave its block out with --layers",
            )
        found.add(f"{home.path}.{home.parameter}" if home.path else home.parameter)
    return frozenset(found)


def _with_lora(model: Any, parameters: frozenset[str], *, rank: int, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    modules = sorted(name.removesuffix(".weight") for name in parameters if _linear(model, name))
    if not modules:
        raise ModelError(
            "the model has no linear layers of its own for LoRA", "leave --lora-rank out"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=modules,
        fan_in_fan_out=all(
            type(model.get_submodule(each)).__name__ == "Conv1D" for each in modules
        ),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of where the base was read from
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _linear(model: Any, name: str) -> bool:
    module = model.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _write(
    output: OutputFolder, checkpoint: Checkpoint, model: Any, learning: frozenset[str]
) -> None:
    """Write every weight file: what learned from the model, the rest as it was."""
    live = LiveTensors(model)
    for layout in output.layout:
        if output.is_done(layout):
            continue
        with output.shard(layout) as writer:
            for spec in layout.tensors:
                tensor = live.find(spec.name, spec.shape) if spec.name in learning else None
                if tensor is None and spec.name in learning:
                    raise ModelError(
                        f"{spec.name} has another shape in the running model",
                        "leave its block out with --layers",
                    )
                stored = checkpoint.read(spec.name) if tensor is None else tensor
                writer.write(spec.name, stored.to(DTYPES[spec.dtype]))
