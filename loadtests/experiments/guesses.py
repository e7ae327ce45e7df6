"""Whether time or usage tells what another key asked: `python -m loadtests.experiments.guesses`.

A stranger asks a long question. Another key then asks, in random order, the same and one that nobody asked, and the
time of each answer is taken, one token long. With `cache_scope: key` nothing may tell the two apart; with `all` both
must. Five minutes on two cores.
"""

import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from loadtests.experiments.experiment import command, entries, note, parser, rotation, surroundings
from loadtests.generator.workload import WORDS
from loadtests.report.bootstrap import ratio
from loadtests.report.tables import render, write
from loadtests.servers.contenders import Start, ours

SCOPES = ("key", "all")
STRANGER, GUESSER = "stranger", "guesser"
WORDS_IN_A_QUESTION = 400


def ask(client: httpx.Client, key: str, text: str) -> tuple[float, int]:
    """(seconds to the end of an answer of one token, the prompt's cached tokens by its usage)."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    begun = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
    taken = time.perf_counter() - begun
    answer.raise_for_status()
    return taken, answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def guess(url: str, rng: random.Random) -> dict[str, tuple[float, int]]:
    """What a right guess of a stranger's question took, and one that nobody asked."""
    right, fresh = (" ".join(rng.choices(WORDS, k=WORDS_IN_A_QUESTION)) for _ in range(2))
    with httpx.Client(base_url=url, timeout=120) as client:
        ask(client, STRANGER, right)
        turns = [("right", right), ("fresh", fresh)]
        rng.shuffle(turns)
        return {name: ask(client, GUESSER, text) for name, text in turns}


def line(scope: str, guesses: list[dict[str, tuple[float, int]]]) -> dict[str, Any]:
    """A row of the report: time of right guesses by that of fresh questions, and the cached tokens of both."""
    right, fresh = ([found[name] for found in guesses] for name in ("right", "fresh"))
    return {
        "scope": scope,
        "guesses": len(guesses),
        "ratio": str(ratio([seconds for seconds, _ in right], [seconds for seconds, _ in fresh])),
        "cached": [sorted({tokens for _, tokens in side}) for side in (right, fresh)],
    }


def text(document: Mapping[str, Any]) -> str:
    """The report for a person."""
    return render("guesses.md.j2", document, words=WORDS_IN_A_QUESTION)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "guesses")
    options.add_argument("--rounds", type=int, default=40)
    arguments = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="borg-guesses-"))
    note(f"logs: {folder}")
    (folder / "keys.yaml").write_text(yaml.safe_dump(entries((STRANGER, GUESSER))))
    starts: dict[str, Start] = {}
    for scope in SCOPES:
        (folder / scope).mkdir()
        sets = (f"server.keys={folder / 'keys.yaml'}", f"limits.cache_scope={scope}", "server.hang_s=60")
        starts[scope] = ours(arguments.config, folder / scope, *sets)
    found: dict[str, list[dict[str, tuple[float, int]]]] = {scope: [] for scope in SCOPES}
    with rotation(starts, arguments.rounds, dropped=2) as turns:
        for number, scope, server in turns:
            guesses = guess(server.url, random.Random(f"{scope} {number}"))
            if number >= 0:
                found[scope].append(guesses)
            note(f"{number} {scope:4} {guesses}")
    lines = [line(scope, guesses) for scope, guesses in found.items()]
    document = {"command": command("guesses", arguments), **surroundings(), "lines": lines, "guesses": found}
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
