"""What this server costs over vLLM's stock server: `python -m loadtests.experiments.overhead`, about 15 minutes.

Both run the same engine arguments on the demo model; to the stock server the client sends the identity as its system
message. One is paused while the other is measured. The figures are defined in the report.
"""

import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from borg_serve.config import load
from borg_serve.engine.environment import prepare_environment
from loadtests.experiments.experiment import block, command, medians, note, parser, rotation, surroundings
from loadtests.generator.workload import body
from loadtests.report.bootstrap import ratio
from loadtests.report.tables import Bound, render, write
from loadtests.servers.contenders import ours, stock

USERS = (1, 8)
OUTPUT_TOKENS = 64
BOUNDS = {"output_ratio": 0.97, "ttft_ms": 5.0, "start_s": 60.0, "rss_gib": 1.5}


def measure(config: str, rounds: int) -> dict[str, Any]:
    """Run the whole comparison; its JSON document."""
    prepare_environment()
    profile, folder = load(Path(config)), Path(tempfile.mkdtemp(prefix="borg-overhead-"))
    system = profile.identity.prompt.read_text(encoding="utf-8").strip()
    blocks: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
    starts = {"ours": ours(config, folder), "stock": stock(profile, folder)}
    with rotation(starts, rounds, dropped=1) as turns:
        for number, name, server in turns:
            for users in USERS:
                requests, identity = (3 * users if users > 1 else 6), system if name == "stock" else None
                rng = random.Random(1000 + number)
                result = block(server, users, [body(rng, OUTPUT_TOKENS, identity) for _ in range(requests)])
                blocks[name] += [result] if number >= 0 else []
                note(f"{number:3} {name:6} {result}")
            if name == "ours":
                found = {"start_s": round(server.start_s, 1), "rss_bytes": server.rss_bytes()}
    return {**surroundings(), **found, "blocks": blocks}


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios with intervals, and whether each bound is met."""
    rows: list[dict[str, Any]] = []
    keys = ("output_tokens_per_s", "ttft_ms", "tpot_ms")
    for users in USERS:
        sides = {name: [one for one in blocks if one["users"] == users] for name, blocks in document["blocks"].items()}
        row: dict[str, Any] = {"users": users}
        middles = {name: medians(side, *keys) for name, side in sides.items()}
        row |= {key: {name: middles[name][key] for name in sides} for key in keys}
        for name, key in (("output_ratio", "output_tokens_per_s"), ("ttft_ratio", "ttft_ms")):
            row[name] = asdict(ratio([one[key] for one in sides["ours"]], [one[key] for one in sides["stock"]]))
        row["server_cpu_ms_a_token"] = {
            name: median(one["cpu_s_per_1000"]["gate"] for one in side) for name, side in sides.items()
        }
        row["failed"] = {name: sum(int(one["failed"]) for one in side) for name, side in sides.items()}
        rows.append(row)
    met = {
        "start_s": document["start_s"] <= BOUNDS["start_s"],
        "rss": document["rss_bytes"] <= BOUNDS["rss_gib"] * (1 << 30),
        "output": all(row["output_ratio"]["value"] >= BOUNDS["output_ratio"] for row in rows),
        "ttft": all(row["ttft_ms"]["ours"] - row["ttft_ms"]["stock"] <= BOUNDS["ttft_ms"] for row in rows),
    }
    return {"rows": rows, "bounds": BOUNDS, "met": met}


def judged(document: dict[str, Any]) -> list[Bound]:
    """What was to be reached."""
    rows, met = document["summary"]["rows"], document["summary"]["met"]
    ratios = ", ".join(f"{row['output_ratio']['value']:.3f}" for row in rows)
    more = ", ".join(f"{row['ttft_ms']['ours'] - row['ttft_ms']['stock']:+.0f} ms" for row in rows)
    rss = f"{document['rss_bytes'] / (1 << 30):.2f} GiB"
    return [
        ("start to ready", "60 s", f"{document['start_s']} s", met["start_s"]),
        ("resident memory of the server's own process", "1.5 GiB", rss, met["rss"]),
        (f"output tokens/s, ratio at {USERS} users", "0.97", ratios, met["output"]),
        (f"TTFT, ours - stock at {USERS} users", "+5 ms", more, met["ttft"]),
    ]


def text(document: dict[str, Any]) -> str:
    """The report for a person."""
    return render("overhead.md.j2", document, judged=judged(document), tokens=OUTPUT_TOKENS)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "overhead")
    options.add_argument("--rounds", type=int, default=6, help="blocks of each side; at least 5")
    arguments = options.parse_args()
    document = {"command": command("overhead", arguments), **measure(arguments.config, arguments.rounds)}
    document["summary"] = summary(document)
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
