"""Ours beside vLLM's server for identities that end elsewhere in a block: `python -m loadtests.experiments.tails`.

Every request computes the identity's tail again: the part after its last full KV block. vLLM's CPU engine has blocks of
128 tokens, ours has 32. The shipped identity is padded to tails of several lengths, and each is measured on both, A B B
A. About ten minutes on two cores.
"""

import asyncio
import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from borg_serve.checkpoint.locate import load_tokenizer
from borg_serve.config import Config, load
from borg_serve.engine.environment import prepare_environment
from borg_serve.engine.prepare import prepare
from borg_serve.identity import template
from borg_serve.identity.prefix import token_prefix
from borg_serve.identity.text import load_identity
from loadtests.experiments.experiment import command, medians, note, parser, rotation, surroundings
from loadtests.generator.closed_loop import closed_loop
from loadtests.generator.workload import WORDS, body
from loadtests.report.tables import render, write
from loadtests.servers import local
from loadtests.servers.contenders import NEEDED, Start, ours, stock

BLOCK = 128
"""vLLM's default on a CPU."""
USERS, REQUESTS, TOKENS = 8, 8, 64


def padded(config: Config, tails: Sequence[int], folder: Path) -> tuple[int, list[tuple[Path, int]]]:
    """(tokens of the profile's identity, for each tail a file with as many words more as it takes, and its tokens)."""
    ready = prepare(config)
    tokenizer = load_tokenizer(ready.directory)
    stock = template.stock_template(ready.directory)
    shipped = len(ready.prefix.token_ids)

    def longer(text: str) -> int:
        return shipped + len(tokenizer.encode(text)) - len(tokenizer.encode(ready.identity.text))

    found = []
    for tail in tails:
        file = folder / f"identity-{tail}.md"
        for count in range(2 * BLOCK):
            words = " ".join(WORDS[index % len(WORDS)] for index in range(count))
            text = f"{ready.identity.text}\n\nSome words: {words}." if count else ready.identity.text
            if longer(text) % BLOCK == tail:
                break
        else:
            raise ValueError(f"no padding of {config.identity.prompt} has a tail of {tail} tokens")
        file.write_text(text, encoding="utf-8")
        whole = load_identity(file)
        render = partial(template.render, tokenizer, template.wrap(stock, whole))
        found.append((file, len(token_prefix(render, tokenizer, whole).token_ids)))
    return shipped, found


def once(url: str, system: str | None, seed: int, tokens: int = TOKENS) -> dict[str, float]:
    """One block of requests: what it gave, and how many prompt tokens were computed for each request."""
    rng = random.Random(seed)
    names = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
    before = [local.metric(url, name) for name in names]
    loop = asyncio.run(closed_loop(url, USERS, [body(rng, tokens, system) for _ in range(REQUESTS)]))
    asked, found = (local.metric(url, name) - was for name, was in zip(names, before, strict=True))
    return {**loop.figures(), "computed": (asked - found) / REQUESTS}


def measure(config: Config, file: Path, tokens: int, theirs: local.Server, rounds: int) -> dict[str, Any]:
    """A row for an identity: its tokens, and the blocks of both sides."""
    tail, folder = tokens % BLOCK, file.with_suffix("")
    folder.mkdir()
    row: dict[str, Any] = {"tail": tail, "tokens": tokens, "ours": [], "stock": []}
    starts: dict[str, Start] = {
        "ours": ours(config.file, folder, f"identity.prompt={file}"),
        "stock": lambda: nullcontext(theirs),
    }
    with rotation(starts, rounds) as turns:
        for number, name, server in turns:
            system = file.read_text(encoding="utf-8") if name == "stock" else None
            once(server.url, system, 1000 * tail + number, tokens=2)  # not counted
            row[name].append(once(server.url, system, 2000 * tail + number))
            note(f"tail {tail} {name:5} {row[name][-1]}")
    return row


def lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line of the report for each identity: medians of both sides, and how many requests failed."""
    keys = ("output_tokens_per_s", "ttft_ms", "computed")
    return [
        {"tail": row["tail"], "tokens": row["tokens"]}
        | {name: medians(row[name], *keys) for name in ("ours", "stock")}
        | {"failed": sum(int(block["failed"]) for name in ("ours", "stock") for block in row[name])}
        for row in rows
    ]


def text(document: Mapping[str, Any]) -> str:
    """The report for a person."""
    load = (USERS, REQUESTS, TOKENS)
    return render("tails.md.j2", document, lines=lines(document["rows"]), block=BLOCK, load=load)


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    options = parser(__doc__, "tails-cpu")
    options.add_argument("--tails", type=int, nargs="+", default=[16, 48, 80, 112], help=f"tokens, modulo {BLOCK}")
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    prepare_environment()
    config, folder = load(Path(arguments.config)), Path(tempfile.mkdtemp(prefix="borg-tails-"))
    note(f"logs: {folder}")
    shipped, identities = padded(config, arguments.tails, folder)
    note(f"identities: {[tokens for _, tokens in identities]} tokens")
    with stock(config, folder, NEEDED)() as theirs:
        rows = [measure(config, file, tokens, theirs, arguments.rounds) for file, tokens in identities]
    found = {"rounds": arguments.rounds, "shipped": shipped % BLOCK, "rows": rows}
    document = {"command": command("tails", arguments), **surroundings(), **found}
    write(arguments.out, arguments.name, document, text(document))


if __name__ == "__main__":
    main()
