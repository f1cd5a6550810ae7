"""The plan of a repair: everything that can be decided, or refused, before the work begins.

`plan` opens the checkpoints, checks the method's parameters and what it needs, settles the safety
vector once for the whole run, pairs the tensors, guards against repairing twice and against having
nothing to repair, looks at the target folder, and estimates what the run will read, write and hold
in memory. `--dry-run` prints the result; `engine.repair` carries it out. Headers and JSON
decide; of the tensors only a few rows are read, to tell equal or swapped models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from realign.checkpoint.matching import Matching, TensorPair, match
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.sidecars import has_vocabulary
from realign.checkpoint.space import require_space
from realign.checkpoint.writer import ShardLayout, check_target, plan_layout
from realign.errors import NothingToDoError, OutputError, UsageError
from realign.model.devices import pick_device
from realign.progress import SILENT, Progress
from realign.repair.estimate import Estimate, estimate_repair
from realign.repair.layers import factored_roles
from realign.repair.lineage_check import doubts
from realign.repair.method import Given, Method, Scope
from realign.repair.patch_checks import by_matrices, check_patch
from realign.repair.plan_anchors import PlannedAnchors, plan_anchors
from realign.repair.plan_checks import (
    check_count,
    check_encoding,
    check_first_repair,
    check_offload,
    check_patch_rank,
    check_rank,
    check_roles,
    check_something_to_do,
    check_strengths,
    others_fused,
    settle_texts,
)
from realign.repair.preparation import Data
from realign.repair.quantise.encodable import check_encodable, encoded_bytes
from realign.repair.registry import build_method
from realign.repair.request import Inputs, RepairRequest, open_inputs
from realign.repair.subset import Subset, narrow, parse_layers, parse_modules
from realign.repair.texts import PlannedTexts

_HALVES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class PlannedInput:
    """One checkpoint of the run."""

    role: str
    source: str
    """As the user named it."""
    folder: str
    commit: str | None
    kind: str
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """A repair that headers allow."""

    inputs: Mapping[str, PlannedInput]
    """By role; only the checkpoints that the method reads."""
    method: Method
    """With its safety vector settled."""
    scope: Scope
    strength: float
    seed: int
    device: str
    matching: Matching
    layout: tuple[ShardLayout, ...]
    anchors: PlannedAnchors | None
    output: Path | None
    patch: bool
    max_patch_rank: int | None
    estimate: Estimate
    notes: tuple[str, ...]
    """Lines worth reading before the run: deviations, unused inputs, what was noticed."""
    doubts: tuple[str, ...] = ()
    """What speaks against the roles in which the checkpoints were given; see `lineage_check`."""

    texts: Mapping[Data, PlannedTexts] = field(default_factory=dict[Data, PlannedTexts])
    """Those that the method reads."""
    subset: Subset = field(default_factory=Subset)
    """What is left of the model by options or by the method."""
    strengths: Mapping[int, float] = field(default_factory=dict[int, float])
    """Of single decoder blocks, where they differ from `strength`."""
    encode: str | None = None
    """How the output's weights are stored, where that is not as they were."""
    offload: bool = False
    """Read the weights of a calibrated model block by block instead of holding it."""
    factored: frozenset[str] = frozenset()
    """Roles whose LoRA factors are at hand."""

    def strength_of(self, layer: int | None) -> float:
        """The dial of a decoder block, or of what stands outside of all (None)."""
        return self.strength if layer is None else self.strengths.get(layer, self.strength)

    def by_entries(self, pair: TensorPair) -> bool:
        """Whether a tensor is edited entry by entry, in chunks, and not matrix by matrix."""
        return self.method.elementwise and not pair.partial

    @property
    def edits(self) -> tuple[TensorPair, ...]:
        """The tensors that are to be edited."""
        return tuple(pair for pair in self.matching.pairs if pair.action == "edit")

    @property
    def copies(self) -> tuple[TensorPair, ...]:
        """The tensors that stay as they are, bit for bit."""
        return tuple(pair for pair in self.matching.pairs if pair.action == "copy")

    @property
    def roles(self) -> tuple[str, ...]:
        """The checkpoints read beside the fine-tune."""
        return tuple(role for role in self.inputs if role != "finetuned")

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, one record per tensor."""
        return {
            "schema": "realign/plan/1",
            "inputs": {role: vars(each) for role, each in self.inputs.items()},
            "method": {"name": self.method.name, "settings": self.method.settings()},
            "safety_vector": self.method.vector_kind,
            "scope": self.scope,
            "strength": self.strength,
            "strengths": {str(layer): t for layer, t in self.strengths.items()},
            "subset": self.subset.to_json(),
            "seed": self.seed,
            "device": self.device,
            "anchors": None if self.anchors is None else vars(self.anchors),
            "texts": {data: vars(each) for data, each in self.texts.items()},
            "encode": self.encode,
            "offload": self.offload,
            "output": None if self.output is None else str(self.output),
            "patch": self.patch,
            "max_patch_rank": self.max_patch_rank,
            "estimate": vars(self.estimate),
            "doubts": list(self.doubts),
            "notes": list(self.notes),
            "tensors": [
                {
                    "name": pair.role.name,
                    "kind": pair.role.kind,
                    "module": pair.role.module,
                    "layer": pair.role.layer,
                    "action": pair.action,
                    "reason": pair.reason,
                    "slots": [slot.key for slot in pair.slots],
                    "common_rows": pair.common_rows,
                }
                for pair in self.matching.pairs
            ],
        }


def plan(request: RepairRequest, *, progress: Progress = SILENT) -> Plan:
    """Decide what a repair would do, from headers, JSON and a few rows.

    Raises:
        UsageError: an unknown method, a parameter out of range, an option that is missing.
        NotFoundError, HeaderError, MismatchError: checkpoints that are not there, cannot be read
            or do not fit each other.
        NothingToDoError: the fine-tune is the aligned model, or the safety vector is zero.
        AlreadyRepairedError: the fine-tune's manifest shows this method, and `force` is not set.
        OutputError: the target exists, lies inside an input, or does not fit on its disk.
        SuiteError: anchors that are malformed, too few, or shared with a suite of this run.
        ModelError: anchors are needed, and the aligned model has no tokenizer or chat template.
    """
    with open_inputs(request, progress=progress) as inputs:
        return plan_repair(request, inputs)


def plan_repair(request: RepairRequest, inputs: Inputs) -> Plan:
    """`plan`, over checkpoints that are open already."""
    method = (
        request.method
        if isinstance(request.method, Method)
        else build_method(request.method, request.settings)
    )
    method.check_settings()
    check_strengths(method, request.strength, request.strengths)
    check_encoding(request)
    if request.patch:
        method = by_matrices(method)
    others = others_fused(request, method)
    check_roles(method.needs, method, inputs)
    factored = factored_roles(inputs)
    given = Given(
        roles=frozenset(inputs.others),
        adapter="finetuned" in factored,
        data=frozenset(request.texts),
        reference_adapter="reference" in factored,
    )
    settled = method.settled(given)
    method = settled.method
    roles = method.required_roles()
    check_roles(roles, method, inputs)
    scope = _scope(request.scope, method)
    texts, notes = settle_texts(request, method)
    if settled.note:
        notes.insert(0, settled.note)
    asks_anchors = method.needs_anchors
    asks_anchors |= "safe" in method.required_data() and "safe" not in texts
    if asks_anchors and "aligned" not in inputs.others:
        raise UsageError(
            f"{method.name} needs prompts with refusals",
            "give them with --safe-data FILE, or the aligned model, which answers the anchors, "
            "with --aligned",
        )
    if asks_anchors:
        roles |= {"aligned"}
    used = {role: inputs.others[role] for role in (*sorted(roles), *others)}
    check_patch(request, method, inputs.finetuned)
    device = str(pick_device(request.device))
    notes += [
        f"the {role} model is not read by {method.name} with these settings"
        for role in inputs.others
        if role not in used
    ]
    check_something_to_do(method, inputs.finetuned, used)
    notes += check_offload(request, method)
    notes += check_first_repair(request, method, inputs.finetuned)
    matching = match(inputs.finetuned, used, scope=scope)
    if not any(pair.action == "edit" for pair in matching.pairs):
        raise NothingToDoError(
            f"{inputs.finetuned.source} has no tensor in the scope {scope}",
            "choose a wider one with --scope matrices or --scope all",
        )
    subset = _subset(request, method, given)
    matching = _without_strength(narrow(matching, subset, method=method.name), request)
    if request.encode is not None:
        dials = bool(request.strengths)
        check_encodable(method, matching, strength=request.strength, dials=dials)
    notes += check_rank(method, matching, inputs.finetuned)
    notes += check_count(method, matching, inputs.finetuned)
    notes += check_patch_rank(request, matching, inputs.finetuned)
    notes += _merge_notes(inputs.finetuned, matching)
    if not request.patch:  # a patch has no tokenizer of its own
        notes += _tokenizer_notes(inputs.finetuned)
    layout = plan_layout(inputs.finetuned)
    anchors = plan_anchors(request, used["aligned"]) if asks_anchors else None
    if request.anchors is not None and anchors is None:
        notes.append(f"{method.name} measures no activations: the anchors are not used")
    estimate = estimate_repair(
        method,
        matching,
        inputs,
        used,
        patch=request.patch,
        offload=request.offload,
        texts=texts,
        anchors=anchors,
    )
    if request.encode is not None:
        more = encoded_bytes(layout, matching)
        estimate = replace(estimate, written=estimate.written + more)
    output = None if request.output is None else Path(request.output)
    if output is not None:
        check_place(output, inputs, written=estimate.written)
    return Plan(
        inputs={
            role: PlannedInput(
                role=role,
                source=checkpoint.source,
                folder=str(checkpoint.folder),
                commit=checkpoint.commit,
                kind=checkpoint.kind,
                weight_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
            )
            for role, checkpoint in {"finetuned": inputs.finetuned, **used}.items()
        },
        method=method,
        scope=scope,
        strength=request.strength,
        seed=request.seed,
        device=device,
        matching=matching,
        layout=layout,
        anchors=anchors,
        output=output,
        patch=request.patch,
        max_patch_rank=request.max_patch_rank,
        estimate=estimate,
        notes=(*notes, *matching.notes),
        texts=texts,
        subset=subset,
        strengths=dict(request.strengths or {}),
        encode=request.encode,
        offload=request.offload,
        factored=factored & {"finetuned", *used},
        doubts=doubts(inputs, [pair.role.name for pair in matching.pairs if pair.action == "edit"]),
    )


def check_place(output: Path, inputs: Inputs, *, written: int) -> None:
    """Check the target before any work is done for it.

    Raises:
        OutputError: it exists, lies inside an input, or the disk is too small.
    """
    check_target(output.expanduser(), [each.folder for each in inputs.all().values()])
    place = next(folder for folder in output.expanduser().absolute().parents if folder.exists())
    if not place.is_dir():
        raise OutputError(f"{place} is not a folder", "choose another -o")
    require_space(place, written)


def _scope(asked: str | None, method: Method) -> Scope:
    if asked is None:
        return method.default_scope
    for scope in get_args(Scope):
        if asked == scope:
            break
    else:
        raise UsageError(f"there is no scope {asked!r}", f"scopes: {', '.join(get_args(Scope))}")
    if scope == "all" and not method.elementwise:
        raise UsageError(
            f"{method.name} works on matrices: it has nothing to say about norms and biases",
            "use --scope block_linear or --scope matrices",
        )
    return scope


def _subset(request: RepairRequest, method: Method, given: Given) -> Subset:
    layers = None if request.layers is None else parse_layers(request.layers)
    if request.modules is not None:
        return Subset(layers, parse_modules(request.modules), asked=True)
    return Subset(layers, method.target_modules(given))


def _without_strength(matching: Matching, request: RepairRequest) -> Matching:
    """Layers whose dial is 0 are copied."""
    off = {layer for layer, strength in (request.strengths or {}).items() if strength == 0.0}
    if not off:
        return matching
    pairs = tuple(
        TensorPair(pair.role, "copy", "strength 0 in its layer", (), None)
        if pair.action == "edit" and pair.role.layer in off
        else pair
        for pair in matching.pairs
    )
    if not any(pair.action == "edit" for pair in pairs):
        raise UsageError("every layer has the strength 0", "give a strength above 0")
    return Matching(pairs, matching.notes)


def _merge_notes(finetuned: Checkpoint, matching: Matching) -> list[str]:
    """An adapter over 16 bits is rounded when it is merged, before the edit is."""
    if finetuned.kind != "adapter":
        return []
    edited = {finetuned.tensors[p.role.name].dtype for p in matching.pairs if p.action == "edit"}
    low = [_HALVES[dtype] for dtype in sorted(edited & _HALVES.keys())]
    if not low:
        return []
    return [
        f"the adapter is merged in {' and '.join(low)} as peft merges it; the edit is taken from "
        "the merged weights"
    ]


def _tokenizer_notes(finetuned: Checkpoint) -> list[str]:
    if has_vocabulary(finetuned.sidecars()):
        return []
    return [f"{finetuned.source} holds no tokenizer: the output will have none either"]
