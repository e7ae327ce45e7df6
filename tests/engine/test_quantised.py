"""A quantised checkpoint, served by a real engine: the demo's weights rounded answer as the demo does."""

import shutil
from pathlib import Path

import pytest
import torch

from borg_serve.checkpoint.manifest import MANIFEST_FILE
from tests import quantised

KIND = "awq" if torch.cpu._is_avx512_supported() else "int8"
"""vLLM's builds have the kernel for four bits on CPUs with AVX-512 only."""


def test_quantised_checkpoint_answers_as_the_whole_one_does(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("quantised")
    saved = shutil.copytree(checkpoint, folder / KIND, ignore=shutil.ignore_patterns(MANIFEST_FILE))
    quantised.quantise(KIND, saved)
    what_its_kernels_have = "--set=model.dtype=bfloat16"
    assert "Paris" in quantised.capital_of_france(folder, f"--set=model.path={saved}", what_its_kernels_have)
