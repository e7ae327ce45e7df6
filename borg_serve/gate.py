"""The door: an ASGI application around vLLM's that lets through only what cannot remove the identity.

Routes, keys, body size and time, the strict request model, admission, deadlines, error shapes and the stream's grammar.
The same class serves one machine and every replica of a cluster. It does not know vLLM's engine, nor tokens.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import uuid4

from borg_serve import metrics, tracing
from borg_serve.admission import Admission, Busy
from borg_serve.dialect import CHAT, Dialect, Reply
from borg_serve.exchange import FAILED, App, ClientGone, Exchange, Receive, Refused, Scope, Send
from borg_serve.keys import Key, KeyRing, Quota
from borg_serve.messages import MESSAGES
from borg_serve.openapi import openapi
from borg_serve.readiness import Phase, Readiness
from borg_serve.responses import RESPONSES
from borg_serve.schema import Bounds, RequestError

__all__ = ["Gate", "Settings"]

logger = logging.getLogger(__name__)
access = logging.getLogger("borg_serve.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN = {"/health", "/ready"}
"""Routes that ask no key: what a load balancer must reach."""
ONCE = (b"authorization", b"content-type", b"x-api-key")
"""Headers that decide: of two, a proxy before us may have looked at the other one."""
DIALECTS: Mapping[str, Dialect] = {dialect.path: dialect for dialect in (CHAT, RESPONSES, MESSAGES)}
ROUTES: Mapping[str, str] = {
    "/health": "GET",
    "/ready": "GET",
    "/version": "GET",
    "/openapi.json": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    **dict.fromkeys(DIALECTS, "POST"),
}
QUIET = {"/health", "/ready", "/metrics"}
"""Routes whose every call is no news."""
WHY_NOT = {
    "/v1/completions": "A raw prompt cannot carry the identity: use /v1/chat/completions.",
    "/v1/responses/": "Responses are not stored here: send the whole conversation to /v1/responses.",
    "/v1/conversations": "Conversations are not stored here: send the whole one to /v1/responses.",
    "/v1/messages/count_tokens": "Tokens are counted with an answer only: see its usage.",
    "/v1/messages/batches": "There are no batches here: send each request to /v1/messages.",
}
"""What the 404 says of routes that begin so."""
RETRY_NOT_READY_S = 5
DYING_S = 1.0
"""How long after a failure the watchdog may take to say that it was the engine's death."""


@dataclass(frozen=True)
class Settings:
    """What the gate needs of a profile; counts are for this process."""

    bounds: Bounds
    deadline_s: float
    body_bytes: int
    body_s: float
    stall_s: float
    version: Mapping[str, Any]
    """The answer of `/version`."""
    echo_request_id: bool = True
    """Whether answers carry `x-request-id`; False where something before the gate adds it."""


