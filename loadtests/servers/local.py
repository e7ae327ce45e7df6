"""Start, pause, resume and end a server of this machine with all its processes, and read its metrics.

Processes are found by a mark in their environment. It does not know what the server serves.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

LOOK = httpx.Client(timeout=10, limits=httpx.Limits(max_keepalive_connections=0))
"""For whoever asks often: making a client costs 40 ms of CPU, most of it for certificates that nobody needs here."""
MARK = "BORG_LOADTEST_MARK"
GROUPS = ("client", "gate", "engine", "proxy", "router", "ray")
Titles = Mapping[str, Sequence[str]]
TITLES: Titles = {
    "engine": ("VLLM::", "EngineCore", "loadtests.servers.original"),
    "router": ("LLMRouter", "OpenAiIngress"),
    "proxy": ("ProxyActor", "HAProxyManager", "haproxy"),
    "gate": ("ServeReplica", "borg_serve serve", "api_server"),
}
"""What is in the titles of a group's processes; the first that fits counts, and the rest is Ray's."""


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
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
    """Every living process whose environment has this variable with this value, and their descendants.

    A process that overwrites its environment with its title no longer shows the mark; its parent does.
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
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def group_of(title: str, titles: Titles = TITLES) -> str:
    """What a process is there for, by its command line."""
    return next((name for name, words in titles.items() if any(word in title for word in words)), "ray")


@dataclass
class Server:
    """A running server; `process` is the one that was started."""

    name: str
    url: str
    process: psutil.Process
    mark: str
    start_s: float = 0.0
    """Until it was ready."""

    def processes(self) -> list[psutil.Process]:
        """All its processes as they are now: Ray's own app answers before its engine exists."""
        return marked(MARK, self.mark)

    def pause(self) -> None:
        """Stop all its processes where they are, so that they cost nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let all its processes go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let a paused server run until the block ends."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def rss_bytes(self) -> int:
        """Resident memory of the process that was started, its engine's processes left out."""
        return int(self.process.memory_info().rss)

    def memory_mib(self) -> float:
        """Proportional set size of all its processes: shared pages count once."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / (1 << 20)

    def cpu_s(self, titles: Titles = TITLES) -> dict[str, float]:
        """CPU seconds so far by group."""
        found = dict.fromkeys((*titles, "ray"), 0.0)
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[group_of(" ".join(process.cmdline()), titles)] += times.user + times.system
        return found


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

    `more`: variables for its environment; `naming`: what the answer must contain to count.
    """
    begin, mark = time.monotonic(), uuid4().hex
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment = {"VLLM_TARGET_DEVICE": "cpu", **os.environ, **offline, MARK: mark, **(more or {})}
    environment.pop("VLLM_CPU_NUM_OF_RESERVED_CPU", None)  # ours sets it for itself; others run as they are
    with log.open("wb") as output:
        popen = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
    server = Server(name, f"http://127.0.0.1:{port}", psutil.Process(popen.pid), mark)
    try:
        while not _ready(server.url + ready, naming):
            if popen.poll() is not None or time.monotonic() - begin > limit_s:
                raise RuntimeError(f"{name} did not become ready:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.25)
        server.start_s = time.monotonic() - begin
        yield server
    finally:
        server.resume()
        processes = server.processes()
        popen.send_signal(signal.SIGTERM)
        try:
            popen.wait(60)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
        end(mark, processes)


def _ready(url: str, naming: str) -> bool:
    with suppress(httpx.TransportError):
        answer = LOOK.get(url, timeout=2)
        return answer.status_code == 200 and naming in answer.text
    return False


def end(mark: str, processes: Collection[psutil.Process] = ()) -> None:
    """Wait until these and all marked processes have ended, at most 20 s, then kill them: Ray leaves HAProxy behind."""

    def left() -> set[psutil.Process]:
        return {process for process in processes if lives(process)} | set(marked(MARK, mark))

    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.5)
    for process in left():
        with suppress(psutil.NoSuchProcess):
            process.kill()
