"""Weights that realign does not edit: how each foreign or quantised format is told, and what helps.

A format shows in three places: the names of a folder's files, its config, and the names and types
of its tensors (a quantised checkpoint may have lost its config). Nothing here opens a file of
weights. Not here: what is wrong with a safetensors file itself (`headers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.rules import RULES
from realign.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NO_PICKLES = ("training_args.bin", "optimizer", "scheduler", "rng_state", "scaler")
_THEN = "repair that, and quantise the result"
_ORIGINAL = f"take the checkpoint it was made from, in bfloat16, float16 or float32, {_THEN}"


@dataclass(frozen=True)
class Foreign:
    """A kind of weight file that is not read."""

    name: str
    endings: tuple[str, ...]
    """Of file names, in lower case."""
    advice: str


FOREIGN: Sequence[Foreign] = (
    Foreign(
        "GGUF weights, which are quantised",
        (".gguf", ".ggml", ".llamafile"),
        "use the original checkpoint in safetensors, and convert to GGUF after the repair",
    ),
    Foreign(
        "an ONNX export",
        (".onnx", ".onnx_data"),
        "use the checkpoint it was exported from, and export the repaired one again",
    ),
    Foreign(
        "an OpenVINO export",
        ("openvino_model.xml", "openvino_model.bin"),
        "use the checkpoint it was exported from, and export the repaired one again",
    ),
    Foreign(
        "TensorFlow or Keras weights",
        (".h5", ".keras", "saved_model.pb", ".tflite"),
        "load them with from_pretrained(..., from_tf=True) of an older transformers (4.x), then "
        "save_pretrained, which writes safetensors",
    ),
    Foreign(
        "Flax weights",
        (".msgpack", ".orbax"),
        "load them with from_pretrained(..., from_flax=True) of an older transformers (4.x), then "
        "save_pretrained, which writes safetensors",
    ),
    Foreign(
        "MLX or NumPy weights",
        (".npz", ".npy"),
        "use the checkpoint it was converted from, in safetensors",
    ),
    Foreign(
        "a Core ML, TensorRT or NeMo export",
        (".mlmodel", ".mlpackage", ".engine", ".plan", ".nemo"),
        "use the checkpoint it was exported from, in safetensors",
    ),
    Foreign(
        "shards of a distributed training run",
        (".distcp",),
        "consolidate them with the trainer that wrote them (for example accelerate merge-weights)",
    ),
)


def is_foreign(name: str) -> bool:
    """Whether a file of this name holds weights in a format that is not read."""
    low = name.lower()
    return is_pickle(name) or any(low.endswith(kind.endings) for kind in FOREIGN)


def is_pickle(name: str) -> bool:
    """Whether a file of this name holds weights as a pickle."""
    low = name.lower()
    return (
        low.endswith(PICKLES) and not low.startswith(_NO_PICKLES) and not low.startswith("openvino")
    )


def no_weights(where: str, names: Iterable[str]) -> tuple[str, str] | None:
    """What to say of a folder or repository without safetensors weights that a loader would find.

    Args:
        where: the folder or the Hub id.
        names: its file names at the top.

    Returns:
        Message and hint, or None where the names show no other format.
    """
    low = sorted(name.lower() for name in names)
    for kind in FOREIGN:
        if any(name.endswith(kind.endings) for name in low):
            return f"{where} holds {kind.name}", kind.advice
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in low):
        return (
            f"{where} holds its weights as consolidated.safetensors, under names of their own",
            "use the version in Hugging Face layout (model.safetensors), or convert it with the "
            "model's conversion script of transformers",
        )
    pickles = [name for name in low if is_pickle(name)]
    if pickles:
        return (
            f"RA040: {where} holds only pickle weights ({pickles[0]}"
            f"{f' and {len(pickles) - 1} more' if len(pickles) > 1 else ''}); realign never "
            "unpickles",
            RULES["RA040"].fix,
        )
    return None


def what_a_file_is(path: Path) -> tuple[str, str]:
    """Message and hint for a path that is a file where a folder must be given."""
    name = path.name
    known = None if name.endswith(".safetensors") else no_weights(str(path), [name])
    if known is not None:
        return known
    return (
        f"{path} is a file, not a model folder",
        f"give the folder that holds it: {path.parent}",
    )


# --- quantised by config -------------------------------------------------------------------------

_LOADED = "load it with transformers' {config} and save_pretrained, then repair that"
_METHODS: Mapping[str, tuple[str, str]] = {
    "gptq": ("GPTQ", _ORIGINAL),
    "auto-round": ("AutoRound", _ORIGINAL),
    "awq": ("AWQ", _ORIGINAL),
    "bitsandbytes": (
        "bitsandbytes",
        "use the unquantised checkpoint; for a QLoRA adapter, give the adapter over the "
        "unquantised model; if the weights are stored unquantised, remove quantization_config",
    ),
    "fp8": (
        "FP8",
        "use the bfloat16 checkpoint; where there is none, "
        + _LOADED.format(config="FineGrainedFP8Config(dequantize=True)"),
    ),
    "fbgemm_fp8": ("FP8", _ORIGINAL),
    "modelopt": ("ModelOpt", _ORIGINAL),
    "mxfp4": (
        "MXFP4",
        "use a bfloat16 checkpoint; where there is none, "
        + _LOADED.format(config="Mxfp4Config(dequantize=True)"),
    ),
    "compressed-tensors": (
        "compressed-tensors",
        "use the unquantised checkpoint; where there is none, "
        + _LOADED.format(config="CompressedTensorsConfig(dequantize=True)"),
    ),
    "hqq": ("HQQ", _ORIGINAL),
    "eetq": ("EETQ", _ORIGINAL),
    "aqlm": ("AQLM", _ORIGINAL),
    "torchao": ("torchao", _ORIGINAL),
    "quanto": ("quanto", _ORIGINAL),
    "exl2": ("EXL2", _ORIGINAL),
    "exl3": ("EXL3", _ORIGINAL),
    "mlx": (
        "MLX",
        "use the checkpoint it was converted from; mlx_lm.convert --dequantize may help",
    ),
}
_KEYS = ("quantization_config", "compression_config", "quantization")


def refuse_quantised_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config that says its weights are quantised, itself or in a part of it.

    Raises:
        CheckpointError: names the folder, the method and what to use instead.
    """
    parts = [config, *(cast(Mapping[str, Any], v) for v in config.values() if _is_object(v))]
    for part in parts:
        for key in _KEYS:
            found = part.get(key)
            if found and not _is_off(found):
                method = _method(key, found)
                label, advice = _METHODS.get(method, (method, _ORIGINAL))
                raise _quantised(folder, label, f"{key} in config.json", advice)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_off(found: Any) -> bool:
    """Options of bitsandbytes that were written although nothing is quantised."""
    if not isinstance(found, Mapping):
        return False
    said = cast(Mapping[str, Any], found)
    loads = [said[key] for key in ("load_in_4bit", "load_in_8bit") if key in said]
    return bool(loads) and not any(loads)


