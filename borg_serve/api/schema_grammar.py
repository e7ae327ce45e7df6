"""The schema that the grammar compiler gets for a client's, and why it refuses one.

The compiler is llguidance, through vLLM's backend `guidance`: it refuses what it does not enforce. Knows the keywords
that it has, and nothing of requests.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import llguidance

__all__ = [
    "EQUAL_PATTERNS",
    "EXACT",
    "FORMATS",
    "LOWER",
    "MAX_ITEMS",
    "SCHEMA",
    "SCHEMA_LIST",
    "SCHEMA_MAP",
    "UPPER",
    "children",
    "enforced",
    "pattern_refusal",
    "refusal",
    "without_look_ahead",
]

MAX_ITEMS = 1024
"""Greater maxima of arrays and objects are lowered to it: the time to compile them grows with their square."""
EXACT = 2**53
"""Past it not every integer is a double, and the compiler computes with doubles."""
WIDEST = 2**63 - 1024
"""The greatest double that is a 64-bit integer."""
FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})
"""Formats that are enforced; every other one is an annotation."""

SCHEMA = {
    "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
}  # fmt: skip
SCHEMA_LIST = {"allOf", "anyOf", "oneOf", "prefixItems"}
SCHEMA_MAP = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
LOWER = {"exclusiveMinimum", "minimum"}
UPPER = {"exclusiveMaximum", "maximum"}
EQUAL_PATTERNS = {
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^([A-Za-z0-9_'+-]+\.)*[A-Za-z0-9_'+-]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"
    )
}
"""Zod's `z.email()`, without the negative look-ahead that the compiler does not have."""
_LOWERED = {"maxItems": MAX_ITEMS, "maxProperties": MAX_ITEMS, "maxLength": 1_000_000}
_ENFORCED = (
    {"$ref", "const", "enum", "maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"}
    | {"additionalProperties", "items", "pattern", "required", "type", "$defs", "definitions"}
    | {"patternProperties", "properties", "multipleOf"}
    | LOWER
    | UPPER
    | SCHEMA_LIST
)


def enforced(schema: dict[str, Any], root: str = "#") -> dict[str, Any]:
    """Return the schema that the compiler gets: nothing that it would ignore, every value valid under `schema` too.

    `schema` has passed `schema_problem`. Its references point below `root` afterwards. What is left out is annotations,
    unknown names, unknown formats, and keywords that allow everything. Order is kept: answers come in it.
    """
    kept: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in SCHEMA_MAP & _ENFORCED:
            kept[keyword] = {name: _enforced(child, root) for name, child in value.items()}
        elif keyword in SCHEMA_LIST:
            kept[keyword] = [_enforced(child, root) for child in value]
        elif keyword in SCHEMA & _ENFORCED:
            kept[keyword] = _enforced(value, root)
        elif keyword == "unevaluatedProperties":
            # Beside nothing that evaluates properties elsewhere; `_unenforced` sees to that.
            kept.setdefault("additionalProperties", _enforced(value, root))
        elif keyword == "$ref":
            kept[keyword] = root + value[1:]
        elif keyword in LOWER | UPPER:
            kept[keyword] = _double(value, up=keyword in LOWER)
        elif keyword in _LOWERED:
            kept[keyword] = min(value, _LOWERED[keyword])
        elif keyword in _ENFORCED or (keyword == "format" and value in FORMATS):
            kept[keyword] = value
    if "pattern" in kept:
        *ahead, kept["pattern"] = without_look_ahead(kept["pattern"])
        if ahead:
            kept["allOf"] = [*kept.get("allOf", ()), *({"pattern": pattern} for pattern in ahead)]
    return kept


def _enforced(schema: dict[str, Any] | bool, root: str) -> dict[str, Any] | bool:
    return schema if isinstance(schema, bool) else enforced(schema, root)


def without_look_ahead(pattern: str) -> list[str]:
    """Return patterns that all hold where `pattern` does: `^(?=A)(?=B)C` is `^(?:A)`, `^(?:B)` and `^C`."""
    patterns, rest = [], EQUAL_PATTERNS.get(pattern, pattern)
    if any(character == "|" and depth == 0 for _, character, depth in _depths(rest)):
        return [rest]
    while rest.startswith("^(?="):
        end = next((index for index, character, depth in _depths(rest) if character == ")" and depth == 0), None)
        if end is None:
            break
        patterns.append(f"^(?:{rest[4:end]})")
        rest = f"^{rest[end + 1 :]}"
    return [*patterns, rest]


def _depths(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Place and character of what is neither escaped nor in a class, and how many groups are open behind it."""
    depth = 0
    for found in re.finditer(r"\\.|\[(?:\\.|[^\]\\])*\]|.", pattern, re.DOTALL):
        if len(found[0]) == 1:
            depth += (found[0] == "(") - (found[0] == ")")
            yield found.start(), found[0], depth


def _double(bound: float, up: bool) -> float:
    """The bound, or the nearest double that is no wider a bound and that the compiler can write a range to."""
    bound = max(bound, -WIDEST) if up else min(bound, WIDEST)
    near = float(bound)
    if near < bound if up else near > bound:
        near = math.nextafter(near, math.inf if up else -math.inf)
    return int(near) if near.is_integer() else near


@cache
def _tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


def _compile(schema: str) -> str:
    """Compile as the engine does, with single bytes for tokens; why it cannot be, or ""."""
    matcher = llguidance.LLMatcher(_tokenizer(), llguidance.LLMatcher.grammar_from_json_schema(schema), log_level=0)
    lines = matcher.get_error().splitlines()
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "".join(lines[:1]))
    if reason.startswith("oneOf"):
        return "`oneOf` is enforced only where its branches exclude each other. Use `anyOf`"
    return reason.replace("Unsatisfiable schema", "no value fits")[:200]


def pattern_refusal(pattern: str) -> str | None:
    """The compiler's reason against a pattern alone: in a schema it reads only those that a value can meet."""
    reasons = (_compile(json.dumps({"type": "string", "pattern": part})) for part in without_look_ahead(pattern))
    return next(filter(None, reasons), None)


def refusal(schema: dict[str, Any]) -> str | None:
    """The compiler's reason against a schema, after the pointer to the innermost part that it holds against."""
    reason = _compile(json.dumps(enforced(schema)))
    if not reason:
        return None
    whole = enforced(schema, "#/$defs/root")
    pointer, inner = "#", schema
    while found := next(
        (
            (f"{pointer}/{path}", child)
            for path, child in children(inner)
            if isinstance(child, dict)
            and _compile(json.dumps({"$defs": {"root": whole}, "$ref": f"#/$defs/root{pointer[1:]}/{path}"})) == reason
        ),
        None,
    ):
        pointer, inner = found
    return f"{pointer[:200]}: {reason}"


def children(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword, value in node.items():
        if keyword in SCHEMA:
            yield keyword, value
        elif keyword in SCHEMA_LIST:
            yield from ((f"{keyword}/{index}", child) for index, child in enumerate(value))
        elif keyword in SCHEMA_MAP:
            yield from ((f"{keyword}/{_escape(name)}", child) for name, child in value.items())


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
