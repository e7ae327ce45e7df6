"""Locust's side: who arrives when, handed to all processes that make load; the records that come back from them.

Open loop: arrivals are drawn before the run. Locust's own "users" are only what starts a greenlet for each arrival,
one a process. A profile is a file that imports `MeasuringUser` and defines one subclass of `Profile`.
It sends and measures nothing, and does not judge.
"""

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import gevent
from gevent.queue import Queue
from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from borg_serve.errors import BorgServeError
from loadtests.generator.arrivals import ARRIVALS
from loadtests.generator.records import Record, from_dict, write
from loadtests.generator.workload import WORKLOADS, Session, sessions

LEAD_S = 0.5
"""From handing out a phase to its start, so that every process has it in time."""
VOID = 3

inbox: "Queue[dict[str, Any]]" = Queue()
"""Phases for this process."""
outbox: list[Record] = []
"""Records of this process that the master has not had yet."""


def now_us() -> int:
    """Microseconds of the clock that all processes of this machine share."""
    return time.monotonic_ns() // 1000


def keep(environment: Environment, record: Record) -> None:
    """Put a record where the report will find it."""
    if isinstance(environment.runner, WorkerRunner):
        outbox.append(record)
    elif run is not None:
        run.records.append(record)


def add_arguments(parser: LocustArgumentParser, **_: Any) -> None:
    parser.add_argument("--arrivals", choices=sorted(ARRIVALS), default="steady", help="open loop: who arrives when")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals a second")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds in which requests arrive")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="short")
    caches = (
        "cold: no warm-up, for a server that was just started; warm: some requests go first and are not counted; "
        "unshared: as warm, and every text begins with the time, so that only the identity can be found in a cache"
    )
    parser.add_argument("--cache", choices=["cold", "warm", "unshared"], default="warm", help=caches)
    parser.add_argument("--max-prompt", type=int, default=2048, help="longest user turn, tokens")
    parser.add_argument("--max-output", type=int, default=256, help="longest answer, tokens")
    parser.add_argument("--burstiness", type=float, default=0.25, help="bursty: shape of the gamma; 1 is Poisson")
    parser.add_argument("--turns", type=int, default=3, help="conversation: mean number of turns")
    parser.add_argument("--think", type=float, default=2.0, help="conversation: mean think time, s")
    hidden: dict[str, Any] = {"include_in_web_ui": False}
    parser.add_argument("--trace", **hidden, help="replay: timestamp_s,prompt_tokens,output_tokens as CSV")
    parser.add_argument("--slo", **hidden, help="saturation: the SLO whose highest rate is looked for")
    parser.add_argument("--trials", type=int, default=8, help="saturation: rates that are tried")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds before a client gives up")
    parser.add_argument("--model", default="borg-merge-v1", help="the model's served name")
    parser.add_argument("--system", **hidden, help="a file whose text every request sends as its system message")
    parser.add_argument("--api-key", default="none", env_var="LOAD_API_KEY", is_secret=True)
    parser.add_argument("--records", **hidden, help="folder for records.jsonl and run.json")


class Profile(LoadTestShape):
    """Who arrives when."""

    abstract = True
    name = ""
    found: dict[str, object] | None = None
    """What a search found."""

    def check(self, options: Namespace) -> None:
        """Raise ConfigError before anything is sent when the profile lacks something."""

    def phase(self, number: int, options: Namespace, before: Sequence[Record]) -> list[Session] | None:
        """The sessions of a phase, or None when the last has ended; `before` is what the phase before recorded."""
        raise NotImplementedError

    def tick(self) -> tuple[int, float] | None:
        """Locust asks once a second: one user a process, until the last phase has ended."""
        workers = processes(self.runner.environment) if self.runner else 1
        return None if run is not None and run.ended() else (workers, 100.0)


