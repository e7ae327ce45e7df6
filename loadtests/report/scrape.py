"""The server's own /metrics, once a second beside a run, and whether its token totals agree with the clients'.

It knows vLLM's and our metric names. It runs in a process that makes no load, and sums what several engines report.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtests.generator.records import Record

HEARTBEATS = 'borg_heartbeat_tokens_total{kind="%s"}'
"""The watchdog asks an idle engine for a token now and then; vLLM counts that with everybody's."""
NAMES = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "borg_inflight",
    "borg_queued",
    HEARTBEATS % "prompt",
    HEARTBEATS % "output",
)
TOLERANCE = 0.01


def values(text: str) -> dict[str, float]:
    """The samples of NAMES in the text format, summed over their labels."""
    found: dict[str, float] = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        heartbeats = sample.name == HEARTBEATS.partition("{")[0]
        name = HEARTBEATS % sample.labels.get("kind") if heartbeats else sample.name
        if name in NAMES:
            found[name] = found.get(name, 0.0) + sample.value
    return found


class Scraper:
    """Reads `url`/metrics once a second in a thread while the block runs; `samples` are (monotonic s, values)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") + "/metrics"
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.problem: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Scraper":
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self._read()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self._read()

    def _read(self) -> None:
        now = time.monotonic()
        try:
            answer = httpx.get(self.url, timeout=10)
            answer.raise_for_status()
            found = values(answer.text)
        except (httpx.HTTPError, ValueError) as error:
            self.problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return
        if found:
            self.samples.append((now, found))


def agreement(
    samples: Sequence[tuple[float, dict[str, float]]], records: Sequence[Record], problem: str | None = None
) -> dict[str, Any]:
    """Token totals of the server and of its clients side by side, warm-up included, with a verdict in words.

    Only requests that ended well have a usage, so a run with others can only be compared from one side. The clients'
    cached tokens are None where the server does not report them in its usage. What the server's own watchdog asked is
    left out of the totals; its cache hits are not known, and cache hits are not judged.
    """
    if len(samples) < 2:
        verdict = f"not checked: the server shows no metrics of vLLM's ({problem or 'none found'})"
        return {"verdict": verdict, "rows": []}
    first, last = samples[0][1], samples[-1][1]
    cached = [record.cached_tokens for record in records]
    mine: dict[str, float | None] = {
        "vllm:prompt_tokens_total": sum(record.prompt_tokens for record in records),
        "vllm:generation_tokens_total": sum(record.output_tokens for record in records),
        "vllm:prefix_cache_hits_total": None if None in cached else sum(value or 0 for value in cached),
    }
    rows: list[dict[str, Any]] = []
    for name, clients in mine.items():
        if name not in last:
            continue
        server = last[name] - first.get(name, 0.0)
        beats = HEARTBEATS % ("prompt" if "prompt" in name else "output")
        own = None if "hits" in name else last.get(beats, 0.0) - first.get(beats, 0.0)
        theirs = server - (own or 0.0)
        apart = None if clients is None else abs(theirs - clients) / max(theirs, clients, 1.0)
        rows.append({"name": name, "server": server, "own": own, "clients": clients, "apart": apart})
    judged = [row for row in rows if row["apart"] is not None and "hits" not in row["name"]]
    failed = sum(not record.ok for record in records)
    if not judged:
        verdict = "not checked: the server shows no token totals"
    elif all(row["apart"] <= TOLERANCE for row in judged):
        verdict = f"agree within {TOLERANCE:.0%}"
    elif failed:
        verdict = f"differ, and {failed} requests that did not end well have no usage"
    else:
        verdict = "DIFFER: somebody else used the server, or one of the two counts wrongly"
    return {"verdict": verdict, "rows": rows}
