"""Output tokens/s of one vLLM engine without a server: no prefix, a shared one, one that differs in every request.

`python -m loadtests.gpu.offline MODEL --attention shared --users 64 256`, on a GPU, with random weights: speed hardly
depends on the values. `stock` and `cascade` are vLLM without anything of ours. One engine a process; a line of JSON
each measurement.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from borg_serve.engine.arguments import SCHEDULER, WORKERS
from borg_serve.engine.attention_choice import sharing
from borg_serve.engine.environment import prepare_environment

PROMPT = 100
"""New tokens in every prompt."""


def prompts(rng: random.Random, prefix: list[int], count: int, unshared: bool) -> list[dict[str, Any]]:
    """Distinct prompts behind the prefix; `unshared` puts other random tokens in its place."""

    def ids(length: int) -> list[int]:
        return [rng.randrange(1000, 150_000) for _ in range(length)]

    return [{"prompt_token_ids": (ids(len(prefix)) if unshared else prefix) + ids(PROMPT)} for _ in range(count)]


def options() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a directory with config.json and tokenizer; weights are not read")
    parser.add_argument("--attention", choices=["stock", "shared", "cascade"], default="stock")
    parser.add_argument("--users", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prefix", type=int, default=2048, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens a request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["none", "shared"], choices=["none", "shared", "unshared"])
    parser.add_argument("--engine", type=json.loads, default={}, help="vLLM's arguments, as JSON")
    parser.add_argument("--profile", type=Path, help="a directory for a trace of every case, for loadtests.gpu.kernels")
    return parser


def engine(given: argparse.Namespace) -> Any:
    """A vLLM engine with the attention that was asked for, and random weights."""
    prepare_environment()
    from vllm import LLM

    more: dict[str, Any] = dict(given.engine)
    if given.attention == "shared":
        # Stands where the guard stands: every prompt with a prefix begins with the same one.
        more |= {"scheduler_cls": SCHEDULER, "worker_cls": WORKERS["cuda"], **sharing(given.prefix)}
    elif given.attention == "cascade":
        more |= {"disable_cascade_attn": False}
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the other runner has none
    if given.profile:
        folder = str(given.profile.resolve())
        profiler = {"profiler": "torch", "torch_profiler_dir": folder, "torch_profiler_with_stack": False}
        more["profiler_config"] = profiler
    shape = {"max_model_len": 8192, "max_num_seqs": max(given.users), "gpu_memory_utilization": 0.9}
    return LLM(given.model, load_format="dummy", dtype="bfloat16", **shape, **more)


def main() -> None:
    """Start the engine, measure every case at every concurrency."""
    given = options().parse_args()
    begin = time.perf_counter()
    llm = engine(given)
    from vllm import SamplingParams

    settings = {"attention": given.attention, "engine": given.engine}
    print(json.dumps({**settings, "start_s": round(time.perf_counter() - begin, 1)}), flush=True)
    params = SamplingParams(temperature=0.0, max_tokens=given.tokens, ignore_eos=True, detokenize=False)
    rng = random.Random(0)
    prefix = [rng.randrange(1000, 150_000) for _ in range(given.prefix)]

    def run(case: str, users: int, requests: int = 2) -> float:
        batch: Any = prompts(rng, [] if case == "none" else prefix, requests * users, case == "unshared")
        begin = time.perf_counter()
        outputs = llm.generate(batch, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - begin)

    for _ in range(2):
        run("shared", 8)  # the prefix is cached
    for users in given.users:
        measured: dict[str, list[float]] = {case: [] for case in given.cases}
        for _ in range(given.repeats):
            for case, values in measured.items():
                values.append(round(run(case, users), 1))
                print(f"{users} users, {case}: {values[-1]} tokens/s", file=sys.stderr, flush=True)
        for case, values in measured.items():
            row = {**settings, "users": users, "case": case, "output_tokens_per_s": median(values), "each": values}
            print(json.dumps(row), flush=True)
    for case in given.cases if given.profile else ():
        llm.start_profile()
        run(case, max(given.users), 1)
        llm.stop_profile()
        newest = max(given.profile.glob("*.pt.trace.json.gz"), key=lambda path: path.stat().st_mtime)
        newest.rename(given.profile / f"{given.attention}-{case}.json.gz")


if __name__ == "__main__":
    main()
