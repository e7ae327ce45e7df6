"""What one API process carries: `python -m loadtests.api_process`, about 6 minutes on two cores.

The demo's tokenizer and template before a model of one narrow layer with random weights, so that the API process and
not the engine is what is busy. One server for each `engine.stream_interval`, or a replica of Ray Serve; all are
started, all but one are paused, in the order A B C C B A. Definitions of the figures are in the report.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from borg_serve import demo
from borg_serve.config import load
from borg_serve.device import prepare_environment, vllm_version
from borg_serve.manifest import MANIFEST_FILE
from loadtests.bootstrap import ratio
from loadtests.contenders import Running, contenders
from loadtests.tables import table, write
from loadtests.throughput import measure

CONFIG = "configs/demo-cpu.yaml"
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
    model: Path, intervals: list[int], on_ray: list[int], users: int, folder: Path
) -> dict[str, Callable[[], AbstractContextManager[Running]]]:
    """What starts the server of each row of the report; its log goes to a folder of its own."""
    found = {}
    rows = [(str(interval), "ours", interval) for interval in intervals]
    rows += [(f"{interval}, on Ray", "ray-ours", interval) for interval in on_ray]
    for row, name, interval in rows:
        sets = settings(model, interval, users)
        place = folder / f"{name}-{interval}"
        place.mkdir()
        by_name = {one.name: one for one in contenders(load(Path(CONFIG), sets), place, sets)}
        found[row] = by_name[name].start
    return found


def block(server: Running, users: int, requests: int, tokens: int) -> dict[str, float]:
    """Measure `requests` requests a user. Raises RuntimeError when one fails."""
    before = server.cpu_s()["door"]
    found = measure(server.url, users, users * requests, 1, tokens, None)
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} of {users * requests} requests failed: {found['why']}")
    return found | {"server_us_a_token": (server.cpu_s()["door"] - before) * 1e6 / (users * requests * tokens)}


def run(intervals: list[int], on_ray: list[int], users: int, requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Run the whole comparison; its JSON document."""
    prepare_environment()
    folder = Path(tempfile.mkdtemp(prefix="borg-api-process-"))
    model = reshaped(demo.materialise(), folder / "model", NARROW)
    starts = sides(model, intervals, on_ray, users, folder)
    blocks: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
    with ExitStack() as stack:
        running = {}
        for name, start in starts.items():
            running[name] = stack.enter_context(start())
            running[name].pause()
        for turn in range(-1, rounds):  # the first turn warms up and is dropped
            for name in running if turn % 2 else reversed(running):
                running[name].resume()
                found = block(running[name], users, requests, tokens)
                running[name].pause()
                print(f"{turn:3} {name}: {found}", file=sys.stderr, flush=True)
                if turn >= 0:
                    blocks[name].append(found)
    return {
        "command": " ".join(["python -m loadtests.api_process", *sys.argv[1:]]),
        "versions": {"vllm": vllm_version(), "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "tokens": tokens,
        "blocks": blocks,
    }


def markdown(document: dict[str, Any]) -> str:
    """The report for a person."""
    blocks: dict[str, list[dict[str, float]]] = document["blocks"]
    versions, machine = document["versions"], document["machine"]

    def column(interval: str, key: str) -> list[float]:
        return [found[key] for found in blocks[interval]]

    first = next(iter(blocks))
    rows = []
    for interval in blocks:
        cost = median(column(interval, "server_us_a_token"))
        against = ratio(column(interval, "server_us_a_token"), column(first, "server_us_a_token"))
        speed, ttft, tpot = (
            median(column(interval, key)) for key in ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")
        )
        rows.append(
            (interval, f"{cost:.0f}", f"{1e6 / cost:,.0f}", against, f"{speed:,.0f}", f"{ttft:.0f}", f"{tpot:.1f}")
        )
    heads = [
        "tokens an event",
        "CPU, µs a token",
        "carries, tokens/s",
        "CPU / first row's",
        "tokens/s",
        "TTFT ms",
        "TPOT ms",
    ]
    return "\n".join(
        [
            "# What one API process carries",
            "",
            f"`{document['command']}` on {machine['cores']} cores ({machine['processor']}), vLLM {versions['vllm']}, "
            f"Python {versions['python']}. A model of one narrow layer with random weights behind the identity, "
            f"streamed answers of {document['tokens']} tokens, closed loop; servers in turn, A B C C B A, "
            f"{len(blocks[first])} blocks of each after one that is dropped. CPU: of the server's own process, for a "
            "token, requests and their prompts included. Carries: tokens/s at which that process would keep one core "
            "busy. Ratios of medians with 95% bootstrap intervals. The last three columns are of this machine, where "
            "engine, server and clients share the cores.",
            "",
            table(heads, rows),
            "",
        ]
    )


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 2, 4, 8], help="tokens an event of a stream")
    parser.add_argument("--on-ray", type=int, nargs="*", default=[], help="the same, of a replica of Ray Serve")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4, help="requests a user")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each side; at least 5")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="api-process", help="of the report")
    arguments = parser.parse_args()
    words = vars(arguments).copy()
    out, name = words.pop("out"), words.pop("name")
    document = run(**words)
    write(out, name, document, markdown(document))


if __name__ == "__main__":
    main()
