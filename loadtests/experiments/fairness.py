"""Whether one key's flood takes from another key: `python -m loadtests.experiments.fairness`, about half an hour.

Three phases in rounds on one server: a key floods it alone; it fills every slot while another key asks once a second;
it floods while the other key asks. Then twenty keys with answers of different lengths share the server. Definitions of
the figures are in the report. `--replicas 2` does the same on a Ray cluster of this machine.
"""

import argparse
import asyncio
import math
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import yaml

from borg_serve.config import load
from loadtests.experiments.experiment import command, entries, note, parser, rotation, surroundings
from loadtests.experiments.stream import Timing, client, stream
from loadtests.generator.workload import body
from loadtests.report.bootstrap import quantile, ratio
from loadtests.report.slo import percentile
from loadtests.report.tables import Bound, render, write
from loadtests.servers import local
from loadtests.servers.contenders import Start, contenders

PHASES = ("alone", "full", "flooded")
FLOOD, OTHER = "flood", "other"
TWENTY = tuple(f"k{number:02}" for number in range(1, 21))
FLOOD_CONNECTIONS, TWENTY_CONNECTIONS = 40, 3
FLOOD_TOKENS, OTHER_TOKENS, TWENTY_TOKENS = 32, 8, (8, 16, 32, 64)
"""Of each answer. OTHER's are short, so that it asks for less than its half of two cores."""
WORDS = 20  # of each prompt
RUN_IN_S = 20.0  # before a phase counts: longer than an answer, since all of the first ones begin and end together
MAX_WAIT_S = 5  # of a request, expected: two cores are slow
BOUNDS = {"ttft_ratio": 1.5, "lost_for_one": 1.0, "jain": 0.98}


@dataclass(frozen=True)
class Load:
    """What one key asks for in a phase; `tokens` of each answer."""

    key: str
    tokens: int
    connections: int = 0
    """Each sends its next request when the last has ended."""
    pause_s: float | None = 0.0
    """Of a connection after a refusal; None is Retry-After."""
    period_s: float = 0.0
    """Without connections: between two requests, whatever becomes of them."""


@dataclass(frozen=True)
class Sent:
    """A request of a phase, `at_s` after its begin."""

    key: str
    at_s: float
    timing: Timing

    def tokens(self, begin_s: float, end_s: float, identity: int) -> float:
        """New tokens between two moments: the prompt's with the first token, the answer's evenly until its end."""
        usage, first_s = self.timing.usage, self.timing.first_s
        if first_s is None or not usage:
            return 0.0
        first, last = self.at_s + first_s, self.at_s + self.timing.end_s
        inside = max(0.0, min(last, end_s) - max(first, begin_s)) / max(last - first, 1e-6)
        prompt: int = usage["prompt_tokens"] - identity if begin_s <= first < end_s else 0
        return prompt + float(usage["completion_tokens"]) * inside


def phases(slots: int, pause_s: float, period_s: float) -> dict[str, list[Load]]:
    """Who asks in each of PHASES, of a server with so many slots."""
    flood, full = (Load(FLOOD, FLOOD_TOKENS, connections, pause_s) for connections in (FLOOD_CONNECTIONS, slots))
    other = Load(OTHER, OTHER_TOKENS, period_s=period_s)
    return {"alone": [flood], "full": [full, other], "flooded": [flood, other]}


def twenty() -> list[Load]:
    """Twenty keys that want the same, but for the length of answers."""
    lengths = [TWENTY_TOKENS[number % len(TWENTY_TOKENS)] for number in range(len(TWENTY))]
    return [Load(key, length, TWENTY_CONNECTIONS, None) for key, length in zip(TWENTY, lengths, strict=True)]


async def phase(url: str, loads: Sequence[Load], seed: str, seconds: float) -> list[Sent]:
    """Send requests for so long; return them all once the last has ended."""
    found: list[Sent] = []
    async with AsyncExitStack() as stack:
        https = [await stack.enter_async_context(client(url)) for _ in loads]
        begin = time.perf_counter()

        async def ask(http: httpx.AsyncClient, load: Load, rng: random.Random) -> Timing:
            at_s = time.perf_counter() - begin
            try:
                timing = await stream(http, body(rng, load.tokens, words=WORDS))
            except httpx.HTTPError as error:
                timing = Timing(0, time.perf_counter() - begin - at_s, error=type(error).__name__)
            found.append(Sent(load.key, at_s, timing))
            return timing

        async def connection(http: httpx.AsyncClient, load: Load, rng: random.Random) -> None:
            while (left := begin + seconds - time.perf_counter()) > 0:
                timing = await ask(http, load, rng)
                if timing.status != 200:
                    pause_s = load.pause_s if load.pause_s is not None else float(timing.retry_after or 1)
                    await asyncio.sleep(min(pause_s, left))

        async def arrivals(http: httpx.AsyncClient, load: Load, rng: random.Random) -> None:
            async with asyncio.TaskGroup() as asked:
                for number in range(math.ceil(seconds / load.period_s)):
                    await asyncio.sleep(max(0.0, begin + number * load.period_s - time.perf_counter()))
                    asked.create_task(ask(http, load, rng))

        async with asyncio.TaskGroup() as tasks:
            for http, load in zip(https, loads, strict=True):
                http.headers["authorization"] = f"Bearer {load.key}"
                for number in range(load.connections or 1):
                    user = connection if load.connections else arrivals
                    tasks.create_task(user(http, load, random.Random(f"{seed} {load.key} {number}")))
    return found


