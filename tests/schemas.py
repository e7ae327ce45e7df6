"""JSON Schemas for tests: real ones with texts that fit and texts that do not, and a strategy for any."""

from typing import Any, NamedTuple

from hypothesis import strategies as st


class Case(NamedTuple):
    """A schema that is enforced: the engine can write every one of `fits`, and none of `misfits`."""

    schema: dict[str, Any]
    fits: list[str]
    misfits: list[str]


INTEGER = {"type": "integer"}


def only(name: str, schema: Any, **more: Any) -> dict[str, Any]:
    """An object with one property and no other."""
    return {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False} | more


CASES = {
    "pattern anywhere": Case(only("p", {"pattern": "[0-9]{2}"}), ['{"p":"ab12cd"}', '{"p":"12"}'], ['{"p":"ab"}']),
    "pattern whole": Case(only("p", {"pattern": "^x$"}), ['{"p":"x"}', '{"p":3}'], ['{"p":"abc"}']),
    "pattern with look-ahead": Case(
        only("p", {"pattern": r"^(?=.*[A-Z])(?=.*(?:\d|[)_]|\)))[^ ]{4,8}$", "allOf": [{"maxLength": 7}]}),
        ['{"p":"Ab12"}', '{"p":"aaA)"}', '{"p":"A______"}'],
        ['{"p":"aaaa"}', '{"p":"AAAA"}', '{"p":"A1 aa"}', '{"p":"Ab123456"}', '{"p":"Ab1"}'],
    ),
    "allOf of one $ref": Case(
        only("a", {"allOf": [{"$ref": "#/$defs/E"}]}, **{"$defs": {"E": {"enum": ["x", "y"]}}}),
        ['{"a":"x"}'],
        ['{"a":"z"}'],
    ),
    "allOf of two objects": Case(
        {
            "allOf": [
                {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                {"type": "object", "properties": {"b": INTEGER}, "required": ["b"]},
            ]
        },
        ['{"a":1,"b":2}', '{"a":1,"b":2,"c":""}'],
        ['{"a":1}', '{"b":1}', "null"],
    ),
    "anyOf of required": Case(
        {
            "type": "object",
            "properties": {"a": INTEGER, "b": INTEGER},
            "additionalProperties": False,
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        ['{"a":1}', '{"b":1}', '{"a":1,"b":1}'],
        ["{}", '{"c":1}'],
    ),
    "beside $ref": Case(
        only("a", {"$ref": "#/$defs/S", "maxLength": 2}, **{"$defs": {"S": {"type": "string"}}}),
        ['{"a":"ab"}'],
        ['{"a":"abc"}', '{"a":1}'],
    ),
    "beside anyOf": Case(
        only("a", {"anyOf": [{"type": "string"}, {"type": "null"}], "maxLength": 2}),
        ['{"a":"ab"}', '{"a":null}'],
        ['{"a":"abc"}', '{"a":1}'],
    ),
    "oneOf told apart": Case(
        {"oneOf": [only("k", {"const": "x"}), only("k", {"const": "y"})], "discriminator": {"propertyName": "k"}},
        ['{"k":"x"}', '{"k":"y"}'],
        ['{"k":"z"}', "{}"],
    ),
    "bounds of one type of two": Case(
        only("a", {"type": ["integer", "null"], "minimum": 0, "maximum": 5}),
        ['{"a":3}', '{"a":null}'],
        ['{"a":-1}', '{"a":6}', '{"a":"x"}'],
    ),
    "enum of two types": Case(
        only("a", {"type": ["string", "null"], "enum": ["x", None]}), ['{"a":"x"}', '{"a":null}'], ['{"a":"abc"}']
    ),
    "enum against its type": Case(only("a", {"type": "integer", "enum": [1, "x"]}), ['{"a":1}'], ['{"a":"x"}']),
    "maxLength without a type": Case(only("a", {"maxLength": 2}), ['{"a":"ab"}', '{"a":true}'], ['{"a":"abc"}']),
    "minLength": Case(only("a", {"type": "string", "minLength": 2}), ['{"a":"xx"}', '{"a":"é\\n"}'], ['{"a":"x"}']),
    "multipleOf": Case(only("a", {"multipleOf": 0.05}), ['{"a":0.15}', '{"a":"x"}'], ['{"a":0.07}']),
    "int64": Case(
        only("a", {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}),
        ['{"a":-5}', '{"a":9007199254740993}'],
        ['{"a":9223372036854775808}', '{"a":-9223372036854775809}'],
    ),
    "maxProperties": Case(
        {"type": "object", "additionalProperties": INTEGER, "maxProperties": 1}, ['{"a":1}', "{}"], ['{"a":1,"b":2}']
    ),
    "unevaluatedProperties": Case(
        {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "unevaluatedProperties": False},
        ['{"a":1}'],
        ['{"a":1,"z":2}'],
    ),
    "patternProperties": Case(
        {"patternProperties": {"^x": INTEGER}, "additionalProperties": False}, ['{"x":1}'], ['{"y":1}', '{"x":"s"}']
    ),
    "record": Case(
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": INTEGER},
        ["{}", '{"a":1,"b":2}'],
        ['{"a":"x"}'],
    ),
    "tuple": Case(
        only("a", {"type": "array", "prefixItems": [INTEGER, {"type": "string"}], "items": False, "minItems": 1}),
        ['{"a":[1]}', '{"a":[1,"x"]}'],
        ['{"a":[]}', '{"a":["x"]}', '{"a":[1,"x",2]}'],
    ),
    "array of some": Case(
        only("a", {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 3}),
        ['{"a":[1,2]}', '{ "a" : [1, 2,\n3] }'],
        ['{"a":[1]}', '{"a":[1,2,3,4]}'],
    ),
    "tree": Case(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "parts": {"type": "array", "items": {"$ref": "#"}}},
            "required": ["name"],
            "additionalProperties": False,
        },
        ['{"name":"a"}', '{"name":"a","parts":[{"name":"b","parts":[]}]}'],
        ['{"name":"a","parts":[{"parts":[]}]}'],
    ),
    "optional properties": Case(
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "additionalProperties": False},
        ["{}", '{"a":1,"b":2}', '{"b":1}'],
        ['{"a":1,"a":2}', '{"c":1}'],
    ),
    "a format that is enforced": Case(
        only("a", {"type": "string", "format": "date"}), ['{"a":"2020-02-29"}'], ['{"a":"2020-13-45"}', '{"a":"x"}']
    ),
    "a format that is not": Case(only("a", {"type": "string", "format": "byte"}), ['{"a":"x"}'], ['{"a":1}']),
    "names that nobody knows": Case(
        only("a", {"type": "integer", "nullable": True, "x-order": 1}) | {"x-guidance": {"lenient": True}},
        ['{"a":1}'],
        ['{"a":null}'],
    ),
}

