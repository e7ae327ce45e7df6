"""Writes the configuration reference, docs/configuration.md, from the models of a profile."""

from typing import Any, Final

from borg_serve.config import Config
from borg_serve.errors import shown

__all__ = ["reference"]

HEAD = """\
# Configuration

A profile is one YAML file. `--set key=value` changes a key, for example `--set server.port=8080`. `borg-serve check`
prints the effective settings, or every mistake at once. The folder `configs` has a profile for each kind of machine.

This page is generated: `borg-serve reference > docs/configuration.md`.
"""

TYPES: Final = {
    "string": "text",
    "number": "number",
    "integer": "integer",
    "boolean": "true or false",
    "array": "list",
    "object": "mapping",
}
BOUNDS: Final = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def reference() -> str:
    """Return the reference in Markdown: a table for each section with every key, its type, default and example."""
    schema = Config.model_json_schema()
    parts = [HEAD]
    for name, field in schema["properties"].items():
        if name == "engine":
            parts.append(f"## engine\n\n{_line(field['description'])}\n")
        elif name != "file":
            parts.append(_section(name, schema["$defs"][field["$ref"].rpartition("/")[2]], schema["$defs"]))
    return "\n".join(parts)


def _section(name: str, section: dict[str, Any], defs: dict[str, Any]) -> str:
    rows = [f"## {name}", "", _line(section["description"]), ""]
    rows += ["| Key | Type | Default | Example | What it does |", "|---|---|---|---|---|"]
    inner = []
    for key, field in section["properties"].items():
        kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
        default = "required" if key in section.get("required", []) else _code(field["default"])
        examples = _code(field["examples"][0]) if "examples" in field else ""
        types = " or ".join(map(_type, kinds))
        rows.append(f"| `{name}.{key}` | {types} | {default} | {examples} | {_line(field['description'])} |")
        inner += [
            _section(f"{name}.{key}", defs[kind["$ref"].rpartition("/")[2]], defs) for kind in kinds if "$ref" in kind
        ]
    return "\n".join([*rows, ""]) + "".join(f"\n{part}" for part in inner)


def _type(kind: dict[str, Any]) -> str:
    if "$ref" in kind:
        return "section"
    if "const" in kind or "enum" in kind:
        return " or ".join(_code(value) for value in kind.get("enum", [kind.get("const")]))
    bounds = [f"{sign} {kind[name]:g}" for name, sign in BOUNDS.items() if name in kind]
    return ", ".join(["path" if kind.get("format") == "path" else TYPES[kind["type"]], *bounds])


def _code(value: object) -> str:
    return "none" if value is None else f"`{value if isinstance(value, str) else shown(value)}`"


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
