"""Our metrics, which `/metrics` shows beside vLLM's.

It knows names and labels only. With several API processes prometheus-client adds them up (or takes the least, for
`borg_ready`) through its multiprocess directory, which vLLM sets up. `gen_ai_*` are OpenTelemetry's.
"""

from prometheus_client import Counter, Gauge, Histogram

__all__ = [
    "FIRST_TOKEN_SECONDS",
    "GUARD_REFUSALS",
    "HEARTBEAT_TOKENS",
    "IDENTITY_TOKENS",
    "IGNORED",
    "INFLIGHT",
    "KEY_ENGINE_SECONDS",
    "KEY_REQUESTS",
    "KEY_TOKENS",
    "OUTPUT_TOKEN_SECONDS",
    "QUEUED",
    "QUEUE_SECONDS",
    "READY",
    "REFUSALS",
    "REQUESTS",
    "REQUEST_SECONDS",
    "SLOTS",
    "TOKEN_USAGE",
    "USAGE_LOST",
    "USAGE_WAITING",
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
SLOTS = Gauge("borg_places", "Sequences that may be in the engine at once", multiprocess_mode="livemax")
QUEUED = Gauge("borg_queued", "Requests waiting for admission", multiprocess_mode="livesum")
QUEUE_SECONDS = Histogram(
    "borg_queue_seconds",
    "Time from a request's arrival to its admission",
    buckets=(0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60),
)
USAGE_LOST = Counter("borg_usage_lost", "Requests that are missing in the usage ledger: no room, or a damaged line")
USAGE_WAITING = Gauge(
    "borg_usage_waiting_bytes", "Bytes of usage that wait for the ledger's database", multiprocess_mode="livemax"
)

# OpenTelemetry's semantic conventions for generative AI, version 1.41.1: names as its Prometheus exporter writes them,
# and the buckets that it recommends. https://github.com/open-telemetry/semantic-conventions/tree/v1.41.1/docs/gen-ai
_GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
REQUEST_SECONDS = Histogram(
    "gen_ai_server_request_duration_seconds",
    "Time from a generating request's arrival to its end; error_type says how it ended unless it ended well",
    [*_GEN_AI, "error_type"],
    buckets=(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
FIRST_TOKEN_SECONDS = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "Time from a request's arrival to its first output token, of requests that ended well",
    _GEN_AI,
    buckets=(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
OUTPUT_TOKEN_SECONDS = Histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Mean time of each output token after the first, of requests that ended well",
    _GEN_AI,
    buckets=(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
)
TOKEN_USAGE = Histogram(
    "gen_ai_client_token_usage",
    "Tokens of a request by type, input without the identity's",
    [*_GEN_AI, "gen_ai_token_type"],
    buckets=[4**power for power in range(14)],
)

KEY_REQUESTS = Counter(
    "borg_key_requests", "Generating requests by key: ok, refused, aborted or failed", ["key", "outcome"]
)
KEY_TOKENS = Counter(
    "borg_key_tokens", "Tokens by key: prompt and cached without the identity, identity, output", ["key", "kind"]
)
KEY_ENGINE_SECONDS = Counter("borg_key_engine_seconds", "Time in slots of the engine by key", ["key"])
