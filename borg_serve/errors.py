"""Every exception this package raises on purpose.

BorgServeError            the base; the command line prints it on stderr and exits with status 2
├── ConfigError           one or more problems in a profile, each with file, key, value and cure
├── CheckpointError       a checkpoint is missing, incomplete or damaged
├── IdentityError         the identity cannot be read, rendered or tokenised as it must be
├── EngineError           the engine cannot be built, or its probe gave a wrong answer
└── ServerError           the server cannot start: a taken port, an unsafe address
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "BorgServeError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "IdentityError",
    "Problem",
    "ServerError",
    "shown",
]


def shown(value: object) -> str:
    """A value as YAML writes it, in one line: a name in quotes, `true`, `{"a": 1}`; `nothing` for none."""
    if value is None:
        return "nothing"
    if isinstance(value, str) and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    return json.dumps(value, ensure_ascii=False, default=str)


class BorgServeError(Exception):
    """Base of every error a user can cause and cure."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a profile, and what to do about it."""

    where: str
    """File and dotted key: `configs/demo-cpu.yaml: engine.max_num_seqs`."""
    what: str
    """What is wrong with the value: `must be a positive integer`."""
    got: object
    cure: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, got {shown(self.got)}. {self.cure}"


class ConfigError(BorgServeError):
    """All problems of one profile at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class CheckpointError(BorgServeError):
    """The checkpoint is missing, incomplete or damaged; the message names the file or tensor."""


class IdentityError(BorgServeError):
    """The identity text or the checkpoint's chat template cannot be used together."""


class EngineError(BorgServeError):
    """The engine refused its arguments, died while starting, or failed the probe."""


class ServerError(BorgServeError):
    """The server cannot start where it was told to."""
