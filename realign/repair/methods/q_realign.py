"""Q-realign: quantise the fine-tune so that malicious prompts look malicious to it again.

Only the quantiser is trained (`realign.repair.quantise`): clip factors per row and a smoothing
vector per norm, block by block, against probes of the aligned model (arXiv 2601.08089). The result
is written de-quantised, which loads anywhere. Here: the hyper-parameters and what one matrix
becomes. Not here: the training, and real integers (`realign.repair.quantise.encoding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from realign.errors import UsageError
from realign.repair.demands import ModelSize
from realign.repair.edit import Dense, Edit, Layer, Unchanged
from realign.repair.method import Card, CostClass, Method
from realign.repair.parameters import Flag, Integer, Real, parameter
from realign.repair.preparation import Data, Statistics, Workbench
from realign.repair.quantise.calibration import train_quantiser
from realign.repair.quantise.matrix import quantised_matrix
from realign.repair.quantise.training import Recipe

CARD = Card(
    title="Q-realign: realignment by quantisation",
    source="Tan et al., arXiv 2601.08089 (2026); the quantiser is that of OmniQuant, arXiv "
    "2308.13137",
    summary="quantise the fine-tune with clipping and smoothing trained so that malicious prompts "
    "cross back to the malicious side of probes of the aligned model",
    idea="Quantisation moves every weight a little, and how is partly free: where each row is "
    "clipped, and how its input channels are scaled before rounding. Train that freedom block by "
    "block, so that what benign prompts cause stays as in the fine-tune, while the last token of a "
    "malicious prompt falls on the malicious side of a linear probe that was fitted on the aligned "
    "model. No weight is trained. Experimental: without rounding the method is the identity, so "
    "its effect is bounded by what rounding can do.",
    equations="""\
