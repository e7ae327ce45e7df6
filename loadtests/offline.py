"""Output tokens/s of one vLLM engine without a server: no prefix, a shared one, one that differs in every request.

`python -m loadtests.offline MODEL --attention shared --users 64 256`, on a GPU, with random weights: speed hardly
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

from borg_serve import backend
from borg_serve.device import prepare_environment

PROMPT = 100
"""New tokens in every prompt."""


def prompts(rng: random.Random, prefix: list[int], count: int, unshared: bool) -> list[dict[str, Any]]:
    """Distinct prompts behind the prefix; `unshared` puts other random tokens in its place."""

    def ids(length: int) -> list[int]:
        return [rng.randrange(1000, 150_000) for _ in range(length)]

    return [{"prompt_token_ids": (ids(len(prefix)) if unshared else prefix) + ids(PROMPT)} for _ in range(count)]


def main() -> None:
    """Start the engine, measure every case at every concurrency."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a directory with config.json and tokenizer; weights are not read")
    parser.add_argument("--attention", choices=["stock", "shared", "cascade"], default="stock")
    parser.add_argument("--users", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prefix", type=int, default=2048, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens a request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["none", "shared"], choices=["none", "shared", "unshared"])
    parser.add_argument("--engine", type=json.loads, default={}, help="vLLM's arguments, as JSON")
    parser.add_argument(
        "--profile", type=Path, help="a directory for a trace of every case, for `python -m loadtests.kernels`"
    )
    arguments = parser.parse_args()
    prepare_environment()
    if arguments.attention != "shared":
        os.environ["VLLM_PLUGINS"] = ""  # vLLM as it is: our plugin would also keep the prefix's hashes
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = dict(arguments.engine)
    if arguments.attention == "shared":
        # Stands where the guard stands: every prompt with a prefix begins with the same one.
        more |= backend.sharing(arguments.prefix)
    elif arguments.attention == "cascade":
        more |= {"disable_cascade_attn": False}
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the other runner has none
    if arguments.profile:
        folder = str(arguments.profile.resolve())
        more["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": folder,
            "torch_profiler_with_stack": False,
        }
    begin = time.perf_counter()
    llm = LLM(
        arguments.model,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=8192,
        max_num_seqs=max(arguments.users),
        gpu_memory_utilization=0.9,
        **more,
    )
    settings = {"attention": arguments.attention, "engine": arguments.engine}
    print(json.dumps({**settings, "start_s": round(time.perf_counter() - begin, 1)}), flush=True)
    params = SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True, detokenize=False)
    rng = random.Random(0)
    prefix = [rng.randrange(1000, 150_000) for _ in range(arguments.prefix)]

    def run(case: str, users: int, requests: int = 2) -> float:
        given: Any = prompts(rng, [] if case == "none" else prefix, requests * users, case == "unshared")
        begin = time.perf_counter()
        outputs = llm.generate(given, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - begin)

    for _ in range(2):
        run("shared", 8)  # the prefix is cached
    for users in arguments.users:
        measured: dict[str, list[float]] = {case: [] for case in arguments.cases}
        for _ in range(arguments.repeats):
            for case in arguments.cases:
                measured[case].append(round(run(case, users), 1))
                print(f"{users} users, {case}: {measured[case][-1]} tokens/s", file=sys.stderr, flush=True)
        for case, values in measured.items():
            row = {**settings, "users": users, "case": case, "output_tokens_per_s": median(values), "each": values}
            print(json.dumps(row), flush=True)
    if arguments.profile:
        for case in arguments.cases:
            llm.start_profile()
            run(case, max(arguments.users), 1)
            llm.stop_profile()
            newest = max(arguments.profile.glob("*.pt.trace.json.gz"), key=lambda path: path.stat().st_mtime)
            newest.rename(arguments.profile / f"{arguments.attention}-{case}.json.gz")


if __name__ == "__main__":
    main()
