"""Files and functions are bounded in length; ruff and import-linter hold the rest."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file for folder in ("borg_serve", "loadtests", "tests", "examples") for file in (ROOT / folder).rglob("*.py")
)
FILE_LINES = 350
FUNCTION_LINES = 60
PACKAGE_LINES = {"borg_serve": 14_111, "loadtests": 5_577}
"""The whole of a package: a feature that adds lines takes others out, or raises this number with its reason."""


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes_of_a_file_and_its_functions_are_bounded(file: Path) -> None:
    assert lines(file) < FILE_LINES
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, f"{node.name} in line {node.lineno}"


@pytest.mark.parametrize("package", PACKAGE_LINES)
def test_sizes_of_a_package_are_bounded(package: str) -> None:
    assert sum(map(lines, (ROOT / package).rglob("*.py"))) <= PACKAGE_LINES[package]
