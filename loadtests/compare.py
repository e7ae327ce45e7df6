"""Our server beside vLLM's, Ray Serve LLM and the original app's way: `python -m loadtests.compare`, about 55 minutes.

In turn, forwards and backwards (A B C C B A): all are started once, and paused where they are, a cluster with every
process of it, while another has its turn. Definitions of the figures are in the report.
"""

import argparse
import asyncio
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from borg_serve.config import load
from borg_serve.device import prepare_environment, vllm_version
from borg_serve.errors import BorgServeError
from loadtests.bootstrap import Ratio, ratio
from loadtests.contenders import GROUPS, Contender, Running, contenders
from loadtests.streaming import body, closed_loop
from loadtests.tables import figures, table, write

USERS = (1, 8)
"""How many at once, where `--users` says nothing else."""
KV = "engine.kv_cache_memory_bytes=1073741824"
"""All of them are in memory at once."""
SEQUENTIAL = ("original", "original-reused")
"""One request after another: with more users than JUDGED each only waits longer."""
JUDGED = 8
"""Users at which the bounds for the original and for vLLM's server hold."""
BOUNDS = {"original": 12.0, "stock": 1.5, "stock_ttft": 0.4, "ray": 0.90, "ray_ttft_ms": 5.0}


@dataclass(frozen=True)
class Block:
    """One measurement: `users` users, each sending its next request when the last has ended."""

    users: int
    requests: int
    failed: int
    output_tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    cpu_s_per_1000: dict[str, float]
    memory_mib: float


async def block(contender: Contender, running: Running, system: str, users: int, tokens: int, seed: int) -> Block:
    """Measure; raises RuntimeError when every request fails."""
    rng = random.Random(seed)
    per_user = 5 if users == 1 else 2
    count = users if contender.name in SEQUENTIAL and users > 1 else users * per_user
    system_message = system if contender.sends_identity else None
    bodies = [{**body(rng, tokens, system_message), "model": contender.model} for _ in range(count)]
    before, mine = running.cpu_s(), time.process_time()
    loop = await closed_loop(running.url, users, bodies, tokens, timeout_s=600)
    own, after = time.process_time() - mine, running.cpu_s()
    spent = {group: after[group] - before[group] for group in GROUPS} | {"client": own}
    return Block(
        users=users,
        requests=len(loop.done),
        failed=len(loop.failures),
        output_tokens_per_s=loop.output_tokens_per_s,
        ttft_ms=loop.ttft_ms,
        tpot_ms=loop.tpot_ms,
        cpu_s_per_1000={group: seconds / loop.tokens * 1000 for group, seconds in spent.items()},
        memory_mib=running.memory_mib(),
    )


def turn(
    contender: Contender, running: Running, system: str, tokens: int, number: int, users: Sequence[int]
) -> list[Block]:
    """One contender's turn: a request that is not counted, then each number of users."""
    running.resume()
    try:
        asyncio.run(block(contender, running, system, 1, min(tokens, 8), 999_000 + number))
        counts = [many for many in users if contender.name not in SEQUENTIAL or many <= JUDGED]
        return [asyncio.run(block(contender, running, system, many, tokens, 1000 * many + number)) for many in counts]
    finally:
        running.pause()


