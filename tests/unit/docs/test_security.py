"""docs/security.md names a test for every row, and every test it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`")
VECTORS = "tests/engine/test_vectors*.py"
"""Where the tests are that the page names without a folder."""


def rows() -> list[str]:
    """Return the rows of the tables that map something to tests."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        head, _, *body = table.splitlines()
        if head.rstrip("| ").endswith("test"):
            found += body
    return found


def test_security_page_names_a_test_in_every_row_of_its_three_tables() -> None:
    assert len(rows()) >= 30
    assert [row for row in rows() if not NAMED.search(row.split("|")[-2])] == []


def test_security_page_names_only_tests_that_exist() -> None:
    missing = []
    for file, name in NAMED.findall(PAGE):
        texts = [path.read_text() for path in ROOT.glob(file or VECTORS)]
        if not any(re.search(rf"^(?:async )?def {name}\(", text, re.MULTILINE) for text in texts):
            missing.append(f"{file or VECTORS}::{name}")
    assert missing == []


def test_security_page_names_every_vector_that_is_tried() -> None:
    texts = "".join(path.read_text() for path in ROOT.glob(VECTORS))
    tried = set(re.findall(r"^def (test_vector_\w+)\(", texts, re.MULTILINE))
    assert len(tried) > 20
    assert tried - {name for _, name in NAMED.findall(PAGE)} == set()


def test_security_page_names_only_modules_that_exist() -> None:
    table = PAGE.split("| layer |")[1].split("\n\n")[0]
    modules = re.findall(r"`([\w/]+\.py)`", table)
    assert len(modules) > 10
    assert [name for name in modules if not (ROOT / "borg_serve" / name).is_file()] == []
