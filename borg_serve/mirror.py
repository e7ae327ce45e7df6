"""Shows our metrics and vLLM's to Ray, whose agent on each node exports them, with the replica's id.

It copies what prometheus-client counts in this process; every sample becomes a gauge of the same name, which PromQL's
`rate` and `histogram_quantile` read as well. vLLM could count with Ray's own metrics, but each count of each step would
go through Ray's core. It does not know what the metrics mean.
"""

import asyncio

from prometheus_client import REGISTRY
from ray.util.metrics import Gauge

__all__ = ["copy", "run"]

PERIOD_S = 5.0
PREFIXES = ("borg_", "vllm:")
_gauges: dict[str, Gauge] = {}


def copy(replica: str) -> None:
    """Copy every sample of ours and vLLM's once. Ray allows no colon in a name: `vllm:x` becomes `vllm_x`."""
    for family in REGISTRY.collect():
        if not family.name.startswith(PREFIXES):
            continue
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = {**sample.labels, "ReplicaId": replica}
            gauge = _gauges.get(sample.name)
            if gauge is None:
                gauge = Gauge(sample.name.replace(":", "_"), description=family.documentation, tag_keys=tuple(labels))
                _gauges[sample.name] = gauge
            gauge.set(sample.value, tags=labels)


async def run(replica: str) -> None:
    """Copy for ever."""
    while True:
        copy(replica)
        await asyncio.sleep(PERIOD_S)