class Run:
    """What the master, or the only process, knows of a run."""

    def __init__(self, environment: Environment, profile: Profile) -> None:
        assert environment.parsed_options is not None
        self.environment = environment
        self.options = environment.parsed_options
        self.profile = profile
        self.records: list[Record] = []
        self.phases: list[dict[str, Any]] = []
        self.cpu_s: dict[str, float] = {}
        """Of the workers."""
        self.started_at = time.time()
        self._number = 0 if self.options.cache == "cold" else -1
        self._expected = 0
        self._over = False
        profile.check(self.options)
        self.begin()

    def begin(self) -> None:
        """Hand the next phase to all processes, or note that there is none."""
        found = self._sessions()
        if found is None:
            self._over = True
            return
        far = isinstance(self.environment.runner, MasterRunner)
        begin_us = now_us() + round(LEAD_S * 1e6) * (4 if far else 1)
        self._expected = len(found)
        self.phases.append({"phase": self._number, "begin_us": begin_us, "sessions": len(found)})
        handed: dict[str, Any] = {"phase": self._number, "begin_us": begin_us, "of": processes(self.environment)}
        handed["sessions"] = [(one.index, one.due_s, [astuple(turn) for turn in one.turns]) for one in found]
        assert self.environment.runner is not None
        self.environment.runner.send_message("phase", handed)

    def _sessions(self) -> list[Session] | None:
        if self._number < 0:
            limits = self.options.max_prompt, self.options.max_output
            return sessions([0.0, 0.0, 1.0], WORKLOADS[self.options.workload], self.options.seed + 1, limits)
        return self.profile.phase(self._number, self.options, self.of_phase(self._number - 1))

    def of_phase(self, number: int) -> list[Record]:
        return [record for record in self.records if record.phase == number]

    def ended(self) -> bool:
        """Whether the last phase has ended; begins the next where there is one."""
        if not self._over and sum(r.last_of_session for r in self.of_phase(self._number)) >= self._expected:
            self._number += 1
            self.begin()
        return self._over

    def write(self, folder: Path) -> None:
        runner = self.environment.runner
        assert runner is not None
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "records.jsonl", self.records)
        document = {
            "profile": self.profile.name,
            "started_at": self.started_at,
            "whole": self._over,
            "processes": processes(self.environment),
            "cpu_s": time.process_time() + sum(self.cpu_s.values()),
            "cpu_warning": runner.cpu_warning_emitted or runner.worker_cpu_warning_emitted,
            "phases": self.phases,
            "saturation": self.profile.found,
            "options": {name: getattr(self.options, name) for name in OPTIONS},
        }
        (folder / "run.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


OPTIONS = (
    *("host", "rate", "duration", "seed", "workload", "cache", "max_prompt", "max_output", "burstiness"),
    *("turns", "think", "trace", "slo", "trials", "patience", "model", "system"),
)

run: Run | None = None


def processes(environment: Environment) -> int:
    """How many processes make load."""
    runner = environment.runner
    return max(1, len(runner.clients.all)) if isinstance(runner, MasterRunner) else 1


def connect(environment: Environment, **_: Any) -> None:
    """Phases go out to the processes that make load, records come back with Locust's own reports."""
    runner = environment.runner
    if runner is not None and not isinstance(runner, MasterRunner):
        runner.register_message("phase", lambda msg, **_: inbox.put(msg.data))


def start(environment: Environment, **_: Any) -> None:
    global run
    outbox.clear()
    if isinstance(environment.runner, WorkerRunner) or not isinstance(environment.shape_class, Profile):
        return
    try:
        run = Run(environment, environment.shape_class)
    except BorgServeError as error:
        environment.process_exit_code = 2
        print(error)
        assert environment.runner is not None
        gevent.spawn(environment.runner.quit)


def report(client_id: str, data: dict[str, Any], **_: Any) -> None:
    data["borg_records"] = [asdict(record) for record in outbox]
    data["borg_cpu_s"] = time.process_time()
    outbox.clear()


def collect(client_id: str, data: dict[str, Any], **_: Any) -> None:
    if run is not None:
        run.records += [from_dict(record) for record in data.get("borg_records", ())]
        run.cpu_s[client_id] = data.get("borg_cpu_s", 0.0)


def stop(environment: Environment, **_: Any) -> None:
    if run is not None and run.options.records is not None:
        run.write(Path(run.options.records))


def judge(environment: Environment, **_: Any) -> None:
    """A generator at its limit measures itself: status 3, whatever the latencies."""
    runner = environment.runner
    if run is not None and runner is not None and environment.process_exit_code is None:
        void = runner.cpu_warning_emitted or runner.worker_cpu_warning_emitted or not run.ended()
        environment.process_exit_code = VOID if void else 0


events.init_command_line_parser.add_listener(add_arguments)
events.init.add_listener(connect)
events.test_start.add_listener(start)
events.report_to_master.add_listener(report)
events.worker_report.add_listener(collect)
events.test_stop.add_listener(stop)
events.quitting.add_listener(judge)
