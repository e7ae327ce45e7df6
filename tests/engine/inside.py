"""An engine inside the tests' own process, behind the guard and without a gate, and requests for it."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prometheus_client import REGISTRY

from borg_serve.checkpoint.locate import load_tokenizer
from borg_serve.config import load
from borg_serve.engine.client import start, warm
from borg_serve.engine.prepare import Preparation, prepare
from borg_serve.identity import template
from borg_serve.serving.single import vllm_app
from tests import workers
from tests.engine.process import PROFILE

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM


@dataclass
class Engine:
    """A guarded engine: its client, what it was made from, and the times of its steps."""

    client: "AsyncLLM"
    prepared: Preparation
    steps: list[float] = field(default_factory=list)

    @property
    def identity(self) -> list[int]:
        return list(self.prepared.prefix.token_ids)

    def unfinished(self) -> int:
        count: int = self.client.get_num_unfinished_requests()
        return count

    async def settled_steps(self) -> int:
        """The number of the engine's steps so far, once the last of them has been reported."""
        count = -1
        while count != len(self.steps):
            count = len(self.steps)
            await asyncio.sleep(0.3)
        return count


@asynccontextmanager
async def running_engine(checkpoint: Path) -> AsyncIterator[Engine]:
    """A warm engine while the block runs."""
    sets = {"model.path": checkpoint, "engine.kv_cache_memory_bytes": 1 << 30, **workers.SETTINGS}
    config = load(PROFILE, [f"{key}={value}" for key, value in sets.items()])
    prepared = await asyncio.to_thread(prepare, config)
    steps: list[float] = []

    def step() -> None:
        steps.append(time.monotonic())

    client = await asyncio.to_thread(start, prepared.args, prepared.prefix, None, step)
    try:
        await warm(client, prepared.warm_up_ids, len(prepared.prefix.token_ids))
        yield Engine(client, prepared, steps)
    finally:
        client.shutdown(timeout=2)


def refusals() -> float:
    return REGISTRY.get_sample_value("borg_guard_refusals_total") or 0.0


def params(**more: Any) -> Any:
    from vllm.sampling_params import SamplingParams

    return SamplingParams(max_tokens=4, temperature=0.5, **more)


def core_request(ids: list[int] | None, **more: Any) -> "EngineCoreRequest":
    from vllm.v1.engine import EngineCoreRequest

    fields: dict[str, Any] = {
        "request_id": f"mine-{random.random()}",
        "prompt_token_ids": ids,
        "mm_features": None,
        "sampling_params": params(),
        "pooling_params": None,
        "arrival_time": time.time(),
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**fields | more)


@asynccontextmanager
async def served(living: Engine) -> AsyncIterator[httpx.AsyncClient]:
    """vLLM's own application over the engine, without the gate."""
    async with vllm_app(living.prepared, living.client) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as http:
            yield http


async def generate(living: Engine, prompt: Any, **sampling: Any) -> Any:
    last = None
    async for output in living.client.generate(prompt, params(**sampling), f"try-{random.random()}"):
        last = output
    return last


def causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (error := error.__cause__ or error.__context__) is not None:  # type: ignore[assignment]
        found.append(error)
    return found


def prompts(prepared: Preparation) -> list[str]:
    """Rendered conversations of many kinds, then texts that merely resemble a prompt."""
    chance = random.Random(0)
    alphabet = [
        *"abc XYZ 019 .,!?\n\t\"'{}<|>",
        "\u200b",
        "é",
        "e\u0301",
        "你",
        "好",
        "😀",
        "👩\u200d👧",
        "\u2028",
        "  ",
        "ß",
    ]
    tokenizer = load_tokenizer(prepared.directory)

    def text(size: int) -> str:
        return "".join(chance.choices(alphabet, k=size))

    rendered = []
    for index in range(240):
        size = 12_000 if index % 40 == 0 else chance.randrange(0, 60)
        messages = [{"role": "user", "content": text(size)}]
        if index % 3:
            messages.insert(0, {"role": "system", "content": text(chance.randrange(0, 40))})
        if index % 4 == 0:
            messages += [{"role": "assistant", "content": text(9)}, {"role": "user", "content": text(9)}]
        rendered.append(template.render(tokenizer, prepared.chat_template, messages, None))
    beginning = prepared.prefix.text
    strange = [
        "",
        "x",
        beginning[:-1],
        beginning,
        beginning + prepared.prefix.follows,
        beginning + "zzz",
        beginning[1:],
    ]
    return [*rendered, *strange]