def _method(key: str, found: Any) -> str:
    said = cast(Mapping[str, Any], found) if _is_object(found) else {}
    method = said.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower().replace("_4bit", "").replace("_8bit", "")
    if any(name in said for name in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    if key == "quantization" or {"group_size", "bits"} >= set(said) > set():
        return "mlx"
    return "compressed-tensors" if key == "compression_config" else "of an unnamed method"


def _quantised(folder: Path, label: str, evidence: str, advice: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is quantised ({label}: {evidence}); its weights cannot be edited", advice
    )


# --- quantised by its tensors --------------------------------------------------------------------


@dataclass(frozen=True)
class _Sign:
    """Endings of tensor names that only one kind of quantised checkpoint has."""

    ending: str
    method: str
    beside: tuple[str, ...] = ()
    """Endings of which one must stand at the same module; none where the ending says enough."""
    types: frozenset[str] = frozenset()
    """Types of the tensor; empty where any will do."""


_INTEGERS = frozenset(("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))
_SIGNS: Sequence[_Sign] = (
    _Sign(".qweight", "gptq", (".g_idx",), _INTEGERS),
    _Sign(".qweight", "awq", (".qzeros", ".scales"), _INTEGERS),
    _Sign(".weight.absmax", "bitsandbytes"),
    _Sign(".weight.quant_map", "bitsandbytes"),
    _Sign(".SCB", "bitsandbytes", (".weight",)),
    _Sign(".weight_packed", "compressed-tensors"),
    _Sign(".weight_scale_inv", "fp8"),
    _Sign("_blocks", "mxfp4", ("_scales",), frozenset(("U8",))),
    _Sign(".W_q", "hqq"),
    _Sign(".weight_scales", "eetq", (".weight",)),
    _Sign(".codebooks", "aqlm", (".codes",)),
    _Sign("._weight_qdata", "torchao"),
    _Sign(".weight_qdata", "torchao"),
    _Sign(".weight._data", "quanto", (".weight._scale",)),
    _Sign(".q_weight", "exl2", (".q_scale",)),
    _Sign(".trellis", "exl3", (".suh", ".svh")),
    _Sign(".weight", "mlx", (".scales",), frozenset(("U32",))),
    _Sign(".weight", "compressed-tensors", (".weight_scale",), frozenset(("I8", "U8"))),
)


def refuse_quantised_tensors(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors that are parts of quantised weights, whatever the config says.

    Raises:
        CheckpointError: names the first such tensor, the method and what to use instead.
    """
    for name, info in tensors.items():
        for sign in _SIGNS:
            if not name.endswith(sign.ending) or (sign.types and info.dtype not in sign.types):
                continue
            module = name[: -len(sign.ending)]
            if sign.beside and not any(module + ending in tensors for ending in sign.beside):
                continue
            label, advice = _METHODS[sign.method]
            raise _quantised(folder, label, f"tensor {name!r}", advice)
    for name, info in tensors.items():
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype in _INTEGERS:
            raise _quantised(
                folder, "an unknown method", f"tensor {name!r} holds {info.dtype}", _ORIGINAL
            )
