"""A tiny Llama that transformers made, broken in every way a checkpoint breaks: each fault is refused by name."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from borg_serve.checkpoint.check import inspect, preflight, write_manifest
from borg_serve.checkpoint.files import INDEX_FILE
from borg_serve.checkpoint.locate import load_tokenizer, without_strays
from borg_serve.checkpoint.manifest import MANIFEST_FILE
from borg_serve.config import load
from borg_serve.engine.prepare import prepare
from borg_serve.errors import CheckpointError
from tests.tiny import SIZES, UP, edit_json, edit_tensors, refusal_of, save_model


def flip_bit(directory: Path, name: str) -> None:
    tensor = inspect(directory).tensors[name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.begin + 4)
        byte = file.read(1)[0]
        file.seek(tensor.begin + 4)
        file.write(bytes([byte ^ 1]))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.float8_e4m3fn])
def test_preflight_names_a_tensor_of_the_wrong_dtype(tiny: Path, dtype: torch.dtype) -> None:
    edit_tensors(tiny, lambda tensors: tensors.update({UP: torch.ones(32, 16, dtype=dtype)}))
    (line,) = refusal_of(tiny).splitlines()
    assert f"tensor {UP}: must have a dtype that" in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_preflight_allows_weights_in_another_float_than_the_configuration_says(tiny: Path, dtype: torch.dtype) -> None:
    edit_tensors(tiny, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
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


def test_preflight_takes_auto_map_of_an_architecture_that_transformers_has(tiny: Path) -> None:
    edit_json(tiny / "config.json", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"})
    edit_json(tiny / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]})
    (tiny / "evil.py").write_text("raise SystemExit('code from the checkpoint was run')")
    preflight(inspect(tiny))
    load_tokenizer(tiny)


def test_preflight_refuses_code_of_an_architecture_that_transformers_does_not_have(tiny: Path) -> None:
    edit_json(tiny / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    refusal = refusal_of(tiny)
    assert "config.json: auto_map: asks for code from the checkpoint, never run" in refusal
    assert "evil.EvilConfig" in refusal


def test_tokenizer_that_needs_code_is_refused(tiny: Path) -> None:
    edit_json(tiny / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    edit_json(tiny / "config.json", model_type="evil")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: auto_map: asks for code"):
        load_tokenizer(tiny)


def test_engine_does_not_see_an_adapter_beside_the_model(tiny: Path) -> None:
    assert without_strays(tiny) == tiny
    for name in ("adapter_model.safetensors", "consolidated.safetensors"):
        shutil.copy(tiny / "model.safetensors", tiny / name)
    preflight(inspect(tiny))
    seen = without_strays(tiny)
    assert {path.name for path in tiny.iterdir()} - {path.name for path in seen.iterdir()} == {
        "adapter_model.safetensors",
        "consolidated.safetensors",
    }
    assert (seen / "model.safetensors").samefile(tiny / "model.safetensors")


def test_prepare_refuses_another_checkpoint_than_the_one_agreed_on(tiny: Path) -> None:
    root, sets = preflight(inspect(tiny)), [f"model.path={tiny}", f"cluster.expect_root={'f' * 64}"]
    config = load(Path(__file__).parents[2] / "configs/demo-cpu.yaml", sets)
    with pytest.raises(CheckpointError, match=f"root must be {'f' * 64}, got {root}"):
        prepare(config)
