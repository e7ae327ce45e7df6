"""A tiny Llama checkpoint that transformers made, and ways to break it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from borg_serve.checkpoint.check import inspect, preflight
from borg_serve.errors import CheckpointError

UP = "model.layers.1.mlp.up_proj.weight"
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "bfloat16",
}


def save_model(config: PreTrainedConfig, directory: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    _save_tokenizer(Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")), directory)


def save_byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer of 256 bytes, which can spell the identity."""
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    _save_tokenizer(backend, directory)


def _save_tokenizer(backend: Tokenizer, directory: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refusal_of(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        preflight(inspect(directory))
    return str(caught.value)