def figures(sent: Sequence[Sent], seconds: float, identity: int) -> dict[str, dict[str, Any]]:
    """By key: tokens/s of the counted time, and what became of the requests that were sent in it."""
    begin_s, end_s = RUN_IN_S, RUN_IN_S + seconds
    found = {}
    for key in sorted({one.key for one in sent}):
        mine = sorted((one for one in sent if one.key == key), key=lambda one: one.at_s)
        counted = [one.timing for one in mine if begin_s <= one.at_s < end_s]
        good = [timing for timing in counted if timing.status == 200 and timing.error is None]
        refused = sum(timing.status in (429, 503) for timing in counted)
        found[key] = {
            "tokens_per_s": sum(one.tokens(begin_s, end_s, identity) for one in mine) / seconds,
            "requests": len(counted),
            "refused": refused,
            "failed": len(counted) - len(good) - refused,
            "ttft_ms": [round(timing.first_s * 1e3, 1) for timing in good if timing.first_s is not None],
        }
    return found


def jain(rates: Sequence[float]) -> float:
    """Jain's index of shares: 1 where all are equal, 1/n where one has all (Jain, Chiu & Hawe 1984)."""
    squares = sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if squares else 0.0


def measure(start: Start, given: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds and then the twenty keys; the JSON document's figures."""
    local.LOOK.headers["authorization"] = f"Bearer {FLOOD}"  # a server with keys shows its metrics to a key
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PHASES}

    def run(url: str, loads: Sequence[Load], seed: str, counted_s: float) -> dict[str, dict[str, Any]]:
        sent = asyncio.run(phase(url, loads, seed, RUN_IN_S + counted_s))
        return figures(sent, counted_s, identity) if counted_s else {}

    with rotation(dict.fromkeys(PHASES, start), given.rounds, dropped=1) as turns:
        for number, name, server in turns:
            slots = (given.replicas or 1) * int(local.metric(server.url, "borg_places"))
            identity = int(local.LOOK.get(server.url + "/version").json()["identity"]["tokens"])
            loads = phases(slots, given.pause, given.period)[name]
            result = run(server.url, loads, f"{number} {name}", given.seconds if number >= 0 else 0)
            found[name] += [result] if number >= 0 else []
            note(f"{number:3} {name:7} {result}")
        with server.awake():
            keys = run(server.url, twenty(), "twenty", given.twenty)
            note(f"twenty {keys}")
    sizes = {"slots": slots, "identity_tokens": identity, "pause_s": given.pause, "period_s": given.period}
    return {**sizes, "rounds": found, "twenty": keys}


def ttft(document: Mapping[str, Any], name: str, key: str) -> list[float]:
    """TTFT in ms of a key's requests in all rounds of a phase, in the order of sending."""
    return [value for one in document["rounds"][name] for value in one[key]["ttft_ms"]]


def lines(document: Mapping[str, Any]) -> list[list[str]]:
    """A line of the report for each phase and key."""
    found = []
    for name in PHASES:
        for key in document["rounds"][name][0]:
            rounds = [one[key] for one in document["rounds"][name]]
            counts = [str(sum(one[count] for one in rounds)) for count in ("requests", "refused", "failed")]
            first = [percentile(ttft(document, name, key), percent) for percent in (50, 95)]
            rate = f"{median(one['tokens_per_s'] for one in rounds):.1f}"
            found.append([name, key, rate, *counts, *("none" if one is None else f"{one:.0f}" for one in first)])
    return found


def lengths(document: Mapping[str, Any]) -> list[list[str]]:
    """A line of the report for the keys of each length of answers."""
    found = []
    for tokens in TWENTY_TOKENS:
        rows = [document["twenty"][load.key] for load in twenty() if load.tokens == tokens]
        rates = [row["tokens_per_s"] for row in rows]
        counts = [str(sum(row[count] for row in rows)) for count in ("requests", "refused", "failed")]
        found.append([str(tokens), str(len(rows)), f"{min(rates):.2f}", f"{max(rates):.2f}", *counts])
    return found


