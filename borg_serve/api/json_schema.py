"""What a client's JSON Schema may ask of the grammar compiler.

A schema that constrains decoding is followed or refused, never ignored: its keywords, references and cost are checked
before it is compiled. Knows JSON Schema 2020-12, and nothing of requests or tokenizers.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from borg_serve.api.schema_grammar import (
    EXACT,
    FORMATS,
    LOWER,
    MAX_ITEMS,
    SCHEMA_LIST,
    SCHEMA_MAP,
    UPPER,
    children,
    pattern_refusal,
    refusal,
)

__all__ = ["schema_problem"]

# Measured with llguidance 1.7 on two cores: 256 properties compile in 50 ms, and lengths of strings cost nothing. The
# time for the bounds of arrays grows with their square (10^6: 16 s), for `multipleOf` with its digits (99,991: 5 s); a
# mask for `.*a.{60}` takes 19 ms.
MAX_DEPTH = 32
MAX_PROPERTIES = 256
MAX_BRANCHES = 128
MAX_ENUM_VALUES = 1024
MAX_PATTERN_LENGTH = 256
MAX_PATTERN_REPEATS = 128
MAX_REPEATS = 2048
FORMAT_REPEATS = 16
MAX_ITEMS_IN_ALL = 4096
MAX_MULTIPLE = 10_000
MAX_NUMBER = 1e300
INT64_MAX = 2**63 - 1
_COUNT = {
    "maxContains", "maxItems", "maxLength", "maxProperties", "minContains", "minItems", "minLength", "minProperties",
}  # fmt: skip
_NUMBER = LOWER | UPPER | {"multipleOf"}
_TEXT = {
    "$comment", "$id", "$ref", "$schema", "contentEncoding", "contentMediaType", "description", "format", "pattern",
    "title",
}  # fmt: skip
_FLAG = {"deprecated", "readOnly", "uniqueItems", "writeOnly"}
_LIST = {"enum", "examples"}
_NAMES = {"required"}
_UNSUPPORTED = {
    "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "$vocabulary", "dependencies",
}  # fmt: skip
_UNENFORCED = {
    "contains", "dependentRequired", "dependentSchemas", "else", "if", "not", "then", "unevaluatedItems",
}  # fmt: skip
_IN_PLACE = {"$ref", "allOf", "anyOf", "oneOf"}
_TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}
_REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_NESTED_CLASS = re.compile(r"\[\^?\]?[^\]]*?(?:\[|&&|--|~~)")
"""Sets in a character class, which the compiler's regular expressions have and those of JSON Schema do not."""


def schema_problem(schemas: Mapping[str, Any]) -> tuple[str, str] | None:
    """Say what is wrong with schemas that are compiled together, or None when every one of them is enforced.

    Takes them by place in the request; returns (place, `<pointer>: <what>`). Cost is counted over all of them.
    """
    nodes: list[dict[str, Any]] = []
    for place, schema in schemas.items():
        found = _nodes(schema)
        if isinstance(found, str):
            return place, found
        nodes += found
        if problem := _cost_problem(nodes) or refusal(schema):
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
        waiting.extend((f"{pointer}/{path}", child, depth + 1) for path, child in children(node))
    for pointer, node in found.items():
        if "$ref" in node and node["$ref"] not in found:
            return f"{pointer[:200]}: `$ref` must point to a schema inside this document"
        for keyword, value in node.items():
            if problem := _unenforced(keyword, value, node):
                return f"{pointer[:200]}: `{keyword}` {problem}"
    if circle := _circle(found):
        return f"{circle[:200]}: must not refer to itself without a property or an item between"
    return list(found.values())


def _circle(found: Mapping[str, dict[str, Any]]) -> str | None:
    """Pointer to a schema that is part of itself, at the same place of the value: no value ends its check."""
    ended: set[str] = set()
    for start in found:
        path: list[str] = []
        waiting = [(start, False)]
        while waiting:
            pointer, left = waiting.pop()
            if left:
                ended.add(path.pop())
            elif pointer in path:
                return pointer
            elif pointer not in ended:
                path.append(pointer)
                waiting.append((pointer, True))
                waiting += [(inner, False) for inner in _in_place(pointer, found[pointer])]
    return None


