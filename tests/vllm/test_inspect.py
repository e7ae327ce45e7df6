"""What a checkpoint says of itself, read without its weights: each fault is refused by name."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from borg_serve.checkpoint.check import inspect
from borg_serve.errors import CheckpointError
from tests.tiny import UP, edit_json, refusal_of


def test_inspect_reads_the_figures_of_a_memory_plan(tiny: Path) -> None:
    found = inspect(tiny)
    assert (found.architecture, found.dtype) == ("LlamaForCausalLM", "bfloat16")
    assert (found.num_layers, found.num_kv_heads, found.head_dim, found.hidden_size) == (2, 2, 4, 16)
    assert (found.max_positions, found.vocab_size) == (128, 64)
    assert found.weight_bytes == sum(t.nbytes for t in load_file(tiny / "model.safetensors").values())
    assert found.tensors[UP].shape == (32, 16)


def test_inspect_derives_heads_that_the_config_leaves_out(tiny: Path) -> None:
    edit_json(tiny / "config.json", num_key_value_heads=None, head_dim=None, dtype=None, torch_dtype="bfloat16")
    found = inspect(tiny)
    assert (found.num_kv_heads, found.head_dim, found.dtype) == (4, 4, "bfloat16")


def test_inspect_imports_neither_torch_nor_transformers(tiny: Path) -> None:
    script = (
        "import sys; from borg_serve.checkpoint.check import inspect; inspect(sys.argv[1]); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tiny)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_inspect_refuses_what_is_no_directory(tiny: Path) -> None:
    for path in (tiny / "absent", tiny / "config.json"):
        with pytest.raises(CheckpointError, match="must be a checkpoint directory"):
            inspect(path)


def test_inspect_names_all_problems_at_once(tiny: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        (tiny / name).unlink()
    lines = refusal_of(tiny).splitlines()
    for part in ("/config.json: ", "tokenizer_config.json: ", "no tokenizer", "chat template", "no weights"):
        assert any(part in line for line in lines), part


def test_inspect_refuses_a_missing_chat_template(tiny: Path) -> None:
    (tiny / "chat_template.jinja").unlink()
    assert "chat template" in refusal_of(tiny)


def test_inspect_finds_a_chat_template_in_the_tokenizer_config(tiny: Path) -> None:
    (tiny / "chat_template.jinja").unlink()
    edit_json(tiny / "tokenizer_config.json", chat_template="{{ messages }}")
    inspect(tiny)


def test_inspect_names_the_pointers_of_git_lfs(tiny: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tiny / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n")
    model, tokenizer = refusal_of(tiny).splitlines()
    assert "model.safetensors: must be the file itself, got 'a pointer of git-lfs'. Run `git lfs pull`" in model
    assert "tokenizer.json: must be the file itself" in tokenizer


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", None),
        ("architectures", []),
        ("architectures", ["A", "B"]),
        ("dtype", None),
        ("dtype", "float8"),
        ("hidden_size", None),
        ("hidden_size", "16"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", True),
        ("vocab_size", -1),
        ("max_position_embeddings", 1.5),
    ],
)
def test_inspect_names_a_config_key_with_a_wrong_value(tiny: Path, key: str, value: object) -> None:
    edit_json(tiny / "config.json", **{key: value})
    assert f"config.json: {key}: " in refusal_of(tiny)


def test_inspect_refuses_a_truncated_file(tiny: Path) -> None:
    raw = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(raw[:-100])
    assert "model.safetensors: is truncated" in refusal_of(tiny)
