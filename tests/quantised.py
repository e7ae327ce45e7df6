"""Tiny checkpoints of each quantised kind, with the names and shapes that the programs that make them write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from tests.tiny import SIZES, edit_json, edit_tensors, save_model

GROUP = 32
FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]
WIDER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "dtype": "float16"}


def _ints(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def _scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full(shape, 0.01, dtype=dtype)


def _awq(weight: torch.Tensor) -> Tensors:
    outputs, inputs = weight.shape
    groups = inputs // GROUP
    return {
        "qweight": _ints(inputs, outputs // 8),
        "qzeros": _ints(groups, outputs // 8),
        "scales": _scales(groups, outputs),
    }


def _gptq(weight: torch.Tensor) -> Tensors:
    outputs, inputs = weight.shape
    groups = inputs // GROUP
    found = {"qweight": _ints(inputs // 8, outputs), "qzeros": _ints(groups, outputs // 8)}
    order = torch.arange(inputs, dtype=torch.int32) // GROUP
    return {
        **found,
        "scales": _scales(groups, outputs),
        "g_idx": order,
        "bias": torch.zeros(outputs, dtype=torch.float16),
    }


def _fp8(weight: torch.Tensor) -> Tensors:
    return {"weight": weight.to(FP8), "weight_scale": torch.tensor(0.5)}


def _fp8_static(weight: torch.Tensor) -> Tensors:
    return {**_fp8(weight), "input_scale": torch.tensor(0.5)}


def _fp8_blocks(weight: torch.Tensor) -> Tensors:
    blocks = [-(-size // GROUP) for size in weight.shape]
    return {"weight": weight.to(FP8), "weight_scale_inv": torch.ones(blocks)}


def _packed(weight: torch.Tensor) -> Tensors:
    outputs, inputs = weight.shape
    shape = torch.tensor([outputs, inputs])
    return {
        "weight_packed": _ints(outputs, inputs // 8),
        "weight_scale": _scales(outputs, inputs // GROUP),
        "weight_shape": shape,
    }


def _int8(weight: torch.Tensor) -> Tensors:
    scale = _scales(weight.shape[0], 1, dtype=torch.bfloat16)
    return {"weight": (weight.float() * 100).clamp(-127, 127).to(torch.int8), "weight_scale": scale}


def _fp8_channels(weight: torch.Tensor) -> Tensors:
    return {"weight": weight.to(FP8), "weight_scale": _scales(weight.shape[0], 1, dtype=torch.bfloat16)}


def _nvfp4(weight: torch.Tensor) -> Tensors:
    outputs, inputs = weight.shape
    packed = torch.zeros(outputs, inputs // 2, dtype=torch.uint8)
    scale = torch.ones(outputs, inputs // 16).to(FP8)
    whole = {"weight_global_scale": torch.ones(1), "input_global_scale": torch.ones(1)}
    return {"weight_packed": packed, "weight_scale": scale, **whole}


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": common | weights,
        "input_activations": inputs and common | inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


TOKENS = {"strategy": "token", "dynamic": True}
FOUR = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Tensors]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, _awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}, _gptq),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, _fp8_static),
    "fp8-dynamic": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, _fp8),
    "fp8-blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]},
        _fp8_blocks,
    ),
    "int4": (_compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None), _packed),
    "int8": (_compressed("int-quantized", {"strategy": "channel"}, TOKENS), _int8),
    "fp8-channels": (
        _compressed("float-quantized", {"type": "float", "strategy": "channel"}, {"type": "float", **TOKENS}),
        _fp8_channels,
    ),
    "nvfp4": (_compressed("nvfp4-pack-quantized", FOUR, {**FOUR, "dynamic": "local"}), _nvfp4),
}
"""config.json's `quantization_config` and what becomes of a linear layer's weight, by kind."""


def save(kind: str, directory: Path, **more: Any) -> None:
    """Write a tiny Llama of this kind; `more` goes into its configuration."""
    save_model(LlamaConfig(**SIZES | WIDER | more), directory)
    settings, pack = KINDS[kind]
    edit_json(directory / "config.json", quantization_config=settings)

    def quantise(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            layer = name.removesuffix(".weight")
            tensors |= {f"{layer}.{part}": tensor for part, tensor in pack(tensors.pop(name)).items()}

    edit_tensors(directory, quantise)
