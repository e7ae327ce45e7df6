"""Start, pause, resume and end the servers that a comparison measures, each with all its processes, by their ids."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["LOOK", "Server", "free_port", "lives", "marked", "metric", "ours", "running", "stock"]

LOOK = httpx.Client(timeout=10, limits=httpx.Limits(max_keepalive_connections=0))
"""For whoever asks often: to make a client costs 40 ms of CPU, for the certificates of authorities that nobody asks."""


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels on `/metrics`; 0 if it has none yet."""
    families = text_string_to_metric_families(LOOK.get(url + "/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def marked(variable: str, value: str) -> list[psutil.Process]:
    """Every living process whose environment says so, and what descends from it.

    Processes inherit it from the one that was started; a process that writes its title there no longer shows it.
    """
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(variable) == value:
                found |= {process, *process.children(recursive=True)}
    return [process for process in found if lives(process)]


def lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie has ended."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass
class Server:
    """A running server; `processes` are its own and its engine's."""

    name: str
    url: str
    process: psutil.Process
    start_s: float
    log: Path
    processes: list[psutil.Process] = field(default_factory=list)

    def pause(self) -> None:
        """Stop all its processes where they are, so that they cost nothing."""
        for process in self.processes:
            process.suspend()

    def resume(self) -> None:
        for process in reversed(self.processes):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def rss_bytes(self) -> int:
        """Resident memory of the server's own process, the engine's left out."""
        return int(self.process.memory_info().rss)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far: of the server's own process, and of its engine's processes."""
        own = self.process.cpu_times()
        rest = [process.cpu_times() for process in self.processes if process.pid != self.process.pid]
        return {"server": own.user + own.system, "engine": sum(times.user + times.system for times in rest)}


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    ready: str,
    log: Path,
    limit_s: float = 300,
    more: Mapping[str, str] | None = None,
    naming: str = "",
) -> Iterator[Server]:
    """Start a server, wait until `GET ready` is 200, end it afterwards. Raises RuntimeError with the end of its log.

    `more`: variables for its environment; `naming`: what the answer must hold to count.
    """
    begin = time.monotonic()
    environment = {
        **os.environ,
        "VLLM_TARGET_DEVICE": os.environ.get("VLLM_TARGET_DEVICE", "cpu"),
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment |= more or {}
    environment.pop("VLLM_CPU_NUM_OF_RESERVED_CPU", None)  # ours sets it for itself; others run as they are
    with log.open("wb") as output:
        popen = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
    url = f"http://127.0.0.1:{port}"
    server = Server(name, url, psutil.Process(popen.pid), 0.0, log)
    try:
        while True:
            if popen.poll() is not None or time.monotonic() - begin > limit_s:
                raise RuntimeError(f"{name} did not become ready:\n{log.read_text(errors='replace')[-3000:]}")
            try:
                answer = LOOK.get(url + ready, timeout=2)
                if answer.status_code == 200 and naming in answer.text:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        server.start_s = time.monotonic() - begin
        server.processes = [server.process, *server.process.children(recursive=True)]
        yield server
    finally:
        server.resume()
        popen.send_signal(signal.SIGTERM)
        try:
            popen.wait(60)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        for process in server.processes:
            if process.is_running():
                process.kill()


def ours(config: str, port: int, *sets: str) -> list[str]:
    """The command of this package's server."""
    words = [sys.executable, "-m", "borg_serve", "serve", "--config", config, "--set", f"server.port={port}"]
    return [*words, *(word for item in sets for word in ("--set", item))]


WITHOUT_OURS = {"VLLM_PLUGINS": ""}
"""For the environment of a vLLM that is to run as it is: it finds our plugin installed, and does not load it."""


def stock(arguments: Sequence[str], port: int) -> list[str]:
    """The command of vLLM's own server; its `vllm` command does not start from the vllm-cpu distribution."""
    start = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
    return [sys.executable, "-W", "ignore", "-c", start, "--host=127.0.0.1", f"--port={port}", *arguments]