def judged(document: Mapping[str, Any]) -> list[Bound]:
    """What was to be reached."""
    rounds, keys = document["rounds"], list(document["twenty"].values())
    above, below = (ttft(document, name, OTHER) for name in ("flooded", "full"))
    enough = min(len(above), len(below)) >= 5  # all may be refused
    middle, slow = (ratio(above, below, quantile(part), blocks=True) if enough else None for part in (50, 95))
    alone, flooded = ([one[FLOOD]["tokens_per_s"] for one in rounds[name]] for name in ("alone", "flooded"))
    lost = [before - now for before, now in zip(alone, flooded, strict=True)]
    cost = ratio(lost, [one[OTHER]["tokens_per_s"] for one in rounds["flooded"]], fewest=2)
    refused = sum(one[OTHER]["refused"] for one in rounds["flooded"])
    rows = [row for name in PHASES for one in rounds[name] for row in one.values()] + keys
    failed = sum(row["failed"] for row in rows)
    index = jain([row["tokens_per_s"] for row in keys])
    most, one_for_one, even = BOUNDS["ttft_ratio"], BOUNDS["lost_for_one"], BOUNDS["jain"]
    near, fair = middle is not None and middle.value <= most, cost.low <= one_for_one
    return [
        (f"TTFT p50 of `{OTHER}`, flooded / full", f"{most:g}", str(middle), near),
        (f"TTFT p95 of `{OTHER}`, flooded / full", "none", str(slow), None),
        (f"requests of `{OTHER}` refused while flooded", "0", str(refused), refused == 0),
        ("tokens lost for one of the other key", f"{one_for_one:g}, or the interval holds it", str(cost), fair),
        ("Jain's index of twenty keys' tokens/s", f"{even:g}", f"{index:.4f}", index >= even),
        ("requests that failed otherwise", "0", str(failed), failed == 0),
    ]


def text(document: Mapping[str, Any]) -> str:
    """The report for a person."""
    return render(
        "fairness.md.j2",
        {**document, "judged": judged(document), "lines": lines(document), "lengths": lengths(document)},
        connections=FLOOD_CONNECTIONS,
        max_wait_s=MAX_WAIT_S,
        each=TWENTY_CONNECTIONS,
        words=WORDS,
        run_in_s=RUN_IN_S,
        flood_tokens=FLOOD_TOKENS,
        other_tokens=OTHER_TOKENS,
    )


@contextmanager
def redis(folder: Path) -> Iterator[list[str]]:
    """Settings that count quotas in a Redis which runs until the block ends; none where no Redis is installed."""
    program, port = shutil.which("redis-server"), local.free_port()
    if program is None:
        yield []
        return
    words = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with subprocess.Popen([program, *words], stdout=subprocess.DEVNULL) as process:
        try:
            yield [f"cluster.quota_url=redis://127.0.0.1:{port}"]
        finally:
            process.terminate()


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "fairness")
    options.add_argument("--rounds", type=int, default=6, help="of the three phases; at least 5")
    options.add_argument("--seconds", type=float, default=40, help="of each phase that count")
    options.add_argument("--twenty", type=float, default=180, help="seconds of the twenty keys that count")
    options.add_argument("--period", type=float, default=1, help=f"seconds between two requests of {OTHER}")
    options.add_argument(
        "--pause", type=float, default=0, help=f"seconds of {FLOOD} between a refusal and the next try"
    )
    options.add_argument("--replicas", type=int, help="serve from so many on a Ray cluster, with quotas in Redis")
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="borg-fairness-"))
    note(f"logs: {folder}")
    keys = entries((FLOOD, OTHER, *TWENTY))
    (folder / "keys.yaml").write_text(yaml.safe_dump([{**keys[0], "metrics": True}, *keys[1:]]))
    sets = [f"server.keys={folder / 'keys.yaml'}", f"limits.max_wait_s={MAX_WAIT_S}"]
    server, name = "ours", given.name
    with ExitStack() as stack:
        if given.replicas is not None:
            server, name = "ray-ours", "fairness-ray" if name == "fairness" else name
            cores = len(os.sched_getaffinity(0)) / given.replicas
            sets += [f"cluster.replicas={given.replicas}", f"cluster.cpus={cores:g}"]
            sets += stack.enter_context(redis(folder))
        found = contenders(load(Path(given.config), sets), folder, sets)
        start = {one.name: one.start for one in found}[server]
        measured = measure(start, given)
    document = {"command": command("fairness", given), **surroundings("ray"), "server": server, **measured}
    write(given.out, name, document, text(document))


if __name__ == "__main__":
    main()
