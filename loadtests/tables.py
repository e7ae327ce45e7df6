"""The tables of the reports (what was to be reached, what was measured, whether it is met), and the reports' files."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["figures", "table", "write"]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figures(rows: Iterable[tuple[str, str, str, bool | None]]) -> str:
    """(figure, bound, measured, met or None for one without a bound) -> a Markdown table."""
    words = {True: "yes", False: "**no**", None: ""}
    return table(
        ["figure", "bound", "measured", "met"], [(name, bound, got, words[met]) for name, bound, got, met in rows]
    )


def write(folder: Path, name: str, document: Any, text: str) -> None:
    """Write a report for a person (`name`.md) and its JSON twin (`name`.json), and print the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
