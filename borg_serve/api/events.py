"""Server-sent events as bytes. It does not know what they say."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

__all__ = ["compact", "data_event", "named_event"]


def compact(value: Any) -> bytes:
    """Return JSON without blanks, in UTF-8."""
    return to_json(value)


def data_event(body: Mapping[str, Any]) -> bytes:
    """Return an event of OpenAI's chat protocol, which gives its events no names."""
    return b"data: %s\n\n" % compact(body)


def named_event(name: str, body: Mapping[str, Any]) -> bytes:
    """Return an event with a name."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), compact(body))
