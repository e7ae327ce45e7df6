"""Metrics of a generating request at its end: OpenTelemetry's for generative AI, and ours by key.

It knows counts, times and names, and no request's content. `borg_serve.metrics` names the conventions' version.
"""

from dataclasses import dataclass
from typing import Literal

from borg_serve import metrics

__all__ = ["OPERATION", "PROVIDER", "Spent", "ending", "finished"]

OPERATION = "chat"
"""`gen_ai.operation.name` of all three protocols: each becomes a chat request."""
PROVIDER = "vllm"
"""`gen_ai.provider.name`. The conventions list hosted services only, and allow a name of one's own."""
ABORTED = frozenset({"gone", "stalled"})
"""Outcomes where the client left, or did not read."""
FAILED = frozenset({"deadline", "drain", "engine_lost", "error"})
"""Outcomes where the server did not complete what it had taken."""


@dataclass(frozen=True)
class Spent:
    """What a request cost; 0 is nothing or unknown."""

    prompt_tokens: int = 0
    """Without the identity's."""
    identity_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache, without the identity's."""
    output_tokens: int = 0
    """Of all choices together."""
    engine_s: float = 0.0
    """Time in slots of the engine, of all choices together."""
    choices: int = 1


def ending(outcome: str) -> Literal["ok", "refused", "aborted", "failed"]:
    """Return the class of an outcome: `ok`, `gone` or an error's reason."""
    if outcome == "ok":
        return "ok"
    if outcome in ABORTED:
        return "aborted"
    return "failed" if outcome in FAILED else "refused"


def finished(
    outcome: str, duration_s: float, first_token_s: float | None, spent: Spent, key: str | None, model: str
) -> None:
    """Observe one request, once, at its end. Both times count from its arrival.

    `first_token_s` is None where no token was seen; `key` where the server has no keys. `model`: the served name, never
    the client's text.
    """
    labels = (OPERATION, PROVIDER, model)
    # An empty label is none, in Prometheus: error.type is there for errors only.
    metrics.REQUEST_SECONDS.labels(*labels, "" if outcome == "ok" else outcome).observe(duration_s)
    if outcome == "ok" and first_token_s is not None:
        metrics.FIRST_TOKEN_SECONDS.labels(*labels).observe(first_token_s)
        rest = spent.output_tokens / spent.choices - 1
        if rest > 0:
            metrics.OUTPUT_TOKEN_SECONDS.labels(*labels).observe((duration_s - first_token_s) / rest)
    for kind, count in (("input", spent.prompt_tokens), ("output", spent.output_tokens)):
        if count:
            metrics.TOKEN_USAGE.labels(*labels, kind).observe(count)
    if key is not None:
        metrics.KEY_REQUESTS.labels(key, ending(outcome)).inc()
        metrics.KEY_ENGINE_SECONDS.labels(key).inc(spent.engine_s)
        metrics.KEY_TOKENS.labels(key, "prompt").inc(spent.prompt_tokens)
        metrics.KEY_TOKENS.labels(key, "identity").inc(spent.identity_tokens)
        metrics.KEY_TOKENS.labels(key, "cached").inc(spent.cached_tokens)
        metrics.KEY_TOKENS.labels(key, "output").inc(spent.output_tokens)
