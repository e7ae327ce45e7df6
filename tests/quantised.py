"""Checkpoints of each quantised kind, with names, shapes and numbers as the programs that make them write."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlamaConfig

from tests.engine.process import PROFILE, running
from tests.tiny import SIZES, edit_json, edit_tensors, save_model

GROUP, BLOCK = 32, 128
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that four bits of floating point have."""
Tensors = dict[str, torch.Tensor]
WIDER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "dtype": "float16"}


def _grouped(weight: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four bits a weight, rounded: (outputs, inputs) of 0 to 15, and zeros and scales of (outputs, groups)."""
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    if symmetric:
        scales = (groups.abs().amax(2) / 7).clamp(min=1e-5)
        zeros = torch.full_like(scales, 8)
    else:
        least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((most - least) / 15).clamp(min=1e-5)
        zeros = (-least / scales).round()
    scales = scales.half()
    numbers = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return numbers.flatten(1).int(), zeros.int(), scales


def _words(numbers: torch.Tensor, order: Sequence[int] = range(8)) -> torch.Tensor:
    """Eight numbers of four bits in each int32, along the last dimension; `order[i]` is in bits 4i to 4i + 3."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8)[..., list(order)].long()
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int().contiguous()


def _awq(weight: torch.Tensor) -> Tensors:
    numbers, zeros, scales = _grouped(weight, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": _words(numbers.T.contiguous(), order),
        "qzeros": _words(zeros.T.contiguous(), order),
        "scales": scales.T.contiguous(),
    }


def _gptq(weight: torch.Tensor) -> Tensors:
    numbers, zeros, scales = _grouped(weight, symmetric=True)
    outputs, inputs = weight.shape
    return {
        "qweight": _words(numbers).T.contiguous(),
        "qzeros": _words(zeros.T.contiguous() - 1),  # this format stores one less
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        "bias": torch.zeros(outputs, dtype=torch.float16),
    }


def _fp8(weight: torch.Tensor) -> Tensors:
    scale = weight.float().abs().max() / FP8_MAX
    return {"weight": (weight.float() / scale).to(FP8), "weight_scale": scale}


def _fp8_static(weight: torch.Tensor) -> Tensors:
    return {**_fp8(weight), "input_scale": torch.tensor(0.5)}


def _fp8_blocks(weight: torch.Tensor) -> Tensors:
    """Blocks of BLOCK rows and columns; the last ones may be smaller."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scales = (blocks.abs().amax((1, 3)) / FP8_MAX).clamp(min=1e-9)
    scaled = (blocks / scales[:, None, :, None]).flatten(0, 1).flatten(1)
    return {"weight": scaled[:rows, :columns].to(FP8).contiguous(), "weight_scale_inv": scales}


def _packed(weight: torch.Tensor) -> Tensors:
    numbers, _, scales = _grouped(weight, symmetric=True)
    return {"weight_packed": _words(numbers), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}


def _by_rows(weight: torch.Tensor, most: float, dtype: torch.dtype) -> Tensors:
    scale = (weight.float().abs().amax(1, keepdim=True) / most).clamp(min=1e-9).bfloat16()
    scaled = weight.float() / scale.float()
    rounded = scaled if dtype.is_floating_point else scaled.round()
    return {"weight": rounded.clamp(-most, most).to(dtype), "weight_scale": scale}


def _int8(weight: torch.Tensor) -> Tensors:
    return _by_rows(weight, 127, torch.int8)


def _fp8_channels(weight: torch.Tensor) -> Tensors:
    return _by_rows(weight, FP8_MAX, FP8)


def _nvfp4(weight: torch.Tensor) -> Tensors:
    """Sixteen weights share a scale, which is FP8 and relative to one that layers computed together must share."""
    groups = weight.float().reshape(weight.shape[0], -1, 16)
    whole = torch.tensor(FP8_MAX * FP4[-1] / 4)  # weights of up to 4
    scales = (groups.abs().amax(2) / FP4[-1] * whole).to(FP8)
    scaled = groups * whole / scales.float().clamp(min=1e-9)[..., None]
    codes = (scaled.abs()[..., None] - torch.tensor(FP4)).abs().argmin(-1) + 8 * (scaled < 0)
    pairs = codes.reshape(weight.shape[0], -1, 2)
    packed = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
    ones = {"weight_global_scale": whole.reshape(1), "input_global_scale": torch.ones(1)}
    return {"weight_packed": packed, "weight_scale": scales, **ones}


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
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
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


def grouped(kind: str, size: int) -> dict[str, Any]:
    """The `quantization_config` of a kind whose groups have another size."""
    settings = copy.deepcopy(KINDS[kind][0])
    found = [settings, *(group["weights"] for group in settings.get("config_groups", {}).values())]
    for part in found:
        if part.get("group_size", 16) != 16:  # NVFP4 has no other size
            part["group_size"] = size
    return settings


def capital_of_france(folder: Path, *settings: str, profile: Path = PROFILE) -> str:
    """What a server answers that is started for it."""
    with running(folder, *settings, profile=profile) as server:
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
        answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body | {"max_tokens": 12}, timeout=180)
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def save(kind: str, directory: Path, **more: Any) -> None:
    """Write a tiny Llama of this kind; `more` goes into its configuration."""
    save_model(LlamaConfig(**SIZES | WIDER | more), directory)
    quantise(kind, directory)


def quantise(kind: str, directory: Path) -> None:
    """Round the linear layers of a checkpoint of one file, where it lies."""
    settings, pack = KINDS[kind]
    edit_json(directory / "config.json", quantization_config=settings, dtype="float16")

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            layer = name.removesuffix(".weight")
            parts = {f"{layer}.{part}": tensor for part, tensor in pack(tensors.pop(name)).items()}
            tensors |= {part: tensor for part, tensor in parts.items() if part not in tensors}  # a bias stays

    edit_tensors(directory, edit)
