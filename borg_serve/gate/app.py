"""The ASGI application in front of vLLM's: it lets through only what cannot remove the identity.

The same class serves one machine and every replica of a cluster. The street of a request:

 1. gate.http           read the head, bounded in size and time
 2. gate.app            check the route, its method, and the headers that decide
 3. gate.keys           find the key's owner
 4. gate.quota          count the request against the key's limits; refuse it before its body is read if the key is over
                        them, or would wait for too long
 5. gate.request        read the body, bounded in size and time; then abort at the deadline, or if the client leaves
 6. api                 parse chat, responses or messages into one chat request, with control tokens neutralised;
                        gate.cache_scope salts what follows the identity
 7. gate.admission      wait for slots in the engine, in an order that is fair to keys
 8. identity.template   vLLM's chat handler renders our template: the identity first, then the client's conversation
 9. engine.renderer     tokenise what follows the identity
10. engine.guard        refuse a prompt that does not begin with the identity's tokens
11. engine              vLLM generates
12. gate.sse            check the stream's grammar
13. gate.answer         send the answer in the client's protocol, whole or as a stream, and end it
"""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from borg_serve import metrics
from borg_serve.api import messages
from borg_serve.api.errors import ApiError
from borg_serve.api.openapi import openapi
from borg_serve.api.protocol import Bounds
from borg_serve.config import Limits
from borg_serve.gate import tracing
from borg_serve.gate.account import NO_KEY, Account
from borg_serve.gate.admission import Busy, Demand, Grant
from borg_serve.gate.answer import Response, failure
from borg_serve.gate.cache_scope import CacheScope, cache_salt, heeded
from borg_serve.gate.coordinator import Coordinator
from borg_serve.gate.keys import Key, KeyRing
from borg_serve.gate.models import model, models
from borg_serve.gate.readiness import Phase, Readiness
from borg_serve.gate.remote import RemoteCoordinator
from borg_serve.gate.request import AGAIN, App, ClientGone, Receive, Request, Scope, Send
from borg_serve.gate.routes import (
    COUNTS,
    METRICS,
    MODEL,
    OPEN,
    PROTOCOLS,
    QUIET,
    USAGE,
    check_head,
    check_json,
    protocol,
    route,
)
from borg_serve.gate.telemetry import Spent
from borg_serve.gate.usage import asked
from borg_serve.usage.spool import Spool

__all__ = ["Gate", "with_cors"]

logger = logging.getLogger(__name__)
access = logging.getLogger("borg_serve.access")

COUNTING = 8
"""Requests whose tokens are counted at once. They need no slot in the engine, but hold the tokenizer's one thread."""
EXPOSED = (
    *("request-id", "retry-after", "x-borg-ignored", "x-request-id", "x-should-retry"),
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)
"""Headers of an answer that a page may read."""
QUICK_REFUSALS = 10
"""Refusals in a second that a key gets at once."""
LATE_REFUSAL_S = 1.0
DYING_S = 1.0
"""How long after a failure the watchdog may take to say that it was the engine's death."""


