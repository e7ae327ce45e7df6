"""Quantised checkpoints as people have them: each kind is taken, and what is missing in one is named."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from borg_serve.checkpoint.check import inspect, preflight, write_manifest
from borg_serve.engine.quantised import layers, served_layers
from borg_serve.errors import CheckpointError, EngineError
from tests import quantised
from tests.tiny import UP, edit_json, edit_tensors

LAYER = UP.removesuffix(".weight")
NEEDED = {
    "awq": ["qweight", "qzeros", "scales"],
    "gptq": ["qweight", "qzeros", "scales"],
    "fp8-static": ["weight", "weight_scale", "input_scale"],
    "fp8-dynamic": ["weight", "weight_scale"],
    "fp8-blocks": ["weight", "weight_scale_inv"],
    "int4": ["weight_packed", "weight_scale", "weight_shape"],
    "int8": ["weight", "weight_scale"],
    "fp8-channels": ["weight", "weight_scale"],
}
PACKED = ["awq", "gptq", "int4"]
"""Kinds whose kernel is in vLLM's builds for AVX-512 only."""
REFUSED = ["fp8-static", "fp8-dynamic", "nvfp4", *([] if torch.cpu._is_avx512_supported() else PACKED)]
SERVED = sorted({"int8", "fp8-channels", *PACKED} - set(REFUSED))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint of each kind."""
    parent = tmp_path_factory.mktemp("quantised")
    for kind in quantised.KINDS:
        quantised.save(kind, parent / kind)
    return parent


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        preflight(inspect(directory), quantised=layers)
    return str(caught.value)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_quantised_checkpoint_of_each_kind_is_taken(saved: Path, kind: str) -> None:
    directory = saved / kind
    assert write_manifest(directory).root == preflight(inspect(directory), quantised=layers)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NEEDED.items() for name in names])
def test_quantised_layer_that_lacks_a_tensor_is_named(saved: Path, tmp_path: Path, kind: str, name: str) -> None:
    directory = shutil.copytree(saved / kind, tmp_path / kind, ignore=shutil.ignore_patterns("borg-manifest.json"))
    edit_tensors(directory, lambda tensors: tensors.pop(f"{LAYER}.{name}"))
    (line,) = refusal(directory).splitlines()
    assert f"tensor {LAYER}.{name}: is needed by LlamaForCausalLM" in line


@pytest.mark.parametrize("kind", SERVED)
def test_quantised_kind_is_served_on_a_cpu(saved: Path, kind: str) -> None:
    preflight(inspect(saved / kind), quantised=served_layers)


@pytest.mark.parametrize("kind", REFUSED)
def test_quantised_kind_that_this_cpu_cannot_compute_is_refused_before_the_start(saved: Path, kind: str) -> None:
    with pytest.raises(EngineError, match=r"quantization_config: vLLM cannot serve it on this device \(cpu\), got "):
        preflight(inspect(saved / kind), quantised=served_layers)


def test_quantised_layer_without_a_kernel_here_must_at_least_be_there(saved: Path, tmp_path: Path) -> None:
    kind = "nvfp4"
    directory = shutil.copytree(saved / kind, tmp_path / kind, ignore=shutil.ignore_patterns("borg-manifest.json"))
    edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(LAYER)])
    assert f"tensor {LAYER}.*: is needed" in refusal(directory)


def test_quantised_layer_that_is_not_quantised_is_refused_unless_it_is_ignored(saved: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved / "fp8-dynamic", tmp_path / "fp8", ignore=shutil.ignore_patterns("*manifest*"))

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{LAYER}.weight_scale"]
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].half()

    edit_tensors(directory, widen)
    assert f"tensor {LAYER}.weight_scale: is needed" in refusal(directory)
    config = inspect(directory).config["quantization_config"]
    edit_json(directory / "config.json", quantization_config={**config, "modules_to_not_convert": [LAYER]})
    preflight(inspect(directory), quantised=layers)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gptq", {"desc_act": True}, "desc_act=True"),
        ("awq", {"bits": 3}, "num_bits"),
        ("awq", {"quant_method": "no-such-method"}, "Invalid quantization method"),
    ],
)
def test_quantised_checkpoint_that_vllm_cannot_load_is_refused_in_its_words(
    saved: Path, tmp_path: Path, kind: str, changes: dict[str, object], reason: str
) -> None:
    directory = shutil.copytree(saved / kind, tmp_path / kind, ignore=shutil.ignore_patterns("*manifest*"))
    config = inspect(directory).config["quantization_config"]
    edit_json(directory / "config.json", quantization_config={**config, **changes})
    line = refusal(directory)
    assert "config.json: quantization_config: must be one that vLLM can load" in line
    assert reason in line


def test_quantised_checkpoint_is_not_served_in_a_dtype_that_its_kernels_do_not_have(saved: Path) -> None:
    checkpoint = inspect(saved / "awq")
    with pytest.raises(EngineError, match=r"model\.dtype: must be float16 or bfloat16 with .*, got 'float32'"):
        preflight(checkpoint, quantised=partial(served_layers, dtype="float32"))
