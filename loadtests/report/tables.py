"""Templates to text, the tables of reports, and the files of a report.

It knows the templates of this folder. It does not know what is reported.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from loadtests.report.bootstrap import Ratio

Bound = tuple[str, str, str, bool | None]
"""(figure, bound, measured, met or None for one without a bound)."""


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def bounds(rows: Iterable[Bound]) -> str:
    """A Markdown table of what was to be reached, what was measured, and whether it is met."""
    words = {True: "yes", False: "**no**", None: ""}
    return table(["figure", "bound", "measured", "met"], [(*row[:3], words[row[3]]) for row in rows])


def number(value: float | None) -> str:
    """A figure with four digits."""
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def render(template: str, data: Mapping[str, Any], **more: Any) -> str:
    """A template of this folder with the names of a document and these; what goes into HTML is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "median": median, "ratio": lambda found: str(Ratio(**found))}
    environment.globals |= {"table": table, "bounds": bounds}
    return environment.get_template(template).render(data, **more)


def write(folder: Path, name: str, document: Any, text: str) -> None:
    """Write a report for a person (`name`.md) and its JSON twin (`name`.json), and print the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
