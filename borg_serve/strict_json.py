"""JSON as strictly as it can be read: what two readers could understand differently is refused.

It does not know what the JSON is for.
"""

import json
import math
from collections import Counter
from typing import Any

from borg_serve.refusal import RequestError, shown

__all__ = ["BODY", "LONG_INTEGERS", "decode"]

MAX_DEPTH = 64
MAX_KEYS = 1024
"""Of one object; each unknown one would cost an error of its own."""
INT64 = 2**63


def decode(raw: bytes, decoder: json.JSONDecoder) -> Any:
    """Read UTF-8 JSON: finite numbers, no repeated keys, no lone surrogates, at most MAX_DEPTH deep.

    Raises RequestError 400.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _error(f"must be UTF-8, got an invalid byte at offset {error.start}") from None
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise _error(f"must be JSON ({error.msg} at offset {error.pos})") from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    if b"\\ud" in raw or b"\\uD" in raw:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _error("must hold whole characters, got half of a surrogate pair") from None
    return value


def _error(what: str) -> RequestError:
    return RequestError(400, f"body: {what}.", code="invalid_json")


def _too_deep() -> RequestError:
    return _error(f"may nest {MAX_DEPTH} deep")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise _error(f"may have {MAX_KEYS} keys in one object, got {len(pairs)}")
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice, _ = counts.most_common(1)[0]
        raise _error(f"must name each key once, got {shown(twice)} twice")
    return value


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _error(f"must hold finite numbers, got {digits[:40]}")
    return number


def _integer(digits: str) -> int | float:
    """An integer past 64 bits becomes a float, as in JavaScript: JSON readers do not agree on it as an integer."""
    if len(digits) > 20:
        return _finite(digits)
    number = int(digits)
    return number if -INT64 <= number < INT64 else float(number)


BODY = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_finite, parse_int=_integer, parse_constant=_finite)
LONG_INTEGERS = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_finite, parse_constant=_finite)
"""Keeps long integers: an argument may be a long identifier."""


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()
