"""A tiny Llama that transformers made, broken in every way a checkpoint breaks: each fault is refused by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from borg_serve.checkpoint import inspect, preflight, write_manifest
from borg_serve.config import load
from borg_serve.errors import CheckpointError
from borg_serve.manifest import MANIFEST_FILE
from borg_serve.preparation import prepare
from borg_serve.weights import INDEX_FILE

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
    words = {f"w{i}": i for i in range(64)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    save_model(LlamaConfig(**SIZES), directory)
    return directory


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "tiny")


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def flip_bit(directory: Path, name: str) -> None:
    tensor = inspect(directory).tensors[name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.begin + 4)
        byte = file.read(1)[0]
        file.seek(tensor.begin + 4)
        file.write(bytes([byte ^ 1]))


def refusal_of(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        preflight(inspect(directory))
    return str(caught.value)


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


def test_inspect_imports_neither_torch_nor_numpy(tiny: Path) -> None:
    script = (
        "import sys; from borg_serve.checkpoint import inspect; inspect(sys.argv[1]); "
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
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


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_inspect_refuses_remote_code(tiny: Path, name: str) -> None:
    edit_json(tiny / name, auto_map={"AutoConfig": "evil.EvilConfig"})
    refusal = refusal_of(tiny)
    assert f"{name}: auto_map" in refusal
    assert "evil.EvilConfig" in refusal


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


def test_preflight_passes_a_sound_checkpoint_and_returns_its_root(tiny: Path) -> None:
    root = preflight(inspect(tiny))
    assert write_manifest(tiny).root == root
    assert preflight(inspect(tiny)) == root


def test_preflight_gives_every_sharding_the_same_root(tiny: Path, tmp_path: Path) -> None:
    root = write_manifest(tiny).root
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    (tiny / "model.safetensors").unlink()
    for path in (tmp_path / "sharded").glob("model*"):
        shutil.copy(path, tiny)
    assert (tiny / INDEX_FILE).is_file()
    assert len(list(tiny.glob("*.safetensors"))) > 2
    assert preflight(inspect(tiny)) == root


def test_preflight_names_a_missing_tensor(tiny: Path) -> None:
    edit_tensors(tiny, lambda tensors: tensors.pop(UP))
    (line,) = refusal_of(tiny).splitlines()
    assert f"tensor {UP}: is needed by LlamaForCausalLM" in line


def test_preflight_names_both_sides_of_a_renamed_tensor(tiny: Path) -> None:
    edit_tensors(tiny, lambda tensors: tensors.update({UP + "s": tensors.pop(UP)}))
    needed, unknown = refusal_of(tiny).splitlines()
    assert f"tensor {UP}: is needed" in needed
    assert f"tensor {UP}s: is unknown" in unknown


def test_preflight_names_an_extra_tensor(tiny: Path) -> None:
    edit_tensors(tiny, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(32, 16)}))
    (line,) = refusal_of(tiny).splitlines()
    assert "tensor model.layers.2.mlp.up_proj.weight: is unknown" in line


def test_preflight_lists_ten_tensors_and_counts_the_rest(tiny: Path) -> None:
    edit_json(tiny / "config.json", num_hidden_layers=4)
    lines = refusal_of(tiny).splitlines()
    assert len(lines) == 11
    assert "got 8." in lines[-1]


def test_preflight_names_a_tensor_of_the_wrong_shape(tiny: Path) -> None:
    edit_tensors(tiny, lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}))
    (line,) = refusal_of(tiny).splitlines()
    assert f"tensor {UP}: must have the shape" in line
    assert "(16, 32) instead of (32, 16)" in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16, torch.float8_e4m3fn])
def test_preflight_names_a_tensor_of_the_wrong_dtype(tiny: Path, dtype: torch.dtype) -> None:
    edit_tensors(tiny, lambda tensors: tensors.update({UP: torch.ones(32, 16, dtype=dtype)}))
    (line,) = refusal_of(tiny).splitlines()
    assert f"tensor {UP}: must have the dtype" in line


def test_preflight_allows_a_tensor_kept_in_float32(tiny: Path) -> None:
    edit_tensors(tiny, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}))
    preflight(inspect(tiny))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
def test_preflight_names_a_tensor_that_is_not_finite(tiny: Path, value: float, word: str) -> None:
    edit_tensors(tiny, lambda tensors: tensors[UP].view(-1)[5:7].fill_(value))
    (line,) = refusal_of(tiny).splitlines()
    assert f"tensor {UP}: must hold finite values only, got '{word} at element 5'" in line
    with pytest.raises(CheckpointError, match=UP):
        write_manifest(tiny)
    assert not (tiny / MANIFEST_FILE).exists()


def test_preflight_names_a_tensor_with_a_flipped_bit(tiny: Path) -> None:
    root = write_manifest(tiny).root
    flip_bit(tiny, UP)
    (line,) = refusal_of(tiny).splitlines()
    assert f"tensor {UP}: must have the SHA-256" in line
    (tiny / MANIFEST_FILE).unlink()
    assert preflight(inspect(tiny)) != root


def test_preflight_names_what_is_in_the_files_or_the_manifest_only(tiny: Path) -> None:
    edit_json(tiny / "config.json", tie_word_embeddings=True)
    write_manifest(tiny)
    edit_tensors(tiny, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tensor lm_head.weight: must be both" in refusal_of(tiny)


def test_preflight_refuses_a_manifest_whose_root_is_not_its_leaves(tiny: Path) -> None:
    write_manifest(tiny)
    edit_json(tiny / MANIFEST_FILE, root="0" * 64)
    assert f"{MANIFEST_FILE}: is damaged" in refusal_of(tiny)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_preflight_names_a_small_file_that_changed_after_the_manifest(tiny: Path, name: str) -> None:
    write_manifest(tiny)
    (tiny / name).write_bytes((tiny / name).read_bytes() + b"\n")
    (line,) = refusal_of(tiny).splitlines()
    assert f"{name}: must be the file" in line


def test_preflight_names_small_files_that_came_or_went_after_the_manifest(tiny: Path) -> None:
    write_manifest(tiny)
    (tiny / "generation_config.json").unlink()
    (tiny / "added_tokens.json").write_text("{}")
    came, went = refusal_of(tiny).splitlines()
    assert "added_tokens.json" in came
    assert "generation_config.json" in went


@pytest.mark.parametrize("tied", [True, False])
def test_preflight_lets_a_tensor_be_absent_only_if_tied(tiny: Path, tied: bool) -> None:
    edit_json(tiny / "config.json", tie_word_embeddings=tied)
    edit_tensors(tiny, lambda tensors: tensors.pop("lm_head.weight"))
    if tied:
        preflight(inspect(tiny))
    else:
        assert "tensor lm_head.weight: is needed" in refusal_of(tiny)


def test_preflight_ignores_the_rotary_buffer_of_old_checkpoints(tiny: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tiny, lambda tensors: tensors.update({name: torch.ones(2)}))
    preflight(inspect(tiny))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_model"},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["NoSuchForCausalLM"]},
        {"rope_parameters": {"rope_type": "no_such_rope"}},
        {"num_attention_heads": 3, "head_dim": None},
    ],
)
def test_preflight_refuses_an_architecture_it_cannot_build(tiny: Path, changes: dict[str, Any]) -> None:
    edit_json(tiny / "config.json", **changes)
    assert "config.json: architectures: must be" in refusal_of(tiny)


def test_preflight_names_what_another_architecture_would_need(tiny: Path) -> None:
    edit_json(tiny / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    assert "self_attn.q_proj.bias: is needed by Qwen2ForCausalLM" in refusal_of(tiny)


def test_preflight_reports_progress_up_to_all_the_bytes(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = inspect(tiny)
    preflight(checkpoint, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (checkpoint.weight_bytes, checkpoint.weight_bytes)


def test_preflight_knows_the_names_of_experts_on_disk(tmp_path: Path) -> None:
    save_model(Qwen3MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8), tmp_path)
    preflight(inspect(tmp_path))
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.pop(name))
    assert f"tensor {name}: is needed" in refusal_of(tmp_path)


def test_preflight_knows_the_scales_of_a_quantised_checkpoint(tiny: Path) -> None:
    edit_json(
        tiny / "config.json",
        quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]},
    )

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            blocks = [-(-size // 16) for size in tensors[name].shape]
            tensors[f"{name}_scale_inv"] = torch.ones(blocks)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_tensors(tiny, quantise)
    preflight(inspect(tiny))
    edit_tensors(tiny, lambda tensors: tensors.pop(f"{UP}_scale_inv"))
    (line,) = refusal_of(tiny).splitlines()
    assert f"tensor {UP}_scale_inv: is needed" in line


def test_prepare_refuses_another_checkpoint_than_the_one_agreed_on(tiny: Path) -> None:
    root, sets = preflight(inspect(tiny)), [f"model.path={tiny}", f"cluster.expect_root={'f' * 64}"]
    config = load(Path(__file__).parents[1] / "configs/demo-cpu.yaml", sets)
    with pytest.raises(CheckpointError, match=f"root must be {'f' * 64}, got {root}"):
        prepare(config)
