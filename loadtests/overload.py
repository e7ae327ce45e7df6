"""Ten times more load than fits, for a minute: `python -m loadtests.overload`, about 4 minutes on two cores.

First as many users as the server has places, each sending the next request when the last has ended: the capacity. Then
requests arrive at ten times that rate, whatever becomes of them (Poisson, open loop). The report says how soon refused
requests were answered, how long accepted ones waited for their first token, and what memory did.
"""

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from loadtests import servers
from loadtests.streaming import Timing, body, stream
from loadtests.tables import figures, write

OUTPUT_TOKENS = 32
BOUNDS = {"refused_p99_ms": 250.0, "ttft_ratio": 2.0}


async def closed(url: str, users: int, seconds: float) -> tuple[list[Timing], float]:
    """`users` users without think time for some seconds; (their requests, requests ended a second)."""
    done: list[Timing] = []
    begin = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=180, limits=httpx.Limits(max_connections=None)) as client:

        async def user(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() - begin < seconds:
                done.append(await stream(client, body(rng, OUTPUT_TOKENS)))

        await asyncio.gather(*(user(seed) for seed in range(users)))
    return done, len(done) / (time.monotonic() - begin)


async def open_loop(url: str, rate: float, seconds: float) -> list[Timing]:
    """Requests that arrive at `rate` a second for some seconds, whether or not earlier ones have ended."""
    rng = random.Random(7)
    tasks: list[asyncio.Task[Timing]] = []
    async with httpx.AsyncClient(base_url=url, timeout=180, limits=httpx.Limits(max_connections=None)) as client:
        due = time.monotonic()
        end = due + seconds
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(stream(client, body(rng, OUTPUT_TOKENS))))
            due += rng.expovariate(rate)
        return list(await asyncio.gather(*tasks))


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else sum(values)


def measure(config: str, seconds: float) -> dict[str, Any]:
    """Run both phases against a server of its own; the JSON document of the report."""
    port = servers.free_port()
    log = Path(tempfile.mkdtemp(prefix="borg-overload-")) / "server.log"
    with servers.running("ours", servers.ours(config, port), port, "/ready", log) as server:
        places = int(servers.metric(server.url, "borg_places"))
        asyncio.run(closed(server.url, places, 10))  # warm-up
        base, rate = asyncio.run(closed(server.url, places, seconds / 2))
        before = server.rss_bytes()
        over = asyncio.run(open_loop(server.url, 10 * rate, seconds))
        after = server.rss_bytes()
        time.sleep(1)
        inflight = servers.metric(server.url, "borg_inflight")
    refused = [timing for timing in over if timing.status == 503]
    accepted = [timing for timing in over if timing.status == 200 and timing.error is None]
    base_ttft = [timing.first_s * 1e3 for timing in base if timing.first_s]
    ttft = [timing.first_s * 1e3 for timing in accepted if timing.first_s]
    refusal_ms = [timing.end_s * 1e3 for timing in refused]
    return {
        "command": f"python -m loadtests.overload --config {config} --seconds {seconds:g}",
        "places": places,
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


def markdown(result: dict[str, Any]) -> str:
    """The report for a person."""
    ttft, refused, rss = result["ttft_ms"], result["refused_ms"], result["rss_mib"]
    unanswered, careless = result["other"], result["refused_without_retry_after"]
    rows = figures(
        [
            (
                "refused requests answered, p99",
                f"{BOUNDS['refused_p99_ms']:.0f} ms",
                f"{refused['p99']:.0f} ms (p50 {refused['p50']:.0f}, max {refused['max']:.0f})",
                refused["p99"] <= BOUNDS["refused_p99_ms"],
            ),
            (
                "TTFT p50 of accepted requests",
                f"{BOUNDS['ttft_ratio']:g} x the {ttft['base_p50']:.0f} ms at capacity",
                f"{ttft['p50']:.0f} ms ({ttft['p50'] / ttft['base_p50']:.2f} x)",
                ttft["p50"] <= BOUNDS["ttft_ratio"] * ttft["base_p50"],
            ),
            (
                "TTFT p95 of accepted requests",
                "none",
                f"{ttft['p95']:.0f} ms ({ttft['p95'] / ttft['base_p95']:.2f} x)",
                None,
            ),
            (
                "requests without an answer, refusals without Retry-After",
                "0",
                f"{unanswered} + {careless}",
                unanswered + careless == 0,
            ),
            (
                "sequences in flight afterwards",
                "0",
                f"{result['inflight_afterwards']:.0f}",
                result["inflight_afterwards"] == 0,
            ),
            ("resident memory of the server's process", "flat", f"{rss['before']:.0f} -> {rss['after']:.0f} MiB", None),
        ]
    )
    return f"""# Ten times more load than fits

`{result["command"]}`, demo model, CPU engine; client and server share the cores.

Capacity: {result["places"]} users in a closed loop end {result["capacity_per_s"]:.2f} requests/s
({OUTPUT_TOKENS} tokens each).
Then {result["offered_per_s"]:.1f} requests/s arrive (Poisson, open loop): {result["requests"]} requests, of which
{result["accepted"]} were accepted, {result["refused"]} refused with 503 and {unanswered} ended otherwise.
TTFT counts from sending, so it includes the queue.

{rows}
"""


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo-cpu.yaml")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    result = measure(arguments.config, arguments.seconds)
    write(arguments.out, "overload", result, markdown(result))


if __name__ == "__main__":
    main()
