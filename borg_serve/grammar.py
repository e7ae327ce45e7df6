"""What a client's JSON Schema may ask of the grammar compiler.

A schema that constrains decoding is compiled inside the engine, where a small one can cost seconds: its keywords,
references and counting cost are checked first. Knows JSON Schema 2020-12, and nothing of requests or tokenizers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["schema_problem"]

# Measured with xgrammar 0.2.8 and Qwen2.5's 151,936 tokens on two cores: 200 properties compile in 0.3 s, and the cost
# grows with their square; one `maxLength: 200` takes seconds, `maxLength: 10` 0.1 s; `(a|b|c){200}` fails to compile,
# and `.{5000}` blocks the parser, which runs in the API process, for 7 s.
MAX_DEPTH = 32
MAX_PROPERTIES = 256
MAX_BRANCHES = 128
MAX_ENUM_VALUES = 1024
MAX_PATTERN_LENGTH = 256
MAX_PATTERN_REPEATS = 128
MAX_COUNTED_CHARACTERS = 2048
COUNTED_PER_STRING = 256
INT64_MAX = 2**63 - 1

_SCHEMA = {
    "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
}  # fmt: skip
_SCHEMA_LIST = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SCHEMA_MAP = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
_COUNT = {
    "maxContains", "maxItems", "maxLength", "maxProperties", "minContains", "minItems", "minLength", "minProperties",
}  # fmt: skip
_NUMBER = {"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"}
_TEXT = {
    "$comment",
    "contentEncoding",
    "contentMediaType",
    "description",
    "format",
    "pattern",
    "title",
    "$id",
    "$ref",
    "$schema",
}
_FLAG = {"deprecated", "readOnly", "uniqueItems", "writeOnly"}
_LIST = {"enum", "examples"}
_NAMES = {"required"}
_UNSUPPORTED = {
    "$anchor",
    "$dynamicAnchor",
    "$dynamicRef",
    "$recursiveAnchor",
    "$recursiveRef",
    "$vocabulary",
    "dependencies",
}
_TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}
_REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def schema_problem(schemas: Mapping[str, Any]) -> tuple[str, str] | None:
    """Say what is wrong with schemas that are compiled together, or None when they may be.

    Takes them by place in the request; returns (place, `<pointer>: <what>`). Cost is counted over all of them.
    """
    nodes: list[dict[str, Any]] = []
    for place, schema in schemas.items():
        found = _nodes(schema)
        if isinstance(found, str):
            return place, found
        nodes += found
        if problem := _cost_problem(nodes):
            return place, problem
    return None


def _nodes(schema: Any) -> list[dict[str, Any]] | str:
    """Every schema object inside a schema, or what is wrong with one of them."""
    found: dict[str, dict[str, Any]] = {}
    waiting: list[tuple[str, Any, int]] = [("#", schema, 1)]
    while waiting:
        pointer, node, depth = waiting.pop()
        if isinstance(node, bool) and pointer != "#":
            continue
        if not isinstance(node, dict):
            return f"{pointer[:200]}: must be an object" + ("" if pointer == "#" else " or a boolean")
        if depth > MAX_DEPTH:
            return f"{pointer[:200]}: schemas may nest {MAX_DEPTH} deep"
        found[pointer] = node
        for keyword, value in node.items():
            if problem := _keyword_problem(keyword, value):
                return f"{pointer[:200]}: `{keyword[:40]}` {problem}"
        waiting.extend((f"{pointer}/{path}", child, depth + 1) for path, child in _children(node))
    for pointer, node in found.items():
        if "$ref" in node and node["$ref"] not in found:
            return f"{pointer[:200]}: `$ref` must point to a schema inside this document"
    return list(found.values())


def _children(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword, value in node.items():
        if keyword in _SCHEMA:
            yield keyword, value
        elif keyword in _SCHEMA_LIST:
            yield from ((f"{keyword}/{index}", child) for index, child in enumerate(value))
        elif keyword in _SCHEMA_MAP:
            yield from ((f"{keyword}/{_escape(name)}", child) for name, child in value.items())


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _keyword_problem(keyword: str, value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if keyword in _UNSUPPORTED:
        return "is not supported here"
    if keyword in _SCHEMA_LIST and not (isinstance(value, list) and value):
        return "must be a non-empty array of schemas"
    if keyword in _SCHEMA_MAP and not isinstance(value, dict):
        return "must be an object of schemas"
    if keyword in _COUNT and not (isinstance(value, int) and number and 0 <= value <= INT64_MAX):
        return "must be an integer from 0 on"
    if keyword in _NUMBER and not number:
        return "must be a number"
    if keyword == "multipleOf" and value <= 0:
        return "must be more than 0"
    if keyword in _TEXT and not isinstance(value, str):
        return "must be a string"
    if keyword in _FLAG and not isinstance(value, bool):
        return "must be true or false"
    if keyword in _LIST and not isinstance(value, list):
        return "must be an array"
    if keyword in _NAMES and not _names(value):
        return "must be an array of different strings"
    if keyword == "dependentRequired" and not (isinstance(value, dict) and all(map(_names, value.values()))):
        return "must be an object of arrays of different strings"
    if keyword == "type":
        kinds = value if isinstance(value, list) else [value]
        if not kinds or not _names(kinds) or not _TYPES.issuperset(kinds):
            return f"must be one or more of {', '.join(sorted(_TYPES))}"
    if keyword == "pattern":
        return _pattern_problem(value)
    if keyword == "patternProperties":
        return next(filter(None, map(_pattern_problem, value)), None)
    return None


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _pattern_problem(pattern: str) -> str | None:
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"may hold {MAX_PATTERN_LENGTH} characters, got {len(pattern)}"
    if _repeats(pattern) > MAX_PATTERN_REPEATS:
        return f"may repeat {MAX_PATTERN_REPEATS} times, all its counts multiplied"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return "must be a regular expression"
    return None


def _repeats(pattern: str) -> int:
    product = 1
    for low, high in _REPEAT.findall(pattern):
        # Seven digits are past every bound; `int` of thousands would be slow.
        product *= max(1, int(low[:7]), int(high[:7] or 0))
    return product


def _cost_problem(nodes: Sequence[dict[str, Any]]) -> str | None:
    properties = sum(len(node.get("properties", ())) + len(node.get("patternProperties", ())) for node in nodes)
    if properties > MAX_PROPERTIES:
        return f"#: may have {MAX_PROPERTIES} properties in all, got {properties}"
    branches = sum(
        len(node.get(keyword, ())) for node in nodes for keyword in ("allOf", "anyOf", "oneOf", "prefixItems")
    )
    if branches > MAX_BRANCHES:
        return f"#: may have {MAX_BRANCHES} branches in all, got {branches}"
    values = sum(len(node.get("enum", ())) for node in nodes)
    if values > MAX_ENUM_VALUES:
        return f"#: may have {MAX_ENUM_VALUES} enum values in all, got {values}"
    counted = sum(map(_counted, nodes))
    if counted > MAX_COUNTED_CHARACTERS:
        return (
            f"#: string lengths and pattern repeats may add up to {MAX_COUNTED_CHARACTERS} "
            f"({COUNTED_PER_STRING} at most for one string), got {counted}"
        )
    return None


def _counted(node: dict[str, Any]) -> int:
    patterns = [node["pattern"]] if "pattern" in node else []
    lengths = max(node.get("minLength", 0), node.get("maxLength", 0))
    return int(min(lengths, COUNTED_PER_STRING)) + sum(map(_repeats, [*patterns, *node.get("patternProperties", ())]))
