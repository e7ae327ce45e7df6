"""A quantised checkpoint, served by a real engine: the demo's weights rounded answer as the demo does."""

import shutil
from pathlib import Path

import httpx
import pytest
import torch

from borg_serve.checkpoint.manifest import MANIFEST_FILE
from tests import quantised
from tests.engine.process import running

KIND = "awq" if torch.cpu._is_avx512_supported() else "int8"
"""vLLM's builds have the kernel for four bits on CPUs with AVX-512 only."""


def test_quantised_checkpoint_answers_as_the_whole_one_does(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("quantised")
    saved = shutil.copytree(checkpoint, folder / KIND, ignore=shutil.ignore_patterns(MANIFEST_FILE))
    quantised.quantise(KIND, saved)
    with running(folder, f"--set=model.path={saved}", "--set=model.dtype=bfloat16") as server:  # what the kernels have
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
        answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body | {"max_tokens": 12}, timeout=180)
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
