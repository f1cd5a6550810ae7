"""Which prompts calibrate a quantiser, and the probes that say what counts as malicious.

Here: choosing prompts, probes on the aligned model, and one training over all blocks. Not here: one
block (`training`), what a matrix becomes (`realign.repair.methods.q_realign`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from realign.errors import SuiteError
from realign.model.block_chain import BlockChain
from realign.model.training import deterministic
from realign.repair.kept_tensors import as_tensors
from realign.repair.preparation import RunningModel, Workbench
from realign.repair.quantise.blocks import block_matrices
from realign.repair.quantise.training import Recipe, examples_of, train_block
from realign.subspace.keyed import generator
from realign.subspace.probe import Probe, fit_probe

LEAST_MALICIOUS = 12
LEAST_BENIGN = 4
"""Fewer prompts cannot tell a probe what it looks for."""


@dataclass(frozen=True)
class Calibration:
    """Prompts in the order of training.

    Attributes:
        malicious: which of them are.
        chosen: (kind, index in its file) of each.
    """

    malicious: tuple[bool, ...]
    chosen: tuple[tuple[str, int], ...]


def choose_prompts(
    *, malicious: int, benign: int, count: int, share: float, seed: int
) -> Calibration:
    """Choose calibration prompts at a fixed ratio, as many as there are, in a keyed random order.

    Args:
        malicious: how many malicious prompts are given.
        benign: how many benign ones.
        count: how many are wanted.
        share: of malicious ones, in (0, 1).
        seed: of the run.

    Raises:
        SuiteError: too few of either kind.
    """
    total = min(count, int(malicious / share), int(benign / (1 - share)))
    bad = round(total * share)
    good = total - bad
    if bad < LEAST_MALICIOUS or good < LEAST_BENIGN:
        raise SuiteError(
            f"{malicious} malicious and {benign} benign prompts are too few to calibrate on: at "
            f"least {LEAST_MALICIOUS} and {LEAST_BENIGN} are needed, {share:.0%} of them malicious",
            "give more with --anchors FILE and --keep-data FILE",
        )
    draw = generator(seed=seed, method="q_realign", key="", role="calibration")
    rows = [("anchors", int(i)) for i in sorted(draw.permutation(malicious)[:bad])]
    rows += [("keep", int(i)) for i in sorted(draw.permutation(benign)[:good])]
    order = [rows[i] for i in draw.permutation(len(rows))]
    return Calibration(tuple(kind == "anchors" for kind, _ in order), tuple(order))


def fit_probes(
    features: Sequence[Tensor], labels: Sequence[bool], *, strength: float
) -> tuple[list[Probe], list[float]]:
    """Fit one probe per block.

    Args:
        features: block outputs at the last prompt token, [n, d] of each block.
        labels: whether a prompt is malicious.
        strength: C of the regression; the L1 penalty is 1 / (C n).

    Returns:
        The probes, and of each block the accuracy on the half that a second probe has not seen.
    """
    target = torch.tensor([float(each) for each in labels])
    penalty = 1.0 / (strength * len(labels))
    probes = [fit_probe(each, target, penalty=penalty) for each in features]
    seen, unseen = _halves(labels)
    unseen_accuracy: list[float] = []
    for each in features:
        half = fit_probe(each[seen], target[seen], penalty=2 * penalty)
        right = (half.score(each[unseen]) > 0) == (target[unseen] > 0)
        unseen_accuracy.append(float(right.double().mean()))
    return probes, unseen_accuracy


def train_quantiser(
    workbench: Workbench, *, recipe: Recipe, prompts: int, share: float, length: int, penalty: float
) -> dict[str, Tensor]:
    """Train the quantiser of the fine-tune; returns tensors by "table/name" for the cache.

    Tables: high and low (sigmoid of g and h by slot key), smooth (v by slot key), norm and offset
    (v and what the norm adds, by the name of its stored weight), fact (numbers of the whole run).

    Args:
        workbench: of the run.
        recipe: how each block is trained.
        prompts: how many are wanted.
        share: of malicious ones.
        length: tokens of a sequence; of longer ones the last count.
        penalty: C of the probes.

    Raises:
        SuiteError: too few prompts.
        ModelError: the model's blocks cannot be run one by one, or hold experts.
    """
    given = {kind: workbench.prompts(kind, role="aligned") for kind in ("anchors", "keep")}
    plan = choose_prompts(
        malicious=len(given["anchors"]),
        benign=len(given["keep"]),
        count=prompts,
        share=share,
        seed=workbench.seed,
    )

    def sequences(role: str) -> list[tuple[int, ...]]:
        tokens = {kind: workbench.prompts(kind, role=role) for kind in ("anchors", "keep")}
        return [tokens[kind][index][-length:] for kind, index in plan.chosen]

    with workbench.running("aligned") as running, deterministic():
        chain = _chain(running)
        outputs = [chain.outputs(ids, position=-1) for ids in sequences("aligned")]
        features = [
            torch.stack([each[i] for each in outputs]).cpu() for i in range(len(outputs[0]))
        ]
    with deterministic():
        probes, unseen = fit_probes(features, plan.malicious, strength=penalty)
    with workbench.running("finetuned") as running, deterministic():
        chain = _chain(running)
        matrices = block_matrices(running, chain, workbench.slots)
        examples = examples_of(chain.capture(sequences("finetuned")), plan.malicious)
        found: dict[str, Tensor] = {}
        crossed: list[tuple[float, float]] = []
        control = 0.0
        half = len(chain.blocks) // 2
        epochs = half * recipe.epochs_first + (len(chain.blocks) - half) * recipe.epochs_rest
        with workbench.progress.task("train the quantiser", total=epochs, unit="epochs") as task:
            for index, each in enumerate(matrices):
                examples, trained = train_block(
                    chain, index, each, examples, probe=probes[index], recipe=recipe, task=task
                )
                if trained is None:
                    continue
                for table, tensors in (
                    ("high", trained.high),
                    ("low", trained.low),
                    ("smooth", trained.smooth),
                ):
                    found.update({f"{table}/{key}": value for key, value in tensors.items()})
                for name, (v, offset) in trained.norms.items():
                    found[f"norm/{name}"] = v
                    found[f"offset/{name}"] = torch.tensor(offset, dtype=torch.float64)
                control = max(control, trained.control_error)
                crossed.append(trained.crossed)
    facts: dict[str, float | int] = {
        "malicious_prompts": sum(plan.malicious),
        "benign_prompts": len(plan.malicious) - sum(plan.malicious),
        "probe_accuracy": sum(unseen) / len(unseen),
        "control_error": control,
    }
    if crossed and recipe.quantise:
        facts["malicious_side_before"] = sum(each[0] for each in crossed) / len(crossed)
        facts["malicious_side_after"] = sum(each[1] for each in crossed) / len(crossed)
    found |= {f"fact/{name}": each for name, each in as_tensors(facts).items()}
    return found


def _chain(running: RunningModel) -> BlockChain:
    model: Any = running.loaded.model
    homes = {
        parameter.untyped_storage().data_ptr(): name for name, parameter in model.named_parameters()
    }
    paths = [
        homes[pointer].rpartition(".")[0]
        for key in running.keys
        if (pointer := running.weight(key).untyped_storage().data_ptr()) in homes
    ]
    return BlockChain(model, paths)


def _halves(labels: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Every second prompt of each class."""
    by_class = [[i for i, each in enumerate(labels) if each is kind] for kind in (True, False)]
    return (
        sorted(i for group in by_class for i in group[::2]),
        sorted(i for group in by_class for i in group[1::2]),
    )
