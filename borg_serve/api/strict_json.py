"""Read JSON strictly: what two readers could understand differently is refused.

It does not know what the JSON is for.
"""

import math
from codecs import BOM_UTF8
from typing import Any

import jiter

from borg_serve.api.errors import ApiError, shown

__all__ = ["decode"]

MAX_DEPTH = 64
MAX_KEYS = 1024
"""Keys of one object; each unknown one would cost an error of its own."""
INT64 = 2**63
GZIP = b"\x1f\x8b"


def decode(raw: bytes, *, long_integers: bool = False) -> Any:
    """Return the value of UTF-8 JSON with finite numbers, no repeated keys, and at most MAX_DEPTH levels.

    A byte order mark before it is dropped. An integer past 64 bits becomes a float, as in JavaScript: JSON readers do
    not agree on it as an integer. `long_integers` keeps it: an argument of a tool may be a long identifier.
    Raises ApiError 400.
    """
    if raw.startswith(GZIP):
        raise _error("must be JSON, got gzip. Send it without compression")
    try:
        value = jiter.from_json(
            raw.removeprefix(BOM_UTF8), allow_inf_nan=False, cache_mode="none", catch_duplicate_keys=True
        )
    except ValueError as error:
        raise _error(_problem(str(error))) from None
    return _checked(value, long_integers, 1)


def _problem(message: str) -> str:
    if message.startswith("Detected duplicate key"):
        key = message.partition('"')[2].rpartition('"')[0]
        return f"must name each key once, got {shown(key)} twice"
    if message.startswith("recursion limit"):
        return f"may nest {MAX_DEPTH} deep"
    return f"must be JSON ({message})"


def _checked(value: Any, long_integers: bool, depth: int) -> Any:
    if isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise _error(f"may nest {MAX_DEPTH} deep")
        if isinstance(value, list):
            return [_checked(item, long_integers, depth + 1) for item in value]
        if len(value) > MAX_KEYS:
            raise _error(f"may have {MAX_KEYS} keys in one object, got {len(value)}")
        return {name: _checked(item, long_integers, depth + 1) for name, item in value.items()}
    if isinstance(value, int) and not long_integers and not -INT64 <= value < INT64:
        value = float(value) if value.bit_length() <= 1024 else math.inf
    if isinstance(value, float) and not math.isfinite(value):
        raise _error("must hold finite numbers")
    return value


def _error(what: str) -> ApiError:
    return ApiError(400, f"body: {what}.", code="invalid_json")
