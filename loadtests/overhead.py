"""What this server costs over vLLM's stock server: `python -m loadtests.overhead`, about 15 minutes on two cores.

Both run the same engine arguments on the demo model; to the stock server the client sends the identity as its system
message. Both are started, one is paused while the other is measured, in the order A B B A. Definitions of the figures
are in the report.
"""

import argparse
import asyncio
import os
import platform
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from borg_serve import engine_arguments
from borg_serve.config import load
from borg_serve.device import prepare_environment, vllm_version
from loadtests import servers
from loadtests.bootstrap import ratio
from loadtests.streaming import body, closed_loop
from loadtests.tables import figures, write

USERS = (1, 8)
OUTPUT_TOKENS = 64
BOUNDS = {"output_ratio": 0.97, "ttft_ms": 5.0, "start_s": 60.0, "rss_gib": 1.5}


@dataclass(frozen=True)
class Block:
    """One measurement: `users` at once, every request streamed to its end."""

    users: int
    requests: int
    failed: int
    output_tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    server_cpu_s: float
    engine_cpu_s: float


async def block(server: servers.Server, system: str | None, users: int, requests: int, seed: int) -> Block:
    """Measure `requests` requests by `users` users, each sending the next when the last has ended."""
    rng = random.Random(seed)
    before = server.cpu_s()
    bodies = [body(rng, OUTPUT_TOKENS, system) for _ in range(requests)]
    loop = await closed_loop(server.url, users, bodies, OUTPUT_TOKENS)
    after = server.cpu_s()
    return Block(
        users=users,
        requests=len(loop.done),
        failed=len(loop.failures),
        output_tokens_per_s=loop.output_tokens_per_s,
        ttft_ms=loop.ttft_ms,
        tpot_ms=loop.tpot_ms,
        server_cpu_s=after["server"] - before["server"],
        engine_cpu_s=after["engine"] - before["engine"],
    )


