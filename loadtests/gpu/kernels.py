"""Where an engine's GPU time goes: `python -m loadtests.gpu.kernels TRACE...`, a line of JSON for each kind of step.

TRACE is what vLLM's torch profiler writes of a worker (`python -m loadtests.gpu.offline MODEL --profile DIR`): a Chrome
trace, in which vLLM marks each engine step with how many requests it reads prompts of and how many it decodes.
"""

import argparse
import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

STEP = re.compile(r"execute_context_(\d+)\((\d+)\)_generation_(\d+)\((\d+)\)")
"""vLLM's name for a step: requests and tokens of prompts, requests and tokens of answers."""
KINDS = (
    ("KV writes", re.compile(r"reshape_and_cache")),
    ("attention", re.compile(r"flash|fmha", re.I)),
    ("merge of the passes", re.compile(r"_merge_kernel")),
    ("matrix products", re.compile(r"nvjet|gemm|cutlass|splitK", re.I)),
    ("fused by torch.compile", re.compile(r"^triton_")),
    ("copies", re.compile(r"memcpy|memset", re.I)),
)

NAME = 100
"""Characters of a kernel's name that are printed: what comes after are template arguments."""


def kind(kernel: str) -> str:
    """What a kernel is there for, by its name."""
    return next((name for name, pattern in KINDS if pattern.search(kernel)), "other")


@dataclass(frozen=True)
class Step:
    """One engine step on the GPU, up to the begin of the next one."""

    prompts: int
    answers: int
    length_us: float
    busy_us: float
    """Of that, with at least one kernel running."""
    kernels_us: dict[str, float]
    """By kernel; those that run beside each other count both."""


def read(path: Path) -> list[Step]:
    """Return a trace's steps in their order, without the last one, whose end is not known."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    streams: dict[Any, list[tuple[float, re.Match[str]]]] = {}
    for event in events:
        if event.get("cat") == "gpu_user_annotation" and (found := STEP.fullmatch(event["name"])):
            streams.setdefault(event.get("tid"), []).append((event["ts"], found))
    # A step is marked on every stream it uses; the main one has all of them.
    main = max(streams.values(), key=lambda found: len(found), default=[])
    marks = sorted(main, key=lambda mark: mark[0])
    work = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    steps = []
    first = 0
    for (begin, mark), (end, _) in pairwise(marks):
        kernels: dict[str, float] = defaultdict(float)
        busy, until = 0.0, begin
        while first < len(work) and work[first][0] < begin:
            first += 1
        while first < len(work) and work[first][0] < end:
            start, stop, name = work[first]
            kernels[name] += stop - start
            busy += max(0.0, stop - max(start, until))
            until = max(until, stop)
            first += 1
        steps.append(Step(int(mark[1]), int(mark[3]), end - begin, busy, dict(kernels)))
    return steps


def summary(steps: list[Step], kernels: int = 12) -> list[dict[str, Any]]:
    """Return, for full decode steps, other decode steps and steps that read prompts: how many, how long, and for what.

    Times are microseconds a step, the middle one for the step as a whole and means for its parts; `kernels`: how many
    of the longest are named.
    """
    full = max((step.answers for step in steps if not step.prompts), default=0)
    groups: dict[str, list[Step]] = {}
    for step in steps:
        name = "with prompts" if step.prompts else f"decode, {full} rows" if step.answers == full else "decode, fewer"
        groups.setdefault(name, []).append(step)
    return [{"steps": name, **_row(group, kernels)} for name, group in groups.items()]


def _row(group: list[Step], kernels: int) -> dict[str, Any]:
    longest: dict[str, float] = defaultdict(float)
    parts: dict[str, float] = defaultdict(float)
    for step in group:
        for kernel, length in step.kernels_us.items():
            longest[kernel[:NAME]] += length
            parts[kind(kernel)] += length

    def means(sums: dict[str, float], most: int) -> dict[str, int]:
        ordered = sorted(sums.items(), key=lambda item: -item[1])[:most]
        return {name: round(length / len(group)) for name, length in ordered}

    return {
        "count": len(group),
        "all_ms": round(sum(step.length_us for step in group) / 1e3, 1),
        "step_us": round(median(step.length_us for step in group)),
        "idle_us": round(sum(step.length_us - step.busy_us for step in group) / len(group)),
        "parts_us": means(parts, len(parts)),
        "kernels_us": means(longest, kernels),
    }


def main() -> None:
    """Print the summary of each trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, nargs="+")
    parser.add_argument("--kernels", type=int, default=12, help="how many of the longest to name")
    arguments = parser.parse_args()
    for path in arguments.trace:
        for row in summary(read(path), arguments.kernels):
            print(json.dumps({"trace": path.name, **row}), flush=True)


if __name__ == "__main__":
    main()
