"""What requests ask: lengths from distributions with published parameters, and texts of which no two begin alike.

It knows no tokenizer: a prompt's length is asked for in words that are one token in common vocabularies, and the report
gives the server's own count.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loadtests.streaming import WORDS

__all__ = ["WORKLOADS", "Cache", "Lengths", "Session", "Turn", "Workload", "message", "sessions"]

Z90 = 1.2816
"""The standard normal distribution's 90th percentile."""

Cache = Literal["cold", "warm", "unshared"]
"""cold: no warm-up, for a server that was just started. warm: some requests go first and are not counted. unshared: as
warm, but every text begins with the time, so that nothing after the identity can be found in a cache (a control)."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens through a median and a 90th percentile, cut to [1, limit]."""

    median: float
    p90: float

    def draw(self, rng: random.Random, limit: int) -> int:
        sigma = math.log(self.p90 / self.median) / Z90
        return max(1, min(limit, round(rng.lognormvariate(math.log(self.median), sigma))))


@dataclass(frozen=True)
class Workload:
    """Lengths of a user turn and of its answer, and where they were published."""

    prompt: Lengths
    output: Lengths
    source: str


# Medians and 90th percentiles were computed from the traces themselves, every request counted.
AZURE = (
    "Azure LLM inference trace 2023 (github.com/Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_{}.csv, {:,} "
    "requests; CC BY), of Patel et al., Splitwise, ISCA 2024: prompt p50 {:,}, p90 {:,}; output p50 {}, p90 {}"
)
WORKLOADS = {
    "short": Workload(
        Lengths(12, 43), Lengths(35, 126), "questions short enough for two CPU cores; our choice, from no publication"
    ),
    "azure-conversation": Workload(
        Lengths(1020, 2735), Lengths(129, 424), AZURE.format("conv", 19366, 1020, 2735, 129, 424)
    ),
    "azure-code": Workload(Lengths(1469, 5194), Lengths(13, 55), AZURE.format("code", 8819, 1469, 5194, 13, 55)),
    "mooncake": Workload(
        Lengths(6909, 27367),
        Lengths(350, 597),
        "Kimi's conversation trace (github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl, "
        "12,031 requests), of Qin et al., Mooncake, FAST 2025: prompt p50 6,909, p90 27,367; output p50 350, p90 597",
    ),
    "fixed": Workload(
        Lengths(80, 80), Lengths(100_000, 100_000), "80 prompt words and the longest answer allowed, always"
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