PATTERN = "#/properties/p: `pattern` cannot be enforced: "
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "look-ahead in the middle": (only("p", {"pattern": r"^a(?=.*\d).{4,8}$"}), PATTERN + "look-around"),
    "look-ahead that does not end": (only("p", {"pattern": r"^(?=a\)"}), PATTERN + "look-around"),
    "look-ahead in an alternative": (only("p", {"pattern": "^(?=a).|b"}), PATTERN + "look-around"),
    "negative look-ahead": (only("p", {"pattern": "^(?!admin)[a-z]+$"}), PATTERN + "look-around"),
    "back reference": (only("p", {"pattern": r"(a)\1"}), PATTERN + "backreferences are not supported"),
    "no regular expression": (only("p", {"pattern": "(("}), PATTERN + "unclosed group"),
    "class that does not end": (only("p", {"pattern": "[" + "\\\\" * 100}), PATTERN + "unclosed character class"),
    "set in a class": (only("p", {"pattern": "[[:alpha:]]"}), "#/properties/p: `pattern` must escape"),
    "if": ({"allOf": [{"if": {"required": ["a"]}, "then": {"required": ["b"]}}]}, "#/allOf/0: `if` cannot be"),
    "not": (only("a", {"not": {"type": "string"}}), "#/properties/a: `not` cannot be enforced"),
    "oneOf that overlaps": (
        {"properties": {"x": {"items": {"oneOf": [INTEGER, {"type": "number"}]}}}},
        "#/properties/x/items: `oneOf` is enforced only where its branches exclude each other",
    ),
    "uniqueItems": (only("a", {"items": INTEGER, "uniqueItems": True}), "#/properties/a: `uniqueItems` cannot be"),
    "contains": ({"contains": INTEGER}, "#: `contains` cannot be"),
    "dependentRequired": ({"dependentRequired": {"a": ["b"]}}, "#: `dependentRequired` cannot be"),
    "dependentSchemas": ({"dependentSchemas": {"a": {"required": ["b"]}}}, "#: `dependentSchemas` cannot be"),
    "propertyNames": ({"propertyNames": {"pattern": "^a"}}, "#: `propertyNames` cannot be"),
    "unevaluatedProperties": ({"allOf": [{}], "unevaluatedProperties": False}, "#: `unevaluatedProperties` cannot be"),
    "minProperties": ({"minProperties": 2}, "#: `minProperties` may be one more than there are required"),
    "itself": ({"$ref": "#"}, "#: must not refer to itself"),
    "itself by way of others": ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#"}]}}}, "#"),
    "no value": (
        {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]},
        "#: no value fits: required property 'a'",
    ),
    "number past the doubles": ({"const": {"a": [2**53 + 1]}}, "#: `const` may have numbers up to"),
    "huge number": ({"maximum": 10**400}, "#: `maximum` must be a number from"),
}

