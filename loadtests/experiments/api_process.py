"""What one API process carries: `python -m loadtests.experiments.api_process`, about 6 minutes on two cores.

The demo's tokenizer and template before a model of one narrow layer with random weights, so that the API process and
not the engine is what is busy. One server for each `engine.stream_interval`, or a replica of Ray Serve; all are
started, all but one are paused, in the order A B C C B A. Definitions of the figures are in the report.
"""

import json
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from borg_serve.checkpoint import demo
from borg_serve.checkpoint.manifest import MANIFEST_FILE
from borg_serve.config import load
from borg_serve.engine.environment import prepare_environment
from loadtests.experiments.experiment import command, medians, note, parser, rotation, surroundings
from loadtests.gpu.throughput import Load, measure
from loadtests.report.bootstrap import ratio
from loadtests.report.tables import render, write
from loadtests.servers.contenders import Start, contenders
from loadtests.servers.local import Server

NARROW = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def reshaped(checkpoint: Path, folder: Path, shape: Mapping[str, object]) -> Path:
    """A checkpoint without weights in a new folder: that one's tokenizer and template, and another shape of model."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in ("config.json", MANIFEST_FILE) and file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **shape}), encoding="utf-8")
    return folder


def settings(model: Path, interval: int, users: int) -> list[str]:
    """The demo's profile for a checkpoint without weights, with a place for every user."""
    return [
        f"model.path={model}",
        "model.load_format=dummy",
        "model.probe=null",
        f"limits.concurrent={users}",
        f"engine.max_num_seqs={users}",
        "engine.max_num_batched_tokens=1024",
        "engine.kv_cache_memory_bytes=1073741824",
        f"engine.stream_interval={interval}",
    ]


def sides(
    config: Path, model: Path, intervals: list[int], on_ray: list[int], users: int, folder: Path
) -> dict[str, Start]:
    """What starts the server of each row of the report; its log goes to a folder of its own."""
    found = {}
    rows = [("ours", interval) for interval in intervals] + [("ray-ours", interval) for interval in on_ray]
    for name, interval in rows:
        row, sets = f"{interval}{', on Ray' if name == 'ray-ours' else ''}", settings(model, interval, users)
        logs = folder / f"{name}-{interval}"
        logs.mkdir()
        found[row] = {one.name: one.start for one in contenders(load(config, sets), logs, sets)}[name]
    return found


def block(server: Server, users: int, requests: int, tokens: int) -> dict[str, float]:
    """Measure `requests` requests a user. Raises RuntimeError when one fails."""
    before = server.cpu_s()["gate"]
    found = measure(server.url, Load(users, requests=requests, tokens=tokens), 1, None, secrets.token_hex(4))
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} of {users * requests} requests failed: {found['why']}")
    return found | {"server_us_a_token": (server.cpu_s()["gate"] - before) * 1e6 / (users * requests * tokens)}


def run(starts: Mapping[str, Start], users: int, requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure each server in turn; its blocks by row of the report."""
    blocks: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
    with rotation(starts, rounds, dropped=1) as turns:
        for number, name, server in turns:
            found = block(server, users, requests, tokens)
            note(f"{number:3} {name}: {found}")
            blocks[name] += [found] if number >= 0 else []
    return {"tokens": tokens, "blocks": blocks}


def lines(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line of the report for each row: medians, and the CPU by the first row's."""
    keys = ("server_us_a_token", "output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")
    blocks: dict[str, list[dict[str, float]]] = document["blocks"]
    costs = {name: [found["server_us_a_token"] for found in of_row] for name, of_row in blocks.items()}
    first = next(iter(costs.values()))
    return [
        {"name": name, "ratio": str(ratio(costs[name], first)), **medians(of_row, *keys)}
        for name, of_row in blocks.items()
    ]


def text(document: Mapping[str, Any]) -> str:
    """The report for a person."""
    return render("api_process.md.j2", document, lines=lines(document))


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "api-process")
    options.add_argument("--intervals", type=int, nargs="+", default=[1, 2, 4, 8], help="tokens an event of a stream")
    options.add_argument("--on-ray", type=int, nargs="*", default=[], help="the same, of a replica of Ray Serve")
    options.add_argument("--users", type=int, default=64)
    options.add_argument("--requests", type=int, default=4, help="requests a user")
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--rounds", type=int, default=6, help="blocks of each side; at least 5")
    given = options.parse_args()
    prepare_environment()
    folder = Path(tempfile.mkdtemp(prefix="borg-api-process-"))
    model = reshaped(demo.materialise(), folder / "model", NARROW)
    starts = sides(Path(given.config), model, given.intervals, given.on_ray, given.users, folder)
    found = run(starts, given.users, given.requests, given.tokens, given.rounds)
    document = {"command": command("api_process", given, "config"), **surroundings(), **found}
    write(given.out, given.name, document, text(document))


if __name__ == "__main__":
    main()
