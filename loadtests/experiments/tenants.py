"""What tenants cost: `python -m loadtests.experiments.tenants`, about ten minutes on two cores.

Two of our servers with the same settings run in turn: one without keys, whose users share all KV blocks; one with ten
keys, private KV blocks, fair share, a budget and a ledger. As many users ask as there are slots, so that none may be
refused.
"""

import asyncio
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from loadtests.experiments.experiment import command, entries, note, parser, rotation, surroundings
from loadtests.generator.closed_loop import closed_loop
from loadtests.generator.workload import body
from loadtests.report.bootstrap import ratio
from loadtests.report.tables import render, write
from loadtests.servers.contenders import ours

KEYS = tuple(f"tenant-{number}" for number in range(10))
OPEN, KEYED = "open", "keys"
COUNTS = ("requests", "failed")


def measure(url: str, users: int, each: int, tokens: int, seed: str) -> dict[str, Any]:
    """Figures of a closed loop in which every user sends `each` requests on average."""
    rng = random.Random(seed)
    bodies = [body(rng, tokens) for _ in range(users * each)]
    loop = asyncio.run(closed_loop(url, users, bodies, keys=KEYS))
    return {**loop.figures(), "errors": dict(loop.failed)}


def lines(blocks: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row of the report for each number of users: figures with keys by those without."""
    found = []
    for users, sides in blocks.items():
        ratios = {}
        for figure in ("output_tokens_per_s", "ttft_ms"):
            with_keys, without = ([block[figure] for block in sides[name]] for name in (KEYED, OPEN))
            ratios[figure] = str(ratio(with_keys, without))
        counts = {count: [sum(block[count] for block in sides[name]) for name in (OPEN, KEYED)] for count in COUNTS}
        rate = sorted(block["output_tokens_per_s"] for block in sides[KEYED])[len(sides[KEYED]) // 2]
        found.append({"users": users, "blocks": len(sides[KEYED]), "rate": rate, **ratios, **counts})
    return found


def text(document: Mapping[str, Any]) -> str:
    """The report for a person."""
    return render("tenants.md.j2", {**document, "lines": lines(document["blocks"])}, keys=len(KEYS))


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "tenants")
    options.add_argument("--users", type=int, nargs="+", default=[16], help="users; as many as slots are never refused")
    options.add_argument("--rounds", type=int, default=6, help="at least 5")
    options.add_argument("--first", choices=(OPEN, KEYED), default=OPEN, help="the server that is started first")
    options.add_argument("--each", type=int, default=2, help="requests of a user in a block")
    options.add_argument("--tokens", type=int, default=32, help="output tokens of a request")
    options.add_argument("--set", nargs="+", default=[], help="settings of both servers' profile")
    options.add_argument("--device", default="the CPU engine", help="how the report names it")
    arguments = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="borg-tenants-"))
    note(f"logs: {folder}")
    limits = {"tokens_per_day": 10**12, "tokens_per_minute": 10**9}
    keys = [{**entry, "limits": limits} for entry in entries(KEYS)]
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    keyed = (f"server.keys={folder / 'keys.yaml'}", f"usage.url=sqlite:///{folder}/usage.db", f"usage.spool={folder}")
    starts = {}
    settings = {OPEN: (), KEYED: keyed}
    for name in sorted(settings, key=lambda name: name != arguments.first):
        (folder / name).mkdir()
        starts[name] = ours(arguments.config, folder / name, "server.hang_s=60", *arguments.set, *settings[name])
    blocks: dict[str, dict[str, list[dict[str, Any]]]] = {
        str(users): {name: [] for name in starts} for users in arguments.users
    }
    with rotation(starts, arguments.rounds, dropped=1) as turns:
        for number, name, server in turns:
            for users in arguments.users:
                seed = f"{number} {users} {name}"
                found = measure(server.url, users, arguments.each, arguments.tokens, seed)
                note(f"{number} {name:5} {users} {found}")
                if number >= 0:
                    blocks[str(users)][name].append(found)
    document = {"command": command("tenants", arguments, "device"), **surroundings(), "device": arguments.device}
    document |= {"tokens": arguments.tokens, "blocks": blocks}
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
