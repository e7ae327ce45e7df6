"""JSON is read strictly, and nothing but ApiError comes of what cannot be read."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.api.errors import ApiError
from borg_serve.api.strict_json import MAX_DEPTH, MAX_KEYS, decode
from tests.chats import values


def refusal(raw: bytes) -> str:
    with pytest.raises(ApiError) as caught:
        decode(raw)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"
    json.dumps(caught.value.fields(), ensure_ascii=False).encode()
    return caught.value.message


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"{} {}", "must be JSON (trailing characters at line 1 column 4)"),
        (b"{'a':1}", "must be JSON"),
        (b'{"a":1,}', "must be JSON"),
        (b'{"a":01}', "must be JSON"),
        (b'"\n"', "must be JSON"),
        ('{"a":1}'.encode("utf-16"), "must be JSON"),
        (b'"\xc0\xaf"', "must be JSON (invalid unicode code point"),
        (b'"\xed\xa0\x80"', "must be JSON (invalid unicode code point"),
        (b"NaN", "must be JSON"),
        (b"[-Infinity]", "must be JSON"),
        (b"1e999", "must hold finite numbers"),
        (b"9" * 5000, "must be JSON (number out of range"),
        (b"9" * 4000, "must hold finite numbers"),
        (b'{"a":1,"a":1}', 'must name each key once, got "a" twice'),
        (b'[{"\\u0061":1,"b":2,"a":1}]', 'must name each key once, got "a" twice'),
        (b'{"\\ud800":1,"\\ud800":1}', "must be JSON"),
        (b'"\\ud800"', "must be JSON"),
        (b'{"\\uDFFF":1}', "must be JSON"),
        (b'"\\udc00\\ud800"', "must be JSON"),
        (b"[" * 1_000_000, "may nest 64 deep"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "may nest 64 deep"),
        (json.dumps({str(i): 1 for i in range(MAX_KEYS + 1)}).encode(), "may have 1024 keys in one object, got 1025"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_decode_refuses(raw: bytes, says: str) -> None:
    assert says in refusal(raw)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_decode_bounds_depth_exactly(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def nested(depth: int) -> bytes:
        return (opening * (depth - 1) + f"{opening[0]}{closing}" + closing * (depth - 1)).encode()

    decode(nested(MAX_DEPTH))
    refusal(nested(MAX_DEPTH + 1))


def test_decode_takes_pairs_of_surrogates_and_what_only_looks_like_them() -> None:
    assert decode(rb'["\ud83d\ude00", "\\ud800"]') == ["😀", "\\ud800"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("9223372036854775808", 2.0**63),
        ("-9223372036854775809", -(2.0**63)),
        ("1" + "0" * 30, 1e30),
    ],
)
def test_decode_takes_integers_past_64_bits_as_floats(text: str, value: float) -> None:
    decoded = decode(text.encode())
    assert decoded == value
    assert type(decoded) is type(value)
    assert decode(text.encode(), long_integers=True) == int(text)


@settings(deadline=None)
@given(values)
def test_decode_reads_what_json_wrote(value: Any) -> None:
    assert decode(json.dumps(value).encode(), long_integers=True) == value
    assert decode(json.dumps(value, ensure_ascii=False).encode(), long_integers=True) == value


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:0.eE-+\\ud8 ntrfalse', max_size=60).map(str.encode))
def test_decode_agrees_with_json_or_refuses(raw: bytes) -> None:
    try:
        value = decode(raw, long_integers=True)
    except ApiError:
        return
    assert value == json.loads(raw)
