"""What scheduling costs the host a step, without a GPU: `python -m loadtests.gpu.scheduler [--stock]`.

Requests with one prefix decode, and new ones come as others end. A step is scheduled before the last one's result is
known, as on a GPU. The model is an answer that is always the same token.
"""

import argparse
import gc
import json
import random
import tempfile
import time
from collections import deque
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

from borg_serve.engine.attention_choice import PREFIX_OPTION

PREFIX, OWN = 2132, 107


def main() -> None:
    """Milliseconds of each step's schedule, with and without new prompts, and of the update with its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stock", action="store_true", help="vLLM's own scheduler")
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from tests.vllm.test_scheduler import Engine, configuration, result, tiny

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"max_model_len": 4096, "max_num_batched_tokens": 8192, "max_num_seqs": given.users}
        config = configuration(tiny(Path(folder)), **sizes, prefill_schedule_interval=4)
    config.scheduler_config.async_scheduling = True
    config.additional_config = {PREFIX_OPTION: PREFIX}
    if given.stock:
        config.scheduler_config.scheduler_cls = AsyncScheduler
    engine = Engine(config, blocks=60_000)
    scheduler = engine.scheduler
    rng, numbers = random.Random(0), count()
    prefix = rng.choices(range(1000), k=PREFIX)
    times: dict[str, list[float]] = {"decode": [], "prompts": [], "update": []}

    def run(steps: int) -> None:
        planned: deque[Any] = deque()
        for _ in range(steps):
            while len(scheduler.requests) < given.users:
                engine.ask(str(next(numbers)), prefix + rng.choices(range(1000), k=OWN), rng.randint(64, 192))
            begin = time.perf_counter()
            plan = scheduler.schedule()
            times["prompts" if plan.scheduled_new_reqs else "decode"].append(time.perf_counter() - begin)
            planned.append(plan)
            if len(planned) == 2:
                done = planned.popleft()
                output = result(done)
                begin = time.perf_counter()
                scheduler.update_from_output(done, output)
                times["update"].append(time.perf_counter() - begin)

    run(30)
    gc.freeze()
    for each in times.values():
        each.clear()
    run(given.steps)
    figures = {f"{name}_ms": round(1e3 * mean(each), 2) for name, each in times.items()}
    print(json.dumps({"users": given.users, "scheduler": "stock" if given.stock else "ours", **figures}))


if __name__ == "__main__":
    main()
