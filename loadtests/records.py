"""What is kept of every request: moments in whole microseconds, the server's own token counts, how it ended.

It knows the definitions of the latencies and how records lie in a file. It does not know Locust, sockets or servers.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path

__all__ = ["DEFINITIONS", "Outcome", "Record", "read", "write", "write_csv"]

DEFINITIONS = {
    "t_sched": "when a request was due: its place in the schedule that was drawn before the run; in a conversation the "
    "later turns are due a think time after the answer before.",
    "t_send": "when it was handed to the HTTP client. Every request opens a connection of its own, as a user would, so "
    "connecting comes after t_send and the first byte written a little later.",
    "t_first, t_last": "the first and the last event whose delta has content. The role event, which carries none, is "
    "no token.",
    "TTFT": "time to first token, t_first - t_send; from schedule: t_first - t_sched.",
    "n": "output tokens by the server's own count (usage.completion_tokens), never a count of events.",
    "TPOT": "time per output token, (t_last - t_first) / (n - 1); undefined for n <= 1.",
    "ITL": "inter-token latency, every gap between two events with content. One event may hold several tokens.",
    "E2E": "to the end of the stream, t_end - t_send; from schedule: t_end - t_sched.",
    "goodput": "requests that ended well and met every per-request bound of the SLO, per second of the run (from its "
    "start to the end of its last request). Failed requests, and those without a metric that a bound is set for, count "
    "among all requests, not among the good.",
    "schedule lag": "t_send - t_sched: how late the generator itself was.",
    "percentile": "the smallest value that at least that part of the requests do not exceed; nothing is interpolated "
    "or put in buckets.",
    "cached tokens": "prompt tokens that the server says it found in its prefix cache (usage.prompt_tokens_details).",
}


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    REFUSED = "refused"
    """429 or 503: the server was busy, draining, or a key over its limits."""
    REJECTED = "rejected"
    """Another 4xx: the request itself was wrong."""
    DEADLINE = "deadline"
    """The server gave it up at its own deadline."""
    SERVER_ERROR = "server error"
    BROKEN = "broken stream"
    """The connection ended inside the answer."""
    GRAMMAR = "wrong grammar"
    """The answer ended, but not as a stream must: no finish reason, no usage, no [DONE], no JSON."""
    TIMEOUT = "client timeout"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Record:
    """One request; moments are microseconds from the start of its phase."""

    phase: int
    """-1 is the warm-up, which no figure counts."""
    session: int
    turn: int
    worker: int
    last_of_session: bool
    t_sched_us: int
    t_send_us: int
    t_first_us: int | None
    t_last_us: int | None
    t_end_us: int
    itl_us: Sequence[int]
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    outcome: Outcome
    status: int
    detail: str
    """The error's code, or what was wrong with the stream."""

    @property
    def ok(self) -> bool:
        return self.outcome == Outcome.OK

    def ttft_ms(self, from_schedule: bool) -> float | None:
        if self.t_first_us is None:
            return None
        return (self.t_first_us - (self.t_sched_us if from_schedule else self.t_send_us)) / 1e3

    def e2e_ms(self, from_schedule: bool) -> float:
        return (self.t_end_us - (self.t_sched_us if from_schedule else self.t_send_us)) / 1e3

    def tpot_ms(self) -> float | None:
        if self.t_first_us is None or self.t_last_us is None or self.output_tokens <= 1:
            return None
        return (self.t_last_us - self.t_first_us) / (self.output_tokens - 1) / 1e3

    def metric_ms(self, name: str, from_schedule: bool) -> float | None:
        """`ttft`, `tpot`, `itl` (the worst gap) or `e2e`; None where it is undefined."""
        if name == "ttft":
            return self.ttft_ms(from_schedule)
        if name == "tpot":
            return self.tpot_ms()
        if name == "itl":
            return max(self.itl_us) / 1e3 if self.itl_us else None
        return self.e2e_ms(from_schedule)


def write(file: Path, records: Iterable[Record]) -> None:
    """One JSON object a line."""
    with file.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")


def read(lines: Iterable[str]) -> list[Record]:
    """Records from lines of JSON."""
    return [from_dict(json.loads(line)) for line in lines]


def from_dict(data: dict[str, object]) -> Record:
    """A record from its JSON object. Raises TypeError for unknown or missing names, ValueError for a wrong outcome."""
    return Record(**{**data, "outcome": Outcome(str(data["outcome"]))})  # type: ignore[arg-type]


def write_csv(file: Path, records: Iterable[Record]) -> None:
    """One row a request; the gaps are joined by spaces."""
    names = [field.name for field in fields(Record)]
    with file.open("w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(names)
        for record in records:
            data = asdict(record) | {"itl_us": " ".join(map(str, record.itl_us))}
            rows.writerow(["" if data[name] is None else data[name] for name in names])
