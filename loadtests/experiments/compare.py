"""Our server beside vLLM's, Ray Serve LLM and the original app: `python -m loadtests.experiments.compare`, 55 minutes.

All are started once, and paused with every process, a cluster's included, while another has its turn. The figures are
defined in the report.
"""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from borg_serve.config import load
from borg_serve.engine.environment import prepare_environment
from borg_serve.errors import BorgServeError
from loadtests.experiments.experiment import block, command, medians, note, parser, rotation, surroundings
from loadtests.generator.workload import body
from loadtests.report.bootstrap import ratio
from loadtests.report.tables import Bound, render, write
from loadtests.servers.contenders import Contender, contenders
from loadtests.servers.local import GROUPS, Server

USERS = (1, 8)
"""How many at once, where `--users` says nothing else."""
KV = "engine.kv_cache_memory_bytes=1073741824"
"""All of them are in memory at once."""
SEQUENTIAL = ("original", "original-reused")
"""One request after another: with more users than JUDGED each only waits longer."""
JUDGED = 8
"""Users at which the bounds for the original and for vLLM's server hold."""
BOUNDS = {"original": 12.0, "stock": 1.5, "stock_ttft": 0.4, "ray": 0.90, "ray_ttft_ms": 5.0}
SPEED, WAIT = "output_tokens_per_s", "ttft_ms"


def turn(
    contender: Contender, server: Server, system: str, tokens: int, number: int, users: Sequence[int]
) -> list[dict[str, Any]]:
    """One contender's turn: a request that is not counted, then each number of users."""
    alone = contender.name in SEQUENTIAL
    message = system if contender.sends_identity else None

    def measured(many: int, tokens: int, seed: int) -> dict[str, Any]:
        rng = random.Random(seed)
        count = many if alone and many > 1 else many * (5 if many == 1 else 2)
        return block(server, many, [body(rng, tokens, message) | {"model": contender.model} for _ in range(count)])

    measured(1, min(tokens, 8), 999_000 + number)
    return [measured(many, tokens, 1000 * many + number) for many in users if not alone or many <= JUDGED]


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
    profile, folder = load(Path(config), sets), Path(tempfile.mkdtemp(prefix="borg-compare-"))
    system = profile.identity.prompt.read_text(encoding="utf-8").strip()
    note(f"logs: {folder}")
    taking_part = {one.name: one for one in contenders(profile, folder, sets) if not only or one.name in only}
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in taking_part}
    failures: list[str] = []
    shown = {"tokens": tokens, "users": sorted(users), "failures": failures}
    shown |= {"contenders": {name: one.title for name, one in taking_part.items()}}
    with rotation({name: one.start for name, one in taking_part.items()}, rounds) as turns:
        for count, (number, name, server) in enumerate(turns, 1):
            begin = time.monotonic()
            try:
                results = turn(taking_part[name], server, system, tokens, number, users)
                blocks[name] += results
                said = ", ".join(f"{b['users']}: {b[SPEED]:.1f} tok/s, TTFT {b[WAIT]:.0f} ms" for b in results)
                note(f"round {number + 1}/{rounds} {name:16} {said} ({time.monotonic() - begin:.0f} s)")
            except (BorgServeError, RuntimeError, httpx.HTTPError) as error:  # the others' turns are still worth it
                failures.append(f"round {number + 1}, {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                note(f"FAILED {failures[-1]}\n{error}")
            if count % len(taking_part) == 0:
                kept = {name: results for name, results in blocks.items() if results}
                keep({**surroundings("ray", "transformers", "torch"), **shown, "rounds": number + 1, "blocks": kept})


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
            row |= medians(own, SPEED, WAIT, "tpot_ms", "memory_mib")
            row["cpu_s_per_1000"] = medians([block["cpu_s_per_1000"] for block in own], *GROUPS)
            if name != "ours" and "ours" in sides:
                for key in (SPEED, WAIT, "tpot_ms"):
                    row[f"ours_by_{key}"] = _ratio(sides["ours"], own, key)
            rows.append(row)
    return rows


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> dict[str, float] | None:
    if min(len(ours), len(theirs)) < 5:
        return None
    return asdict(ratio([block[key] for block in ours], [block[key] for block in theirs]))


def bounds(rows: Sequence[dict[str, Any]]) -> list[Bound]:
    """What was to be reached, of those that took part."""
    counts = {row["users"] for row in rows}
    least, most = min(counts), JUDGED if JUDGED in counts else max(counts)
    at = {(row["name"], row["users"]): row for row in rows}
    found: list[Bound] = []

    def at_least(what: str, bound: float, one: str, other: str, users: int) -> None:
        got = at[one, users][SPEED] / at[other, users][SPEED]
        found.append((f"output tokens/s, {what} at {users} users", f">= {bound:g}", f"{got:.2f}", got >= bound))

    if {("ours", most), ("stock", most), ("original", most)} <= at.keys():
        at_least("original app's way: ours / its", BOUNDS["original"], "ours", "original", most)
        at_least("vLLM's server: ours / its", BOUNDS["stock"], "ours", "stock", most)
        got, bound = at["ours", most][WAIT] / at["stock", most][WAIT], BOUNDS["stock_ttft"]
        words = f"TTFT, vLLM's server: ours / its at {most} users"
        found.append((words, f"<= {bound:g}", f"{got:.2f}", got <= bound))
    if {("ours", most), ("ray-ours", most)} <= at.keys():
        for users in sorted(counts):
            at_least("on a cluster / on one machine", BOUNDS["ray"], "ray-ours", "ours", users)
        got, bound = at["ray-ours", least][WAIT] - at["ours", least][WAIT], BOUNDS["ray_ttft_ms"]
        words = f"TTFT, on a cluster - on one machine at {least} users, ms"
        found.append((words, f"<= {bound:g}", f"{got:.2f}", got <= bound))
    return found


def text(document: dict[str, Any]) -> str:
    """The report for a person."""
    return render("compare.md.j2", document, groups=GROUPS, most=JUDGED, judged=bounds(document["summary"]))


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "compare-cpu")
    options.add_argument("--rounds", type=int, default=5, help="at least 5 for intervals")
    options.add_argument("--tokens", type=int, default=64, help="output tokens a request")
    options.add_argument("--only", nargs="+", default=[], help="names of the contenders that take part")
    options.add_argument("--users", nargs="+", type=int, default=list(USERS), help="how many at once, in turn")
    options.add_argument(
        "--set", action="extend", nargs="+", default=[], help="a setting of the profile, for all that have it"
    )
    arguments = options.parse_args()

    def keep(document: dict[str, Any]) -> None:
        whole = {**document, "command": command("compare", arguments), "summary": summary(document)}
        write(arguments.out, arguments.name, whole, text(whole))

    measure(arguments.config, arguments.rounds, arguments.tokens, arguments.only, arguments.users, arguments.set, keep)


if __name__ == "__main__":
    main()
