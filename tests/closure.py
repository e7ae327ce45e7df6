"""Our answers to an official client's requests, from what an engine would have said, and what comes back of them."""

import json
from typing import Any

from borg_serve.api import chat, messages, responses
from borg_serve.api.errors import ApiError
from borg_serve.api.protocol import ClientProtocol
from tests.chats import BOUNDS
from tests.protocols import Part, document, stream

PROTOCOLS: dict[str, ClientProtocol] = {module.PATH: module for module in (chat, responses, messages)}
LOGPROBS = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}


class Server:
    """Answers each request as the gate would, with `said` for what the engine says."""

    def __init__(self) -> None:
        self.said: list[Part] = []
        self.finish = "stop"
        self.bodies: list[dict[str, Any]] = []
        """The chat requests for vLLM so far."""

    def answer(self, path: str, raw: bytes) -> tuple[int, str, bytes]:
        """Return status, content type and body."""
        protocol = PROTOCOLS[path]
        try:
            body, answer = protocol.parse(raw, BOUNDS, str)
        except ApiError as error:
            refusal = protocol.error_body(error.status, error.fields(), "r")
            return error.status, "application/json", json.dumps(refusal).encode()
        self.bodies.append(body)
        logprobs = LOGPROBS if body.get("logprobs") else None
        if not body.get("stream"):
            whole = answer.document(document(self.said, self.finish, logprobs=logprobs))
        else:
            events = stream(self.said, self.finish, logprobs=logprobs)
            whole = b"".join(answer.feed(event) for event in events)
            whole = answer.gathered() if answer.gathers else whole
        return 200, "text/event-stream" if json.loads(raw).get("stream") else "application/json", whole

    def understood(self) -> list[Any]:
        """What the last request's assistant said, as the engine gets it."""
        return said(self.bodies[-1])


def said(body: dict[str, Any]) -> list[Any]:
    """The text and the calls of a chat request's assistant."""
    turn = body["messages"][1]
    assert turn["role"] == "assistant"
    calls = (call["function"] for call in turn.get("tool_calls", ()))
    return [("", turn["content"]), *((call["name"], json.loads(call["arguments"])) for call in calls)]