probe on W_aligned, per block:  s(h) = w . h[t] + b,  L1 logistic regression, malicious = 1
benign:     L = MSE(h_fp, h_q) over all positions
malicious:  L = softplus(-(w . h_q[t] + b)),  t the last prompt token
M = W_finetuned diag(v);  per row  hi = sigmoid(g) max M,  lo = sigmoid(h) min M,  g = h = 4
step = (hi - lo) / (2^b - 1);  z = round(-lo / step)
M_hat = (clamp(round(M / step) + z, 0, 2^b - 1) - z) step
v = max|x|^0.5 / max|w|^0.5 at the start;  train g, h, v with AdamW, rounding straight-through
W' = M_hat diag(1 / v)""",
    inputs="fine-tuned, aligned; malicious prompts (the anchors) and benign ones (--keep-data)",
    touches="weights of linear layers in decoder blocks",
    edit_kind="dense: every entry is rounded",
    cost="one training: 5 or 15 passes over 200 prompts per block, forward and backward through "
    "that block alone; the fine-tune in float32 and two streams of hidden states in memory",
    deviations=(
        "v is folded back into the linear layers, W' = M_hat diag(1 / v), and norms stay: the same "
        "function as dividing the norm by v, but the edit is small, the strength dial means "
        "something between 0 and 1, and no other tensor need change. The integer files of "
        "`--encode compressed-tensors` hold M_hat and carry 1 / v in the norms.",
        "v is moved to the nearest value that a norm in the file's type can carry, and steps are "
        "rounded to the file's type before codes are made, so that integers and the de-quantised "
        "export are one function.",
        "A row whose entries all have one sign is extended to 0, so that 0 is always a code.",
        "How the probes were fitted is not published. Ours: channels standardised, penalty "
        "1 / (C n) with C = 1, intercept free, on the calibration prompts themselves; the accuracy "
        "on unseen halves is reported.",
        "Weights only (W8A16): a float checkpoint cannot carry quantised activations. The paper's "
        "main setting is W8A8.",
        "Scaling between query and key and between value and output is off.",
        "With fewer prompts than asked for, both kinds are cut at the same ratio.",
        "v stays above a hundredth of where it started.",
    ),
    cautions=(
        "Experimental. Hold every result against the control, `quantise = false`: smoothing "
        "without rounding changes nothing, so a gain that the fine-tune itself shows on another "
        "draw of prompts is noise. Plain rounding (`clip = false`, `smooth = false`) is the other "
        "control.",
        "In the laboratory (`small`, seeds 0 and 1, 256 held-out prompts) it undoes part of a "
        "benign drift and no poison. `howto`: compliance 93.0 and 80.1 to 48.4 and 55.9 %, the "
        "task within 1 point, general skill 0 and 5 points lower; plain rounding 92.6 % (seed "
        "0). 5 % poison: 92.6 and 98.4 to 91.4 and 98.8 %, although malicious prompts on the "
        "probes' malicious side go from 32 and 21 to 100 and 99 %; 4 and 3 bits (seed 0) 96.5 "
        "and 97.7 %, plain rounding at 8, 4 and 3 bits 93.4, 89.5 and 100 %.",
        "At 8 bits rounding is small: look at the shares of malicious prompts on the malicious "
        "side before and after, which the report shows, before you expect a repair.",
        "Refuses mixtures of experts, and (unless `smooth = false`) blocks whose norms do not feed "
        "linear layers directly.",
    ),
    defects=(
        "The published calibration set is AdvBench, and so is the evaluation: the figures are "
        "in-distribution. Here prompts that a suite of the same run measures are refused.",
        "The published query-key scaling does not commute with rotary embeddings unless both "
        "channels of a rotated pair share one factor, which is not enforced. It is off here.",
        "The published smoothing crashes without activation scales computed beforehand; here they "
        "are measured in the same run.",
        "The published judging looks at 35 new tokens; suites here say their own length.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class QRealign(Method):
    """Realignment by trained quantisation."""

    name: ClassVar[str] = "q_realign"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "training"
    trains: ClassVar[bool] = True
    needs_anchors: ClassVar[bool] = True
    data: ClassVar[frozenset[Data]] = frozenset({"keep"})

    bits: int = parameter(8, Integer(2, 16), symbol="b", source="W8; the paper's is W8A8")
    """Bits of a weight."""

    quantise: bool = parameter(True, Flag(), source="our control")
    """False is the control: smoothing without rounding, which must change nothing."""

    clip: bool = parameter(True, Flag(), source="official code")
    """Whether rows are clipped by trained factors."""

    smooth: bool = parameter(True, Flag(), source="official code")
    """Whether the columns that a norm feeds are scaled by a trained vector."""

    prompts: int = parameter(200, Integer(16), source="official code")
    """Calibration prompts."""

    malicious_share: float = parameter(0.75, Real(0.05, 0.95), source="official code")
    """Share of malicious prompts among them."""

    length: int = parameter(128, Integer(1), source="official code")
    """Tokens of a sequence; of a longer prompt the last ones count."""

    epochs_first: int = parameter(5, Integer(1), source="official code")
    """Passes over the prompts for each block of the first half."""

    epochs_rest: int = parameter(15, Integer(1), source="official code")
    """The same for the other blocks."""

    clip_rate: float = parameter(1e-2, Real(0.0, 1.0), source="official code")
    """Learning rate of the clip factors."""

    smooth_rate: float = parameter(1e-3, Real(0.0, 1.0), source="official code")
    """Learning rate of the smoothing vector."""

    probe_strength: float = parameter(
        1.0, Real(1e-6), symbol="C", source="not published; the usual default"
    )
    """Of the probes; the L1 penalty is 1 / (C n)."""

    def validate(self) -> None:
        """Check every hyper-parameter, and that the control has something to smooth."""
        super().validate()
        if not self.quantise and not self.smooth:
            raise UsageError(
                "quantise = false and smooth = false leave nothing to do",
                "the control smooths without rounding: --set quantise=false",
            )

    def prepare(self, workbench: Workbench) -> Statistics:
        """Fit probes on the aligned model and train the quantiser of the fine-tune."""
        dtype = next(iter(workbench.layers())).finetuned.dtype
        recipe = Recipe(
            bits=self.bits,
            clip=self.clip,
            smooth=self.smooth,
            quantise=self.quantise,
            epochs_first=self.epochs_first,
            epochs_rest=self.epochs_rest,
            clip_rate=self.clip_rate,
            smooth_rate=self.smooth_rate,
            dtype=dtype,
        )
        found = workbench.cached(
            "q-realign",
            {**self.settings(), "dtype": str(dtype), "version": 3},
            lambda: train_quantiser(
                workbench,
                recipe=recipe,
                prompts=self.prompts,
                share=self.malicious_share,
                length=self.length,
                penalty=self.probe_strength,
            ),
        )
        tables: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in found.items():
            table, _, key = name.partition("/")
            tables.setdefault(table, {})[key] = tensor
        facts = {name: value.item() for name, value in tables.pop("fact", {}).items()}
        return Statistics(tables=tables, facts=facts)

    def training_bytes(self, size: ModelSize) -> int:
        """Model; both streams of hidden states and the outputs they are drawn to; one block."""
        rows = min(self.prompts, size.text("anchors").rows + size.text("keep").rows)
        longest = min(self.length, max(size.text("anchors").longest, size.text("keep").longest))
        streams = 16 * size.hidden * rows * longest
        blocks = max(1, size.blocks)
        block = 4 * longest * size.block_entries() + 24 * (size.edited // blocks)
        return 4 * size.model + streams + block

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return W' - Wf of one matrix from its clip factors and its smoothing vector."""
        if not self.quantise:
            error = statistics.facts.get("control_error")
            shown = f" (measured: {error:.1e})" if isinstance(error, float) else ""
            return Unchanged(
                "this run is the control: smoothing without rounding leaves every block's outputs "
                f"as they are{shown}"
            )
        found = quantised_matrix(layer.finetuned, layer.key, statistics, bits=self.bits)
        target = found.folded()
        stored = target.to(layer.finetuned.dtype)
        if torch.equal(stored, layer.finetuned):
            return Unchanged("every entry stands on the grid already")
        facts: dict[str, float | int | str | None] = {"bits": self.bits}
        for name, table in (("clip_high", "high"), ("clip_low", "low")):
            if (factors := statistics.tensor(table, layer.key)) is not None:
                facts[name] = float(factors.mean())
        return Dense(target - layer.finetuned.to(target.dtype), target=stored, facts=facts)
