"""Mixed load with aborts for a long time: `python -m loadtests.experiments.soak --minutes 20`.

Six users stream to the end, leave in the middle, ask without streaming, send nonsense and come back after a pause.
Every few seconds the server's memory, its KV cache and its sequences in flight are read. Memory must not grow after the
warm-up (least-squares slope), and nothing may be held after all users have left.
"""

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import linear_regression
from typing import Any

import httpx

from loadtests.experiments.experiment import command, note, parser
from loadtests.experiments.stream import client, stream
from loadtests.generator.workload import body
from loadtests.report.tables import Bound, render, write
from loadtests.servers import local
from loadtests.servers.contenders import ours

USERS = 6
SAMPLE_S = 5.0
WARM_UP = 0.25
"""Part of the run that is left out of the slope: caches and pools fill."""
BOUND_MIB_A_MINUTE = 1.0


async def user(http: httpx.AsyncClient, seed: int, end: float, counts: Counter[str]) -> None:
    """One user until `end` (monotonic seconds), with every habit in turn at random."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        request = body(rng, rng.randint(4, 96), words=rng.choice([5, 40, 200, 600]))
        habit = rng.choice(["stream", "stream", "leave", "whole", "nonsense", "pause"])
        try:
            if habit == "stream":
                timing = await stream(http, request)
                counts[f"stream {timing.status} {timing.error or 'ok'}"[:60]] += 1
            elif habit == "leave":
                await stream(http, request, stop_after=rng.randint(1, 12))
                counts["left in the middle"] += 1
            elif habit == "whole":
                del request["stream"], request["stream_options"]
                limit = rng.choice([0.5, 60])
                response = await http.post("/v1/chat/completions", json=request, timeout=limit)
                counts[f"whole {response.status_code}"] += 1
            elif habit == "nonsense":
                response = await http.post("/v1/chat/completions", json={**request, "echo": True})
                counts[f"nonsense {response.status_code}"] += 1
            else:
                await asyncio.sleep(rng.uniform(0, 3))
        except httpx.TimeoutException:
            counts["gave up waiting"] += 1
        except httpx.TransportError as error:
            counts[f"transport {type(error).__name__}"] += 1


async def run(server: local.Server, minutes: float, samples: list[dict[str, float]], counts: Counter[str]) -> None:
    """The load, and a sample every SAMPLE_S."""
    begin = time.monotonic()
    end = begin + minutes * 60
    async with client(server.url) as http:
        users = asyncio.gather(*(user(http, seed, end, counts) for seed in range(USERS)))
        while time.monotonic() < end:
            await asyncio.sleep(min(SAMPLE_S, max(0.0, end - time.monotonic())))
            minute = (time.monotonic() - begin) / 60
            sample = {"minute": minute, **await asyncio.to_thread(reading, server)}
            samples.append(sample)
            if len(samples) % 12 == 0:
                note(", ".join(f"{name} {value:.3g}" for name, value in sample.items()))
        await users


def reading(server: local.Server) -> dict[str, float]:
    """Memory of the server's process and of its engine (MiB), KV use (0-1), sequences in flight."""
    engine = sum(process.memory_info().rss for process in server.processes() if process != server.process)
    return {
        "rss_mib": server.rss_bytes() / (1 << 20),
        "engine_rss_mib": engine / (1 << 20),
        "kv_usage": local.metric(server.url, "vllm:kv_cache_usage_perc"),
        "inflight": local.metric(server.url, "borg_inflight"),
    }


def measure(config: str, minutes: float) -> dict[str, Any]:
    """Run the soak against a server of its own; the JSON document of the report."""
    samples: list[dict[str, float]] = []
    counts: Counter[str] = Counter()
    with ours(config, Path(tempfile.mkdtemp(prefix="borg-soak-")))() as server:
        idle = reading(server)
        asyncio.run(run(server, minutes, samples, counts))
        time.sleep(2)
        left = reading(server)
        refusals = local.metric(server.url, "borg_guard_refusals_total")
    kept = [sample for sample in samples if sample["minute"] >= WARM_UP * minutes]
    minutes_kept = [sample["minute"] for sample in kept]
    return {
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


def judged(document: dict[str, Any]) -> list[Bound]:
    """What must not grow, and how no request may end."""
    slope, idle, left = document["slope_mib_a_minute"], document["idle"], document["left"]
    guarded, inflight = document["guard_refusals"], left["inflight"]
    bad = ("transport", "whole 5", "stream 5", "stream 200 wrong grammar")
    unexpected = {name: n for name, n in document["requests"].items() if name.startswith(bad) and "503" not in name}
    bound, grown = f"{BOUND_MIB_A_MINUTE:g} MiB/min", f"{slope['']:+.2f} MiB/min"
    kv_bound, kv_met = f"{idle['kv_usage']:.4f}, as before", left["kv_usage"] <= idle["kv_usage"]
    return [
        ("slope of the server's resident memory", bound, grown, slope[""] <= BOUND_MIB_A_MINUTE),
        ("slope of the engine's resident memory", "none", f"{slope['engine_']:+.2f} MiB/min", None),
        ("KV use after all users have left", kv_bound, f"{left['kv_usage']:.4f}", kv_met),
        ("sequences in flight after all users have left", "0", f"{inflight:.0f}", inflight == 0),
        ("refusals by the guard", "0", f"{guarded:.0f}", guarded == 0),
        ("unexpected ends", "none", str(unexpected or "none"), not unexpected),
    ]


def text(document: dict[str, Any]) -> str:
    """The report for a person."""
    return render("soak.md.j2", document, judged=judged(document), users=USERS, warm_up=WARM_UP)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "soak")
    options.add_argument("--minutes", type=float, default=20)
    arguments = options.parse_args()
    document = {"command": command("soak", arguments), **measure(arguments.config, arguments.minutes)}
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
