"""What the protocols differ in: what a request says as a chat request, how chat's answer is said, how an error looks.

Behind a dialect everything is chat: one set of checks, one rendering, one grammar, one way to the engine.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from borg_serve import strict_json
from borg_serve.refusal import RefusedField, RequestError, shown, translate
from borg_serve.schema import Bounds, Neutralise, parse_chat
from borg_serve.stream import error_event

__all__ = ["CHAT", "Dialect", "Limit", "Reply", "as_chat", "read"]

M = TypeVar("M", bound=BaseModel)
Limit = tuple[str, str, int]
"""Field, JSON Schema keyword, limit."""


class Reply(Protocol):
    """One request's answer in its dialect, made from chat's."""

    def document(self, raw: bytes) -> bytes:
        """Return the whole answer for chat's."""

    def feed(self, events: bytes) -> bytes:
        """Return the events for some of chat's; the last are those for its `[DONE]`."""

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        """Return the event that ends a stream with this error body of the dialect."""


@dataclass(frozen=True)
class Dialect:
    """One protocol that is served."""

    path: str
    parse: Callable[[bytes, Bounds, Neutralise], tuple[dict[str, Any], Reply]]
    """A request's bytes -> the chat request for vLLM, and how to answer. Raises RequestError."""
    error_body: Callable[[int, Mapping[str, Any], str], Mapping[str, Any]]
    """(HTTP status, OpenAI's error fields, request id) -> the body."""
    names: tuple[tuple[str, str], ...] = ()
    """Regular expressions for names of chat's fields, and what they are called here."""

    def field(self, name: str | None) -> str | None:
        """Return this dialect's name for a field of chat."""
        for pattern, ours in self.names if name is not None else ():
            name = re.sub(pattern, ours, name or "")
        return name


class _Plain:
    """Chat itself: nothing to say otherwise."""

    def document(self, raw: bytes) -> bytes:
        return raw

    def feed(self, events: bytes) -> bytes:
        return events

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        return error_event(dict(body))


CHAT = Dialect(
    path="/v1/chat/completions",
    parse=lambda raw, bounds, neutralise: (parse_chat(raw, bounds, neutralise), _Plain()),
    error_body=lambda _status, error, _request_id: {"error": error},
)


# --------------------------------------------------------------------------------------------------- requests


def read(
    raw: bytes,
    model: type[M],
    refused: Mapping[str, RefusedField],
    limits: Iterable[Limit],
    opaque: Collection[str],
    tidy: Callable[[dict[str, Any]], None] | None = None,
) -> M:
    """Read a request strictly, without its nulls; `tidy` mends the body before it is checked.

    `opaque`: keys whose values keep their nulls, such as JSON Schemas. Raises RequestError.
    """
    body = _without_nulls(strict_json.decode(raw, strict_json.BODY), opaque)
    if not isinstance(body, dict):
        raise RequestError(400, f"body: must be a JSON object, got {shown(body)}.", code="invalid_type")
    for name in [name for name in body if name not in model.model_fields]:
        _check_refused(name, body.pop(name), refused)
    for name, keyword, limit in limits:
        value = body.get(name)
        if keyword == "maximum" and isinstance(value, int | float) and value > limit:
            raise _error(name, f"must be at most {limit}, got {shown(value)}")
        if keyword == "maxItems" and isinstance(value, list) and len(value) > limit:
            raise _error(name, f"may have {limit} items, got {shown(value)}")
    if tidy is not None:
        tidy(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise translate(error, body) from None


def as_chat(chat: Mapping[str, Any], bounds: Bounds, neutralise: Neutralise, dialect: Dialect) -> dict[str, Any]:
    """Return the chat request for vLLM, checked and cleaned as every chat request is; errors name `dialect`'s fields.

    `chat` may hold nulls. Raises RequestError.
    """
    try:
        return parse_chat(json.dumps(chat).encode(), bounds, neutralise)
    except RequestError as error:
        param = dialect.field(error.param)
        message = error.message
        if error.param is not None and message.startswith(error.param):
            message = f"{param}{message[len(error.param) :]}"
        raise RequestError(error.status, message, error.type, param, error.code) from None


def _check_refused(name: str, value: Any, refused: Mapping[str, RefusedField]) -> None:
    if name not in refused:
        what = f"Unrecognized request argument supplied: {name[:40]}"
        raise RequestError(400, what, param=name[:40], code="unknown_parameter")
    same_as_absent = refused[name].same_as_absent
    if not any(isinstance(value, bool) == isinstance(same, bool) and value == same for same in same_as_absent):
        raise _error(name, f"is refused: {refused[name].reason}. Leave it out", "unsupported_parameter")


def _error(param: str, what: str, code: str = "invalid_value") -> RequestError:
    return RequestError(400, f"{param}: {what}.", param=param, code=code)


def _without_nulls(value: Any, opaque: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {
            name: item if name in opaque else _without_nulls(item, opaque)
            for name, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [_without_nulls(item, opaque) for item in value]
    return value
