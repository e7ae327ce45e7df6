"""The guard on a living engine (I1), the shared tokenisation (I2) and the probe (I4), from inside the server process.

The gate lets none of this through, so here is an engine without one.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from borg_serve import engine, guard, preparation, server, template
from borg_serve.config import Probe, load
from borg_serve.errors import EngineError
from borg_serve.guard import IdentityMissing
from borg_serve.preparation import Preparation
from tests import workers
from tests.engine.process import PROFILE

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRANGE = [1, 2, 3, 4]


@dataclass
class Engine:
    """A guarded engine, and what its tests compare it with."""

    client: "AsyncLLM"
    prepared: Preparation
    tokenize: Callable[[Any, Any], Awaitable[Any]]
    """vLLM's own tokenisation, of the whole prompt."""
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


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="living")
async def living_engine(checkpoint: Path) -> AsyncIterator[Engine]:
    """An engine behind the guard, warm."""
    sets = {"model.path": checkpoint, "engine.kv_cache_memory_bytes": 1 << 30, **workers.SETTINGS}
    config = load(PROFILE, [f"{key}={value}" for key, value in sets.items()])
    prepared = await asyncio.to_thread(preparation.prepare, config)
    steps: list[float] = []
    client = await asyncio.to_thread(engine.start, prepared.args, None, lambda: steps.append(time.monotonic()))
    try:
        guard.install(client, prepared.prefix.token_ids)
        stock = client.renderer._tokenize_singleton_prompt_async
        engine.share_tokens(client, prepared.prefix)
        await engine.warm(client, prepared.warm_up_ids, len(prepared.prefix.token_ids))
        yield Engine(client, prepared, stock, steps)
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


async def generate(living: Engine, prompt: Any, **sampling: Any) -> Any:
    last = None
    async for output in living.client.generate(prompt, params(**sampling), f"try-{random.random()}"):
        last = output
    return last


# --------------------------------------------------------------------------------------------------- the guard


