"""Our server beside the one that a careful user would start: `python -m loadtests.experiments.peers`, on a GPU.

The peer is vLLM's own server with the arguments of our profile, its Rust front end if it has one, and prompts admitted
in one step of four. It gets the identity as the system message of every request. The servers share one GPU: each has
its part of the memory, and one is asked while the others are paused, A B B A.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from borg_serve import config as profiles
from borg_serve.config import Config
from borg_serve.engine.environment import vllm_version
from loadtests.experiments.experiment import command, medians, note, parser, rotation, surroundings
from loadtests.gpu.throughput import Load, clients, measure
from loadtests.report.bootstrap import ratio
from loadtests.report.tables import render, write
from loadtests.servers import local
from loadtests.servers.contenders import Start, ours

OURS, VARIANT, PEER = "ours", "variant", "peer"
LOADS = ("256:0.5:6", "64:0.5:8", "256:0:4", "16:0.5:8", "1:0.5:6")
FIGURES = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms")
MEMORY = 0.92
"""Of the GPU, for all servers together."""
TAKEN = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "prefill_schedule_interval", "quantization")
"""The arguments of our profile that the peer gets too. CUDA graphs stay at its default, which is faster for it."""


def load(text: str) -> Load:
    """USERS:SPREAD:REQUESTS[:WORDS]. Raises ValueError."""
    users, spread, requests, *words = text.split(":")
    return Load(int(users), float(spread), int(requests), *map(int, words))


def peer_words(config: Config, name: str, port: int, memory: float, more: Sequence[str]) -> list[str]:
    """The command line of the peer."""
    words = [f"--{each.replace('_', '-')}={config.engine[each]}" for each in TAKEN if each in config.engine]
    words += [f"--load-format={config.model.load_format}", f"--dtype={config.model.dtype}", "--enable-prefix-caching"]
    words += [f"--gpu-memory-utilization={memory}", "--host=127.0.0.1", f"--port={port}", *more]
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", config.model.path]
    return [*serve, f"--served-model-name={name}", *words]


def peer_environment(site: Path | None, rust: bool) -> dict[str, str]:
    """What the peer's processes get besides ours: another vLLM comes before ours."""
    path = [str(site)] if site else []
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {"PYTHONPATH": os.pathsep.join(path), "VLLM_USE_RUST_FRONTEND": str(int(rust))}


def peer_version(site: Path | None) -> str:
    """Version of the peer's vLLM."""
    if site is None:
        return vllm_version()
    (found,) = distributions(name="vllm", path=[str(site)])
    return found.version


def servers(given: argparse.Namespace, config: Config, folder: Path) -> dict[str, Start]:
    """How each is started."""
    sides: dict[str, list[str]] = {OURS: [], **({VARIANT: given.variant} if given.variant else {})}
    memory = round(MEMORY / (len(sides) + 1), 2)
    sets = (*given.set, f"engine.gpu_memory_utilization={memory}", "server.hang_s=120")

    def peer() -> Any:
        port = local.free_port()
        words = peer_words(config, config.model.served_name, port, memory, given.peer_arguments.split())
        more = peer_environment(given.peer_site, not given.python_front_end)
        return local.running(PEER, words, port, "/health", folder / "peer.log", more=more)

    found: dict[str, Start] = {}
    for name, more in sides.items():
        (folder / name).mkdir()
        found[name] = ours(given.config, folder / name, *sets, *more)
    return {**found, PEER: peer}


def lines(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of the report for each load and each of our servers: its figures by the peer's."""
    rows = []
    for name, sides in document["blocks"].items():
        for side in (OURS, VARIANT):
            if len(sides.get(side, ())) < 3:
                continue
            row: dict[str, Any] = {"load": name, "side": side, "failed": [], "blocks": len(sides[side])}
            for each in (side, PEER):
                row["failed"].append(f"{_total(sides[each], 'failed')} of {_asked(sides[each])}")
            middles = [medians(sides[each], *FIGURES) for each in (side, PEER)]
            for figure in FIGURES:
                mine, theirs = ([block[figure] for block in sides[each]] for each in (side, PEER))
                row[figure] = [*(middle[figure] for middle in middles), str(ratio(mine, theirs, fewest=3))]
            rows.append(row)
    return rows


def _total(blocks: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(block[key] for block in blocks)


def _asked(blocks: Sequence[Mapping[str, Any]]) -> int:
    return _total(blocks, "requests") + _total(blocks, "failed")


def text(document: Mapping[str, Any]) -> str:
    """The report for a person."""
    return render("peers.md.j2", {**document, "lines": lines(document)})


def main() -> None:
    """Measure, and write the report and its JSON twin, whatever was measured before a server failed."""
    options = parser(__doc__, "peers")
    options.set_defaults(config="configs/7b-h100.yaml")
    options.add_argument("--set", nargs="+", default=[], help="settings of our profile: model.path=DIRECTORY")
    options.add_argument("--variant", nargs="+", default=[], help="more settings, of a second server of ours")
    options.add_argument("--peer-site", type=Path, help="a folder of packages with another vLLM, for the peer alone")
    options.add_argument("--peer-arguments", default="", help="more words for the peer's command line")
    options.add_argument("--python-front-end", action="store_true", help="the peer's, where it has no Rust front end")
    options.add_argument("--loads", nargs="+", default=[*LOADS], help="USERS:SPREAD:REQUESTS[:WORDS]")
    options.add_argument("--rounds", type=int, default=5, help="at least 3; one more is the warm-up")
    options.add_argument("--processes", type=int, default=8, help="of clients")
    options.add_argument("--device", default="one GPU", help="how the report names it")
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="borg-peers-"))
    note(f"logs: {folder}")
    config = profiles.load(Path(given.config), given.set)
    starts, identity = servers(given, config, folder), config.identity.prompt.read_text(encoding="utf-8").strip()
    blocks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    ready: dict[str, float] = {}
    try:
        with clients(given.processes) as pool, rotation(starts, given.rounds, dropped=1) as turns:
            for number, name, server in turns:
                ready[name] = round(server.start_s, 1)
                for each in map(load, given.loads):
                    system = identity if name == PEER else None
                    found = measure(server.url, each, given.processes, system, f"{number} {name}", pool)
                    note(f"{number} {name} {found}")
                    if number >= 0 and "void" not in found:
                        title = _title(each)
                        blocks.setdefault(title, {side: [] for side in starts})[name].append(found)
    finally:
        document = {"command": command("peers", given, "device"), **surroundings(), "device": given.device}
        document |= {"peer": f"vLLM {peer_version(given.peer_site)}", "rust": not given.python_front_end}
        document |= {"ready_s": ready, "variant": given.variant, "blocks": blocks}
        write(given.out, given.name, document, text(document))


def _title(each: Load) -> str:
    answers = f"{each.tokens} tokens ± {each.spread:.0%}" if each.spread else f"{each.tokens} tokens each"
    return f"{each.users} users, {each.words} words, {answers}"


if __name__ == "__main__":
    main()
