"""What requests ask: lengths from distributions with published parameters, and texts of which no two begin alike.

It knows no tokenizer: a prompt's length is asked for in words that are one token in common vocabularies, and the report
gives the server's own count.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from borg_serve.yaml_file import parse

WORDS = [
    "river",
    "stone",
    "cloud",
    "engine",
    "paper",
    "light",
    "winter",
    "signal",
    "garden",
    "copper",
    "ladder",
    "market",
]
Z90 = 1.2816
"""The standard normal distribution's 90th percentile."""


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


WORKLOADS = {
    name: Workload(Lengths(*row["prompt"]), Lengths(*row["output"]), row["source"])
    for name, row in parse(Path(__file__).with_name("workloads.yaml").read_text(encoding="utf-8")).items()
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


def body(rng: random.Random, max_tokens: int, system: str | None = None, words: int = 80) -> dict[str, Any]:
    """A greedy streamed request of `max_tokens` tokens with `words` random words of its own."""
    messages = [{"role": "user", "content": f"Write about these words: {' '.join(rng.choices(WORDS, k=words))}."}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return chat("borg-merge-v1", messages, max_tokens)


def chat(model: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> dict[str, Any]:
    """A greedy streamed request whose answer has exactly `max_tokens` tokens and ends with its usage."""
    return {
        "model": model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
