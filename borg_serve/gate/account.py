"""What one generating request uses, told once: to the ledger's spool, to metrics and to its trace.

It knows counts and times. It does not know who may do what.
"""

import time

from opentelemetry.trace import Span

from borg_serve.gate import telemetry, tracing
from borg_serve.gate.admission import Grant
from borg_serve.gate.answer import Response
from borg_serve.gate.request import Request
from borg_serve.gate.telemetry import Spent
from borg_serve.usage.spool import Entry, Spool

__all__ = ["NO_KEY", "Account"]

NO_KEY = "-"
"""Stands in the ledger for a key where the server has none."""


class Account:
    """One generating request's use of the server."""

    def __init__(self, request: Request, response: Response, identity_tokens: int) -> None:
        self.grant: Grant | None = None
        """Slots that the request got."""
        self._request = request
        self._response = response
        self._identity_tokens = identity_tokens
        self._granted_at = 0.0
        self._spent: Spent | None = None
        self._spool: Spool | None = None
        response.succeeding = lambda: self._write("ok")

    def open(self, spool: Spool | None) -> None:
        """Keep its usage there for the ledger: its key is known."""
        self._spool = spool

    def granted(self, grant: Grant) -> None:
        """The request has slots in the engine from now on."""
        self.grant, self._granted_at = grant, time.monotonic()

    def leave(self) -> Spent:
        """The request leaves the engine; return what it has cost there.

        A prompt without a first token was perhaps never read: it is charged, but not billed, as vLLM does not count it.
        """
        spent = self._now()
        self._spent = spent if spent.output_tokens else Spent(engine_s=spent.engine_s, choices=spent.choices)
        return spent

    def close(self, span: Span, model: str) -> None:
        """The request has been answered, or its client is gone. `model` is the served name."""
        response, arrived, now = self._response, self._request.arrived, time.monotonic()
        self._write(response.outcome)
        response.succeeding = _nothing  # each would keep the other alive
        spent = self._spent or Spent()
        tracing.ended(span, response.outcome, response.status, spent, model)
        first = response.first_event_at or response.progress.first_token_at
        first_s = first - arrived if first else None
        telemetry.finished(response.outcome, now - arrived, first_s, spent, response.key_name, model)

    def _now(self) -> Spent:
        """What it has used until now. vLLM's own count, which comes with a whole answer, has precedence."""
        usage, progress = self._response.usage, self._response.progress.now()
        prompt = usage.get("prompt_tokens") or progress.prompt_tokens
        identity = min(self._identity_tokens, prompt)
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens", progress.cached_tokens) or 0
        output = usage.get("completion_tokens", progress.output_tokens)
        choices = self.grant.sequences if self.grant is not None else 1
        held_s = time.monotonic() - self._granted_at if self.grant is not None else 0.0
        return Spent(prompt - identity, identity, max(0, cached - identity), output, held_s * choices, choices)

    def _write(self, outcome: str) -> None:
        """Keep it for the ledger, once, and before the client knows that its answer is whole."""
        spool, self._spool = self._spool, None
        if spool is None:
            return
        key = self._response.key_name or NO_KEY
        if telemetry.ending(outcome) == "refused":
            spool.refuse(key)
            return
        spent = self._spent or self._now()  # not yet left: then the answer is whole
        counts = (spent.prompt_tokens, spent.identity_tokens, spent.cached_tokens, spent.output_tokens)
        spool.write(Entry(key, time.time(), outcome != "ok", *counts, spent.engine_s))


def _nothing() -> None:
    pass
