"""Quantised and foreign formats: told by config, by tensors or by file names, each with advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_support import LLAMA, llama_tensors, write_model

from realign.checkpoint.formats import FOREIGN, is_foreign, is_pickle
from realign.checkpoint.reader import open_checkpoint
from realign.errors import CheckpointError

TENSORS = llama_tensors()
Q = "model.layers.0.self_attn.q_proj"
U8, I8, I32, U32, FP8 = (
    torch.zeros(8, 4, dtype=dtype)
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.uint32, torch.float8_e4m3fn)
)
F = torch.ones(8)

# What transformers and others write into config.json, shortened.
CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ", "it was made from"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, "AutoRound", "it was made from"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "AWQ", "it was made from"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes",
        "QLoRA",
    ),
    "bitsandbytes 8 bit": ({"load_in_8bit": True}, "bitsandbytes", "unquantised"),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
        "FP8",
        "FineGrainedFP8Config(dequantize=True)",
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "FP8", "it was made from"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt", "made from"),
    "mxfp4": (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        "MXFP4",
        "Mxfp4Config(dequantize=True)",
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "compressed-tensors",
        "CompressedTensorsConfig(dequantize=True)",
    ),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "HQQ", "it was made from"),
    "eetq": ({"quant_method": "eetq"}, "EETQ", "it was made from"),
    "aqlm": ({"quant_method": "aqlm"}, "AQLM", "it was made from"),
    "torchao": ({"quant_method": "torchao", "quant_type": {}}, "torchao", "it was made from"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "quanto", "it was made from"),
    "exl2": ({"quant_method": "exl2", "bits": 4.25}, "EXL2", "it was made from"),
    "not known yet": ({"quant_method": "zorb", "bits": 1}, "zorb", "it was made from"),
    "not named": ({"zero_point": True}, "unnamed method", "it was made from"),
}


def refused(folder: Path, *says: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    error = caught.value
    assert str(folder) in error.message
    for part in says:
        assert part in f"{error.message}\n{error.hint}", str(error)
    assert error.hint and len(str(error).splitlines()) == 2
    return error


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_says_quantised(tmp_path: Path, name: str) -> None:
    found, label, advice = CONFIGS[name]
    write_model(tmp_path, TENSORS, config={**LLAMA, "quantization_config": found})
    refused(tmp_path, "is quantised", label, advice)


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "FP8"),
        ({"vision_config": {"quantization_config": {"quant_method": "awq"}}}, "AWQ"),
    ],
)
def test_other_places_in_a_config(tmp_path: Path, changes: dict[str, Any], label: str) -> None:
    write_model(tmp_path, TENSORS, config={**LLAMA, **changes})
    refused(tmp_path, label)


def test_options_that_quantise_nothing_are_no_reason(tmp_path: Path) -> None:
    options = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    write_model(tmp_path, TENSORS, config={**LLAMA, "quantization_config": options})
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)


# A quantised layer as each library stores it, without a word in the config.
LAYERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "GPTQ": ({"qweight": I32, "qzeros": I32, "scales": F, "g_idx": I32}, "GPTQ"),
    "AWQ": ({"qweight": I32, "qzeros": I32, "scales": F}, "AWQ"),
    "bitsandbytes nf4": (
        {
            "weight": U8,
            "weight.absmax": F,
            "weight.quant_map": F,
            "weight.quant_state.bitsandbytes__nf4": U8,
        },
        "bitsandbytes",
    ),
    "bitsandbytes int8": ({"weight": I8, "SCB": F}, "bitsandbytes"),
    "FP8": ({"weight": FP8, "weight_scale_inv": F}, "RA035"),
    "FP8 cast to bytes": ({"weight": U8, "weight_scale_inv": F}, "FP8"),
    "int8": ({"weight": I8, "weight_scale": F}, "compressed-tensors"),
    "packed": ({"weight_packed": I32, "weight_scale": F, "weight_shape": I32}, "compressed"),
    "MXFP4": ({"gate_up_proj_blocks": U8, "gate_up_proj_scales": U8}, "MXFP4"),
    "HQQ": ({"W_q": U8, "scale": F, "zero": F}, "HQQ"),
    "EETQ": ({"weight": I8, "weight_scales": F}, "EETQ"),
    "AQLM": ({"codes": I8, "codebooks": F, "scales": F}, "AQLM"),
    "torchao": ({"_weight_qdata": I8, "_weight_scale": F}, "torchao"),
    "quanto": ({"weight._data": I8, "weight._scale": F}, "quanto"),
    "EXL2": ({"q_weight": I32, "q_scale": I32}, "EXL2"),
    "EXL3": ({"trellis": torch.zeros(2, 2, dtype=torch.int16), "suh": F}, "EXL3"),
    "MLX": ({"weight": U32, "scales": F, "biases": F}, "MLX"),
    "something else": ({"weight": I8}, "unknown method"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_quantised_tensors_without_a_word_in_the_config(tmp_path: Path, name: str) -> None:
    layer, label = LAYERS[name]
    rest = {name: tensor for name, tensor in TENSORS.items() if name != f"{Q}.weight"}
    write_model(tmp_path, {**rest, **{f"{Q}.{part}": t.clone() for part, t in layer.items()}})
    refused(tmp_path, f"{Q}.", label)


def test_what_only_sounds_quantised_is_read(tmp_path: Path) -> None:
    harmless = {
        f"{Q}.scales": F.clone(),
        "model.layers.0.layer_scale": F.clone(),
        "model.weight_scale": F.clone(),
        "model.position_ids": torch.arange(8)[None],
        "model.blocks_seen": U8,
        "model.steps.weight": torch.arange(8),
    }
    write_model(tmp_path, {**TENSORS, **harmless})
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(harmless) < set(checkpoint.tensors)


FILES: dict[str, tuple[str, str]] = {
    "model-Q4_K_M.gguf": ("GGUF", "original checkpoint in safetensors"),
    "model.llamafile": ("GGUF", "original checkpoint in safetensors"),
    "model.onnx": ("ONNX", "exported from"),
    "openvino_model.bin": ("OpenVINO", "exported from"),
    "tf_model.h5": ("TensorFlow", "from_tf=True"),
    "saved_model.pb": ("TensorFlow", "from_tf=True"),
    "flax_model.msgpack": ("Flax", "from_flax=True"),
    "weights.npz": ("MLX", "converted from"),
    "model.nemo": ("NeMo", "exported from"),
    "__0_0.distcp": ("distributed", "consolidate"),
    "consolidated.safetensors": ("consolidated", "Hugging Face layout"),
    "consolidated.00.pth": ("RA040", "save_pretrained"),
    "pytorch_model.bin": ("RA040", "save_pretrained"),
    "pytorch_model-00001-of-00002.bin": ("RA040", "isolated environment"),
    "model.pt": ("RA040", "never unpickles"),
    "model.ckpt": ("RA040", "never unpickles"),
}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_another_format(tmp_path: Path, name: str, with_config: bool) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "training_args.bin").write_bytes(b"")
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    elif name.endswith(".safetensors"):
        pytest.skip("a folder with safetensors but no config is asked for its config first")
    refused(tmp_path, *FILES[name])


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".safetensors")])
def test_a_file_of_another_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path / name, *FILES[name])


@pytest.mark.parametrize("name", [name for name in FILES if name != "consolidated.safetensors"])
def test_safetensors_beside_another_format_are_read_with_a_remark(
    tmp_path: Path, name: str
) -> None:
    write_model(tmp_path, TENSORS)
    (tmp_path / name).write_bytes(b"not looked into")
    with open_checkpoint(tmp_path) as checkpoint:
        (remark,) = checkpoint.remarks
    assert remark.startswith(f"RA027: {tmp_path}: ") and name in remark


def test_a_trainers_own_files_are_no_weights() -> None:
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"):
        assert not is_pickle(name) and not is_foreign(name)
    assert all(is_foreign(f"x{ending}") for kind in FOREIGN for ending in kind.endings)
