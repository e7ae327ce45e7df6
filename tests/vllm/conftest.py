"""A sound checkpoint to break."""

import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.tiny import SIZES, save_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    save_model(LlamaConfig(**SIZES), directory)
    return directory


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "tiny")
