"""Writes profiles for tests, and collects what is wrong with them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from borg_serve.config import load
from borg_serve.errors import ConfigError, Problem

GOOD: dict[str, Any] = {"model": {"path": "/models/borg"}, "identity": {"prompt": "identity.md"}}


def write(folder: Path, document: object = GOOD) -> Path:
    (folder / "identity.md").write_text("We are Borg.")
    file = folder / "profile.yaml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return file


def problems(file: Path, *sets: str) -> dict[str, Problem]:
    """The problems by key, the file's name left out."""
    with pytest.raises(ConfigError) as caught:
        load(file, sets)
    found = {problem.where.removeprefix(f"{file}: "): problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return found