@dataclass(eq=False)
class Gate:
    """ASGI application. `open(app)` puts vLLM's application behind it once there is one."""

    limits: Limits
    """Of one request."""
    bounds: Bounds
    version: Mapping[str, Any]
    """The answer of `/version`."""
    readiness: Readiness
    neutralise: Callable[[str], str]
    coordinator: Coordinator | RemoteCoordinator
    keys: KeyRing | None = None
    spool: Spool | None = None
    """Where the usage of each request is kept for the ledger."""
    echo_request_id: bool = True
    """Whether answers carry `x-request-id`; False where something before the gate adds it."""
    live: set[Request] = field(default_factory=set, init=False)
    """Requests being answered."""
    _app: App | None = field(default=None, init=False)
    _context: int | None = field(default=None, init=False)
    _counting: int = field(default=0, init=False)
    _refused_in: int = field(default=0, init=False)
    _refused: Counter[str] = field(default_factory=Counter, init=False)
    """Requests of each key that were told that the server is busy, in the second `_refused_in`."""

    @cached_property
    def _cache_scope(self) -> CacheScope:
        return self.limits.cache_scope or ("all" if self.keys is None else "key")

    @cached_property
    def _openapi(self) -> Mapping[str, Any]:
        return openapi(self.bounds)

    def open(self, app: App, context: int | None = None) -> None:
        """Forward admitted requests to this application. `context`: the most tokens of a prompt and its answer."""
        self._app = app
        self._context = context

    async def drained(self, limit_s: float) -> int:
        """Wait until no request is being answered, for `limit_s` at most; return how many are left."""
        end = time.monotonic() + limit_s
        while self.live and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return len(self.live)

    async def end_all(self, error: ApiError, limit_s: float) -> None:
        """Answer every request in flight with this error, now."""
        for request in self.live:
            request.abort(error)
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
        request = Request(scope, receive)
        response = Response(request, send, protocol(request), self.echo_request_id)
        self.live.add(request)
        try:
            if request.path in PROTOCOLS:
                account = Account(request, response, self.version["identity"]["tokens"])
                with tracing.request(request.path, request.id, request.headers, self.bounds.model) as span:
                    await self._respond(request, response, account)
                    account.close(span, self.bounds.model)
            else:
                await self._respond(request, response)
        finally:
            self.live.discard(request)
            self._log(request, response)

    async def _respond(self, request: Request, response: Response, account: Account | None = None) -> None:
        """Answer a request, whatever happens."""
        try:
            await self._route(request, response, account)
        except ApiError as error:
            metrics.REFUSALS.labels(error.reason).inc()
            if isinstance(error, Busy) and response.key_name is not None:
                await self._slow_down(response.key_name)
            await response.error(error)
        except ClientGone:
            response.outcome = "gone"
        except Exception:
            logger.exception("request %s failed inside the gate", request.id)
            await response.error(failure())

    async def _slow_down(self, key: str) -> None:
        """Refuse a key later whose clients come back at once: each refusal takes time from the engine's processor."""
        second = int(time.monotonic())
        if second != self._refused_in:
            self._refused_in, self._refused = second, Counter()
        self._refused[key] += 1
        if self._refused[key] > QUICK_REFUSALS:
            await asyncio.sleep(LATE_REFUSAL_S)

    # ------------------------------------------------------------------------------------------ routes

    async def _route(self, request: Request, response: Response, account: Account | None) -> None:
        path = request.path
        check_head(request)
        key = None if path in OPEN else self._key(request, response)
        if path == "/health":
            await response.document(200, {"status": "alive"})
        elif path == "/ready":
            await self._ready(response)
        elif path == "/version":
            await response.document(200, self.version)
        elif path == "/openapi.json":
            await response.document(200, await asyncio.to_thread(lambda: self._openapi))  # the first takes a second
        elif path == METRICS and key is not None and not key.metrics:
            what = "Metrics tell of all keys, and this one may not read them: its entry needs `metrics: true`."
            raise ApiError(403, what, "permission_error", None, "no_metrics", "key")
        elif account is not None:
            await self._generate(request, response, key, account)
        elif path in COUNTS:
            await self._count(request, response, key)
        elif path == USAGE:
            await self._usage(request, response, key)
        elif self._app is None:
            raise self._not_ready()
        elif path == "/v1/models":
            await response.document(200, models(self.bounds, self._context, response.protocol is messages))
        elif path.startswith(MODEL):
            name, anthropic = path.removeprefix(MODEL), response.protocol is messages
            await response.document(200, model(name, self.bounds, self._context, anthropic))
        else:
            await response.pass_through(self._app)

    def _key(self, request: Request, response: Response) -> Key | None:
        """Return the key that the request is made with. Raises ApiError if keys are needed and this one is unknown."""
        if self.keys is None:
            return None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if response.protocol is messages and (own := request.headers.get("x-api-key")):
            scheme, token = "bearer", own
        key = self.keys.lookup(token.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            how = "x-api-key: <key>" if response.protocol is messages else "Authorization: Bearer <key>"
            what = f"The API key is missing or unknown. Send `{how}`."
            headers = {"www-authenticate": "Bearer"}
            raise ApiError(401, what, "authentication_error", None, "invalid_api_key", "key", headers)
        response.key_name = key.name
        return key

    async def _ready(self, response: Response) -> None:
        phase = self.readiness.phase
        if phase == Phase.READY:
            await response.document(200, {"status": "ready"})
        else:
            body = {"status": phase.name.lower(), "reason": self.readiness.reason}
            await response.document(503, body, AGAIN)

    def _not_ready(self) -> ApiError:
        what = f"The server is not ready: {self.readiness.reason or 'the server is starting'}."
        return ApiError(503, what, "server_error", None, "not_ready", "not_ready", AGAIN)

    # -------------------------------------------------------------------------------------- generation

    async def _generate(self, request: Request, response: Response, key: Key | None, account: Account) -> None:
        account.open(self.spool)
        app = await self._begin(request, response, key)
        try:
            body, size_bytes = await self._parse(request, response, key)
            demand = Demand(body.get("n") or 1, size_bytes, body.get("max_tokens") or self.limits.default_max_tokens)
            async with request.alive(self.limits.deadline_s):
                account.granted(grant := await self._slots(request, key, demand))
                if key is not None:
                    body["priority"] = grant.priority
                try:
                    await response.forward(app, body, self.limits.stall_s)
                except ClientGone:
                    raise
                except Exception as error:
                    if not isinstance(error, ApiError) or error.reason == "error":
                        # If the engine has died, all requests in flight are aborted in a moment, with 503 instead.
                        await request.unless_aborted(asyncio.sleep(DYING_S))
                    raise
        finally:
            if account.grant is not None:
                metrics.INFLIGHT.dec(account.grant.sequences)
            await self.coordinator.end(key, account.grant, account.leave())

    async def _slots(self, request: Request, key: Key | None, demand: Demand) -> Grant:
        """Wait for slots in the engine. Raises Busy, or what the request was aborted with."""
        with tracing.queue(), metrics.QUEUED.track_inprogress():
            grant = await request.unless_aborted(self.coordinator.acquire(key, demand))
        metrics.QUEUE_SECONDS.observe(time.monotonic() - request.arrived)
        metrics.INFLIGHT.inc(grant.sequences)
        return grant

    async def _count(self, request: Request, response: Response, key: Key | None) -> None:
        """Answer with how many tokens a prompt has. Raises Busy if many are being counted."""
        app = await self._begin(request, response, key)
        try:
            body, _ = await self._parse(request, response, key)
            if self._counting >= COUNTING:
                raise Busy(1)
            self._counting += 1
            try:
                async with request.alive(self.limits.deadline_s):
                    await response.count(app, body, COUNTS[request.path])
            finally:
                self._counting -= 1
        finally:
            await self.coordinator.end(key, None, Spent())

    async def _begin(self, request: Request, response: Response, key: Key | None) -> App:
        """Count the request against its key's limits, until the coordinator's `end`; return what answers it."""
        check_json(request)
        if self.readiness.phase != Phase.READY or self._app is None:
            raise self._not_ready()
        response.headers(await self.coordinator.begin(key, request.path in PROTOCOLS))
        return self._app

    async def _parse(self, request: Request, response: Response, key: Key | None) -> tuple[dict[str, Any], int]:
        """(the chat request that a body asks for, the body's size in bytes)."""
        raw = await request.body(self.limits.body_bytes, self.limits.body_s)
        body, answer = response.protocol.parse(raw, self.bounds, self.neutralise)
        if request.path in PROTOCOLS and (salt := cache_salt(self._cache_scope, key, raw)):
            body["cache_salt"] = salt
            answer.ignored = heeded(answer.ignored, self._cache_scope)
        response.answers(answer)
        return body, len(raw)

    async def _usage(self, request: Request, response: Response, key: Key | None) -> None:
        """Answer with what the key has used, by the ledger."""
        since, until, by = asked(request.scope.get("query_string", b""))
        rows = await self.coordinator.usage(key.name if key is not None else NO_KEY, since, until, by)
        await response.document(200, {"object": "list", "key": key and key.name, "since": since, "data": rows})

    # --------------------------------------------------------------------------------------------- log

    def _log(self, request: Request, response: Response) -> None:
        path = route(request.path)
        metrics.REQUESTS.labels(path, response.outcome).inc()
        if path in QUIET:
            return
        line = {
            "request_id": request.id,
            "route": path,
            "status": response.status,
            "outcome": response.outcome,
            "key": response.key_name,
            "ms": round((time.monotonic() - request.arrived) * 1e3, 1),
            "prompt_tokens": response.usage.get("prompt_tokens"),
            "completion_tokens": response.usage.get("completion_tokens"),
        }
        access.info(json.dumps(line))


def with_cors(gate: Gate, origins: Sequence[str]) -> App:
    """Return the gate for pages of these origins too. A browser's question whether it may ask needs no key."""
    if not origins:
        return gate
    return CORSMiddleware(
        gate, allow_origins=origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=EXPOSED
    )