class Gate:
    """ASGI application. `open(app)` puts vLLM's application behind it once there is one."""

    def __init__(
        self,
        settings: Settings,
        readiness: Readiness,
        neutralise: Callable[[str], str],
        keys: KeyRing | None = None,
        quota: Quota | None = None,
    ) -> None:
        self.settings = settings
        self.readiness = readiness
        self.neutralise = neutralise
        self.keys = keys
        self.quota = quota
        self.live: set[Exchange] = set()
        """Requests being answered."""
        self._app: App | None = None
        self._admission: Admission | None = None

    @cached_property
    def _openapi(self) -> Mapping[str, Any]:
        return openapi(self.settings.bounds)

    def open(self, app: App, admission: Admission) -> None:
        """Forward requests that get a place to this application."""
        self._app = app
        self._admission = admission

    async def drained(self, limit_s: float) -> int:
        """Wait until no request is being answered, for `limit_s` at most; how many are left."""
        end = time.monotonic() + limit_s
        while self.live and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return len(self.live)

    async def end_all(self, refusal: Refused, limit_s: float) -> None:
        """Answer whatever is in flight with this, now."""
        for exchange in self.live:
            exchange.abort(refusal)
        await self.drained(limit_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan" and self._app is not None:
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return
        exchange = Exchange(
            scope,
            receive,
            send,
            _request_id(scope),
            self.settings.deadline_s,
            _dialect(scope["path"]),
            self.settings.echo_request_id,
        )
        self.live.add(exchange)
        try:
            if scope["path"] in DIALECTS:
                with tracing.request(scope["path"], exchange.request_id, exchange.headers) as span:
                    await self._answer(exchange)
                    span.set_attributes(_attributes(exchange))
            else:
                await self._answer(exchange)
        finally:
            self.live.discard(exchange)
            self._log(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        """Answer a request, whatever comes of it."""
        try:
            await self._route(exchange)
        except Refused as refusal:
            metrics.REFUSALS.labels(refusal.reason).inc()
            await exchange.refuse(refusal)
        except RequestError as error:
            metrics.REFUSALS.labels("invalid").inc()
            await exchange.refuse(Refused(error.status, "invalid", error.body()))
        except ClientGone:
            exchange.outcome = "gone"
        except Exception:
            logger.exception("request %s failed inside the gate", exchange.request_id)
            await exchange.refuse(FAILED)

    # ------------------------------------------------------------------------------------------ routes

    async def _route(self, exchange: Exchange) -> None:
        method, path = exchange.scope["method"], exchange.scope["path"]
        expected = ROUTES.get(path)
        if expected is None:
            reasons = (reason for start, reason in WHY_NOT.items() if path.startswith(start))
            raise Refused.of(404, "route", next(reasons, f"There is no route {method} {path[:80]}."))
        if method != expected and not (method == "HEAD" and expected == "GET"):
            raise Refused.of(405, "route", f"{path} takes {expected} only.", headers={"allow": expected})
        names = [name for name, _ in exchange.scope["headers"] if name in ONCE]
        if twice := next((name.decode() for name in names if names.count(name) > 1), None):
            raise Refused.of(400, "headers", f"The header {twice} may come once.")
        key = None if path in OPEN else self._key(exchange)
        if path == "/health":
            await exchange.reply(200, {"status": "alive"})
        elif path == "/ready":
            await self._ready(exchange)
        elif path == "/version":
            await exchange.reply(200, self.settings.version)
        elif path == "/openapi.json":
            await exchange.reply(200, self._openapi)
        elif path in DIALECTS:
            await self._generate(exchange, key)
        elif self._app is None:
            raise self._not_ready()
        else:
            await exchange.pass_through(self._app)

    async def _ready(self, exchange: Exchange) -> None:
        phase = self.readiness.phase
        if phase == Phase.READY:
            await exchange.reply(200, {"status": "ready"})
        else:
            body = {"status": phase.name.lower(), "reason": self.readiness.reason}
            await exchange.reply(503, body, {"retry-after": str(RETRY_NOT_READY_S)})

    def _key(self, exchange: Exchange) -> Key | None:
        if self.keys is None:
            return None
        scheme, _, token = exchange.header("authorization").partition(" ")
        if exchange.dialect is MESSAGES and (own := exchange.header("x-api-key")):
            scheme, token = "bearer", own
        key = self.keys.lookup(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            how = "x-api-key: <key>" if exchange.dialect is MESSAGES else "Authorization: Bearer <key>"
            what = f"The API key is missing or unknown. Send `{how}`."
            headers = {"www-authenticate": "Bearer"}
            raise Refused.of(401, "key", what, "authentication_error", "invalid_api_key", headers)
        exchange.key_name = key.name
        return key

    def _not_ready(self) -> Refused:
        reason = self.readiness.reason or "the server is starting"
        headers = {"retry-after": str(RETRY_NOT_READY_S)}
        return Refused.of(503, "not_ready", f"The server is not ready: {reason}.", "server_error", "not_ready", headers)

    # -------------------------------------------------------------------------------------- generation

    async def _generate(self, exchange: Exchange, key: Key | None) -> None:
        if exchange.header("content-type").partition(";")[0].strip().lower() != "application/json":
            raise Refused.of(415, "content_type", "Send the request as `Content-Type: application/json`.")
        if self.readiness.phase != Phase.READY or self._app is None or self._admission is None:
            raise self._not_ready()
        try:
            self._admission.refuse_if_full()
            async with self._counted(exchange, key):
                raw = await exchange.read_body(self.settings.body_bytes, self.settings.body_s)
                body, reply = exchange.dialect.parse(raw, self.settings.bounds, self.neutralise)
                async with exchange.alive():
                    await self._admitted(exchange, self._app, self._admission, body, reply, len(raw))
        except Busy as busy:
            what = "The server is busy. Try again later."
            headers = {"retry-after": str(busy.retry_after_s)}
            raise Refused.of(503, "busy", what, "server_error", "busy", headers) from None

    @asynccontextmanager
    async def _counted(self, exchange: Exchange, key: Key | None) -> AsyncIterator[None]:
        """Count a request against its key's limits: one of its places now, its tokens when they are known."""
        if key is None or self.quota is None:
            yield
            return
        refusal = self.quota.acquire(key)
        if refusal is None:
            try:
                refusal = await self.quota.admit(key)
                if refusal is None:
                    yield
            finally:
                self.quota.release(key)
                # The identity costs nothing: it is the server's own text, and cached.
                own = exchange.usage.get("total_tokens", 0) - self.settings.version["identity"]["tokens"]
                await self.quota.charge_tokens(key, own)
        if refusal is not None:
            headers = {"retry-after": str(refusal.retry_after_s)}
            kind = "rate_limit_error" if refusal.status == 429 else "server_error"
            raise Refused.of(refusal.status, "quota", refusal.message, kind, "rate_limit_exceeded", headers)

    async def _admitted(
        self, exchange: Exchange, app: App, admission: Admission, body: dict[str, Any], reply: Reply, size_bytes: int
    ) -> None:
        """Wait for a place in the engine, then forward."""
        choices = body.get("n") or 1
        keep_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        if body.get("stream"):
            # Always asked for, to count tokens; the client sees it only if it asked.
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        with tracing.queue():
            await exchange.unless_aborted(admission.acquire(choices, size_bytes))
        admitted = time.monotonic()
        try:
            raw = json.dumps(body).encode()
            await exchange.forward(app, raw, reply, choices, keep_usage, self.settings.stall_s)
            exchange.outcome = "ok"
        except Exception as error:
            if error is FAILED or not isinstance(error, Refused | ClientGone):
                # If the engine has died, every request in flight is aborted in a moment, with 503 instead.
                await exchange.unless_aborted(asyncio.sleep(DYING_S))
            raise
        finally:
            admission.release(choices, time.monotonic() - admitted)

    # --------------------------------------------------------------------------------------------- log

    def _log(self, exchange: Exchange) -> None:
        path = exchange.scope["path"] if exchange.scope["path"] in ROUTES else "other"
        outcome = exchange.outcome or "ok"
        metrics.REQUESTS.labels(path, outcome).inc()
        if path in QUIET:
            return
        line = {
            "request_id": exchange.request_id,
            "route": path,
            "status": exchange.status,
            "outcome": outcome,
            "key": exchange.key_name,
            "ms": round((time.monotonic() - exchange.arrived) * 1e3, 1),
            "prompt_tokens": exchange.usage.get("prompt_tokens"),
            "completion_tokens": exchange.usage.get("completion_tokens"),
        }
        access.info(json.dumps(line))


def _attributes(exchange: Exchange) -> dict[str, str | int]:
    """How a request ended, by the names of OpenTelemetry's conventions where they have one."""
    counts = {
        "gen_ai.usage.input_tokens": exchange.usage.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": exchange.usage.get("completion_tokens"),
        "http.response.status_code": exchange.status,
    }
    return {"borg.outcome": exchange.outcome or "ok"} | {name: count for name, count in counts.items() if count}


def _request_id(scope: Scope) -> str:
    """The client's `x-request-id` if it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value.decode("latin-1")):
            return str(value.decode("latin-1"))
    return uuid4().hex


def _dialect(path: str) -> Dialect:
    """Whose errors a route has, its unknown neighbours' too; OpenAI's where nothing else is known."""
    return next((dialect for dialect in DIALECTS.values() if path.startswith(dialect.path)), CHAT)