def measure(
    config: str,
    rounds: int,
    tokens: int,
    only: Sequence[str],
    users: Sequence[int],
    sets: Sequence[str],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Run the whole comparison. After each round, `keep` gets the JSON document of all so far: it takes an hour."""
    prepare_environment()
    sets = [KV, *sets]
    profile = load(Path(config), sets)
    system = profile.identity.prompt.read_text(encoding="utf-8").strip()
    folder = Path(tempfile.mkdtemp(prefix="borg-compare-"))
    print(f"logs: {folder}", file=sys.stderr)
    taking_part = [one for one in contenders(profile, folder, sets) if not only or one.name in only]
    blocks: dict[str, list[Block]] = {one.name: [] for one in taking_part}
    failures: list[str] = []
    with ExitStack() as stack:
        awake: dict[Any, Running] = {}
        for one in taking_part:
            if one.start not in awake:
                print(f"starting {one.name}", file=sys.stderr, flush=True)
                awake[one.start] = stack.enter_context(one.start())
                awake[one.start].pause()
        for number in range(rounds):
            for one in taking_part if number % 2 == 0 else reversed(taking_part):
                begin = time.monotonic()
                try:
                    results = turn(one, awake[one.start], system, tokens, number, users)
                except (BorgServeError, RuntimeError, httpx.HTTPError) as error:  # the others' turns are still worth it
                    failures.append(
                        f"round {number + 1}, {one.name}: {type(error).__name__}: {str(error).splitlines()[0]}"
                    )
                    print(f"FAILED {failures[-1]}\n{error}", file=sys.stderr, flush=True)
                    continue
                blocks[one.name] += results
                shown = ", ".join(
                    f"{b.users}: {b.output_tokens_per_s:.1f} tok/s, TTFT {b.ttft_ms:.0f} ms" for b in results
                )
                took = time.monotonic() - begin
                print(f"round {number + 1}/{rounds} {one.name:16} {shown} ({took:.0f} s)", file=sys.stderr, flush=True)
            found = {name: [asdict(result) for result in results] for name, results in blocks.items() if results}
            keep(
                {
                    "versions": {"vllm": vllm_version(), "python": platform.python_version(), **_versions()},
                    "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
                    "rounds": number + 1,
                    "tokens": tokens,
                    "users": sorted(users),
                    "contenders": {one.name: one.title for one in taking_part},
                    "blocks": found,
                    "failures": failures,
                }
            )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("ray", "transformers", "torch")}


def summary(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of blocks for each contender and number of users, and ours as ratios to it."""
    rows = []
    for users in document["users"]:
        sides = {
            name: found
            for name, blocks in document["blocks"].items()
            if (found := [block for block in blocks if block["users"] == users])
        }
        for name, own in sides.items():
            row: dict[str, Any] = {"users": users, "name": name, "failed": sum(block["failed"] for block in own)}
            for key in ("output_tokens_per_s", "ttft_ms", "tpot_ms", "memory_mib"):
                row[key] = median(block[key] for block in own)
            row["cpu_s_per_1000"] = {group: median(block["cpu_s_per_1000"][group] for block in own) for group in GROUPS}
            if name != "ours" and "ours" in sides:
                for key in ("output_tokens_per_s", "ttft_ms", "tpot_ms"):
                    row[f"ours_by_{key}"] = _ratio(sides["ours"], own, key)
            rows.append(row)
    return rows


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> dict[str, float] | None:
    if min(len(ours), len(theirs)) < 5:
        return None
    return asdict(ratio([block[key] for block in ours], [block[key] for block in theirs]))


def markdown(document: dict[str, Any]) -> str:
    """The report for a person."""
    rows = document["summary"]
    machine, versions = document["machine"], document["versions"]

    def against(row: dict[str, Any], key: str) -> str:
        found = row.get(f"ours_by_{key}")
        return str(Ratio(**found)) if found else ""

    heads = ["users", "server", "output tokens/s", "TTFT ms", "TPOT ms", "memory MiB", "failed"]
    speed = [
        [
            row["users"],
            row["name"],
            f"{row['output_tokens_per_s']:.1f}",
            f"{row['ttft_ms']:.0f}",
            f"{row['tpot_ms']:.1f}",
            f"{row['memory_mib']:.0f}",
            row["failed"],
            against(row, "output_tokens_per_s"),
            against(row, "ttft_ms"),
        ]
        for row in rows
    ]
    cpu = [
        [
            row["users"],
            row["name"],
            *(f"{row['cpu_s_per_1000'][group]:.2f}" for group in GROUPS),
            f"{sum(row['cpu_s_per_1000'].values()):.2f}",
        ]
        for row in rows
    ]
    who = table(["name", "what it is"], document["contenders"].items())
    of = ", ".join(f"{name} {value}" for name, value in versions.items())
    return f"""# Ways to serve the same model with the same identity

`{document["command"]}` on {machine["cores"]} cores ({machine["processor"]}); {of}; demo model, CPU. Absolute figures
are this machine's; the ratios, taken in one run, are what to look at.

{who}

{document["rounds"]} rounds, each contender once in each, forwards and backwards in turn (A B C, C B A); the others are
paused, all processes of a cluster with them. Each has 1 GiB of KV cache. A request that is not counted
goes first. {document["tokens"]} output tokens a request, streamed, greedy, 80 words of its own in every prompt; who has
no identity of its own gets it from the client as the system message. A user sends its next request when the last has
ended; the original app's way, one request after another, has at most {JUDGED}. Figures are medians of the rounds;
intervals are 95% bootstrap intervals of the ratio of medians (given from five rounds on).

TTFT: from sending to the first event with content, median within a block; for a server that works one request after
another it holds the wait for those before. TPOT: (last content event - first) / (tokens - 1). Tokens are the server's
own count. Memory: proportional set size of all its processes.

{table([*heads, "tokens/s, ours / its", "TTFT, ours / its"], speed)}

CPU seconds for 1,000 output tokens, by what the processes are there for. The client shares the cores. The original
app's way is one process, counted as the engine. On Ray the door is the replica with vLLM's API, the proxy is HAProxy or
Ray's own, the router says which replica (in Ray's own app it is the OpenAI API too), ray is all the rest.

{table(["users", "server", *GROUPS, "all"], cpu)}

{bounds(rows)}

Failures: {"; ".join(document["failures"]) or "none"}.
"""


def bounds(rows: Sequence[dict[str, Any]]) -> str:
    """What was to be reached, of those that took part."""
    counts = {row["users"] for row in rows}
    least, most = min(counts), JUDGED if JUDGED in counts else max(counts)
    at = {(row["name"], row["users"]): row for row in rows}

    def part(one: str, other: str, key: str, users: int) -> float:
        value: float = at[one, users][key] / at[other, users][key]
        return value

    found: list[tuple[str, str, float, float]] = []
    if {("ours", most), ("stock", most), ("original", most)} <= at.keys():
        speed, wait = "output_tokens_per_s", "ttft_ms"
        for name, title in (("original", "original app's way"), ("stock", "vLLM's server")):
            words = f"output tokens/s, {title}: ours / its at {most} users"
            found.append((words, ">=", BOUNDS[name], part("ours", name, speed, most)))
        words = f"TTFT, vLLM's server: ours / its at {most} users"
        found.append((words, "<=", BOUNDS["stock_ttft"], part("ours", "stock", wait, most)))
    if {("ours", most), ("ray-ours", most)} <= at.keys():
        for users in sorted(counts):
            words = f"output tokens/s, on a cluster / on one machine at {users} users"
            found.append((words, ">=", BOUNDS["ray"], part("ray-ours", "ours", "output_tokens_per_s", users)))
        longer = at["ray-ours", least]["ttft_ms"] - at["ours", least]["ttft_ms"]
        words = f"TTFT, on a cluster - on one machine at {least} users, ms"
        found.append((words, "<=", BOUNDS["ray_ttft_ms"], longer))
    if not found:
        return "Not every contender took part: no bound is judged."
    return figures(
        (name, f"{sign} {bound:g}", f"{got:.2f}", _met(sign, got, bound)) for name, sign, bound, got in found
    )


def _met(sign: str, got: float, bound: float) -> bool:
    return got >= bound if sign == ">=" else got <= bound


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo-cpu.yaml")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for intervals")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens a request")
    parser.add_argument("--only", nargs="+", default=[], help="names of the contenders that take part")
    parser.add_argument("--users", nargs="+", type=int, default=list(USERS), help="how many at once, in turn")
    parser.add_argument("--set", action="append", default=[], help="a setting of the profile, for all that have it")
    parser.add_argument("--name", default="compare-cpu", help="of the report")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    command = " ".join(["python -m loadtests.compare", *sys.argv[1:]])

    def keep(document: dict[str, Any]) -> None:
        whole = {**document, "command": command, "summary": summary(document)}
        write(arguments.out, arguments.name, whole, markdown(whole))

    measure(arguments.config, arguments.rounds, arguments.tokens, arguments.only, arguments.users, arguments.set, keep)


if __name__ == "__main__":
    main()