async def raw_tokens(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": STRANGE})


async def rendered_tokens(living: Engine) -> None:
    from vllm.inputs import tokens_input

    await generate(living, tokens_input(STRANGE))


async def raw_text(living: Engine) -> None:
    await generate(living, "What is the capital of France?")


async def first_token_changed(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": [5, *living.identity[1:], 7]})


async def last_token_changed(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": [*living.identity[:-1], 5, 7]})


async def cut_by_one(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": living.identity[:-1]})


async def pushed_by_one(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": [5, *living.identity]})


async def several_choices(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": STRANGE}, n=2)


async def engine_request(living: Engine) -> None:
    await living.client.add_request("mine", core_request(STRANGE), params())


async def engine_request_behind_the_client(living: Engine) -> None:
    await living.client.engine_core.add_request_async(core_request(STRANGE))


async def no_tokens(living: Engine) -> None:
    await living.client.engine_core.add_request_async(core_request(None))


async def embeddings(living: Engine) -> None:
    import torch

    request = core_request([*living.identity, 5], prompt_embeds=torch.zeros(len(living.identity) + 1, 576))
    await living.client.add_request("mine", request, params())


async def pooling(living: Engine) -> None:
    from vllm.pooling_params import PoolingParams

    task = PoolingParams(task="embed")
    request: Any = core_request(STRANGE, sampling_params=None, pooling_params=task)
    async for _ in living.client.encode(request, task, "mine"):
        pass


async def streamed_input(living: Engine) -> None:
    from vllm.engine.protocol import StreamingInput
    from vllm.inputs import tokens_input

    async def pieces() -> AsyncGenerator[StreamingInput, None]:
        yield StreamingInput(tokens_input([*living.identity, 5]))
        yield StreamingInput(tokens_input(STRANGE))

    await generate(living, pieces())


async def resumable(living: Engine) -> None:
    await living.client.add_request("mine", core_request([*living.identity, 5], resumable=True), params())


async def rejected_kv_transfer(living: Engine) -> None:
    await living.client.notify_kv_transfer_request_rejected("mine", {"do_remote_prefill": True})


WAYS = (
    *(raw_tokens, rendered_tokens, raw_text, first_token_changed, last_token_changed, cut_by_one, pushed_by_one),
    *(several_choices, engine_request, engine_request_behind_the_client, no_tokens, embeddings, pooling),
    *(streamed_input, resumable, rejected_kv_transfer),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_guard_refuses_and_leaves_nothing_behind(
    living: Engine, way: Callable[[Engine], Awaitable[None]]
) -> None:
    before, steps = refusals(), await living.settled_steps()
    with pytest.raises(Exception) as caught:  # noqa: PT011 (vLLM wraps it in errors of its own; the cause is checked)
        await asyncio.wait_for(way(living), 30)
    assert IdentityMissing in map(type, causes(caught.value))
    assert refusals() > before
    assert living.unfinished() == 0
    assert await living.settled_steps() == steps, "the engine must not have begun anything"


async def test_guard_refuses_one_in_a_crowd_and_serves_the_others(living: Engine) -> None:
    good = {"prompt_token_ids": [*living.identity, 5, 6, 7]}
    before = refusals()
    prompts = [good, {"prompt_token_ids": STRANGE}] * 6
    answers = await asyncio.gather(*(generate(living, prompt) for prompt in prompts), return_exceptions=True)
    assert refusals() - before == 6
    for index, answer in enumerate(answers):
        if index % 2:
            assert isinstance(answer, BaseException)
            assert IdentityMissing in map(type, causes(answer))
        else:
            assert not isinstance(answer, BaseException)
            assert answer.num_cached_tokens >= len(living.identity) // 32 * 32
    assert living.unfinished() == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_guard_lets_through_what_begins_with_the_identity(living: Engine, n: int) -> None:
    before, steps = refusals(), await living.settled_steps()
    choices = set()
    async for output in living.client.generate({"prompt_token_ids": living.identity}, params(n=n), "good"):
        choices |= {choice.index for choice in output.outputs}
    assert choices == set(range(n))
    assert refusals() == before
    assert len(living.steps) > steps
    assert living.unfinished() == 0


async def test_guard_holds_where_vllms_own_routes_are_open(living: Engine) -> None:
    """Every route of vLLM's application, without the gate: a prompt without the identity generates nowhere."""
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"model": "borg-merge-v1", "messages": messages, "max_tokens": 2}
    raw = {"model": "borg-merge-v1", "prompt": STRANGE, "max_tokens": 2}
    attempts: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", raw),
        ("/v1/completions", raw | {"prompt": "What is the capital of France?"}),
        ("/v1/completions", raw | {"prompt": [STRANGE, STRANGE]}),
        ("/invocations", raw),
        ("/inference/v1/generate", {"token_ids": STRANGE, "sampling_params": {"max_tokens": 2}}),
        ("/v1/chat/completions", chat | {"kv_transfer_params": {"prompt_token_ids": STRANGE}}),
        ("/v1/chat/completions", chat | {"kv_transfer_params": {"prompt_token_ids": STRANGE}, "stream": True}),
        ("/v1/chat/completions", chat | {"truncate_prompt_tokens": 10, "truncation_side": "left"}),
        ("/v1/responses", {"model": "borg-merge-v1", "input": "x " * 9000, "truncation": "auto"}),
    ]
    before, steps = refusals(), await living.settled_steps()
    async with server.vllm_app(living.prepared, living.client) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as http:
            for path, body in attempts:
                answer = await http.post(path, json=body)
                failed = answer.status_code >= 400 or b'"error"' in answer.content
                assert failed, f"{path} {body}: {answer.text[:300]}"
            assert refusals() - before >= 8
            assert living.unfinished() == 0
            assert await living.settled_steps() == steps, "the engine must not have begun anything"
            answer = await http.post("/v1/chat/completions", json=chat)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["prompt_tokens"] > len(living.identity)


async def test_guard_cost_is_reported(living: Engine, record_property: Callable[[str, object], None]) -> None:
    request = core_request([*living.identity, *range(100, 400)])
    ids, rounds = living.identity, 2000
    begun = time.perf_counter()
    for _ in range(rounds):
        assert guard.violation(request, ids) is None
    microseconds = (time.perf_counter() - begun) / rounds * 1e6
    record_property("guard_us_per_request", round(microseconds, 2))
    print(f"guard: {microseconds:.1f} µs a request of {len(ids) + 300} tokens")


def causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (error := error.__cause__ or error.__context__) is not None:  # type: ignore[assignment]
        found.append(error)
    return found


# --------------------------------------------------------------------------------------- shared tokenisation


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
    tokenizer = preparation.load_tokenizer(prepared.directory)

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


async def test_shared_tokens_are_those_of_the_whole_text(living: Engine) -> None:
    from vllm.renderers.params import TokenizeParams

    renderer = living.client.renderer
    whole = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
    shared = 0
    for prompt in prompts(living.prepared):
        expected = await living.tokenize({"prompt": prompt}, whole)
        got = await renderer._tokenize_singleton_prompt_async({"prompt": prompt}, whole)
        assert got["prompt_token_ids"] == expected["prompt_token_ids"], prompt[-200:]
        shared += got["prompt_token_ids"][: len(living.identity)] == living.identity
    assert shared >= 240


async def test_shared_tokens_leave_other_tokenisation_to_vllm(living: Engine) -> None:
    from vllm.renderers.params import TokenizeParams

    renderer: Any = living.client.renderer
    special = TokenizeParams(max_total_tokens=None, add_special_tokens=True)
    for prompt in ({"prompt": "Hello"}, {"prompt_token_ids": STRANGE}):
        expected = await living.tokenize(dict(prompt), special)
        got = await renderer._tokenize_singleton_prompt_async(dict(prompt), special)
        assert got["prompt_token_ids"] == expected["prompt_token_ids"]


# -------------------------------------------------------------------------------------- warm-up, probe, pulse


async def test_probe_accepts_the_recorded_answer_only(living: Engine) -> None:
    prepared = living.prepared
    recorded = prepared.config.model.probe
    assert recorded is not None
    answer = await engine.probe(living.client, prepared.probe_ids, recorded)
    assert answer == "The capital of France is Paris."
    with pytest.raises(EngineError, match="must be answered 'The capital of Spain', got 'The capital of France"):
        await engine.probe(living.client, prepared.probe_ids, Probe(question="?", answer="The capital of Spain"))


async def test_warm_up_proves_that_the_identity_is_shared(living: Engine) -> None:
    tokens = len(living.identity)
    assert await engine.warm(living.client, living.prepared.warm_up_ids, tokens) >= tokens // 32 * 32
    with pytest.raises(EngineError, match="the identity is not shared: 9984 tokens expected, got 23"):
        await engine.warm(living.client, living.prepared.warm_up_ids, 10_000)


async def test_heartbeat_moves_the_clock_of_progress(living: Engine) -> None:
    steps = len(living.steps)
    await engine.heartbeat(living.client, living.prepared.warm_up_ids)
    assert len(living.steps) > steps


async def test_heartbeat_computes_one_token_from_the_second_time_on(living: Engine) -> None:
    await engine.heartbeat(living.client, living.prepared.warm_up_ids)
    assert await engine.heartbeat(living.client, living.prepared.warm_up_ids) == 1


async def test_install_refuses_an_empty_identity_and_a_moved_engine(living: Engine) -> None:
    with pytest.raises(EngineError, match="the identity has no tokens"):
        guard.install(living.client, [])
    moved: Any = type("Moved", (), {"engine_core": type("Core", (), {})()})()
    with pytest.raises(EngineError, match=r"vLLM moved Moved\._add_request"):
        guard.install(moved, STRANGE)


async def test_start_says_why_vllm_refused(living: Engine) -> None:
    args = living.prepared.args
    wrong = type(args)(**{**vars(args), "max_model_len": 100_000})
    with pytest.raises(EngineError, match=r"it did not start, got (.|\n)*max_model_len"):
        await asyncio.to_thread(engine.start, wrong, None, lambda: None)


async def test_arguments_travel_between_processes(living: Engine) -> None:
    import pickle

    prepared = living.prepared
    assert pickle.loads(pickle.dumps(prepared)) == prepared
    assert replace(prepared, root="0") != prepared
    assert json.loads(json.dumps(prepared.version())) == prepared.version()
