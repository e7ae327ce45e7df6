"""The page's text and style are files beside its modules, and an installed package has them."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "borg_serve" / "chat_page"


def test_page_files_are_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["borg_serve.chat_page"]
    packaged = {path.name for pattern in patterns for path in FOLDER.glob(pattern)}
    assert packaged == {path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert packaged == {"about.md", "examples.txt", "page.css"}


def test_page_offers_seven_examples() -> None:
    examples = (FOLDER / "examples.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(examples)) == 7
    assert all(example.endswith((".", "?")) for example in examples)
