"""docs/upstream.md holds every private name of vLLM and Ray that the package uses, and each is where it says."""

import inspect
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from borg_serve.engine.environment import device, prepare_environment
from tests.names import LIBRARIES, PAGE, PUBLIC, ROOT, Package, Row, Use, covers, rows
from tests.surface import Sources

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = rows(TEXT)
FILES = sorted(str(path.relative_to(ROOT / "borg_serve")) for path in (ROOT / "borg_serve").rglob("*.py"))

ONLY_CUDA = {"vllm.v1.attention.backends.fa_utils:flash_attn_varlen_func"}
"""Names that vLLM's build for CPUs has in its source, but does not import."""


def site(library: str) -> Path:
    """The folder that an installed package is in."""
    spec = find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


@cache
def package() -> Package:
    return Package(ROOT / "borg_serve", Sources(**{library: site(library) for library in LIBRARIES}))


def private(file: str) -> list[Use]:
    return [use for use in package().uses[file] if not use.is_public()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.name))
def test_upstream_name_is_in_the_installed_source(row: Row) -> None:
    assert package().sources.problem(row.name) is None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.name))
def test_upstream_name_can_be_imported(row: Row) -> None:
    """Attributes that only instances have are left to the test of the source."""
    if device() == "cpu" and str(row.name).partition("(")[0] in ONLY_CUDA:
        pytest.skip("only vLLM's CUDA build has it")
    prepare_environment()
    found: Any = import_module(row.name.module)
    for part in row.name.path.split("."):
        if isinstance(found, type) and not hasattr(found, part):
            return
        found = getattr(found, part)
    if row.name.parameters:
        parameters = inspect.signature(found).parameters
        anything = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        assert anything or set(row.name.parameters) <= set(parameters)


@pytest.mark.parametrize("file", FILES)
def test_upstream_lists_what_a_file_uses(file: str) -> None:
    here = [row.name for row in ROWS if file in row.files]
    missing = [
        f"{file}:{use.line}: {use.name}" for use in private(file) if not any(covers(name, use.name) for name in here)
    ]
    assert missing == []


@pytest.mark.parametrize("file", FILES)
def test_upstream_takes_every_keyword_that_a_file_passes(file: str) -> None:
    """Public names included: a renamed parameter is found before a start."""
    passed = [use for use in package().uses[file] if use.name.parameters]
    assert [f"{use.line}: {problem}" for use in passed if (problem := package().sources.problem(use.name))] == []


def test_upstream_walk_finds_what_is_surely_there() -> None:
    found = {str(use.name) for file in FILES for use in private(file)}
    assert "vllm.v1.engine.async_llm:AsyncLLM" in found
    assert "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter._routing_key" in found
    assert len(found) > 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.name))
def test_upstream_row_is_true(row: Row) -> None:
    assert row.files
    assert row.why.endswith(".")
    assert row.issue == "none found" or re.fullmatch(
        r"(?:\[[\w-]+#\d+\]\(https://github\.com/[\w/-]+\d+\)(?:, )?)+", row.issue
    )
    last = row.name.path.rpartition(".")[2]
    for file in row.files:
        assert re.search(rf"\b{last}\b", (ROOT / "borg_serve" / file).read_text(encoding="utf-8")), file
    assert row.tests
    for test in row.tests:
        path, _, name = test.partition("::")
        assert re.search(rf"^(?:async )?def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), test


def test_upstream_names_no_name_twice() -> None:
    names = [(row.name.module, row.name.path) for row in ROWS]
    assert sorted(names) == names, "sorted, so that a name is found"
    assert len(set(names)) == len(names)


def test_upstream_says_which_modules_are_public() -> None:
    listed = TEXT.split("Public are ")[1].split(". ")[0]
    assert set(re.findall(r"`([\w.]+)`", TEXT[TEXT.index("Public are ") :].split("\n\n")[0])) == PUBLIC, listed


def test_upstream_lists_at_most_four_patches() -> None:
    table = TEXT.split("## Patches")[1].split("\n## ")[0]
    patches = re.findall(r"^\| `([\w.:]+)`", table, re.MULTILINE)
    assert len(patches) <= 4
    assert set(patches) <= {str(row.name).partition("(")[0] for row in ROWS}
