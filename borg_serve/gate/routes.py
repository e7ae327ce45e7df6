"""The routes: the method of each, the protocol it speaks, and for a path that is none the one meant.

It does not know keys, bodies, or how a route is answered.
"""

import re
from collections.abc import Mapping

from borg_serve.api import chat, messages, responses
from borg_serve.api.errors import ApiError
from borg_serve.api.protocol import ClientProtocol
from borg_serve.gate.request import Request

__all__ = [
    "COUNTS",
    "METRICS",
    "MODEL",
    "OPEN",
    "PROTOCOLS",
    "QUIET",
    "ROUTES",
    "USAGE",
    "check_head",
    "check_json",
    "protocol",
    "route",
]

PROTOCOLS: Mapping[str, ClientProtocol] = {chat.PATH: chat, responses.PATH: responses, messages.PATH: messages}
"""Routes that generate."""
COUNTS: Mapping[str, Mapping[str, str]] = {
    f"{responses.PATH}/input_tokens": {"object": "response.input_tokens"},
    f"{messages.PATH}/count_tokens": {},
}
"""Routes that count a prompt's tokens -> what their answers hold beside the number."""
MODEL = "/v1/models/"
METRICS = "/metrics"
USAGE = "/v1/usage"
ROUTES: Mapping[str, str] = {
    "/health": "GET",
    "/ready": "GET",
    "/version": "GET",
    "/openapi.json": "GET",
    METRICS: "GET",
    "/v1/models": "GET",
    f"{MODEL}{{id}}": "GET",
    USAGE: "GET",
    **dict.fromkeys((*PROTOCOLS, *COUNTS), "POST"),
}
"""Route -> the method it takes."""
OPEN = {"/health", "/ready"}
"""Routes that need no key: load balancers must reach them."""
QUIET = {"/health", "/ready", METRICS}
"""Routes that are not logged on every call."""
ONCE = (b"authorization", b"content-type", b"x-api-key")
"""Headers that decide: of two, a proxy before us may have looked at the other one."""
WHY_NOT = {
    "/completions": "A raw prompt cannot carry the identity: use /v1/chat/completions.",
    "/responses/": "Responses are not stored here: send the whole conversation to /v1/responses.",
    "/conversations": "Conversations are not stored here: send the whole one to /v1/responses.",
    "/threads": "Threads are not stored here: send the whole conversation to /v1/responses.",
    "/messages/batches": "There are no batches here: send each request to /v1/messages.",
    "/embeddings": "There are no embeddings here: this model writes text.",
    **dict.fromkeys(
        ("/api/chat", "/api/generate", "/api/show", "/api/tags", "/api/version"),
        "Ollama's protocol is not spoken here: take OpenAI's, with a base URL that ends with /v1.",
    ),
}
"""What the 404 says of paths that begin so, behind any /v1."""


def route(path: str) -> str:
    """Return the route of a path, a key of ROUTES; `other` if there is none."""
    if path.startswith(MODEL) and not path.endswith("/"):
        return f"{MODEL}{{id}}"
    return path if path in ROUTES else "other"


def protocol(request: Request) -> ClientProtocol:
    """Return the protocol whose errors a request gets: chat's where nothing says that it is another's."""
    found = next((found for start, found in PROTOCOLS.items() if request.path.startswith(start)), None)
    # Anthropic's clients send this header with every request; some routes are both protocols' own.
    return found or (messages if "anthropic-version" in request.headers else chat)


def check_head(request: Request) -> None:
    """Raise ApiError for an unknown route, another method, or a header that decides and comes twice."""
    method, path = request.method, request.path
    expected = ROUTES.get(route(path))
    if expected is None:
        raise ApiError(404, _meant(method, path), reason="route")
    if method != expected and not (method == "HEAD" and expected == "GET"):
        raise ApiError(405, f"{path[:80]} takes {expected} only.", reason="route", headers={"allow": expected})
    names = [name for name, _ in request.scope["headers"] if name in ONCE]
    if twice := next((name.decode() for name in names if names.count(name) > 1), None):
        raise ApiError(400, f"The header {twice} may come once.", reason="headers")


def check_json(request: Request) -> None:
    """Raise ApiError 415 for a body that is not said to be JSON, or is compressed."""
    kind, coding = request.headers.get("content-type", ""), request.headers.get("content-encoding", "identity")
    if kind.partition(";")[0].strip().lower() != "application/json":
        what = f"The body must be JSON: send `Content-Type: application/json`, got `{kind[:40]}`."
        raise ApiError(415, what, reason="content_type")
    if coding.strip().lower() != "identity":
        what = f"The body must not be compressed: send it without `Content-Encoding: {coding[:40]}`."
        raise ApiError(415, what, reason="content_type", headers={"accept-encoding": "identity"})


def _meant(method: str, path: str) -> str:
    """Say what is wrong with a path: an API that is not here, or a base URL with too little, too much, or a slash."""
    what = f"There is no route {method} {path[:80]}"
    clean = re.sub(r"/+", "/", path[:200]).rstrip("/").lower()
    tail = re.sub(r"^(/v1)+(?=/|$)", "", clean)
    if reason := next((reason for start, reason in WHY_NOT.items() if tail.startswith(start)), None):
        return reason
    near = next((found for found in (route(f"/v1{tail}"), route(tail)) if found != "other"), None)
    near = near or next((known for known in (*COUNTS, *PROTOCOLS) if tail.endswith(known.removeprefix("/v1"))), None)
    if near is None:
        return f"{what}. /openapi.json lists the routes."
    # SDKs differ in whether the base URL holds /v1.
    wrong = "has /v1 twice" if clean.startswith("/v1/v1") else "lacks /v1" if near == route(f"/v1{clean}") else ""
    return f"{what}: use {near}.{wrong and f' The base URL of your client {wrong}.'}"
