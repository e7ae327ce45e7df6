"""A real `borg-serve serve` in a session of its own: start it, wait until it is ready, look at it, end it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtests.servers.local import LOOK, lives
from tests import workers

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "configs" / "demo-cpu.yaml"
PATIENT = (
    # The machine may be slow and shared: a step or an answer that takes long there is no fault.
    "--set=server.hang_s=60",
    "--set=limits.deadline_s=180",
    "--set=limits.stall_s=60",
    "--set=server.drain_s=120",
)
SHARED = tuple(f"--set={key}={value}" for key, value in workers.SETTINGS.items())
READY_S = 600.0
END_S = 60.0


@dataclass(frozen=True)
class Server:
    """A server that was ready when it was handed out."""

    base_url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self) -> str:
        """Return the last lines of its log, for a failed assertion to show."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def metrics(self) -> dict[str, float]:
        """Return what /metrics shows: sample name -> value, summed over labels."""
        values: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(LOOK.get(f"{self.base_url}/metrics", timeout=30).text):
            for sample in family.samples:
                values[sample.name] += sample.value
        return dict(values)

    def family(self) -> list[psutil.Process]:
        """Return the living processes of its session and its descendants, itself excepted."""
        found = {process for process in psutil.process_iter() if _session(process.pid) == self.pid}
        with suppress(psutil.NoSuchProcess):
            found |= set(psutil.Process(self.pid).children(recursive=True))
        return [process for process in found if process.pid != self.pid and lives(process)]

    def ended(self, limit_s: float = END_S) -> int:
        """Wait until it has ended by itself, and return its exit status."""
        return self.process.wait(limit_s)

    def stop(self, limit_s: float = END_S) -> int:
        """Send SIGTERM, and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended(limit_s)


@contextmanager
def running(
    folder: Path, *settings: str, profile: Path = PROFILE, more: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Serve the demo checkpoint on a free port while the block runs, and leave no process behind.

    `more`: variables for its environment.
    """
    port = free_port()
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command("serve", "--config", str(profile), f"--set=server.port={port}", *SHARED, *PATIENT, *settings),
            cwd=ROOT,
            env=environment() | dict(more or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    family: list[psutil.Process] = []
    try:
        _wait_until_ready(server)
        family = server.family()
        yield server
    finally:
        for member in {*family, *server.family()}:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        process.wait()


def command(*words: str) -> list[str]:
    """Return a command of `borg-serve`, whether or not the package is installed."""
    return [sys.executable, "-m", "borg_serve", *words]


INHERITED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""The environment before an engine in this process changes it (LD_PRELOAD, the start method of processes), and with
output buffered, as a user has it."""


def environment() -> dict[str, str]:
    """Return the environment for a process that is started, with the source tree to import from."""
    return {**INHERITED, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def living(processes: list[psutil.Process], within_s: float = 5.0) -> list[psutil.Process]:
    """Return those that still live after a while in which they may end."""
    return [process for process in psutil.wait_procs(processes, timeout=within_s)[1] if not _is_zombie(process)]


def _is_zombie(process: psutil.Process) -> bool:
    """Whether it has ended and only its adoptive parent has not asked how: that is not for us to answer for."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        status = server.process.poll()
        if status is not None:
            raise RuntimeError(f"the server ended with status {status} before it was ready:\n{server.tail()}")
        with suppress(httpx.TransportError):
            if LOOK.get(f"{server.base_url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.25)
    raise RuntimeError(f"the server was not ready within {READY_S:g} s:\n{server.tail()}")


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None