def measure(config: str, rounds: int) -> dict[str, Any]:
    """Run the whole comparison; its JSON document."""
    prepare_environment()
    profile = load(Path(config))
    system = profile.identity.prompt.read_text(encoding="utf-8").strip()
    arguments = engine_arguments.build(profile, profile.model.path, "")
    for name in ("chat_template", "allowed_origins", "disable_fastapi_docs", "distributed_executor_backend"):
        arguments.pop(name, None)
    folder = Path(tempfile.mkdtemp(prefix="borg-overhead-"))
    port_a, port_b = servers.free_port(), servers.free_port()
    blocks: dict[str, list[Block]] = {"ours": [], "stock": []}
    with servers.running("ours", servers.ours(config, port_a), port_a, "/ready", folder / "ours.log") as ours:
        ours.pause()
        command = servers.stock(engine_arguments.command_line(arguments), port_b)
        with servers.running(
            "stock", command, port_b, "/health", folder / "stock.log", more=servers.WITHOUT_OURS
        ) as stock:
            stock.pause()
            sides = {"ours": (ours, None), "stock": (stock, system)}
            for turn in range(-1, rounds):  # the first turn warms both up and is dropped
                order = ["ours", "stock"] if turn % 2 else ["stock", "ours"]
                for name in order:
                    server, identity = sides[name]
                    server.resume()
                    for users in USERS:
                        result = asyncio.run(block(server, identity, users, 3 * users if users > 1 else 6, 1000 + turn))
                        if turn >= 0:
                            blocks[name].append(result)
                        print(f"{turn:3} {name:6} {asdict(result)}", file=sys.stderr, flush=True)
                    server.pause()
            ours.resume()
            rss, start_s = ours.rss_bytes(), ours.start_s
    return {
        "command": f"python -m loadtests.overhead --config {config} --rounds {rounds}",
        "versions": {"vllm": vllm_version(), "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "start_s": round(start_s, 1),
        "rss_bytes": rss,
        "blocks": {name: [asdict(result) for result in results] for name, results in blocks.items()},
    }


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios with intervals, and whether each bound is met."""
    rows: list[dict[str, Any]] = []
    for users in USERS:
        sides = {
            name: [result for result in results if result["users"] == users]
            for name, results in document["blocks"].items()
        }

        def column(name: str, key: str, sides: dict[str, list[dict[str, float]]] = sides) -> list[float]:
            return [result[key] for result in sides[name]]

        output = ratio(column("ours", "output_tokens_per_s"), column("stock", "output_tokens_per_s"))
        rows.append(
            {
                "users": users,
                "output_tokens_per_s": {name: median(column(name, "output_tokens_per_s")) for name in sides},
                "output_ratio": asdict(output),
                "ttft_ms": {name: median(column(name, "ttft_ms")) for name in sides},
                "ttft_ratio": asdict(ratio(column("ours", "ttft_ms"), column("stock", "ttft_ms"))),
                "tpot_ms": {name: median(column(name, "tpot_ms")) for name in sides},
                "server_cpu_ms_a_token": {
                    name: sum(column(name, "server_cpu_s"))
                    * 1e3
                    / sum(r["requests"] * OUTPUT_TOKENS for r in sides[name])
                    for name in sides
                },
                "failed": {name: int(sum(column(name, "failed"))) for name in sides},
            }
        )
    met = {
        "start_s": document["start_s"] <= BOUNDS["start_s"],
        "rss": document["rss_bytes"] <= BOUNDS["rss_gib"] * (1 << 30),
        "output": all(row["output_ratio"]["value"] >= BOUNDS["output_ratio"] for row in rows),
        "ttft": all(row["ttft_ms"]["ours"] - row["ttft_ms"]["stock"] <= BOUNDS["ttft_ms"] for row in rows),
    }
    return {"rows": rows, "bounds": BOUNDS, "met": met}


def markdown(document: dict[str, Any]) -> str:
    """The report for a person."""
    result = document["summary"]
    versions, machine = document["versions"], document["machine"]
    repeats = len(document["blocks"]["ours"]) // len(USERS)
    lines = [
        "# What the server costs over vLLM's stock server",
        "",
        f"`{document['command']}` on {machine['cores']} cores ({machine['processor']}), vLLM {versions['vllm']}, "
        f"Python {versions['python']}, demo model, CPU engine.",
        "",
        "The profile's engine arguments on both sides; on a CPU ours computes in the scheduler's process and on "
        "every core, where vLLM starts a process more and keeps a core free. The client sends the identity to the "
        "stock server as its system message. "
        f"Both servers run, one is paused while the other is measured, in the order A B B A; {repeats} blocks of each "
        f"side after one that is dropped; {OUTPUT_TOKENS} output tokens a request, streamed, greedy, 80 words of its "
        "own in every prompt. Medians of blocks; intervals are 95% bootstrap intervals of the ratio of medians.",
        "",
        "TTFT: from sending the request to the first event with content, median within a block. TPOT: (last content "
        "event - first) / (tokens - 1). Tokens are the server's own count (`usage`).",
        "",
        "| users | output tokens/s, ours | stock | ratio | TTFT ms, ours | stock | ratio | TPOT ms, ours | stock "
        "| server CPU ms a token, ours | stock | failed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        output, ttft = row["output_ratio"], row["ttft_ratio"]
        lines.append(
            f"| {row['users']} | {row['output_tokens_per_s']['ours']:.1f} | {row['output_tokens_per_s']['stock']:.1f} "
            f"| {output['value']:.3f} [{output['low']:.3f}, {output['high']:.3f}] "
            f"| {row['ttft_ms']['ours']:.0f} | {row['ttft_ms']['stock']:.0f} "
            f"| {ttft['value']:.3f} [{ttft['low']:.3f}, {ttft['high']:.3f}] "
            f"| {row['tpot_ms']['ours']:.1f} | {row['tpot_ms']['stock']:.1f} "
            f"| {row['server_cpu_ms_a_token']['ours']:.2f} | {row['server_cpu_ms_a_token']['stock']:.2f} "
            f"| {row['failed']['ours']} + {row['failed']['stock']} |"
        )
    ratios = ", ".join(f"{row['output_ratio']['value']:.3f}" for row in result["rows"])
    more = ", ".join(f"{row['ttft_ms']['ours'] - row['ttft_ms']['stock']:+.0f} ms" for row in result["rows"])
    met, rss = result["met"], document["rss_bytes"] / (1 << 30)
    bounds = figures(
        [
            ("start to ready", "60 s", f"{document['start_s']} s", met["start_s"]),
            ("resident memory of the server's own process", "1.5 GiB", f"{rss:.2f} GiB", met["rss"]),
            (f"output tokens/s, ratio at {USERS} users", "0.97", ratios, met["output"]),
            (f"TTFT, ours - stock at {USERS} users", "+5 ms", more, met["ttft"]),
        ]
    )
    return "\n".join([*lines, "", bounds, ""])


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo-cpu.yaml")
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each side; at least 5")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    document = measure(arguments.config, arguments.rounds)
    document["summary"] = summary(document)
    write(arguments.out, "overhead", document, markdown(document))


if __name__ == "__main__":
    main()
