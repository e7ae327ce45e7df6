"""Mixed load with aborts for a long time: `python -m loadtests.soak --minutes 20`.

Six users stream to the end, leave in the middle, ask without streaming, send nonsense and come back after a pause.
Every few seconds the server's memory, its KV cache and its places are read. What must not grow: memory after the
warm-up (least-squares slope), and what is held once everybody has left.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import linear_regression
from typing import Any

import httpx

from loadtests import servers
from loadtests.streaming import body, stream
from loadtests.tables import figures, table, write

USERS = 6
SAMPLE_S = 5.0
WARM_UP = 0.25
"""Part of the run that is left out of the slope: caches and pools fill."""
BOUND_MIB_A_MINUTE = 1.0


async def user(client: httpx.AsyncClient, seed: int, end: float, counts: Counter[str]) -> None:
    """One user until `end` (monotonic seconds), with every habit in turn at random."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        request = body(rng, rng.randint(4, 96), words=rng.choice([5, 40, 200, 600]))
        habit = rng.choice(["stream", "stream", "leave", "whole", "nonsense", "pause"])
        try:
            if habit == "stream":
                timing = await stream(client, request)
                counts[f"stream {timing.status} {timing.error or 'ok'}"[:60]] += 1
            elif habit == "leave":
                await stream(client, request, stop_after=rng.randint(1, 12))
                counts["left in the middle"] += 1
            elif habit == "whole":
                del request["stream"], request["stream_options"]
                limit = rng.choice([0.5, 60])
                response = await client.post("/v1/chat/completions", json=request, timeout=limit)
                counts[f"whole {response.status_code}"] += 1
            elif habit == "nonsense":
                response = await client.post("/v1/chat/completions", json={**request, "echo": True})
                counts[f"nonsense {response.status_code}"] += 1
            else:
                await asyncio.sleep(rng.uniform(0, 3))
        except httpx.TimeoutException:
            counts["gave up waiting"] += 1
        except httpx.TransportError as error:
            counts[f"transport {type(error).__name__}"] += 1


async def run(server: servers.Server, minutes: float, samples: list[dict[str, float]], counts: Counter[str]) -> None:
    """The load, and a sample every SAMPLE_S."""
    begin = time.monotonic()
    end = begin + minutes * 60
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        users = asyncio.gather(*(user(client, seed, end, counts) for seed in range(USERS)))
        while time.monotonic() < end:
            await asyncio.sleep(min(SAMPLE_S, max(0.0, end - time.monotonic())))
            minute = (time.monotonic() - begin) / 60
            sample = {"minute": minute, **await asyncio.to_thread(reading, server)}
            samples.append(sample)
            if len(samples) % 12 == 0:
                line = ", ".join(f"{name} {value:.3g}" for name, value in sample.items())
                print(line, file=sys.stderr, flush=True)
        await users


def reading(server: servers.Server) -> dict[str, float]:
    """Memory of the server's process and of its engine (MiB), KV use (0-1), sequences in flight."""
    engine = sum(process.memory_info().rss for process in server.processes[1:])
    return {
        "rss_mib": server.rss_bytes() / (1 << 20),
        "engine_rss_mib": engine / (1 << 20),
        "kv_usage": servers.metric(server.url, "vllm:kv_cache_usage_perc"),
        "inflight": servers.metric(server.url, "borg_inflight"),
    }


def measure(config: str, minutes: float) -> dict[str, Any]:
    """Run the soak against a server of its own; the JSON document of the report."""
    port = servers.free_port()
    log = Path(tempfile.mkdtemp(prefix="borg-soak-")) / "server.log"
    samples: list[dict[str, float]] = []
    counts: Counter[str] = Counter()
    with servers.running("ours", servers.ours(config, port), port, "/ready", log) as server:
        idle = reading(server)
        asyncio.run(run(server, minutes, samples, counts))
        time.sleep(2)
        left = reading(server)
        refusals = servers.metric(server.url, "borg_guard_refusals_total")
    kept = [sample for sample in samples if sample["minute"] >= WARM_UP * minutes]
    minutes_kept = [sample["minute"] for sample in kept]
    return {
        "command": f"python -m loadtests.soak --config {config} --minutes {minutes:g}",
        "idle": idle,
        "left": left,
        "guard_refusals": refusals,
        "slope_mib_a_minute": {
            name: linear_regression(minutes_kept, [sample[f"{name}rss_mib"] for sample in kept]).slope
            for name in ("", "engine_")
        },
        "requests": dict(counts.most_common()),
        "samples": samples,
    }


def markdown(result: dict[str, Any]) -> str:
    """The report for a person."""
    slope, idle, left = result["slope_mib_a_minute"], result["idle"], result["left"]
    bad = ("transport", "whole 5", "stream 5", "stream 200 silent")
    unexpected = {name: n for name, n in result["requests"].items() if name.startswith(bad) and "503" not in name}
    bounds = figures(
        [
            (
                "slope of the server's resident memory",
                f"{BOUND_MIB_A_MINUTE:g} MiB/min",
                f"{slope['']:+.2f} MiB/min",
                slope[""] <= BOUND_MIB_A_MINUTE,
            ),
            ("slope of the engine's resident memory", "none", f"{slope['engine_']:+.2f} MiB/min", None),
            (
                "KV use once everybody has left",
                f"{idle['kv_usage']:.4f}, as before",
                f"{left['kv_usage']:.4f}",
                left["kv_usage"] <= idle["kv_usage"],
            ),
            ("sequences in flight once everybody has left", "0", f"{left['inflight']:.0f}", left["inflight"] == 0),
            ("refusals by the guard", "0", f"{result['guard_refusals']:.0f}", result["guard_refusals"] == 0),
            ("unexpected ends", "none", str(unexpected or "none"), not unexpected),
        ]
    )
    every = result["samples"][:: max(1, len(result["samples"]) // 20)]
    keys = ("minute", "rss_mib", "engine_rss_mib", "kv_usage", "inflight")
    course = table(
        ["minute", "server MiB", "engine MiB", "KV use", "in flight"],
        [[f"{sample[key]:.4g}" for key in keys] for sample in every],
    )
    return f"""# Soak

`{result["command"]}`, demo model, CPU engine, {USERS} users of mixed habits,
{sum(result["requests"].values())} requests. Slopes are least squares over the samples after the first {WARM_UP:.0%}.

{bounds}

{table(["request", "times"], result["requests"].items())}

{course}
"""


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo-cpu.yaml")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    result = measure(arguments.config, arguments.minutes)
    write(arguments.out, "soak", result, markdown(result))


if __name__ == "__main__":
    main()
