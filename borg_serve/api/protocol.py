"""What each protocol module offers to the gate. The engine speaks chat only: the other protocols are translated.

It does not know any other protocol.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from borg_serve.api.events import data_event
from borg_serve.api.progress import Progress

__all__ = ["Answer", "Bounds", "ClientProtocol", "Neutralise"]

Neutralise = Callable[[str], str]
"""Breaks the control tokens in a client's text."""


@dataclass(frozen=True)
class Bounds:
    """The limits of a request that the configuration sets."""

    model: str = "borg-merge-v1"
    """The served name."""
    model_aliases: tuple[str, ...] = ()
    """Patterns of other names that clients may call the model by, such as `claude-*`."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """What is done with names that nobody knows."""
    max_tokens: int = 8192
    """The most output tokens; a request that asks for more gets these."""
    max_n: int = 4
    max_messages: int = 2048
    max_tools: int = 128
    max_stop: int = 4
    """vLLM's own cap is 4 (VLLM_MAX_STOP_STRINGS)."""
    max_schema_bytes: int = 32_768
    """Size of one JSON Schema: of `response_format`, or of a tool's parameters."""
    vocab_size: int = 2**31
    """Token ids in `stop_token_ids` are below it."""

    def serves(self, name: str) -> bool:
        """Whether a client may call the model so."""
        return name == self.model or any(fnmatchcase(name, alias) for alias in self.model_aliases)


class Answer:
    """One request's answer in its protocol, made from chat's answer; here it is chat's own, as vLLM writes it."""

    PING: bytes = b""
    """The event that says nothing, in protocols that have one."""
    progress = Progress()
    """How far the engine is: the gate sets it."""
    ignored: tuple[str, ...] = ()
    """Fields of the request that were dropped, as `messages.annotations`: at most 16 names, each fit for a header."""

    gathers: bool = False
    """Whether the client asked for a document and chat is asked for a stream: then `feed` all of it, and `gathered`."""

    def gathered(self) -> bytes:
        """Return the whole answer, once all of chat's stream was fed."""
        raise NotImplementedError

    def document(self, raw: bytes) -> bytes:
        """Return the whole answer for chat's whole answer."""
        return raw

    def begin(self, request_id: str, model: str) -> bytes:
        """Return the events that can be said before chat's first: none if the prompt's tokens are not known yet."""
        return b""

    def feed(self, events: bytes) -> bytes:
        """Return the events for some events of chat's stream, which ends with `[DONE]`."""
        return events

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        """Return the event that ends a stream with an error; `body` comes from `error_body`."""
        return data_event(body)


class ClientProtocol(Protocol):
    """One protocol that clients speak: a module of this package."""

    @property
    def PATH(self) -> str:  # noqa: N802 (a module's constant)
        """The route."""

    def parse(self, raw: bytes, bounds: Bounds, neutralise: Neutralise) -> tuple[dict[str, Any], Answer]:
        """Return the chat request for vLLM, and what turns chat's answer into this protocol's. Raises ApiError."""

    def error_body(self, status: int, error: Mapping[str, Any], request_id: str) -> Mapping[str, Any]:
        """Return the body of an error answer; `error` holds OpenAI's error fields."""

    def field_name(self, chat_field: str) -> str:
        """Return this protocol's name for a field of a chat request."""