_names = st.sampled_from(["a", "b", "c", "é"])
_small = st.integers(0, 3)
_values = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from(["", "a", "b\n", "\x01é", 0.5, 1e20, [], {"a": 1}])
)
_KEYWORDS: dict[str, st.SearchStrategy[Any]] = {
    "type": st.sampled_from(["array", "boolean", "integer", "null", "number", "object", "string", ["string", "null"]]),
    "enum": st.lists(_values, min_size=1, max_size=3),
    "const": _values,
    "minLength": _small,
    "maxLength": _small,
    "pattern": st.sampled_from(["a", "^a", "b$", "^[ab]{1,2}$", "^(?=a|b).b?$", r"\d", r"^\w*$", "a|b", "[^a]", r"\s"]),
    "format": st.sampled_from(["date", "ipv4", "byte", "uuid"]),
    "minimum": st.integers(-5, 5) | st.sampled_from([0.5, 2**63, -(2**64), 2**53 + 1]),
    "maximum": st.integers(-5, 5) | st.sampled_from([0.5, 2**63 - 1, 2**64, 2**53 + 3]),
    "exclusiveMinimum": st.integers(-5, 5) | st.just(-0.25),
    "exclusiveMaximum": st.integers(-5, 5) | st.just(2**62 + 1),
    "multipleOf": st.sampled_from([1, 2, 3, 0.5, 0.01]),
    "required": st.lists(_names, unique=True, max_size=2),
    "minProperties": _small,
    "maxProperties": _small,
    "minItems": _small,
    "maxItems": _small,
    "uniqueItems": st.booleans(),
    "title": st.just("t"),
    "x-guidance": st.just({"lenient": True}),
    "$ref": st.sampled_from(["#", "#/$defs/d", "#/properties/a"]),
    "dependentRequired": st.just({"a": ["b"]}),
}  # fmt: skip


def _nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    sub = inner | st.booleans()
    schemas = st.lists(inner, min_size=1, max_size=2)
    nested = {
        "properties": st.dictionaries(_names, sub, max_size=2),
        "patternProperties": st.dictionaries(st.sampled_from(["a", "^b", "^$"]), sub, max_size=1),
        "propertyNames": sub,
        "additionalProperties": sub,
        "unevaluatedProperties": st.booleans(),
        "items": sub,
        "prefixItems": schemas,
        "allOf": schemas,
        "anyOf": schemas,
        "oneOf": schemas,
        "not": inner,
    }

    @st.composite
    def node(draw: st.DrawFn) -> dict[str, Any]:
        keywords = draw(st.lists(st.sampled_from([*_KEYWORDS, *nested]), unique=True, max_size=4))
        return {keyword: draw(nested.get(keyword, _KEYWORDS.get(keyword, st.nothing()))) for keyword in keywords}

    return node()


schemas = st.builds(
    lambda schema, inner: schema | {"$defs": {"d": inner}},
    st.recursive(_nest(st.just({})), _nest, max_leaves=4),
    _nest(st.just({})),
)
"""Small schemas of every keyword, enforced or not, with references to themselves."""
