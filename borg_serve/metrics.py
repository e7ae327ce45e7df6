"""Our metrics, which `/metrics` shows beside vLLM's.

It knows names and labels only. With several API processes prometheus-client adds them up (or takes the least, for
`borg_ready`) through its multiprocess directory, which vLLM sets up.
"""

from prometheus_client import Counter, Gauge, Histogram

__all__ = [
    "GUARD_REFUSALS",
    "HEARTBEAT_TOKENS",
    "IDENTITY_TOKENS",
    "IGNORED",
    "INFLIGHT",
    "QUEUED",
    "QUEUE_SECONDS",
    "READY",
    "REFUSALS",
    "REQUESTS",
    "SLOTS",
]

READY = Gauge("borg_ready", "1 while every condition of readiness holds, else 0", multiprocess_mode="livemin")
IDENTITY_TOKENS = Gauge(
    "borg_identity_tokens", "Tokens of the identity that every prompt begins with", multiprocess_mode="livemax"
)
GUARD_REFUSALS = Counter("borg_guard_refusals", "Prompts refused at the engine: they did not begin with the identity")
HEARTBEAT_TOKENS = Counter(
    "borg_heartbeat_tokens", "Tokens of the watchdog's own requests, which vLLM counts with all others", ["kind"]
)
REQUESTS = Counter("borg_requests", "Requests answered, by route and how they ended", ["route", "outcome"])
REFUSALS = Counter("borg_refusals", "Requests refused by the gate, by reason", ["reason"])
IGNORED = Counter(
    "borg_ignored_fields", "Fields of requests that were ignored, by name; rare names as other", ["field"]
)
INFLIGHT = Gauge("borg_inflight", "Sequences admitted and not yet ended", multiprocess_mode="livesum")
SLOTS = Gauge("borg_places", "Sequences that may be in the engine at once", multiprocess_mode="livesum")
QUEUED = Gauge("borg_queued", "Requests waiting for admission", multiprocess_mode="livesum")
QUEUE_SECONDS = Histogram(
    "borg_queue_seconds",
    "Time from a request's arrival to its admission",
    buckets=(0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60),
)
