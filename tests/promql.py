"""The metric names that the dashboards and alerts in deploy/ ask Prometheus for, and where each comes from.

It knows PromQL's words, not its grammar; and the relabelling of deploy/prometheus/cluster.yml, not Prometheus itself.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"

KEYWORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "offset", "bool"}
KEYWORDS |= {"atan2", "inf", "nan", "start", "end"}
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)", re.IGNORECASE)
STRING = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|`[^`]*`", re.DOTALL)
COMMENT = re.compile(r"#[^\n]*")
NAME_LABEL = re.compile(r"""\{\s*(?:__name__\s*=\s*)?["']([a-zA-Z_:][a-zA-Z0-9_:]*)["']\s*[,}]""")
NAME_PATTERN = re.compile(r"__name__\s*(?:=~|!~|!=)")
SELECTOR = re.compile(r"\{[^{}]*\}")
RANGE = re.compile(r"\[[^\[\]]*\]")
NUMBER = re.compile(r"(?<![\w:])(?:\d[\w.]*(?:e[+-]?\d+)?|0x[0-9a-f]+)", re.IGNORECASE)
WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def metric_names(expression: str) -> set[str]:
    """Names of the metrics that a PromQL expression reads.

    Raises ValueError for a pattern of names: what it reads cannot be told from the expression.
    """
    if NAME_PATTERN.search(expression):
        raise ValueError(f"expression: chooses metrics by a pattern, got {expression!r}. Write their names.")
    found = set(NAME_LABEL.findall(expression))
    text = STRING.sub('""', expression)
    text = COMMENT.sub("", text)
    text = RANGE.sub(" ", SELECTOR.sub(" ", text))
    text = NUMBER.sub(" ", GROUPING.sub(" ", text))
    for match in WORD.finditer(text):
        called = text[match.end() :].lstrip().startswith("(")
        if not called and match.group().lower() not in KEYWORDS:
            found.add(match.group())
    return found


def all_expressions() -> dict[str, str]:
    """Where -> expression, of every panel and every alert in deploy/."""
    found: dict[str, str] = {}
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in panels(json.loads(file.read_text(encoding="utf-8"))):
            for target in panel.get("targets", []):
                found[f"{file.name}: {panel['title']}: {target['refId']}"] = target["expr"]
    for file in sorted((DEPLOY / "prometheus").glob("*.yml")):
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        for group in document.get("groups", []):
            for rule in group["rules"]:
                found[f"{file.name}: {rule['alert']}"] = rule["expr"]
    return found


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels of a dashboard, those in collapsed rows included."""
    waiting, found = list(dashboard["panels"]), []
    while waiting:
        panel = waiting.pop(0)
        found.append(panel)
        waiting += panel.get("panels", [])
    return found


def scraped(names: Iterable[str], relabelling: list[dict[str, Any]] | None = None) -> set[str]:
    """Metric names as a Ray node exports them -> as deploy/prometheus/cluster.yml stores them."""
    rules = cluster_relabelling() if relabelling is None else relabelling
    stored = set()
    for name in names:
        for rule in rules:
            matched = re.fullmatch(rule["regex"], name)
            if matched is not None:
                name = matched.expand(rule["replacement"].replace("$1", r"\1"))
        stored.add(name)
    return stored


def cluster_relabelling() -> list[dict[str, Any]]:
    """The rules that give ours and vLLM's metrics of a Ray cluster the names they have on one machine."""
    document = yaml.safe_load((DEPLOY / "prometheus" / "cluster.yml").read_text(encoding="utf-8"))
    (job,) = [job for job in document["scrape_configs"] if "metric_relabel_configs" in job]
    rules: list[dict[str, Any]] = job["metric_relabel_configs"]
    return rules


ANYWHERE = frozenset(
    {
        "borg_guard_refusals_total",
        "borg_identity_tokens",
        "borg_inflight",
        "borg_key_engine_seconds_total",
        "borg_key_requests_total",
        "borg_key_tokens_total",
        "borg_places",
        "borg_queue_seconds_bucket",
        "borg_queued",
        "borg_ready",
        "borg_refusals_total",
        "borg_requests_total",
        "gen_ai_client_token_usage_sum",
        "gen_ai_server_request_duration_seconds_bucket",
        "gen_ai_server_request_duration_seconds_count",
        "gen_ai_server_time_per_output_token_seconds_bucket",
        "gen_ai_server_time_to_first_token_seconds_bucket",
        "vllm:generation_tokens_total",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
        "vllm:request_prompt_tokens_count",
        "vllm:request_prompt_tokens_sum",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
    }
)
"""On `/metrics` of one machine, and on a cluster once relabelled."""

CLUSTER = frozenset(
    {
        "haproxy_backend_active_servers",
        "haproxy_backend_connection_errors_total",
        "haproxy_backend_retry_warnings_total",
        "haproxy_frontend_current_sessions",
        "haproxy_server_check_failures_total",
        "ray_serve_autoscaling_target_replicas",
        "ray_serve_deployment_replica_healthy",
        "ray_serve_deployment_replica_starts_total",
        "ray_serve_deployment_status",
        "ray_serve_health_check_failures_total",
        "ray_serve_haproxy_ingress_router_failures_total",
        "ray_serve_haproxy_ingress_router_latency_ms_bucket",
        "ray_serve_haproxy_ingress_router_requests_total",
        "ray_serve_haproxy_ingress_router_server_mismatch_total",
        "ray_serve_http_request_latency_ms_bucket",
        "ray_serve_num_http_requests_total",
    }
)
"""On a cluster only."""

AFTER = {
    "borg_key_engine_seconds_total": "a request with a key ended",
    "borg_key_requests_total": "a request with a key ended",
    "borg_key_tokens_total": "a request with a key ended",
    "borg_refusals_total": "a request was refused",
    "gen_ai_server_time_per_output_token_seconds_bucket": "a stream of two tokens or more ended well",
    "gen_ai_server_time_to_first_token_seconds_bucket": "a stream ended well",
    "ray_serve_autoscaling_target_replicas": "a deployment with cluster.max_replicas was started",
    "ray_serve_health_check_failures_total": "a health check failed",
    "ray_serve_haproxy_ingress_router_failures_total": "the router failed to name a replica",
    "ray_serve_haproxy_ingress_router_server_mismatch_total": "a named replica was down and HAProxy took another",
    "vllm:num_preemptions_total": "a request was preempted",
}
"""Names that a cluster shows only after something has happened: Ray exports no counter before its first count.

On one machine all of them are there from the start, but a labelled one has no value before its first label."""
