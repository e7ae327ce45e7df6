"""What experiments share: their options, whose turn it is, and their report.

It does not know what is measured.
"""

import argparse
import asyncio
import hashlib
import os
import platform
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from borg_serve.engine.environment import vllm_version
from loadtests.generator.closed_loop import closed_loop
from loadtests.servers.contenders import Start
from loadtests.servers.local import Server

CONFIG = "configs/demo-cpu.yaml"
Turn = tuple[int, str, Server]


def parser(doc: str | None, name: str, config: bool = True) -> argparse.ArgumentParser:
    """A parser with `--out` and `--name` of the report, and `--config`. SIGTERM ends what the experiment starts."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = argparse.ArgumentParser(description=doc)
    if config:
        found.add_argument("--config", default=CONFIG, help="profile of the server")
    found.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the report")
    found.add_argument("--name", default=name, help="of the report")
    return found


def command(module: str, arguments: argparse.Namespace, *hidden: str) -> str:
    """The command line that repeats an experiment, with every option but where its report goes and the hidden ones."""
    words = [f"python -m loadtests.experiments.{module}"]
    for name, value in vars(arguments).items():
        if name not in ("out", "name", *hidden) and value is not False and value not in (None, "", []):
            values = value if isinstance(value, list) else [] if value is True else [value]
            given = (f"{one:g}" if isinstance(one, float) else str(one) for one in values)
            words += [f"--{name.replace('_', '-')}", *given]
    return " ".join(words)


def surroundings(*packages: str) -> dict[str, Any]:
    """The versions of vLLM, Python and these packages, and the machine."""
    versions = {"vllm": vllm_version(), "python": platform.python_version()}
    machine = {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))}
    return {"versions": versions | {name: version(name) for name in packages}, "machine": machine}


@contextmanager
def rotation(starts: Mapping[str, Start], rounds: int, dropped: int = 0) -> Iterator[Iterator[Turn]]:
    """Start every server once, and iterate over turns in which one runs and all others are paused.

    A turn is (round, name, server), forwards and backwards in turn: A B C, C B A. The rounds below 0, so many as
    `dropped` says, are a warm-up. Names may share a server.
    """
    with ExitStack() as stack:
        running: dict[Start, Server] = {}
        for name, start in starts.items():
            if start not in running:
                note(f"starting {name}")
                running[start] = stack.enter_context(start())
                running[start].pause()

        def turns() -> Iterator[Turn]:
            for number in range(-dropped, rounds):
                for name in starts if (number + dropped) % 2 == 0 else reversed(list(starts)):
                    with running[starts[name]].awake():
                        yield number, name, running[starts[name]]

        yield turns()


def block(server: Server, users: int, bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A closed loop: its figures, CPU seconds for 1,000 tokens by group, memory. Raises RuntimeError if all fail."""
    before, mine = server.cpu_s(), time.process_time()
    loop = asyncio.run(closed_loop(server.url, users, bodies))
    spent = {"client": time.process_time() - mine}
    spent |= {group: after - before[group] for group, after in server.cpu_s().items()}
    figures = loop.figures()
    cpu = {group: seconds / loop.tokens * 1000 for group, seconds in spent.items()}
    return {"users": users, **figures, "cpu_s_per_1000": cpu, "memory_mib": server.memory_mib()}


def medians(blocks: Sequence[Mapping[str, Any]], *keys: str) -> dict[str, float]:
    """The median of each of these figures."""
    return {key: median(block[key] for block in blocks) for key in keys}


def entries(names: Iterable[str]) -> list[dict[str, Any]]:
    """Entries of a key file; each key is its own name."""
    return [{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in names]


def note(text: object) -> None:
    """Say how far the experiment is."""
    print(text, file=sys.stderr, flush=True)
