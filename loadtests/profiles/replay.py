"""Open loop: the arrivals and lengths of a trace, `--trace FILE.csv`; `--rate` is how many times faster than it was."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from borg_serve.errors import ConfigError, Problem
from loadtests.generator.arrivals import read_trace
from loadtests.generator.records import Record
from loadtests.generator.user import MeasuringUser, Profile
from loadtests.generator.workload import Session, Turn

__all__ = ["MeasuringUser", "Replay"]


class Replay(Profile):
    name = "replay"

    def check(self, options: Namespace) -> None:
        if options.trace is None:
            cure = "Name a CSV file: --trace loadtests/traces/example.csv."
            raise ConfigError([Problem("--trace", "is needed to replay one", None, cure)])
        self.requests = read_trace(Path(options.trace))

    def phase(self, number: int, options: Namespace, before: Sequence[Record]) -> list[Session] | None:
        if number > 0:
            return None
        return [
            Session(
                index, due_s / options.rate, [Turn(min(prompt, options.max_prompt), min(output, options.max_output))]
            )
            for index, (due_s, prompt, output) in enumerate(self.requests)
            if due_s / options.rate < options.duration
        ]
