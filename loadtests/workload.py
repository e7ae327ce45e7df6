"""What requests ask: lengths from distributions with published parameters, and texts of which no two begin alike.

It knows no tokenizer: a prompt's length is asked for in words that are one token in common vocabularies, and the report
gives the server's own count. A log-normal whose one published parameter is its mean or median gets the spread below,
which is ours.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loadtests.streaming import WORDS

__all__ = ["WORKLOADS", "Cache", "Lengths", "Session", "Turn", "Workload", "message", "sessions"]

SIGMA = 1.0
"""Of the logarithm: the 90th percentile is 3.6 times the median."""

Cache = Literal["cold", "warm", "unshared"]
"""cold: no warm-up, for a server that was just started. warm: some requests go first and are not counted. unshared: as
warm, but every text begins with the time, so that nothing after the identity can be found in a cache (a control)."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens, cut to [1, limit]; `fixed` gives every request the median."""

    median: float
    fixed: bool = False

    @classmethod
    def of_mean(cls, mean: float) -> "Lengths":
        return cls(mean / math.exp(SIGMA**2 / 2))

    def draw(self, rng: random.Random, limit: int) -> int:
        value = self.median if self.fixed else rng.lognormvariate(math.log(self.median), SIGMA)
        return max(1, min(limit, round(value)))


@dataclass(frozen=True)
class Workload:
    """Lengths of a user turn and of its answer, and where they were published."""

    prompt: Lengths
    output: Lengths
    source: str


WORKLOADS = {
    "alpaca": Workload(
        Lengths.of_mean(19.31),
        Lengths.of_mean(58.45),
        "Alpaca, mean 19.31 prompt and 58.45 output tokens: Kwon et al., Efficient Memory Management for Large "
        "Language Model Serving with PagedAttention, SOSP 2023, figure 11",
    ),
    "sharegpt": Workload(
        Lengths.of_mean(161.31),
        Lengths.of_mean(337.99),
        "ShareGPT, mean 161.31 prompt and 337.99 output tokens: Kwon et al., SOSP 2023, figure 11",
    ),
    "azure-conversation": Workload(
        Lengths(1020),
        Lengths(129),
        "Azure conversation trace of 2023, median 1,020 prompt and 129 output tokens: "
        "Patel et al., Splitwise, ISCA 2024",
    ),
    "azure-code": Workload(
        Lengths(1500),
        Lengths(13),
        "Azure coding trace of 2023, median 1,500 prompt and 13 output tokens: Patel et al., Splitwise, ISCA 2024",
    ),
    "mooncake": Workload(
        Lengths.of_mean(7590),
        Lengths.of_mean(182),
        "Kimi's trace, mean 7,590 prompt and 182 output tokens: Qin et al., Mooncake, 2024",
    ),
    "fixed": Workload(
        Lengths(80, fixed=True), Lengths(100_000, fixed=True), "80 prompt words and the longest answer allowed, always"
    ),
}


@dataclass(frozen=True, slots=True)
class Turn:
    prompt_tokens: int
    output_tokens: int
    think_s: float = 0.0
    """From the answer before to this turn; 0 for the first."""


@dataclass(frozen=True, slots=True)
class Session:
    """One arrival: a request, or a conversation of several."""

    index: int
    due_s: float
    turns: Sequence[Turn]


def sessions(
    arrivals: Sequence[float],
    workload: Workload,
    seed: int,
    limits: tuple[int, int],
    turns: int = 1,
    think_s: float = 0.0,
) -> list[Session]:
    """What arrives at each moment. `limits`: the longest prompt and output, in tokens.

    With `turns` > 1 a conversation has 1 to 2 * turns - 1 of them, all equally likely, and think times are exponential
    with mean `think_s`.
    """
    rng = random.Random(f"lengths {seed}")
    found = []
    for index, due in enumerate(arrivals):
        count = 1 if turns == 1 else rng.randint(1, 2 * turns - 1)
        drawn = [
            Turn(
                workload.prompt.draw(rng, limits[0]),
                workload.output.draw(rng, limits[1]),
                rng.expovariate(1 / think_s) if number and think_s else 0.0,
            )
            for number in range(count)
        ]
        found.append(Session(index, due, drawn))
    return found


def message(seed: int, phase: int, session: int, turn: int, words: int) -> str:
    """The text of a user turn: a number of its own first, so that no two texts share a cache block, then words."""
    rng = random.Random(f"text {seed} {phase} {session} {turn}")
    number = rng.getrandbits(40)
    return f"Note {number}: write about {' '.join(rng.choices(WORDS, k=words))}."
