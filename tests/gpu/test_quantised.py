"""Each quantised kind, served by a real engine on a GPU: the rounded weights answer as the whole ones do."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from borg_serve.checkpoint.manifest import MANIFEST_FILE
from tests import quantised

MODEL = os.environ.get("BORG_GPU_QWEN", "")
"""A real Qwen2.5 with its weights in one file; its layers have the sizes that the kernels for GPUs ask for."""
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and Path(MODEL, "config.json").is_file()),
    reason="needs a CUDA device, and BORG_GPU_QWEN to name a real Qwen2.5",
)
SETTINGS = (
    "--set=server.processes=1",
    "--set=engine.enforce_eager=true",
    "--set=engine.compilation_config=null",
    "--set=engine.gpu_memory_utilization=0.08",
    "--set=engine.kv_cache_memory_bytes=2147483648",
    "--set=engine.max_num_seqs=32",
)
PROFILE = Path(__file__).parents[2] / "configs" / "7b-h100.yaml"


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_quantised_kind_answers_on_a_gpu(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "GROUP", 128)
    monkeypatch.setitem(quantised.KINDS, kind, (quantised.grouped(kind, 128), quantised.KINDS[kind][1]))
    saved = shutil.copytree(MODEL, tmp_path / kind, ignore=shutil.ignore_patterns(MANIFEST_FILE))
    quantised.quantise(kind, saved)
    assert "Paris" in quantised.capital_of_france(tmp_path, f"--set=model.path={saved}", *SETTINGS, profile=PROFILE)
