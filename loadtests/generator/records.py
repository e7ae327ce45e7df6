"""What is kept of every request: moments in whole microseconds, the server's own token counts, how it ended.

It knows the definitions of the latencies and how records lie in a file. It does not know Locust, sockets or servers.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path

from borg_serve.yaml_file import parse

DEFINITIONS: dict[str, str] = parse(Path(__file__).with_name("definitions.yaml").read_text(encoding="utf-8"))
"""What every name of a report means."""


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
        return None if self.t_first_us is None else (self.t_first_us - self._begin_us(from_schedule)) / 1e3

    def e2e_ms(self, from_schedule: bool) -> float:
        return (self.t_end_us - self._begin_us(from_schedule)) / 1e3

    def _begin_us(self, from_schedule: bool) -> int:
        return self.t_sched_us if from_schedule else self.t_send_us

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
    with file.open("w", encoding="utf-8", newline="") as out:
        rows = csv.DictWriter(out, [field.name for field in fields(Record)])
        rows.writeheader()
        rows.writerows(asdict(record) | {"itl_us": " ".join(map(str, record.itl_us))} for record in records)
