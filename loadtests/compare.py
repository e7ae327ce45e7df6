"""Our server beside vLLM's, Ray Serve LLM and the original app's way: `python -m loadtests.compare`, about 35 minutes.

In turn, forwards and backwards (A B C C B A), with only one awake at a time: the plain servers are paused where they
are, Ray's clusters are started for their turns. `--at-most 2` measures two rounds and ends; the next call goes on from
there. Definitions of the figures are in the report.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from borg_serve import engine
from borg_serve.config import Config, load
from borg_serve.errors import BorgServeError
from loadtests.bootstrap import Ratio, ratio
from loadtests.contenders import GROUPS, Contender, Running, contenders
from loadtests.streaming import body, closed_loop
from loadtests.tables import figures, table, write

USERS = (8,)
SEQUENTIAL = ("original", "original-reused")
BOUNDS = {"original": 12.0, "stock": 1.5, "stock_ttft": 0.4, "client": 0.1}
PART = Path("build/compare-cpu.json")
"""What has been measured while rounds are left."""


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
    count = max(1, users // 2) if contender.name in SEQUENTIAL else users
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


def turn(contender: Contender, running: Running, system: str, tokens: int, number: int) -> list[Block]:
    """One contender's turn: a request that is not counted, then each number of users."""
    running.resume()
    try:
        asyncio.run(block(contender, running, system, 1, min(tokens, 8), 999_000 + number))
        return [asyncio.run(block(contender, running, system, users, tokens, 1000 * users + number)) for users in USERS]
    finally:
        running.pause()


def blank(config: str, rounds: int, tokens: int, taking_part: Sequence[Contender]) -> dict[str, Any]:
    """The document before its first round."""
    return {
        "command": f"python -m loadtests.compare --config {config} --rounds {rounds} --tokens {tokens}",
        "versions": {"vllm": engine.vllm_version(), "python": platform.python_version(), **_versions()},
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "rounds": rounds,
        "tokens": tokens,
        "contenders": {one.name: one.title for one in taking_part},
        "blocks": {one.name: [] for one in taking_part},
        "failures": [],
        "done": 0,
    }


def order(found: Sequence[Contender]) -> list[Contender]:
    """Those that cannot be paused at the ends: what ends one round begins the next, and needs no new start between."""
    stay = [one for one in found if one.stays]
    rest = [one for one in found if not one.stays]
    return [*rest[:1], *stay, *rest[1:]]


def measure(document: dict[str, Any], profile: Config, folder: Path, at_most: int) -> None:
    """Measure the rounds that are left, at most so many, each written to `PART` when it has ended."""
    engine.prepare_environment()
    system = profile.identity.prompt.read_text(encoding="utf-8").strip()
    taking_part = order([one for one in contenders(profile, folder) if one.name in document["contenders"]])
    numbers = range(document["done"], min(document["rounds"], document["done"] + at_most))
    turns = [(number, one) for number in numbers for one in (taking_part if number % 2 == 0 else taking_part[::-1])]
    with ExitStack() as plain, ExitStack() as stack:
        awake: dict[Any, Running] = {}
        for one in taking_part:
            if one.stays and one.start not in awake:
                print(f"starting {one.name}", file=sys.stderr, flush=True)
                awake[one.start] = plain.enter_context(one.start())
                awake[one.start].pause()
        for (number, one), following in zip(turns, [*turns[1:], (None, None)], strict=True):
            begin = time.monotonic()
            try:
                if one.start not in awake:
                    awake[one.start] = stack.enter_context(one.start())
                results = turn(one, awake[one.start], system, document["tokens"], number)
                document["blocks"][one.name] += map(asdict, results)
                shown = ", ".join(
                    f"{b.users}: {b.output_tokens_per_s:.1f} tok/s, TTFT {b.ttft_ms:.0f} ms" for b in results
                )
            except (BorgServeError, RuntimeError, httpx.HTTPError) as error:  # the others' turns are still worth it
                shown = f"FAILED {type(error).__name__}: {str(error).splitlines()[0]}"
                document["failures"].append(f"round {number + 1}, {one.name}: {shown.removeprefix('FAILED ')}")
                print(error, file=sys.stderr)
            if not one.stays and following[1] is not one:
                awake.pop(one.start, None)
                stack.close()
            took = time.monotonic() - begin
            print(f"round {number + 1} {one.name:16} {shown} ({took:.0f} s)", file=sys.stderr, flush=True)
            if following[0] != number:
                document["done"] = number + 1
                PART.write_text(json.dumps(document), encoding="utf-8")
        for running in awake.values():
            running.resume()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("ray", "transformers", "torch")}


