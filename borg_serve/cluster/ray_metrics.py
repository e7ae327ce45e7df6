"""Copies this package's metrics and vLLM's to Ray, whose agent on each node exports them with the replica's id.

Every sample of prometheus-client becomes a gauge of the same name; PromQL's `rate` and `histogram_quantile` read gauges
as well. vLLM could count with Ray's metrics itself, but then each count of each step would go through Ray's core.
"""

import asyncio
from functools import cache

from prometheus_client import REGISTRY
from ray.util.metrics import Gauge

__all__ = ["copy", "run"]

PERIOD_S = 5.0
PREFIXES = ("borg_", "gen_ai_", "vllm:")


def copy(replica: str) -> None:
    """Copy every sample once. Ray allows no colon in a name: `vllm:x` becomes `vllm_x`."""
    for metric in REGISTRY.collect():
        for sample in metric.samples if metric.name.startswith(PREFIXES) else ():
            if not sample.name.endswith("_created"):
                labels = {**sample.labels, "ReplicaId": replica}
                _gauge(sample.name.replace(":", "_"), metric.documentation, tuple(labels)).set(sample.value, labels)


@cache
def _gauge(name: str, description: str, labels: tuple[str, ...]) -> Gauge:
    return Gauge(name, description, labels)


async def run(replica: str) -> None:
    """Copy every PERIOD_S, until cancelled."""
    while True:
        copy(replica)
        await asyncio.sleep(PERIOD_S)
