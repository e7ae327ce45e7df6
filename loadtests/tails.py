"""How far ours is from vLLM's server for identities that end elsewhere in a block: `python -m loadtests.tails`.

What lies behind the last full KV block of the identity, its tail, is computed for every request. vLLM's CPU engine has
blocks of 128 tokens, ours takes 32. The shipped identity is padded to tails of several lengths; each is measured on
both, A B B A. About ten minutes on two cores.
"""

import argparse
import asyncio
import os
import platform
import random
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from borg_serve import identity, preparation, template
from borg_serve.config import Config, load
from borg_serve.device import prepare_environment, vllm_version
from loadtests import servers
from loadtests.contenders import contenders
from loadtests.streaming import WORDS, body, closed_loop
from loadtests.tables import table, write

BLOCK = 128
"""vLLM's default on a CPU."""
USERS, REQUESTS, TOKENS = 8, 8, 64


def padded(config: Config, tails: Sequence[int], folder: Path) -> tuple[int, list[tuple[Path, int]]]:
    """(tokens of the profile's identity, for each tail a file with as many words more as it takes, and its tokens)."""
    ready = preparation.prepare(config)
    tokenizer = preparation.load_tokenizer(ready.directory)
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
        whole = identity.load(file)
        render = partial(template.render, tokenizer, template.wrap(stock, whole))
        found.append((file, len(identity.token_prefix(render, tokenizer, whole).token_ids)))
    return shipped, found


def once(url: str, system: str | None, seed: int, tokens: int = TOKENS) -> dict[str, float]:
    """One block of requests: what it gave, and how many prompt tokens were computed for each request."""
    rng = random.Random(seed)
    names = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
    before = [servers.metric(url, name) for name in names]
    loop = asyncio.run(closed_loop(url, USERS, [body(rng, tokens, system) for _ in range(REQUESTS)], tokens))
    asked, found = (servers.metric(url, name) - was for name, was in zip(names, before, strict=True))
    return {
        "output_tokens_per_s": loop.output_tokens_per_s,
        "ttft_ms": loop.ttft_ms,
        "computed": (asked - found) / REQUESTS,
        "failed": len(loop.failures),
    }


def measure(config: Config, identities: Sequence[tuple[Path, int]], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each identity: its tokens, and the blocks of both sides."""
    rows = []
    contender = next(one for one in contenders(config, folder, []) if one.name == "stock")
    with contender.start() as stock:
        stock.pause()
        for file, tokens in identities:
            port, tail = servers.free_port(), tokens % BLOCK
            command = servers.ours(str(config.file), port, f"identity.prompt={file}")
            row: dict[str, Any] = {"tail": tail, "tokens": tokens, "ours": [], "stock": []}
            with servers.running("ours", command, port, "/ready", folder / f"ours-{tail}.log") as ours:
                ours.pause()
                sides: dict[str, tuple[Any, str | None]] = {
                    "ours": (ours, None),
                    "stock": (stock, file.read_text(encoding="utf-8")),
                }
                for number in range(rounds):
                    for name in ("ours", "stock") if number % 2 == 0 else ("stock", "ours"):
                        server, system = sides[name]
                        server.resume()
                        once(server.url, system, 1000 * tail + number, tokens=2)  # not counted
                        row[name].append(once(server.url, system, 2000 * tail + number))
                        server.pause()
                        print(f"tail {tail} {name:5} {row[name][-1]}", file=sys.stderr, flush=True)
                ours.resume()
            rows.append(row)
        stock.resume()
    return rows


def markdown(document: Mapping[str, Any]) -> str:
    """The report for a person."""

    def of(row: Mapping[str, Any], name: str, key: str) -> float:
        return float(median(result[key] for result in row[name]))

    heads = ["tail, tokens", "identity, tokens", "computed a request, ours", "stock", "output tokens/s, ours", "stock"]
    heads += ["ours / stock", "TTFT p50 ms, ours", "stock", "ours / stock", "failed"]
    cells = []
    for row in document["rows"]:
        speed, ttft = ([of(row, name, key) for name in ("ours", "stock")] for key in ("output_tokens_per_s", "ttft_ms"))
        failed = sum(int(result["failed"]) for name in ("ours", "stock") for result in row[name])
        cells.append(
            [
                row["tail"],
                row["tokens"],
                *(f"{of(row, name, 'computed'):.0f}" for name in ("ours", "stock")),
                *(f"{value:.1f}" for value in speed),
                f"{speed[0] / speed[1]:.2f}",
                *(f"{value:.0f}" for value in ttft),
                f"{ttft[0] / ttft[1]:.2f}",
                failed,
            ]
        )
    machine = document["machine"]
    return f"""# What the identity's tail is worth

`{document["command"]}` on {machine["cores"]} cores ({machine["processor"]}), vLLM {document["vllm"]}, demo model, CPU.

The tail is what lies behind the identity's last full KV block; it is computed for every request. vLLM's server at its
defaults has blocks of {BLOCK} tokens here, ours has 32. The shipped identity happens to end {document["shipped"]}
tokens behind a multiple of both, so that the block size shows nothing for it; another text ends elsewhere. The same
text with words added, measured on both: {USERS} users, {REQUESTS} requests of {TOKENS} output tokens a block,
{document["rounds"]} blocks a side, A B B A, medians. Computed a request: prompt tokens that came from no cache, by the
servers' own metrics.

{table(heads, cells)}
"""


def main() -> None:
    """Measure, and write the report and its JSON twin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo-cpu.yaml"))
    parser.add_argument("--tails", type=int, nargs="+", default=[16, 48, 80, 112], help=f"tokens, modulo {BLOCK}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    prepare_environment()
    config, folder = load(arguments.config), Path(tempfile.mkdtemp(prefix="borg-tails-"))
    print(f"logs: {folder}", file=sys.stderr)
    shipped, identities = padded(config, arguments.tails, folder)
    print(f"identities: {[tokens for _, tokens in identities]} tokens", file=sys.stderr, flush=True)
    document = {
        "command": f"python -m loadtests.tails --tails {' '.join(map(str, arguments.tails))} "
        f"--rounds {arguments.rounds}",
        "vllm": vllm_version(),
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "rounds": arguments.rounds,
        "shipped": shipped % BLOCK,
        "rows": measure(config, identities, arguments.rounds, folder),
    }
    write(arguments.out, "tails-cpu", document, markdown(document))


if __name__ == "__main__":
    main()