def _in_place(pointer: str, node: Mapping[str, Any]) -> Iterator[str]:
    """Pointers to the schemas that the same value must follow."""
    if "$ref" in node:
        yield node["$ref"]
    for keyword in ("allOf", "anyOf", "oneOf"):
        for index, child in enumerate(node.get(keyword, ())):
            if isinstance(child, dict):
                yield f"{pointer}/{keyword}/{index}"


def _keyword_problem(keyword: str, value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if keyword in _UNSUPPORTED:
        return "is not supported here"
    if keyword in SCHEMA_LIST and not (isinstance(value, list) and value):
        return "must be a non-empty array of schemas"
    if keyword in SCHEMA_MAP and not isinstance(value, dict):
        return "must be an object of schemas"
    if keyword in _COUNT and not (isinstance(value, int) and number and 0 <= value <= INT64_MAX):
        return "must be an integer from 0 on"
    if keyword in _NUMBER and not (number and abs(value) <= MAX_NUMBER):
        return f"must be a number from -{MAX_NUMBER} to {MAX_NUMBER}"
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


def _unenforced(keyword: str, value: Any, node: Mapping[str, Any]) -> str | None:
    """Why the engine would not hold the answer to a keyword; None if it does, or if there is nothing to hold."""
    what = "cannot be enforced here: remove it, or describe it in words"
    if keyword in _UNENFORCED or (keyword == "uniqueItems" and value):
        return what
    if keyword == "propertyNames" and value not in (True, {}, {"type": "string"}):
        return what
    if keyword == "unevaluatedProperties" and value is not True and not _IN_PLACE.isdisjoint(node):
        return f"{what}. Beside {', '.join(sorted(_IN_PLACE & node.keys()))} only `true` can be"
    if keyword == "minProperties" and value > 1 + len(node.get("required", ())):
        return "may be one more than there are required properties, because the engine may write a name twice"
    if keyword in {"const", "enum"} and any(abs(number) > EXACT for number in _numbers(value)):
        return f"may have numbers up to {EXACT}"
    return None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _pattern_problem(pattern: str) -> str | None:
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"may hold {MAX_PATTERN_LENGTH} characters, got {len(pattern)}"
    if _repeats(pattern) > MAX_PATTERN_REPEATS:
        return f"may repeat {MAX_PATTERN_REPEATS} times, all its counts multiplied"
    if _NESTED_CLASS.search(re.sub(r"\\.", "", pattern)):
        return "must escape `[`, `&&`, `--` and `~~` inside a character class"
    reason = pattern_refusal(pattern)
    return reason and f"cannot be enforced: {reason}"


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
    repeats = sum(map(_pattern_repeats, nodes))
    if repeats > MAX_REPEATS:
        return f"#: pattern repeats may add up to {MAX_REPEATS} ({FORMAT_REPEATS} for a format), got {repeats}"
    items = sum(map(_items, nodes))
    if items > MAX_ITEMS_IN_ALL:
        return (
            f"#: sizes of arrays and objects may add up to {MAX_ITEMS_IN_ALL} "
            f"(a maximum counts for {MAX_ITEMS} at most), got {items}"
        )
    multiple = math.prod({_digits(node["multipleOf"]) for node in nodes if "multipleOf" in node})
    if multiple > MAX_MULTIPLE:
        return f"#: the digits of all `multipleOf` may multiply to {MAX_MULTIPLE}, got {str(multiple)[:20]}"
    return None


def _pattern_repeats(node: dict[str, Any]) -> int:
    patterns = [node["pattern"]] if "pattern" in node else []
    own = FORMAT_REPEATS if node.get("format") in FORMATS else 0
    return own + sum(map(_repeats, [*patterns, *node.get("patternProperties", ())]))


def _items(node: dict[str, Any]) -> int:
    most = [min(node.get(keyword, 0), MAX_ITEMS) for keyword in ("maxItems", "maxProperties")]
    return int(sum(most) + node.get("minItems", 0) + node.get("minProperties", 0))


def _digits(number: float) -> int:
    """The significant digits of a number: 5 for 0.05 and for 500."""
    return int("".join(map(str, Decimal(repr(number)).normalize().as_tuple().digits)))
