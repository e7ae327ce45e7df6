"""JSON is read strictly, and nothing but RequestError comes of what cannot be read."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.refusal import RequestError
from borg_serve.strict_json import BODY, LONG_INTEGERS, MAX_DEPTH, MAX_KEYS, decode
from tests.chats import values


def refusal(raw: bytes) -> str:
    with pytest.raises(RequestError) as caught:
        decode(raw, BODY)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"
    json.dumps(caught.value.body(), ensure_ascii=False).encode()
    return caught.value.message


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"{} {}", "must be JSON (Extra data at offset 3)"),
        (b"{'a':1}", "must be JSON"),
        (b'{"a":1,}', "must be JSON"),
        (b'{"a":01}', "must be JSON"),
        (b'"\n"', "must be JSON"),
        (b"\xef\xbb\xbf{}", "must be JSON"),
        ('{"a":1}'.encode("utf-16"), "must be UTF-8, got an invalid byte at offset 0"),
        (b'"\xc0\xaf"', "must be UTF-8, got an invalid byte at offset 1"),
        (b'"\xed\xa0\x80"', "must be UTF-8"),
        (b"NaN", "must hold finite numbers, got NaN"),
        (b"[-Infinity]", "must hold finite numbers, got -Infinity"),
        (b"1e999", "must hold finite numbers, got 1e999"),
        (b"9" * 5000, "must hold finite numbers, got " + "9" * 40 + "."),
        (b'{"a":1,"a":1}', 'must name each key once, got "a" twice'),
        (b'[{"\\u0061":1,"b":2,"a":1}]', 'must name each key once, got "a" twice'),
        (b'{"\\ud800":1,"\\ud800":1}', 'must name each key once, got "?" twice'),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\uDFFF":1}', "half of a surrogate pair"),
        (b'"\\udc00\\ud800"', "half of a surrogate pair"),
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

    decode(nested(MAX_DEPTH), BODY)
    refusal(nested(MAX_DEPTH + 1))


def test_decode_takes_pairs_of_surrogates_and_what_only_looks_like_them() -> None:
    assert decode(rb'["\ud83d\ude00", "\\ud800"]', BODY) == ["😀", "\\ud800"]


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
    decoded = decode(text.encode(), BODY)
    assert decoded == value
    assert type(decoded) is type(value)
    assert decode(text.encode(), LONG_INTEGERS) == int(text)


@settings(deadline=None)
@given(values)
def test_decode_reads_what_json_wrote(value: Any) -> None:
    assert decode(json.dumps(value).encode(), LONG_INTEGERS) == value
    assert decode(json.dumps(value, ensure_ascii=False).encode(), LONG_INTEGERS) == value


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:0.eE-+\\ud8 ntrfalse', max_size=60).map(str.encode))
def test_decode_agrees_with_json_or_refuses(raw: bytes) -> None:
    try:
        value = decode(raw, LONG_INTEGERS)
    except RequestError:
        return
    assert value == json.loads(raw)
