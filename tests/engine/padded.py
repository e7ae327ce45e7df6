"""The demo's checkpoint with a head more, all of zeros, so that two workers can share its attention evenly.

The model's 9 query heads on 3 KV heads cannot be halved. With one more KV head and its three query heads, whose values
and whose part of the output projection are zero, it computes the same with 12 on 4.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from borg_serve.checkpoint.check import write_manifest
from loadtests.experiments.api_process import reshaped

HEADS, KV_HEADS, HEAD_DIM = 12, 4, 64


def pad(checkpoint: Path, folder: Path) -> Path:
    """Write the padded checkpoint, with a manifest of its own, to a new folder."""
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, HEAD_DIM)
    reshaped(checkpoint, folder, {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS})
    (weights,) = checkpoint.glob("*.safetensors")
    tensors = {name: _padded(name, tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, folder / weights.name, {"format": "pt"})
    write_manifest(folder)
    return folder


def _padded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    rows = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}
    kind = name.split(".")[-2]
    if kind in rows:
        return _zeros_after(tensor, rows[kind] * HEAD_DIM, 0)
    return _zeros_after(tensor, HEADS * HEAD_DIM, 1) if kind == "o_proj" else tensor


def _zeros_after(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((tensor, tensor.new_zeros(shape)), dim).contiguous()