def summary(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of blocks for each contender and number of users, and ours as ratios to it."""
    rows = []
    for users in USERS:
        sides = {
            name: [block for block in blocks if block["users"] == users] for name, blocks in document["blocks"].items()
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
    return f"""# Five ways to serve the same model with the same identity

`{document["command"]}` on {machine["cores"]} cores ({machine["processor"]}); {of}; demo model, CPU. Absolute figures
are this machine's; the ratios, taken in one run, are what to look at.

{who}

{document["rounds"]} rounds, each contender once in each, forwards and backwards in turn (A B C, C B A); the others are
paused or not started. A request that is not counted goes first, then all users send one at once. {document["tokens"]}
output tokens a request, streamed, greedy, 80 words of its own in every prompt; whoever has no identity of its own gets
it from the client as the system message. Where requests are worked on one after another only every other user sends
one: its tokens/s are the same, its TTFT comes out too low. Figures are medians of the rounds; intervals are 95%
bootstrap intervals of the ratio of medians (given from five rounds on).

TTFT: from sending to the first event with content, median within a block; for a server that works one request after
another it holds the wait for those before. TPOT: (last content event - first) / (tokens - 1). Tokens are the server's
own count. Memory: proportional set size of all its processes.

{table([*heads, "tokens/s, ours / its", "TTFT, ours / its"], speed)}

CPU seconds for 1,000 output tokens, by what the processes are there for. The client shares the cores. The original
app's way is one process, counted as the engine; on Ray the door is the replica with vLLM's API, and the proxy.

{table(["users", "server", *GROUPS, "all"], cpu)}

{bounds(rows)}

How far ours is from vLLM's server depends on where the identity's last block ends, and this identity flatters nobody:
[tails-cpu](tails-cpu.md).

Failures: {"; ".join(document["failures"]) or "none"}.
"""


def bounds(rows: Sequence[dict[str, Any]]) -> str:
    """What was to be reached at the most users."""
    at = {row["name"]: row for row in rows if row["users"] == max(USERS)}
    if not {"ours", "stock", "original"} <= at.keys():
        return "Not every contender took part: no bound is judged."

    def part(name: str, key: str) -> float:
        value: float = at["ours"][key] / at[name][key]
        return value

    client = at["ours"]["cpu_s_per_1000"]["client"] * at["ours"]["output_tokens_per_s"] / 1000
    found = [
        ("output tokens/s, original app's way", ">=", BOUNDS["original"], part("original", "output_tokens_per_s")),
        ("output tokens/s, vLLM's server", ">=", BOUNDS["stock"], part("stock", "output_tokens_per_s")),
        ("TTFT, vLLM's server", "<=", BOUNDS["stock_ttft"], part("stock", "ttft_ms")),
    ]
    return figures(
        [
            *(
                (f"{name}: ours / its at {max(USERS)} users", f"{sign} {bound:g}", f"{got:.2f}", _met(sign, got, bound))
                for name, sign, bound, got in found
            ),
            (
                "the client's CPU, of one core, on ours",
                f"<= {BOUNDS['client']:g}",
                f"{client:.3f}",
                client <= BOUNDS["client"],
            ),
        ]
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
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--at-most", type=int, default=1000, help="rounds to measure now; the next call goes on")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    engine.prepare_environment()
    profile, folder = load(Path(arguments.config)), Path(tempfile.mkdtemp(prefix="borg-compare-"))
    print(f"logs: {folder}", file=sys.stderr)
    taking_part = [one for one in contenders(profile, folder) if not arguments.only or one.name in arguments.only]
    document = blank(arguments.config, arguments.rounds, arguments.tokens, taking_part)
    PART.parent.mkdir(exist_ok=True)
    if PART.is_file():
        before = json.loads(PART.read_text(encoding="utf-8"))
        if all(before[name] == document[name] for name in ("command", "versions", "machine", "contenders")):
            print(f"going on after {before['done']} rounds: {PART}", file=sys.stderr)
            document = before
    measure(document, profile, folder, arguments.at_most)
    if document["done"] < document["rounds"]:
        print(f"{document['done']} of {document['rounds']} rounds are done; the same command goes on", file=sys.stderr)
        return
    document["blocks"] = {name: results for name, results in document["blocks"].items() if results}
    document["summary"] = summary(document)
    write(arguments.out, "compare-cpu", document, markdown(document))
    PART.unlink()


if __name__ == "__main__":
    main()
