"""Sums of the ledger for a person or a program to read, and what may be asked for them.

It does not know the database.
"""

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from borg_serve.errors import ConfigError, Problem
from borg_serve.usage.ledger import COUNTS, GROUPS, Row

__all__ = ["Format", "groups", "moment", "this_month", "written"]

Format = Literal["table", "csv", "json"]


def groups(text: str) -> list[str]:
    """What `--by` names. Raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= GROUPS.keys() or len(set(names)) < len(names):
        cure = f"Name some of {', '.join(GROUPS)}, each once, for example --by key,day."
        raise ConfigError([Problem("--by", "is no list of groups", text, cure)])
    return names


def moment(option: str, text: str) -> datetime:
    """The day or the hour (UTC) that an option names. Raises ConfigError."""
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H"):
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
    cure = f"Name a day or an hour in UTC: {option} 2026-11-01, or {option} 2026-11-01T13."
    raise ConfigError([Problem(option, "is no day", text, cure)])


def this_month() -> datetime:
    """When this month (UTC) began."""
    return datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def written(rows: Sequence[Row], by: Sequence[str], form: Format) -> str:
    """The rows in a form, without a last line feed."""
    if form == "json":
        return json.dumps(rows, indent=2)
    names = [*by, *COUNTS]
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().rstrip("\n")
    lines = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(line, widths, len(by)) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    """The first `left` cells to the left, numbers to the right."""
    padded = zip(range(len(cells)), cells, widths, strict=True)
    return "  ".join(cell.ljust(width) if place < left else cell.rjust(width) for place, cell, width in padded)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
