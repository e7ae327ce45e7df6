"""Ten times more load than fits, for a minute: `python -m loadtests.experiments.overload`, about 4 minutes.

First as many users as the server has slots, each sending the next request when the last has ended: the capacity. Then
requests arrive at ten times that rate, whatever becomes of them (Poisson, open loop). The report says how soon refused
requests were answered, how long accepted ones waited for their first token, and what memory did.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from loadtests.experiments.experiment import command, parser
from loadtests.experiments.stream import Timing, client, stream
from loadtests.generator.closed_loop import closed_loop
from loadtests.generator.workload import body
from loadtests.report.slo import percentile
from loadtests.report.tables import Bound, render, write
from loadtests.servers import local
from loadtests.servers.contenders import ours

OUTPUT_TOKENS = 32
BOUNDS = {"refused_p99_ms": 250.0, "ttft_ratio": 2.0}


def requests(seconds: float) -> Iterator[dict[str, Any]]:
    """Requests for as long as this."""
    rng = random.Random(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield body(rng, OUTPUT_TOKENS)


async def open_loop(url: str, rate: float, seconds: float) -> list[Timing]:
    """Requests that arrive at `rate` a second for some seconds, whether or not earlier ones have ended."""
    rng = random.Random(7)
    tasks: list[asyncio.Task[Timing]] = []
    async with client(url, timeout_s=180) as http:
        due = time.monotonic()
        end = due + seconds
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(stream(http, body(rng, OUTPUT_TOKENS))))
            due += rng.expovariate(rate)
        return list(await asyncio.gather(*tasks))


def measure(config: str, seconds: float) -> dict[str, Any]:
    """Run both phases against a server of its own; the JSON document of the report."""
    with ours(config, Path(tempfile.mkdtemp(prefix="borg-overload-")))() as server:
        slots = int(local.metric(server.url, "borg_places"))
        asyncio.run(closed_loop(server.url, slots, requests(10)))  # warm-up
        base = asyncio.run(closed_loop(server.url, slots, requests(seconds / 2), timeout_s=180))
        rate = len(base.ttft_s) / base.elapsed_s
        before = server.rss_bytes()
        over = asyncio.run(open_loop(server.url, 10 * rate, seconds))
        after = server.rss_bytes()
        time.sleep(1)
        inflight = local.metric(server.url, "borg_inflight")
    refused = [timing for timing in over if timing.status == 503]
    accepted = [timing for timing in over if timing.status == 200 and timing.error is None]
    base_ttft = [first_s * 1e3 for first_s in base.ttft_s]
    ttft = [timing.first_s * 1e3 for timing in accepted if timing.first_s]
    refusal_ms = [timing.end_s * 1e3 for timing in refused]
    return {
        "slots": slots,
        "capacity_per_s": rate,
        "offered_per_s": len(over) / seconds,
        "requests": len(over),
        "accepted": len(accepted),
        "refused": len(refused),
        "other": len(over) - len(accepted) - len(refused),
        "refused_without_retry_after": sum(timing.retry_after is None for timing in refused),
        "refused_ms": {"p50": median(refusal_ms), "p99": percentile(refusal_ms, 99), "max": max(refusal_ms)},
        "ttft_ms": {
            "base_p50": median(base_ttft),
            "base_p95": percentile(base_ttft, 95),
            "p50": median(ttft),
            "p95": percentile(ttft, 95),
        },
        "rss_mib": {"before": before / (1 << 20), "after": after / (1 << 20)},
        "inflight_afterwards": inflight,
    }


def judged(document: dict[str, Any]) -> list[Bound]:
    """What was to be reached."""
    ttft, refused, rss = document["ttft_ms"], document["refused_ms"], document["rss_mib"]
    unanswered, careless = document["other"], document["refused_without_retry_after"]
    inflight, most = document["inflight_afterwards"], BOUNDS["refused_p99_ms"]
    part, allowed = ttft["p50"] / ttft["base_p50"], BOUNDS["ttft_ratio"]
    soon = f"{refused['p99']:.0f} ms (p50 {refused['p50']:.0f}, max {refused['max']:.0f})"
    bound, slow = f"{allowed:g} x the {ttft['base_p50']:.0f} ms at capacity", f"{ttft['p50']:.0f} ms ({part:.2f} x)"
    slowest = f"{ttft['p95']:.0f} ms ({ttft['p95'] / ttft['base_p95']:.2f} x)"
    without = "requests without an answer, refusals without Retry-After"
    return [
        ("refused requests answered, p99", f"{most:.0f} ms", soon, refused["p99"] <= most),
        ("TTFT p50 of accepted requests", bound, slow, part <= allowed),
        ("TTFT p95 of accepted requests", "none", slowest, None),
        (without, "0", f"{unanswered} + {careless}", unanswered + careless == 0),
        ("sequences in flight afterwards", "0", f"{inflight:.0f}", inflight == 0),
        ("resident memory of the server's process", "flat", f"{rss['before']:.0f} -> {rss['after']:.0f} MiB", None),
    ]


def text(document: dict[str, Any]) -> str:
    """The report for a person."""
    return render("overload.md.j2", document, judged=judged(document), tokens=OUTPUT_TOKENS)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "overload")
    options.add_argument("--seconds", type=float, default=60)
    arguments = options.parse_args()
    document = {"command": command("overload", arguments), **measure(arguments.config, arguments.seconds)}
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
